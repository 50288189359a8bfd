"""Every option says what it decides, and all that compares options asks it."""

from dataclasses import fields, make_dataclass
from typing import Annotated

import pytest
from trl import GRPOConfig, ModelConfig, SFTConfig, TrlParser

from maple_trl import AvatarConfig, MAPOConfig, OmniGRPOConfig
from maple_trl.chat import ChatOptions
from maple_trl.hub.names import shareable
from maple_trl.jobs.model_config import OmniModelConfig
from maple_trl.jobs.options import OmniScriptArguments, parse_args
from maple_trl.jobs.stages import resolved_options
from maple_trl.records.options import INHERITED, deciding, not_deciding, without_keys
from maple_trl.trainers.omni_sft.config import OmniSFTConfig


OURS = [AvatarConfig, ChatOptions, MAPOConfig, OmniGRPOConfig, OmniModelConfig, OmniScriptArguments, OmniSFTConfig]
THEIRS = {f.name for config in (GRPOConfig, ModelConfig, SFTConfig) for f in fields(config)}
FASTER = {"media_workers": 0, "media_prefetch": False, "media_cache_bytes": 1 << 20, "media_decode_timeout": 5.0}
FASTER |= {"shared_prefix": "off", "encoder_cache_bytes": 0, "media_check": "none", "dataloader_num_workers": 3}
OTHER = {"num_frames": 4, "max_prompt_length": 99, "temperature": 0.5, "seed": 9, "subtitle_template": "{subtitle}"}


def own(config):
    """The names of fields that this package's classes declare, not of those that they inherit from TRL."""
    ours = [c for c in config.__mro__ if c.__module__.startswith("maple_trl.")]
    return {name for c in ours for name in c.__dict__.get("__annotations__", {})}


def test_what_each_option_decides():
    """All that this package declares; what stands in neither list decides results."""
    found = {"speed": set(), "place": set()}
    for config in OURS:
        for name, kind in not_deciding(config).items():
            if name in own(config):
                found[kind].add(name)
    assert found["speed"] == {
        *("media_decode_timeout", "media_workers", "media_worker_bytes", "media_cache_bytes", "media_prefetch"),
        "host_memory_bytes",
        *("media_check", "max_quarantined_share", "encoder_cache_bytes", "encoder_cache_disk_bytes", "shared_prefix"),
        "generation_batch",
        *("packed_attention", "vllm_engine_options", "vllm_request_timeout"),
        *("gradient_probe", "gradient_probe_pattern", "gradient_probe_window", "replay_gradient_steps"),
        *("concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "batch_timeout", "max_attempts"),
        *("invalid_attempts", "retry_wait", "retry_wait_max", "retry_after_max", "structured", "cache_bytes"),
        *("prompt_price", "completion_price", "dry_run"),
    }
    assert found["place"] == {
        *("media_root", "encoder_cache_dir", "rollout_log_size", "evaluate_before_after", "eval_questions_per_tag"),
        *("summary_file", "metrics_file", "plot_file", "report", "overwrite"),
        *("base_url", "api_key_env", "api_key_file", "cache_file"),
    }


def test_what_is_said_of_inherited_options_is_said_of_options_that_there_are():
    speed, place = INHERITED["speed"], INHERITED["place"]
    assert not speed & place and (speed | place) - THEIRS <= {"local_rank"}
    assert not (speed | place) & {name for config in OURS for name in own(config)}


def test_an_option_of_which_nothing_is_said_decides():
    """So that one which a later version of TRL adds is compared until someone has looked at it."""
    later = make_dataclass("Later", [("brand_new", int), ("logging_steps", int), ("our_own", Annotated[int, "place"])])
    assert deciding(later(1, 2, 3)) == {"brand_new": 1}
    assert not_deciding(later) == {"logging_steps": "place", "our_own": "place"}


@pytest.mark.parametrize("config", OURS[:1] + OURS[2:], ids=lambda config: config.__name__)
def test_the_parsers_of_trl_read_every_configuration(config):
    """Which hand on to argparse whatever else stands at a field."""
    assert TrlParser(config).format_help()


def job(**options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--use_cpu", "true", "--bf16", "false", "--dataset_name", "builtin:seven-tags"]
    return parse_args(
        ["--trainer", "avatar", "--output_dir", "out", "--model_name_or_path", "builtin:tiny-omni", *words]
    )


def test_a_stage_may_go_on_with_what_changes_its_speed_alone():
    before = resolved_options(job())
    assert resolved_options(job(**FASTER)) == before
    for name, value in OTHER.items():
        after = resolved_options(job(**{name: value}))
        assert {key for key in before if before[key] != after[key]} == {name}


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apikey",
        "X-Api-Key",
        "api_keys",
        "access-keys",
        "hf_token",
        "bearer",
        "Authorization",
        "credentials",
        "pwd",
        "secrets",
    ],
)
@pytest.mark.parametrize("value", ["sk-1", ["sk-1", "sk-2"], {"mine": "sk-1"}])
def test_keys_are_hidden_by_the_names_that_people_give_them(name, value):
    if not isinstance(value, str) and name not in ("api_keys", "access-keys", "credentials", "secrets"):
        value = "sk-1"
    options = {"server": {name: value, "api_key_env": "MY_KEY", "tokens_per_minute": 5, "stop_tokens": ["a"]}}
    shown = without_keys(options)
    assert "sk-" not in str(shown) and shown["server"][name] == "<hidden>"
    assert {**shown["server"], name: value} == options["server"]  # nothing else is
    assert "sk-" not in str(shareable(options))


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://h/v1?api_key=sk-1", "https://h/v1?api_key=<hidden>"),
        ("https://h/v1?model=m&Token=sk-1&n=2#end", "https://h/v1?model=m&Token=<hidden>&n=2#end"),
        (
            "https://h/f?X-Amz-Credential=sk-1&X-Amz-Signature=sk-2",
            "https://h/f?X-Amz-Credential=<hidden>&X-Amz-Signature=<hidden>",
        ),
        ("http://user:sk-1@h/v1?key=sk-2", "http://<hidden>@h/v1?key=<hidden>"),
        ("see https://h/?subscription-key=sk-1 first", "see https://h/?subscription-key=<hidden> first"),
        ("https://h/v1?model=m&design=d", "https://h/v1?model=m&design=d"),
        ("what is the key?key=c", "what is the key?key=c"),
    ],
)
def test_keys_in_addresses_are_hidden(url, shown):
    assert without_keys([{"base_url": url}]) == [{"base_url": shown}]
