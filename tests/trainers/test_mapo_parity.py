"""With one tag, neutral weights and advantages per group the MAPO trainer is TRL's GRPO trainer, step for step."""

import pytest
import torch
from test_grpo_parity import build, dataset, run
from trl import GRPOConfig, GRPOTrainer

from maple_trl import MAPOConfig, MAPOTrainer
from maple_trl.omni.families import family_for


pytestmark = pytest.mark.slow


# Completions of different lengths, so that the three ways to average them differ; the same LM head in both trainers.
# Adam divides by the size of a gradient: by default it makes whole steps of what rounding leaves of one that is zero.
COMMON = {"max_completion_length": 12, "cast_lm_head_to_fp32": True, "adam_epsilon": 1e-4, "max_grad_norm": 1e3}
NEUTRAL = {"advantage_scope": "group"}
TWICE = {"num_iterations": 2, "epsilon_high": 0.3}
WIDE = {"epsilon": 0.6, "epsilon_high": 2.0}  # else the ratios of a whole step may all be clipped, and nothing is left
FOUR_STEPS = {"steps_per_generation": 4, "num_iterations": 2}  # two optimizer steps on each pass over a rollout

# Options of both trainers, those of MAPO alone, and TRL's loss.
CASES = {
    "token": ({}, {"loss_aggregation": "token"}, "dapo"),
    "sample": ({}, {"loss_aggregation": "sample"}, "grpo"),
    "prompt": ({}, {"loss_aggregation": "prompt"}, "dr_grpo"),
    "token, two iterations": (TWICE, {"loss_aggregation": "token"}, "dapo"),
    "sample, several steps per rollout": (FOUR_STEPS, {"loss_aggregation": "sample"}, "grpo"),
    "prompt, several steps per rollout": (FOUR_STEPS | WIDE, {"loss_aggregation": "prompt"}, "dr_grpo"),
    "token, reference model": (TWICE | {"beta": 0.1}, {"loss_aggregation": "token"}, "dapo"),
    "cispo": (TWICE | {"epsilon_high": 1.1}, {"loss_aggregation": "token", "loss_type": "cispo"}, "cispo"),
    "sapo": (FOUR_STEPS, {"loss_aggregation": "sample", "loss_type": "sapo"}, "sapo"),
    "vespo": (TWICE, {"loss_aggregation": "token", "loss_type": "vespo"}, "vespo"),
    "sequence ratios": (
        TWICE | WIDE | {"importance_sampling_level": "sequence"},
        {"loss_aggregation": "sample"},
        "grpo",
    ),
    "high-entropy tokens": ({"top_entropy_quantile": 0.5}, {"loss_aggregation": "token"}, "dapo"),
    "mixed batches, one stratum": (
        {},
        {"loss_aggregation": "sample", "batching": "mixed", "loss_strata": "batch"},
        "grpo",
    ),
    "the baseline": ({}, {"loss_aggregation": "token", "method": "mupo"}, "dapo"),
}


SUBTITLE = "the red square is low"


def rows_for_trl(kind, rows):
    data = dataset(conversational=kind != "text").select(range(rows))
    if kind == "text":
        return data

    def read_out(row):
        (message,) = row["prompt"]
        return {"prompt": [message | {"content": f"Subtitles:\n{SUBTITLE}\n{message['content']}"}]}

    return data.map(read_out)


def rows_for_mapo(kind, rows):
    """The same prompts; an omni model gets the subtitle from its column."""
    data = dataset(conversational=kind != "text").select(range(rows)).add_column("tag", ["S"] * rows)
    return data if kind == "text" else data.add_column("subtitle", [SUBTITLE] * rows)


def run_trl(kind, folder, loss_type, rows=8, **options):
    model, processing_class = build(kind, folder)
    if kind != "text":  # TRL keeps only image tokens out of completions; ours keeps all media tokens out
        options["generation_kwargs"] = {"suppress_tokens": family_for(model, processing_class).suppressed_ids}
        if not hasattr(model.model, "embed_tokens"):  # where TRL looks for it to keep the LM head in float32
            vars(model.model)["embed_tokens"] = model.get_input_embeddings()
    options = COMMON | {"loss_type": loss_type} | options
    return run(GRPOTrainer, GRPOConfig, model, processing_class, folder / "trl", rows_for_trl(kind, rows), **options)


def run_mapo(kind, folder, rows=8, **options):
    model, processing_class = build(kind, folder)
    options = COMMON | NEUTRAL | options
    return run(MAPOTrainer, MAPOConfig, model, processing_class, folder / "mapo", rows_for_mapo(kind, rows), **options)


def worst(expected, found):
    """The largest difference between two lists of gradients, relative to the largest value of the tensor."""
    errors = [0.0]
    for theirs, mine in zip(expected, found, strict=True):
        assert theirs.keys() == mine.keys()
        floor = 1e-4 * max(float(value.abs().max()) for value in theirs.values())
        for name, value in theirs.items():
            errors.append(float((mine[name] - value).abs().max() / max(float(value.abs().max()), floor)))
    return max(errors)


def check_equal(expected, found):
    assert len(expected[0]) == len(found[0]) == 3
    for theirs, mine in zip(expected[0], found[0], strict=True):
        for name in ("loss", "grad_norm", "reward", "reward_std", "entropy", "kl", "completions/mean_length"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert worst(expected[1], found[1]) < 1e-4
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert min(entry["grad_norm"] for entry in expected[0]) > 1e-3
    assert expected[0][0]["completions/min_length"] < expected[0][0]["completions/max_length"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.matrix(cases=3)
def test_one_tag_is_grpo_on_a_text_model(name, tmp_path):
    both, ours, loss_type = CASES[name]
    expected = run_trl("text", tmp_path, loss_type, **both)
    check_equal(expected, run_mapo("text", tmp_path, **both, **ours))


@pytest.mark.parametrize("name", ["sample, several steps per rollout", "token, reference model"])
@pytest.mark.matrix(cases=1)
def test_one_tag_is_grpo_on_an_omni_model(name, tmp_path):
    both, ours, loss_type = CASES[name]
    expected = run_trl("qwen2_5_omni", tmp_path, loss_type, **both)
    check_equal(expected, run_mapo("qwen2_5_omni", tmp_path, **both, **ours))


@pytest.mark.parametrize("rows", [2, 4])  # an epoch of one step, and of two
@pytest.mark.parametrize("curriculum", ["none", "adaptive"])
@pytest.mark.matrix(cases=2)
def test_prompts_come_in_the_order_of_trl_in_every_epoch(rows, curriculum, tmp_path):
    expected = run_trl("text", tmp_path, "grpo", rows=rows)
    options = {"curriculum": curriculum, "zero_shot_accuracy": {"S": 0.5} if curriculum == "adaptive" else None}
    check_equal(expected, run_mapo("text", tmp_path, rows=rows, **options))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_trl("text", tmp_path_factory.mktemp("plain"), "grpo")


@pytest.mark.parametrize(
    "options",
    [
        {"advantage_scope": "tag"},
        {"advantage_scope": "tag_whitened"},
        {"advantage_scope": "batch"},
        {"loss_aggregation": "token"},
        {"loss_aggregation": "prompt"},
        {"tag_weights": "adaptive"},
        {"shuffle_dataset": False},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
@pytest.mark.matrix(cases=2)
def test_anything_else_is_told_apart(plain, options, tmp_path):
    """The negative control: what the comparison must notice."""
    assert worst(plain[1], run_mapo("text", tmp_path, **options)[1]) > 1e-2
