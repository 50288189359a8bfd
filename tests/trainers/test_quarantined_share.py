"""A run most of whose media cannot be used stops and says so; one that lost a few rows goes on, and says that last."""

import json
import re

import pytest
from datasets import Dataset
from omni_runs import build_trainer

from maple_trl import cli
from maple_trl.trainers.common.checkpoint import last_complete_checkpoint
from maple_trl.trainers.common.run_errors import TooManyQuarantinedError


pytestmark = pytest.mark.slow


GOOD = "1\n00:00:00,000 --> 00:00:01,000\nword {}\n"
STEP = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "shuffle_dataset": False,
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def rows(folder, count, broken, start=0):
    """Rows that are fed a subtitle file; of some it cannot be read."""
    for i in range(count):
        path = folder / f"{i}.srt"
        path.write_bytes(b"" if i in broken else GOOD.format(i).encode())
    question = [{"role": "user", "content": "which word"}]
    return Dataset.from_list(
        [{"prompt": question, "subtitle": f"{i}.srt", "tag": "S", "solution": "A"} for i in range(count)]
    )


@pytest.mark.parametrize(
    ("count", "broken", "limit", "stops"),
    [
        (20, 2, 0.1, False),  # exactly the limit
        (20, 3, 0.1, True),
        (20, 3, 0.15, False),
        (9, 4, 0.1, False),  # too few to tell
        (10, 2, 0.1, True),
        (10, 8, 1.0, False),
        (40, 1, 0.01, False),  # a single row is 2.5 %
        (100, 2, 0.01, True),
        (9, 1, 0.0, True),  # none is tolerated
        (9, 0, 0.0, False),
    ],
)
def test_the_share_is_judged_before_the_run(folder, count, broken, limit, stops):
    data = rows(folder, count, set(range(broken)))
    trainer = build_trainer(folder, data, max_quarantined_share=limit, max_steps=-1, output_dir=str(folder / "run"))
    if not stops:
        assert trainer.too_many_quarantined() is None
        return
    with pytest.raises(TooManyQuarantinedError) as caught:
        trainer.train()
    message = str(caught.value)
    share = f"{broken} of {count} rows cannot be used ({broken} empty-file; first 0.srt"
    assert message.startswith(f"train_dataset: {share}") and f"max_quarantined_share={limit:g}" in message
    assert "Nothing was trained" in message and not trainer.state.log_history
    assert len(json.loads((folder / "run" / "quarantine.json").read_text())) == broken
    assert last_complete_checkpoint(str(folder / "run")) is None


