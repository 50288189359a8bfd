"""Prompts made of columns, in training and in evaluation: what is asked, what is learned, and what is refused."""

import json
import re
import tempfile
from collections import defaultdict

import pyarrow.parquet as pq
import pytest
import yaml
from chat_server import ChatServer
from datasets import Dataset
from eval_runs import SMALL, evaluate, lines_of, result_of
from omni_runs import DEFAULTS, QUIET_ON_CPU, build_trainer, one_row_per_tag
from test_eval_server import always, answers, is_question, text_of
from test_resume_refusals import ROWS as WORDS
from test_templates import CAPTION, SPOKEN
from tiny_models import build_tiny, build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer, MAPOConfig, MAPOTrainer, OmniGRPOConfig, OmniGRPOTrainer, cli
from maple_trl.jobs.data import load_datasets
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import OmniScriptArguments, parse_args
from maple_trl.jobs.stages import resolved_options
from maple_trl.jobs.train import build_trainer as build_job
from maple_trl.omni.errors import RowError
from maple_trl.rewards import AccuracyReward, accuracy_reward
from maple_trl.trainers.common.checkpoint import ResumeError
from maple_trl.trainers.omni_sft.config import OmniSFTConfig
from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer


pytestmark = pytest.mark.slow


SYSTEM = "You watch and listen."


@pytest.fixture(scope="module")
def seven(seven_tags):
    """A folder of clips, and a row of each tag without a prompt of its own; every subtitle is the same text."""
    folder, dataset = seven_tags
    rows = [dict(row, subtitle=SPOKEN + ".", id=f"row {i}") for i, row in enumerate(one_row_per_tag(dataset))]
    return folder, Dataset.from_list(rows).remove_columns("prompt")


@pytest.fixture(scope="module")
def expected():
    return {tag: text.replace(SPOKEN, SPOKEN + ".") for tag, text in CAPTION.items()}


class Watching:
    """Keeps what is encoded."""

    def encode_rows(self, rows):
        rows, prompts = super().encode_rows(rows)
        self.seen = getattr(self, "seen", []) + list(zip(rows, prompts, strict=True))
        return rows, prompts


class Seeing(Watching, OmniGRPOTrainer): ...


def spelled(family, prompt):
    text = family.tokenizer.decode(prompt.input_ids)
    media = "|".join(re.escape(token) for token in family.media_tokens)
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|$)", text, re.DOTALL)
    return [(role, re.sub(media, "", body).strip("\n")) for role, body in turns if role != "assistant"]


# Training


def test_seven_tags_in_one_batch_are_asked_seven_prompts(seven, expected):
    folder, rows = seven
    given = []

    def reward(prompts, completions, **columns):
        given.extend(zip(columns["tag"], prompts, strict=True))
        return [float(i % 2) for i in range(len(completions))]

    trainer = build_trainer(
        folder,
        rows,
        reward=reward,
        trainer_class=Seeing,
        prompt_template="maple-caption",
        system_prompt=SYSTEM,
        per_device_train_batch_size=14,
        gradient_accumulation_steps=1,
        num_generations=2,
    )
    trainer.train()
    found = {row["tag"]: spelled(trainer.family, prompt) for row, prompt in trainer.seen}
    assert found == {tag: [("system", SYSTEM), ("user", text)] for tag, text in expected.items()}
    # Rewards are told what was asked.
    assert len(given) == 14
    for tag, (system, user) in given:
        assert system["content"] == SYSTEM and user["content"].replace("<subtitle>", SPOKEN + ".") == expected[tag]


def test_a_run_in_which_rows_lack_a_column_is_refused_with_the_row(seven):
    folder, rows = seven
    with pytest.raises(
        RowError, match=r"train_dataset, row 0: prompt_template names \{title\}, and there is no column"
    ):
        build_trainer(folder, rows, prompt_template="{title}")
    empty = Dataset.from_list([row if i != 3 else dict(row, question=None) for i, row in enumerate(rows)])
    with pytest.raises(RowError, match=r"train_dataset, row 3: .*column 'question' is empty"):
        build_trainer(folder, empty, prompt_template="{question}")
    with pytest.raises(RowError, match=r"eval_dataset, row 3: .*column 'question' is empty"):
        build_trainer(folder, rows, prompt_template="{question}", eval_dataset=empty)


