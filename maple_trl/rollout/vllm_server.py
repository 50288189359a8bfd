"""vLLM on a server, which takes prompts and weights of trainers by the paths that `serve_rollouts` adds to it."""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
import tenacity
import torch
from accelerate.utils import gather_object, set_seed
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from trl.generation.vllm_client import VLLMClient

from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.rollout.engine import EngineError, WrongWeightsError
from maple_trl.rollout.engine_models import engine_weights
from maple_trl.rollout.engine_rows import EngineRow, pack_rows
from maple_trl.rollout.merged_weights import tied_name
from maple_trl.rollout.serve_rollouts import SAMPLE, STATE, WEIGHTS, WRONG_WEIGHTS
from maple_trl.rollout.vllm_generation import OmniVLLMGeneration, Sampled
from maple_trl.rollout.weight_sums import WeightSums


_AT_ONCE = 64  # prompts of a rank under way
_SHARD = 1 << 30  # bytes of weights per file


class ServedGeneration(OmniVLLMGeneration):
    """
    Samples with an engine on a server, whose weights come over NCCL with CUDA, else from a folder that both can read.

    A server that was started anew has other weights than the trainer, says so when it is asked for completions, and is given
    them.

    Args:
        request_timeout: seconds for the completions of a prompt.
        folder: where weights are left for the server.
        kwargs: those of the base class.
    """

    def __init__(self, *args: Any, request_timeout: float, folder: str, **kwargs: Any):
        self.request_timeout = request_timeout
        self.folder = Path(folder).resolve() / "engine_weights"
        self._version = ""
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
        self.url = url.rstrip("/")
        self.http = requests.Session()
        self.http.trust_env = False  # no proxy, and no password of another host
        self.http.mount("http://", HTTPAdapter(pool_maxsize=_AT_ONCE))
        state = self._agreeing(lambda: self._ask("GET", STATE, 30.0))
        model_type = self.plain_model.config.model_type
        if state["model_type"] != model_type:
            raise EngineError(
                f"{self.url} serves a model of type {state['model_type']}; the trained one is a {model_type}"
            )
        self._dtype, self.model_length = getattr(torch, state["dtype"]), state["model_length"]
        self._over_nccl = self.accelerator.device.type == "cuda"
        if self._over_nccl and self.accelerator.is_main_process:
            self._nccl = VLLMClient(
                base_url=self.url, group_port=self.group_port, connection_timeout=self.server_timeout
            )
            self._nccl.init_communicator(device=self.accelerator.device)
        self._logprobs_mode = state["logprobs_mode"]
        self.vllm_client = self  # which TRL asks about the server
        set_seed(self.run_seed, device_specific=True)

    def get_server_info(self) -> dict[str, Any]:
        """Tell TRL how the server makes log-probabilities."""
        return {"model_config": {"logprobs_mode": self._logprobs_mode}}

    @property
    def dtype(self) -> torch.dtype:
        """What the server computes in, whatever the trainer does."""
        return self._dtype

    # Weights

    def sync_weights(self) -> None:
        """Hand over the weights; over NCCL a server has to know what will come, which is found out once."""
        if self._over_nccl and self._weight_metadata is None:
            named = engine_weights(self._iter_named_params(), self.known, tied_name(self.plain_model))
            self._weight_metadata = [(n, str(w.dtype).removeprefix("torch."), list(w.shape)) for n, w in named]
        super().sync_weights()

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._version = gather_object([uuid.uuid4().hex])[0]
        if not self.accelerator.is_main_process:
            for _ in weights:  # gathering sharded ones takes every rank
                pass
            return
        body: dict[str, Any] = {"version": self._version}
        try:
            if self._over_nccl:
                self._ask("POST", WEIGHTS, self.server_timeout, json={"version": None})  # former ones are no more
                self._nccl.update_named_params(self._weight_metadata, weights)
            else:
                self._write(weights)
                body["folder"] = str(self.folder)
            self._proven = self._ask("POST", WEIGHTS, self.server_timeout, json=body)["sums"]
        except requests.RequestException as error:  # of TRL's client, over NCCL
            raise EngineError(f"The weights did not reach the server: {error}") from error
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        try:
            write_weights(weights, self.folder)
        except (OSError, SafetensorError) as error:  # of a full disk, safetensors raises its own
            raise EngineError(f"The weights could not be written for the server: {error}") from error

    def _sums(self) -> WeightSums | None:
        return self._proven if self.accelerator.is_main_process else None

    # Completions

    def generate(self, prompts: list[EncodedPrompt], *args: Any, **kwargs: Any) -> Any:
        """Sample with seeds from a stream that checkpoints keep, as a server's own is not kept."""
        self._seeds = torch.randint(2**31 - 1, (len(prompts),)).tolist()
        return super().generate(prompts, *args, **kwargs)

    def _sample(self, rows: Sequence[EngineRow], counts: Sequence[int]) -> list[Sampled]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._sample_one, rows, counts, self._seeds))

    def _sample_one(self, row: EngineRow, count: int, seed: int) -> Sampled:
        """Ask for the completions of a prompt, and once more where that fails for a reason of its own."""
        fields = {"version": self._version, "count": count, "sampling": {"seed": seed, **self.sampling}}
        body = pack_rows([row], fields)
        found = Sampled(row.token_ids, [], "not asked")
        for _ in range(2):
            try:
                answer = self._ask("POST", SAMPLE, self.request_timeout, data=body)
            except _NoAnswerError:
                found = Sampled(row.token_ids, [], f"no answer within {self.request_timeout:g} seconds")
                continue
            if "failure" not in answer:
                completions = [(list(ids), _numbers(values)) for ids, values in answer["completions"]]
                return Sampled(answer["token_ids"], completions)
            found = Sampled(row.token_ids, [], answer["failure"])
        return found

    def _ask(self, method: str, path: str, timeout: float, **body: Any) -> dict[str, Any]:
        """
        Send a request, again while there is no server, and return what it is answered with.

        Raises:
            EngineError: where none comes up within `vllm_server_timeout`, does not answer within `timeout` seconds, or cannot
                do what it is asked to.
            WrongWeightsError: where its weights are not those that the trainer has sent last.
        """
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_no_server),
            wait=tenacity.wait_exponential(multiplier=0.1, max=5),
            stop=tenacity.stop_after_delay(self.server_timeout),
            reraise=True,
        )
        try:
            answer = again(self.http.request, method, self.url + path, timeout=(10.0, timeout), **body)
        except requests.ReadTimeout as error:
            raise _NoAnswerError(
                f"The vLLM server at {self.url} has not answered {path} within {timeout:g} seconds"
            ) from error
        except requests.RequestException as error:
            raise EngineError(
                f"The vLLM server at {self.url} was not to be reached for {self.server_timeout:g} seconds "
                f"({type(error).__name__}: {error}). Start it with `maple-trl vllm-serve`"
            ) from error
        if answer.status_code == WRONG_WEIGHTS:
            raise WrongWeightsError(
                f"The vLLM server at {self.url} has other weights than this run has sent last: it was started anew, or "
                "another run uses it, which takes a server of its own"
            )
        if answer.status_code not in (200, 404):
            raise EngineError(
                f"The vLLM server at {self.url} answered {path} with {answer.status_code}: {answer.text[:500]}"
            )
        found = _json(answer)
        if answer.status_code == 404 or not isinstance(found, dict):
            raise EngineError(
                f"{self.url} is no server for rollouts of maple_trl: start it with `maple-trl vllm-serve`"
            )
        return found


class _NoAnswerError(EngineError):
    """A server that takes too long."""


def _json(answer: requests.Response) -> Any:
    """Read an answer; `None` for one that is no JSON."""
    try:
        return answer.json()
    except ValueError:
        return None


def _no_server(error: BaseException) -> bool:
    """Tell whether a request has met no server, or one that went away before it answered."""
    return isinstance(error, requests.ConnectionError | ChunkedEncodingError) and not isinstance(
        error, requests.ReadTimeout
    )


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write weights as safetensors files of about a gibibyte, in the place of those that the folder held."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("model-*.safetensors"):
        file.unlink()
    shard: dict[str, Tensor] = {}
    size, files = 0, 0
    for name, value in weights:
        shard[name] = value.detach().to("cpu", copy=True).contiguous()
        size += value.numel() * value.element_size()
        if size >= _SHARD:
            save_file(shard, folder / f"model-{files:05d}.safetensors")
            shard, size, files = {}, 0, files + 1
    if shard:
        save_file(shard, folder / f"model-{files:05d}.safetensors")
