"""MAPOConfig: presets, and every combination that is refused, with the sentence that says what to do instead."""

import json

import pytest

from maple_trl import MAPOConfig
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import parse_args


PRESETS = {
    "mapo": {
        "modality_access": "required",
        "batching": "stratified",
        "advantage_scope": "tag",
        "loss_strata": "tag",
    },
    "mupo": {"modality_access": "all", "batching": "mixed", "advantage_scope": "group", "loss_strata": "batch"},
}


def config(tmp_path, **options):
    return MAPOConfig(str(tmp_path), bf16=False, report_to=[], use_cpu=True, **options)


def parsed(tmp_path, text, *words):
    """The config that a job file gives, with overrides behind it."""
    path = tmp_path / "job.yaml"
    path.write_text(f"trainer: mapo\nbf16: false\nuse_cpu: true\noutput_dir: {tmp_path}\n{text}\n")
    return parse_args(["--config", str(path), *words])[1]


@pytest.mark.parametrize("method", PRESETS)
def test_the_method_fills_in_what_is_left_open(tmp_path, method):
    args = config(tmp_path, method=method)
    assert {name: getattr(args, name) for name in PRESETS[method]} == PRESETS[method]
    from_file = parsed(tmp_path, f"method: {method}")
    assert isinstance(from_file, MAPOConfig)
    assert {name: getattr(from_file, name) for name in PRESETS[method]} == PRESETS[method]


@pytest.mark.parametrize("method", PRESETS)
def test_what_the_user_says_wins_over_the_method(tmp_path, method):
    other = PRESETS["mupo" if method == "mapo" else "mapo"]
    for name, value in other.items():
        args = config(tmp_path, method=method, **{name: value})
        assert {n: getattr(args, n) for n in other} == PRESETS[method] | {name: value}


def test_defaults(tmp_path):
    args = config(tmp_path)
    assert args.method == "mapo" and args.loss_aggregation == "sample"
    assert args.cast_lm_head_to_fp32 and args.beta == 0.0
    assert args.tag_weights == args.curriculum == args.dynamic_sampling == "none"
    assert args.gradient_probe == args.refill_rounds == 0 and args.zero_shot_accuracy is None
    assert args.epsilon == 0.2 and args.epsilon_high is None
    assert config(tmp_path, epsilon_high=0.3).epsilon_high == 0.3


CHOICES = {
    "method": "'mapo', 'mupo'",
    "modality_access": "'required', 'all'",
    "batching": "'stratified', 'mixed'",
    "advantage_scope": "'group', 'tag', 'tag_whitened', 'batch'",
    "loss_strata": "'tag', 'batch'",
    "loss_aggregation": "'token', 'sample', 'prompt'",
    "leftover": "'fill', 'mixed'",
    "difficulty": "'binary', 'continuous'",
    "tag_weights": "'none', 'adaptive'",
    "weight_history": "'pooled', 'per_tag'",
    "curriculum": "'none', 'static', 'adaptive'",
    "curriculum_granularity": "'epoch', 'cycle'",
    "dynamic_sampling": "'none', 'early', 'mid'",
    "revisit": "'all', 'unsolved', 'informative'",
}
REFUSED = [
    *(({name: "bogus"}, f"{name} must be one of {choices}, got 'bogus'") for name, choices in CHOICES.items()),
    ({"kl_window": 1}, "kl_window must be at least 2, got 1"),
    ({"curriculum_window": 0}, "curriculum_window must be at least 1, got 0"),
    ({"zero_shot_questions": 0}, "zero_shot_questions must be at least 1, got 0"),
    ({"refill_rounds": -1, "dynamic_sampling": "early"}, "refill_rounds must be at least 0, got -1"),
    ({"gradient_probe": -1}, "gradient_probe must be at least 0, got -1"),
    ({"gradient_probe_window": 1}, "gradient_probe_window must be at least 2, got 1"),
    (
        {"method": "mupo", "tag_weights": "adaptive"},
        "tag_weights='adaptive' weighs the tags of the loss: it needs loss_strata='tag'",
    ),
    (
        {"loss_strata": "batch", "tag_weights": "adaptive"},
        "tag_weights='adaptive' weighs the tags of the loss: it needs loss_strata='tag'",
    ),
    (
        {"method": "mupo", "curriculum": "static"},
        "curriculum='static' orders batches of one tag: it needs batching='stratified'",
    ),
    (
        {"batching": "mixed", "curriculum": "adaptive"},
        "curriculum='adaptive' orders batches of one tag: it needs batching='stratified'",
    ),
    ({"refill_rounds": 2}, "refill_rounds fills batches that lost groups: it needs dynamic_sampling 'early' or 'mid'"),
    (
        {"revisit": "unsolved"},
        "revisit='unsolved' chooses what epochs that drop groups visit: it needs dynamic_sampling 'early' or 'mid'",
    ),
    ({"revisit": "informative", "dynamic_sampling": "none"}, "revisit='informative' chooses what epochs"),
    (
        {"revisit_after": 0, "revisit": "unsolved", "dynamic_sampling": "early"},
        "revisit_after must be at least 1, got 0",
    ),
    ({"revisit_after": 2, "dynamic_sampling": "early"}, "revisit_after=2 has no effect without revisit='unsolved'"),
    ({"loss_type": "grpo"}, "loss_type='grpo' chooses how the loss is averaged.*set loss_aggregation='sample'"),
    ({"loss_type": "bnpo"}, "loss_type='bnpo' chooses how the loss is averaged.*set loss_aggregation='token'"),
    ({"loss_type": "dr_grpo"}, "loss_type='dr_grpo' chooses how.*set loss_aggregation='prompt'.*leave loss_type at"),
    ({"loss_type": "bogus"}, "loss_type must be one of dapo, cispo, sapo, vespo, got 'bogus'"),
    # What every trainer that samples refuses
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ({"top_p": 5.0}, "`top_p` has to be a float"),
    ({"generation_kwargs": {"top_hh": 1}}, "GenerationConfig has no option 'top_hh'; did you mean top_h?"),
    ({"scale_rewards": "batch"}, "scale_rewards='batch' is replaced by advantage_scope; leave it at 'group'"),
    ({"scale_rewards": "none"}, "scale_rewards='none' is replaced by advantage_scope"),
    (
        {"multi_objective_aggregation": "normalize_then_sum"},
        "multi_objective_aggregation must stay 'sum_then_normalize'",
    ),
    (
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
        r"steps_per_generation \(2\) must be a multiple of gradient_accumulation_steps \(4\)",
    ),
    (
        {"dynamic_sampling": "early", "entropy_coef": 0.01},
        "average over full batches, which dynamic_sampling does not keep: switch one of the two off",
    ),
    (
        {"dynamic_sampling": "mid", "use_adaptive_entropy": True},
        "entropy_coef, use_adaptive_entropy and beta with loss_type='sapo' average over full batches",
    ),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda value: None if isinstance(value, str) else str(value)
)
def test_what_does_not_fit_together_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
    with pytest.raises(SetupError, match=message):
        parsed(tmp_path, json.dumps(options)[1:-1].replace(', "', '\n"').replace('"', ""))


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "vespo"])
def test_surrogates_are_accepted(tmp_path, loss_type):
    bound = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    assert config(tmp_path, loss_type=loss_type, **bound).loss_type == loss_type