def test_streamed_rows_are_asked_as_they_are_read(seven, expected):
    folder, rows = seven
    for features in (rows.features, None):
        stream = rows.to_iterable_dataset() if features else rows.to_iterable_dataset().map(lambda row: row)
        trainer = build_trainer(
            folder, stream, trainer_class=Seeing, prompt_template="maple-caption", per_device_train_batch_size=4
        )
        trainer.train()
        for row, prompt in trainer.seen:
            assert spelled(trainer.family, prompt)[-1] == ("user", expected[row["tag"]])


def bias(tokenizer):
    """Generation options with which an answer is `[A]`, `[B]`, `[C]` or `[D]`, as the model likes."""
    opens, closes, end = (tokenizer.convert_tokens_to_ids(token) for token in ("[", "]", tokenizer.eos_token))
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"]
    found = [[[opens], 100.0]]
    for letter in letters:
        found += [[[opens, letter], 300.0], [[opens, letter, closes], 600.0], [[letter, closes, end], 900.0]]
    return {"sequence_bias": found}


def test_answers_in_brackets_are_scored_in_training(seven, tmp_path):
    folder, rows = seven
    model, processor = build_tiny("qwen2_5_omni")
    given = {"model": model, "processing_class": processor, "output_dir": str(tmp_path / "run"), "max_steps": 2}
    given |= {"prompt_template": "maple-qa", "generation_kwargs": bias(processor.tokenizer), "rollout_log_size": 10**6}
    given |= {"per_device_train_batch_size": 14, "gradient_accumulation_steps": 1, "num_generations": 7}
    trainer = build_trainer(folder, rows, reward=AccuracyReward("brackets"), trainer_class=Seeing, **given)
    trainer.train()
    lines = [
        line for file in (tmp_path / "run" / "rollouts").glob("*.parquet") for line in pq.read_table(file).to_pylist()
    ]
    assert len(lines) == 28 and {line["reward"] for line in lines} == {0.0, 1.0}
    for line in lines:
        assert re.fullmatch(r"\[[ABCD]\]", line["completion"])
        assert line["reward"] == float(line["completion"] == f"[{line['solution']}]")
    # What asks for brackets and reads tags would count every answer as wrong.
    for reward in (accuracy_reward, AccuracyReward("tags")):
        with pytest.raises(
            ValueError, match="asks for answers in the form 'brackets', and accuracy_reward reads 'tags'"
        ):
            build_trainer(folder, rows, reward=reward, prompt_template="maple-qa")


def test_supervised_rows_are_asked_too(seven, expected):
    folder, rows = seven
    rows = rows.map(lambda row: {"completion": [{"role": "assistant", "content": row["solution"]}]})
    options = {name: value for name, value in DEFAULTS.items() if name != "num_generations"}
    options |= {"output_dir": tempfile.mkdtemp(), "media_root": str(folder), "prompt_template": "maple-caption"}
    options |= {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 1}

    class SeeingSFT(Watching, OmniSFTTrainer): ...

    model, processor = build_tiny("qwen2_5_omni")
    trainer = SeeingSFT(model, OmniSFTConfig(**options), train_dataset=rows, processing_class=processor)
    trainer.train()
    found = {row["tag"]: spelled(trainer.family, prompt)[-1] for row, prompt in trainer.seen}
    assert found == {tag: ("user", text) for tag, text in expected.items()}
    with pytest.raises(RowError, match="row 0: prompt_template names"):
        OmniSFTTrainer(
            model,
            OmniSFTConfig(**options | {"prompt_template": "{x}"}),
            train_dataset=rows,
            processing_class=processor,
        )


# Memory, hints, the accuracy before training


def avatar(rows, template, output, **options):
    model, processor = build_tiny("qwen2_5_omni")
    given = DEFAULTS | {"output_dir": str(output), "prompt_template": template, "replayed_generations": 2} | options
    return AvatarTrainer(model, [AlwaysWrong()], AvatarConfig(**given), train_dataset=rows, processing_class=processor)


class AlwaysWrong:
    __name__ = "always_wrong"

    def __call__(self, completions, **columns):
        return [0.0] * len(completions)


