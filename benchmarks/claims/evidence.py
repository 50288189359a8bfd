"""From results on disk to findings: which runs a register asks for, which are there, and what they say."""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metrics import Censored, MissingValueError
from register import Claim, Measure, Register
from runs import Run, questions_file, read_result, source
from scores import left_out, whole
from verdicts import CANT_TELL, ClaimVerdict, Finding, Sample, judge, judge_claim, judge_once


GROUPS = 32
"""Groups of clips that are left out in turn."""
QUIET = 1.1
"""Wall seconds to a CPU second up to which a run had a core to itself; CPU seconds, too, grow where it had not."""


class Evidence:
    """
    The results of a register's runs in a folder.

    Args:
        quick: of the runs that only show that they can be carried out.
    """

    def __init__(self, register: Register, results: Path, quick: bool = False):
        self.register, self.results, self.quick = register, results, quick
        self._there: set[Path] = set()
        self._runs: dict[tuple[str, int, str], tuple[Run, Path]] = {}
        self._whole: dict[Path, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {}
        self._without: dict[Path, list[dict[str, Any]]] = {}

    def run(self, variant: str, seed: int, start: str = "") -> tuple[Run, Path]:
        """Return a variant's run and where its result lies; `start` of one that was carried out once more, from another."""
        if (variant, seed, start) not in self._runs:
            run = self.register.variants[variant].run(seed, self.quick)
            self._runs[variant, seed, start] = run, run.file(self.results, start)
        return self._runs[variant, seed, start]

    def there(self, variant: str, seed: int, start: str = "") -> bool:
        """Tell whether a run has a result; a damaged one is an error, not a run that is done."""
        file = self.run(variant, seed, start)[1]
        if file not in self._there and read_result(file) is not None:
            self._there.add(file)
        return file in self._there

    def seeds(self, variants: Sequence[str], seeds: Sequence[int] | None = None) -> list[int]:
        """Return the seeds that all variants have, from 0 on without a gap unless they are told."""
        if seeds is not None:
            return [seed for seed in seeds if all(self.there(name, seed) for name in variants)]
        found: list[int] = []
        while len(found) < self.register.rules.looks[-1] and all(self.there(name, len(found)) for name in variants):
            found.append(len(found))
        return found

    def read(self, variant: str, seed: int) -> dict[str, Any]:
        """Return a run's result, with the accuracies and questions of its task."""
        return self.read_file(self.run(variant, seed)[1])

    def read_file(self, file: Path) -> dict[str, Any]:
        """Return a result, as [`read`] does."""
        return self._read(file)[0]

    def by_start(self, variant: str, seed: int) -> dict[str, Path]:
        """Return the results of a run by what it began from, the first one first; where none tells, by nothing."""
        plain = self.run(variant, seed)[1]
        found: dict[str, Path] = {}
        for file in (plain, *sorted(plain.parent.glob(f"{plain.stem}-*.json"))):
            found.setdefault(self.read_file(file).get("start", ""), file)
        return found

    def pair(self, measure: Measure, seed: int) -> tuple[Path, ...]:
        """
        Return the results of a measure's variants for a seed that began from the same weights and tables.

        A task that is made on another machine is another start, by rounding, and two runs are compared from the same one.
        Nothing is returned where they have none in common.
        """
        files = tuple(self.run(name, seed)[1] for name in measure.variants)
        if len({self.read_file(file).get("start") for file in files}) == 1:
            return files
        found = [self.by_start(name, seed) for name in measure.variants]
        shared = next((start for start in found[0] if all(start in other for other in found)), None)
        return () if shared is None else tuple(other[shared] for other in found)

    def without(self, file: Path) -> list[dict[str, Any]]:
        """Return a result without each group of clips in turn."""
        if file not in self._without:
            _, result, questions = self._read(file)
            clips = max(questions["clips"]) + 1
            groups = [range(first, clips, GROUPS) for first in range(min(GROUPS, clips))]
            self._without[file] = left_out(result, questions, groups)
        return self._without[file]

    def _read(self, file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if file not in self._whole:
            result = read_result(file)
            assert result is not None, file
            questions = self._questions(questions_file(file, result))
            self._whole[file] = whole(result, questions), result, questions
        return self._whole[file]

    @functools.cache  # noqa: B019 - one evidence lives as long as the program
    def _questions(self, file: Path) -> dict[str, Any]:
        found = read_result(file)
        if found is None:
            raise FileNotFoundError(f"{file} is missing: without it nobody knows which questions the scores are of")
        return found

    def sample(self, measure: Measure, variant: str, seeds: Sequence[int]) -> Sample:
        """
        Return the metric of a measure of one of its variants, over seeds whose pairs have a start in common.

        Raises:
            MissingValueError: naming variant and seed.
        """
        metric, place = measure.metric, measure.variants.index(variant)
        values, without = [], []
        for seed in seeds:
            file = self.pair(measure, seed)[place]
            try:
                values.append(metric.value(self.read_file(file)))
                if metric.reads_questions:
                    without.append([metric.value(each) for each in self.without(file)])
            except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
                told = f"no {error}" if isinstance(error, KeyError) else error
                raise MissingValueError(f"seed {seed} of {variant}: {told}") from error
        if without and all(left == [value] * len(left) for value, left in zip(values, without, strict=True)):
            without = []
        return Sample(values, without, [isinstance(value, Censored) for value in values])

    def measure(self, measure: Measure, seeds: Sequence[int] | None = None) -> Finding:
        """Return what the runs say of a measure; with seeds told, by one look at those."""
        there = self.seeds(measure.variants, seeds)
        parted = [seed for seed in there if not self.pair(measure, seed)]
        found = there[: there.index(parted[0])] if parted else there
        looks = self.register.rules.looks if seeds is None else (len(there),)
        if len(found) < (least := max(2, looks[0])):
            told = f" ({len(found)} of {least} seeds)" if found else ""
            return Finding(CANT_TELL, reason=f"not measured{told}{told_apart(parted)}")
        for look in looks:
            if look > len(found):
                break
            finding = self._judged(measure, found[:look], judge_once if seeds is not None else judge)
            if not finding.wants_more:
                break
        if finding.wants_more and parted:
            finding = replace(finding, reason=f"{finding.reason}{told_apart(parted)}".removeprefix("; "))
        if finding.estimate is not None and (told := self.not_comparable(measure, found[: finding.estimate.seeds])):
            return replace(finding, verdict=CANT_TELL, nuance="", reason=told, wants_more=False, withheld=True)
        return finding

    def not_comparable(self, measure: Measure, seeds: Sequence[int]) -> str:
        """Return why seconds of runs don't compare: other programs beside them, or other code; nothing where they do."""
        if not measure.metric.reads_seconds:
            return ""
        pairs = [[self.read_file(file) for file in self.pair(measure, seed)] for seed in seeds]
        runs = [result for pair in pairs for result in pair]
        disturbed = sum(one["cost"]["wall_seconds"] > QUIET * one["cost"]["cpu_seconds"] for one in runs)
        mixed = sum(len({result.get("source") for result in pair}) > 1 for pair in pairs)
        told = [f"{disturbed} of {len(runs)} runs had other programs beside them"] * (disturbed > 0)
        told += [f"{mixed} of {len(pairs)} pairs are of different code"] * (mixed > 0)
        return f"seconds that don't compare: {', and '.join(told)}" if told else ""

    def _judged(self, measure: Measure, seeds: Sequence[int], judged: Callable[..., Finding]) -> Finding:
        try:
            of = self.sample(measure, measure.of, seeds)
            against = self._against(measure, seeds, of)
        except MissingValueError as error:
            return Finding(CANT_TELL, reason=str(error))
        return judged(of, against, measure, self.register.rules)

    def _against(self, measure: Measure, seeds: Sequence[int], of: Sample) -> Sample:
        if isinstance(measure.against, float):
            same = [[measure.against] * len(left) for left in of.without]
            return Sample([measure.against] * len(seeds), same, [False] * len(seeds))
        return self.sample(measure, measure.against, seeds)

    def claim(self, claim: Claim, seeds: Sequence[int] | None = None) -> tuple[ClaimVerdict, dict[str, Finding]]:
        """Return what the runs say of a claim, and of each of its measures."""
        found = {measure.name: self.measure(measure, seeds) for measure in claim.measures}
        return judge_claim((one.name, one.role, found[one.name]) for one in claim.measures), found

    def minutes(self) -> dict[str, float]:
        """
        Return the CPU minutes of a run of each variant: the mean of its runs, else of its task's, else of all.

        Where there is no run at all, nothing is returned.
        """
        known: dict[str, list[float]] = {}
        by_task: dict[str, list[float]] = {}
        for name, variant in self.register.variants.items():
            for seed in range(self.register.rules.looks[-1]):
                result = read_result(self.run(name, seed)[1])
                if result is not None:
                    known.setdefault(name, []).append(result["minutes"])
                    by_task.setdefault(variant.task, []).append(result["minutes"])
        every = [value for own in by_task.values() for value in own]
        found = {
            name: known.get(name) or by_task.get(variant.task) or every
            for name, variant in self.register.variants.items()
        }
        return {name: statistics.fmean(own) for name, own in found.items() if own}


def told_apart(seeds: Sequence[int]) -> str:
    """Return that pairs of some seeds began from different starts; nothing where there are none."""
    return f"; runs of seed {', '.join(map(str, seeds))} began from different starts" if seeds else ""


@dataclass(frozen=True)
class Wanted:
    """A run that claims ask for; with `start`, once more from that one, for the sake of a run that began there."""

    variant: str
    seed: int
    start: str = ""


def wanted_runs(evidence: Evidence, claims: Sequence[Claim], look: int) -> Iterator[Wanted]:
    """
    Yield the runs of a look, each once, in the order in which they are carried out: seed by seed and claim by claim.

    Those of a further look are of the measures that can't tell, of claims that can't.
    """
    looks = evidence.register.rules.looks
    seeds = range(looks[look - 1] if look else 0, looks[look])
    asked: dict[str, None] = {}
    for claim in claims:
        if look == 0:
            asked |= dict.fromkeys(claim.variants)
            continue
        before = range(looks[look - 1])
        verdict, found = evidence.claim(claim, before)
        if verdict.verdict == CANT_TELL:
            undecided = [
                one
                for one in claim.measures
                if (told := found[one.name]).verdict == CANT_TELL
                and told.estimate
                and told.estimate.seeds == len(before)
                and not told.withheld
            ]
            asked |= dict.fromkeys(name for one in undecided for name in one.variants)
    done: set[Path] = set()
    for seed in seeds:
        for name in asked:
            file = evidence.run(name, seed)[1]
            if file not in done:
                done.add(file)
                yield Wanted(name, seed)


def wanted_anew(evidence: Evidence, claims: Sequence[Claim], start_here: Callable[[str], str]) -> Iterator[Wanted]:
    """
    Yield the runs that pairs lack which began from different starts, from the one that is made here.

    They are those of the first look, and of the second one where that is due.

    Args:
        start_here: returns what a task begins from here, by its name.
    """
    asked: dict[Wanted, None] = {}
    for measure, seed in apart(evidence, claims):
        here = {name: start_here(evidence.register.variants[name].task) for name in measure.variants}
        lacking = [name for name in here if here[name] not in evidence.by_start(name, seed)]
        asked |= {Wanted(name, seed, here[name]): None for name in lacking}
    yield from asked


def apart(evidence: Evidence, claims: Sequence[Claim]) -> Iterator[tuple[Measure, int]]:
    """Yield the measures and seeds whose pairs began from different starts, and that a finding waits for."""
    for claim in claims:
        verdict, found = evidence.claim(claim)
        for measure in claim.measures:
            finding = found[measure.name]
            first_look = finding.estimate is None
            if first_look or (finding.wants_more and verdict.verdict == CANT_TELL):
                seeds = evidence.seeds(measure.variants)
                for seed in seeds[: evidence.register.rules.looks[0]] if first_look else seeds:
                    if not evidence.pair(measure, seed):
                        yield measure, seed


def digest(register: Register, results: Path) -> str:
    """Return what all files of a register and of its results together are known by, in 16 hexadecimal digits."""
    told = hashlib.sha256()
    for top, files in ((register.folder, register.files), (results, sorted(results.glob("*/*.json")))):
        for file in files:
            told.update(f"{file.relative_to(top).as_posix()} {file.stat().st_size}\n".encode() + file.read_bytes())
    return told.hexdigest()[:16]


def forget_other_code(results: Path) -> None:
    """Delete quick results of other code than that which is here: they would not show that runs can be carried out now."""
    here = source()
    for file in results.glob("*/*.json"):
        told = read_result(file)
        if told and told.get("quick") and told.get("source") != here:
            file.unlink()


def forgotten(evidence: Evidence) -> list[tuple[Path, Mapping[str, Any]]]:
    """Return the results in the folder that no run of the register has."""
    register = evidence.register
    known = {evidence.run(name, seed)[1] for name in register.variants for seed in range(register.rules.looks[-1])}
    again = evidence.results.glob("*/*-*.json")
    known |= {file for file in again if file.with_name(f"{file.stem.partition('-')[0]}.json") in known}
    files = sorted(set(evidence.results.glob("*/*.json")) - known)
    found = [(file, read_result(file)) for file in files if not file.name.startswith("questions-")]
    return [(file, result) for file, result in found if result is not None]
