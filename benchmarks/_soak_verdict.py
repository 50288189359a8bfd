"""What a soak proves or finds: functions of what the runs have left, each of which gives checks that hold or do not."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from _soak_faults import fed_rows
from _soak_judge import digest_of
from _soak_run import metrics_lines
from _soak_schedule import KINDS
from safetensors.torch import load_file
from scipy.stats import theilslopes

from maple_trl.chat import ChatOptions
from maple_trl.records.metrics_log import LOG_ENTRIES
from maple_trl.records.rollouts import read_rollouts
from maple_trl.rewards import AnswerJudge
from maple_trl.rewards.judge import Question
from maple_trl.trainers.common.checkpoint import complete_checkpoints


BLOCKS = 24
CONFIDENCE = 0.99
GROWTH = {"rss": 128 << 20, "disk": 1 << 20, "files": 8.0, "threads": 8.0}
"""The most that a run may surely have grown by, over all its steps after the first quarter."""
LONG_GROWTH = 32 << 20
"""Of memory, in a long run: nothing in it warms up any more."""
_STATE = (
    "replay",
    "mapo.json",
    "missing_rewards.json",
    "rows.json",
    "run_tally.json",
    "rollout_0.json",
    "rollout_1.json",
)
# Numbers of a log that tell of time, of memory, of how often the judge was called, and of clips that this process has met since it began.
_TIMED = ("time", "seconds", "runtime", "per_second", "flos", "judge/answer_judge/", "media/clips_", "memory/host_")


@dataclass(frozen=True)
class Check:
    """Something that has to hold, whether it does, and what was found."""

    name: str
    ok: bool
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Results:
    """
    What a run has left.

    Attributes:
        weights, state: digests by name: of tensors, and of the last checkpoint's optimizer and replay memory.
        log: its lines without what tells of time.
        lines: of its rollouts.
        ids: of the data set's rows, in order.
        fed: ids of the rows that are fed each clip.
        questions: of the rows, by id.
    """

    weights: dict[str, str]
    state: dict[str, str]
    log: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    ids: list[str]
    fed: dict[str, list[str]] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)


def read_results(out: Path, media: Path) -> Results:
    """Read what a run has left; a run that came to nothing has left nothing."""
    table, _, broken = read_rollouts(out / "rollouts")
    assert not broken, broken
    weights = out / "model.safetensors"
    rows = pq.read_table(media / "train.parquet", columns=["id", "question"]).to_pylist()
    last = next(iter(complete_checkpoints(str(out))), None)
    return Results(
        weights=_digests(load_file(weights)) if weights.exists() else {},
        state={} if last is None else _state_digests(Path(last)),
        log=[_untimed(line) for line in metrics_lines(out)],
        lines=[] if table is None else table.to_pylist(),
        quarantine=_json(out / "quarantine.json") or [],
        left_out=(_json(out / "summary.json") or {}).get("left_out", []),
        ids=[row["id"] for row in rows],
        fed=fed_rows(media),
        questions={row["id"]: row["question"] for row in rows},
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(
            value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else str(value.item()).encode()
        ).hexdigest()
        for name, value in tensors.items()
    }


def _state_digests(checkpoint: Path) -> dict[str, str]:
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    tensors = {
        f"{number}.{name}": torch.as_tensor(value)
        for number, state in optimizer.items()
        for name, value in state.items()
    }
    files = [
        path for path in checkpoint.rglob("*") if path.is_file() and path.relative_to(checkpoint).parts[0] in _STATE
    ]
    return {
        **{f"optimizer.{name}": digest for name, digest in _digests(tensors).items()},
        **{str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


def _untimed(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not any(word in name for word in _TIMED)}


# Checks


def finished(record: Mapping[str, Any], steps: int) -> list[Check]:
    """The run has made all its steps, never hung, and ended only where a fault ended it; every fault has struck."""
    planned = sum(KINDS[done["kind"]].ends_run for done in record["struck"])
    status = f"{record['step']} of {steps} steps, exit statuses {record['statuses']}"
    ended = f"{len(record['statuses']) - 1} ends before the last one, {planned} of them planned"
    met, killed = record["judge"].get("due", {}), sum(done["kind"] == "kill_judge" for done in record["struck"])
    waiting = {name: count for name, count in met.items() if count}
    missed = [f"{name} was not due by the end" for name in record["not_struck"]]
    missed += [f"{killed} judges killed, {record['judge']['starts']} started"] * (
        record["judge"]["starts"] != 1 + killed
    )
    missed += [f"nothing was said of {kind}" for kind, texts in _SAID.items() if _unsaid(record, kind, texts)]
    missed += [f"the judge has {count} x {name} left" for name, count in waiting.items()]
    return [
        Check("finished", record["step"] == steps and record["statuses"][-1:] == [0], status),
        Check("ended as planned", len(record["statuses"]) - 1 == planned, ended),
        Check("no hang", not record["hangs"], str(record["hangs"] or "")),
        Check("every fault struck", not missed, "; ".join(missed) or f"{len(record['struck'])} faults"),
    ]


# What the log of a run says that has met a fault.
_SAID = {"disk_full": ("No space left on device", "File too large"), "torn_checkpoint": ("is passed over",)}


def _unsaid(record: Mapping[str, Any], kind: str, texts: Sequence[str]) -> bool:
    return any(done["kind"] == kind for done in record["struck"]) and not set(texts) & set(record["said"])


def same(results: Results, undisturbed: Results) -> list[Check]:
    """A run whose data no fault has changed is the undisturbed one to the bit, in all that it leaves."""
    return [
        _equal("weights", results.weights, undisturbed.weights),
        _equal("optimizer and replay memory", results.state, undisturbed.state),
        _equal("log", _by_step(results.log), _by_step(undisturbed.log)),
        _equal("completions", _by_rollout(results.lines), _by_rollout(undisturbed.lines)),
    ]


def _equal(name: str, found: Mapping, expected: Mapping) -> Check:
    differing = [
        key for key in [*expected, *(key for key in found if key not in expected)] if _unlike(found, expected, key)
    ]
    first = (
        f"; the first: {differing[0]} {_difference(found.get(differing[0]), expected.get(differing[0]))}"
        if differing
        else ""
    )
    detail = f"{len(expected) - len(differing)} of {len(expected)} equal to the bit{first}"
    return Check(f"same {name}", bool(expected) and not differing, detail)


def _unlike(found: Mapping, expected: Mapping, key: Any) -> bool:
    return key not in found or key not in expected or found[key] != expected[key]


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        names = [name for name in {**expected, **found} if _unlike(found, expected, name)]
        return f"({', '.join(f'{name}: {found.get(name)} not {expected.get(name)}' for name in names[:3])})"
    return "" if found is not None else "(missing)"


def _by_step(log: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """By step and occurrence; the last line, of the whole run, tells of time alone."""
    found: dict[str, Any] = {}
    for line in log:
        key = f"step {line.get('step')}" + (" (end)" if "train_loss" in line else "")
        if "train_loss" not in line:  # the mean over the steps of its last start
            found[key] = line
    return found


def _by_rollout(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, list] = {}
    for line in lines:
        found.setdefault(f"rollout {line['rollout']}", []).append(line)
    return {name: json.dumps(rows, default=str, sort_keys=True) for name, rows in found.items()}


def nothing_lost(results: Results) -> list[Check]:
    """No row is in quarantine, and no reward is missing."""
    kinds = [
        note["text"] for note in results.left_out if note["kind"] in ("quarantined", "unrewarded", "changed_files")
    ]
    named = [row["path"] for row in results.quarantine]
    missing = sum(_missing(line) for line in results.lines)
    return [Check("nothing lost", not (kinds or named or missing), "; ".join([*kinds, *map(str, named)]))]


def _missing(line: Mapping[str, Any]) -> bool:
    return not line["replayed"] and any(value is None for value in dict(line["rewards"]).values())


def drawn(results: Results) -> dict[int, Counter[str]]:
    """Which rows each rollout has completions of, and how many prompts of each."""
    found: dict[int, Counter[str]] = {}
    for line in results.lines:
        if not line["replayed"]:
            found.setdefault(line["rollout"], Counter())[line["id"]] += 1
    return found


def all_rows_drawn(results: Results, prompts: int) -> list[Check]:
    """
    In each whole epoch every row has its turn once, unless it is in quarantine.

    Args:
        prompts: of a rollout.
    """
    by_rollout, epoch = drawn(results), -(-len(results.ids) // prompts)
    excused = {results.ids[row] for entry in results.quarantine for row in entry["rows"]}
    lost: Counter[str] = Counter()
    whole = 0
    for start in range(0, max(by_rollout, default=-1) + 2 - epoch, epoch):
        numbers = range(start, start + epoch)
        if not set(numbers) <= set(by_rollout):
            continue
        whole += 1
        had = Counter(row for number in numbers for row in by_rollout[number])
        lost.update(row for row in results.ids if not had[row] and row not in excused)
    detail = f"{whole} whole epochs of {len(results.ids)} rows" + "".join(
        f"; row {row} was passed over {count} times, and is named nowhere" for row, count in lost.most_common(3)
    )
    return [Check("no silent loss", bool(whole) and not lost, detail)]


def losses_named(record: Mapping[str, Any], results: Results, undisturbed: Results) -> list[Check]:
    """Every row that a fault has cost is named with a fitting reason, and counted; nothing else is, and no row is lost else."""
    planted = {row: done for done in record["struck"] for row in done.get("rows", ())}
    named = {results.ids[row]: entry for entry in results.quarantine for row in entry["rows"]}
    wrong = [
        f"{row} ({entry['reason']}, {entry['path']})"
        for row, entry in named.items()
        if row in planted and (entry["reason"] not in planted[row]["reasons"] or entry["path"] != planted[row]["clip"])
    ]
    problems = [f"{row} is not named" for row in planted if row not in named]
    problems += [f"{row} is named and was not harmed" for row in named if row not in planted]
    problems += [f"named for another reason: {text}" for text in wrong]
    counted = sum(note["count"] for note in results.left_out if note["kind"] == "quarantined")
    expected, found = drawn(undisturbed), drawn(results)
    silent = {
        row
        for number in expected.keys() & found.keys()
        for row in expected[number] - found[number]
        if row not in named and expected[number][row] and not found[number][row]
    }
    return [
        Check(
            "lost rows named", not problems, "; ".join(problems) or f"{len(planted)} rows planted, {len(named)} named"
        ),
        Check("lost rows counted", counted == len(planted), f"{counted} counted, {len(planted)} planted"),
        Check(
            "no row lost else",
            not silent,
            f"{len(found)} rollouts" + "".join(f"; {row} is missing" for row in sorted(silent)[:3]),
        ),
        *_replacements_named(record, results),
        *_rewards_counted(record, results),
    ]


def _replacements_named(record: Mapping[str, Any], results: Results) -> list[Check]:
    replaced = {done["clip"] for done in record["struck"] if "replaced_rows" in done}
    told = {file for note in results.left_out if note["kind"] == "changed_files" for file in note["files"]}
    missing = sorted(replaced - told)
    return [
        Check(
            "replaced clips named",
            not missing,
            f"{len(replaced)} planted" + "".join(f"; {clip} is not named" for clip in missing),
        )
    ]


def _rewards_counted(record: Mapping[str, Any], results: Results) -> list[Check]:
    """A completion has no reward of the judge if, and only if, the judge has answered its question with rubbish for good."""
    marked = set(record["judge"].get("lost", ()))
    digests = [(line, _digest(line, results.questions)) for line in results.lines if not line["replayed"]]
    missing = [(line, digest) for line, digest in digests if _missing(line)]
    counted = sum(note["count"] for note in results.left_out if note["kind"] == "unrewarded")
    unexplained = [line["id"] for line, digest in missing if digest not in marked]
    unseen = marked - {digest for _, digest in missing}
    detail = f"{len(marked)} questions lost: {len(missing)} completions without a reward, {counted} counted"
    detail += f"; unexplained: {unexplained[:3]}" if unexplained else ""
    detail += f"; nothing was lost by {sorted(unseen)}" if unseen else ""
    return [Check("lost rewards counted", counted == len(missing) and not unexplained and not unseen, detail)]


_JUDGE = AnswerJudge(ChatOptions(model="soak", base_url="http://127.0.0.1:9/v1"))


def _digest(line: Mapping[str, Any], questions: Mapping[str, str]) -> str | None:
    """Return the digest of what the judge is asked about a completion; `None` where it is not asked."""
    row = {"prompt": line["prompt"], "question": questions[line["id"]], "solution": line["solution"]}
    question = _JUDGE._ask(line["completion"], row)
    return digest_of(question.messages) if isinstance(question, Question) else None


# Growth


def slope(steps: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """
    Estimate the growth a step: the median of slopes between means of blocks (Theil and Sen), with its interval.

    Neighbouring values of memory are nearly the same, and count as one by the block.
    """
    blocks = min(BLOCKS, len(steps))
    x = [float(np.mean(part)) for part in np.array_split(np.asarray(steps, float), blocks)]
    y = [float(np.mean(part)) for part in np.array_split(np.asarray(values, float), blocks)]
    found = theilslopes(y, x, CONFIDENCE)
    return float(found.slope), float(found.low_slope), float(found.high_slope)


def flat(
    record: Mapping[str, Any], steps: int, growth: Mapping[str, float] | None = None
) -> tuple[list[Check], dict[str, Any]]:
    """
    Memory, disk, open files and threads do not grow: after the first quarter of the longest start, by interval.

    Of a long start, from where the log that is held in memory is full.
    """
    starts = Counter(sample["start"] for sample in record["samples"])
    longest = starts.most_common(1)[0][0] if starts else 0
    samples = [sample for sample in record["samples"] if sample["start"] == longest and sample["step"] < steps]
    full = min(LOG_ENTRIES, steps // 2) if steps >= LOG_ENTRIES else 0
    growth = growth or (GROWTH | {"rss": LONG_GROWTH} if full else GROWTH)
    samples = [sample for sample in samples[len(samples) // 4 :] if sample["step"] >= full]
    if len(samples) < 8:
        return [Check("flat", False, f"{len(samples)} samples are too few")], {}
    first, last = samples[0]["step"], samples[-1]["step"]
    checks, told = [], {}
    for name, most in growth.items():
        values = [sample["disk"]["rest"] if name == "disk" else sample[name] for sample in samples]
        middle, low, high = slope([sample["step"] for sample in samples], values)
        told[name] = {
            "slope": middle,
            "low": low,
            "high": high,
            "steps": [first, last],
            "first": values[0],
            "last": values[-1],
        }
        text = f"{_amount(name, middle)} a step [{_amount(name, low)}, {_amount(name, high)}] over steps {first} to {last}"
        checks.append(Check(f"flat {name}", low * (last - first) <= most, text))
    return checks, told


def _amount(name: str, value: float) -> str:
    return f"{value / 1024:.1f} KiB" if name in ("rss", "disk") else f"{value:.3f}"


def back_to_start(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Check]:
    """
    What was open before is open after, and nothing else: files, sockets, processes, segments of shared memory.

    Args:
        before, after: `open` (counts by kind), `marked` (processes), `segments` (names).
    """
    counts = {name: after["open"][name] - before["open"][name] for name in before["open"]}
    more = {name: count for name, count in counts.items() if count > 0}
    left = sorted(set(after["segments"]) - set(before["segments"]))
    return [
        Check("no process left", not after["marked"], f"{len(after['marked'])} left"),
        Check("no file or socket left", not more, str(more or "")),
        Check("no shared memory left", not left, ", ".join(left[:5])),
    ]
