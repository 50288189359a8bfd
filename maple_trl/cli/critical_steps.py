"""The command `maple-trl critical-steps`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.cli.base import Command
from maple_trl.cli.failures import FAILED, WRONG
from maple_trl.cli.servers import ServerArguments, chat_options


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.jobs.critical_steps import CriticalSteps


@dataclass
class CriticalStepArguments(ServerArguments):
    """Which completions a judge reads, and where it is."""

    samples: int = field(default=200, metadata={"help": "completions that are asked about"})
    seed: int = field(default=0, metadata={"help": "of the draw of completions"})
    temperature: float | None = field(default=0.0, metadata={"help": "sampling temperature"})
    json: bool = field(default=False, metadata={"help": "print the summary as JSON"})

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("samples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be {least} or more, got {getattr(self, name)}")


def run(arguments: CriticalStepArguments, named: argparse.Namespace) -> int:
    """Ask for the critical steps of a run's completions, and print how many were named."""
    from maple_trl.chat import ChatClient
    from maple_trl.jobs.critical_steps import find_critical_steps

    folder = Path(named.run)
    kept = str(folder / "critical_steps.sqlite") if folder.is_dir() else None
    with ChatClient(chat_options(arguments, kept)) as client:
        found = find_critical_steps(named.run, client, arguments.samples, arguments.seed)
        usage = client.usage
    return _tell(found, usage.as_dict(), arguments)


def _tell(found: CriticalSteps, usage: dict[str, Any], arguments: CriticalStepArguments) -> int:
    failed = {reason: count for reason, count in found.failed.items() if reason != "dry-run"}
    too_many = sum(failed.values()) > arguments.max_failures * found.asked
    if arguments.json:
        counts = {name: value for name, value in vars(found).items() if name not in ("path", "detail")}
        print(json.dumps(counts | {"path": found.path and str(found.path), "usage": usage}, indent=2))
    else:
        left_out = ", ".join(f"{count} {reason}" for reason, count in found.left_out.most_common()) or "none"
        print(f"{found.completions} completions; left out: {left_out}")
        if arguments.dry_run:
            print(f"requests to send: {found.asked}; tokens, about: {usage['estimated_tokens']}")
        else:
            told = "".join(f", {count} {reason}" for reason, count in failed.items())
            print(f"asked about {found.asked}: {found.found} steps named{told}")
            print(f"calls {usage['sent']}, answered from the cache {usage['cached']}, cost {usage['cost']:.4f}")
        if found.path is not None:
            print(f"written to {found.path}; maple-trl report draws it")
    if too_many:
        share = f"{sum(failed.values())} of {found.asked} completions failed, more than --max-failures"
        share = f"{share} {arguments.max_failures:g} allows ({found.detail})"
        print(f"maple-trl critical-steps: {share}; run again to ask for them once more", file=sys.stderr)
    return int(too_many)


COMMAND = Command(
    name="critical-steps",
    help="ask a judge where the critical steps of completions stand, for the report",
    run=run,
    description="""\
Asks a judge behind an OpenAI-compatible endpoint, for a sample of a run's completions, on which step of the reasoning the
answer rests most, and writes critical_steps.json into the run's folder. `maple-trl report RUN` then draws where these
steps stand.""",
    examples=(
        "maple-trl critical-steps runs/avatar --model NAME --dry_run",
        "maple-trl critical-steps runs/avatar --model NAME --base_url http://127.0.0.1:8000/v1 --samples 300",
    ),
    notes="""\
RUN is the output folder of a training job or of `maple-trl eval`. The judge reads text alone. Answers are kept: the same
command pays for none twice.""",
    statuses={FAILED: "more completions failed than --max_failures allows"},
    options={"options": CriticalStepArguments},
    arguments={"RUN": {"help": "output folder of a training job or an evaluation"}},
    required=("model",),
    errors={"builtins:ValueError": WRONG},
    writes=lambda arguments, named: named.run,
    stopped="the same command goes on from here",
)
