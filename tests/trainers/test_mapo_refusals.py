"""Options of MAPOConfig that would do nothing or contradict each other: refused, with a sentence that names them."""

import pytest

from maple_trl import MAPOConfig


def config(tmp_path, **options):
    return MAPOConfig(str(tmp_path), **{"bf16": False, "report_to": [], "use_cpu": True, **options})


EARLY = {"dynamic_sampling": "early"}
# What is refused, the words of the refusal, and the options with which (or in whose place) it is accepted.
CASES = [
    ({"kl_window": 4}, "kl_window=4 has no effect without tag_weights='adaptive'", {"tag_weights": "adaptive"}),
    (
        {"weight_history": "per_tag"},
        "weight_history='per_tag' has no effect without tag_weights='adaptive'",
        {"tag_weights": "adaptive"},
    ),
    (
        {"curriculum_window": 3},
        "curriculum_window=3 has no effect without curriculum='adaptive'",
        {"curriculum": "adaptive"},
    ),
    (
        {"curriculum_window": 3, "curriculum": "static"},
        "curriculum_window=3 has no effect without curriculum='adaptive'",
        {"curriculum": "adaptive"},
    ),
    (
        {"zero_shot_accuracy": {"V": 0.5}, "curriculum": "static"},
        r"zero_shot_accuracy=\{'V': 0.5\} has no effect without curriculum='adaptive'",
        {"curriculum": "adaptive"},
    ),
    (
        {"curriculum_granularity": "cycle", "batching": "mixed"},
        "curriculum_granularity='cycle' has no effect without batching='stratified'",
        {"batching": "stratified"},
    ),
    (
        {"leftover": "mixed", "method": "mupo"},
        "leftover='mixed' has no effect without batching='stratified'",
        {"batching": "stratified"},
    ),
    (
        {"gradient_probe_pattern": "lm_head"},
        "gradient_probe_pattern has no effect without gradient_probe, the number of coordinates",
        {"gradient_probe": 8},
    ),
    (
        {"gradient_probe_pattern": "lm_head(", "gradient_probe": 8},
        "gradient_probe_pattern is no regular expression: missing \\)",
        {"gradient_probe_pattern": "lm_head"},
    ),
    (
        {"remove_unused_columns": True},
        "remove_unused_columns must stay False: rewards and evaluation need every column",
        {"remove_unused_columns": False},
    ),
    (
        {"gradient_probe_window": 7},
        "gradient_probe_window has no effect without gradient_probe",
        {"gradient_probe_window": 7, "gradient_probe": 8},
    ),
    (
        {"zero_shot_questions": 7},
        "zero_shot_questions=7 has no effect without curriculum='adaptive'",
        {"zero_shot_questions": 7, "curriculum": "adaptive"},
    ),
    (
        {"ignore_data_skip": True},
        "ignore_data_skip must stay False: the schedule knows where it stands",
        {"ignore_data_skip": False},
    ),
    (
        {"accelerator_config": {"split_batches": True}},
        "accelerator_config.split_batches must stay False: rollouts are shared by rank already",
        {"accelerator_config": {"split_batches": False}},
    ),
    ({"fp16": True, **EARLY}, "fp16's gradient scaler fails on the steps that .* leaves empty", {"fp16": False}),
    (
        {"advantage_scope": "tag_whitened", **EARLY},
        "with advantage_scope='tag_whitened' those have a gradient too: choose 'tag' or 'group', or dynamic_sampling='n",
        {"advantage_scope": "tag"},
    ),
    (
        {"advantage_scope": "batch", "dynamic_sampling": "mid"},
        "with advantage_scope='batch' those have a gradient too: choose 'tag' or 'group', or dynamic_sampling='none'",
        {"dynamic_sampling": "none"},
    ),
    (
        {"loss_type": "sapo", "beta": 0.1, **EARLY},
        "beta with loss_type='sapo' average over full batches, which dynamic_sampling does not keep: switch one of the",
        {"beta": 0.0},
    ),
    ({"loss_type": "sapo", "beta": 0.1, **EARLY}, "average over full batches", {"loss_type": "dapo"}),
    ({"entropy_coef": 0.01, **EARLY}, "average over full batches", {"dynamic_sampling": "none"}),
    ({"fp16": True, **EARLY}, "fp16's gradient scaler fails", {"dynamic_sampling": "none"}),
]


@pytest.mark.parametrize(("options", "message", "instead"), CASES, ids=lambda value: str(value)[:60])
def test_what_would_do_nothing_is_refused(tmp_path, options, message, instead):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
    accepted = config(tmp_path, **{**options, **instead})
    for name, value in instead.items():
        assert name == "accelerator_config" or getattr(accepted, name) == value


def test_what_is_left_at_its_default_is_no_contradiction(tmp_path):
    config(tmp_path, kl_window=None, weight_history="pooled", curriculum_window=5, leftover="fill", method="mupo")
