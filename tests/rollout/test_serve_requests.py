"""What a server's paths answer: requests that are none, and several that come at once."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch

from maple_trl.rollout.engine_rows import EngineItem, EngineRow, pack_rows
from maple_trl.rollout.serve_rollouts import SAMPLE, STATE, WEIGHTS, WRONG_WEIGHTS, rollouts


pytest.importorskip("vllm", reason="make test-vllm runs these where vLLM is")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]


class Engine:
    """An engine of which a test says how long it samples, and which sees what is done to it at the same time."""

    def __init__(self):
        self.weights, self.busy, self.paused, self.empties = None, asyncio.Event(), False, True
        self.reason = "stop"
        self.busy.set()
        config = SimpleNamespace(
            hf_config=SimpleNamespace(model_type="tiny"), logprobs_mode="x", dtype=torch.float32, max_model_len=64
        )
        self.vllm_config = SimpleNamespace(model_config=config)

    async def collective_rpc(self, method, kwargs=None):
        if method == "reload_weights":
            assert self.paused
            self.weights = None
            await asyncio.sleep(0.01)
            self.weights = kwargs["weights_path"]
        await asyncio.sleep(0.01)
        return [{"all": self.weights}]

    async def pause_generation(self, mode):
        self.paused = True

    async def resume_generation(self):
        self.paused = False

    async def reset_prefix_cache(self):
        return self.empties

    async def reset_encoder_cache(self):
        pass

    async def generate(self, prompt, params, request_id):
        await self.busy.wait()
        logprobs = [{5: SimpleNamespace(logprob=-1.0)}]
        one = SimpleNamespace(token_ids=[5], logprobs=logprobs, finish_reason=self.reason)
        yield SimpleNamespace(outputs=[one], prompt_token_ids=[1, 2])


def serve(check):
    """Run a coroutine function with an engine, and with what asks it."""

    async def run():
        engine = Engine()
        state = SimpleNamespace(engine_client=engine, maple_processor=None)

        async def ask(path, body=b""):
            async def read():
                return body

            request = SimpleNamespace(url=SimpleNamespace(path=path), body=read, app=SimpleNamespace(state=state))
            answer = await rollouts(request, None)
            return answer.status_code, json.loads(answer.body)

        await check(engine, ask)

    asyncio.run(run())


def row_of(**changes):
    return EngineRow(**{"token_ids": [1, 2], "position_ids": torch.zeros(3, 2, dtype=torch.long), **changes})


def sampling(row=None, **changes):
    return pack_rows([row or row_of()], {"version": "a", "count": 1, "sampling": {"max_tokens": 4}, **changes})


def weights(version, folder):
    return json.dumps({"version": version, "folder": str(folder)}).encode()


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in "ab"]
    for folder in made:
        folder.mkdir()
        (folder / "model.safetensors").touch()
    return made


CLIP = {"video": {"pixel_values_videos": torch.zeros(4, 2), "video_grid_thw": torch.ones(1, 3, dtype=torch.long)}}
NONE_OF_THEM = {
    "no JSON": (WEIGHTS, b"no json"),
    "a list": (WEIGHTS, b"[1]"),
    "no version": (WEIGHTS, b'{"folder": "/nowhere"}'),
    "a number": (WEIGHTS, b'{"version": "b", "folder": 5}'),
    "an unreadable folder": (WEIGHTS, weights("b", "/nowhere")),
    "no rows": (SAMPLE, b"\xff" * 40),
    "empty": (SAMPLE, b""),
    "no sampling": (SAMPLE, pack_rows([row_of()], {"version": "a", "count": 1})),
    "an unknown option": (SAMPLE, sampling(sampling={"speed": 3})),
    "a bad option": (SAMPLE, sampling(sampling={"temperature": -1.0})),
    "no completion": (SAMPLE, sampling(count=0)),
    "two rows": (SAMPLE, pack_rows([row_of(), row_of()], {"version": "a", "count": 1, "sampling": {}})),
    "texts for tokens": (SAMPLE, sampling(row_of(token_ids=["a", "b"]))),
    "other positions": (SAMPLE, sampling(row_of(position_ids=torch.zeros(3, 5)))),
    "positions of text": (
        SAMPLE,
        sampling(row_of(position_ids=torch.zeros(1, 2), media=CLIP, items={"video": [EngineItem(0, 1, None, "d")]})),
    ),
    "a clip behind the end": (SAMPLE, sampling(row_of(media=CLIP, items={"video": [EngineItem(1, 4, None, "d")]}))),
    "a clip without features": (SAMPLE, sampling(row_of(items={"video": [EngineItem(0, 1, None, "d")]}))),
    "more clips than features": (
        SAMPLE,
        sampling(row_of(media=CLIP, items={"video": [EngineItem(0, 1, None, "d")] * 2})),
    ),
    "another mask": (
        SAMPLE,
        sampling(row_of(media=CLIP, items={"video": [EngineItem(0, 2, torch.ones(1, dtype=torch.bool), "d")]})),
    ),
}


def test_requests_that_are_none(folders):
    """Each is the sender's fault, and the server has the weights that it had before."""

    async def check(engine, ask):
        assert (await ask(WEIGHTS, weights("a", folders[0])))[0] == 200
        for name, (path, body) in NONE_OF_THEM.items():
            status, answer = await ask(path, body)
            assert status == 400 and answer["error"], (name, status, answer)
        assert (await ask(STATE))[1]["version"] == "a" and engine.weights == str(folders[0])
        assert (await ask(SAMPLE, sampling()))[1] == {"token_ids": [1, 2], "completions": [[[5], [-1.0]]]}

    serve(check)


def test_two_runs_at_once(folders):
    """However their weights come, the version that is told is that of the weights that there are."""

    async def check(engine, ask):
        answers = await asyncio.gather(
            *(ask(WEIGHTS, weights(f"{folder.name}{i}", folder)) for i in range(3) for folder in folders)
        )
        told = (await ask(STATE))[1]["version"]
        assert engine.weights.endswith(f"/{told[0]}")
        for (_, answer), folder in zip(answers, folders * 3, strict=True):
            assert answer["sums"] == {"all": str(folder)}

    serve(check)


def test_completions_of_weights_that_were_replaced_meanwhile(folders):
    async def check(engine, ask):
        await ask(WEIGHTS, weights("a", folders[0]))
        engine.busy.clear()
        under_way = asyncio.create_task(ask(SAMPLE, sampling()))
        await asyncio.sleep(0.01)
        await ask(WEIGHTS, weights("b", folders[1]))
        engine.busy.set()
        assert (await under_way)[0] == WRONG_WEIGHTS

    serve(check)


def test_an_engine_that_does_not_do_as_it_is_told(folders):
    """A cache that stays, or a request that is broken off, is no success."""

    async def check(engine, ask):
        await ask(WEIGHTS, weights("a", folders[0]))
        engine.reason = "abort"
        assert "ended the request early (abort)" in (await ask(SAMPLE, sampling()))[1]["failure"]
        engine.empties = False
        status, answer = await ask(WEIGHTS, weights("b", folders[1]))
        assert status == 500 and "cache of prefixes" in answer["error"] and not engine.paused
        assert (await ask(STATE))[1]["version"] is None
        assert (await ask(SAMPLE, sampling()))[0] == WRONG_WEIGHTS
        assert (await ask(SAMPLE, sampling(version=None)))[0] == WRONG_WEIGHTS

    serve(check)
