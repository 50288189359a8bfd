"""AvatarConfig: its defaults, what it refuses and in which words, and that it survives being copied, written and parsed."""

import copy
import json
import math

import pytest
from transformers import HfArgumentParser
from trl import TrlParser

from maple_trl import AvatarConfig, MAPOConfig, OmniGRPOConfig


def config(tmp_path, **options):
    return AvatarConfig(str(tmp_path), bf16=False, report_to=[], use_cpu=True, **options)


def test_defaults(tmp_path):
    args = config(tmp_path)
    assert args.num_generations == 8 and args.replayed_generations == 4
    assert args.replay_scope == "tiers" and args.replay_draw == "uniform" and args.replay_gradient_steps == 10
    assert args.replay_alpha == 1.0 and args.replay_capacity == 10_000
    assert args.replay_shares == {"easy": 0.25, "medium": 0.35, "hard": 0.4}
    assert list(args.replay_quantiles) == [0.4, 0.75]
    assert args.replay_max_age is args.replay_epsilon is args.replay_epsilon_high is None
    assert args.replay_advantage_limit == 5.0 and args.replay_retier is False and args.replay_recovery == "refuse"
    assert args.vcrs_window == 20
    assert args.replay_min_size == 1 and args.first_hinted_visit == 4
    assert args.tas_lambda == 0.3 and args.tas_shape == "parabolic"
    assert args.advantage_group == "fresh" and args.advantage_scope == "group" and args.batching == "mixed"
    assert args.hints is False and args.hint_visits == 3 and args.hint_max_kl == 0.01
    assert args.hint_template == "\nHint: {hint}"
    assert isinstance(args, OmniGRPOConfig) and args.beta == 0.0 and args.loss_type == "dapo"


def test_two_configs_share_nothing(tmp_path):
    one, two = config(tmp_path), config(tmp_path)
    one.replay_shares["easy"] = 1.0
    assert two.replay_shares["easy"] == config(tmp_path).replay_shares["easy"] == 0.25


def test_a_buffer_as_the_options_say(tmp_path):
    shares = {"easy": 0.5, "medium": 0.25, "hard": 0.25}
    options = {"replay_capacity": 8, "replay_shares": shares, "replay_quantiles": [0.2, 0.6], "replay_max_age": 7}
    args = config(tmp_path, **options, seed=5)
    buffer = args.new_buffer()
    assert buffer.capacities == {"easy": 4, "medium": 2, "hard": 2} and tuple(buffer.quantiles) == (0.2, 0.6)
    assert buffer.max_age == 7 and buffer.seed == 5 and len(buffer) == 0
    assert args.new_buffer() is not buffer


# Refusals

