"""`maple-trl eval --server`: what a chat endpoint is sent, what becomes of its answers and faults, and a real server."""

import base64
import io
import json
import wave
from collections import Counter
from functools import partial

import eval_runs
import numpy as np
import pytest
from aiohttp import web
from chat_server import ChatServer, broken_off, completion, say, status, thinking_model
from eval_runs import SMALL, lines_of, result_of
from PIL import Image
from test_judge_server import Served, needs_server
from tiny_models import build_tiny_text, save_tiny

from maple_trl.data import default_folder, load_seven_tags
from maple_trl.jobs import models
from maple_trl.omni.media.loader import MediaLimits, MediaLoader


pytestmark = pytest.mark.slow


TAGS = ["V", "A", "S", "VA", "VS", "AS", "VAS"]
ASKED = ["--data", "builtin:seven-tags", *SMALL, "--samples", "2", "--batch-size", "3", "--quiet"]
evaluate = partial(eval_runs.evaluate, "--model", "served")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Retries come without the wait that spares a real server."""
    monkeypatch.setattr(models, "ChatOptions", partial(models.ChatOptions, retry_wait=0.01))


def blocks(body, kind):
    content = [message["content"] for message in body["messages"]]
    return [block for part in content if not isinstance(part, str) for block in part if block["type"] == kind]


def text_of(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def is_question(body):
    """Whether a call is one of the evaluation's own, and not one that tries the server."""
    return "seed" in body


def answers(choose, hears=True, sees=True, counts=True):
    """A server that takes every medium, or leaves some out without a word, and answers as `choose(body)` says."""

    def act(number, body):
        tokens = 10 + len(text_of(body)) // 4 + sees * 20 * len(blocks(body, "image_url"))
        tokens += sees * 90 * len(blocks(body, "video_url")) + hears * 30 * len(blocks(body, "input_audio"))
        found = choose(body) if is_question(body) else "A"
        if callable(found):
            return found
        reply = completion(found, prompt_tokens=tokens, completion_tokens=3)
        if not counts:
            del reply["usage"]

        async def send(request, body):
            return web.json_response(reply)

        return send

    return act


def always(letter):
    return answers(lambda body: f"<think>so</think><answer>{letter}</answer>")


class ListingServer(ChatServer):
    """A [`ChatServer`] that also tells which models it has, as vLLM does."""

    async def _start(self):
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._handle)
        card = {"id": "served", "object": "model", "owned_by": "vllm", "root": "org/base", "max_model_len": 4096}
        app.router.add_get("/v1/models", lambda request: self._list(card))
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]

    async def _list(self, card):
        return web.json_response({"object": "list", "data": [card]})


# What is sent


def test_rows_are_sent_with_exactly_their_signals(tmp_path):
    """Frames, sound and subtitle arrive as the loader gives them; what an access leaves out does not arrive."""
    row = next(row for row in load_seven_tags()["test"] if row["tag"] == "VAS")
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    words = [*ASKED, "--data", tmp_path, "--media-root", default_folder(), "--access", ",".join(TAGS)]
    words += ["--concurrency", "1"]  # so that the calls arrive in the order of the samples
    with ChatServer(always("B")) as server:
        assert evaluate(*words, "--server", server.url, "--output", tmp_path / "out") == 0
        calls = [call.body for call in server.calls if is_question(call.body)]
    assert len(calls) == 14
    with MediaLoader(default_folder(), MediaLimits(num_frames=4, max_pixels=3136), backend="pyav") as loader:
        clip, sound = loader.video(row["video"]), loader.audio(row.get("audio") or row["video"])
        frames, times = clip.frames, "".join(f"<{second:.1f} seconds>" for second in clip.timestamps)
        words_said = loader.subtitle(row["subtitle"])
    for access, sent in zip([tag for tag in TAGS for _ in range(2)], calls, strict=True):
        pictures = [block["image_url"]["url"] for block in blocks(sent, "image_url")]
        assert len(pictures) == (len(frames) if "V" in access else 0)
        assert (times in text_of(sent)) == ("V" in access)
        for picture, frame in zip(pictures, frames, strict=False):
            prefix, data = picture.split(",")
            assert prefix == "data:image/jpeg;base64"
            seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            assert seen.shape == frame.shape and np.abs(seen.astype(int) - frame).mean() < 12
        heard = blocks(sent, "input_audio")
        assert len(heard) == ("A" in access)
        if heard:
            assert heard[0]["input_audio"]["format"] == "wav"
            with wave.open(io.BytesIO(base64.b64decode(heard[0]["input_audio"]["data"]))) as file:
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
                assert (file.getframerate(), file.getnchannels()) == (16_000, 1)
            assert np.abs(samples - sound.waveform).max() < 1e-4
        assert (words_said in text_of(sent)) == ("S" in access) and row["question"] in text_of(sent)
        assert sent["model"] == "served" and sent["max_tokens"] == 14 and sent["temperature"] == 1.0
        assert {"top_k", "min_p", "n", "stream"}.isdisjoint(sent)
    # Samples differ in their seed, and it does not depend on the access.
    assert [call["seed"] for call in calls] == [calls[0]["seed"], calls[1]["seed"]] * 7
    assert calls[0]["seed"] != calls[1]["seed"]


