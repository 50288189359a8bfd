"""
A server that speaks as vLLM's does once it is taught rollouts, and samples by plain forwards of a row alone.

It stands in for vLLM where that is not installed, and lets faults happen on purpose.
"""

import asyncio
import threading
from pathlib import Path

import torch
from aiohttp import web
from safetensors.torch import load_file
from vllm_runs import reference_logits

from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.rollout.engine_models import ENGINE_MODELS, engine_weights
from maple_trl.rollout.engine_rows import unpack_rows
from maple_trl.rollout.merged_weights import tied_name
from maple_trl.rollout.serve_rollouts import SAMPLE, STATE, WEIGHTS, WRONG_WEIGHTS
from maple_trl.rollout.weight_sums import sum_weights


class StandIn:
    """
    Serves a model on a port of this machine, in a thread.

    `choose(number, row)` may say what becomes of a request for completions instead: an exception to tell of, a status, or
    seconds to wait before it is answered.
    """

    def __init__(self, name="builtin:tiny-omni", choose=None, port=0):
        self.model, processor = load_model(name, dtype="float32").eval(), load_processor(name)
        self.family = family_for(self.model, processor)
        self.known = ENGINE_MODELS[self.model.config.model_type]
        self.choose = choose or (lambda number, row: None)
        self.version, self.asked, self.syncs, self.port = None, 0, 0, port
        self.model_length, self.facts = 4096, None

    def __enter__(self):
        self._loop, ready = asyncio.new_event_loop(), threading.Event()

        async def begin():
            app = web.Application(client_max_size=1 << 30)
            paths = {STATE: self._state, WEIGHTS: self._weights, SAMPLE: self._sample}
            app.add_routes([web.route("*", path, handle) for path, handle in paths.items()])
            self._runner = web.AppRunner(app)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", self.port)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            ready.set()

        def run():
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(begin())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(30)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _state(self, request):
        if self.facts is not None:
            return web.Response(text=self.facts)
        type_ = self.model.config.model_type
        facts = {"model_type": type_, "version": self.version, "logprobs_mode": "processed_logprobs"}
        dtype = str(self.model.dtype).removeprefix("torch.")
        return web.json_response({**facts, "dtype": dtype, "model_length": self.model_length})

    async def _weights(self, request):
        body = await request.json()
        self.syncs += 1
        self.version = None
        if body["version"] is None:
            return web.json_response({"sums": None})
        if "folder" in body:
            self.take(body["folder"])
        self.version = body["version"]
        return web.json_response({"sums": sum_weights(self.model.named_parameters())})

    @torch.no_grad()
    def take(self, folder):
        """Load weights by the names that published checkpoints have."""
        found = {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}
        tied = tied_name(self.model)
        for (name, _), (_, value) in zip(
            engine_weights(self.model.named_parameters(), self.known, None), self.model.named_parameters(), strict=True
        ):
            value.copy_(found.pop(name))
        assert list(found) == ([] if tied is None else ["thinker.lm_head.weight"])

    async def _sample(self, request):
        (row,), fields = unpack_rows(await request.read())
        if fields["version"] != self.version:
            return web.json_response({"error": "other weights"}, status=WRONG_WEIGHTS)
        self.asked += 1
        instead = self.choose(self.asked, row)
        if isinstance(instead, Exception):
            return web.json_response({"failure": f"{type(instead).__name__}: {instead}"})
        if isinstance(instead, int):
            return web.json_response({"error": "on purpose"}, status=instead)
        if instead is not None:
            await asyncio.sleep(instead)
        answer = {"token_ids": row.token_ids, "completions": self.complete(row, fields["count"], fields["sampling"])}
        if fields["version"] != self.version:
            return web.json_response({"error": "replaced meanwhile"}, status=WRONG_WEIGHTS)
        return web.json_response(answer)

    def complete(self, row, count, sampling):
        """Sample by a forward of the whole row for each token."""
        ids = torch.tensor(row.token_ids)
        tokens = {kind: int((ids == token).sum()) for kind, token in self.family.placeholder_ids.items()}
        tokens = {kind: number for kind, number in tokens.items() if number}
        prompt = EncodedPrompt("row", ids, row.position_ids, row.media, tokens)
        bias = {int(token): value for token, value in sampling["logit_bias"].items()}
        completions = []
        for i in range(count):
            stream = torch.Generator().manual_seed(sampling["seed"] + i)
            written, logps = torch.empty(0, dtype=torch.long), []
            while len(written) < sampling["max_tokens"] and not set(written[-1:].tolist()) & set(
                sampling["stop_token_ids"]
            ):
                logits = reference_logits(self.model, self.family, prompt, written)[-1] / sampling["temperature"]
                logits[list(bias)] += torch.tensor(list(bias.values()))
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=stream)
                logps.append(float(logits.log_softmax(-1)[chosen]))
                written = torch.cat([written, chosen])
            completions.append([written.tolist(), logps])
        return completions


def main():
    """Serve until the process is ended: `python stand_in_server.py PORT`."""
    import sys

    with StandIn(port=int(sys.argv[1])):
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
