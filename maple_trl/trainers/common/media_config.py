"""The options of every trainer whose rows hold media: what rows are fed, and how their files are read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from maple_trl.omni.host_memory import read_bytes, readable
from maple_trl.omni.machine_memory import local_processes, machine_memory
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.media.workers import LEAST_BYTES, WORKER_BYTES, WORKERS
from maple_trl.rewards.accuracy import AccuracyReward, accuracy_reward
from maple_trl.rewards.format import format_reward
from maple_trl.rewards.localisation import box_iou_reward, temporal_iou_reward
from maple_trl.rewards.places import ObjectPlaceReward, object_place_reward
from maple_trl.rewards.routing import innermost
from maple_trl.rewards.self_consistency import SelfConsistencyReward, self_consistency_reward


if TYPE_CHECKING:
    from maple_trl.omni.families import PromptEncoder
    from maple_trl.omni.prompt import PromptBuilder
    from maple_trl.omni.templates import Asking


_FIELD_OF_LIMIT = {
    "fps": "video_fps",
    "max_seconds": "max_media_seconds",
    "overlong": "overlong_media",
    "decode_timeout": "media_decode_timeout",
}

_NO_BF16 = (
    "bf16 is the default and needs a GPU that has it, which is not here. To train on the CPU: --use_cpu true --bf16 false "
    "--dtype float32 (in a file: use_cpu: true, bf16: false, dtype: float32)"
)
# Fields of TRL and transformers whose wrong values would be noticed late or by nobody: the least value, and whether it may
# be reached, and the greatest one.
_RANGES = {
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "num_generations": (1, True),
    "num_generations_eval": (1, True),
    "generation_batch_size": (1, True),
    "steps_per_generation": (1, True),
    "num_iterations": (1, True),
    "max_completion_length": (1, True),
    "num_train_epochs": (0, False),
    "learning_rate": (0, True),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "beta": (0, True),
    "epsilon": (0, True),
    "epsilon_high": (0, True),
    "delta": (0, False),
    "top_entropy_quantile": (0, True, 1),
    "sapo_temperature_pos": (0, False),
    "sapo_temperature_neg": (0, False),
    "neftune_noise_alpha": (0, True),
    "seed": (0, True, 2**32 - 1),
    "data_seed": (0, True, 2**32 - 1),
    "logging_steps": (0, True),
    "save_steps": (0, False),
    "eval_steps": (0, False),
    "dataloader_num_workers": (0, True),
    "pad_to_multiple_of": (1, True),
}
_MAPPINGS = (
    "generation_kwargs",
    "chat_template_kwargs",
    "model_init_kwargs",
    "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
)
_LEAST_HOST_BYTES = 1 << 16  # less is a size whose unit was forgotten
# What a prompt is rendered with, whatever the user says.
_OF_RENDERING = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict")


# Rewards that read answers, by their names: the function, and the class behind it where there is one.
_READERS: Mapping[str, tuple[Any, type | None]] = {
    "accuracy_reward": (accuracy_reward, AccuracyReward),
    "self_consistency_reward": (self_consistency_reward, SelfConsistencyReward),
    "object_place_reward": (object_place_reward, ObjectPlaceReward),
    "format_reward": (format_reward, None),
    "temporal_iou_reward": (temporal_iou_reward, None),
    "box_iou_reward": (box_iou_reward, None),
}
_IN_ANY_FORM = (AccuracyReward, SelfConsistencyReward)  # each takes `answer_format`


def _way_to_read(name: str, wanted: str) -> str:
    """Return what to do where a reward of ours reads answers in another form than the wanted one."""
    kind = _READERS[name][1]
    if kind in _IN_ANY_FORM:
        return f"In a job's file: {{reward: {name}, answer_format: {wanted}}}; in Python {kind.__name__}({wanted!r})"
    return "It knows no other form: leave it out, or take a prompt_template that asks for <answer>…</answer>, as think does"


def _check_numbers(config: object) -> None:
    """
    Check the numbers of TRL and transformers whose wrong values would be noticed late.

    Raises:
        ValueError: for a number out of range, naming the field.
    """
    for name, (least, reached, *most) in _RANGES.items():
        value = getattr(config, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not (math.isfinite(value) and (value >= least if reached else value > least)):
            raise ValueError(f"{name} must be {'at least' if reached else 'above'} {least}, got {value}")
        if most and value > most[0]:
            raise ValueError(f"{name} must be at most {most[0]}, got {value}")
    steps = getattr(config, "max_steps", -1)
    if isinstance(steps, int | float) and steps < 1 and steps != -1:  # the library would take epochs for it, silently
        raise ValueError(f"max_steps must be at least 1, or -1 to train for num_train_epochs, got {steps}")


def _check_mappings(config: object) -> None:
    """
    Check the options that are mappings of further options.

    Raises:
        ValueError: for a mapping of further options that is none, or that sets what the trainer itself sets.
    """
    for name in _MAPPINGS:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f'{name} must be a mapping of names to values, e.g. {{"name": 1}}, got {value!r}')
    own = [name for name in getattr(config, "chat_template_kwargs", None) or {} if name in _OF_RENDERING]
    if own:
        raise ValueError(f"chat_template_kwargs: {own[0]} cannot be set; it takes what the model's template knows")


@dataclass
class MediaConfig:
    r"""
    Fields of a trainer's configuration that decide what rows are fed and how their media are read.

    A mixin: it stands before a configuration class of TRL among the bases. Limits come from here alone, never from
    environment variables.

    Raises:
        ValueError: for options that contradict each other, naming the field.
    """

    modality_access: str = field(
        default="required",
        metadata={
            "help": "What a row with a tag is fed: 'required' feeds exactly the signals of its tag (modality-aware), "
            "'all' feeds every signal the row has (modality-unaware)."
        },
    )
    audio_in_video: bool = field(
        default=False,
        metadata={
            "help": "Interleave audio tokens with the video's tokens, for rows that are fed both. A row's own column "
            "'audio_in_video' overrides it."
        },
    )
    subtitle_template: str = field(
        default="Subtitles:\n{subtitle}\n",
        metadata={
            "help": "Text around a subtitle that leads the prompt; must hold '{subtitle}'. A subtitle that has its place, at "
            "{subtitle} of prompt_template or at a mark <subtitle>, stands there as it is."
        },
    )
    prompt_template: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Makes the prompt of a row's columns: a text such as '{question}\\n{options}', a mapping of tags (and "
            "'default') to such texts, of which the signals that a row is fed choose, or a name: maple-qa, maple-caption, "
            "think, answer, brackets. {options} become lines with letters. The subtitle stands at {subtitle}, alone; "
            "without it, it leads the prompt in subtitle_template. Null: the column 'prompt'."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "The system message of conversations that have none of their own: a text, or a .txt or .md file that "
            "holds it."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per prompt. A longer prompt has its subtitle shortened; media placeholders and the question "
            "are never cut, a row that still does not fit is quarantined."
        },
    )
    max_media_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of pictures, video and audio per prompt. Pictures and frames are made smaller until they fit; a "
            "row that does not fit with the smallest is quarantined."
        },
    )
    media_root: Annotated[str, "place"] = field(
        default=".",
        metadata={"help": "The folder below which all media lie. Links are resolved; nothing outside it is read."},
    )
    media_allow_network: bool = field(
        default=False, metadata={"help": "Whether rows may name media by http(s) URL. Off: a URL quarantines its row."}
    )
    media_backend: str = field(
        default="pyav",
        metadata={
            "help": "Decoder: 'pyav', 'torchcodec', or 'auto' (torchcodec where it works, else PyAV). The two differ in "
            "single pixel values, so a run repeats exactly only with the same one."
        },
    )
    num_frames: int | None = field(
        default=8,
        metadata={
            "help": "Frames per video, evenly from its first picture to its last, as the Qwen processors take them. Exclusive "
            "with video_fps."
        },
    )
    video_fps: float | None = field(
        default=None,
        metadata={
            "help": "Frames per second of video: an even number, at least 4 and at most max_frames. Set num_frames to null."
        },
    )
    max_frames: int = field(default=64, metadata={"help": "Most frames of one video."})
    min_pixels: int = field(
        default=4 * 28 * 28, metadata={"help": "Fewest pixels (height x width) of a frame or picture."}
    )
    max_pixels: int = field(
        default=128 * 28 * 28, metadata={"help": "Most pixels (height x width) of a frame or picture."}
    )
    max_media_seconds: float = field(
        default=300.0, metadata={"help": "Longest clip or segment that is read, in seconds."}
    )
    overlong_media: str = field(
        default="quarantine",
        metadata={
            "help": "What happens to a longer clip: 'quarantine' drops its row, 'trim' reads its beginning, 'spread' takes "
            "pictures over its whole length and of its sound parts that are spread over it, max_media_seconds together."
        },
    )
    media_decode_timeout: Annotated[float, "speed"] = field(
        default=60.0, metadata={"help": "Seconds that decoding one clip may take before its row is quarantined."}
    )
    media_workers: Annotated[int, "speed"] = field(
        default=WORKERS,
        metadata={
            "help": "Processes that decode media, so that a file that crashes or hangs the decoder costs its row and not the "
            "run. 0: decode in the training process."
        },
    )
    media_worker_bytes: Annotated[int, "speed"] = field(
        default=WORKER_BYTES,
        metadata={"help": "Memory that each of them may have. A clip that needs more is quarantined."},
    )
    media_cache_bytes: Annotated[int, "speed"] = field(
        default=2 << 30, metadata={"help": "Bytes of decoded clips kept in memory, shared by rollout and training."}
    )
    media_prefetch: Annotated[bool, "speed"] = field(
        default=True, metadata={"help": "Decode the next batch's clips in the background while this one trains."}
    )
    host_memory_bytes: Annotated[int | str | None, "speed"] = field(
        default=None,
        metadata={
            "help": "Memory of a machine that a run may fill with what it keeps, such as 64GiB: decoded clips, features of frozen "
            "towers, prompts, replayed completions. Its processes share it evenly. What was not used for longest goes, of "
            "media_cache_bytes and encoder_cache_bytes at most. Null: half of what the machine, or its container, allows."
        },
    )
    encoder_cache_bytes: Annotated[int, "speed"] = field(
        default=1 << 30,
        metadata={
            "help": "Bytes of memory for what vision and audio towers that are not trained have made of clips. 0: none."
        },
    )
    encoder_cache_dir: Annotated[str | None, "place"] = field(
        default=None, metadata={"help": "A folder that keeps it on disk too, for other processes and later runs."}
    )
    encoder_cache_disk_bytes: Annotated[int, "speed"] = field(
        default=8 << 30, metadata={"help": "Most bytes in that folder; what was not used for longest is removed."}
    )
    media_check: Annotated[str, "speed"] = field(
        default="probe",
        metadata={
            "help": "Look at every media file before training: 'probe' reads headers and quarantines rows with broken "
            "files, 'none' leaves it to the step that meets them."
        },
    )
    max_quarantined_share: Annotated[float, "speed"] = field(
        default=0.1,
        metadata={
            "help": "Most rows of a data set, as a share of those that were looked at, whose media may turn out unusable. "
            "Above it the run stops, with a checkpoint. Fewer than 10 rows are not judged. 0 tolerates none, 1 never stops."
        },
    )

    def __post_init__(self):
        _check_numbers(self)
        if getattr(self, "activation_checkpointing", True) is None:  # the name that is not deprecated
            self.activation_checkpointing = self.gradient_checkpointing
        if getattr(self, "activation_checkpointing_kwargs", True) is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16" in str(error) and getattr(self, "bf16", None):
                raise ValueError(_NO_BF16) from error
            raise
        _check_mappings(self)
        self._settle_checkpointing()
        self._check_choice("modality_access", ("required", "all"))
        self._check_choice("media_check", ("probe", "none"))
        self._check_choice("media_backend", ("auto", "pyav", "torchcodec"))
        if "{subtitle}" not in self.subtitle_template:
            raise ValueError(f"subtitle_template must hold '{{subtitle}}', got {self.subtitle_template!r}")
        self._read_prompts()
        for name in ("max_prompt_length", "max_media_tokens", "media_cache_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.media_worker_bytes < LEAST_BYTES:
            raise ValueError(
                f"media_worker_bytes must be at least {LEAST_BYTES} (256 MiB), got {self.media_worker_bytes}"
            )
        for name in ("encoder_cache_bytes", "encoder_cache_disk_bytes", "media_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.encoder_cache_dir is not None and os.path.isfile(self.encoder_cache_dir):
            raise ValueError(f"encoder_cache_dir: {self.encoder_cache_dir} is a file; name a folder")
        if not 0 <= self.max_quarantined_share <= 1:
            raise ValueError(f"max_quarantined_share must be between 0 and 1, got {self.max_quarantined_share}")
        self.media_limits()
        self._check_host_memory()

    def _settle_checkpointing(self) -> None:
        """Name the kind of checkpointing where other options of it are given alone: torch would take the reentrant one."""
        given = getattr(self, "gradient_checkpointing_kwargs", None)  # an evaluation has none
        if given is not None and given.get("use_reentrant") is None:
            settled = {**given, "use_reentrant": False}
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs = settled

    def _check_host_memory(self) -> None:
        """
        Read `host_memory_bytes`, and check it against the machine and the parts.

        Raises:
            ValueError: for a size that is none, or a part that is larger than the whole.
        """
        if self.host_memory_bytes is None:
            return
        whole = self.host_memory_bytes = read_bytes(self.host_memory_bytes, "host_memory_bytes")
        if whole < _LEAST_HOST_BYTES:
            raise ValueError(
                f"host_memory_bytes={whole} is {whole} bytes, too few for anything: a unit is missing, as in 8GiB"
            )
        there = machine_memory()
        if there is not None and whole > there:
            raise ValueError(
                f"host_memory_bytes={whole} ({readable(whole)}) is more than this machine, or its control group, has: {there} "
                f"({readable(there)})"
            )
        share = self.host_share()
        defaults = {part.name: part.default for part in fields(self)}
        for name in ("media_cache_bytes", "encoder_cache_bytes"):
            part = getattr(self, name)
            if part > share and part != defaults[name]:
                raise ValueError(
                    f"{name}={part} ({readable(part)}) is more than the {share} ({readable(share)}) that each of "
                    f"{whole // share} processes has of host_memory_bytes={whole}: lower it, or raise host_memory_bytes"
                )

    def host_share(self) -> int | None:
        """Return the bytes of `host_memory_bytes` that are for this process; `None` where the machine's are not known."""
        whole, there = self.host_memory_bytes, machine_memory()
        if whole is None:
            whole = None if there is None else there // 2
        return None if whole is None else max(int(whole) // local_processes(getattr(self, "world_size", 1)), 1)

    def _read_prompts(self) -> None:
        """Check what rows are asked; a file's text takes the place of its name, for it decides the result."""
        from maple_trl.data.prompt_templates import texts_of

        self.prompt_template = texts_of(self.prompt_template)
        self.template()
        if self.system_prompt is None:
            return
        name = self.system_prompt.strip()
        if name.endswith((".txt", ".md")) and len(name.splitlines()) == 1:
            try:
                self.system_prompt = Path(name).read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"system_prompt: cannot read {name}: {getattr(error, 'strerror', None) or error}; what ends in .txt or .md "
                    "is a file"
                ) from error
        if not self.system_prompt.strip():
            raise ValueError("system_prompt is blank; leave it out for none")

    def template(self) -> Asking | None:
        """
        Return what makes prompts of the rows' columns; `None` where they have their own.

        Raises:
            ValueError: for a `prompt_template` that is none.
        """
        from maple_trl.data.prompt_templates import read_template

        if self.prompt_template is None:
            return None
        try:
            return read_template(self.prompt_template)
        except ValueError as error:
            raise ValueError(f"prompt_template: {error}") from None

    def check_answer_form(self, rewards: Iterable[Any], columns: Iterable[str] = ()) -> None:
        """
        Check that answers are read in the form that `prompt_template` asks for.

        Args:
            rewards: functions, or names of them; those that are none of ours are not looked at.
            columns: of the data set; one named `answer_format` says the form row by row.

        Raises:
            ValueError: with what to set instead; all answers would count as wrong.
        """
        template = self.template()
        wanted = None if template is None else template.answer_format
        if wanted is None or "answer_format" in columns:
            return
        problems = []
        for reward in map(innermost, rewards):
            for name, (function, kind) in _READERS.items():
                ours = reward is function or reward == name or (kind is not None and isinstance(reward, kind))
                if ours and (form := getattr(reward, "answer_format", "tags")) != wanted:
                    problems.append(
                        f"{name} reads {form!r}: every answer would be wrong. {_way_to_read(name, wanted)}"
                    )
        if problems:
            raise ValueError(
                f"prompt_template {self.prompt_template} asks for answers in the form {wanted!r}, and {'. And '.join(problems)}"
            )

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")

    def media_loader(self, root: str | None = None, backend: str | None = None) -> MediaLoader:
        """
        Make the loader of the rows' files.

        Args:
            root (`str`, *optional*): another folder than `media_root`.
            backend (`str`, *optional*): another decoder than `media_backend`.

        Raises:
            FileNotFoundError: when there is no such folder.
            RuntimeError: when the decoder that is asked for does not work here.
        """
        return MediaLoader(
            self.media_root if root is None else root,
            self.media_limits(),
            cache_bytes=self.media_cache_bytes,
            allow_network=self.media_allow_network,
            backend=backend or self.media_backend,
            workers=self.media_workers,
            worker_bytes=self.media_worker_bytes,
        )

    def prompt_builder(
        self, family: PromptEncoder, loader: MediaLoader, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> PromptBuilder:
        """
        Make the builder of prompts out of rows.

        Args:
            family: the model's, or a server's.
            loader: what reads the rows' media.
            chat_template_kwargs: further variables of the chat template.
        """
        from maple_trl.omni.prompt import PromptBuilder

        return PromptBuilder(
            family,
            loader,
            modality_access=self.modality_access,
            audio_in_video=self.audio_in_video,
            subtitle_template=self.subtitle_template,
            max_prompt_length=self.max_prompt_length,
            max_media_tokens=self.max_media_tokens,
            chat_template_kwargs=chat_template_kwargs,
            template=self.template(),
            system_prompt=self.system_prompt,
            max_completion_length=getattr(self, "max_completion_length", None) or 0,
        )

    def media_limits(self) -> MediaLimits:
        """
        Return the limits that the media loader applies.

        Raises:
            ValueError: when they contradict each other, in terms of the fields here.
        """
        try:
            return self._media_limits()
        except ValueError as error:
            names = "|".join(_FIELD_OF_LIMIT)
            raise ValueError(re.sub(rf"\b({names})\b", lambda m: _FIELD_OF_LIMIT[m[0]], str(error))) from None

    def _media_limits(self) -> MediaLimits:
        return MediaLimits(
            num_frames=self.num_frames,
            fps=self.video_fps,
            max_frames=self.max_frames,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            max_seconds=self.max_media_seconds,
            overlong=self.overlong_media,
            decode_timeout=self.media_decode_timeout,
        )
