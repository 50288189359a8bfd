"""The benchmark of replay: what its variants and controls generate, what it counts, and that it goes on where it was stopped."""

import importlib
import json
import math
import statistics
from pathlib import Path

import pytest

from maple_trl.data import load_seven_tags


pytestmark = pytest.mark.slow


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = "--steps 2 --every 1 --rows 8 --prompts 2 --questions 1 --samples 2 --hard-targets 0.2 --held-out-targets 0.9".split()
CONTROLS = ["GRPO", "GRPO, G = 4", "replay", "replay, alpha 0"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("sample_efficiency")
    rows = load_seven_tags()["train"]
    monkeypatch.setattr(
        module, "split_by_difficulty", lambda args: (rows.select(range(4)), rows.select(range(60, 64)))
    )
    return module


def test_variants_are_compared_and_kept(benchmark, tmp_path, monkeypatch, capsys):
    file, runs = tmp_path / "result.json", tmp_path / "runs"
    words = [*TINY, "--json", str(file), "--runs", str(runs), "--seeds", "1", "--only", *CONTROLS]
    benchmark.main(words)
    result = json.loads(file.read_text())
    points = {name: result["runs"][name][0]["points"] for name in CONTROLS}
    # Two prompts a step; with replay the second step generates half of each group.
    assert [points[name][-1]["generated"] for name in CONTROLS] == [32, 16, 24, 24]
    assert all([point["step"] for point in found] == [0, 1, 2] for found in points.values())
    assert all(found[2]["cpu_seconds"] > found[1]["cpu_seconds"] > 0 for found in points.values())
    first = {name: {k: v for k, v in found[0].items() if k != "cpu_seconds"} for name, found in points.items()}
    assert len({json.dumps(point) for point in first.values()}) == 1  # all begin from the same model
    assert {"hard", "hard_error", "held_out", "held_out_error"} <= points["GRPO"][0].keys()
    shown = capsys.readouterr().out
    assert "(evaluation ± " in shown and "paper, completions to its target" in shown
    # Again: nothing is trained, and more variants add to what is there.
    monkeypatch.setattr(benchmark, "run_variant", lambda *_: pytest.fail("the run was finished"))
    file.unlink()
    benchmark.main(words)
    assert json.loads(file.read_text())["runs"] == result["runs"]
    with pytest.raises(pytest.fail.Exception, match="was finished"):
        benchmark.main([*words[:-4], "TAS"])
    assert len(list(runs.iterdir())) == 4


def test_each_setting_has_runs_of_its_own(benchmark, tmp_path):
    def file(options, seed=0, **changes):
        values = dict.fromkeys(benchmark.DECIDING, 1) | changes
        return benchmark.run_file(str(tmp_path), options, type("Args", (), values)(), seed)

    replay = benchmark.REPLAY
    others = [
        file(replay, seed=1),
        file(replay | {"replay_alpha": 0.0}),
        file(replay, prompts=2),
        file(benchmark.GRPO),
    ]
    assert len({file(replay), *others}) == 5
    assert file(replay) == file(replay | {"replay_alpha": 1.0})  # its default


def test_the_standard_errors(benchmark):
    values = [0.0, 0.5, 1.0, 0.5]
    mean, error = benchmark.mean_and_error(values)
    assert (mean, error) == (0.5, pytest.approx(statistics.stdev(values) / 2))
    assert math.isnan(benchmark.mean_and_error([1.0])[1])
    entry = benchmark.entry([100.0, None, 300.0])
    assert (entry["reached"], entry["mean"], entry["error"]) == (2, 200.0, pytest.approx(100.0))
    assert benchmark.cell(entry) == "200 ± 100 (2 of 3)"
    points = [{"hard": v, "generated": i} for i, v in enumerate([0.0, 0.5, 0.1, 0.5, 0.5])]
    assert (
        benchmark.reached(points, "hard", 0.4, "generated") == 4
        and benchmark.reached(points, "hard", 0.6, "step") is None
    )
