"""What a run tells of itself goes on over its starts: its log, and how long it has trained."""

import json
import logging
from types import SimpleNamespace

from transformers import TrainerState

from maple_trl.records import metrics_log
from maple_trl.trainers.common.rollout_log import METRICS_FILE, LiveLog
from maple_trl.trainers.common.run_clock import CLOCK_FILE, RunClock


def begun(folder, held, checkpoint=None):
    """The steps in the file of a run that goes on with the entries `held` of its checkpoint."""
    state = TrainerState(log_history=[{"step": step, "reward": 0.5} for step in held])
    log = LiveLog()
    log.checkpoint = checkpoint
    log.on_train_begin(SimpleNamespace(output_dir=str(folder)), state, None)
    return [json.loads(line)["step"] for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_the_log_of_a_run_that_goes_on_in_another_folder_is_whole(tmp_path, monkeypatch, caplog):
    """A checkpoint holds but the last entries: curves and gains would begin in the middle."""
    monkeypatch.setattr(metrics_log, "LOG_ENTRIES", 3)
    first, other = tmp_path / "first", tmp_path / "other"
    first.mkdir()
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 8)]  # beyond the checkpoint, too
    (first / METRICS_FILE).write_text("".join(lines))
    checkpoint = str(first / "checkpoint-5")
    with caplog.at_level(logging.WARNING):
        assert begun(other, [3, 4, 5], checkpoint) == [1, 2, 3, 4, 5] == begun(first, [3, 4, 5], checkpoint)
        assert begun(tmp_path / "new", []) == []
    assert not caplog.records
    (first / METRICS_FILE).unlink()
    assert begun(tmp_path / "moved", [3, 4, 5], checkpoint) == [3, 4, 5]
    assert "the log of this run begins at step 3" in caplog.text


def test_the_time_of_a_run_is_that_of_all_its_starts(tmp_path):
    first = RunClock()
    first.before = 3600.0  # as after an hour
    first.save(tmp_path)
    later = RunClock(str(tmp_path))
    assert 3600 <= later.before == json.loads((tmp_path / CLOCK_FILE).read_text())["seconds"] <= later.seconds < 3700
    (tmp_path / CLOCK_FILE).unlink()  # a checkpoint of an earlier version
    assert RunClock(str(tmp_path)).before == RunClock().before == 0.0