def test_luspo_names_what_takes_its_place(tmp_path):
    with pytest.raises(ValueError, match="loss_type='luspo' chooses how.*set loss_aggregation='prompt'"):
        config(tmp_path, loss_type="luspo", importance_sampling_level="sequence")


# Accuracies


ACCURACY = {"V": 0.5, "sv": 0, "VAS": 1}


def test_accuracies_may_be_a_mapping_or_json(tmp_path):
    expected = {"V": 0.5, "sv": 0, "VAS": 1}
    text, used = json.dumps(ACCURACY), "curriculum: adaptive\n"
    for given in (dict(ACCURACY), text):
        assert config(tmp_path, curriculum="adaptive", zero_shot_accuracy=given).zero_shot_accuracy == expected
    assert parsed(tmp_path, f"{used}zero_shot_accuracy: {text}").zero_shot_accuracy == expected
    assert parsed(tmp_path, f"{used}zero_shot_accuracy: '{text}'").zero_shot_accuracy == expected
    assert parsed(tmp_path, used, "--zero_shot_accuracy", text).zero_shot_accuracy == expected
    assert parsed(tmp_path, f"{used}zero_shot_accuracy: null").zero_shot_accuracy is None


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        ({"X": 0.5}, "zero_shot_accuracy: 'X' is not a modality tag; the tags are V, A, S"),
        ({"V": 1.5}, "zero_shot_accuracy: V must have an accuracy from 0 to 1, got 1.5"),
        ({"V": -0.1}, "zero_shot_accuracy: V must have an accuracy from 0 to 1, got -0.1"),
        ({"V": float("nan")}, "zero_shot_accuracy: V must have an accuracy from 0 to 1, got nan"),
        ({"V": "high"}, "zero_shot_accuracy: V must have an accuracy from 0 to 1, got 'high'"),
        ({"V": True}, "zero_shot_accuracy: V must have an accuracy from 0 to 1, got True"),
        ({"V": None}, "zero_shot_accuracy: V must have an accuracy from 0 to 1, got None"),
        ({"AV": 0.5, "VA": 0.5}, "zero_shot_accuracy.*VA.*twice"),
        ("V=0.5", "zero_shot_accuracy must be a mapping of tags to accuracies, got 'V=0.5'"),
        ([0.5], r"zero_shot_accuracy must be a mapping of tags to accuracies, got \[0.5\]"),
    ],
    ids=str,
)
def test_wrong_accuracies_are_refused(tmp_path, accuracy, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, zero_shot_accuracy=accuracy)


# Job files


def test_options_of_mapo_need_its_trainer(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("method: mupo\n")
    with pytest.raises(SetupError, match="unknown key 'method', which is an option of MAPOConfig: set trainer: mapo"):
        parse_args(["--config", str(path)])


@pytest.mark.parametrize(
    ("options", "granularity"),
    [
        ({}, "epoch"),
        ({"curriculum": "static"}, "epoch"),
        ({"curriculum": "adaptive"}, "cycle"),
        ({"curriculum": "adaptive", "curriculum_granularity": "epoch"}, "epoch"),
        ({"curriculum": "static", "curriculum_granularity": "cycle"}, "cycle"),
        ({"method": "mupo"}, "epoch"),
    ],
    ids=str,
)
def test_the_adaptive_curriculum_orders_cycles_by_default(tmp_path, options, granularity):
    args = config(tmp_path, **options)
    assert args.curriculum_granularity == granularity and args.revisit == "all"
    again = config(tmp_path, **options | {"curriculum_granularity": granularity})  # a configuration that is read again
    assert again.curriculum_granularity == granularity
