"""Supervised fine-tuning: media reach the loss, and text-only data train as TRL's trainer trains them."""

import shutil
import tempfile

import pytest
import torch
from datasets import Dataset
from media_files import cut
from omni_runs import DEFAULTS, one_row_per_tag
from test_grpo_parity import WORDS
from test_mixed_batches import alone_by_transformers, rows_of
from tiny_models import FAMILIES, build_tiny, build_tiny_text
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from maple_trl.data.tiny_omni import target_text
from maple_trl.omni.encoded import MediaMismatchError
from maple_trl.omni.families import family_for
from maple_trl.omni.lora import build_lora_config
from maple_trl.omni.prompt import RowError
from maple_trl.trainers.common.checkpoint import ResumeError
from maple_trl.trainers.omni_sft.config import OmniSFTConfig
from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer


pytestmark = pytest.mark.slow


TOWERS = ("visual", "audio_tower", "language_model")
OPTIONS = {name: value for name, value in DEFAULTS.items() if name != "num_generations"}


@pytest.fixture(scope="module")
def rows(seven_tags):
    """A folder of clips and 28 rows, four of each tag, with completions of different lengths."""
    folder, dataset = seven_tags
    return folder, dataset.map(lambda row: {"completion": target_text(row)})


def build(folder, dataset, family="qwen2_5_omni", trainer_class=OmniSFTTrainer, **options):
    arguments = ("model", "processing_class", "eval_dataset", "peft_config", "callbacks", "data_collator")
    given = {name: options.pop(name) for name in arguments if name in options}
    if "model" not in given:
        model, processor = build_tiny(family)
        given = {"model": model, "processing_class": processor} | given
    output_dir = options.pop("output_dir", None) or tempfile.mkdtemp(prefix="omni-sft-")
    args = OmniSFTConfig(output_dir=str(output_dir), media_root=str(folder), **(OPTIONS | options))
    return trainer_class(args=args, train_dataset=dataset, **given)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def one_step(folder, dataset, **options):
    """The loss of one batch that is the whole data set."""
    trainer = build(
        folder, dataset, per_device_train_batch_size=len(dataset), gradient_accumulation_steps=1, **options
    )
    trainer.train()
    return losses(trainer)[0]


# The loss


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_audio"])
@pytest.mark.matrix(cases=3)
def test_the_loss_of_a_mixed_batch_is_the_mean_over_tokens_of_rows_alone(family, accumulates, rows):
    folder, dataset = rows
    mixed = Dataset.from_list(rows_of(family, dataset))
    assert (len(mixed) == 9 and len(set(mixed["tag"])) == 7) == (family in ("qwen2_5_omni", "qwen3_omni"))
    steps = 1 if not accumulates else len(mixed) if len(mixed) % 3 else 3
    trainer = build(
        folder,
        mixed,
        family,
        per_device_train_batch_size=len(mixed) // steps,
        gradient_accumulation_steps=steps,
        router_aux_loss_coef=0.0 if family in ("qwen3_omni", "gemma4_moe") else None,
    )
    model, processor = build_tiny(family)
    total, tokens = 0.0, 0
    for row in mixed:
        text = f"{row['completion']}{FAMILIES[family].end}\n"
        completion = processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
        logits = alone_by_transformers(family, model.eval(), processor, trainer.prompt_builder, row, completion)
        before_each = logits[-len(completion) - 1 : -1]
        total += torch.nn.functional.cross_entropy(before_each, completion, reduction="sum").item()
        tokens += len(completion)
    trainer.train()
    assert len({len(target_text(row)) for row in mixed}) > 1  # else a mean of means would be the same
    assert losses(trainer)[0] == pytest.approx(total / tokens, rel=1e-5)


def test_gradients_reach_all_parts(rows):
    folder, dataset = rows
    trainer = build(folder, one_row_per_tag(dataset), per_device_train_batch_size=7, gradient_accumulation_steps=1)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert all(any(part in name for name in moved) for part in TOWERS)
    log = trainer.state.log_history[0]
    assert log["media_tokens/video"] > 0 and log["media_tokens/audio"] > 0


