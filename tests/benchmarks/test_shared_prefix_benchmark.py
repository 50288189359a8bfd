"""The benchmark of shared prompts at sizes far too small to measure anything: both sides agree, what it counts adds up."""

import argparse
import importlib
import json
import os
from functools import partial
from pathlib import Path

import programs
import pytest
import torch

from maple_trl.planning.sizes import generation_work, plain_work, shared_work


pytestmark = pytest.mark.slow


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROMPT, COMPLETIONS, GENERATIONS, REPEATS = 256, (4, 6), 3, 2
MODEL = {"hidden": 48, "layers": 2, "heads": 2, "kv-heads": 1, "vocab": 512, "tower": 32, "tower-layers": 2}
OPTIONS = [text for name, value in MODEL.items() for text in (f"--{name}", str(value))]
OPTIONS += ["--generations", str(GENERATIONS), "--repeats", str(REPEATS), "--prompt", str(PROMPT)]
OPTIONS += ["--completions", *map(str, COMPLETIONS)]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "shared_prefix.json"
    return run(file, *OPTIONS)


def run(file, *options):
    command = [str(BENCHMARKS / "shared_prefix.py"), "--json", str(file), *options]
    done = programs.run(command)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text(encoding="utf-8")), done.stdout


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # Undone afterwards: the benchmark decides for its whole process which tokens the head reads.
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)
    module = importlib.import_module("shared_prefix")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.mark.long
def test_the_headline_is_the_smallest_of_the_details(benchmark):
    result, output = benchmark
    assert list(result)[:4] == ["share_of_bound", "step_speedup_4", "step_speedup_6", "train_memory_ratio"]
    passes = result["passes"][str(PROMPT)]
    entries = [e for name in ("train", "log_probs") for at in passes[name].values() for e in at["against"].values()]
    # Two passes, two lengths, two baselines, two ways of ours.
    assert len(entries) == 16 and result["share_of_bound"] == min(entry["share_of_bound"] for entry in entries)
    for length in COMPLETIONS:
        against = result["steps"][str(length)]["against"]
        assert against.keys() == {"trl/shared", "rows/shared"}
        assert result[f"step_speedup_{length}"] == min(entry["speedup"] for entry in against.values())
    ratios = [r for at in result["memory"][str(PROMPT)].values() for r in at["ratio"].values()]
    assert len(ratios) == 8 and result["train_memory_ratio"] == min(ratios)
    assert result["machine"]["threads"] == 1 and result["machine"]["cores"] == os.cpu_count()
    assert "share_of_bound: " in output and "whole step" in output


@pytest.mark.long
def test_figures_follow_from_the_times_and_the_operations(benchmark):
    passes = benchmark[0]["passes"][str(PROMPT)]
    for name in ("train", "log_probs", "generate"):
        for length in COMPLETIONS:
            part = passes[name][str(length)]
            for pair, entry in part["against"].items():
                slow, fast = pair.split("/")
                medians = [part["seconds"][side]["cpu"]["median"] for side in (slow, fast)]
                assert entry["speedup"] == pytest.approx(medians[0] / medians[1])
                assert entry["bound"] == pytest.approx(part["operations"][slow] / part["operations"][fast])
                assert entry["share_of_bound"] == pytest.approx(entry["speedup"] / entry["bound"])
            for side in part["seconds"].values():
                assert (
                    side["cpu"]["n"] == REPEATS and side["cpu"]["p10"] <= side["cpu"]["median"] <= side["cpu"]["p90"]
                )


def test_both_sides_computed_the_same(benchmark):
    result, _ = benchmark
    for agreement in result["passes"][str(PROMPT)]["agreement"].values():
        for side in ("rows", "shared", "cached"):
            assert agreement[side]["gradient"] < 1e-5 and agreement[side]["log_probs"] < 1e-4
            assert agreement[side]["same_tokens"] == 1
    for step in result["steps"].values():
        assert all(report["same_tokens"] and report["gradient"] < 1e-4 for report in step["agreement"].values())


def test_operations_are_those_that_pytorch_counts(benchmark):
    counted = benchmark[0]["operations_counted_by_torch"]
    assert counted.keys() == {"trl", "rows", "shared"}
    assert all(ratio == pytest.approx(1.0, abs=0.005) for ratio in counted.values())


@pytest.mark.long
def test_the_way_of_the_real_sizes(script, monkeypatch):
    """Half precision and gradient checkpointing in train mode, which generation in its midst must not meet."""
    make_config = script.sizes.make_config
    small = lambda args: make_config(argparse.Namespace(**vars(args) | {"real": False}))  # noqa: E731
    monkeypatch.setattr(script.sizes, "make_config", small)
    args = script.parse_args([*OPTIONS, "--layers", "1", "--completions", "4", "--repeats", "1", "--checkpointing"])
    args.real = True
    passes = script.measure_passes(args, PROMPT)
    assert passes["agreement"]["4"]["tolerance"] == script.TOLERANCE["bfloat16"]
    assert passes["generate"]["4"]["seconds"].keys() == {"trl", "rows", "shared", "cached"}
    group = script.passes.Group.make(args, PROMPT, 4, GENERATIONS)
    assert group.model.training and script.passes.generate(group, "shared").shape == (GENERATIONS, 4)
    assert group.model.training and group.model.is_gradient_checkpointing


