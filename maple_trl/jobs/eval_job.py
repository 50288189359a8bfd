"""An evaluation as it is described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maple_trl.evaluation.options import EvalOptions
from maple_trl.trainers.common.media_config import MediaConfig


class _Plain:
    def __post_init__(self):
        pass


@dataclass
class EvalMedia(MediaConfig, _Plain):
    """The options of a trainer that decide what rows are fed, with the same names, defaults and checks."""


@dataclass
class EvalJob:
    """
    An evaluation as it is described.

    Args:
        model: a folder, a Hub id, `builtin:NAME`, or a folder with a LoRA adapter.
        data: a data set as `dataset_name` of a training job; with `benchmark`, the folder of its files.
        output: the folder of the results.
        adapter: a folder with a LoRA adapter for the model.
        benchmark: name of a benchmark.
        split: of the data set; default `test`, of a benchmark its first.
        prompt_style, missing_media: of a benchmark, see [`~maple_trl.data.benchmarks.read_benchmark`].
        filter: rows to use, as `dataset_filter` of a training job.
        limit: the first so many of these rows.
        judge: what scores: an entry of a training job's `rewards` (a name, `module:function`, or a mapping or its JSON).
        judge_model, judge_server: of a judge by its name: its model, and where that is (`None`: the API's own address,
            `local`: in this process).
        server: root of the OpenAI-compatible endpoint where `model` is; `None`: in this process.
        server_video: how frames are sent there, see [`~maple_trl.evaluation.served_prompts.VIDEO_FORMS`].
        api_key_env, api_key_file, concurrency, timeout: as of [`~maple_trl.chat.ChatOptions`].
        options, media: how questions are asked, and what rows are fed.
        chat_template_kwargs: further arguments of the chat template.
        dtype, attn_implementation, revision, trust_remote_code: as in `from_pretrained`.
        device: `auto` or `cpu`.
        confidence: of the intervals.
        overwrite: begin anew where the folder holds an evaluation.
        quiet: show no progress.
    """

    model: str
    data: str
    output: str
    adapter: str | None = None
    benchmark: str | None = None
    split: str | None = None
    prompt_style: str = "think"
    missing_media: str = "keep"
    filter: str | None = None
    limit: int | None = None
    judge: str | Mapping[str, Any] = "accuracy_reward"
    judge_model: str | None = None
    judge_server: str | None = None
    server: str | None = None
    server_video: str = "images"
    api_key_env: str = "OPENAI_API_KEY"
    api_key_file: str | None = None
    concurrency: int = 16
    timeout: float = 600.0
    options: EvalOptions = field(default_factory=EvalOptions)
    media: EvalMedia = field(default_factory=EvalMedia)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str = "main"
    trust_remote_code: bool = False
    device: str = "auto"
    confidence: float = 0.95
    overwrite: bool = False
    quiet: bool = False
