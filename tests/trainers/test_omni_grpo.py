"""OmniGRPOTrainer through `train()`: what rows are fed, what reaches the loss, and the ways to train."""

import functools
import json
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from omni_runs import build_config, build_trainer, one_row_per_tag, spread_reward
from safetensors.torch import load_file
from test_mixed_batches import alone_by_transformers
from tiny_models import FAMILIES, build_tiny, build_tiny_text, save_tiny, save_tiny_full
from transformers import AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from maple_trl import ModalityTag, OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.data.synthetic import write_seven_tags
from maple_trl.omni.encoded import MediaMismatchError
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.lora import build_lora_config, freeze
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.trainers.common.rollout import InFlight


@pytest.fixture(scope="module")
def seven_tags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seven-tags")
    return folder, write_seven_tags(folder, prompts_per_tag=4, seed=5)["train"]


class RecordingTrainer(OmniGRPOTrainer):
    """Keeps what passed through the loss: inputs, and the log-probabilities computed for them."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.last_logps = output[0].detach().clone()
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.seen.append((inputs, self.last_logps))
        return loss


def grads_after_one_step(trainer):
    grads = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Keep())
    trainer.train()
    return grads


def reached(grads, part):
    return any(part in name and grad.abs().max() > 0 for name, grad in grads.items())


# What reaches the loss


def test_each_row_of_a_seven_tag_batch_trains_on_the_log_probs_it_has_alone(seven_tags):
    """Greedy generation and the training forward of one mixed, left-padded batch, against transformers row by row."""
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    assert set(rows["tag"]) == set(ModalityTag)
    rows = [dict(row, audio_in_video=False) for row in rows]
    rows = Dataset.from_list([*rows, dict(rows[0], tag="VAS", audio_in_video=True)])
    trainer = build_trainer(
        folder,
        rows,
        trainer_class=RecordingTrainer,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        num_generations=2,
        generation_kwargs={"do_sample": False},
        temperature=1.0,
        learning_rate=0.0,
    )
    reference, processor = build_tiny("qwen2_5_omni")
    trainer.train()
    [(inputs, logps)] = trainer.seen
    by_key = {trainer.prompt_builder.spec(row).key: row for row in rows}
    prompts = inputs["omni_prompts"]
    assert len({p.key for p in prompts}) == 8 and len(set(map(len, prompts))) > 3
    suppressed = trainer.family.suppressed_ids
    for i, prompt in enumerate(prompts):
        completion = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
        row = by_key[prompt.key]
        logits = alone_by_transformers("qwen2_5_omni", reference, processor, trainer.prompt_builder, row, completion)
        own = logits[len(prompt) - 1 : -1]
        expected = own.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        torch.testing.assert_close(logps[i, : len(completion)], expected, atol=1e-4, rtol=0)
        own[:, suppressed] = -torch.inf
        assert torch.equal(own.argmax(-1), completion), row["tag"]  # what generation saw is what transformers sees


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni"])
def test_both_towers_get_gradients(seven_tags, family):
    folder, dataset = seven_tags
    grads = grads_after_one_step(build_trainer(folder, dataset.filter(lambda r: r["tag"] == "VA"), family=family))
    for part in ("visual", "audio_tower", "language_model"):
        assert reached(grads, part), part


def test_unmodified_trl_drops_video_and_audio(seven_tags):
    """The control: TRL's own trainer, given decoded clips of the same rows, leaves both towers without a gradient."""
    folder, dataset = seven_tags
    ours = build_trainer(folder, dataset)
    rows = []
    for row in dataset.filter(lambda r: r["tag"] == "VA"):
        clip, sound = ours.loader.video(row["video"]), ours.loader.audio(row["video"])
        blocks = [
            {"type": "video", "video": clip.frames.copy()},
            {"type": "audio", "audio": sound.waveform.copy()},
            {"type": "text", "text": row["question"]},
        ]
        rows.append([{"role": "user", "content": blocks}])
    # Python objects, as arrow would turn the arrays into nested lists.
    data = Dataset.from_dict({"i": list(range(len(rows)))}).with_transform(
        lambda batch: {"prompt": [rows[i] for i in batch["i"]]}
    )
    model, processor = build_tiny("qwen2_5_omni")
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": 1}
    args = GRPOConfig(
        output_dir=ours.args.output_dir, report_to=[], use_cpu=True, bf16=False, save_strategy="no", **options
    )
    trainer = GRPOTrainer(model, spread_reward, args, train_dataset=data, processing_class=processor)
    grads = grads_after_one_step(trainer)
    assert reached(grads, "language_model")
    assert not reached(grads, "visual") and not reached(grads, "audio_tower")


