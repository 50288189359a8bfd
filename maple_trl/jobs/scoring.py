"""What scores the completions of an evaluation: a reward function, or a judge."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.data.benchmarks.prompts import prompt_style
from maple_trl.evaluation.identity import describe_function
from maple_trl.files import digest
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.rewards import JUDGES, close_rewards, load_rewards, what_is_learned
from maple_trl.rewards.answers import extract_answer
from maple_trl.rewards.judge import inner_judge


if TYPE_CHECKING:
    from maple_trl.jobs.eval_job import EvalJob

LOCAL = "local"
"""As `judge_server`: the judge's model is loaded in this process."""

_SAMPLING = {"temperature": 0, "max_tokens": 200}


class Scoring:
    """
    The function that scores, and what decides its scores.

    Args:
        job: names the function.
        media_root: where a judge that is shown pictures finds clips.

    Attributes:
        function: with the signature of TRL's rewards.
        described: as JSON values.
        extract: what reads the answer in a completion, in the form that the function grades.

    Raises:
        SetupError: for a name that leads to none, or a judge that is described wrongly.
    """

    def __init__(self, job: EvalJob, media_root: str):
        entry = _entry(job)
        media = dataclasses.replace(job.media, media_root=media_root)
        (self.function,) = load_rewards([entry], media, place="--judge")
        try:
            job.media.check_answer_form([self.function])
        except ValueError as error:
            raise SetupError(str(error)) from error
        self.described: dict[str, Any] = describe_function(self.function)
        self._judge = inner_judge(self.function)
        self.extract = getattr(self.function, "extract", extract_answer)
        if isinstance(entry, dict):
            self.described["entry"] = what_is_learned([entry])[0]
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
        close_rewards([self.function])


def _answer_format(job: EvalJob) -> str | None:
    """Return the form in which the questions ask for answers; `None` where nothing says it."""
    template = job.media.template()
    if template is not None:
        return template.answer_format
    return None if job.benchmark is None else prompt_style(job.prompt_style).answer_format


def _in_form(reward: str, answer_format: str | None) -> str | dict[str, Any]:
    return reward if answer_format in (None, "tags") else {"reward": reward, "answer_format": answer_format}


def _entry(job: EvalJob) -> str | dict[str, Any]:
    """Return the judge as an entry of a training job's `rewards`; its server's answers are kept with the results."""
    (entry,) = job.reward_funcs
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        try:
            entry = json.loads(entry)
        except ValueError as error:
            raise SetupError(f"--judge is no JSON object: {error}") from error
    if entry == "accuracy_reward":
        entry = _in_form(entry, _answer_format(job))
    if job.judge_model is not None or job.judge_server is not None:
        if entry not in JUDGES or job.judge_model is None:
            raise SetupError(
                f"--judge-model, and where it is with --judge-server, are for --judge {' or '.join(JUDGES)}; a mapping says "
                "both itself"
            )
        local = job.judge_server == LOCAL
        entry = {"reward": entry, LOCAL if local else "server": {"model": job.judge_model}}
        if not local:
            entry["server"]["sampling"] = _SAMPLING
            if job.judge_server is not None:
                entry["server"]["base_url"] = job.judge_server
    if isinstance(entry, dict) and isinstance(entry.get("server"), dict):
        kept = {"cache_file": str(Path(job.output_dir) / "judge.sqlite")}
        entry = {**entry, "server": kept | entry["server"]}
    return entry
