"""What a run leaves for `maple-trl report` while it is going on: its completions, and its log line by line."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.utils import gather_object
from transformers import TrainerCallback

from maple_trl.evaluation.inputs import as_text, fed_columns, prompt_text
from maple_trl.files import as_json
from maple_trl.metrics.clips import clip_of
from maple_trl.omni.completions import completion_texts
from maple_trl.omni.host_memory import deep_bytes, host_memory
from maple_trl.records import metrics_log
from maple_trl.records.metrics_log import whole_log, write_metrics
from maple_trl.records.rollouts import ROLLOUTS, rollout_of, write_rollout
from maple_trl.rewards.answers import completion_text
from maple_trl.trainers.common.hinted_rows import HINTED, prompt_key, row_digest


if TYPE_CHECKING:
    from maple_trl.algorithms import Experience
    from maple_trl.omni.encoded import EncodedPrompt
    from maple_trl.trainers.common.rows import RowEncoder

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Rolling(Protocol):
    """What is asked of a trainer whose completions are kept; the names that begin with `_` are TRL's, and `_serving`."""

    args: Any
    family: Any
    model: Any
    state: Any
    reward_func_names: list[str]
    row_encoder: RowEncoder
    _logs: Mapping[str, Any]
    _serving: list[EncodedPrompt | None] | None
    _step: int
    _tokenizer: Any
    _updates_per_rollout: int