def test_numbers_follow_from_the_answers_and_repeat(tmp_path):
    words = [*ASKED, "--limit", "20", "--access", "required,S", "--server"]
    with ChatServer(always("B")) as server:
        assert evaluate(*words, server.url, "--output", tmp_path / "one") == 0
        asked = sum(is_question(call.body) for call in server.calls)
        assert evaluate(*words, server.url, "--output", tmp_path / "one") == 0  # nothing is asked again
        assert sum(is_question(call.body) for call in server.calls) == asked == 80
    with ChatServer(always("B")) as server:  # at another port: the same evaluation
        assert evaluate(*words, server.url, "--output", tmp_path / "two") == 0
    assert (tmp_path / "one" / "result.json").read_bytes() == (tmp_path / "two" / "result.json").read_bytes()
    found = result_of(tmp_path / "one")
    rows = load_seven_tags()["test"].select(range(20))
    share = sum(solution == "B" for solution in rows["solution"]) / 20
    assert 0 < share < 1
    for access in ("required", "S"):
        assert found["accesses"][access]["accuracy"]["sample_mean"]["value"] == pytest.approx(share)
        assert found["accesses"][access]["completions"]["questions_with_equal_samples"] == 20
    assert (
        found["device"] == "server"
        and found["model"]["name"] == "served"
        and found["model"]["video_as"] == "timed_images"
    )
    assert found["generation"] == {"max_tokens": 14, "temperature": 1.0, "top_p": 1.0}
    assert server.url not in json.dumps(found)
    (line, *_) = lines_of(tmp_path / "one")
    assert line["answer"] == "B" and line["finish"] == "end" and line["completion_tokens"] == 3
    assert line["prompt_tokens"] > 10 and line["video_tokens"] is None and line["inputs"]


