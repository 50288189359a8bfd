"""The task of long think texts: that nothing short of the whole chain tells an answer, how it is read, what its claims run."""

import importlib
import itertools
import random
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import yaml

from maple_trl.algorithms import tas_weights
from maple_trl.data.synthetic import ATTRIBUTES, question_of
from maple_trl.data.tiny_omni import build_tokenizer
from maple_trl.jobs.options import parse_args
from maple_trl.modalities import ModalityTag
from maple_trl.trainers.avatar.config import AvatarConfig


CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
REGISTER = yaml.safe_load((CLAIMS / "register" / "avatar_shaping.yaml").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))


@pytest.fixture
def task():
    return importlib.import_module("tasks.reasoning")


def seven_tag_rows(blocks=1):
    """Rows of the seven-tag set without media: each tag's 64 combinations."""
    return [
        {
            "id": f"test-{number:04}",
            "tag": tag.value,
            "question": question_of(tag),
            "options": ["", "", "", ""],
            **{f"truth_{modality.value}": word for modality, word in zip(ATTRIBUTES, words, strict=True)},
        }
        for number, (_, words, tag) in enumerate(
            itertools.product(range(blocks), itertools.product(*ATTRIBUTES.values()), ModalityTag)
        )
    ]


def answer_of(question, row):
    """An interpreter of questions of its own: the letter that the words of a question lead to."""
    nouns, _, operations = question.partition("? ")
    columns = {"color": "V", "pitch": "A", "word": "S"}
    places = {"V": "red green blue yellow", "A": "low mid high top", "S": "cat dog sun sea"}
    value = 0
    for noun in nouns.split():
        value += places[columns[noun]].split().index(row[f"truth_{columns[noun]}"])
    for word in operations.split():
        value += int(word[2])
    return "ABCDEFGH"[value % 8]


def test_answers_are_what_the_questions_lead_to(task):
    rows = list(task.with_chains(seven_tag_rows(), seed=3))
    assert [row["answer"] for row in rows] == [answer_of(row["question"], row) for row in rows]
    cells = Counter((row["tag"], row["steps"], row["tier"]) for row in rows)
    assert set(cells.values()) == {8} and len(cells) == 7 * 4 * 2
    assert all(row["question"].count("+7") == 2 * (row["tier"] == "hard") for row in rows)
    assert len({row["id"] for row in rows}) == len(rows) and not any("options" in row for row in rows)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("signals", [1, 2, 3])
def test_any_one_part_unknown_leaves_the_answer_open(task, hard, signals):
    """Counted over all signals and amounts of two steps: what one knows best with one of them covered."""
    amounts = [[7] if hard else range(7)] * task.HARD_STEPS
    found = []
    for parts in itertools.product(*[range(4)] * signals, *amounts):
        value = sum(parts[:signals])
        for amount in parts[signals:]:
            value = task.apply(value, f"+{amount}")
        found.append((parts, value))
    for covered in range(signals + 2):
        if hard and covered >= signals:
            continue  # the tier tells it
        seen = defaultdict(Counter)
        for parts, value in found:
            seen[parts[:covered] + parts[covered + 1 :]][value] += 1
        best = statistics.fmean(max(counts.values()) / counts.total() for counts in seen.values())
        assert best == pytest.approx(1 / 4 if covered < signals else 1 / 7)


