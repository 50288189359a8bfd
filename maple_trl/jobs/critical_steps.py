"""Has a judge say where the critical steps of a run's completions stand, and keeps that for the report."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maple_trl.chat import ChatClient
from maple_trl.evaluation.critical_steps import SYSTEM, Reasoning, ask_for_critical_steps, read_reasoning
from maple_trl.records.critical_steps import write_critical_steps
from maple_trl.reports.folders import ReportError, read_run
from maple_trl.reports.rollouts import Rollouts, rollouts_of


_SCOPE = ("step", "access", "row", "id", "tag", "clip")


@dataclass(frozen=True)
class CriticalSteps:
    """
    What became of the completions of a run.

    Attributes:
        completions: fresh ones that the run kept.
        left_out: those that no judge is asked about, by reason.
        asked: how many were drawn of the others.
        found: how many the judge named a step of.
        failed: requests without an answer, by reason.
        detail: what was said of the first failure.
        path: the file; `None` where nothing was written.
    """

    completions: int
    left_out: Counter[str]
    asked: int
    found: int
    failed: Counter[str]
    detail: str
    path: Path | None


def find_critical_steps(folder: str, client: ChatClient, samples: int, seed: int) -> CriticalSteps:
    """
    Ask about completions of a run or an evaluation, drawn evenly by a seed, and write `critical_steps.json` into its folder.

    Raises:
        ReportError: when the folder holds no completions with a reasoning.
    """
    run = read_run(folder)
    rollouts = None if run.table is None else rollouts_of(run.table, run.kind, len(run.table))
    if rollouts is None or not len(rollouts):
        raise ReportError(f"{folder} holds no completions: its trainer keeps them while rollout_log_size is above 0")
    fresh = [i for i, replayed in enumerate(rollouts.get("replayed")) if not replayed]
    read = {i: read_reasoning(rollouts.columns["completion"][i] or "", rollouts.get("prompt")[i]) for i in fresh}
    left_out = Counter(found for found in read.values() if isinstance(found, str))
    reasonings = {i: found for i, found in read.items() if isinstance(found, Reasoning)}
    if not reasonings:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        raise ReportError(f"{folder} holds no completion with a reasoning to ask about: {why}")
    drawn = np.random.default_rng(seed).permutation(list(reasonings))[:samples]
    lines = sorted(int(i) for i in drawn)
    answers, failed, detail = ask_for_critical_steps([reasonings[i] for i in lines], client)
    steps = [_about(rollouts, i) | found for i, found in zip(lines, answers, strict=True) if found is not None]
    path = None
    if not client.options.dry_run and steps:
        told = {
            "judge": client.options.model,
            "prompt_sha256": hashlib.sha256(SYSTEM.encode()).hexdigest(),
            "seed": seed,
            "completions": len(fresh),
            "asked": len(lines),
            "left_out": dict(left_out),
            "failed": dict(failed),
            "steps": steps,
        }
        path = write_critical_steps(run.folder, told)
    return CriticalSteps(len(fresh), left_out, len(lines), len(steps), failed, detail, path)


def _about(rollouts: Rollouts, line: int) -> dict[str, Any]:
    found = {name: rollouts.columns[name][line] for name in _SCOPE if name in rollouts.columns}
    return {name: value for name, value in found.items() if value is not None}