def test_a_run_whose_files_break_in_its_steps_stops_with_a_checkpoint(folder):
    """Nothing is probed: 4 rows a step, of which the first two break in each; 10 rows are seen in the third step."""
    broken = {i for i in range(24) if i % 4 < 2}
    data = rows(folder, 24, broken)
    options = STEP | {"media_check": "none", "max_steps": 6, "output_dir": str(folder / "run")}
    trainer = build_trainer(folder, data, **options)
    with pytest.raises(TooManyQuarantinedError) as caught:
        trainer.train()
    stopped = trainer.state.global_step
    assert 1 < stopped < 6
    found = re.match(
        r"train_dataset: (\d+) of the (\d+) rows that batches asked for cannot be used", str(caught.value)
    )
    assert int(found[2]) >= 10 and int(found[1]) == len(trainer.row_encoder.quarantined)
    assert f"Stopped after step {stopped}" in str(caught.value) and "first 0.srt, 1.srt, 4.srt" in str(caught.value)
    checkpoint = last_complete_checkpoint(str(folder / "run"))
    assert checkpoint == str(folder / "run" / f"checkpoint-{stopped}")

    # As it is, it does not go on; with a larger share it does, from where it stopped.
    with pytest.raises(TooManyQuarantinedError, match="Nothing was trained"):
        build_trainer(folder, data, **options).train(resume_from_checkpoint=True)
    resumed = build_trainer(folder, data, **options, max_quarantined_share=0.8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and resumed.steps_made == 6 - stopped
    [note] = [note for note in resumed.left_out() if note["kind"] == "quarantined"]
    assert note["count"] == len(resumed.row_encoder.quarantined) == note["reasons"]["empty-file"]


def test_few_files_that_break_in_the_steps_stop_nothing(folder):
    """The control: 1 of 24 rows breaks, as the first that is asked for."""
    options = STEP | {"media_check": "none", "max_steps": 6, "output_dir": str(folder / "run")}
    trainer = build_trainer(folder, rows(folder, 24, {0}), **options)
    trainer.train()
    assert trainer.state.global_step == 6
    notes = {note["kind"]: note for note in trainer.left_out()}
    assert notes["quarantined"]["text"] == "train_dataset: 1 of 24 rows quarantined (1 empty-file; first 0.srt)"


def test_media_that_vanish_end_the_run_at_once_and_a_resumed_one_has_them_all(folder):
    """A folder that is no longer there: rows that stand in fail as well, and the step cannot be made."""
    data = rows(folder, 100, ())
    calls = []

    def vanishing(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            (folder / "away").mkdir()
            for path in folder.glob("*.srt"):
                path.rename(folder / "away" / path.name)
        return [float(i % 2) for i in range(len(completions))]

    options = STEP | {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "output_dir": str(folder / "run")}
    options |= {"media_cache_bytes": 1, "media_prefetch": False}
    trainer = build_trainer(folder, data, reward=vanishing, **options)
    with pytest.raises(TooManyQuarantinedError) as caught:
        trainer.train()
    assert trainer.state.global_step == 2 and "so that the step could not be made" in str(caught.value)
    # The four rows of the step, and seven times the next one, which stands in for all of them; eight rows before.
    assert "11 of the 19 rows that batches asked for" in str(caught.value)
    assert len(json.loads((folder / "run" / "quarantine.json").read_text())) == 11
    for path in (folder / "away").glob("*.srt"):
        path.rename(folder / path.name)
    again = build_trainer(folder, data, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and not again.row_encoder.quarantined


def test_losses_before_and_in_the_run_add_up(folder):
    """9 % left out by the probe and 9 % broken since are more than 10 %; either alone is not."""
    data = rows(folder, 100, set(range(9)))
    trainer = build_trainer(folder, data, output_dir=str(folder / "run"))
    [registry] = trainer.row_encoder.registries.values()
    assert registry.too_many(0.1) is None
    keys = [trainer.prompt_builder.spec(row).key for row in data]
    registry.note_seen(keys[9:31])
    assert registry.too_many(0.1) is None
    error = next(iter(registry.quarantined.values()))
    from maple_trl.omni.errors import MediaError

    for key in keys[9:11]:
        registry.add(key, MediaError(error.reason, "late.srt", "broke"))
    assert "2 of the 22 rows that batches asked for, and 9 of 100 rows before" in registry.too_many(0.1)
    assert "which is 17%" in registry.too_many(0.1) and registry.too_many(0.2) is None


def test_an_evaluation_set_is_judged_too(folder):
    data = rows(folder, 20, {17, 18, 19})
    trainer = build_trainer(
        folder, data.select(range(12)), eval_dataset=data.select(range(10, 20)), output_dir=str(folder / "run")
    )
    with pytest.raises(TooManyQuarantinedError, match="eval_dataset: 3 of 10 rows"):
        trainer.train()


def test_the_option_is_checked(folder):
    with pytest.raises(ValueError, match="max_quarantined_share must be between 0 and 1, got 10"):
        build_trainer(folder, rows(folder, 2, ()), max_quarantined_share=10)


def train_command(folder, data, *words):
    data.to_json(folder / "train.jsonl")
    words = ["--dataset_name", folder, "--output_dir", folder / "run", "--max_steps", 2, "--logging_steps", 1, *words]
    common = "--model_name_or_path builtin:tiny-omni --use_cpu true --bf16 false --dtype float32 --report_to none"
    common += (
        " --per_device_train_batch_size 4 --num_generations 2 --gradient_accumulation_steps 1 --disable_tqdm true"
    )
    common += " --max_completion_length 4 --max_pixels 3136 --save_strategy no --gradient_checkpointing false"
    return cli.main(["train", *common.split(), *map(str, words)])


def test_the_command_ends_with_1_and_names_reasons_and_files(folder, capsys):
    data = rows(folder, 12, {1, 2, 3, 4, 5})
    assert train_command(folder, data) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("maple-trl train: train_dataset: 5 of 12 rows cannot be used (5 empty-file; first 1.srt, ")
    assert not (folder / "run" / "model.safetensors").exists()

    # The control, in the same folder: it goes on, and says last what it left out.
    assert train_command(folder, data, "--max_quarantined_share", 0.5) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    text = "train_dataset: 5 of 12 rows quarantined (5 empty-file; first 1.srt, 2.srt, 3.srt)"
    assert last.startswith("Left out, failed or never fired: ") and text in last
    summary = json.loads((folder / "run" / "summary.json").read_text())
    note = next(note for note in summary["left_out"] if note["kind"] == "quarantined")
    assert (note["count"], note["of"], note["reasons"]) == (5, 12, {"empty-file": 5})
    assert note["files"] == ["1.srt", "2.srt", "3.srt"] and note["text"] == text

    from maple_trl.reports.folders import read_run
    from maple_trl.reports.report import report_data

    [run] = report_data([read_run(folder / "run")], [None])["runs"]
    assert ["left out, failed or never fired", text] in run["facts"]
    (folder / "run" / "summary.json").unlink()  # as of a run that was stopped
    [run] = report_data([read_run(folder / "run")], [None])["runs"]
    stopped = "5 prompts quarantined (5 empty-file; first 1.srt, 2.srt, 3.srt)"
    assert ["left out, failed or never fired", stopped] in run["facts"]