def test_a_set_cannot_be_answered_by_counting(task):
    """Of what a guesser could count on other rows, nothing tells the answer; the whole question does."""
    rows = list(task.with_chains(seven_tag_rows(8), seed=5))
    learnt, asked = rows[: len(rows) // 2], rows[len(rows) // 2 :]

    def guessed(key):
        seen = defaultdict(Counter)
        for row in learnt:
            seen[key(row)][row["answer"]] += 1
        right = [seen[key(row)].most_common(1)[0][0] == row["answer"] for row in asked if key(row) in seen]
        return statistics.fmean(right)

    keys = {
        "tag": lambda row: row["tag"],
        "signals": lambda row: tuple(row[f"truth_{letter}"] for letter in row["tag"]) + (row["tag"],),
        "last operation": lambda row: row["question"].split()[-1],
        "operations": lambda row: row["question"].partition("? ")[2] if row["steps"] == 2 else None,
    }
    most = {"operations": 0.3, "signals": 0.25}  # an eighth of all are hard ones of two steps, both of which add 7
    for name, key in keys.items():
        assert guessed(key) < most.get(name, 0.2), name  # seven or eight letters
    assert guessed(lambda row: row["chain"][-1]) == 1.0


def test_think_texts_are_long(task):
    tokenizer = build_tokenizer()
    lengths = defaultdict(set)
    for row in task.with_chains(seven_tag_rows(), seed=1):
        lengths[row["steps"]].add(len(tokenizer(row["chain"])["input_ids"]))
        assert (
            len(tokenizer(task.target_text(row["chain"]))["input_ids"])
            < task.options("avatar")["max_completion_length"]
        )
    assert min(map(min, lengths.values())) >= 60
    means = [statistics.fmean(lengths[steps]) for steps in task.STEPS]
    assert all(later - earlier >= 12 for earlier, later in itertools.pairwise(means))


def one_row(task, tier="hard", steps=3):
    rows = task.with_chains(seven_tag_rows(), seed=2)
    return next(row for row in rows if row["tier"] == tier and row["steps"] == steps and row["tag"] == "VA")


def test_the_right_text_is_read_as_right(task):
    row = one_row(task)
    reading = task.read_completion(task.target_text(row["chain"]), row)
    assert reading == task.Reading(True, True, True, (True,) * 3, (True, True), True, True, None)


def test_an_error_in_the_middle_is_found_where_it_is(task):
    """A wrong second step whose consequences are worked out rightly: one step is wrong, and so is the answer."""
    row = one_row(task, tier="easy")
    operations = [word[1:] for word in row["question"].partition("? ")[2].split()]
    first = task.apply(int(task._FORM.fullmatch(task.target_text(row["chain"]))["begin"][-1]), operations[0])
    wrong = (task.apply(first, operations[1]) + 1) % 8
    last = task.apply(wrong, operations[2])
    begin, _, rest = row["chain"].partition(f" b:{first}{operations[1]}=")
    assert rest
    text = f"{begin} b:{first}{operations[1]}={wrong}. c:{wrong}{operations[2]}={last}. so {last}={task.LETTERS[last]}"
    text = f"<think>{text}</think><answer>{task.LETTERS[last]}</answer>"
    reading = task.read_completion(text, row)
    assert reading.sums == (True, True, True, False, True) and reading.follows and not reading.answered
    right = task.target_text(row["chain"]).partition("</think>")[0]
    assert reading.first_error * len(right) == pytest.approx(text.index(f"={wrong}. c:") + 1)


@pytest.mark.parametrize(
    "change", [lambda text: text.replace("a:", "q:"), lambda text: text[:-40], lambda text: text.replace(". so", "so")]
)
def test_gibberish_is_not_well_formed(task, change):
    row = one_row(task)
    reading = task.read_completion(change(task.target_text(row["chain"])), row)
    assert not reading.well_formed and not reading.sums and reading.first_error is not None


def test_a_lucky_answer_is_told_from_a_right_chain(task):
    chains = importlib.import_module("instruments_reasoning")
    row = one_row(task)
    lucky = f"<think> color</think><answer>{row['answer']}</answer>"
    told = chains.summary(
        [(task.read_completion(text, row), 9, (row["tier"], "3")) for text in (lucky, task.target_text(row["chain"]))]
    )
    assert told["lucky"] == 0.5 and told["well_formed"] == 0.5 and told["whole"] == 1.0 and told["follows"] is None
    assert sum(told["first_error"]) == 1 and told["answered"] == {"3": 1.0, "hard": 1.0}


def test_chains_are_given_up_anywhere_and_stay_so(task):
    """Each item of the cold start's texts is left open as often as any other, and all that follows from it."""
    slips = task.Slips(0.05, 0.5, random.Random(0))
    rows = [row for row in task.with_chains(seven_tag_rows(8), seed=4) if row["tag"] == "VAS"]
    read = {"easy": [], "hard": []}
    for row in rows:
        text = task.target_text(task.chain_of(row, row["operations"], slips))
        read[row["tier"]].append(task.read_completion(text, row))
        assert ("so ?=?" in text) <= text.endswith("<answer>?</answer>")
        assert "?" not in text or re.search(r"\?(?!.*=[0-7]\. so)", text)  # an open register is never closed again
    everyone = read["easy"] + read["hard"]
    assert all(reading.well_formed for reading in everyone)
    assert statistics.fmean(reading.evidence for reading in everyone) == pytest.approx(0.95**3, abs=0.05)
    right = {tier: statistics.fmean(reading.answered for reading in found) for tier, found in read.items()}
    expected = statistics.fmean(0.95 ** (3 + 2 + 2 * steps + 1) for steps in task.STEPS)
    assert right["easy"] == pytest.approx(expected + 0.02, abs=0.06)  # a signal not seen may count 0
    assert right["hard"] == pytest.approx(0.5**2 * expected / 0.95**2, abs=0.04)
    wrong = [reading for reading in everyone if reading.first_error is not None]
    assert statistics.fmean(reading.follows for reading in wrong) > 0.85
    assert {int(reading.first_error * 4) for reading in wrong} == {0, 1, 2, 3}


def result_of(counts, log=None):
    questions = [[name, "V", count] for name, count in counts.items()]
    return {"after": {"trained": {"questions": questions, "samples": 4}}, "log": log or {}}


def test_metrics_read_the_questions_of_a_result():
    metrics = importlib.import_module("metrics_reasoning")
    result = result_of({"test-0-2-easy": 4, "test-1-3-hard": 2, "test-2-4-easy": 1, "test-3-5-hard": 0})
    assert metrics.accuracy_of(result, "easy") == 5 / 8 and metrics.accuracy_of(result, 2.0) == 1.0
    assert metrics.long_above_short(result) == pytest.approx(1 / 8 - 6 / 8)
    with pytest.raises(ValueError, match="no question of 7; ids end in -STEPS-TIER"):
        metrics.accuracy_of(result, 7)
    log = {
        "replay/zero_variance_mixed": [0.5, None, 0.25],
        "replay/zero_variance_fresh": [1.0],
        "frac_reward_zero_std": [0.0],
    }
    assert metrics.zero_variance(result_of({}, log), "mixed") == 0.375
    assert metrics.zero_variance(result_of({}, {"frac_reward_zero_std": [0.5]}), "mixed") == 0.5  # without replay
    with pytest.raises(ValueError, match="fresh or mixed"):
        metrics.zero_variance(result_of({}, log), "all")


def test_controls_have_the_parabolas_mean(tmp_path):
    configs = {}
    for name in ("reason-uniform", "reason-uniform-scaled", "reason-parabolic-1", "reason-uniform-faster"):
        run = importlib.import_module("runs").Run(**REGISTER["variants"][name], seed=0)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(run.config() | {"output_dir": str(tmp_path / name), "use_cpu": True}))
        arguments = parse_args(["--config", str(file)])
        configs[name] = next(part for part in arguments if isinstance(part, AvatarConfig))
    plain, scaled = configs["reason-uniform"], configs["reason-uniform-scaled"]
    mean = 1 + configs["reason-parabolic-1"].tas_lambda / 3
    for option in ("max_grad_norm", "adam_epsilon", "beta"):
        assert getattr(plain, option) / getattr(scaled, option) == pytest.approx(mean)
    assert configs["reason-uniform-faster"].learning_rate / plain.learning_rate == pytest.approx(mean, rel=1e-6)