def test_access_all_feeds_what_required_withholds(seven_tags):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    required = build_trainer(folder, rows).encode_rows(rows)[1]
    everything = build_trainer(folder, rows, modality_access="all").encode_rows(rows)[1]
    for prompt in required:
        kinds = {"V": "video", "A": "audio", "S": "subtitle"}
        assert set(prompt.media_tokens) == {kinds[letter] for letter in prompt.tag}
    for prompt in everything:
        assert set(prompt.media_tokens) == {"video", "audio", "subtitle"}


def test_log_probs_follow_the_files_that_the_tag_reads(seven_tags):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    videos = sorted(set(dataset["video"]))
    other = {row["video"]: next(v for v in videos if v != row["video"]) for row in rows}
    swapped = rows.map(lambda row: {"video": other[row["video"]]})

    def by_tag(data):
        trainer = build_trainer(
            folder,
            data,
            trainer_class=RecordingTrainer,
            per_device_train_batch_size=14,
            gradient_accumulation_steps=1,
            num_generations=2,
            generation_kwargs={"do_sample": False, "min_new_tokens": 6, "forced_eos_token_id": None},
            shuffle_dataset=False,
            learning_rate=0.0,
        )
        # The same completions for both, so that only the prompt's media can move a log-probability.
        trainer._generate_single_turn = lambda ids, *a, **k: ([[40, 50, 60, 70]] * len(ids), None)
        trainer.train()
        [(inputs, logps)] = trainer.seen
        return {p.tag: logps[i] for i, p in enumerate(inputs["omni_prompts"])}

    before, after = by_tag(rows), by_tag(swapped)
    for tag in ModalityTag:
        moved = (before[tag] - after[tag]).abs().max().item()
        if set(tag) & {"V", "A"}:
            assert moved > 1e-3, (tag, moved)
        else:
            assert moved <= 1e-6, (tag, moved)


def test_a_row_whose_media_are_not_consumed_raises(seven_tags):
    """The fault that unmodified TRL has, put into ours: the forward runs without the media."""
    folder, dataset = seven_tags

    class Forgetful(OmniGRPOTrainer):
        def _tokenize_prompts(self, prompts):
            ids, images, fields = super()._tokenize_prompts(prompts)
            placeholders = set(self.family.placeholder_ids.values())
            return [[65 if token in placeholders else token for token in row] for row in ids], images, {}

    trainer = build_trainer(folder, dataset.filter(lambda r: r["tag"] == "VA"), trainer_class=Forgetful)
    with pytest.raises(MediaMismatchError, match="never reached the model.*tag VA"):
        trainer.train()


