"""The papers' figures in `maple-trl report`: the numbers behind them, against computations of their own from a run's files."""

import itertools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer, say
from eval_runs import MODEL, evaluate
from media_files import copy_small_set
from tiny_models import build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer, MAPOConfig, MAPOTrainer, cli
from maple_trl.algorithms import tas_weights
from maple_trl.evaluation.critical_steps import read_reasoning, split_steps
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.records.rollouts import write_rollout
from maple_trl.reports import write_embeddings
from maple_trl.reports.embeddings import text_vectors


ROOT = Path(__file__).resolve().parents[2]
TAGS = ("V", "S", "VAS")
G = 4

JOB = """\
trainer: mapo
model_name_or_path: builtin:tiny-omni
dtype: float32
reward_funcs: [figure_reward:by_wording]
num_frames: 4
max_pixels: 3136
max_completion_length: 10
num_generations: 4
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
learning_rate: 1.0e-3
logging_steps: 1
save_strategy: "no"
report_to: none
use_cpu: true
bf16: false
disable_tqdm: true
gradient_checkpointing: false
evaluate_before_after: false
"""

# The first clip teaches nothing: all its completions are rewarded alike.
REWARD = """
def by_wording(completions, clip, **columns):
    texts = [c[0]["content"] for c in completions]
    return [0.25 if name == "first" else sum(map(ord, text)) % 11 / 11 for text, name in zip(texts, clip)]
"""