def test_a_vllm_server_is_told_all_that_decides_its_sampling(tmp_path):
    words = [*ASKED, "--limit", "2", "--filter", '{"tag": ["V"]}', "--server-video", "video_url"]
    words += ["--chat-template-kwargs", '{"enable_thinking": false}', "--generation", '{"presence_penalty": 0.1}']
    with ListingServer(always("B")) as server:
        assert evaluate(*words, "--server", server.url, "--output", tmp_path / "out") == 0
        sent = next(call.body for call in server.calls if is_question(call.body))
    (block,) = blocks(sent, "video_url")
    kind, pictures = block["video_url"]["url"].split(";base64,")
    assert kind == "data:video/jpeg" and len(pictures.split(",")) == 4 and not blocks(sent, "image_url")
    for picture in pictures.split(","):
        Image.open(io.BytesIO(base64.b64decode(picture))).load()
    fields = {"max_tokens": 14, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    fields |= {"chat_template_kwargs": {"enable_thinking": False}, "presence_penalty": 0.1}
    assert result_of(tmp_path / "out")["generation"] == fields
    assert {name: sent[name] for name in fields} == fields
    video = sent["media_io_kwargs"]["video"]
    assert video["num_frames"] == 4 and video["fps"] > 1
    server_info = {"kind": "vllm", "root": "org/base", "max_length": 4096}
    assert result_of(tmp_path / "out")["model"]["server"] == server_info


# Servers that cannot


def refusing(kind):
    def choose(number, body):
        if blocks(body, kind):
            return status(400, f"this model takes no {kind}")
        return always("B")(number, body)

    return choose


@pytest.mark.parametrize(
    "choose, message",
    [
        (refusing("image_url"), "the server does not take video as timed_images: bad-request: HTTP 400"),
        (refusing("input_audio"), "the server does not take audio: bad-request: HTTP 400"),
        (
            answers(lambda body: "B", hears=False),
            "the server ignores audio: a prompt has 15 tokens with it and 15 without",
        ),
        (answers(lambda body: "B", sees=False), "the server ignores video"),
        (lambda number, body: status(401, "who are you"), "does not answer a text: unauthorized"),
    ],
)
def test_a_server_that_takes_no_media_is_refused_before_the_first_question(tmp_path, capsys, choose, message):
    with ChatServer(choose) as server:
        assert evaluate(*ASKED, "--limit", "9", "--server", server.url, "--output", tmp_path) == 1
        assert not any(is_question(call.body) for call in server.calls)
    assert message in capsys.readouterr().err and not (tmp_path / "result.json").exists()


def test_a_server_of_text_alone_answers_what_needs_no_more(tmp_path, caplog):
    with ChatServer(answers(lambda body: "<answer>B</answer>", hears=False, sees=False)) as server:
        assert evaluate(*ASKED, "--limit", "4", "--access", "S", "--server", server.url, "--output", tmp_path) == 0
    with ChatServer(answers(lambda body: "B", counts=False)) as server:  # nothing tells whether it reads media
        words = [*ASKED, "--limit", "4", "--access", "V", "--server", server.url]
        assert evaluate(*words, "--output", tmp_path / "uncounted") == 0
    assert "counts no tokens: whether it reads video cannot be told" in caplog.text
    assert {line["prompt_tokens"] for line in lines_of(tmp_path / "uncounted")} == {None}


def test_nothing_answers(tmp_path, capsys):
    assert evaluate(*ASKED, "--server", "http://127.0.0.1:9/v1", "--output", tmp_path, "--timeout", "2") == 1
    assert "http://127.0.0.1:9/v1: nothing answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--adapter", "a"], "--adapter: no effect on a model behind --server"),
        (["--dtype", "bfloat16", "--max-media-tokens", "9"], "--dtype, --max-media-tokens: no effect"),
        (["--server-video", "gif"], "must be one of timed_images, images, video_url, got 'gif'"),
        (["--generation", '{"seed": 1}'], "generation: seed is set by --seed"),
        (["--generation", '{"max_completion_tokens": 9}'], "max_completion_tokens is set by --max-new-tokens"),
        (["--generation", '{"n": 4}'], "sampling must not hold 'n'"),
        (["--server", "localhost:8000"], "base_url must look like http://HOST:PORT/v1"),
        (["--api-key-file", "nowhere"], "api_key_file nowhere: No such file"),
        (["--concurrency", "0"], "concurrency must be in [1, 1000], got 0"),
    ],
)
def test_options_that_a_server_does_not_have(tmp_path, capsys, words, message):
    with ChatServer(always("B")) as server:
        assert evaluate(*ASKED, "--server", server.url, *words, "--output", tmp_path) == 2
    assert message in capsys.readouterr().err


# Faults


