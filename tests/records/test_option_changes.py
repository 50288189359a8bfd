"""What a start from a checkpoint has changed in a run's options is told, and kept."""

import json

from maple_trl.hub.model_card import CardFacts, render_model_card
from maple_trl.records.option_changes import CHANGES_FILE, OPTIONS_FILE, read_changes, told, write_options
from maple_trl.reports.folders import read_run


FIRST = {"beta": 0.0, "reward_funcs": ["accuracy_reward"], "save_steps": 10, "output_dir": "run"}


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return path


def kept(folder):
    return json.loads((folder / OPTIONS_FILE).read_text())


def test_each_start_from_a_checkpoint_says_what_it_changed(tmp_path):
    assert write_options(tmp_path, FIRST) == {} and kept(tmp_path) == FIRST
    same = write_options(tmp_path, FIRST | {"save_steps": 5, "new": 1}, checkpoint(tmp_path, 10), {"save_steps"})
    assert same == {} and not (tmp_path / CHANGES_FILE).exists()
    second = FIRST | {"beta": 0.04, "reward_funcs": ["accuracy_reward", "format_reward"]}
    changed = write_options(tmp_path, second, checkpoint(tmp_path, 40), {"save_steps"})
    assert (
        told(changed) == 'beta 0.0 -> 0.04, reward_funcs ["accuracy_reward"] -> ["accuracy_reward", "format_reward"]'
    )
    write_options(tmp_path, second | {"beta": 0.1}, checkpoint(tmp_path, 70), {"save_steps"})
    assert [(entry["step"], [*entry["options"]]) for entry in read_changes(tmp_path)] == [
        (40, ["beta", "reward_funcs"]),
        (70, ["beta"]),
    ]
    assert kept(tmp_path)["beta"] == 0.1


def test_a_run_in_another_folder_keeps_what_was_before_and_a_new_one_does_not(tmp_path):
    first, other = tmp_path / "first", tmp_path / "other"
    first.mkdir()
    other.mkdir()
    write_options(first, FIRST)
    write_options(first, FIRST | {"beta": 1.0}, checkpoint(first, 2))
    write_options(other, FIRST | {"beta": 2.0}, checkpoint(first, 4))
    assert [entry["options"] for entry in read_changes(other)] == [{"beta": [0.0, 1.0]}, {"beta": [1.0, 2.0]}]
    write_options(other, FIRST)
    assert read_changes(other) == [] and not (other / CHANGES_FILE).exists()
    (first / OPTIONS_FILE).write_text("{")  # as a power cut leaves it
    assert write_options(first, FIRST, checkpoint(first, 6)) == {}


def test_the_report_and_the_card_tell_of_changes(tmp_path):
    write_options(tmp_path, FIRST)
    start = checkpoint(tmp_path, 40)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    facts = CardFacts("m", trainer="MAPO", steps=80, recipe={"beta": 0.04})
    assert "changed while it was trained" not in str(render_model_card(facts, tmp_path))
    assert not any("Options were changed" in note for note in read_run(tmp_path).notes)
    write_options(tmp_path, FIRST | {"beta": 0.04}, start)
    assert "- from step 40: `beta`\n" in str(render_model_card(facts, tmp_path))
    [note] = [note for note in read_run(tmp_path).notes if "Options were changed" in note]
    assert "at step 40" in note and "beta 0.0 -> 0.04" in note