def test_media_pass_the_towers_as_often_as_the_sides_say(script, tmp_path):
    args = script.parse_args([*OPTIONS, "--completions", "4"])
    script.steps.save_model(args, tmp_path / "model")
    patches = {}
    for side in script.steps.SIDES:
        trainer = script.steps.make_trainer(side, args, PROMPT, 4, GENERATIONS, tmp_path)
        counted = patches[side] = []
        for model in (trainer.model, trainer.ref_model):
            visual = trainer.family.core(model).visual
            visual.register_forward_pre_hook(lambda m, inputs, counted=counted: counted.append(len(inputs[0])))
        trainer._agree_on_sharing()
        counted.clear()
        script.steps.step(trainer, seed=0)
    own = len(trainer.prompt.media["video"]["pixel_values_videos"])
    # Rollout, reference and loss for each row, or once for all.
    assert patches == {"trl": [GENERATIONS * own] * 3, "rows": [own], "shared": [own]}


def test_completions_are_sampled_beside_gradient_checkpointing(script):
    """As with `--real`, whose model is in training mode, in which checkpointed layers keep no keys and values."""
    args = script.parse_args([*OPTIONS, "--checkpointing", "--completions", "4"])
    group = script.passes.Group.make(args, PROMPT, 4, GENERATIONS)
    sampled = [script.passes.PASSES["generate"](group, side) for side in script.passes.SIDES]
    assert sampled[0].shape == (GENERATIONS, 4) and all(torch.equal(sampled[0], other) for other in sampled[1:])
    assert group.model.training


def test_bound_of_the_usual_sizes():
    """By hand: P 1024, G 8. A pass over tokens alone saves G (P + R) / (P + G R); attention and head change it."""
    plain, shared = plain_work(1024, 64, 8), shared_work(1024, 64, 8)
    assert plain.tokens / shared.tokens == pytest.approx(8 * 1088 / 1536)
    assert plain.head == shared.head == 8 * 64
    assert plain.pairs == 8 * 1088**2 / 2
    assert shared.pairs == 1024**2 / 2 + 8 * (64 * 1024 + 64**2 / 2)
    # The first token comes with the prompt, so decoding passes one less; the last is never passed.
    assert generation_work(1024, 64, 8, True).tokens == 1024 + 8 * 63


@pytest.mark.long
def test_sweeps_are_drawn(tmp_path):
    plot = tmp_path / "sweep.png"
    result, _ = run(
        tmp_path / "sweep.json", *OPTIONS, "--completions", "4", "--sweep", "prompt", "group", "--plot", str(plot),
        "--repeats", "1", "--layers", "1", "--sweep-prompts", "128", "256", "--sweep-groups", "2", "3",
    )  # fmt: skip
    assert [(point["prompt"], point["generations"]) for point in result["sweeps"]["prompt"]] == [(128, 3), (256, 3)]
    assert [(point["prompt"], point["generations"]) for point in result["sweeps"]["group"]] == [(256, 2), (256, 3)]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "1000"], "--prompt must be a multiple of 128, got 1000"),
        (["--generations", "1"], "must be at least 2"),
        (["--repeats", "0"], "must be at least 1"),
        (["--plot", "a.png"], "add --sweep"),
        (["--real"], "--real needs --device cuda"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(script, options, words, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(options)
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--device", "cuda", "--real"])
    assert "PyTorch finds no GPU here" in capsys.readouterr().err


def test_the_check_catches_wrong_positions(script, monkeypatch):
    """The negative control of the agreement: completions go on one place too far."""
    pack = script.passes.pack

    def shifted(rows, completion_ids, lengths):
        batch = pack(rows, completion_ids, lengths)
        batch.position_ids[..., batch.suffix] += 1
        return batch

    monkeypatch.setattr(script.passes, "pack", shifted)
    args = script.parse_args([*OPTIONS, "--parts", "passes"])
    with pytest.raises(AssertionError, match="shared and trl differ"):
        script.run(args)


@pytest.mark.parametrize("layers", [12, pytest.param(24, marks=pytest.mark.long)])
def test_rounding_in_deep_models_is_not_taken_for_a_fault(layers, script):
    """With weights as small as those that Qwen's models begin with, a position more or less is lost in bfloat16."""
    import _shared_prefix_model as sizes
    from omni_runs import sharing_error
    from trl.trainer.utils import add_fused_lm_head

    from maple_trl.omni.prefix.packed_attention import install
    from maple_trl.omni.serving import serve_media

    deep = ["--layers", str(layers), "--hidden", "96", "--heads", "2", "--kv-heads", "1"]
    for seed in range(3):
        args = script.parse_args([*OPTIONS, *deep, "--seed", str(seed)])
        model, family = sizes.make_model(args)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(0.02 / parameter.std())
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        assert install(model)
        prompt = sizes.make_prompt(model.base_model, family, 256, seed)
        error = sharing_error(model.bfloat16(), family.core(model), prompt, partial(serve_media, family))
        assert 0.01 < error <= 0.7, (seed, error)
