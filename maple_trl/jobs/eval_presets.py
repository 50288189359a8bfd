"""Settings of published evaluations, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from maple_trl.jobs.errors import SetupError
from maple_trl.messages import did_you_mean


if TYPE_CHECKING:
    from maple_trl.jobs.eval_job import EvalJob


@dataclass(frozen=True)
class EvalPreset:
    """
    Options of `maple-trl eval` that a paper's evaluation sets.

    Attributes:
        paper: whose settings they are, and where they stand.
        options: values by option.
        of_benchmark: further ones, for some benchmarks.
    """

    paper: str
    options: Mapping[str, Any]
    of_benchmark: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def values(self, benchmark: str | None) -> dict[str, Any]:
        """Return the options for a benchmark, or a table of one's own."""
        return {**self.options, **self.of_benchmark.get(benchmark or "", {})}


_MAPLE = {"samples": 5, "max_new_tokens": 2048, "max_prompt_length": 8192, "num_frames": 32}
_WITH_SOUND = {"tags": ["VA"]}

PRESETS: Mapping[str, EvalPreset] = MappingProxyType(
    {
        # 32 frames: the paper gives no number; as in the recipes.
        "maple-qa": EvalPreset(
            "MAPLE, arXiv 2602.11596, 3.3, B.4 and table 7",
            {**_MAPLE, "temperature": 0.6, "top_p": 0.95, "prompt_style": "brackets", "prompt_template": "maple-qa"},
        ),
        "maple-caption": EvalPreset(
            "MAPLE, arXiv 2602.11596, 3.3, C.2 and table 7",
            {
                **_MAPLE,
                "temperature": 0.7,
                "top_p": 0.9,
                "reward_funcs": ["caption_judge"],
                "prompt_template": "maple-caption",
            },
        ),
        # Lengths, sound and prompts that ask for the answer alone: the authors' release. 32 frames: the paper, section 5.
        "avatar": EvalPreset(
            "AVATAR, arXiv 2508.03100, section 5, and its authors' release",
            {
                "temperature": 0.0,
                "samples": 1,
                "max_new_tokens": 512,
                "num_frames": 32,
                "audio_in_video": True,
                "prompt_style": "answer",
            },
            {
                "omnibench": {"max_new_tokens": 1024, "audio_in_video": False},
                "daily-omni": {"max_new_tokens": 4096},
                "av-counting": {"max_new_tokens": 1024},
                "av-counting-clips": {"max_new_tokens": 1024},
                "av-odyssey": {"audio_in_video": False},
                "intentbench": {"max_new_tokens": 20},
                "mvbench": {"max_new_tokens": 4096, **_WITH_SOUND},
                "videomme": {"max_new_tokens": 64, **_WITH_SOUND},
                "lvbench": _WITH_SOUND,
                "video-holmes": _WITH_SOUND,
                "mmvu": _WITH_SOUND,
                "tomato": _WITH_SOUND,
            },
        ),
    }
)

# Of these, one is given or the other.
_INSTEAD = {"num_frames": "video_fps"}
# What a model behind a server decides by itself.
_OF_A_LOCAL_MODEL = ("audio_in_video", "max_prompt_length")


def preset_values(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """
    Return what the preset sets, if one is named, beyond what is given.

    Args:
        values: of all options.
        given: options that the command line or a file names.

    Raises:
        SetupError: for a name that is none.
    """
    name = values.get("preset")
    if name is None:
        return {}
    if name not in PRESETS:
        raise SetupError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    found = PRESETS[name].values(values.get("benchmark"))
    settled = {*given, *(_OF_A_LOCAL_MODEL if values.get("server") else ())}
    if values.get("benchmark") is not None or "prompt_style" in given:
        settled.add("prompt_template")  # of a table that is asked as the preset says
    return {option: value for option, value in found.items() if not {option, _INSTEAD.get(option)} & settled}


def settle_template(job: EvalJob, columns: Collection[str]) -> None:
    """Leave the preset's template out where the table has not the columns that it names, but prompts of its own."""
    lacks = job.media.prompt_template == "maple-qa" and not {"question", "options"} <= {*columns}
    if "prompt_template" in job.set_by_preset and lacks and "prompt" in columns:
        del job.set_by_preset["prompt_template"]
        job.media.prompt_template = None