@pytest.mark.parametrize("tag", ["V", "A", "S"])
def test_another_clip_is_another_loss_where_the_tag_reads_it(tag, rows):
    folder, dataset = rows
    row = next(row for row in dataset if row["tag"] == tag)
    other = next(video for video in dataset["video"] if video != row["video"])
    batch = [Dataset.from_list([one] * 2) for one in (row, row | {"video": other})]
    here, there = (one_step(folder, one) for one in batch)
    assert (here == there) == (tag == "S")


def test_trl_alone_does_not_see_the_clip(rows):
    """The control: the same rows in TRL's trainer, whose loss does not move."""
    folder, dataset = rows
    row = next(row for row in dataset if row["tag"] == "V")
    other = next(video for video in dataset["video"] if video != row["video"])
    found = []
    for video in (row["video"], other):
        model, processor = build_tiny("qwen2_5_omni")
        one = {"prompt": row["prompt"], "video": str(folder / video)}
        one["completion"] = [{"role": "assistant", "content": row["completion"]}]
        options = {name: value for name, value in OPTIONS.items() if name in SFTConfig.__dataclass_fields__}
        args = SFTConfig(output_dir=tempfile.mkdtemp(), **options)
        trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list([one] * 2), processing_class=processor)
        trainer.train()
        found.append(losses(trainer)[0])
    assert found[0] == found[1]


class LosesMedia(OmniSFTTrainer):
    """A batch whose placeholder tokens were cut off, as by a collator that knows text alone."""

    def _padded(self, prompts, completions):
        batch = super()._padded(prompts, completions)
        for token in self.family.placeholder_ids.values():
            batch["input_ids"][batch["input_ids"] == token] = self.family.tokenizer.pad_token_id
        return batch


def test_media_that_do_not_reach_the_model_raise(rows):
    folder, dataset = rows
    videos = dataset.filter(lambda row: row["tag"] == "V")
    with pytest.raises(MediaMismatchError, match="never reached the model.*tag V"):
        build(folder, videos, trainer_class=LosesMedia).train()


# Text alone


def remember_gradients(trainer, into):
    class Remember(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            into.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Remember())


def run_text(trainer_class, config_class, kind, conversational, **options):
    questions = [" ".join(WORDS[i : i + 2 + i % 4]) + "?" for i in range(8)]
    answers = [" ".join(reversed(WORDS[i : i + 1 + i % 3])) for i in range(8)]
    if conversational:
        prompts = [[{"role": "user", "content": text}] for text in questions]
        completions = [[{"role": "assistant", "content": text}] for text in answers]
    else:
        prompts, completions = questions, answers
    dataset = Dataset.from_dict({"prompt": prompts, "completion": completions})
    model, processing_class = build_tiny_text(0) if kind == "text" else build_tiny(kind)
    args = config_class(output_dir=tempfile.mkdtemp(), **(OPTIONS_OF_TEXT | {"max_steps": 3} | options))
    trainer = trainer_class(model, args, train_dataset=dataset, processing_class=processing_class)
    gradients = []
    remember_gradients(trainer, gradients)
    trainer.train()
    return losses(trainer), gradients, trainer.model.state_dict()


