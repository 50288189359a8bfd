"""What a training job tells: what it will do, a row for each entry of its log, what it has learned; and `args.json`."""

import io
import json
import logging
import re
import warnings
from contextlib import redirect_stderr, redirect_stdout

import pytest
from datasets import Dataset
from omni_runs import build_trainer
from safetensors import safe_open
from transformers import PrinterCallback, TrainerControl, TrainerState

from maple_trl import cli
from maple_trl.jobs.console import LogRows, show_progress
from maple_trl.omni.loading import resolve_checkpoint
from maple_trl.records.metrics_log import first_and_last
from maple_trl.records.summary import print_summary
from maple_trl.trainers.mapo.config import MAPOConfig


OPTIONS = (
    "--model_name_or_path builtin:tiny-omni --use_cpu true --bf16 false --dtype float32 --report_to none --use_peft true "
    "--lora_r 2 --lora_vision false --gradient_accumulation_steps 1 --per_device_train_batch_size 4 --logging_steps 1 "
    "--save_steps 1 --max_pixels 3136 --num_generations 2 --max_completion_length 4 --hub_token hf_keyOfMine --media_root ."
).split()
OPTIONS += ["--model_init_kwargs", '{"token": "hf_keyOfMine"}']


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of two steps that was resumed for a third, and what each of both printed at 80 columns."""
    folder = tmp_path_factory.mktemp("console")
    rows = [
        {"prompt": [{"role": "user", "content": "which"}], "subtitle": f"word {i}", "tag": "S", "solution": "A"}
        for i in range(12)
    ]
    Dataset.from_list(rows).to_json(folder / "train.jsonl")
    words = ["train", *OPTIONS, "--dataset_name", str(folder), "--output_dir", str(folder / "run")]
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        for logger in (logging.root, logging.getLogger("maple_trl")):  # as in a process of its own
            patch.setattr(logger, "handlers", [])
        for more in (["--max_steps", "2"], ["--max_steps", "3", "--resume_from_checkpoint", "true"]):
            with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
                assert cli.main([*words, *more]) == 0, err.getvalue()
            told.append((out.getvalue(), err.getvalue()))
    return folder / "run", told


def table(text):
    """The rows below the heading, as mappings of its words to theirs."""
    lines = text.splitlines()
    (top,) = [i for i, line in enumerate(lines) if line.split()[:2] == ["step", "reward"]]
    names = lines[top].replace("acc %", "acc").split()
    cells = [line.split() for line in lines[top + 1 :]]
    return [dict(zip(names, row, strict=False)) for row in cells if row and re.fullmatch(r"\d+/\d+", row[0])]


def test_a_row_for_each_entry_of_the_log_and_no_more(runs):
    folder, ((first, _), (second, _)) = runs
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [entry for entry in logged if "reward" in entry]
    shown = table(first) + table(second)
    assert [row["step"] for row in shown] == ["1/2", "2/2", "3/3"]
    for row, entry in zip(shown, logged, strict=True):
        accuracy = f"{100 * entry['tag/S/rewards/accuracy_reward']:.0f}"
        assert row["reward"] == f"{entry['reward']:.3f}" and row["acc"] == row["S"] == accuracy
        assert row["length"] == f"{entry['completions/mean_length']:.1f}" and float(row["s/step"]) > 0
    assert [row["left"] for row in shown[1:]] == ["0:00", "0:00"]
    assert "grad_norm" not in first + second  # the rest is in metrics.jsonl alone
    assert not re.search(r"[\r\x1b]", first + second)


def test_what_is_compared_before_the_first_step_is_said(runs):
    _, ((_, first), _) = runs
    (begun,) = re.findall(
        r"shared_prefix='auto': comparing a prompt of (\d+) tokens \(image, video, audio, text\)", first
    )
    assert int(begun) < 150 and len(re.findall(r"Both ways agree, which took \d+\.\d s to find", first)) == 1


def test_what_the_run_will_do_is_said_first(runs):
    folder, ((first, _), (second, _)) = runs
    before = " ".join(first[: first.index("Training:")].split())
    sizes = {}
    for name, path in (("model", resolve_checkpoint("builtin:tiny-omni")), ("adapter_model", folder)):
        with safe_open(f"{path}/{name}.safetensors", "np") as file:
            sizes[name] = sum(file.get_tensor(key).size for key in file.keys())
    adapter, every = f"{sizes['adapter_model']:,}", f"{sum(sizes.values()):,}"
    assert f"trained {adapter} of {every} parameters (" in before
    assert re.search(r": vision 0/[\d,]+, audio 0/[\d,]+, projectors 0/[\d,]+, llm 0/[\d,]+", before)
    assert f"adapter {adapter}/{adapter} " in before
    assert "rows 12: S 12 a step 2 prompts x 2 completions steps 2 results" in before
    assert "Training: 2 steps, 0.333 epochs\n" in first  # two of six batches
    assert "Training: 3 steps, 0.5 epochs, going on after step 2\n" in second


def test_options_are_written_without_keys(runs):
    folder, _ = runs
    text = (folder / "args.json").read_text()
    options = json.loads(text)
    assert "hf_keyOfMine" not in text and options["model_init_kwargs"]["token"] == "<hidden>"
    assert options["max_steps"] == 3 and options["resume_from_checkpoint"] == "true"
    known = {
        "trainer": "omni_grpo",
        "lora_r": 2,
        "num_generations": 2,
        "reward_funcs": ["format_reward", "accuracy_reward"],
    }
    assert {name: options[name] for name in known} == known
    assert options["generation_batch_size"] == 4  # what follows from others is in it
    assert options["hub_token"] == "<HUB_TOKEN>" and not list(folder.glob(".args*"))


def test_the_end_says_what_was_learned_and_written(runs):
    folder, (_, (text, _)) = runs
    learned = json.loads((folder / "summary.json").read_text())["learned"]
    first, last = learned["reward"]
    *_, told, steps, written, left_out = text.splitlines()
    assert f"tenth of the log: reward {first:.3f} -> {last:.3f}, accuracy " in told and ", S " in told
    assert steps.startswith("3 steps, ") and steps.endswith(f"results in {folder}")
    names = written.removeprefix("Written: ").split(", ")
    assert "checkpoint-3 and 2 before it" in names
    assert {"adapter_model.safetensors", "args.json", "metrics.jsonl", "summary.json"} < set(names)
    assert left_out.startswith(("Left out", "Nothing was left out"))


def test_first_and_last():
    log = [{"step": i, "reward": float(i), "loss": 0.0} for i in range(20)] + [
        {"eval_reward": 99.0},
        {"train_loss": 1.0},
    ]
    assert first_and_last(log) == {"reward": (0.5, 18.5)}
    assert first_and_last([{"loss": 3.0, "mean_token_accuracy": 0.25}, {"loss": float("nan")}, {"loss": 1.0}]) == {
        "loss": (3.0, 1.0)  # an accuracy that is told once has not changed
    }
    tags = [{"tag/V/accuracy": 0.25}, {"tag/A/accuracy": 1.0}, {"tag/V/accuracy": 0.5}]  # one of them seen once
    assert first_and_last(tags) == {"V": (0.25, 0.5)} and first_and_last([]) == {}


def test_a_summary_from_before_is_printed_too(capsys):
    print_summary({"before": None, "after": None, "seconds": 1.0, "steps": 1}, "runs/x")
    assert capsys.readouterr().out == "1 steps, 1 s in all; results in runs/x\n"


ENTRY = {"loss": 0.1, "reward": -12.3456, "tag/all/accuracy": 1.0, "completions/mean_length": 1234.5} | {
    f"tag/{tag}/accuracy": 1.0 for tag in ("V", "A", "S", "VA", "VS", "AS", "VAS")
}


@pytest.mark.parametrize("width, shown", [(30, "acc %"), (60, "left"), (80, "AS VAS"), (200, "AS VAS")])
def test_a_line_fits(width, shown, monkeypatch, capsys):
    """By tag goes first where there is no room; what does not fit is in metrics.jsonl all the same."""
    monkeypatch.setenv("COLUMNS", str(width))
    state, rows = TrainerState(max_steps=9999, global_step=0, is_world_process_zero=True), LogRows(["V"])
    rows.on_train_begin(type("Args", (), {"num_train_epochs": 1.0}), state, TrainerControl())
    for step in range(1, 31):
        state.global_step = step
        rows.on_step_begin(None, state, None)
        rows.on_step_end(None, state, None)
        rows.on_log(None, state, None, logs=ENTRY if step > 1 else {"reward": 1.0, "tag/A/accuracy": 0.5})
        rows.on_log(None, state, None, logs={"eval_reward": 0.5, "eval_runtime": 3.0, "eval_tag/V/accuracy": 0.5})
        rows.on_log(None, state, None, logs={"train_runtime": 1.0, "train_loss": 0.0})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert all(len(line) <= width for line in lines)
    headings = [line for line in lines if "step" in line]
    assert headings[-1].endswith(shown) and ("VAS" in headings[-1]) == (width >= 80)
    assert len([line for line in lines if line.lstrip().startswith("eval")]) == 30
    assert len(headings) in (3, 4) and len(lines) == 60 + len(headings)


def test_other_processes_print_nothing(capsys):
    state, rows = TrainerState(max_steps=2, global_step=1, is_world_process_zero=False), LogRows()
    rows.on_train_begin(None, state, None)
    rows.on_log(None, state, None, logs=ENTRY)
    assert capsys.readouterr().out == ""


@pytest.mark.matrix(cases=1)
@pytest.mark.parametrize("quiet", [True, False])
def test_callbacks_of_ones_own_go_on(quiet, seven_tags, capsys):
    """In Python a trainer prints as it always has, until it is told; a printer added by hand stays."""
    folder, dataset = seven_tags
    trainer = build_trainer(folder, dataset, max_steps=1, logging_steps=1, disable_tqdm=quiet)
    show_progress(trainer)
    trainer.add_callback(PrinterCallback)
    trainer.train()
    shown = capsys.readouterr()
    assert [row["step"] for row in table(shown.out)] == ["1/1"]
    assert shown.out.count("'grad_norm'") == 1 and "\r" not in shown.err


def test_no_deprecated_name_is_used():
    common = {"output_dir": "unused", "use_cpu": True, "bf16": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for wanted in (True, False):
            config = MAPOConfig(
                gradient_checkpointing=wanted, gradient_checkpointing_kwargs={"use_reentrant": wanted}, **common
            )
            assert config.activation_checkpointing is config.gradient_checkpointing is wanted
            assert config.activation_checkpointing_kwargs == {"use_reentrant": wanted}
        config = MAPOConfig(activation_checkpointing=False, **common)  # TRL's own default is true
        assert config.gradient_checkpointing is False