GRPO = {"replayed_generations": 0, "tas_lambda": 0.0}
OFF = {"replayed_generations": 0}
HINTS = {"hints": True}
NUMBER = "must be a finite number of at least 0, got"
POSITIVE = "must be a positive number, got"
BUFFER = "replay_capacity, replay_shares, replay_quantiles or replay_max_age: "
TIERS = "Expected a share of at least 0 for each of easy, medium, hard, got"
CHOICES = {
    "tas_shape": "'parabolic', 'uniform', 'linear_decay', 'linear_incline', 'inverse_parabolic'",
    "advantage_group": "'fresh', 'mixed'",
    "advantage_scope": "'group', 'tag', 'tag_whitened', 'batch'",
    "batching": "'stratified', 'mixed'",
    "replay_recovery": "'refuse', 'empty'",
    "replay_scope": "'tiers', 'prompt', 'buffer'",
    "replay_draw": "'uniform', 'diverse', 'balanced', 'priority'",
}
WITHOUT_REPLAY = {
    "replay_scope": "prompt",
    "replay_draw": "priority",
    "replay_gradient_steps": 1,
    "replay_alpha": 0.5,
    "replay_epsilon": 0.1,
    "replay_epsilon_high": 0.1,
    "replay_advantage_limit": 2.0,
    "replay_capacity": 100,
    "replay_max_age": 3,
    "replay_min_size": 3,
    "replay_retier": True,
    "replay_recovery": "empty",
    "vcrs_window": 5,
    "advantage_group": "mixed",
    "advantage_scope": "batch",
    "hints": True,
}
WITHOUT_HINTS = {"hint_visits": 5, "hint_max_kl": 0.5, "hint_below": 0.5, "hint_template": "{hint}!"}
REFUSED = [
    *(({name: "bogus"}, f"{name} must be one of {choices}, got 'bogus'") for name, choices in CHOICES.items()),
    *(
        (
            {"replayed_generations": number},
            rf"replayed_generations must be from 0 to num_generations - 1 \(7\), for a group needs a fresh completion; "
            rf"got {number}",
        )
        for number in (-1, 8, 9)
    ),
    ({"num_generations": 4}, r"from 0 to num_generations - 1 \(3\).*got 4"),
    *(
        (options | {name: value}, f"{name} {NUMBER} {value}")
        for name, options in (("replay_alpha", {}), ("tas_lambda", {}), ("hint_max_kl", HINTS))
        for value in (-0.5, math.inf, math.nan)
    ),
    *(
        (
            options | {"num_generations": size, "replayed_generations": size - 1},
            rf"replayed_generations={size - 1} leaves 1 fresh completion of {size}, and advantage_scope='{scope}' compares at "
            rf"least 2 .*Choose replayed_generations of at most {size - 2}, or more num_generations{ways}$",
        )
        for size in (2, 4)
        for scope, options, ways in (
            ("group", {}, ", or advantage_scope='batch', or advantage_group='mixed'"),
            ("tag", {"method": "mapo"}, ", or advantage_scope='batch'"),
            ("group", {"dynamic_sampling": "early"}, ""),
        )
    ),
    ({"replay_min_size": 0}, "replay_min_size must be at least 1, got 0"),
    (
        {"replay_capacity": 8, "replay_min_size": 9},
        "Nothing could ever be replayed: replay_min_size=9 is more than replay_capacity=8",
    ),
    *(
        ({name: value}, f"{name} {POSITIVE} {value}")
        for name in ("replay_epsilon", "replay_epsilon_high", "replay_advantage_limit")
        for value in (0.0, -1.0, math.inf, math.nan)
    ),
    ({"vcrs_window": 0}, "vcrs_window must be at least 1, got 0"),
    (HINTS | {"hint_visits": 0}, "hint_visits must be at least 1, got 0"),
    (HINTS | {"hint_template": "Hint"}, r"hint_template must hold '\{hint\}', got 'Hint'"),
    ({"replay_gradient_steps": -1}, "replay_gradient_steps must be at least 0, got -1"),
    ({"replay_capacity": 0}, BUFFER + "A buffer must hold at least 1 experience, got a capacity of 0"),
    ({"replay_max_age": -1}, BUFFER + "The age limit must be at least 0 optimizer steps, got -1"),
    ({"replay_shares": {"easy": 1.0}}, BUFFER + TIERS),
    ({"replay_shares": {"easy": 0.5, "medium": 0.5, "hard": 0.5}}, BUFFER + ".*must add up to 1, got 1.5"),
    ({"replay_shares": {"easy": -0.5, "medium": 0.5, "hard": 1.0}}, BUFFER + TIERS),
    ({"replay_shares": {"easy": 0.25, "medium": 0.35, "hrad": 0.4}}, BUFFER + TIERS),
    ({"replay_shares": "easy=1"}, "replay_shares must be a mapping of tiers to shares, got 'easy=1'"),
    ({"replay_shares": [0.5, 0.5]}, r"replay_shares must be a mapping of tiers to shares, got \[0.5, 0.5\]"),
    ({"replay_quantiles": [0.8, 0.4]}, BUFFER + "The quantiles must be two ascending numbers"),
    ({"replay_quantiles": [0.4]}, BUFFER + "The quantiles must be two ascending numbers"),
    ({"replay_quantiles": [0.4, 1.5]}, BUFFER + "The quantiles must be two ascending numbers"),
    ({"loss_type": "bnpo"}, "loss_type must be one of dapo, grpo, dr_grpo, cispo, sapo with replay, got 'bnpo'"),
    ({"loss_type": "vespo"}, "loss_type must be one of dapo, grpo, dr_grpo, cispo, sapo with replay, got 'vespo'"),
    ({"loss_type": "bogus"}, "loss_type must be one of dapo, grpo, dr_grpo, cispo, sapo with replay, got 'bogus'"),
    (GRPO | {"loss_type": "bogus"}, "loss_type must be one of 'grpo', 'bnpo', .*, 'vespo', got 'bogus'"),
    (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        "loss_type must be one of dapo, grpo, dr_grpo, cispo, sapo with replay, got 'luspo'",
    ),
    (
        OFF | {"loss_type": "vespo"},
        "loss_type must be one of dapo, grpo, dr_grpo, cispo, sapo, bnpo with tas_lambda, got 'vespo'",
    ),
    (
        {"use_liger_kernel": True},
        "use_liger_kernel computes a loss of its own, which knows no replay: leave it False",
    ),
    (
        OFF | {"use_liger_kernel": True},
        "use_liger_kernel computes a loss of its own, which knows no tas_lambda: leave it False",
    ),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold cannot be used with replay: leave it null"),
    (OFF | {"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold cannot be used with tas_lambda"),
    ({"scale_rewards": "batch"}, "scale_rewards='batch' is replaced by advantage_scope; leave it at 'group'"),
    ({"scale_rewards": "none"}, "scale_rewards='none' is replaced by advantage_scope"),
    (
        {"multi_objective_aggregation": "normalize_then_sum"},
        "multi_objective_aggregation must stay 'sum_then_normalize' with replay",
    ),
    *(
        (
            {"advantage_group": "mixed", "advantage_scope": scope},
            "advantage_group='mixed' is about a prompt's group: it needs advantage_scope='group'",
        )
        for scope in ("tag", "tag_whitened", "batch")
    ),
    *(
        (OFF | {name: value}, f"{name}={value!r} has no effect with replayed_generations=0")
        for name, value in WITHOUT_REPLAY.items()
    ),
    *(
        ({name: value}, f"{name}={value!r} has no effect without hints=True".replace("{", r"\{").replace("}", r"\}"))
        for name, value in WITHOUT_HINTS.items()
    ),
    *(
        ({"loss_type": loss, "epsilon_high": 5.0, name: 0.1}, f"{name}=0.1 has no effect with loss_type='{loss}'")
        for loss, name in (("sapo", "replay_epsilon"), ("sapo", "replay_epsilon_high"), ("cispo", "replay_epsilon"))
    ),
    ({"tas_lambda": 0.0, "tas_shape": "uniform"}, "tas_shape='uniform' has no effect with tas_lambda=0"),
    ({"use_vllm": True, "vllm_mode": "elsewhere"}, "vllm_mode must be one of"),  # what the parent refuses
    ({"modality_access": "bogus"}, "modality_access must be one of"),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda value: None if isinstance(value, str) else str(value)
)
def test_what_does_not_fit_together_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize("name", ["replay_shares", "replay_quantiles"])
def test_the_shape_of_the_buffer_has_no_effect_without_replay(tmp_path, name):
    other = {"replay_shares": {"easy": 0.2, "medium": 0.2, "hard": 0.6}, "replay_quantiles": [0.2, 0.6]}
    with pytest.raises(ValueError, match=f"{name}=.* has no effect with replayed_generations=0"):
        config(tmp_path, **OFF, **{name: other[name]})


ACCEPTED = [
    GRPO,
    GRPO | {"replay_alpha": 0.0},
    OFF | {"replay_alpha": 0.0},
    GRPO | {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    GRPO | {"loss_type": "vespo"},
    GRPO | {"scale_rewards": "batch", "off_policy_mask_threshold": 0.5},
    GRPO | {"multi_objective_aggregation": "normalize_then_sum"},
    GRPO | {"num_generations": 2},
    GRPO | {"batching": "stratified"},
    OFF | {"loss_type": "bnpo"},
    {"replay_alpha": 0.0},
    {"replayed_generations": 6},
    *(
        {"num_generations": size, "replayed_generations": size - 1} | options
        for size in (2, 4)
        for options in (
            {"advantage_scope": "batch"},
            {"advantage_scope": "tag_whitened"},
            *({"advantage_group": "mixed", "replay_scope": scope} for scope in ("tiers", "prompt", "buffer")),
        )
    ),
    *({"replay_draw": name} for name in ("uniform", "diverse", "balanced", "priority")),
    *({"replay_scope": name} for name in ("tiers", "prompt", "buffer")),
    {"replay_gradient_steps": 0},
    {"scale_rewards": True},
    {"replay_max_age": 0, "replay_retier": True, "replay_recovery": "empty"},
    {"replay_epsilon": 0.1, "replay_epsilon_high": 1.5},
    {"replay_quantiles": [0.0, 1.0]},
    {"replay_shares": {"easy": 0.0, "medium": 0.0, "hard": 1.0}},
    {"advantage_scope": "tag", "batching": "stratified"},
    {"hint_max_kl": 0.0, "hint_visits": 1, "hint_template": "{hint}", "hint_below": 0.5, "hints": True},
    *({"loss_type": name} for name in ("dapo", "grpo", "dr_grpo", "sapo")),
    {"loss_type": "cispo", "epsilon_high": 5.0},
    *({"tas_shape": name} for name in ("uniform", "linear_decay", "linear_incline", "inverse_parabolic")),
]


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_what_fits_together_is_accepted(tmp_path, options):
    args = config(tmp_path, **options)
    for name, value in options.items():
        found = getattr(args, name)
        assert (list(found) if name == "replay_quantiles" else found) == value or name == "scale_rewards"


# Written and read


FIELDS = {
    "replayed_generations": 2,
    "replay_alpha": 0.5,
    "replay_scope": "prompt",
    "replay_draw": "priority",
    "replay_gradient_steps": 3,
    "replay_capacity": 100,
    "replay_shares": {"easy": 0.2, "medium": 0.3, "hard": 0.5},
    "replay_quantiles": [0.3, 0.6],
    "replay_max_age": 9,
    "replay_min_size": 12,
    "replay_epsilon": 0.1,
    "replay_epsilon_high": 0.4,
    "replay_advantage_limit": 3.0,
    "replay_retier": True,
    "replay_recovery": "empty",
    "vcrs_window": 7,
    "tas_lambda": 0.25,
    "tas_shape": "linear_decay",
    "advantage_group": "mixed",
    "batching": "stratified",
    "hints": True,
    "hint_visits": 2,
    "hint_max_kl": 0.5,
    "hint_below": 0.5,
    "hint_template": " ({hint})",
}


def own(args):
    found = {name: getattr(args, name) for name in FIELDS}
    return found | {"replay_quantiles": list(found["replay_quantiles"])}


def words(tmp_path):
    """The same on a command line, mappings as JSON and lists as words."""
    said = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    for name, value in FIELDS.items():
        said.append(f"--{name}")
        if isinstance(value, list):
            said += map(str, value)
        else:
            said.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return said


def test_copies_are_equal(tmp_path):
    args = config(tmp_path, **FIELDS)
    assert own(args) == FIELDS
    for other in (copy.copy(args), copy.deepcopy(args)):
        assert own(other) == FIELDS and other.new_buffer().capacities == args.new_buffer().capacities


def test_dictionaries_hold_everything(tmp_path):
    args = config(tmp_path, **FIELDS)
    for written in (args.to_dict(), json.loads(args.to_json_string())):
        found = {name: written[name] for name in FIELDS}
        assert found | {"replay_quantiles": list(found["replay_quantiles"])} == FIELDS
    again = AvatarConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: args.to_dict()[name] for name in FIELDS})
    assert own(again) == FIELDS


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_a_command_line(tmp_path, parser_class):
    parser = parser_class((AvatarConfig,))
    parse = parser.parse_args_into_dataclasses if parser_class is HfArgumentParser else parser.parse_args_and_config
    (args,) = parse(words(tmp_path))
    assert isinstance(args, AvatarConfig) and own(args) == FIELDS
    (args,) = parse(words(tmp_path)[:8])
    assert own(args) == own(config(tmp_path))