def test_a_server_that_fails_in_the_middle_loses_nothing(tmp_path, capsys):
    words = [*ASKED, "--limit", "12", "--server"]
    with ChatServer(always("C")) as server:
        assert evaluate(*words, server.url, "--output", tmp_path / "whole") == 0
    seen = Counter()

    def dies(body):
        seen["calls"] += 1
        return status(401, "the key has expired") if seen["calls"] > 13 else "<think>so</think><answer>C</answer>"

    with ChatServer(answers(dies)) as server:
        assert evaluate(*words, server.url, "--output", tmp_path / "cut") == 1
    told = capsys.readouterr().err
    assert (
        "row 6, access required: the server failed: unauthorized" in told and "goes on from the last finished" in told
    )
    assert len(list((tmp_path / "cut" / "batches").glob("*.parquet"))) == 2
    with ChatServer(always("C")) as server:
        assert evaluate(*words, server.url, "--output", tmp_path / "cut") == 0
        assert sum(is_question(call.body) for call in server.calls) == 12
    for name in ("result.json", "rows.parquet"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_request_that_is_refused_is_an_error_by_name(tmp_path, capsys):
    rows = load_seven_tags()["test"].select(range(6)).to_list()
    rows[2]["prompt"][0]["content"] += " forbidden words"
    rows[4]["prompt"] = "plain text"
    rows[5]["video"] = "nowhere.mp4"
    rows[5]["tag"] = "V"
    for name in ("audio", "subtitle"):
        rows[4][name] = rows[5][name] = None
    rows[4] |= {"video": None, "tag": None}
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refuse = status(400, "blocked", code="content_filter")
    choose = answers(lambda body: refuse if "forbidden" in text_of(body) else "<answer>B</answer>")
    words = [*ASKED, "--data", tmp_path, "--media-root", default_folder()]
    with ChatServer(choose) as server:
        assert evaluate(*words, "--server", server.url, "--output", tmp_path / "out") == 1
    found = result_of(tmp_path / "out")
    reasons = {error["row"]: error["reason"] for error in found["errors"]}
    assert reasons == {2: "server-content-filter", 4: "invalid-row", 5: "not-found"}
    assert "plain text; a server puts every prompt into its chat template" in found["errors"][1]["detail"]
    assert found["accesses"]["required"]["counts"]["scored"] == 3


def test_odd_answers_are_answers(tmp_path):
    """No text, text that was cut, halves of surrogate pairs, and text in other scripts."""
    texts = {0: "", 1: None, 2: "half \ud83d of a pair", 3: "Antwort: ж中😀 <answer>B</answer>"}
    rows = load_seven_tags()["test"].select(range(4))
    by_text = {row["question"] + row["id"]: place for place, row in enumerate(rows)}
    data = [
        {**row, "prompt": [{"role": "user", "content": row["question"] + row["id"]}], "tag": None, "video": None}
        | {"audio": None, "subtitle": None}
        for row in rows
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))

    def act(body):
        place = by_text[text_of(body)]
        return say(texts[place], finish_reason="length" if place == 1 else "stop")

    words = ["--data", tmp_path, "--samples", "1", "--temperature", "0", "--quiet", "--max-new-tokens", "9"]
    with ChatServer(answers(act)) as server:
        assert evaluate(*words, "--server", server.url, "--output", tmp_path / "out") == 0
    lines = lines_of(tmp_path / "out")
    assert [line["status"] for line in lines] == ["scored"] * 4
    assert [line["completion"] for line in lines] == ["", "", "half ? of a pair", texts[3]]
    assert [line["finish"] for line in lines] == ["end", "length", "end", "end"]
    assert lines[3]["answer"] == "B"


TEXT = [
    "--data",
    "builtin:seven-tags",
    "--access",
    "S",
    "--max-new-tokens",
    "14",
    "--quiet",
    "--filter",
    '{"tag": ["S"]}',
]


def test_an_answer_that_the_server_gave_up_is_not_a_wrong_one(tmp_path, capsys):
    words = [*TEXT, "--samples", "1", "--limit", "3", "--batch-size", "1", "--server"]
    half = broken_off("<think>I hear", {"code": 502, "message": "provider disconnected"})
    seen = Counter()

    def once(body):
        seen["calls"] += 1
        return half if seen["calls"] == 2 else "<think>so</think><answer>B</answer>"

    with ChatServer(answers(once)) as server:
        assert evaluate(*words, server.url, "--output", tmp_path / "once") == 0
    lines = lines_of(tmp_path / "once")
    assert {line["answer"] for line in lines} == {"B"} and seen["calls"] == 4
    assert {line["completion_tokens"] for line in lines} == {3}  # of the answer, not of what was given up too
    with ChatServer(answers(lambda body: half)) as server:
        assert evaluate(*words, server.url, "--output", tmp_path / "always") == 1
    assert "the server failed: server-error: error object in a successful response" in capsys.readouterr().err