def test_hints_follow_the_made_prompt_and_memory_knows_the_prompt(tmp_path):
    rows = Dataset.from_list([dict(row, question=f"Q{i}?", hint="zebra") for i, row in enumerate(WORDS)])
    seen = defaultdict(list)

    class Hinting(AvatarTrainer):
        def _encode_hinted(self, row, key):
            prompt = super()._encode_hinted(row, key)
            seen[row["question"]].append(spelled(self.family, prompt)[-1][1])
            return prompt

    model, processor = build_tiny("qwen2_5_omni")
    options = DEFAULTS | {"output_dir": str(tmp_path), "prompt_template": "Say. {question} {subtitle}"}
    options |= {"replayed_generations": 2, "hints": True, "hint_visits": 1, "hint_max_kl": 100.0, "max_steps": 8}
    options |= {"learning_rate": 0.0, "hint_template": " Hint: {hint}", "replay_scope": "tiers"}
    trainer = Hinting(
        model,
        [AlwaysWrong()],
        AvatarConfig(**options),
        train_dataset=rows.select(range(4)),
        processing_class=processor,
    )
    trainer.train()
    assert seen
    for question, texts in seen.items():
        word = f"word {question[1:-1]}"
        assert set(texts) == {f"Say. {question} {word} Hint: zebra"}
    keys = {trainer.prompt_builder.spec(row).key for row in trainer.train_dataset}
    other = avatar(rows.select(range(4)), "Tell. {question} {subtitle}", tmp_path / "other")
    assert not keys & {other.prompt_builder.spec(row).key for row in other.train_dataset}


def test_the_accuracy_before_training_is_that_of_the_made_prompts(seven, tmp_path):
    folder, rows = seven
    asked = []

    class Measured(MAPOTrainer):
        def generate_completions(self, rows, batch_size=None):
            asked.extend(row["prompt"][0]["content"] for row in rows)
            return super().generate_completions(rows, batch_size)

    def reward(completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    model, processor = build_tiny("qwen2_5_omni")
    options = DEFAULTS | {"output_dir": str(tmp_path), "media_root": str(folder), "prompt_template": "Now: {question}"}
    options |= {"curriculum": "adaptive", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = Measured(model, reward, MAPOConfig(**options), train_dataset=rows, processing_class=processor)
    trainer.train()
    assert sorted(asked) == sorted(f"Now: {question}" for question in rows["question"])


# A run that goes on


def test_a_run_does_not_go_on_with_other_prompts(tmp_path):
    rows = Dataset.from_list([dict(row, question=f"Q{i}?") for i, row in enumerate(WORDS)])

    def run(template, **options):
        model, processor = build_tiny("qwen2_5_omni")
        given = DEFAULTS | {"output_dir": str(tmp_path), "prompt_template": template, "max_steps": 2}
        given |= {"save_strategy": "steps", "save_steps": 1} | options
        return OmniGRPOTrainer(
            model, AlwaysWrong(), OmniGRPOConfig(**given), train_dataset=rows, processing_class=processor
        )

    run("{question}", max_steps=1).train()
    for other in (run("{question}!"), run("{question}", system_prompt="x")):
        with pytest.raises(
            ResumeError, match="the same data, tags, modality_access, prompt_template and system_prompt"
        ):
            other.train(resume_from_checkpoint=True)
    again = run("{question}")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_stages_know_prompts_by_their_content(tmp_path):
    """What is compared with an earlier stage holds the text of a file, and not its name."""
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"system_prompt": str(tmp_path / "system.txt"), "use_cpu": True, "bf16": False})
    )
    found = []
    for said in ("One.\n", "\ufeffTwo."):  # the mark that some editors begin a file with is no part of it
        (tmp_path / "system.txt").write_text(said, encoding="utf-8")
        job = parse_args(["--config", str(tmp_path / "s.yaml"), "--output_dir", str(tmp_path)])
        found.append(resolved_options(job))
    assert [options["system_prompt"] for options in found] == ["One.", "Two."] and found[0]["prompt_template"] is None


# Evaluation


