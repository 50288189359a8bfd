"""What scores the completions of an evaluation: a reward function, or a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.data.benchmarks.prompts import prompt_style
from maple_trl.evaluation.identity import describe_function
from maple_trl.files import digest
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.rewards import JUDGES, close_rewards, entry_of_json, load_rewards, what_is_learned
from maple_trl.metrics.answers import count_measures
from maple_trl.rewards.answers import extract_answer
from maple_trl.rewards.judge import inner_judge
from maple_trl.rewards.measures import METRIC_COLUMN, MeasuredReward, check_metrics


if TYPE_CHECKING:
    from maple_trl.jobs.eval_job import EvalJob

LOCAL = "local"
"""As `judge_server`: the judge's model is loaded in this process."""

# Of a judge's answer: a verdict is some twenty tokens, and a judge that thinks first needs the room. One that does not ends
# long before.
_JUDGE_TOKENS = 2048


class Scoring:
    """
    The function that scores, and what decides its scores.

    Args:
        job: names the function.
        media_root: where a judge that is shown pictures finds clips.
        rows: those that name their own metric (`answer_metric`) are measured by it where `accuracy_reward` scores.

    Attributes:
        function: with the signature of TRL's rewards.
        described: as JSON values.
        extract: what reads the answer in a completion, in the form that the function grades.

    Raises:
        SetupError: for a name that leads to none, a judge that is described wrongly, or a metric that cannot be measured.
    """

    def __init__(self, job: EvalJob, media_root: str, rows: Sequence[Mapping[str, Any]] = ()):
        media = dataclasses.replace(job.media, media_root=media_root)
        entry, metrics = _entry(job), _metrics(rows)
        judge = _judge(job, entry, metrics)
        if isinstance(judge, dict) and not _is_accuracy(entry):
            entry, judge = judge, None
        if entry in JUDGES:
            raise SetupError(
                f"{entry} needs a model that judges: --judge_model NAME, and --judge_server URL where it is not the API's own "
                "(local: in this process)"
            )
        if isinstance(entry, dict):
            entry = _with_cache(entry, job)
        (self.function,) = load_rewards([entry], media, place="--judge")
        try:
            job.media.check_answer_form([self.function])
        except ValueError as error:
            raise SetupError(str(error)) from error
        self._judge = inner_judge(self.function)
        measured = _is_accuracy(entry) and bool(metrics - {"accuracy"})
        if measured:
            if judge is not None:
                (self._judge,) = load_rewards([judge], media, place="--judge")
            self.function = MeasuredReward(_format(entry), self._judge)
        self.described: dict[str, Any] = describe_function(self.function)
        self.extract = getattr(self.function, "extract", extract_answer)
        if isinstance(entry, dict):
            self.described["entry"] = what_is_learned([entry])[0]
        if measured:
            self.described |= {"metrics": sorted(metrics), "packages": _packages(metrics)}
            self.described["arithmetic_sha256"] = describe_function(count_measures)["source_sha256"]
            self.described["judge"] = what_is_learned([judge])[0] if judge is not None else None
        if self._judge is not None:
            self.described["guideline_sha256"] = digest(self._judge.guideline)

    @property
    def spent(self) -> dict[str, Any] | None:
        """Calls, tokens and cost of a judge in this process, and what became of the completions."""
        if self._judge is None:
            return None
        return {**self._judge.usage.as_dict(), "completions": dict(sorted(self._judge.counts.items()))}

    def close(self) -> None:
        """Close a judge's connections."""
        close_rewards([self.function if self._judge is None else self._judge])


def _answer_format(job: EvalJob) -> str:
    """Return the form in which the questions ask for answers."""
    template = job.media.template()
    if template is not None and template.answer_format is not None:
        return template.answer_format
    return prompt_style(job.prompt_style).answer_format


def _in_form(reward: str, answer_format: str) -> str | dict[str, Any]:
    return reward if answer_format == "tags" else {"reward": reward, "answer_format": answer_format}


def _entry(job: EvalJob) -> str | dict[str, Any]:
    """Return what scores, as an entry of a training job's `rewards`; answers are read in the form of the prompts."""
    (entry,) = job.reward_funcs
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        entry = entry_of_json(entry, "--judge")
    if entry == "accuracy_reward":
        entry = _in_form(entry, _answer_format(job))
    return entry


def scoring_server(job: EvalJob) -> tuple[str, str | None] | None:
    """Return model and address of the server that judges, where one does; nothing is opened."""
    entry = _entry(job)
    if isinstance(entry, str) and job.judge_model is not None and job.judge_server != LOCAL:
        return job.judge_model, job.judge_server
    server = entry.get("server") if isinstance(entry, dict) else None
    return (server["model"], server.get("base_url")) if server else None


def _is_accuracy(entry: str | Mapping[str, Any]) -> bool:
    """Return whether `accuracy_reward` scores all rows alike."""
    if isinstance(entry, str):
        return entry == "accuracy_reward"
    return entry.get("reward") == "accuracy_reward" and set(entry) <= {"reward", "answer_format"}


def _format(entry: str | Mapping[str, Any]) -> str:
    return "tags" if isinstance(entry, str) else entry.get("answer_format", "tags")


def _metrics(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    try:
        return check_metrics(row.get(METRIC_COLUMN) for row in rows)
    except (ValueError, ImportError) as error:
        raise SetupError(str(error)) from error


def _packages(metrics: set[str]) -> dict[str, str]:
    needed = {"word_error_rate": "jiwer", "rouge": "rouge-score"}
    return {needed[name]: version(needed[name]) for name in sorted(metrics & needed.keys())}


def _judge(job: EvalJob, entry: str | dict[str, Any], metrics: set[str]) -> dict[str, Any] | None:
    """
    Return the entry of the judge that `--judge-model`, `--judge-server` and `--judge-max-tokens` describe; `None` where they are not given.

    It is the one that scores, or where rows are measured the one for their open answers.
    """
    if job.judge_model is None and job.judge_server is None and job.judge_max_tokens is None:
        return None
    opens = _is_accuracy(entry) and "judge" in metrics
    if (entry not in JUDGES and not opens) or job.judge_model is None:
        raise SetupError(
            f"--judge-model, and where it is with --judge-server, are for --judge {' or '.join(JUDGES)}, and for open "
            f"answers of a benchmark (rows whose {METRIC_COLUMN} is judge), and so is --judge-max-tokens; a mapping says all "
            "of it itself"
        )
    local = job.judge_server == LOCAL
    made: dict[str, Any] = {"reward": "answer_judge" if opens else entry}
    made[LOCAL if local else "server"] = {"model": job.judge_model}
    if local:
        if job.judge_max_tokens is not None:
            made[LOCAL]["max_new_tokens"] = job.judge_max_tokens
    else:
        made["server"]["sampling"] = {"temperature": 0, "max_tokens": job.judge_max_tokens or _JUDGE_TOKENS}
        if job.judge_server is not None:
            made["server"]["base_url"] = job.judge_server
    return _with_cache(made, job)


def _with_cache(entry: dict[str, Any], job: EvalJob) -> dict[str, Any]:
    """Keep a server's answers with the results."""
    if not isinstance(entry.get("server"), dict):
        return entry
    return {**entry, "server": {"cache_file": str(Path(job.output_dir) / "judge.sqlite")} | entry["server"]}
