"""The benchmarks run, at sizes far too small to measure anything: what they compare is equal, what they count adds up."""

import importlib
import json
import os
from pathlib import Path

import programs
import pytest


pytestmark = pytest.mark.slow


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GROUPS, GENERATIONS, REPEATS = 2, 3, 2
TINY = {
    "groups": GROUPS,
    "generations": GENERATIONS,
    "repeats": REPEATS,
    "frames": 2,
    "side": 56,
    "seconds": 0.5,
    "clip-side": 64,
    "completion-tokens": 4,
    "hidden": 64,
    "layers": 2,
    "tower": 48,
    "tower-layers": 1,
    "seed": 5,
}


OPTIONS = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def step_time(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "step_time.json"
    command = [str(BENCHMARKS / "step_time.py"), "--json", str(file), *OPTIONS]
    done = programs.run(command)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text(encoding="utf-8")), done.stdout


@pytest.mark.long
def test_step_time_says_what_ran_where(step_time):
    result, _ = step_time
    assert result["benchmark"] == "step_time" and result["seed"] == TINY["seed"]
    assert {"python", "torch", "transformers", "trl", "av"} <= result["versions"].keys()
    assert result["machine"]["cores"] == os.cpu_count() and result["machine"]["threads"] == 1
    assert {name.replace("-", "_"): value for name, value in TINY.items()}.items() <= result["options"].items()
    assert result["sizes"]["rows"] == GROUPS * GENERATIONS and result["sizes"]["prompts"] == GROUPS
    # Two frames of 56 x 56 pixels: one step in time, 2 x 2 tokens of 28 x 28. Half a second at 25 tokens a second.
    assert [tokens["video"] for tokens in result["sizes"]["media_tokens"]] == [4] * GROUPS
    assert [tokens["audio"] for tokens in result["sizes"]["media_tokens"]] == pytest.approx([12.5] * GROUPS, abs=1)


@pytest.mark.long
def test_step_time_sides_compute_the_same(step_time):
    agreement = step_time[0]["agreement"]
    assert agreement["same_completions"]
    assert agreement["loss_naive"] == pytest.approx(agreement["loss_ours"], rel=1e-4)
    assert agreement["loss_naive"] != 0.0
    assert agreement["gradient_relative_difference"] <= 1e-4
    assert agreement["gradient_norm_vision"] > 0 and agreement["gradient_norm_audio"] > 0


def test_step_time_compares_where_clips_are_decoded(step_time):
    result, printed = step_time
    places = result["places"]
    assert places["batches"] == 3 and places["workers"] == 2 and "decoding in threads / in processes" in printed
    for clock in ("wall", "cpu"):
        samples = places[clock]["samples"]
        assert [len(samples[name]) for name in ("threads", "processes")] == [REPEATS] * 2
        assert all(second > 0 for values in samples.values() for second in values) and places[clock]["ratio"] > 0


def test_step_time_naive_does_the_work_of_every_row_and_ours_of_every_prompt(step_time):
    naive, ours = (step_time[0]["counts"][side] for side in ("naive", "ours"))
    assert naive["video decodes"] == naive["audio decodes"] == GROUPS * GENERATIONS
    assert ours["video decodes"] == ours["audio decodes"] == GROUPS
    # Rollout, reference and loss: three passes of 16 patches (4 tokens of 2 x 2 patches) for each clip.
    assert naive["vision patches through the tower"] == 3 * 16 * GROUPS * GENERATIONS
    assert ours["vision patches through the tower"] == 3 * 16 * GROUPS


