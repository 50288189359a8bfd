"""An evaluation as it is described."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from maple_trl.evaluation.options import EvalOptions
from maple_trl.trainers.common.media_config import MediaConfig


class _Plain:
    def __post_init__(self):
        pass


@dataclass
class EvalMedia(MediaConfig, _Plain):
    """The options of a trainer that decide what rows are fed, with the same names, defaults and checks."""

    num_frames: int | None = field(
        default=None,
        metadata={"help": "Frames per video, evenly from its first picture to its last (8, without video_fps)."},
    )
    overlong_media: str = field(
        default="spread",
        metadata={
            "help": "a clip longer than max_media_seconds: 'spread' takes pictures over its whole length, and of its sound "
            "parts that are spread over it, max_media_seconds together; 'trim' reads its beginning, 'quarantine' makes it "
            "an error"
        },
    )
    # Of a training run alone.
    modality_access: str = field(init=False, default="required")
    media_prefetch: Annotated[bool, "speed"] = field(init=False, default=True)
    encoder_cache_bytes: Annotated[int, "speed"] = field(init=False, default=0)
    encoder_cache_dir: Annotated[str | None, "place"] = field(init=False, default=None)
    encoder_cache_disk_bytes: Annotated[int, "speed"] = field(init=False, default=0)
    media_check: Annotated[str, "speed"] = field(init=False, default="none")
    max_quarantined_share: Annotated[float, "speed"] = field(init=False, default=1.0)

    def __post_init__(self):
        if self.num_frames is None and self.video_fps is None:
            self.num_frames = 8
        super().__post_init__()


@dataclass
class EvalArguments:
    """
    What an evaluation asks, of which model, and what becomes of the answers.

    Raises:
        ValueError: for a number that is out of range, or not exactly one reward function.
    """

    preset: str | None = field(
        default=None,
        metadata={
            "help": "settings as published: maple-qa, maple-caption or avatar; options that are given win, and what it has "
            "set is printed and kept with the results"
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "folder, Hub id, builtin:tiny-omni, or adapter; with --server the name there (required)",
        },
    )
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter for the model, a folder or Hub id"})
    processor_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--processor"],
            "help": "folder or Hub id of the processor (that beside the adapter or the model); e.g. the base model, where a "
            "published checkpoint lacks it",
        },
    )
    dtype: str = field(default="auto", metadata={"help": "precision (auto: that of the checkpoint)"})
    attn_implementation: str | None = field(default=None, metadata={"help": "attention, e.g. sdpa"})
    load_in_4bit: bool = field(default=False, metadata={"help": "weights of 4 bits (bitsandbytes)"})
    load_in_8bit: bool = field(default=False, metadata={"help": "weights of 8 bits (bitsandbytes)"})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "of 4 bits: nf4 or fp4"})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "of 4 bits: quantize their scales too"})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "of 4 bits: type they are packed into"})
    quantize_towers: bool = field(default=False, metadata={"help": "few bits for towers and projectors too"})
    model_revision: str = field(default="main", metadata={"aliases": ["--revision"], "help": "of a model on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that the checkpoint brings"})
    device: str = field(default="auto", metadata={"choices": ["auto", "cpu"], "help": "where to compute"})
    server: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint where the model is, as http://127.0.0.1:8000/v1"}
    )
    server_video: str = field(
        default="timed_images",
        metadata={
            "help": "how frames are sent there: timed_images (each as a picture behind its time), images (without) or "
            "video_url (as one video, which vLLM reads)"
        },
    )
    api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "variable with the server's key"})
    api_key_file: str | None = field(default=None, metadata={"help": "file with the key, instead of the variable"})
    concurrency: int = field(default=16, metadata={"help": "calls open at once"})
    timeout: float = field(default=600.0, metadata={"help": "seconds of one call"})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "aliases": ["--data"],
            "help": "builtin:seven-tags, a .parquet/.jsonl/.json/.csv/.tsv file, a folder with one per split, a Hub id; "
            "with --benchmark the folder of its files (required)",
        },
    )
    benchmark: str | None = field(default=None, metadata={"help": "read the data as this benchmark, e.g. daily-omni"})
    tags: list[str] | None = field(
        default=None,
        metadata={
            "help": "ask a benchmark's questions with these signals instead of its own, e.g. VA for a video benchmark with "
            "its sound; several ask each question once in each"
        },
    )
    prompt_style: str = field(
        default="think",
        metadata={
            "help": "form of a benchmark's prompts: think, answer, or brackets, which asks for [B] and reads that; of rows "
            "with prompts of their own, only how answers are read; prompt_template wins over it"
        },
    )
    missing_media: str = field(
        default="keep",
        metadata={
            "choices": ["keep", "leave_out", "error"],
            "help": "a benchmark's questions whose files are not there: errors by name, left out, or refused",
        },
    )
    pictures: str = field(
        default="keep",
        metadata={
            "choices": ["keep", "clips"],
            "help": "a benchmark's pictures: fed as they are, or each as a clip of two seconds",
        },
    )
    write_media: bool = field(
        default=False,
        metadata={
            "help": "write the files that a benchmark's tables hold, and clips of pictures, below its folder (extracted/), where "
            "they are read"
        },
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"aliases": ["--split"], "help": "of the data (test; a benchmark's first)"}
    )
    dataset_filter: dict[str, Any] | None = field(
        default=None, metadata={"aliases": ["--filter"], "help": 'rows to use, e.g. {"tag": ["V", "VA"]}'}
    )
    limit: int | None = field(default=None, metadata={"help": "the first N of these rows"})
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "arguments of the chat template"}
    )
    output_dir: str | None = field(
        default=None, metadata={"aliases": ["--output"], "help": "folder of the results (required)"}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy_reward"],
        metadata={
            "aliases": ["--judge"],
            "help": "what scores completions, from 0 to 1: a name, module:function, or a mapping as JSON, "
            'e.g. {"reward": "caption_judge", "server": {"model": "NAME"}} (accuracy_reward)',
        },
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "model of a judge that is given by its name, e.g. --reward_funcs caption_judge"},
    )
    judge_server: str | None = field(
        default=None, metadata={"help": "where that model is: a URL, or local: in this process (the API's own)"}
    )
    judge_max_tokens: int | None = field(
        default=None,
        metadata={"help": "longest answer of that model, its thoughts included (2048; in this process 256)"},
    )
    max_errors: int = field(default=0, metadata={"help": "rows with errors allowed"})
    confidence: float = field(default=0.95, metadata={"help": "of the intervals, between 0 and 1"})
    overwrite: bool = field(default=False, metadata={"help": "begin anew where the folder holds an evaluation"})
    report: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "",
            "help": "write an HTML report as well, as maple-trl report does (report.html in the folder)",
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "send and write nothing; say what would be read, asked and written"}
    )
    quiet: bool = field(default=False, metadata={"help": "show no progress"})
    json: bool = field(default=False, metadata={"help": "print result.json"})

    def __post_init__(self):
        if self.max_errors < 0:
            raise ValueError(f"--max-errors must be 0 or more, got {self.max_errors}")
        if self.judge_max_tokens is not None and self.judge_max_tokens < 1:
            raise ValueError(f"--judge_max_tokens must be 1 or more, got {self.judge_max_tokens}")
        if len(self.reward_funcs) != 1:
            raise ValueError(f"--reward_funcs: one reward scores the completions, got {len(self.reward_funcs)}")


@dataclass
class EvalJob(EvalArguments):
    """
    An evaluation: its arguments, how questions are asked, and what rows are fed.

    Args:
        options ([`EvalOptions`]): how questions are asked.
        set_by_preset (`dict`): options that the preset has set, with their values.
        media ([`EvalMedia`]): what rows are fed.
        answer_cache (`str`, *optional*): a file that keeps the answers of a server one by one, not only by batches.
    """

    options: EvalOptions = field(default_factory=EvalOptions)
    set_by_preset: dict[str, Any] = field(default_factory=dict)
    media: EvalMedia = field(default_factory=EvalMedia)
    answer_cache: str | None = None