def test_a_model_that_takes_no_sampling_is_asked_and_noted(tmp_path, caplog):
    """OpenAI's models that reason: another name of the limit, no temperature, and no answer within one token."""
    out_of_tokens = status(400, "Could not finish the message because max_tokens or model output limit was reached.")

    def answer(number, body):
        return out_of_tokens if body["max_completion_tokens"] == 1 else always("B")(number, body)

    words = [*TEXT, "--samples", "2", "--limit", "2", "--temperature", "0.5", "--server"]
    with ChatServer(thinking_model(answer)) as server:
        assert evaluate(*words, server.url, "--output", tmp_path / "out") == 0
        asked = [call.body for call in server.calls if is_question(call.body) and "max_completion_tokens" in call.body]
    assert {body["max_completion_tokens"] for body in asked} == {14} and "temperature" not in asked[-1]
    lines = lines_of(tmp_path / "out")
    assert [line["answer"] for line in lines] == ["B"] * 4 and {line["completion_tokens"] for line in lines} == {3}
    assert {tuple(line["notes"]) for line in lines} == {("model-default-temperature",)}
    assert result_of(tmp_path / "out")["accesses"]["S"]["completions"]["note:model-default-temperature"] == 4
    told = [text for text in caplog.messages if "takes no" in text]
    assert len(told) == 2 and any("temperature=0.5 is left out" in text for text in told)


def test_media_are_tried_with_a_model_that_takes_no_sampling(tmp_path, capsys):
    """The calls that it refused count no tokens, and must not make a picture look as if it had been read."""
    words = [*ASKED, "--limit", "2", "--concurrency", "1", "--filter", '{"tag": ["V"]}', "--server"]
    with ChatServer(thinking_model(answers(lambda body: "B", sees=False), ("max_tokens", "temperature"))) as server:
        assert evaluate(*words, server.url, "--output", tmp_path / "blind") == 1
    assert "the server ignores video: a prompt has 15 tokens with it and 15 without" in capsys.readouterr().err
    with ChatServer(thinking_model(always("B"), ("max_tokens", "temperature"))) as server:
        assert evaluate(*words, server.url, "--output", tmp_path / "seeing") == 0


# A real server


@needs_server
def test_a_real_server_that_sees(tmp_path, capsys):
    """`transformers serve` with a tiny random vision model: what it is shown changes the tokens it reads."""
    model = save_tiny("qwen2_5_vl", tmp_path / "vl")
    server = Served(model, tmp_path / "home")
    words = ["--data", "builtin:seven-tags", "--num-frames", "4", "--max-pixels", "3136", "--max-new-tokens", "6"]
    words += ["--samples", "1", "--temperature", "0", "--quiet", "--filter", '{"tag": ["V"]}', "--limit", "3"]
    try:
        server.wait()
        words = ["--model", model, *words, "--server", server.url]
        assert eval_runs.evaluate(*words, "--output", tmp_path / "seen", "--access", "V,S") == 0
        assert eval_runs.evaluate(*words, "--output", tmp_path / "again", "--access", "V,S") == 0
        assert eval_runs.evaluate(*words, "--output", tmp_path / "heard", "--access", "A") == 1
        assert "the server does not take audio" in capsys.readouterr().err
    finally:
        server.stop()
    lines = lines_of(tmp_path / "seen")
    assert {line["status"] for line in lines} == {"scored"} and len(lines) == 6
    shown = {line["row"]: line["prompt_tokens"] for line in lines if line["access"] == "V"}
    told = {line["row"]: line["prompt_tokens"] for line in lines if line["access"] == "S"}
    assert all(shown[row] > told[row] for row in shown)  # frames are more tokens than the few words of a subtitle
    assert [line["completion"] for line in lines] == [line["completion"] for line in lines_of(tmp_path / "again")]


@needs_server
def test_a_real_server_that_leaves_out_what_it_does_not_know(tmp_path, capsys):
    """`transformers serve` gives a text model the text of a message and drops its pictures without a word."""
    model, tokenizer = build_tiny_text()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "text")
    server = Served(tmp_path / "text", tmp_path / "home")
    words = ["--model", tmp_path / "text", *ASKED, "--limit", "4", "--server", server.url, "--output"]
    try:
        server.wait()
        assert eval_runs.evaluate(*words, tmp_path / "seen", "--access", "V") == 1
        assert "the server ignores video: a prompt has" in capsys.readouterr().err
        assert eval_runs.evaluate(*words, tmp_path / "read", "--access", "S") == 0
    finally:
        server.stop()
    assert result_of(tmp_path / "read")["accesses"]["S"]["counts"]["scored"] == 4