OPTIONS_OF_TEXT = {
    name: value
    for name, value in OPTIONS.items()
    if name in SFTConfig.__dataclass_fields__ and name != "gradient_checkpointing"
}
CASES = {
    "default": {},
    "dft, checkpointing": {"loss_type": "dft", "gradient_checkpointing": True},
    "packed": {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
    "whole sequence": {"completion_only_loss": False, "max_length": 8},
}


def assert_same(theirs, ours):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and len(ours[0]) == 3
    for expected, found in zip(theirs[1], ours[1], strict=True):
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    for name, weight in theirs[2].items():
        torch.testing.assert_close(ours[2][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_text_only_model_trains_as_with_trl(options):
    theirs = run_text(SFTTrainer, SFTConfig, "text", False, **{"max_length": None} | options)
    ours = run_text(OmniSFTTrainer, OmniSFTConfig, "text", False, **options)
    assert_same(theirs, ours)


def test_text_rows_of_an_omni_model_train_as_with_trl():
    plain = {"optim": "sgd", "learning_rate": 0.1}  # ours pads on the left, and Adam blows rounding up
    theirs = run_text(SFTTrainer, SFTConfig, "qwen2_5_omni", True, max_length=None, **plain)
    ours = run_text(OmniSFTTrainer, OmniSFTConfig, "qwen2_5_omni", True, **plain)
    assert_same(theirs, ours)
    other = run_text(OmniSFTTrainer, OmniSFTConfig, "qwen2_5_omni", True, loss_type="dft", **plain)
    assert other[0] != pytest.approx(theirs[0], rel=1e-3)  # the comparison can tell


# Rows


def test_a_completion_may_be_text_or_messages(rows):
    folder, dataset = rows
    row = dataset[0]
    trainer = build(folder, dataset)
    forms = [
        row["completion"],
        [{"role": "assistant", "content": row["completion"]}],
        [{"role": "assistant", "content": [{"type": "text", "text": row["completion"]}]}],
    ]
    ids = [trainer.completion_ids(row | {"completion": form}) for form in forms]
    assert ids[0] == ids[1] == ids[2]
    tokenizer = trainer.processing_class.tokenizer
    assert tokenizer.decode(ids[0]) == row["completion"] + "<|im_end|>\n"
    plain = trainer.completion_ids({"prompt": "which", "completion": "red"})
    assert tokenizer.decode(plain) == "red<|im_end|>"


def with_completion(dataset, i, completion):
    rows = dataset.select(range(4)).to_list()
    rows[i]["completion"] = completion
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "completion, message",
    [
        ("", "row 2: field 'completion' holds a message without text"),
        (None, "row 2: field 'completion' must be a non-empty text or list of messages"),
        ("a <|VIDEO|>", r"row 2: field 'completion' holds the text '<\|VIDEO\|>', which the model reads as media"),
    ],
)
def test_a_row_without_a_usable_completion_is_refused(completion, message, rows):
    folder, dataset = rows
    with pytest.raises(RowError, match=f"train_dataset, {message}"):
        build(folder, with_completion(dataset, 2, completion))


@pytest.mark.parametrize(
    "completion, message",
    [
        ([{"role": "assistant", "content": [{"type": "video"}]}], "a completion is text alone"),
        ([{"content": "red"}], "is not a message with 'role' and 'content'"),
        ([{"role": "user", "content": "red"}], "the chat template writes the prompt in another way"),
    ],
)
def test_messages_that_cannot_follow_the_prompt_are_refused(completion, message, rows):
    folder, dataset = rows
    one = Dataset.from_list([{"prompt": dataset[0]["prompt"], "completion": completion}])
    with pytest.raises(RowError, match=f"row 0: .*{message}"):
        build(folder, one)


def test_a_data_set_without_completions_is_refused(rows):
    folder, dataset = rows
    with pytest.raises(ValueError, match="train_dataset has no column 'completion'.*its columns: id, prompt"):
        build(folder, dataset.remove_columns("completion"))


REFUSED = {
    "packing": True,
    "padding_free": True,
    "assistant_only_loss": True,
    "shuffle_dataset": True,
    "use_liger_kernel": True,
    "max_length": 64,
    "label_smoothing_factor": 0.1,
    "completion_only_loss": False,
    "eval_packing": True,
    "dataset_kwargs": {"skip_prepare_dataset": False},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_would_lose_media_are_refused(name, rows):
    folder, dataset = rows
    with pytest.raises(ValueError, match=f"^{name}=.* is not supported for rows with media"):
        build(folder, dataset, **{name: REFUSED[name]})


def test_other_refusals(rows):
    folder, dataset = rows
    with pytest.raises(ValueError, match="does not support `data_collator` for rows with media"):
        build(folder, dataset, data_collator=list)
    tokenizer = build_tiny_text(0)[1]
    with pytest.raises(ValueError, match="processing_class is a tokenizer, but .* reads media"):
        build(folder, dataset, model=build_tiny("qwen2_5_omni")[0], processing_class=tokenizer)
    with pytest.raises(
        ValueError, match="train_dataset has the column 'subtitle', but processing_class is a tokenizer"
    ):
        build(folder, dataset, model=build_tiny_text(0)[0], processing_class=tokenizer)
    for name, value in {"temperature": 0.0, "top_p": 0.0, "max_completion_length": 0}.items():
        with pytest.raises(ValueError, match=name):
            OmniSFTConfig(bf16=False, **{name: value})


# Broken clips


@pytest.mark.parametrize("check", ["probe", "none"])
def test_a_broken_clip_is_named_and_its_row_replaced(check, rows, tmp_path):
    folder, dataset = rows
    shutil.copytree(folder, tmp_path / "media")
    videos = dataset.filter(lambda row: row["tag"] == "V")
    broken = videos[0]["video"]
    cut(folder / broken, tmp_path / "media" / broken, 0.3)
    hit = [i for i, video in enumerate(videos["video"]) if video == broken]
    assert 0 < len(hit) < len(videos)
    options = {"media_check": check, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = build(tmp_path / "media", videos, **options)
    trainer.train()
    assert [(row.path, row.rows) for row in trainer.row_encoder.quarantined] == [(broken, [i]) for i in hit]
    if check == "probe":  # left out before the first step
        assert len(trainer.train_dataset) == len(videos) - len(hit)
    else:  # met by a step: another row takes its place, with its own completion
        sound = [videos[next(j for j in (*range(i, 4), *range(i)) if j not in hit)] for i in range(4)]
        assert losses(trainer)[0] == pytest.approx(one_step(folder, Dataset.from_list(sound)), rel=1e-5)


# Checkpoints, evaluation, completions


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.matrix(cases=1)
def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(lora, rows, tmp_path):
    """The checkpoint stands in the second epoch: 28 rows, 8 a step."""
    folder, dataset = rows

    def trainer(name, **options):
        model, processor = build_tiny("qwen2_5_omni")
        given = {"model": model, "processing_class": processor}
        if lora:
            given["peft_config"] = build_lora_config(model, family_for(model, processor), r=4, alpha=8)
        options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 6} | options
        return build(folder, dataset, output_dir=tmp_path / name, **given, **options)

    whole = trainer("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    again = trainer("again")
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole) and len(losses(whole)) == 8
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    with pytest.raises(ResumeError, match="other settings: per_device_train_batch_size 4 -> 2"):
        trainer("again", per_device_train_batch_size=2).train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match="train_dataset is not the data set of the checkpoint"):
        changed = build(folder, dataset.select(range(27)), output_dir=tmp_path / "again")
        changed.train(resume_from_checkpoint=True)


def test_evaluation_and_completions(rows):
    folder, dataset = rows
    batch = one_row_per_tag(dataset)
    trainer = build(
        folder, batch, eval_dataset=batch, learning_rate=0.0, per_device_train_batch_size=7, max_completion_length=5
    )
    found = trainer.evaluate()
    trainer.train()
    assert found["eval_loss"] == pytest.approx(losses(trainer)[0], rel=0.05)  # by batches of 8 and of 7
    assert found["eval_media_tokens/audio"] > 0
    torch.manual_seed(0)
    texts = trainer.generate_completions(list(batch))
    assert len(texts) == 7 and len(set(texts)) > 1
    assert not any(token in text for text in texts for token in trainer.family.media_tokens)
    experts = build(folder, batch, "qwen3_omni", max_completion_length=5)  # with a router's loss switched on
    assert len(experts.generate_completions(list(batch))) == 7


def test_a_card_that_cannot_be_written_does_not_end_the_run(rows, tmp_path, caplog):
    folder, dataset = rows
    (tmp_path / "checkpoint-1" / "README.md").mkdir(parents=True)
    trainer = build(folder, dataset, output_dir=tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    assert f"{tmp_path}/checkpoint-1: the model is saved, its card is not: [Errno 21]" in caplog.text
    assert caplog.text.count("its card is not") == 1
    assert {"model.safetensors", "trainer_state.json"} <= {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert (tmp_path / "checkpoint-2" / "README.md").is_file() and trainer.state.global_step == 2


def test_the_model_card_tells_the_trainer(rows, tmp_path):
    folder, dataset = rows
    trainer = build(folder, dataset, output_dir=tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "omni" in card and "maple-trl" in card and "Omni SFT" in card