def test_media_tokens_cannot_be_generated(seven_tags):
    folder, dataset = seven_tags
    model, processor = build_tiny("qwen2_5_omni")
    trainer = build_trainer(folder, dataset, model=model, processing_class=processor, generation_kwargs={"top_k": 50})
    banned = trainer.family.suppressed_ids
    assert len(banned) == 7

    def prefer_media(module, args, output):
        output[..., banned] += 100.0
        return output

    model.lm_head.register_forward_hook(prefer_media)
    rows = one_row_per_tag(dataset).to_list()

    def sampled_ids():
        used, prompts = trainer.encode_rows(rows)
        model.eval()
        with trainer._in_flight(InFlight(prompts)):
            ids, _, fields = trainer._tokenize_prompts([])
            return {token for row in trainer._generate_single_turn(ids, None, fields, 1)[0] for token in row}

    assert not sampled_ids() & set(banned)
    trainer.generation_config.suppress_tokens = (
        None  # the control: they are sampled, and the first pass over them notices
    )
    assert sampled_ids() & set(banned)
    with pytest.raises(MediaMismatchError, match="placeholder"):
        trainer.train()


def test_media_tokens_are_logged_per_modality(seven_tags):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    trainer = build_trainer(
        folder, rows, per_device_train_batch_size=14, gradient_accumulation_steps=1, num_generations=2
    )
    trainer.train()
    log = trainer.state.log_history[0]
    _, prompts = trainer.encode_rows(rows)
    for kind in ("video", "audio", "subtitle"):
        assert log[f"media_tokens/{kind}"] == 2 * sum(p.media_tokens.get(kind, 0) for p in prompts) > 0


# Work done once


@pytest.mark.parametrize("options", [{}, {"max_media_tokens": 14}], ids=["free", "within a budget"])
@pytest.mark.matrix(cases=1)
def test_clips_are_decoded_once(seven_tags, options):
    folder, dataset = seven_tags
    # Of one tag, for a clip that two rows need in two sizes is decoded in both.
    rows = dataset.filter(lambda r: r["tag"] == "VA") if options else dataset
    trainer = build_trainer(folder, rows, max_steps=14, num_iterations=2, **options)
    trainer.train()
    decodes = trainer.loader.decodes
    assert decodes and set(decodes.values()) == {1}


def test_decoding_of_the_next_batch_overlaps_with_the_step(seven_tags, monkeypatch):
    """Clips of later batches are decoded by background threads, while the main thread is within a training step."""
    folder, dataset = seven_tags
    by_thread, within_step = {"main": 0, "background": 0}, []
    in_step = threading.Event()
    original = MediaLoader._decode

    def decode(loader, *args):
        main = threading.current_thread() is threading.main_thread()
        by_thread["main" if main else "background"] += 1
        if not main:
            within_step.append(in_step.wait(timeout=60))
        return original(loader, *args)

    class Watched(OmniGRPOTrainer):
        def _compute_loss(self, model, inputs):
            in_step.set()
            return super()._compute_loss(model, inputs)

    monkeypatch.setattr(MediaLoader, "_decode", decode)
    rows = dataset.filter(lambda r: r["tag"] == "V")
    build_trainer(folder, rows, trainer_class=Watched, max_steps=2, shuffle_dataset=False).train()
    assert by_thread == {"main": 2, "background": 2}  # two prompts a batch: the first has nothing before it
    assert within_step == [True, True]


def test_towers_see_each_prompt_once_in_every_pass(seven_tags):
    """Generation, old log-probs and every micro-batch of the loss: G rows of a prompt, one pass of its media."""
    folder, dataset = seven_tags
    rows = dataset.filter(lambda r: r["tag"] == "VA").select(range(2))
    trainer = build_trainer(folder, rows, num_iterations=2, max_steps=2, shuffle_dataset=False, shared_prefix="off")
    _, prompts = trainer.encode_rows(rows)
    own = [prompt.media["video"]["pixel_values_videos"].size(0) for prompt in prompts]
    patches, audios = [], []
    core = trainer.family.core(trainer.model)
    core.visual.register_forward_pre_hook(lambda m, args, kw: patches.append(args[0].size(0)), with_kwargs=True)
    core.audio_tower.register_forward_pre_hook(
        lambda m, a, kw: audios.append(len(kw["feature_lens"])), with_kwargs=True
    )
    trainer.train()
    # generation of both prompts; then old log-probs in two chunks, and two iterations of two micro-batches
    assert patches[0] == sum(own) and audios[0] == 2
    assert len(patches) == len(audios) == 1 + 2 + 4
    assert set(patches[1:]) == set(own) and audios[1:] == [1] * 6