def test_an_evaluation_asks_what_training_asks(seven, expected, tmp_path):
    folder, rows = seven
    rows.to_json(tmp_path / "train.jsonl")
    rows.to_json(tmp_path / "test.jsonl")
    words = ["--data", tmp_path, "--media-root", folder, "--prompt_template", "maple-caption", "--samples", "1"]
    words += ["--system-prompt", SYSTEM, "--model", "builtin:tiny-omni", *SMALL, "--quiet"]
    assert evaluate(*words, "--output", tmp_path / "eval") == 0
    trained = tmp_path / "run"
    job = ["--dataset_name", tmp_path, "--media_root", folder, "--prompt_template", "maple-caption", "--system_prompt"]
    job += [
        SYSTEM,
        "--model_name_or_path",
        "builtin:tiny-omni",
        "--num_frames",
        4,
        "--max_pixels",
        3136,
        "--max_steps",
        1,
    ]
    job += ["--per_device_train_batch_size", 14, "--num_generations", 2, "--gradient_accumulation_steps", 1]
    job += ["--max_completion_length", 4, "--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--report_to"]
    job += ["none", "--save_strategy", "no", "--output_dir", trained, "--rollout_log_size", 10**6]
    assert cli.main(["train", *map(str, job)]) == 0
    asked = {line["id"]: line["prompt"] for line in pq.read_table(trained / "rollouts").to_pylist()}
    lines = lines_of(tmp_path / "eval")
    assert len(asked) == 7 and {line["id"]: line["prompt"] for line in lines} == asked
    told = result_of(tmp_path / "eval")
    assert told["prompt"]["template"]["name"] == "maple-caption" and told["media"]["system_prompt"] == SYSTEM
    again = [SYSTEM + "!" if word == SYSTEM else word for word in words]
    assert evaluate(*again, "--output", tmp_path / "eval") == 2  # another evaluation
    # Of another choice of signals the text for these.
    assert evaluate(*words, "--output", tmp_path / "seen", "--access", "V,VAS") == 0
    by_access = {line["access"]: line["prompt"] for line in lines_of(tmp_path / "seen")}
    for tag in ("V", "VAS"):
        assert (
            by_access[tag]
            .replace("[subtitle]", SPOKEN + ".")
            .replace(" ", "")
            .endswith(expected[tag].replace(" ", ""))
        )


def test_a_served_model_is_asked_the_same(seven, expected, tmp_path):
    folder, rows = seven
    rows.to_json(tmp_path / "test.jsonl")
    words = ["--data", tmp_path, "--media-root", folder, "--prompt_template", "maple-caption", "--samples", "1"]
    words += ["--system-prompt", SYSTEM, "--model", "served", *SMALL, "--quiet", "--concurrency", "1"]
    words += ["--server-video", "images"]  # no times among the words
    with ChatServer(always("B")) as server:
        assert evaluate(*words, "--server", server.url, "--output", tmp_path / "out") == 0
        calls = [call.body for call in server.calls if is_question(call.body)]
    for row, body in zip(rows, calls, strict=True):
        assert body["messages"][0] == {"role": "system", "content": SYSTEM}
        assert text_of(body) == expected[row["tag"]]


def test_an_evaluation_reads_the_form_that_is_asked_for(seven, tmp_path):
    folder, rows = seven
    rows.to_json(tmp_path / "test.jsonl")
    words = ["--data", tmp_path, "--media-root", folder, "--model", "served", *SMALL, "--quiet", "--samples", "1"]
    found = {}
    for name, template in (("asked", "maple-qa"), ("not", "{question}")):
        with ChatServer(answers(lambda body: "So it is [B].")) as server:
            given = ["--prompt_template", template, "--server", server.url, "--output", tmp_path / name]
            assert evaluate(*words, *given) == 0
        found[name] = [line["score"] for line in lines_of(tmp_path / name)]
    assert found["asked"] == [float(solution == "B") for solution in rows["solution"]]
    assert found["not"] == [0.0] * 7
    judge = json.dumps({"reward": "accuracy_reward", "answer_format": "tags"})
    assert evaluate(*words, "--prompt_template", "maple-qa", "--judge", judge, "--output", tmp_path / "x") == 2


