"""Starts vLLM's own server with what rollouts need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from maple_trl.omni.loading import load_model, load_processor
from maple_trl.rollout.engine_models import (
    MEDIA_PER_PROMPT,
    EngineModel,
    engine_model,
    engine_weights,
    write_engine_folder,
)
from maple_trl.rollout.merged_weights import tied_name
from maple_trl.rollout.vllm_server import write_weights


_SEVERAL_FRONTS = ("--api-server-count", "-asc", "--data-parallel-size", "-dp")
"""Options of `vllm serve` by which several processes answer at one port, each with a state of its own."""


def serve(
    name_or_path: str, dtype: str, host: str, port: int, max_model_length: int | None, words: Sequence[str]
) -> int:
    """
    Run a server until it ends, and return its exit status.

    Args:
        name_or_path: of a model that can be trained.
        dtype: what the engine computes in; `"auto"`: bfloat16 with CUDA, else float32.
        max_model_length: tokens of prompt and completion; `None`: as many as the model takes.
        words: further options of `vllm serve`.

    Raises:
        ValueError: for a family that vLLM is not known to serve, and for options of `vllm serve` that rollouts cannot have.
        ImportError: without vLLM.
    """
    for word in words:
        if word.split("=")[0] in _SEVERAL_FRONTS:
            raise ValueError(f"{word}: one process takes the requests, which knows whose weights the engine has")
    if find_spec("vllm") is None:
        raise ImportError("vllm-serve needs vLLM: pip install 'maple-trl[vllm]'")
    cuda = torch.cuda.is_available()
    dtype = ("bfloat16" if cuda else "float32") if dtype == "auto" else dtype
    with tempfile.TemporaryDirectory(prefix="maple-trl-engine-") as folder:
        known = write_server_folder(name_or_path, dtype, Path(folder), "cuda" if cuda else "cpu")
        options = {
            "host": host,
            "port": port,
            "dtype": dtype,
            "served-model-name": name_or_path,
            "logprobs-mode": "processed_logprobs",
            "mm-processor-cache-gb": 0,
            "limit-mm-per-prompt": json.dumps(MEDIA_PER_PROMPT),
            "middleware": "maple_trl.rollout.serve_rollouts.rollouts",
            "worker-extension-cls": "maple_trl.rollout.serve_rollouts.WeightSumsExtension",
        }
        if max_model_length is not None:
            options["max-model-len"] = max_model_length
        if cuda:  # weights come over NCCL
            options["weight-transfer-config"] = json.dumps({"backend": "nccl"})
        given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        given += [f"--no-{name.replace('_', '-')}" for name in known.switched_off]
        if not cuda:
            given += ["--enforce-eager", "--skip-mm-profiling"]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, *given, *words]
        variables = {"VLLM_SERVER_DEV_MODE": "1"} if cuda else {}
        process = subprocess.Popen(command, env={"VLLM_NO_USAGE_STATS": "1"} | os.environ | variables)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:  # which the server has been sent as well
            return process.wait()


def write_server_folder(name_or_path: str, dtype: str, folder: Path, device: str) -> EngineModel:
    """Write a checkpoint as the engine reads it: its part that is trained, under the names of the whole."""
    model, processor = load_model(name_or_path, dtype=dtype), load_processor(name_or_path)
    known = engine_model(model.config.model_type, device)
    write_engine_folder(model, processor, folder)
    write_weights(engine_weights(model.named_parameters(), known, tied_name(model)), folder)
    return known
