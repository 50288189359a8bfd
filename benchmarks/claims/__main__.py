"""
What MAPLE and AVATAR claim, measured on tiny omni models. Everything is registered first: see register.yaml.

    python benchmarks/claims run [CLAIM ...]     carry out what is missing, two runs side by side; stop and go on at will
    python benchmarks/claims run gpu --workers 1 the claims that need a GPU, on a machine that has one
    python benchmarks/claims run --quick         a few steps of every variant, within ten minutes: no evidence
    python benchmarks/claims status              what is done, and how many CPU hours are left
    python benchmarks/claims report              write docs/claims.md and README's lines
    python benchmarks/claims simulate            how often the rules find effects that are there, and that are not
    python benchmarks/claims check               read the register and the job of each variant
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from evidence import Evidence, Wanted, apart, forget_other_code, wanted_anew, wanted_runs
from provenance import uncommitted
from register import Claim, Register, RegisterError, check_jobs, read_register
from runner import Outcome, Runner, Stopped
from runs import HERE, RESULTS, DamagedResultError
from tasks import prepared, start_of, use_folders
from verdicts import CANT_TELL

from maple_trl.files import write_atomically


ROOT = HERE.parents[1]
QUICK_RESULTS = ROOT / "runs" / "claims-quick"
QUICK_SEEDS, QUICK_BATCH, QUICK_HOURS = (0, 1), 8, 9 / 60
BEGAN = time.monotonic()
"""What hours are counted from: to look at 140 jobs takes some of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what a command line says; return the exit status."""
    told = _parser().parse_args(argv)
    use_folders(told.register / "tasks" if told.register != HERE else None, told.cache)
    try:
        return told.do(told, read_register(told.register))
    except (RegisterError, DamagedResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--register", type=Path, default=HERE, metavar="DIR", help="where register.yaml is; may have own tasks/"
    )
    shared.add_argument("--results", type=Path, metavar="DIR", help="where results are kept")
    shared.add_argument("--cache", type=Path, metavar="DIR", help="where tasks keep what they make")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, do: object, about: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, parents=[shared], help=about, description=about)
        one.set_defaults(do=do)
        return one

    run = command("run", _run, "Carry out what is missing.")
    run.add_argument("claims", nargs="*", metavar="CLAIM", help="by name or number, or gpu: those that need one (all)")
    run.add_argument("--workers", type=_positive, default=2, metavar="N", help="runs side by side (2)")
    run.add_argument("--hours", type=float, metavar="H", help="begin no further run after so many")
    run.add_argument("--seeds", type=_seeds, metavar="0-4", help="these seeds alone, whatever the looks ask for")
    run.add_argument("--quick", action="store_true", help="a few steps, two seeds, few questions: no evidence")
    status = command("status", _status, "Say what is done, and what is left.")
    status.add_argument("claims", nargs="*", metavar="CLAIM")
    report = command("report", _report, "Write docs/claims.md and README's lines from the results.")
    report.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR")
    report.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    report.add_argument("--json", type=Path, metavar="FILE", help="verdicts and intervals as JSON, too")
    simulate = command("simulate", _simulate, "Judge registers with known effects.")
    simulate.add_argument("--effect", type=float, metavar="X", help="what is planted (0.03)")
    simulate.add_argument("--between-seeds", type=float, metavar="SD")
    simulate.add_argument("--between-questions", type=float, metavar="SD")
    simulate.add_argument("--registers", type=_positive, metavar="N")
    simulate.add_argument("--json", type=Path, metavar="FILE")
    command("check", _check, "Read the register and the job of each variant.")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def _seeds(text: str) -> list[int]:
    seeds: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if found is None:
            raise argparse.ArgumentTypeError(f"must be seeds such as 0-4 or 0,2,7, got {text!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"must be seeds such as 0-4, the smaller one first, got {text!r}")
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)


# Commands


def _run(told: argparse.Namespace, register: Register) -> int:
    chosen = register.choose(told.claims)
    claims = [one for one in chosen if not register.lacks(one)]
    for claim in chosen:
        if claim not in claims:
            print(f"{claim.name} is not run: it needs {register.lacks(claim)}")
    check_jobs(register, list(dict.fromkeys(name for claim in claims for name in claim.variants)))
    for file in () if told.quick else uncommitted(register):
        print(f"{file} is not as it is committed: what is registered after its runs is no evidence")
    evidence = _evidence(told, register, told.quick)
    if told.quick:
        forget_other_code(evidence.results)
    hours = told.hours if told.hours is not None else QUICK_HOURS if told.quick else math.inf
    runner = Runner(
        evidence,
        options=[
            *(("--tasks", str(told.register.resolve() / "tasks")) if told.register != HERE else ()),
            *(("--cache", str(told.cache.resolve())) if told.cache else ()),
        ],
        workers=told.workers,
        batch=QUICK_BATCH if told.quick else 1,
        ends=BEGAN + 3600 * hours,
        cuts=told.quick,
        say=lambda text: print(text, flush=True),
    )
    try:
        outcomes = _looks(told, runner, evidence, claims)
    except Stopped as stop:
        print(f"stopped by {stop}; what was done is kept, and the same command goes on from there")
        return 128 + stop.number
    failed = {one: lines for outcome in outcomes for one, lines in outcome.failed.items()}
    left = [one for outcome in outcomes for one in outcome.left]
    for one, lines in failed.items():
        print(f"\n{one.variant}, seed {one.seed} FAILED:\n{lines}", file=sys.stderr)
    print(
        f"{sum(len(outcome.done) for outcome in outcomes)} runs are done, {len(failed)} failed, {len(left)} are left"
    )
    if told.quick:
        _show_quick(evidence, claims)
    return 1 if failed else 0


def _looks(told: argparse.Namespace, runner: Runner, evidence: Evidence, claims: Sequence[Claim]) -> list[Outcome]:
    seeds = QUICK_SEEDS if told.quick and told.seeds is None else told.seeds
    if seeds is not None:
        names = dict.fromkeys(name for claim in claims for name in claim.variants)
        return [runner.go([Wanted(name, seed) for seed in seeds for name in names])]
    outcomes = []
    for look in range(len(evidence.register.rules.looks)):
        wanted = list(wanted_runs(evidence, claims, look))
        if look:
            print(f"{len(wanted)} runs of look {look + 1}: claims that can't tell", flush=True)
        outcomes.append(runner.go(wanted))
        if time.monotonic() >= runner.ends:
            continue  # a task's start may take long to make
        if anew := list(wanted_anew(evidence, claims, lambda task: start_of(prepared(task)))):
            print(f"{len(anew)} runs once more from the start that is made here, as others of their pairs", flush=True)
            outcomes.append(runner.go(anew))
    return outcomes


def _show_quick(evidence: Evidence, claims: Sequence[Claim]) -> None:
    from wording import shown_effect

    for claim in claims:
        _, found = evidence.claim(claim, QUICK_SEEDS)
        for measure in claim.measures:
            print(f"{claim.name}: {measure.name}: {shown_effect(found[measure.name], measure)}")
    print("These runs are a few steps long and were asked a few questions: they show that runs can be carried out.")
    print("They are no evidence for any claim, or against one.")


def _evidence(told: argparse.Namespace, register: Register, quick: bool = False) -> Evidence:
    results = told.results or (QUICK_RESULTS if quick else RESULTS)
    return Evidence(register, results.resolve(), quick)


def _status(told: argparse.Namespace, register: Register) -> int:
    evidence = _evidence(told, register)
    minutes = evidence.minutes()
    missing: set[Wanted] = set()
    for claim in register.choose(told.claims):
        lacks = register.lacks(claim)
        if lacks and not all(evidence.there(one.variant, one.seed) for one in wanted_runs(evidence, [claim], 0)):
            print(f"{claim.number:>3} {claim.name}: not run, needs {lacks}")
            continue
        runs = [one for look in range(len(register.rules.looks)) for one in wanted_runs(evidence, [claim], look)]
        open_runs = [one for one in runs if not evidence.there(one.variant, one.seed)]
        missing |= set(open_runs)
        verdict, _ = evidence.claim(claim)
        left = _hours(open_runs, minutes)
        print(f"{claim.number:>3} {claim.name}: {len(runs) - len(open_runs)} of {len(runs)} runs, {left}", end="")
        print(f"; {verdict.verdict}" if not open_runs or verdict.verdict != CANT_TELL else "")
    print(f"{len(missing)} runs are left in all, {_hours(missing, minutes)}")
    if pairs := len({(one.variants, seed) for one, seed in apart(evidence, register.choose(told.claims))}):
        print(f"{pairs} pairs of runs began from different starts: `run` carries out once more what they lack")
    return 0


def _hours(runs: Sequence[Wanted] | set[Wanted], minutes: dict[str, float]) -> str:
    known = [minutes[one.variant] for one in runs if one.variant in minutes]
    unknown = len(runs) - len(known)
    told = f"{sum(known) / 60:.1f} CPU hours left"
    return told + (f" and {unknown} runs of which no time is known" if unknown else "")


def _report(told: argparse.Namespace, register: Register) -> int:
    from page import as_json, write_report

    evidence = _evidence(told, register)
    try:
        written = write_report(evidence, told.docs, told.readme)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("error: plots of what was measured need matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    for file in written:
        print(f"wrote {file}")
    if told.json:
        _write_json(told.json, as_json(evidence))
    return 0


def _simulate(told: argparse.Namespace, register: Register) -> int:
    from dataclasses import asdict, replace

    from simulate import REGISTERS, Setting, measured_setting, simulate, told_rates

    given = {"effect": told.effect, "seeds": told.between_seeds, "questions": told.between_questions}
    given = {name: value for name, value in given.items() if value is not None}
    measured = replace(measured_setting(_evidence(told, register), Setting()), **given)
    for setting in [measured] if given else dict.fromkeys([Setting(), measured]):
        rates = simulate(register.rules, setting, told.registers or REGISTERS)
        print("\n".join(told_rates(setting, rates, stated=setting == Setting())))
    if told.json:
        _write_json(told.json, {"setting": asdict(setting), **asdict(rates)})
    return 0


def _check(told: argparse.Namespace, register: Register) -> int:
    check_jobs(register, list(register.variants))
    used = {name for claim in register.claims.values() for name in claim.variants}
    for name in sorted(register.variants.keys() - used):
        print(f"variant {name} is in no claim and would not be run")
    seeds = register.rules.looks[0]
    print(
        f"{len(register.claims)} claims with {sum(len(one.measures) for one in register.claims.values())} measures and "
        f"{len(register.variants)} variants: {len(used) * seeds} runs at the first look"
    )
    return 0


def _write_json(file: Path, told: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(told, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
