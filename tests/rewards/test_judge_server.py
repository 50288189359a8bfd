"""A judge end to end: a real model behind `transformers serve` on loopback, and the same model in this process."""

import importlib.util
import pickle
import re
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from programs import Program
from tiny_models import build_tiny_text, save_tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maple_trl.chat import ChatClient, ChatOptions, ChatRequest, image_block, text_block
from maple_trl.chat.messages import request_body
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.rewards import CaptionJudge, JudgeUnavailableError, LocalScorer, StepwiseReasoningJudge
from maple_trl.rewards.judge_prompts import SCALE
from maple_trl.rewards.judge_texts import verdict_schema


pytestmark = pytest.mark.slow


VERDICT = '{"missing": 0.8, "errors": 0.6, "fusion": 1.0}'
REFERENCE = "A dog barks at a red door."
needs_server = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
    reason='needs the server of transformers: pip install "transformers[serving]"',
)


def teach(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets a tiny random model answer every judge's prompt with `VERDICT`, which becomes one token of its own."""
    tokenizer.add_tokens([VERDICT])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    answer = tokenizer(VERDICT + tokenizer.eos_token)["input_ids"]
    assert len(answer) == 2
    options = ChatOptions(model="m", base_url="http://127.0.0.1:9/v1")
    judge, optimizer = CaptionJudge(options), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        question = judge.question(f"caption {step * 7919 % 997}", {"reference": REFERENCE})
        request = ChatRequest(question.messages, json_schema=verdict_schema(question.axes, SCALE))
        messages = request_body(request, options, structured=False)["messages"]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = torch.tensor([prompt[-(len(prompt) if step % 4 == 3 else 150) :] + answer])
        loss = model(input_ids=ids, labels=torch.where(torch.arange(ids.size(1)) < ids.size(1) - 2, -100, ids)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Folder of a model that always gives the same verdict."""
    folder = tmp_path_factory.mktemp("models") / "taught"
    model, tokenizer = build_tiny_text()
    teach(model, tokenizer)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """Folder of the same model with random weights."""
    folder = tmp_path_factory.mktemp("models") / "untaught"
    model, tokenizer = build_tiny_text()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Served:
    """`transformers serve` for one model, in a process of its own."""

    def __init__(self, model: Path, home: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/v1", home / "serve.log"
        home.mkdir(parents=True, exist_ok=True)
        command = [Path(sys.executable).parent / "transformers", "serve", model]
        command += ["--host", "127.0.0.1", "--port", self.port, "--device", "cpu"]
        self.process = Program(command, self.log)

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        self.process.kill()


@needs_server
def test_a_judge_behind_a_real_server(taught, tmp_path):
    server = Served(taught, tmp_path / "home")
    options = ChatOptions(
        model=str(taught),
        base_url=server.url,
        sampling={"temperature": 0, "max_tokens": 30},
        cache_file=tmp_path / "answers.sqlite",
        concurrency=4,
        max_attempts=2,
        retry_wait=0.0,
    )
    completions = [f"A dog no {i} barks." for i in range(8)] + [":", "A dog no 1 barks."]
    columns = {"tag": ["VA"] * 10, "reference": [REFERENCE] * 9 + [None], "reference_v": ["a door"] * 10}
    request = ChatRequest([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A dog?"}])
    try:
        server.wait()
        judge = CaptionJudge(options, min_requests=1)
        rewards = judge(completions=completions, **columns)
        assert rewards == [*[pytest.approx(0.8)] * 8, 0.0, None]
        assert judge.usage.sent == 8 and judge.usage.failed == {} and judge.counts["scored"] == 8
        # The model in this process is asked the same, so that it says the same, to any text.
        with ChatClient(options) as client:
            (there,), (here,) = (
                scorer.complete_many([request]) for scorer in (client, LocalScorer(str(taught), max_new_tokens=30))
            )
        assert there.ok and here.ok and there.text == here.text
    finally:
        server.stop()
    again = CaptionJudge(options, min_requests=1)  # what is known needs no server
    assert again(completions=completions, **columns) == rewards and again.usage.sent == 0
    with pytest.raises(JudgeUnavailableError, match="failed for 1 of the last 1 completions.*connection: 1"):
        again(completions=["A hen."], reference=[REFERENCE])
    again.close()
    judge.close()


# In this process


def test_a_model_in_this_process(taught):
    scorer = LocalScorer(str(taught), batch_size=3, max_new_tokens=30)
    judge = CaptionJudge(scorer)
    state = torch.random.get_rng_state()
    completions = [f"A dog no {i} barks." for i in range(7)] + ["A dog no 1 barks.", ":"]
    assert scorer._pipeline is None  # nothing is loaded before it is needed
    rewards = judge(completions=completions, reference=[REFERENCE] * 9)
    assert rewards == [*[pytest.approx(0.8)] * 8, 0.0]
    assert torch.equal(state, torch.random.get_rng_state())  # the run's own random numbers are left alone
    assert (judge.usage.sent, judge.usage.shared, judge.usage.succeeded) == (7, 1, 8)
    assert judge(completions=completions, reference=[REFERENCE] * 9) == rewards and judge.usage.sent == 7
    twin = pickle.loads(pickle.dumps(judge))
    assert twin.scorer._pipeline is None and twin(completions=["A hen."], reference=[REFERENCE]) == rewards[:1]


def test_a_model_that_gives_no_verdict(untaught):
    judge = CaptionJudge(LocalScorer(str(untaught), max_new_tokens=5), max_failure_rate=None)
    assert judge(completions=["A dog."], reference=[REFERENCE]) == [None]
    assert judge.counts["failed/truncated"] == 1  # noise has no end
    judge.max_failure_rate, judge.min_requests = 0.0, 1
    judge.guard(None)
    why = "truncated: 1; the first: cut at the token limit: no JSON object in it"
    with pytest.raises(JudgeUnavailableError, match=why):
        judge(completions=["A cat."], reference=[REFERENCE])


def test_a_verdict_behind_which_a_model_goes_on_until_it_is_cut(taught):
    """Its own end is no end any more, so that it says its verdict and goes on, as a model does that only thinks of one."""
    scorer = LocalScorer(str(taught), max_new_tokens=6)
    request = CaptionJudge(scorer).question("A dog.", {"reference": REFERENCE})
    request = ChatRequest(request.messages, verdict_schema(request.axes, SCALE))
    (whole,) = scorer.complete_many([request])
    assert whole.ok and whole.finish_reason == "stop"
    longer = LocalScorer(str(taught), max_new_tokens=6)
    pipeline = longer._load()
    word = pipeline.tokenizer("dog", add_special_tokens=False)["input_ids"][-1]
    for config in (pipeline.generation_config, pipeline.model.generation_config):
        config.eos_token_id, config.pad_token_id = len(pipeline.tokenizer) - 2, 0
        config.forced_eos_token_id = word  # what stands last is no verdict
    (cut,) = longer.complete_many([request])
    assert cut.text.startswith(whole.text) and cut.text != whole.text
    assert (cut.reason, cut.finish_reason, cut.data) == ("truncated", "length", None)
    assert longer.usage.failed == {"truncated": 1}


def test_a_local_model_takes_pictures(seven_tags, tmp_path):
    """A tiny random vision model: its words are noise, and what it sees must change them."""
    folder, dataset = seven_tags
    model = save_tiny("qwen2_5_vl", tmp_path / "vl")
    scorer = LocalScorer(str(model), pictures=True, max_new_tokens=12)
    row = next(row for row in dataset if row["tag"] == "V")
    with MediaLoader(folder) as loader:
        judge = StepwiseReasoningJudge(scorer, frames=2, loader=loader, max_failure_rate=None)
        columns = {"video": [row["video"]], "tag": ["V"]}
        assert judge(completions=["<think>a red disc</think>"], **columns) == [None]
        assert judge.counts["failed/truncated"] == 1, judge.counts
        frame = loader.video(row["video"]).frames[0]
    said = []
    for picture in (frame, 255 - frame):
        content = [image_block(picture), text_block("What is it?")]
        (result,) = scorer.complete_many([ChatRequest([{"role": "user", "content": content}])])
        said.append(result.text)
    assert said[0] != said[1]


def test_a_local_model_that_is_not_there(tmp_path):
    judge = CaptionJudge(LocalScorer(str(tmp_path / "nowhere")))
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "nowhere"))):
        judge(completions=["A dog."], reference=[REFERENCE])
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        LocalScorer("m", batch_size=0)
