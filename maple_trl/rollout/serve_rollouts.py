"""
What a vLLM server is taught for rollouts: `vllm serve --middleware maple_trl.rollout.serve_rollouts.rollouts`.

Three paths: one tells of the model and whose weights it has, one takes weights, one takes a prompt that is encoded already
and returns completions of it. `maple-trl vllm-serve` starts a server with it.
"""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from maple_trl.rollout.engine_inputs import engine_input, engine_output
from maple_trl.rollout.engine_rows import unpack_rows


STATE, WEIGHTS, SAMPLE = "/maple_trl/state", "/maple_trl/weights", "/maple_trl/sample"
WRONG_WEIGHTS = 409
SUM_WEIGHTS = "maple_sum_weights"


class BadRequestError(ValueError):
    """A request that is none; the message says what is wrong with it."""


async def rollouts(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """Answer requests of trainers, and pass on all others."""
    from fastapi.responses import JSONResponse

    paths = {STATE: _state, WEIGHTS: _take_weights, SAMPLE: _sample}
    if request.url.path not in paths:
        return await call_next(request)
    try:
        status, answer = await paths[request.url.path](request)
    except Exception as error:
        status = 400 if isinstance(error, BadRequestError) else 500
        answer = {"error": f"{type(error).__name__}: {error}"}
    return JSONResponse(answer, status)


async def _state(request: Any) -> tuple[int, dict[str, Any]]:
    config = request.app.state.engine_client.vllm_config.model_config
    part = getattr(config.hf_config, "thinker_config", config.hf_config)
    return 200, {
        "model_type": part.model_type,
        "version": getattr(request.app.state, "maple_version", None),
        "logprobs_mode": config.logprobs_mode,
        "dtype": str(config.dtype).removeprefix("torch."),
        "model_length": config.max_model_len,
    }


async def _take_weights(request: Any) -> tuple[int, dict[str, Any]]:
    """
    Load weights, if they have not come already, empty what was made with former ones, and add up what there is.

    Without a version the former weights count as gone, and nothing else is done.
    """
    version, folder = _weights_asked_for(await request.body())
    engine, state = request.app.state.engine_client, request.app.state
    if not hasattr(state, "maple_lock"):
        state.maple_lock = asyncio.Lock()  # or one run's version would be told of another's weights
    async with state.maple_lock:
        state.maple_version = None  # of none, until it is done
        if version is None:
            return 200, {"sums": None}
        await engine.pause_generation(mode="abort")  # of another run; what is sampled keeps caches from being emptied
        try:
            if folder is not None:
                await engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            if not await engine.reset_prefix_cache():
                raise RuntimeError("vLLM did not empty its cache of prefixes")
            await engine.reset_encoder_cache()
            sums = await engine.collective_rpc(SUM_WEIGHTS)
        finally:
            await engine.resume_generation()
        state.maple_version = version
    return 200, {"sums": sums[0] if len(sums) == 1 else None}


def _weights_asked_for(body: bytes) -> tuple[str | None, str | None]:
    """Return version and folder of a request, once they can be what they should: a failed reload breaks the engine."""
    try:
        asked = json.loads(body)
        version, folder = asked["version"], asked.get("folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRequestError("this is no JSON with version and folder") from error
    if not isinstance(version, str | None) or not isinstance(folder, str | None):
        raise BadRequestError("version and folder must be texts")
    if folder is not None and not any(Path(folder).glob("*.safetensors")):
        raise BadRequestError(
            f"there are no weights in {folder} that this server can read: the trainer's output_dir must be in a file system "
            "that both have"
        )
    return version, folder


async def _sample(request: Any) -> tuple[int, dict[str, Any]]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    try:
        (row,), fields = unpack_rows(await request.body())
        version, count, sampling = fields["version"], fields["count"], _with_numbers(fields["sampling"])
        params = SamplingParams(n=count, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
    except Exception as error:
        raise BadRequestError(f"{type(error).__name__}: {error}") from error
    state = request.app.state
    if version is None or version != getattr(state, "maple_version", None):
        return WRONG_WEIGHTS, {"error": "this server has other weights"}
    if not hasattr(state, "maple_processor"):
        state.maple_processor = await asyncio.to_thread(_processor, state.engine_client)
    outputs: list[Any] = []
    try:
        prompt = engine_input(state.maple_processor, row)
        outputs = [found async for found in state.engine_client.generate(prompt, params, f"maple-{uuid.uuid4().hex}")]
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":
            raise
        return 200, {"failure": f"{type(error).__name__}: {error}"[:500]}
    if version != state.maple_version:  # replaced meanwhile: the completions are partly another model's
        return WRONG_WEIGHTS, {"error": "this server has been given other weights"}
    completions, failure = engine_output(outputs[-1]) if outputs else ([], "the engine gave nothing")
    if failure is not None:
        return 200, {"failure": failure}
    told = [(ids, [_plain(value) for value in logps]) for ids, logps in completions]
    return 200, {"token_ids": list(outputs[-1].prompt_token_ids), "completions": told}


def _processor(engine: Any) -> Any:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(engine.vllm_config.model_config)


def _with_numbers(sampling: dict[str, Any]) -> dict[str, Any]:
    """Return options as they were before JSON made texts of the numbers that name tokens."""
    bias = {int(token): value for token, value in (sampling.get("logit_bias") or {}).items()}
    return sampling | {"logit_bias": bias or None}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


class WeightSumsExtension:
    """Lets a worker of the engine add up its weights: `--worker-extension-cls`."""

    model_runner: Any

    def maple_sum_weights(self) -> dict[str, list[float]]:
        """Add up the weights of each part of the model."""
        from maple_trl.rollout.weight_sums import sum_weights

        return sum_weights(self.model_runner.get_model().named_parameters())