def test_prefetch_decodes_what_comes_next(seven_tags):
    folder, dataset = seven_tags
    trainer = build_trainer(folder, dataset, max_steps=4)
    met, fetched = [], []
    original_encode, original_prefetch = trainer.encode_rows, trainer.loader.prefetch

    def encode_rows(rows):
        met.append({trainer.prompt_builder.spec(row).key for row in rows})
        return original_encode(rows)

    def prefetch(calls):
        fetched.append({call.args[0].key for call in calls})
        return original_prefetch(calls)

    trainer.encode_rows, trainer.loader.prefetch = encode_rows, prefetch
    trainer.train()
    assert len(met) == len(fetched) == 4
    for current, coming, following in zip(met, fetched, met[1:], strict=False):
        assert following <= coming and not current & coming


# Ways to train

WAYS = {
    "accumulation": {"gradient_accumulation_steps": 4, "max_steps": 2},
    "several iterations": {"num_iterations": 3, "max_steps": 4},
    "several steps per generation": {"steps_per_generation": 4, "max_steps": 3},
    "bf16": {"bf16": True, "max_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True, "max_steps": 2},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "float32 head": {"cast_lm_head_to_fp32": True},
    "sequence level": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "padded": {"pad_to_multiple_of": 16},
    "masked truncation": {"mask_truncated_completions": True},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
@pytest.mark.matrix(cases=3)
def test_trains_and_evaluates(seven_tags, options):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4} | options
    trainer = build_trainer(folder, dataset, eval_dataset=rows.select(range(3)), **options)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    logs = trainer.state.log_history
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert len(losses) == trainer.args.max_steps and np.isfinite(losses).all()
    assert np.isfinite([entry["eval_loss"] for entry in logs if "eval_loss" in entry]).all()
    assert any("eval_reward" in entry for entry in logs)
    if "mask_truncated_completions" not in options:
        assert any((p - before[n]).abs().max() > 0 for n, p in trainer.model.named_parameters())


def test_gradient_checkpointing_changes_no_gradient(seven_tags):
    folder, dataset = seven_tags
    plain = grads_after_one_step(build_trainer(folder, dataset))
    checkpointed = grads_after_one_step(build_trainer(folder, dataset, gradient_checkpointing=True))
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-6)


def test_accumulation_and_regrouping_change_no_gradient(seven_tags):
    """The same eight rows in one, two and four micro-batches; TRL's shuffle is on."""
    folder, dataset = seven_tags
    results = []
    for micro in (8, 4, 2):
        trainer = build_trainer(
            folder,
            dataset,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro,
            generation_batch_size=8,
        )
        results.append(grads_after_one_step(trainer))
    for other in results[1:]:
        for name, grad in results[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6)


def test_rows_of_a_prompt_stay_in_one_micro_batch(seven_tags):
    folder, dataset = seven_tags
    trainer = build_trainer(folder, dataset, trainer_class=RecordingTrainer, gradient_accumulation_steps=4)
    trainer.train()
    assert [len({id(p) for p in inputs["omni_prompts"]}) for inputs, _ in trainer.seen] == [1] * 4