def test_a_json_and_a_yaml_file(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    path = tmp_path / "options.json"
    path.write_text(json.dumps(common | FIELDS))
    for (args,) in (
        HfArgumentParser((AvatarConfig,)).parse_json_file(str(path)),
        HfArgumentParser((AvatarConfig,)).parse_dict(common | FIELDS),
        TrlParser((AvatarConfig,)).parse_args_and_config(["--config", str(path)]),  # JSON is YAML
    ):
        assert own(args) == FIELDS
    with_words = ["--config", str(path), "--replay_shares", '{"easy": 0, "medium": 0, "hard": 1}']
    (args,) = TrlParser((AvatarConfig,)).parse_args_and_config(with_words)
    assert own(args) == FIELDS | {"replay_shares": {"easy": 0, "medium": 0, "hard": 1}}


def test_refused_on_a_command_line(tmp_path):
    parser = HfArgumentParser((AvatarConfig,))
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--replay_shares"]
    with pytest.raises(ValueError, match="must add up to 1, got 2"):
        parser.parse_args_into_dataclasses([*words, '{"easy": 1, "medium": 0, "hard": 1}'])
    with pytest.raises(ValueError, match="replay_shares must be a mapping of tiers to shares, got 'half'"):
        parser.parse_args_into_dataclasses([*words, "half"])


def test_every_field_says_what_it_is(tmp_path):
    fields = AvatarConfig.__dataclass_fields__
    added = [name for name in fields if name not in MAPOConfig.__dataclass_fields__]
    assert {*added, "batching"} == set(FIELDS)
    for name in added:
        assert len(fields[name].metadata["help"]) > 20, name