def test_the_scaled_control_is_a_weight_of_the_parabolas_mean():
    """AdamW's steps under the control's options are those under the loss times the mean weight, and not those of the loss."""
    mean = tas_weights(torch.ones(1, 4001), 1.0).mean().item()
    assert mean == pytest.approx(4 / 3, rel=1e-3)

    def trained(weight, limit, epsilon):
        parameter = torch.nn.Parameter(torch.tensor([0.5, -0.3], dtype=torch.float64))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, eps=epsilon)
        for scale in (0.2, 5.0, 0.9, 1.2):  # some of the gradients are clipped
            optimizer.zero_grad()
            (weight * scale * (parameter - torch.tensor([1.0, 2.0])).square().sum() / 4).backward()
            torch.nn.utils.clip_grad_norm_([parameter], limit)
            optimizer.step()
        return parameter.detach()

    c = 4 / 3
    torch.testing.assert_close(trained(1.0, 1 / c, 0.01 / c), trained(c, 1.0, 0.01), rtol=1e-5, atol=1e-6)
    assert (trained(1.0, 1.0, 0.01) - trained(c, 1.0, 0.01)).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.claims
def test_the_start_writes_the_form_and_gives_up(task, monkeypatch):
    """The policy that runs begin with, as a run measures it, and what two steps of training leave to read."""
    worker = importlib.import_module("worker")
    monkeypatch.setattr(task, "SAMPLES", 1)
    variants = REGISTER["variants"]
    start = worker.carry_out(worker.Run(**variants["reason-start"], seed=100))
    chains = start["chains"]["after"]
    right = chains["answered"]
    assert chains["completions"] == 448 and chains["well_formed"] > 0.85 and chains["tokens"] > 70
    assert 0.3 < right["easy"] < 0.65 and right["hard"] < 0.1 and right["2"] > right["5"]
    assert chains["follows"] > 0.75 and chains["hard"] < 0.4 < 0.6 < chains["sums"]
    assert start["cost"]["completions"] == 0

    small = {"max_steps": 2, "num_generations": 4, "replayed_generations": 2, "per_device_train_batch_size": 4}
    variant = variants["reason-parabolic-1"]
    monkeypatch.setattr(task, "QUESTIONS", 2)
    options = variant["options"] | small | {"replay_min_size": 1}
    trained = worker.carry_out(worker.Run(**variant | {"options": options}, seed=100))
    assert trained["cost"]["completions"] == 8  # two prompts; nothing can be replayed yet
    assert trained["chains"]["start"] == start["chains"]["start"]
    assert trained["chains"]["after"]["completions"] == 2 * 7
