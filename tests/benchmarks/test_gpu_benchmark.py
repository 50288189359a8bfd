"""The measurements for a GPU run on a CPU too, at sizes that measure nothing: every part, on the sides that a CPU has."""

import gc
import importlib
import json
from pathlib import Path

import pytest
import torch


pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run it there")]


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PARTS = ["attention/256/equal", "attention/256/ragged", "passes/256", "generation/256", "kernels/256", "step/256"]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        # Undone afterwards: it decides for its whole process which tokens the head reads.
        from trl.trainer import utils

        patch.setattr(utils, "_use_triton", utils._use_triton)
        threads = torch.get_num_threads()
        yield importlib.import_module("gpu")
        torch.set_num_threads(threads)


def run(script, file, *options):
    status = script.main(["--device", "cpu", "--small", "--json", str(file), *options])
    return status, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.long
def test_every_part_runs_and_says_that_it_means_nothing(script, tmp_path, capsys):
    status, result = run(script, tmp_path / "gpu.json")
    parts = result["parts"]
    assert status == 0 and list(parts) == PARTS
    assert all("failed" not in part and "skipped" not in part for part in parts.values())
    assert result["says_something_about_gpus"] is False
    output = capsys.readouterr().out
    assert output.count("say nothing about a GPU") == 2
    # Both ways of computing a packed row's attention are right, and the merged one launches no more for ragged groups.
    for kind in ("equal", "ragged"):
        part = parts[f"attention/256/{kind}"]
        assert part["log_probs"].keys() == {"rows", "merged", "masked"} and max(part["error"].values()) < 1e-6
        assert part["launches"]["merged"] > 0
    passes = parts["passes/256"]
    assert passes["agreement"]["log_probs_max"] < 1e-5 and passes["agreement"]["gradient"] < 1e-5
    for entry in (passes["train"]["shared"], passes["log_probs"]["cached"], parts["step/256"]["shared"]):
        assert entry["share_of_bound"] == pytest.approx(entry["speedup"] / entry["bound"])
        assert entry["tflop_per_s"] == pytest.approx(entry["tflop"] / entry["seconds"]["median"])
        assert entry["share_of_peak"] == pytest.approx(entry["tflop_per_s"] / 790)
    assert parts["generation/256"]["whole"]["shared"]["tokens_per_s"] > 0
    kernels = parts["kernels/256"]
    assert kernels["train/cached"]["operations"] < kernels["train/shared"]["operations"]
    assert parts["step/256"]["comparing_both_ways_s"] > 0
    for label in ("attention/256/ragged/train/merged", "passes/256/train/shared", "step/256/shared"):
        assert f"\n{label} " in output


def test_a_part_that_fails_costs_no_other(script, tmp_path, monkeypatch):
    """It is in the file with its reason, and in the status; so is a side."""
    kept = []

    def fails(args, prompt, ragged, turns):
        kept.append(json.loads((tmp_path / "gpu.json").read_text())["parts"])
        if ragged:
            raise RuntimeError("no such kernel")
        sides = {"rows": lambda: None, "flex": lambda: 1 / 0}
        return {"train": script.against(args, turns.measure(sides), {})}

    monkeypatch.setattr(script, "measure_attention", fails)
    status, result = run(script, tmp_path / "gpu.json", "--parts", "attention", "--prompts", "128", "256")
    assert status == 1 and [list(parts) for parts in kept] == [list(result["parts"])[:n] for n in range(4)]
    for prompt in (128, 256):
        equal, ragged = (result["parts"][f"attention/{prompt}/{kind}"] for kind in ("equal", "ragged"))
        assert ragged["failed"] == "RuntimeError: no such kernel" and "in fails" in ragged["traceback"]
        assert equal["train"]["flex"] == {"failed": "ZeroDivisionError: division by zero"}
        assert "seconds" in equal["train"]["rows"]


def test_nothing_begins_past_the_deadline(script, tmp_path):
    status, result = run(script, tmp_path / "gpu.json", "--deadline", "-1")
    assert status == 0 and list(result["parts"]) == PARTS
    assert all(part["skipped"].endswith("past --deadline -1") for part in result["parts"].values())


def test_a_part_makes_no_round_past_its_time(script):
    gc.freeze()  # else each turn looks at all that other tests have imported
    args = script.parse_args(["--device", "cpu", "--small", "--repeats", "5", "--part-seconds", "0"])
    assert script.Turns(args).measure({"rows": lambda: None})["rows"]["seconds"]["n"] == 1
    args.part_seconds = 60
    assert script.Turns(args).measure({"rows": lambda: None})["rows"]["seconds"]["n"] == 5
    gc.unfreeze()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cuda"], "PyTorch finds no GPU here"),
        (["--prompts", "1000"], "--prompts must be multiples of 128, got 1000"),
        (["--generations", "1"], "--generations must be at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(script, options, words, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(options)
    assert words in capsys.readouterr().err