def test_reference_model_sees_the_media(seven_tags, tmp_path):
    """With beta > 0 and an unmoved policy, policy and reference agree on every token, so KL is 0 at the first step."""
    folder, dataset = seven_tags
    path = str(save_tiny("qwen2_5_omni", tmp_path))
    trainer = build_trainer(
        folder, dataset.filter(lambda r: r["tag"] == "VAS"), model=path, processing_class=None, beta=0.1, max_steps=2
    )
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-7) and kl[1] > 0


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni"])
@pytest.mark.matrix(cases=1)
def test_thinker_is_loaded_alone_from_a_full_checkpoint(seven_tags, tmp_path, family):
    folder, dataset = seven_tags
    full = str(save_tiny_full(family, tmp_path / "full"))
    thinker, _ = build_tiny(family)
    loaded = load_model(full)
    assert type(loaded) is type(thinker)
    for name, value in thinker.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    trainer = build_trainer(folder, dataset, model=full, processing_class=None, beta=0.1)
    assert type(trainer.model) is type(trainer.ref_model) is type(thinker)
    trainer.train()


# LoRA and freezing

SCOPES = {"vision": "visual.blocks", "audio": "audio_tower.layers", "projectors": "merger", "llm": "language_model"}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.matrix(cases=2)
def test_lora_adapts_the_chosen_scope_alone(seven_tags, scope, capsys):
    folder, dataset = seven_tags
    model, processor = build_tiny("qwen2_5_omni")
    switches = {name: name == scope for name in SCOPES}
    config = build_lora_config(model, family_for(model, processor), **switches, r=2, alpha=4)
    table = capsys.readouterr().out
    assert "LoRA targets" in table and all(name in table for name in SCOPES)
    trainer = build_trainer(
        folder,
        dataset.filter(lambda r: r["tag"] == "VA"),
        model=model,
        processing_class=processor,
        peft_config=config,
        max_steps=2,
        beta=0.05,
    )
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    family = trainer.family
    assert trained and {family.scope_of(n.removeprefix("base_model.model.")) for n in trained} == {scope}
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= trained


def test_lora_on_every_scope_trains_and_merges(seven_tags, tmp_path):
    from peft import PeftModel

    folder, dataset = seven_tags
    path = save_tiny("qwen2_5_omni", tmp_path / "base")
    model, processor = load_model(str(path)), load_processor(str(path))
    config = build_lora_config(model, family_for(model, processor), r=2)
    trainer = build_trainer(
        folder, dataset, model=model, processing_class=processor, peft_config=config, max_steps=3, learning_rate=1e-2
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    rows = one_row_per_tag(dataset)
    _, prompts = trainer.encode_rows(rows)

    def logits(model, prompts=prompts, family=trainer.family):
        from test_mixed_batches import batched

        from maple_trl.omni.serving import serve_media

        inputs, _ = batched(prompts, torch.full((len(prompts), 3), 40), processor.tokenizer.pad_token_id)
        with torch.no_grad(), serve_media(family, model, prompts):
            return model(**inputs).logits

    trained = logits(trainer.model.eval())
    base = load_model(str(path)).eval()
    assert (logits(base) - trained).abs().max() > 1e-3
    reloaded = PeftModel.from_pretrained(load_model(str(path)), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(reloaded), trained, atol=1e-5, rtol=0)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "merged")).eval()), trained, atol=1e-4, rtol=0)


def test_lora_without_a_match_fails(seven_tags):
    model, processor = build_tiny("qwen2_5_omni")
    family = family_for(model, processor)
    off = dict.fromkeys(SCOPES, False)
    with pytest.raises(ValueError, match="nothing to adapt"):
        build_lora_config(model, family, **off)
    family.scopes = {**family.scopes, "audio": r"(^|\.)no_such_tower\."}
    with pytest.raises(ValueError, match="LoRA on audio matches no linear layer"):
        build_lora_config(model, family)


