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
from typing import Any

from maple_trl.rollout.engine_inputs import engine_input
from maple_trl.rollout.engine_rows import unpack_rows


STATE, WEIGHTS, SAMPLE = "/maple_trl/state", "/maple_trl/weights", "/maple_trl/sample"
WRONG_WEIGHTS = 409
SUM_WEIGHTS = "maple_sum_weights"


async def rollouts(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """Answer requests of trainers, and pass on all others."""
    from fastapi.responses import JSONResponse

    paths = {STATE: _state, WEIGHTS: _take_weights, SAMPLE: _sample}
    if request.url.path not in paths:
        return await call_next(request)
    try:
        status, answer = await paths[request.url.path](request)
    except Exception as error:
        status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
    return JSONResponse(answer, status)


async def _state(request: Any) -> tuple[int, dict[str, Any]]:
    config = request.app.state.engine_client.vllm_config.model_config
    part = getattr(config.hf_config, "thinker_config", config.hf_config)
    version = getattr(request.app.state, "maple_version", None)
    return 200, {"model_type": part.model_type, "version": version, "logprobs_mode": config.logprobs_mode}


async def _take_weights(request: Any) -> tuple[int, dict[str, Any]]:
    """Load weights, if they have not come already, empty what was made with former ones, and add up what there is."""
    body = json.loads(await request.body())
    engine, state = request.app.state.engine_client, request.app.state
    state.maple_version = None  # of none, until it is done
    if "folder" in body:
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": body["folder"]})
    await engine.reset_prefix_cache()
    await engine.reset_encoder_cache()
    sums = await engine.collective_rpc(SUM_WEIGHTS)
    state.maple_version = body["version"]
    return 200, {"sums": sums[0] if len(sums) == 1 else None}


async def _sample(request: Any) -> tuple[int, dict[str, Any]]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    (row,), fields = unpack_rows(await request.body())
    state = request.app.state
    if fields["version"] != getattr(state, "maple_version", None):
        return WRONG_WEIGHTS, {"error": "this server has other weights"}
    if not hasattr(state, "maple_processor"):
        state.maple_processor = await asyncio.to_thread(_processor, state.engine_client)
    outputs: list[Any] = []
    try:
        params = SamplingParams(
            n=fields["count"], output_kind=RequestOutputKind.FINAL_ONLY, **_with_numbers(fields["sampling"])
        )
        prompt = engine_input(state.maple_processor, row)
        outputs = [found async for found in state.engine_client.generate(prompt, params, f"maple-{uuid.uuid4().hex}")]
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":
            raise
        return 200, {"failure": f"{type(error).__name__}: {error}"[:500]}
    if not outputs:
        return 200, {"failure": "the engine gave nothing"}
    output = outputs[-1]
    completions = [
        [
            list(one.token_ids),
            [_plain(step[token].logprob) for step, token in zip(one.logprobs, one.token_ids, strict=True)],
        ]
        for one in output.outputs
    ]
    return 200, {"token_ids": list(output.prompt_token_ids), "completions": completions}


def _processor(engine: Any) -> Any:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(engine.vllm_config.model_config)


def _with_numbers(sampling: dict[str, Any]) -> dict[str, Any]:
    """Return options as they were before JSON made texts of the numbers that name tokens."""
    bias = {int(token): value for token, value in (sampling.get("logit_bias") or {}).items()}
    return sampling | {"logit_bias": bias or None}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


class WeightSumsExtension:
    """Lets a worker of the engine add up its weights: `--worker-extension-cls`."""

    model_runner: Any

    def maple_sum_weights(self) -> dict[str, list[float]]:
        """Add up the weights of each part of the model."""
        from maple_trl.rollout.weight_sums import sum_weights

        return sum_weights(self.model_runner.get_model().named_parameters())
