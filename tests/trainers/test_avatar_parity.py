"""Without replay and without shaping the AVATAR trainer is TRL's GRPO trainer, step for step, and so it is until it can replay."""

import pytest
from test_grpo_parity import CASES, build, dataset, run
from test_mapo_parity import check_equal, worst
from trl import GRPOConfig, GRPOTrainer

from maple_trl import AvatarConfig, AvatarTrainer
from maple_trl.omni.families import family_for


pytestmark = pytest.mark.slow


# Adam divides by the size of a gradient: by default it makes whole steps of what rounding leaves of one that is zero.
STABLE = {"adam_epsilon": 1e-4, "max_grad_norm": 1e3}
NEUTRAL = {"replayed_generations": 0, "tas_lambda": 0.0}
COLD = {"replayed_generations": 2, "tas_lambda": 0.0, "replay_scope": "prompt"}


def run_trl(kind, folder, **options):
    model, processing_class = build(kind, folder)
    if kind != "text":  # TRL keeps only image tokens out of completions; ours keeps all media tokens out
        options["generation_kwargs"] = {"suppress_tokens": family_for(model, processing_class).suppressed_ids}
    data = dataset(conversational=kind != "text")
    return run(GRPOTrainer, GRPOConfig, model, processing_class, folder / "trl", data, **STABLE, **options)


def run_avatar(kind, folder, **options):
    model, processing_class = build(kind, folder)
    data = dataset(conversational=kind != "text")
    options = STABLE | options
    return run(AvatarTrainer, AvatarConfig, model, processing_class, folder / "avatar", data, **options)


def check(expected, found):
    print(f"worst gradient difference {worst(expected[1], found[1]):.2e}")
    check_equal(expected, found)
    # And whatever else TRL reports, but for times, and the clipping of advantages that are zero or what rounding leaves.
    for theirs, mine in zip(expected[0], found[0], strict=True):
        for name in [name for name in theirs if name != "step_time" and not name.startswith("clip_ratio/")]:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6, nan_ok=True), name


def longer(options):
    """Completions of different lengths."""
    return {"max_completion_length": 12} | options


MORE = {
    "token mean, no alpha": ({}, {"replay_alpha": 0.0}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {}),
    "cispo, two iterations": ({"loss_type": "cispo", "num_iterations": 2, "epsilon_high": 1.1}, {}),
    "sapo": ({"loss_type": "sapo", "steps_per_generation": 4, "num_iterations": 2}, {}),
    "luspo, no shaping": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, {}),
    "sequence ratios": ({"importance_sampling_level": "sequence", "num_iterations": 2, "epsilon": 0.6}, {}),
    "rewards scaled by the batch": ({"scale_rewards": "batch"}, {}),
    "reference model, two iterations": ({"beta": 0.1, "num_iterations": 2}, {}),
}
WIDE = {"epsilon": 0.6, "epsilon_high": 2.0}  # else the ratios of a whole step may all be clipped, and nothing is left
BOTH = {name: (options, {}) for name, options in CASES.items()} | MORE
BOTH["several steps per rollout"] = (CASES["several steps per rollout"] | WIDE, {})


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.matrix(cases=3)
def test_no_replay_is_grpo_on_a_text_model(name, tmp_path):
    both, ours = BOTH[name]
    both = longer(both)
    check(run_trl("text", tmp_path, **both), run_avatar("text", tmp_path, **NEUTRAL, **both, **ours))


@pytest.mark.parametrize("name", ["bnpo, reference model", "several steps per rollout", "token mean, no alpha"])
@pytest.mark.matrix(cases=1)
def test_no_replay_is_grpo_on_an_omni_model(name, tmp_path):
    both, ours = BOTH[name]
    both = longer(both)
    check(
        run_trl("qwen2_5_omni", tmp_path, **both),
        run_avatar("qwen2_5_omni", tmp_path, **NEUTRAL, **both, **ours),
    )


# An epoch has eight prompts, and three steps take six of them: none comes twice.
COLD_CASES = {
    "token": {},
    "sample": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "num_iterations": 2, "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo"},
    "two iterations": {"num_iterations": 2, "epsilon_high": 0.3},
    "several steps per rollout": {"loss_type": "grpo", "steps_per_generation": 4, "num_iterations": 2},
    "reference model": {"beta": 0.1},
    "reference model, two iterations": {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2},
    "high-entropy tokens": {"top_entropy_quantile": 0.5},
    "padded to a multiple, no checkpointing": {"pad_to_multiple_of": 8, "gradient_checkpointing": False},
}


@pytest.mark.parametrize("name", COLD_CASES)
@pytest.mark.matrix(cases=3)
def test_an_empty_buffer_is_grpo_on_a_text_model(name, tmp_path):
    both = longer(COLD_CASES[name])
    found = run_avatar("text", tmp_path, **COLD, **both)
    assert all(entry.get("replay/share", 0.0) == 0 for entry in found[0])
    check(run_trl("text", tmp_path, **both), found)


@pytest.mark.parametrize("name", ["reference model", "several steps per rollout"])
@pytest.mark.matrix(cases=1)
def test_an_empty_buffer_is_grpo_on_an_omni_model(name, tmp_path):
    both = longer(COLD_CASES[name])
    check(run_trl("qwen2_5_omni", tmp_path, **both), run_avatar("qwen2_5_omni", tmp_path, **COLD, **both))


# Negative controls: what the comparisons must notice


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_trl("text", tmp_path_factory.mktemp("plain"), max_completion_length=12)


@pytest.mark.matrix(cases=3)
@pytest.mark.parametrize(
    "options",
    [
        NEUTRAL | {"tas_lambda": 0.5},
        NEUTRAL | {"tas_lambda": 0.5, "tas_shape": "inverse_parabolic"},
        NEUTRAL | {"tas_lambda": 0.05},
        COLD | {"tas_lambda": 0.5},
        COLD | {"advantage_scope": "batch"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_anything_else_is_told_apart(plain, options, tmp_path):
    found = run_avatar("text", tmp_path, max_completion_length=12, **options)
    assert worst(plain[1], found[1]) > 1e-2
    with pytest.raises(AssertionError):
        check_equal(plain, found)


def test_a_warm_buffer_is_told_apart(tmp_path):
    """The same prompts in each step: from the second on, half of each group is replayed."""
    folders = tmp_path / "trl", tmp_path / "avatar"
    data = dataset(conversational=False).select(range(2))
    options = STABLE | {"max_completion_length": 12}
    runs = []
    for folder, trainer, config, own in (
        (folders[0], GRPOTrainer, GRPOConfig, {}),
        (folders[1], AvatarTrainer, AvatarConfig, COLD),
    ):
        model, tokenizer = build("text", folder)
        runs.append(run(trainer, config, model, tokenizer, folder / "out", data, **options, **own))
    expected, found = runs
    assert worst(expected[1][:1], found[1][:1]) < 1e-4
    assert [entry["replay/share"] for entry in found[0]] == [0, 0.5, 0.5]
    assert worst(expected[1][1:2], found[1][1:2]) > 1e-2
