"""A run's memory does not grow: clips, rollouts, replay, evaluations, checkpoints; and what does grow is found."""

import json
import sys
from pathlib import Path

import programs
import pytest


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def memory():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import _memory

        yield _memory
    finally:
        sys.path.remove(str(BENCHMARKS))


def samples(of, steps=range(0, 200, 10)):
    return [(step, {"rss": float(of(step)), "files": 11.0}) for step in steps]


def test_trends_tell_growth_from_noise(memory):
    def wave(step):
        return 7e8 + 1e6 * (step % 30 == 0)  # an allocator gives back late

    found = memory.trends(samples(wave))
    assert found["rss"].flat and not found["rss"].grows and found["files"].flat
    jump = memory.trends(samples(lambda step: wave(step) + 64e6 * (step > 100)))["rss"]
    assert not jump.flat  # once: neither noise nor sure growth
    slow = memory.trends(samples(lambda step: wave(step) + 20_000 * step))["rss"]
    assert slow.grows and slow.low <= slow.slope <= slow.high and abs(slow.slope - 20_000) < 2_000
    longer = range(0, 2000, 100)
    assert memory.trends(samples(lambda step: wave(step) + 2_000 * step, longer))["rss"].grows  # more steps see more
    assert memory.trends(samples(lambda step: wave(step) + 2_000 * step))["rss"].flat
    assert memory.trends(samples(wave), {"rss": 0.0})["rss"].allowed == 0
    with pytest.raises(ValueError, match="a trend needs at least 5 samples, got 2"):
        memory.trends(samples(wave, [0, 10]))
    told = memory.verdict(memory.trends(samples(lambda step: 20_000 * step)))
    assert (
        told["grows"] == ["rss"]
        and told["unsure"] == []
        and "grows" in memory.table(memory.trends(samples(lambda s: 20_000 * s)))
    )


def test_a_process_is_measured(memory, tmp_path):
    import torch

    before = memory.measure()
    kept = [torch.ones(1 << 18) for _ in range(20)], open(tmp_path / "file", "w"), [float(i) for i in range(10_000)]
    after = memory.measure()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["tensors"] == 20 and grown["files"] == 1 and grown["blocks"] > 10_000
    assert grown["rss"] > 15 << 20 and grown["threads"] == grown["prompts"] == grown["children"] == 0
    kept[1].close()
    del kept
    assert memory.measure()["rss"] - before["rss"] < 5 << 20


@pytest.mark.slow
@pytest.mark.parametrize("steps, warm_up", [(110, 30), pytest.param(200, 50, marks=pytest.mark.long)])
@pytest.mark.long
def test_nothing_grows_in_a_run_and_a_planted_leak_is_found(steps, warm_up, tmp_path):
    """Both in one run: the leak begins in its middle."""
    file = tmp_path / "leak.json"
    command = [str(BENCHMARKS / "memory_leak.py"), "--steps", str(steps), "--warm-up", str(warm_up)]
    command += ["--plant", "prompts", "--json", str(file)]
    done = programs.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["before"]["grows"] == [], done.stdout
    for name in ("prompts", "files", "threads", "children", "shared"):
        trend = found["before"]["trends"][name]
        assert trend["high"] <= trend["allowed"], (name, done.stdout)
    assert {"rss", "tensors", "prompts"} <= set(found["planted"]["grows"])
    assert found["planted"]["trends"]["prompts"]["slope"] == pytest.approx(1, abs=0.1)
    assert found["memory"]["memory/host_evictions"] > steps / 2  # clips came and went
