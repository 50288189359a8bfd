"""The models of an evaluation: in this process, or behind a server."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from maple_trl.chat import ChatClient, ChatOptions, ChatSetupError
from maple_trl.evaluation.evaluator import Evaluator
from maple_trl.evaluation.identity import device_name, weights_digest
from maple_trl.evaluation.served import ServedEvaluator, check_media, inspect_server
from maple_trl.evaluation.served_prompts import MessageEncoder
from maple_trl.files import digest, files_digest
from maple_trl.jobs.checks import adapter_base, quantization_options
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.model_config import check_quantization
from maple_trl.omni.adapters import fetch_adapter, load_adapter, processor_beside
from maple_trl.omni.checkpoints import check_checkpoint, reach, read_config
from maple_trl.omni.families import OmniFamily, family_for
from maple_trl.omni.generation import check_generation_options
from maple_trl.omni.loading import (
    BUILTIN_PREFIX,
    check_tokens,
    hub_arguments,
    load_model,
    load_processor,
    resolve_checkpoint,
)
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.quantization import describe, is_quantized
from maple_trl.records.evaluations import EvaluationError


if TYPE_CHECKING:
    from maple_trl.jobs.eval_job import EvalJob

logger = logging.getLogger(__name__)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class LocalModel:
    """
    The model of an evaluation, in this process.

    Args:
        job: names model and adapter.
        state: says where it computes.

    Attributes:
        family: of the model.
        described: what decides its numbers, as JSON values.
        device: what computes.

    Raises:
        SetupError: when there is no such model or adapter, or the adapter does not fit.
    """

    def __init__(self, job: EvalJob, state: PartialState):
        try:
            check_generation_options(job.options.generation, {}, "generation")
            check_quantization(job)
        except ValueError as error:
            raise SetupError(str(error)) from error
        self.model, processor, self.described = load_policy(job, state)
        try:
            self.family: OmniFamily = family_for(self.model, processor)
        except ValueError as error:
            raise SetupError(f"model: {error}") from error
        self.described |= {"family": type(self.family).__name__}
        self.device = device_name(state.device)
        template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
        self.chat_template_sha256: str | None = digest(template)

    def evaluator(self, builder: PromptBuilder, *args: Any) -> Evaluator:
        """Return the evaluator of this model; `args` as of [`~maple_trl.evaluation.base.BaseEvaluator`]."""
        return Evaluator(self.model, builder, *args)

    def check(self, evaluator: Evaluator) -> None:
        """Check before the first question; raise `EvaluationError` where samples cannot share their prompt."""
        if evaluator.options.shared_prompt and evaluator.options.samples > 1:
            evaluator.check_shared_prompt()

    def close(self) -> None:
        """Do nothing: nothing is open."""


class ServedModel:
    """
    The model of an evaluation, behind an OpenAI-compatible endpoint.

    Args:
        job: names server and model.

    Attributes:
        family: stands where a model's family does.
        described, device, chat_template_sha256: as of [`LocalModel`]; of what only the server knows nothing.

    Raises:
        SetupError: for an option that only a model in this process has, or a client that cannot be set up.
        ServerError: when nothing answers.
    """

    device = "server"
    chat_template_sha256 = None

    def __init__(self, job: EvalJob):
        _check_served(job)
        self.family = MessageEncoder(job.server_video)
        try:
            self.options = ChatOptions(
                model=job.model_name_or_path,
                base_url=job.server,
                api_key_env=job.api_key_env,
                api_key_file=job.api_key_file,
                concurrency=job.concurrency,
                timeout=job.timeout,
            )
            self.info = inspect_server(self.options)
            self.client = ChatClient(dataclasses.replace(self.options, cache_file=job.answer_cache))
        except EvaluationError:
            raise
        except ImportError as error:
            raise SetupError(f'--server: {error}; the extra brings it: pip install "maple-trl[judge]"') from error
        except (ChatSetupError, ValueError) as error:
            raise SetupError(f"--server: {error}") from error
        self.described = {
            "name": job.model_name_or_path,
            # Not its address: the same server may stand elsewhere when an evaluation goes on.
            "server": dataclasses.asdict(self.info),
            "video_as": job.server_video,
            "adapter": None,
        }

    def evaluator(self, builder: PromptBuilder, *args: Any) -> ServedEvaluator:
        """Return the evaluator of this model; `args` as of [`~maple_trl.evaluation.base.BaseEvaluator`]."""
        return ServedEvaluator(self.client, self.info, builder, *args)

    def check(self, evaluator: ServedEvaluator) -> None:
        """
        Check the server before the first question.

        Raises:
            ServerError: when the server refuses or ignores media that rows are fed.
        """
        found = check_media(self.options, evaluator.kinds, self.family.video_form)
        for kind in (kind for kind, certain in found.items() if not certain):
            logger.warning("The server counts no tokens: whether it reads %s cannot be told.", kind)

    def close(self) -> None:
        """Close connections."""
        self.client.close()


def _check_served(job: EvalJob) -> None:
    """Raise SetupError for an option that has no effect on a server."""
    local = {
        "--adapter": job.adapter is not None,
        "--processor": job.processor_name_or_path is not None,
        "--dtype": job.dtype != "auto",
        "--attn-implementation": job.attn_implementation is not None,
        "--revision": job.model_revision != "main",
        "--trust-remote-code": job.trust_remote_code,
        "--device": job.device != "auto",
        "--no-shared-prompt": not job.options.shared_prompt,
        "--load-in-4bit": job.load_in_4bit,
        "--load-in-8bit": job.load_in_8bit,
        "--audio-in-video": job.media.audio_in_video,
        "--max-prompt-length": job.media.max_prompt_length is not None,
        "--max-media-tokens": job.media.max_media_tokens is not None,
    }
    given = [name for name, is_given in local.items() if is_given]
    if given:
        raise SetupError(f"{', '.join(given)}: no effect on a model behind --server; start the server with it instead")


def load_policy(job: EvalJob, state: PartialState) -> tuple[Any, Any, dict[str, Any]]:
    """
    Load the model with its adapter, in evaluation mode on its device, its processor, and what describes it.

    In the first process a digest of the weights is part of that.

    Raises:
        SetupError: when there is no such model or adapter, or the adapter does not fit.
    """
    name, adapter, revision = _parts(job)
    shared = {"revision": revision, "trust_remote_code": job.trust_remote_code}
    kwargs = shared | ({"attn_implementation": job.attn_implementation} if job.attn_implementation else {})
    beside = processor_beside(adapter)
    other = job.processor_name_or_path
    try:
        path = resolve_checkpoint(name)
        options = reach(path, hub_arguments(kwargs))
        check_checkpoint(path, options, processor=not beside and other is None, text=False)
        of_model = adapter if adapter is not None and beside else name
        processor = load_processor(of_model, **shared) if other is None else load_processor(other)
        if other is not None:
            check_tokens(processor, read_config(path, options), other)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise SetupError(f"model: {error}") from error
    try:
        quantized = quantization_options(job, name, shared, state.device)
        model = load_model(name, dtype=job.dtype, **(kwargs | quantized))
        if not is_quantized(model):  # which is where it belongs
            model = model.to(state.device)
    except (OSError, ValueError, ImportError, TypeError, KeyError, RuntimeError) as error:
        raise SetupError(f"model: cannot load {name!r}: {error}") from error
    described = {
        "name": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        # Before the adapter, which moves the weights below it to other names.
        "sha256": weights_digest(model) if state.is_main_process else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "adapter": None if adapter is None else {"name": adapter, "sha256": files_digest(adapter, _ADAPTER_FILES)},
    }
    if other is not None:
        described["processor"] = other
    if is_quantized(model):
        described["quantization"] = describe(model)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    return model.eval(), processor, described


def _parts(job: EvalJob) -> tuple[str, str | None, str]:
    """Return the names of model and adapter, and the model's revision: an adapter may stand where a model does."""
    name, revision = str(job.model_name_or_path), job.model_revision
    # An adapter on the Hub has revisions of its own.
    fetched = None if os.path.exists(name) or name.startswith(BUILTIN_PREFIX) else _fetched("model", name, revision)
    base = adapter_base(fetched or name)
    if base is not None:
        if job.adapter is not None:
            raise SetupError(f"{name} is an adapter itself; with --adapter, --model names the model below it: {base}")
        return base, fetched or name, "main" if fetched else revision
    if job.adapter is None:
        return name, None, revision
    adapter = _fetched("adapter", job.adapter)
    if adapter is None:
        raise SetupError(
            f"adapter: {job.adapter} holds no adapter_config.json; name a folder or Hub id with a LoRA adapter"
        )
    return name, adapter, revision


def _fetched(option: str, name: str, revision: str = "main") -> str | None:
    try:
        return fetch_adapter(name, revision)
    except (ValueError, OSError) as error:
        raise SetupError(f"{option}: {error}") from error


def _with_adapter(model: Any, folder: str) -> Any:
    try:
        return load_adapter(model, folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise SetupError(f"adapter: {folder} does not fit the model: {error}") from error