def rows_of_two_clips(folder):
    """Two clips, each asked about under three tags; a subtitle alone does not say of which clip it is, so a column does."""
    rows = [row for row in copy_small_set(folder, seed=5) if row["tag"] == "VAS"][:2]
    return [
        row | {"tag": tag, "id": f"{name}-{tag}", "clip": name}
        for row, name in zip(rows, ("first", "second"), strict=True)
        for tag in TAGS
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two jobs through the command line, that filter from the first step and from the second epoch on."""
    folder = tmp_path_factory.mktemp("figures")
    rows = rows_of_two_clips(folder / "data")
    for file in (folder / "data").glob("*.parquet"):
        file.unlink()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "job.yaml").write_text(JOB)
    (folder / "figure_reward.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for mode, epochs in (("early", 1), ("mid", 2)):
            words = ["--config", "job.yaml", "--dataset_name", "data", "--dynamic_sampling", mode]
            words += ["--num_train_epochs", str(epochs), "--output_dir", mode]
            assert cli.main(["train", *words]) == 0
    sys.modules.pop("figure_reward", None)
    return folder


def report(tmp_path, *words):
    """The JSON data of a report by the command."""
    words = ["report", *map(str, words), "--output", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json")]
    assert cli.main(words) == 0
    return json.loads((tmp_path / "r.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "reward" in entry]


def rollouts_of(folder):
    return [pq.read_table(path).to_pylist() for path in sorted((folder / "rollouts").glob("*.parquet"))]


def by(lines, name):
    found = defaultdict(list)
    for line in lines:
        found[line[name]].append(line)
    return found


# What trainers log


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "epoch_that_filters"), [("early", 0), ("mid", 1)])
def test_scores_of_what_is_kept_and_of_all(runs, tmp_path, mode, epoch_that_filters):
    (found,) = report(tmp_path, runs / mode)["runs"]
    log, rollouts = log_of(runs / mode), rollouts_of(runs / mode)
    assert len(log) == len(rollouts) == 3 * (epoch_that_filters + 1)
    differing = 0
    for i, (entry, lines) in enumerate(zip(log, rollouts, strict=True)):
        groups = [[line["reward"] for line in group] for group in by(lines, "id").values()]
        assert [len(group) for group in groups] == [G, G]
        filters = i >= 3 * epoch_that_filters
        kept = [r for group in groups if not filters or max(group) - min(group) > 1e-6 for r in group]
        (tag,) = {line["tag"] for line in lines}
        for name in (tag, "all"):
            assert entry[f"tag/{name}/reward"] == pytest.approx(fmean(itertools.chain(*groups)), abs=1e-6)
            if kept:
                assert entry[f"tag/{name}/reward_kept"] == pytest.approx(fmean(kept), abs=1e-6)
            else:
                assert f"tag/{name}/reward_kept" not in entry
        differing += len(kept) not in (0, 2 * G)
        if not filters:
            assert entry["tag/all/reward_kept"] == pytest.approx(entry["tag/all/reward"])
    assert differing, "no rollout lost a group: nothing was compared"
    metrics = found["curves"]["metrics"]
    told = {entry["step"]: entry["tag/all/reward_kept"] for entry in log if "tag/all/reward_kept" in entry}
    curve = metrics["tag/all/reward_kept"]
    assert dict(zip(curve["step"], curve["value"], strict=True)) == pytest.approx(told, rel=1e-5)


@pytest.mark.slow
def test_prompt_tokens_are_those_of_the_prompts(runs, tmp_path):
    """Against the prompts, encoded anew by a trainer of their own; and of a text-only model against its chat template."""
    from datasets import Dataset

    rows = Dataset.from_list(rows_of_two_clips(tmp_path / "data"))
    args = MAPOConfig(
        output_dir=str(tmp_path / "x"),
        media_root=str(tmp_path / "data"),
        num_frames=4,
        max_pixels=3136,
        per_device_train_batch_size=8,
        num_generations=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = MAPOTrainer(
        load_model("builtin:tiny-omni", dtype="float32"),
        lambda completions, **_: [0.0] * len(completions),
        args,
        rows,
        processing_class=load_processor("builtin:tiny-omni"),
    )
    lengths = {
        row["id"]: len(prompt.input_ids) for row, prompt in zip(*trainer.encode_rows(rows.to_list()), strict=True)
    }
    assert len(set(lengths.values())) > 1
    for entry, lines in zip(log_of(runs / "mid"), rollouts_of(runs / "mid"), strict=True):
        expected = fmean(lengths[line["id"]] for line in lines)
        (tag,) = {line["tag"] for line in lines}
        assert entry["tag/all/prompt_tokens"] == entry[f"tag/{tag}/prompt_tokens"] == pytest.approx(expected)
        assert entry["tag/all/prompt_tokens"] > entry["tag/all/media_tokens"]


@pytest.mark.slow
def test_prompt_tokens_of_a_text_model(tmp_path):
    from datasets import Dataset

    model, tokenizer = build_tiny_text()
    prompts = ["red", "a dog and a cat", "what", "one two three four five"]
    rows = Dataset.from_list([{"prompt": prompt, "tag": "S", "solution": "A"} for prompt in prompts])
    options = {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 4, "max_steps": 1}
    options |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False}
    trainer = MAPOTrainer(
        model,
        lambda completions, **_: [len(c) % 3 / 3 for c in completions],
        MAPOConfig(output_dir=str(tmp_path / "run"), gradient_checkpointing=False, disable_tqdm=True, **options),
        rows,
        processing_class=tokenizer,
    )
    trainer.train()
    expected = fmean(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    assert log_of(tmp_path / "run")[0]["tag/S/prompt_tokens"] == pytest.approx(expected)


@pytest.mark.slow
def test_advantages_of_fresh_and_replayed_completions(tmp_path):
    """In the order of their rewards and with the mean that is logged; and the histogram against the file's numbers."""
    from datasets import Dataset

    rows = Dataset.from_list([row for row in rows_of_two_clips(tmp_path / "data") if row["tag"] != "S"])
    options = {"num_frames": 4, "max_pixels": 3136, "max_completion_length": 8, "num_generations": 4, "max_steps": 4}
    options |= {
        "replayed_generations": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    options |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    options |= {"gradient_checkpointing": False, "num_train_epochs": 4, "tas_lambda": 0.5}
    trainer = AvatarTrainer(
        load_model("builtin:tiny-omni", dtype="float32"),
        lambda completions, **_: [sum(map(ord, c[0]["content"])) % 11 / 11 for c in completions],
        AvatarConfig(output_dir=str(tmp_path / "run"), media_root=str(tmp_path / "data"), **options),
        rows,
        processing_class=load_processor("builtin:tiny-omni"),
    )
    trainer.train()
    lines = [line for rollout in rollouts_of(tmp_path / "run") for line in rollout]
    replayed = [line for line in lines if line["replayed"]]
    assert replayed and all(line["advantage"] is not None for line in lines)
    log = log_of(tmp_path / "run")
    for entry, rollout in zip(log, rollouts_of(tmp_path / "run"), strict=True):
        past = [line["advantage"] for line in rollout if line["replayed"]]
        if past:
            assert entry["replay/advantage_mean"] == pytest.approx(fmean(past), abs=1e-5)
    # Of one prompt at one time the baseline is the same: advantages differ as rewards do, and have their order.
    for rollout in rollouts_of(tmp_path / "run"):
        for group in by([line for line in rollout if line["replayed"]], "group").values():
            history = sorted((line["reward"], line["advantage"]) for line in group)
            assert [a for _, a in history] == sorted(a for _, a in history)
    (found,) = report(tmp_path, tmp_path / "run")["runs"]
    part = found["advantages"]
    width = part["centres"][1] - part["centres"][0]
    limit = -part["centres"][0] + width / 2
    assert limit == pytest.approx(np.quantile([abs(line["advantage"]) for line in lines], 0.995), rel=1e-4)
    for kind, own in (("fresh", [x for x in lines if not x["replayed"]]), ("replayed", replayed)):
        values = [line["advantage"] for line in own]
        assert part["kinds"][kind]["count"] == len(values)
        assert part["kinds"][kind]["mean"] == pytest.approx(fmean(values), abs=1e-6)
        assert part["kinds"][kind]["zero"] == pytest.approx(fmean(abs(value) < 1e-6 for value in values))
        shares = part["kinds"][kind]["share"]
        assert sum(shares) == pytest.approx(1)
        beyond = fmean(value > part["centres"][-1] - width / 2 + 1e-9 for value in values)
        assert shares[-1] == pytest.approx(beyond)
    assert list(part["kinds"]) == ["fresh", "replayed"]
    assert found["distances"]["clips"] == 2


# Distances within a clip, and their plane


def newest_of_each_tag(folder):
    """By clip and tag: the texts that were sampled last, at most four."""
    found = {}
    for lines in rollouts_of(folder):
        for (clip, tag), own in itertools.groupby(lines, lambda line: (line["clip"], line["tag"])):
            own = list(own)
            before = found.get((clip, tag))
            if before is None or before[0] < own[0]["step"]:
                found[clip, tag] = (own[0]["step"], [line["completion"] for line in own][:4])
    return {key: texts for key, (_, texts) in found.items()}


@pytest.mark.slow
def test_distances_within_a_clip(runs, tmp_path):
    """Pair by pair, of both runs in the same bins."""
    data = report(tmp_path, runs / "early", runs / "mid")
    texts = [newest_of_each_tag(runs / mode) for mode in ("early", "mid")]
    assert all(set(own) == set(itertools.product(("first", "second"), TAGS)) for own in texts)
    vectors = text_vectors([[text for part in own.values() for text in part] for own in texts])
    for run, own, matrix in zip(data["runs"], texts, vectors, strict=True):
        labels = [key for key, part in own.items() for _ in part]
        within, between = defaultdict(list), []
        for (i, (clip, tag)), (j, (other, another)) in itertools.combinations(enumerate(labels), 2):
            distance = 1 - float(matrix[i] @ matrix[j])
            if clip != other:
                between.append(distance)
            elif tag != another:
                within[clip].append(distance)
        part = run["distances"]
        everything = within["first"] + within["second"]
        assert part["clips"] == 2 and part["pairs"] == len(everything) == 2 * 3 * 16
        assert part["mean"] == pytest.approx(fmean(everything), abs=1e-6)
        assert part["dispersion"] == pytest.approx(fmean(map(fmean, within.values())), abs=1e-6)
        assert part["separation"] == pytest.approx(fmean(between), abs=1e-6)
        edges = part["edges"]
        inside = [sum(low <= d < high for d in everything) for low, high in itertools.pairwise(edges)]
        assert np.abs(np.array(part["share"]) * len(everything) - inside).sum() <= 2  # on a border, to six digits
    assert data["runs"][0]["distances"]["edges"] == data["runs"][1]["distances"]["edges"]


def line(step, tag, clip, text, **others):
    return {
        "rollout": step, "step": step, "group": f"{clip}-{tag}", "row": 0, "id": f"{clip}-{tag}", "tag": tag, "clip": clip,
        "prompt": "user: q", "completion": text, "solution": "A", "rewards": {"accuracy_reward": 1.0}, "reward": 1.0,
        "advantage": 0.0, "tokens": 3, "replayed": False, "hinted": False,
    } | others  # fmt: skip


def write_run(folder, lines):
    (folder / "rollouts").mkdir(parents=True)
    write_rollout(folder / "rollouts", 0, lines, str(folder))
    return folder


def test_captions_that_do_not_depend_on_what_is_fed_are_near_each_other(tmp_path):
    words = ["a red circle moves", "a low tone sounds", "somebody says hello there"]
    same = write_run(tmp_path / "same", [line(0, tag, c, f"clip {c}: {words[0]}") for c in "ab" for tag in TAGS])
    varied = [line(0, tag, c, f"clip {c}: {words[i]}") for c in "ab" for i, tag in enumerate(TAGS)]
    data = report(tmp_path, same, write_run(tmp_path / "varied", varied))
    near, far = (run["distances"] for run in data["runs"])
    assert near["mean"] == pytest.approx(0, abs=1e-9) and near["share"][0] == 1 and far["share"][0] == 0
    assert far["dispersion"] > 0.3 and near["separation"] < far["separation"]
    # Negative control: without a second tag of a clip there is nothing to compare, and the page says what is needed.
    alone = write_run(tmp_path / "alone", [line(0, "V", c, "x y z") for c in "abc"])
    (found,) = report(tmp_path, alone)["runs"]
    assert "No clip has completions of two tags" in found["distances"]["missing"]


def clusters(folder, seed, spread):
    """Vectors of five clips, each a cluster, under seven tags."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(5, 16)) * 4
    names = ["V", "A", "S", "VA", "VS", "AS", "VAS"]
    vectors = np.concatenate([centre + spread * rng.normal(size=(7, 16)) for centre in centres])
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"loss": 1.0, "step": 1}\n')
    clips = [f"clip-{i}" for i in range(5) for _ in names]
    write_embeddings(folder, vectors, names * 5, [f"{c}" for c in clips], clips)


def test_a_t_sne_of_both_runs_keeps_clips_together(tmp_path):
    for name, seed in (("before", 1), ("after", 2)):
        clusters(tmp_path / name, seed, 0.3)
    words = (tmp_path / "before", tmp_path / "after", "--projection", "tsne")
    data = report(tmp_path, *words)
    parts = [run["projection"] for run in data["runs"]]
    points = np.array([(x, y) for part in parts for x, y in zip(part["x"], part["y"], strict=True)])
    numbers = np.array([number for part in parts for number in part["clip"]])
    assert points.shape == (70, 2) and set(numbers) == {1, 2, 3, 4, 5}
    assert all(part["clips"] == [f"clip-{i}" for i in range(5)] and part["explained"] is None for part in parts)
    away = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag([np.inf] * 70)
    nearest = np.argsort(away, axis=1)[:, :3]
    assert (numbers[nearest] == numbers[:, None]).mean() > 0.95
    again = report(tmp_path, *words)["runs"][1]["projection"]["x"]
    other = report(tmp_path, *words, "--seed", "3")["runs"][1]["projection"]["x"]
    assert again == parts[1]["x"]
    assert report(tmp_path, *words[:2])["runs"][0]["projection"]["kind"] == "pca"
    # Negative control: clips that are no clusters are not kept together.
    for name, seed in (("mixed", 3), ("mixed too", 4)):
        clusters(tmp_path / name, seed, 40)
    mixed = report(tmp_path, tmp_path / "mixed", tmp_path / "mixed too", "--projection", "tsne")["runs"]
    points = np.array([(x, y) for run in mixed for x, y in zip(*(run["projection"][k] for k in "xy"), strict=True)])
    away = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag([np.inf] * 70)
    assert (numbers[np.argsort(away, axis=1)[:, :3]] == numbers[:, None]).mean() < 0.6
    assert len(other) == 35


@pytest.mark.slow
def test_a_t_sne_of_a_training_run_is_numbered_by_clip(runs, tmp_path):
    (found,) = report(tmp_path, runs / "mid", "--projection", "tsne")["runs"]
    part = found["projection"]
    assert part["clips"] == ["first", "second"] and sorted(part["clip"]) == [1, 1, 1, 2, 2, 2]
    assert sorted(part["tag"]) == sorted(TAGS * 2)


def test_a_t_sne_without_scikit_learn_names_the_extra(tmp_path, monkeypatch, capsys):
    clusters(tmp_path / "run", 0, 0.3)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert cli.main(["report", str(tmp_path / "run"), "--projection", "tsne"]) == 2
    assert "scikit-learn" in (told := capsys.readouterr().err) and 'pip install "maple-trl[report]"' in told
    assert cli.main(["report", str(tmp_path / "run")]) == 0  # only the t-SNE needs it
    assert cli.main(["report", str(tmp_path / "run"), "--projection", "umap"]) == 2
    assert "argument --projection: invalid choice: 'umap'" in capsys.readouterr().err


# Efficiency


@pytest.mark.slow
def test_training_efficiency_is_time_of_a_step_by_its_batch(runs, tmp_path):
    data = report(tmp_path, runs / "early", runs / "mid")
    seconds = []
    for run, mode in zip(data["runs"], ("early", "mid"), strict=True):
        times = [entry["step_time"] for entry in log_of(runs / mode)][1:]  # the first step warms up
        assert run["efficiency"] == {
            "seconds_per_step": pytest.approx(fmean(times)),
            "seconds_per_completion": pytest.approx(fmean(times) / 8),
            "completions_per_step": 8,
            "steps": len(times),
        }
        seconds.append(fmean(times))
        assert any(name == "seconds per step / batch of 8 completions" for name, _ in run["facts"])
    (ratio,) = data["efficiency"]["ratios"]
    assert ratio["run"] == 1 and ratio["per_step"] == pytest.approx(seconds[1] / seconds[0])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert (
        "Training efficiency: wall-clock seconds of an optimizer step" in page
        and "times as long as one of early" in page
    )


def test_entries_count_as_often_as_they_have_steps(tmp_path):
    """A log line every ten steps, and one line of two; the batch over two micro-batches on several processes."""
    (tmp_path / "run").mkdir()
    entries = [{"step": 10, "step_time": 9.0}, {"step": 20, "step_time": 2.0}, {"step": 22, "step_time": 8.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (run,) = report(tmp_path, tmp_path / "run")["runs"]
    assert run["efficiency"]["seconds_per_step"] == pytest.approx((10 * 2 + 2 * 8) / 12)
    assert run["efficiency"]["completions_per_step"] is None and run["efficiency"]["seconds_per_completion"] is None
    options = {"generation_batch_size": 128, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    (tmp_path / "run" / "args.json").write_text(json.dumps(options))
    (run,) = report(tmp_path, tmp_path / "run")["runs"]
    assert run["efficiency"]["seconds_per_completion"] == pytest.approx(3 / 64)


# Accuracy by length


@pytest.mark.long
@pytest.mark.slow
def test_gain_by_length_of_two_evaluations(tmp_path):
    """Question by question from `rows.parquet`; the bins are given."""
    words = [*MODEL, "--data", "builtin:seven-tags", "--limit", "14", "--samples", "2", "--quiet"]
    for name, seed in (("first", 0), ("second", 1)):
        assert evaluate(*words, "--seed", seed, "--output", tmp_path / name) == 0
    rows = [pq.read_table(tmp_path / name / "rows.parquet").to_pylist() for name in ("first", "second")]
    lengths = defaultdict(list)
    for entry in itertools.chain(*rows):
        lengths[entry["id"]].append(entry["completion_tokens"])
    means = {name: fmean(values) for name, values in lengths.items()}
    border = int(np.median(list(means.values())))
    data = report(tmp_path, tmp_path / "first", tmp_path / "second", "--length_bins", border)
    assert [bin["from"] for bin in data["length_gains"][0]["bins"]] == [
        b for b in (0, border) if b or min(means.values()) < border
    ]
    for found in data["length_gains"][0]["bins"]:
        own = {name for name, mean in means.items() if (mean >= border) == (found["from"] == border)}
        difference = fmean(e["score"] for e in rows[1] if e["id"] in own) - fmean(
            e["score"] for e in rows[0] if e["id"] in own
        )
        assert found["count"] == len(own) and found["difference"] == pytest.approx(difference)
        assert found["low"] is None or found["low"] <= difference <= found["high"]
    for run, lines in zip(data["runs"], rows, strict=True):
        for found in run["lengths"]["bins"]:
            scores = [e["score"] for e in lines if (e["completion_tokens"] >= border) == (found["from"] == border)]
            assert (found["count"], found["value"]) == (len(scores), pytest.approx(fmean(scores)))
    # Without bounds the bins hold all completions, each one once; the same run twice gains nothing.
    same = report(tmp_path, tmp_path / "first", tmp_path / "first")
    assert sum(found["count"] for found in same["runs"][0]["lengths"]["bins"]) == 28
    assert sum(found["count"] for found in same["length_gains"][0]["bins"]) == 14
    assert all(found["difference"] == 0 for found in same["length_gains"][0]["bins"])
    (one,) = report(tmp_path, tmp_path / "first")["runs"]
    assert one["advantages"] == {"missing": "An evaluation has no advantages."}


# Critical steps


THOUGHTS = ["I plan what to look at.", "A dog runs at 1.5 m/s!", "It barks twice.", "So the second option fits."]


def thinking(middle, answer="B", steps=THOUGHTS):
    return f"<think>{' '.join([*steps[:-1], middle, steps[-1]])}</think>\n<answer>{answer}</answer>"


@pytest.fixture
def thinking_run(tmp_path):
    lines = [line(i, "V", f"c{i}", thinking(f"KEY {i}" + " and more" * i + ".")) for i in range(12)]
    lines += [line(12, "A", "x", "<answer>B</answer>"), line(13, "A", "y", "<think>Short.</think><answer>B</answer>")]
    return write_run(tmp_path / "run", lines)


def judge_of(words):
    """A judge that reads the numbered steps, and names the first that holds one of these words."""

    def choose(number, body):
        steps = re.findall(r"^(\d+)\. (.*)$", body["messages"][-1]["content"], re.MULTILINE)
        assert [int(n) for n, _ in steps] == list(range(1, len(steps) + 1)) and len(steps) == 5
        return say(json.dumps({"step": next(int(n) for n, text in steps if any(word in text for word in words))}))

    return choose


def asked(run, server, *words):
    return cli.main(["critical-steps", str(run), "--model", "judge", "--base_url", server.url, *words])


def test_a_judge_says_where_critical_steps_stand(thinking_run, tmp_path, capsys):
    (before,) = report(tmp_path, thinking_run)["runs"]
    assert "maple-trl critical-steps RUN --model NAME" in before["critical"]["missing"]
    with ChatServer(judge_of(["KEY"])) as server:
        assert asked(thinking_run, server, "--dry_run") == 0 and not server.calls
        assert not (thinking_run / "critical_steps.json").exists()
        assert "requests to send: 12" in capsys.readouterr().out
        assert asked(thinking_run, server) == 0
        assert len(server.calls) == 12 and "response_format" in server.calls[0].body
        assert asked(thinking_run, server) == 0 and len(server.calls) == 12, "answers are kept"
    positions = []
    for i in range(12):
        text = thinking(f"KEY {i}" + " and more" * i + ".").split("<think>")[1].split("</think>")[0]
        start, end = text.index("KEY"), text.index("So the second")
        positions.append((start + end) / 2 / len(text))
    (found,) = report(tmp_path, thinking_run)["runs"]
    part = found["critical"]
    assert part["judge"] == "judge" and part["count"] == 12
    assert part["left_out"] == {"without reasoning": 1, "with fewer than 3 steps": 1} and part["failed"] == {}
    assert part["mean"] == pytest.approx(fmean(positions))
    inside = [fmean(i / 10 <= p < (i + 1) / 10 for p in positions) for i in range(10)]
    assert part["share"] == pytest.approx(inside, abs=1e-5) and part["shaped"] is None
    # Negative control: a judge that names the first step gives another figure.
    with ChatServer(judge_of(["plan"])) as server:
        assert asked(thinking_run, server, "--no_cache", "--samples", "5") == 0 and len(server.calls) == 5
    (other,) = report(tmp_path, thinking_run)["runs"]
    assert other["critical"]["count"] == 5 and other["critical"]["mean"] < 0.15 < min(positions)


def test_the_weights_of_shaping_stand_beside_the_positions(thinking_run, tmp_path):
    (thinking_run / "args.json").write_text(json.dumps({"tas_lambda": 0.5, "tas_shape": "parabolic"}))
    with ChatServer(judge_of(["KEY"])) as server:
        assert asked(thinking_run, server, "--samples", "3") == 0
    (found,) = report(tmp_path, thinking_run)["runs"]
    shares = found["critical"]["shaped"]["share"]
    # The integral of 1 + lambda (2x - 1)^2 over a tenth, of 1 + lambda / 3 in all.
    parts = [
        (0.1 + 0.5 * (((2 * b - 1) ** 3 - (2 * a - 1) ** 3) / 6)) / (1 + 0.5 / 3)
        for a, b in itertools.pairwise(np.linspace(0, 1, 11))
    ]
    assert shares == pytest.approx(parts, abs=1e-3) and float(tas_weights(np_ones(3), 0.5)[0, 0]) == 1.5


def np_ones(count):
    import torch

    return torch.ones(1, count)


def test_a_judge_that_fails_is_counted(thinking_run, tmp_path, capsys):
    """A step that is not there, and an answer that is no JSON: nothing is made up."""
    answers = ['{"step": 99}', "the third one", '{"step": 2}']
    with ChatServer(lambda number, body: say(answers[number % 3])) as server:
        words = ("--concurrency", "1", "--max_attempts", "1", "--samples", "9", "--no_cache")
        assert asked(thinking_run, server, *words) == 1
    assert "6 of 9 completions failed, more than --max-failures 0.2 allows" in capsys.readouterr().err
    (found,) = report(tmp_path, thinking_run)["runs"]
    assert found["critical"]["count"] == 3 and found["critical"]["failed"] == {"invalid-json": 6}
    (thinking_run / "critical_steps.json").write_text("{}")
    (found,) = report(tmp_path, thinking_run)["runs"]
    assert "critical_steps.json cannot be read" in found["critical"]["missing"]


def test_a_step_that_a_judge_only_thought_of_is_none(thinking_run, tmp_path, capsys):
    thoughts = ('<think>{"step": 2}? No, for', '{"step": 2}? No, for', '{"step": 2}')
    with ChatServer(lambda number, body: say(thoughts[number % 3], finish_reason="length")) as server:
        words = ("--concurrency", "1", "--samples", "9", "--no_cache")
        assert asked(thinking_run, server, *words) == 1 and len(server.calls) == 9
    (found,) = report(tmp_path, thinking_run)["runs"]
    assert found["critical"]["count"] == 3 and found["critical"]["failed"] == {"truncated": 6}


def test_refusals_of_the_command(tmp_path, capsys):
    run = write_run(tmp_path / "plain", [line(0, "V", "a", "<answer>B</answer>")])
    for words, why in (
        ([str(tmp_path / "gone"), "--model", "m"], "there is no folder"),
        ([str(run)], "--model is missing"),
        ([str(run), "--model", "m", "--samples", "0"], "--samples must be 1 or more, got 0"),
        ([str(run), "--model", "m"], "no completion with a reasoning to ask about: 1 without reasoning"),
    ):
        assert cli.main(["critical-steps", *words, "--base_url", "http://127.0.0.1:9/v1"]) == 2
        assert why in capsys.readouterr().err


def test_a_reasoning_is_cut_into_sentences_and_lines():
    text = "1. Look. It is 1.5 m!\n\n- so\n- what?  是的。B 3."
    steps = [text[start:end] for start, end in split_steps(text)]
    assert "".join(steps) == text
    assert [step.strip() for step in steps] == ["1. Look.", "It is 1.5 m!", "- so", "- what?", "是的。", "B 3."]
    assert split_steps("...") == [] and split_steps("") == []
    plain = read_reasoning("First this. Then that. Hence B. <answer>B</answer>", "Which?")
    assert (len(plain.steps), plain.answer, plain.text) == (3, "B", "First this. Then that. Hence B.")
    assert plain.position(2) == pytest.approx((12 + 23) / 2 / 31)
    assert read_reasoning("<think>open. not closed. at all.") == "without reasoning"


# The documentation


def test_the_table_of_figures_names_panels_that_exist():
    page = (ROOT / "maple_trl/assets/report/page.html.j2").read_text()
    code = "".join(path.read_text() for path in sorted((ROOT / "maple_trl/assets/report").glob("*.js")))
    code += "".join((ROOT / "maple_trl/reports" / name).read_text() for name in ("report.py", "sections.py"))
    rows = re.findall(
        r"^\| (?!figure|---)(.+?) \| (.+?) \| (.+?) \| .+ \|$", (ROOT / "docs/report.md").read_text(), re.MULTILINE
    )
    sections = re.findall(r'<section id="([a-z]+)">', page)
    assert len(rows) > 20
    named = {name for _, cell, _ in rows for name in re.findall(r"`([a-z]+)`", cell)}
    assert named == set(sections) - {"configuration"}  # of which no paper has a figure

    def written(title):
        """A title stands whole in a string, or is put together of parts."""
        return (
            title in code
            or re.sub(r" (fresh|replayed) ", " ${kind} ", title) in code
            or (title.partition(" training")[0] in ("before", "after") and 'f"{name} training"' in code)
        )

    missing = [title for _, _, cell in rows for title in re.findall(r"\*\*(.+?)\*\*", cell) if not written(title)]
    assert missing == [] and not written("A panel that is not there")