class RolloutLog:
    """
    Writes the completions of training rollouts, a Parquet file each, as TRL holds them for `log_completions`.

    A file appears whole or not at all, whenever the process is killed. It is named by the number of its rollout, which
    follows from the number of micro-batches: a resumed run writes the same names, and removes what the run that was
    stopped had written beyond its checkpoint.

    Args:
        output_dir: of the run.
        size (`int`): the most completions that are kept; 0 writes nothing.
        per_rollout (`int`): completions of a rollout.
        writes (`bool`): whether this process is the one that writes.
        media_root: the folder below which the media lie; noted in the files.
    """

    def __init__(self, output_dir: str, size: int, per_rollout: int, writes: bool, media_root: str = "."):
        self.folder = Path(output_dir, ROLLOUTS)
        self.files = max(size // per_rollout, 2) if size else 0
        self.writes = writes
        self.media_root = media_root
        self.begin()

    def begin(self) -> None:
        """Reset for a run that begins, or goes on."""
        self._facts: list[dict[str, Any]] = []
        self._replayed: list[dict[str, Any]] = []
        self._opened, self._stride = False, 0

    def keeps(self, number: int) -> bool:
        """Return whether the rollout with this number is written."""
        return bool(self.files) and number % stride(number, self.files) == 0

    def note(self, trainer: Rolling, rows: Sequence[Mapping[str, Any]], completion_ids: Sequence) -> None:
        """
        Take down where completions that were just scored come from, which TRL does not; a collective call.

        Args:
            rows: of this rank's completions.
            completion_ids: their tokens.
        """
        number = rollout_number(trainer)
        if not trainer.model.training or not self.keeps(number):
            return
        prompts = trainer._serving or [None] * len(rows)
        known: dict[tuple, dict[str, Any]] = {}
        facts = []
        for row, prompt, ids in zip(rows, prompts, completion_ids, strict=True):
            # Rows can show the same and want another answer.
            same = (id(prompt), as_text(row.get("id")), as_text(row.get("solution")))
            if prompt is None or same not in known:
                known[same] = row_facts(trainer, row, prompt)
            facts.append(known[same] | {"tokens": len(ids), "replayed": False})
        self._facts += gather_object(facts)

    def note_rewards(self, trainer: Rolling, rewards: Sequence[float]) -> None:
        """
        Take down the rewards of the completions that were noted last, of all ranks.

        Args:
            rewards: NaN for an unscorable completion.
        """
        if trainer.model.training and self.keeps(rollout_number(trainer)):
            for facts, reward in zip(self._facts[-len(rewards) :], rewards, strict=True):
                facts["reward"] = _finite(reward)

    def note_replayed(
        self,
        trainer: Rolling,
        shown: Sequence[tuple[Mapping[str, Any], EncodedPrompt | None]],
        experiences: Sequence[Experience | None],
    ) -> None:
        """
        Take down this rank's replayed completions.

        Args:
            shown: the row and the prompt that each stands under.
            experiences: `None` for one whose media have gone.
        """
        if not self.keeps(rollout_number(trainer)):
            return
        for (row, prompt), experience in zip(shown, experiences, strict=True):
            if experience is None:
                continue
            ids = experience.completion_ids.tolist()
            self._replayed.append(
                row_facts(trainer, row, prompt)
                | {
                    "completion": _replayed_text(trainer, ids, prompt),
                    "tokens": len(ids),
                    "replayed": True,
                    "rewards": experience.rewards,
                    "reward": experience.reward,
                    "written_at": experience.step,
                }
            )

    def note_replayed_advantages(self, trainer: Rolling, advantages: Sequence[float]) -> None:
        """Take down the advantages of this rank's next replayed completions, in the order in which they were noted."""
        if not self.keeps(rollout_number(trainer)):
            return
        waiting = [facts for facts in self._replayed if "advantage" not in facts]
        for facts, advantage in zip(waiting, advantages, strict=False):
            facts["advantage"] = _finite(advantage)

    def write(self, trainer: Rolling) -> None:
        """Write the rollout that TRL has just finished; a collective call."""
        number = rollout_number(trainer)
        if not trainer.model.training or not self.keeps(number):
            return
        replayed = gather_object(self._replayed)
        facts, self._facts, self._replayed = self._facts, [], []
        if not self.writes:
            return
        lines = [*_fresh_lines(trainer, facts), *replayed]
        shared = {"rollout": number, "step": trainer.state.global_step}
        try:
            self._open(number)
            self._write([line | shared for line in lines], number)
        except OSError as error:
            logger.warning("rollout_log_size: no further completions are kept: %s", error)
            self.writes = False  # this rank goes on to gather, as the others do

    def _open(self, number: int) -> None:
        """Make the folder, and remove files of this number and above, left by a stopped run or an earlier one."""
        if self._opened:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.suffix == ".partial" or rollout_of(path) >= number:
                path.unlink()
        self._opened = True

    def _write(self, lines: list[dict[str, Any]], number: int) -> None:
        write_rollout(self.folder, number, lines, self.media_root)
        step = stride(number, self.files)
        if step != self._stride:
            for other in self.folder.glob("*.parquet"):
                if rollout_of(other) % step:
                    other.unlink()
        self._stride = step


def stride(number: int, files: int) -> int:
    """
    Return of how many rollouts one is kept once a run has come to this one.

    It is the smallest power of two that leaves at most `files`, a function of the number alone, so that a resumed run
    keeps the same ones.
    """
    step = 1
    while number // step >= files:
        step *= 2
    return step


def rollout_number(trainer: Rolling) -> int:
    """Return the number of the rollout that is being sampled or trained on."""
    return trainer._step // trainer._updates_per_rollout


def row_facts(trainer: Rolling, row: Mapping[str, Any], prompt: EncodedPrompt | None) -> dict[str, Any]:
    """Return columns that say what a row is, and what it was fed."""
    facts = {name: as_text(row.get(name)) for name in ("id", "tag", "solution")} | {"clip": clip_of(row)}
    if prompt is None:
        return facts | {"group": row_digest(row), "prompt": prompt_text(row["prompt"]), "hinted": None}
    group = prompt_key(prompt.key)  # the same with a hint and without
    registry = trainer.row_encoder.registries.get("train_dataset")
    spec = trainer.row_encoder.spec(row)
    return facts | {
        "group": group,
        "row": registry.row_number(group) if registry is not None and group in registry else None,
        "hinted": prompt.key.endswith(HINTED),
        **fed_columns(spec),
    }


def _replayed_text(trainer: Rolling, ids: list[int], prompt: EncodedPrompt | None) -> str:
    if trainer.family is None or prompt is None:
        return trainer._tokenizer.decode(ids, skip_special_tokens=True)
    return completion_texts(trainer.family, [ids], [prompt.input_ids])[0]


def _fresh_lines(trainer: Rolling, facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line per fresh completion: the newest entries that TRL keeps for `log_completions`, and their facts."""
    logs = trainer._logs
    count = min(len(facts), len(logs["completion"]))
    if not count:
        return []
    names = trainer.reward_func_names
    weights = trainer.args.reward_weights or [1.0] * len(names)
    latest = [list(logs["rewards"][name])[-count:] for name in names]
    texts, advantages = (list(logs[name])[-count:] for name in ("completion", "advantages"))
    lines = []
    for i, known in enumerate(facts[-count:]):
        values = [_finite(column[i]) for column in latest]
        given = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
        lines.append(
            {"reward": math.fsum(given) if given else None}
            | known
            | {
                "completion": completion_text(texts[i]),
                "rewards": dict(zip(names, values, strict=True)),
                "advantage": _finite(advantages[i]),
            }
        )
    return lines


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class LiveLog(TrainerCallback):
    """
    Writes a run's log to `metrics.jsonl` in its output folder as it grows.

    A resumed run writes the file anew from its checkpoint and goes on, so that no step stands in it twice. The last
    line may be incomplete in the file of a run that was killed. In memory, and in checkpoints, are the latest
    [`~maple_trl.records.metrics_log.LOG_ENTRIES`] entries; those before them are read in the file beside the checkpoint.

    Attributes:
        checkpoint: from which the run goes on, in its own output folder or in another.
    """

    def __init__(self) -> None:
        self.checkpoint: str | None = None
        self._sizes: deque[int] = deque()

    def on_train_begin(self, args, state, control, **kwargs):
        """Write the log of the checkpoint that the run goes on from, or an empty file."""
        if state.is_world_process_zero:
            path = Path(args.output_dir, METRICS_FILE)
            beside = path if self.checkpoint is None else Path(self.checkpoint).absolute().parent / METRICS_FILE
            log = whole_log(state.log_history, beside)
            if len(state.log_history) >= metrics_log.LOG_ENTRIES and not beside.is_file():
                first = log[0].get("step")
                logger.warning(
                    "%s is not there: the log of this run begins at step %s, and so do its curves", beside, first
                )
            write_metrics(log, path)
        self._sizes = deque(map(_entry_bytes, state.log_history))

    def on_log(self, args, state, control, **kwargs):
        """Append the newest entry."""
        if state.is_world_process_zero and state.log_history:
            path = Path(args.output_dir, METRICS_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(as_json(state.log_history[-1])) + "\n")
        self._keep_latest(state.log_history)

    def _keep_latest(self, log: list[dict[str, float]]) -> None:
        if not log:
            return
        log[-1] = {sys.intern(name): value for name, value in log[-1].items()}  # names are the same in each entry
        del log[: -metrics_log.LOG_ENTRIES]
        self._sizes.append(_entry_bytes(log[-1]))
        while len(self._sizes) > len(log):
            self._sizes.popleft()
        host_memory().hold("log", self, sum(self._sizes))


def _entry_bytes(entry: Mapping[str, Any]) -> int:
    """Return the bytes of an entry of the log, without the names, which all share."""
    return sys.getsizeof(entry) + sum(map(deep_bytes, entry.values()))