def test_frozen_towers_stay_and_the_rest_moves(seven_tags):
    folder, dataset = seven_tags
    model, processor = build_tiny("qwen2_5_omni")
    counts = freeze(model, family_for(model, processor), "vision", "audio")
    assert counts["vision"] > 0 and counts["audio"] > 0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = build_trainer(
        folder, dataset.filter(lambda r: r["tag"] == "VA"), model=model, processing_class=processor, max_steps=2
    )
    trainer.train()
    moved = {trainer.family.scope_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved >= {"projectors", "llm"} and not moved & {"vision", "audio"}
    with pytest.raises(ValueError, match="has no speech"):
        freeze(model, trainer.family, "speech")


# A model that can be used elsewhere


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni", "qwen2_5_vl", "qwen3_vl", "qwen2_audio"])
@pytest.mark.matrix(cases=2)
def test_saved_model_and_processor_reload_to_the_same_logits(seven_tags, tmp_path, family):
    folder, dataset = seven_tags
    tags = {"qwen2_5_vl": "VS", "qwen3_vl": "VS", "qwen2_audio": "AS"}.get(family, "VAS")
    rows = dataset.filter(lambda r: set(r["tag"]) <= set(tags))
    trainer = build_trainer(folder, rows, family=family, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path))
    reloaded = type(trainer.model).from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    row = next(row for row in rows if row["tag"] == tags)
    completion = torch.tensor([40, 50, 60])
    trained = alone_by_transformers(
        family, trainer.model.eval(), trainer.processing_class, trainer.prompt_builder, row, completion
    )
    again = alone_by_transformers(family, reloaded, processor, trainer.prompt_builder, row, completion)
    assert torch.equal(trained, again)
    assert "image_token_id" not in json.loads((tmp_path / "config.json").read_text()) or family != "qwen2_audio"