def test_rows_that_cannot_be_asked_are_named_in_an_evaluation(seven, tmp_path, capsys):
    folder, rows = seven
    Dataset.from_list([dict(row, question=row["question"] if i else None) for i, row in enumerate(rows)]).to_json(
        tmp_path / "test.jsonl"
    )
    words = ["--data", tmp_path, "--media-root", folder, "--model", "builtin:tiny-omni", *SMALL, "--quiet"]
    words += ["--samples", "1", "--prompt_template"]
    assert evaluate(*words, "{question}", "--output", tmp_path / "one") == 1
    (error,) = result_of(tmp_path / "one")["errors"]
    assert error["row"] == 0 and "column 'question' is empty" in error["detail"]
    assert evaluate(*words, "{title}", "--output", tmp_path / "none") == 2
    assert "there is no column 'title'" in capsys.readouterr().err


# Jobs


def job(folder, *words):
    given = [
        "--dataset_name",
        folder,
        "--model_name_or_path",
        "builtin:tiny-omni",
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    return parse_args([*map(str, given), "--output_dir", str(folder / "run"), *map(str, words)])


def test_a_job_is_refused_before_its_model_is_loaded(seven, tmp_path, monkeypatch):
    folder, rows = seven
    rows.to_json(tmp_path / "train.jsonl")
    monkeypatch.setattr("maple_trl.jobs.train.load_model_and_processor", lambda *_: pytest.fail("loaded"))
    media = ["--media_root", folder]
    for words, message in (
        (["--prompt_template", "maple-qa"], r"answer_format: brackets"),
        (["--prompt_template", "{title}"], r"train_dataset, row 0: prompt_template names \{title\}"),
        ([], r"has no column 'prompt'.*prompt_template makes it of other columns"),
        (["--prompt_template", "null"], r"has no column 'prompt'"),  # of a recipe that has one
    ):
        with pytest.raises(SetupError, match=message):
            build_job(*job(tmp_path, *media, *words))
    for words, message in (
        (["--prompt_template", "maple-qua"], "there is no set of templates 'maple-qua'"),
        (["--prompt_template", '{"Q": "x"}'], "'Q' is neither a tag"),
        (["--system_prompt", "gone.txt"], "system_prompt: cannot read gone.txt: No such file"),
        (["--system_prompt", " "], "system_prompt is blank"),
    ):
        with pytest.raises(SetupError, match=message):
            job(tmp_path, *words)


def test_a_file_gives_texts_by_tag(tmp_path):
    texts = {"VS": "{question} {subtitle}", "default": "{question}"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"prompt_template": texts, "use_cpu": True, "bf16": False}))
    args = parse_args(["--config", str(tmp_path / "job.yaml"), "--output_dir", str(tmp_path)])[1]
    assert args.prompt_template == texts
    words = [
        "--prompt_template",
        json.dumps(texts),
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    assert parse_args(words)[1].prompt_template == texts


def test_a_text_model_has_no_templates():
    model, tokenizer = build_tiny_text()
    rows = Dataset.from_list([{"prompt": "red", "question": "x"}] * 8)
    for option in ({"prompt_template": "{question}"}, {"system_prompt": "x"}):
        args = OmniGRPOConfig(output_dir=tempfile.mkdtemp(), **QUIET_ON_CPU, **option)
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for omni models"):
            OmniGRPOTrainer(model, AlwaysWrong(), args, train_dataset=rows, processing_class=tokenizer)


def test_own_system_messages_are_counted(caplog):
    own = {"role": "system", "content": "Mine."}
    rows = [dict(row, prompt=[own, *row["prompt"]]) if i < 2 else row for i, row in enumerate(WORDS)]
    trainer = build_trainer(".", Dataset.from_list(rows), system_prompt="Ours.\nAll of 'ours'.")
    assert "train_dataset: 2 of 12 rows keep a system message of their own" in caplog.text
    systems = [row["prompt"][0]["content"] for row in trainer.train_dataset]
    assert systems == ["Mine."] * 2 + ["Ours.\nAll of 'ours'."] * 10


def test_the_embedded_set_is_asked_what_it_was():
    """The tiny recipes' template makes the prompts that the embedded model knows."""
    splits, root = load_datasets(OmniScriptArguments(dataset_name="builtin:seven-tags"))
    rows = splits["train"].select(range(16))
    trainer = build_trainer(root, rows.remove_columns("prompt"), prompt_template="{question}")
    assert [row["prompt"] for row in trainer.train_dataset] == rows["prompt"][:16]