def test_step_time_reports_every_phase_with_spread(step_time):
    result, output = step_time
    for clock in ("wall", "cpu"):
        phases = result["seconds"][clock]
        for name, phase in phases.items():
            for side in ("naive", "ours"):
                cell, samples = phase[side], [x[clock][name] for x in result["samples"][side]]
                assert cell["n"] == len(samples) == REPEATS
                assert min(samples) <= cell["p10"] <= cell["median"] <= cell["p90"] <= max(samples)
        for side in ("naive", "ours"):
            for sample in result["samples"][side]:
                parts = {name: seconds for name, seconds in sample[clock].items() if name != "total"}
                assert sum(parts.values()) == pytest.approx(sample[clock]["total"])
                assert min(parts.values()) >= 0
        assert {"decode_encode", "prefill", "sampling", "logprobs", "loss", "backward", "total"} <= phases.keys()
        total = phases["total"]
        assert result["ratio"][clock] == pytest.approx(total["naive"]["median"] / total["ours"]["median"])
    assert "naive/ours" in output and "whole step" in output


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("step_time")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--generations", "1"], "--generations must be at least 2"),
        (["--side", "100"], "--side must be a multiple of 28"),
        (["--beta", "0"], "--beta must be positive"),
        (["--repeats", "0"], "--repeats must be at least 1"),
    ],
)
def test_step_time_refuses_sizes_that_mean_nothing(script, options, words, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(options)
    assert words in capsys.readouterr().err


def test_step_time_check_catches_a_side_that_computes_something_else(script, monkeypatch, tmp_path):
    """The negative control of the agreement: one side is shown darker frames."""
    build = script.build_trainer

    def darkened(side, *args, **kwargs):
        trainer = build(side, *args, **kwargs)
        if side == "ours":
            encode = trainer.prompt_builder.encode

            def dark(row):
                prompt = encode(row)
                prompt.media["video"]["pixel_values_videos"] *= 0.9
                return prompt

            trainer.prompt_builder.encode = dark
        return trainer

    monkeypatch.setattr(script, "build_trainer", darkened)
    with pytest.raises(AssertionError, match="differ"):
        script.run(script.parse_args(OPTIONS), tmp_path)


def run_benchmark(name, folder, *options):
    file = folder / f"{name}.json"
    command = [str(BENCHMARKS / f"{name}.py"), "--json", str(file), *options]
    done = programs.run(command)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text()), done.stdout


@pytest.mark.long
def test_mapo_bookkeeping_is_measured(tmp_path):
    result, output = run_benchmark("mapo_bookkeeping", tmp_path, "--steps", "4", "--pair-steps", "1", "--pairs", "2")
    assert result["share"]["n"] == 3 and 0 < result["share"]["median"] < 1
    assert result["pairs_cpu_time"]["n"] == 2
    assert "share of a step" in output


def test_replay_buffer_is_measured(tmp_path):
    result, output = run_benchmark("replay_buffer", tmp_path, "--capacity", "300", "--tokens", "16", "--repeats", "3")
    assert {"make", "add", "sample", "retier"} <= result["milliseconds"].keys()
    assert all(values["wall"]["median"] > 0 for values in result["milliseconds"].values())
    assert result["tensor_bytes"] == 300 * 16 * 8  # int32 tokens and float32 log-probabilities
    assert "300 experiences of 16 tokens" in output


@pytest.mark.long
def test_tables_are_converted_and_validated(tmp_path):
    result, output = run_benchmark("data_tables", tmp_path, "--rows", "100")
    assert [size["rows"] for size in result["sizes"]] == [20, 100] and "100 rows" in output
    assert all(size["cpu_seconds"] > 0 and size["shards"] == 1 for size in result["sizes"])


# Decoding steps


@pytest.fixture(scope="module")
def decode_steps(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "decode_steps.json"
    sizes = ["--prompt", "128", "--tokens", "4", "--generations", "2", "--layers", "2", "--tower-layers", "2"]
    done = programs.run([str(BENCHMARKS / "decode_steps.py"), "--json", str(file), *sizes])
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text(encoding="utf-8")), done.stdout


@pytest.mark.parametrize("side", ["rows", "shared", "cached"])
def test_a_decoding_step_asks_for_what_transformers_asks_for(decode_steps, side):
    result, printed = decode_steps
    before, now = (result[way][side]["decoding_step"] for way in ("before", "now"))
    # Whether placeholders of pictures, video and sound are among the tokens: compared, reduced, asked for.
    assert (before["waits"], now["waits"]) == (4, 1) and list(now["waits_by_line"]) == ["utils.py:__call__"]
    assert before["kernels"] - now["kernels"] == 6 and f"{now['kernels']:.0f}" in printed


def test_known_features_cost_no_look_at_the_weights(decode_steps):
    result, _ = decode_steps
    passes = {way: result[way]["cached"]["log_probs"] for way in ("before", "now")}
    towers = {way: result[way]["shared"]["log_probs"] for way in ("before", "now")}
    assert passes["before"]["kernels"] - passes["now"]["kernels"] > 60  # a kernel for each weight of two towers
    assert passes["now"]["kernels"] < towers["now"]["kernels"] and passes["now"]["waits"] < towers["now"]["waits"]
    assert not any("towers.py" in line for line in passes["now"]["waits_by_line"])


def test_the_head_reads_a_position_of_each_row(decode_steps):
    result, printed = decode_steps
    positions = {
        way: {side: result[way][side]["prefill"]["head_positions"] for side in ("rows", "shared")}
        for way in ("before", "now")
    }
    assert positions == {"before": {"rows": 128, "shared": 1}, "now": {"rows": 1, "shared": 1}}
    assert "128 before, 1 now" in printed