def test_the_best_checkpoint_is_loaded_at_the_end(seven_tags):
    """transformers loads by the file's names, which are not this model's, and says nothing."""
    folder, dataset = seven_tags
    trainer = build_trainer(
        folder,
        dataset,
        max_steps=4,
        eval_dataset=one_row_per_tag(dataset).select(range(4)),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
        learning_rate=1e-2,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    expected = type(trainer.model).from_pretrained(best).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    assert not best.endswith("checkpoint-4")  # else the weights would be these anyway
    assert set(load_file(f"{best}/model.safetensors")) - set(trainer.model.state_dict())


def test_one_of_several_evaluation_sets_is_what_models_are_compared_by(seven_tags):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    options = {
        "max_steps": 2,
        "eval_dataset": {"seen": rows.select(range(4)), "heard": rows.select(range(4, 7))},
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    told = "of several evaluation sets each has its own: set it to eval_seen_reward or eval_heard_reward"
    with pytest.raises(ValueError, match=told):
        build_trainer(folder, dataset, **options)
    trainer = build_trainer(folder, dataset, metric_for_best_model="heard_reward", **options)
    trainer.train()
    told = [entry["eval_heard_reward"] for entry in trainer.state.log_history if "eval_heard_reward" in entry]
    assert trainer.state.best_metric == max(told) and len(told) == 2


def test_model_by_name_loads_its_own_processor(seven_tags, tmp_path):
    folder, dataset = seven_tags
    path = save_tiny("qwen2_5_omni", tmp_path)
    trainer = build_trainer(folder, dataset, model=str(path), processing_class=None)
    assert trainer.processing_class.tokenizer.padding_side == "left"
    assert trainer.processing_class.feature_extractor.padding_side == "right"
    trainer.train()


def test_the_output_folder_is_named_after_the_model(seven_tags, tmp_path, monkeypatch):
    folder, dataset = seven_tags
    monkeypatch.chdir(tmp_path)
    model, tokenizer = build_tiny_text()
    model.config._name_or_path = "org/tiny-model/"
    settings = {"use_cpu": True, "bf16": False}
    monkeypatch.setattr(OmniGRPOConfig, "__init__", functools.partialmethod(OmniGRPOConfig.__init__, **settings))
    data = Dataset.from_dict({"prompt": ["a", "b", "c"]})
    trainer = OmniGRPOTrainer(model, spread_reward, train_dataset=data, processing_class=tokenizer)
    assert trainer.args.output_dir == "tiny-model-Omni-GRPO"


def test_the_callers_arguments_stay_as_they_are(seven_tags):
    folder, dataset = seven_tags
    args = build_config(folder, model_init_kwargs={"dtype": "float32"})
    model, processor = build_tiny("qwen2_5_omni")
    trainer = OmniGRPOTrainer(model, spread_reward, args, dataset, processing_class=processor)
    assert args.generation_kwargs is None and args.model_init_kwargs == {"dtype": "float32"}
    assert trainer.generation_config.suppress_tokens == trainer.family.suppressed_ids


def test_the_reference_model_is_loaded_as_the_policy_was(seven_tags, tmp_path):
    """Same revision and precision: a KL to another model would be wrong without a sign."""
    folder, dataset = seven_tags
    path = str(save_tiny("qwen2_5_omni", tmp_path))
    loads = []

    def load(name, **kwargs):
        loads.append(kwargs)
        return load_model(name, **{k: v for k, v in kwargs.items() if k != "revision"})

    with pytest.MonkeyPatch.context() as patch:
        for module in ("arguments", "trl_compat"):
            patch.setattr(f"maple_trl.trainers.common.{module}.load_model", load)
        patch.setattr(
            "maple_trl.trainers.common.arguments.load_processor",
            lambda name, **k: loads.append(k) or load_processor(name),
        )
        init = {"revision": "abc", "dtype": "bfloat16"}
        trainer = build_trainer(
            folder, dataset, model=path, processing_class=None, beta=0.1, model_init_kwargs=init, bf16=True
        )
    assert [kwargs.get("revision") for kwargs in loads] == ["abc"] * 3  # policy, processor, reference
    assert trainer.ref_model.dtype is trainer.model.dtype is torch.bfloat16


def test_a_tokenizer_with_media_is_refused(seven_tags):
    """It would train on the text alone."""
    folder, dataset = seven_tags
    model, processor = build_tiny("qwen2_5_omni")
    with pytest.raises(ValueError, match="reads media: pass the model's processor"):
        build_trainer(folder, dataset, model=model, processing_class=processor.tokenizer)
    model, tokenizer = build_tiny_text()
    pictures = dataset.select_columns(["prompt"]).add_column("images", [["a.png"]] * len(dataset))
    with pytest.raises(ValueError, match="train_dataset has the column 'images'.*tokenizer, which reads no"):
        build_trainer(folder, pictures, model=model, processing_class=tokenizer)
    with pytest.raises(ValueError, match="train_dataset has the column 'subtitle'.*tokenizer, which reads no"):
        build_trainer(folder, dataset, model=model, processing_class=tokenizer)


def test_other_arguments_are_refused(seven_tags, tmp_path):
    folder, dataset = seven_tags
    model, processor = build_tiny("qwen2_5_omni")
    with pytest.raises(TypeError, match="args must be of type OmniGRPOConfig, got GRPOConfig"):
        OmniGRPOTrainer(
            model,
            spread_reward,
            GRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            dataset,
            processing_class=processor,
        )
    freeze(model, family_for(model, processor), *family_for(model, processor).scopes)
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing is left to train"):
        build_trainer(folder, dataset, model=model, processing_class=processor)


def test_trains_with_sharded_towers_setting(seven_tags):
    """What FSDP and ZeRO-3 switch on: every forward runs every tower. The numbers stay what they are."""
    folder, dataset = seven_tags

    class Sharded(OmniGRPOTrainer):
        _same_towers = True

    rows = one_row_per_tag(dataset)
    options = {"per_device_train_batch_size": 14, "gradient_accumulation_steps": 1, "num_generations": 2}
    plain = grads_after_one_step(build_trainer(folder, rows, **options))
    touched = grads_after_one_step(build_trainer(folder, rows, trainer_class=Sharded, **options))
    assert plain.keys() == touched.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(touched[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.matrix(cases=5)
def test_every_weight_that_is_trained_has_a_gradient_without_media(seven_tags, family):
    """So DDP may wait for each of them, and no rank of FSDP or ZeRO has one that the others have not."""
    folder, dataset = seven_tags

    class Sharded(OmniGRPOTrainer):
        _same_towers = True

    rows = dataset.filter(lambda row: row["tag"] == "S")
    trainer = build_trainer(folder, rows, family, Sharded, gradient_checkpointing=False)
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    frozen = {name for name, weight in build_tiny(family)[0].named_parameters() if weight.requires_grad} - trained
    assert grads_after_one_step(trainer).keys() == trained
    assert all(trainer.family.is_unread(name) for name in frozen)
    unread = {"qwen2_5_omni": "model.audio_tower.audio_bos_eos_token", "phi4_multimodal": "image_embed.img_processor."}
    assert bool(frozen) == (family in unread) and all(unread[family] in name for name in frozen)


def test_completions_are_logged(seven_tags, tmp_path):
    folder, dataset = seven_tags
    trainer = build_trainer(folder, dataset, log_completions=True, output_dir=str(tmp_path))
    trainer.train()
    [table] = (tmp_path / "completions").glob("*.parquet")
    assert len(Dataset.from_parquet(str(table))) == 8


def test_evaluations_log_by_the_name_of_their_data_set_and_beside_training(seven_tags, tmp_path):
    """Of the same step, too; what is best can be told by one of the sets."""
    folder, dataset = seven_tags
    kept = dataset.filter(lambda row: row["tag"] == "S")

    def by_set(prompts, id, **_):
        return [1.0 if name in easy else 0.25 for name in id]

    rows = [dict(row, id=f"{row['id']}-{number}") for number in range(2) for row in kept]
    sets = {name: Dataset.from_list(part) for name, part in (("easy", rows[:1]), ("hard", rows[1:2]))}
    easy = set(sets["easy"]["id"])
    train = kept.map(lambda row: {"id": "trained"})
    options = {"reward": by_set, "log_completions": True, "logging_steps": 1, "max_steps": 2, "eval_dataset": sets}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "save_strategy": "best"}
    options |= {"metric_for_best_model": "eval_hard_reward", "output_dir": str(tmp_path)}
    trainer = build_trainer(folder, train, **options)
    trainer.train()
    told = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    assert [(set(entry) & {"eval_easy_reward", "eval_hard_reward", "eval_reward"}).pop() for entry in told] == [
        "eval_easy_reward",
        "eval_hard_reward",
    ]
    assert told[0]["eval_easy_reward"] == 1.0 and told[1]["eval_hard_reward"] == 0.25 == trainer.state.best_metric
    assert "eval_easy_completions/mean_length" in told[0] and "eval_easy_loss" in told[0]
    written = {
        str(path.relative_to(tmp_path / "completions").parent): set(Dataset.from_parquet(str(path))["by_set"])
        for path in sorted((tmp_path / "completions").rglob("*_00002.parquet"))
    }
    assert written == {".": {0.25}, "eval_easy": {1.0}, "eval_hard": {0.25}}
    files = {path.name for path in (tmp_path / "completions").iterdir()}
    assert files == {"completions_00001.parquet", "completions_00002.parquet", "eval_easy", "eval_hard"}
    assert set(trainer.evaluate(sets["hard"], metric_key_prefix="test")) >= {"test_reward", "test_loss"}
    assert trainer.evaluate(sets["hard"])["eval_reward"] == 0.25


def test_unused_columns_can_be_dropped(seven_tags):
    folder, dataset = seven_tags
    rows = Dataset.from_list(
        [dict(row, video="gone.mp4" if i == 0 else row["video"]) for i, row in enumerate(dataset)]
    )
    trainer = build_trainer(folder, rows, remove_unused_columns=True, media_check="none", shuffle_dataset=False)
    trainer.train()
    assert trainer.state.log_history[0]["media/quarantined_prompts"] == 1
