"""What was found, as `docs/claims.md` with a plot of each claim, and as README's lines."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from defaults import BETTER, RULE, judge_alternative, read_defaults, settings_beside
from evidence import QUIET, Evidence, digest, forgotten
from instruments import INSTRUMENTS
from metrics import MissingValueError
from papers import read_figures
from plots import drawn_curves, forest
from provenance import added_at, register_commit, registered_at, rules_at, uncommitted
from register import Claim, Measure, Register, RegisterError, load
from simulate import STATED, Setting, measured_setting
from verdicts import CANT_TELL, CONTRARY, DOES_NOT, EXCLUDED, HOLDS, ClaimVerdict, Finding
from wording import (
    NOT_MEASURED,
    by_name,
    expected,
    lacks_runs,
    looks_for_an_effect,
    shown_interval,
    shown_number,
    told_nuance,
    where_it_lies,
)

from maple_trl.files import write_atomically
from maple_trl.messages import did_you_mean


IN_PART, NOT_RUN = "measured in part", "not run"
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"
NO_CLAIM = "No claim is registered."
COMMAND = "python benchmarks/claims"
DIGEST = "Its files and those of the results have together the digest"
HEADLINES = Path(__file__).with_name("headlines.yaml")
SHOWN = 2
"""Measures of a claim that its row shows, those that decide it first; the others stand in its section."""


class Page:
    """
    All that is told of a register's results; the same register and results give the same bytes.

    Args:
        docs: the folder that it is written for.
    """

    def __init__(self, evidence: Evidence, docs: Path):
        self.evidence, self.register, self.docs = evidence, evidence.register, docs
        self.claims = list(self.register.claims.values())
        self.found = {claim.name: evidence.claim(claim) for claim in self.claims}
        self.figures = read_figures(self.register) if self.register.is_ours else {}
        """What papers report, by claim and measure."""
        self.plots = dict(self._plotted())
        """By name, as SVG."""
        self._registered = registered_at(self.register, self.claims)
        self._added = added_at(evidence.results)

    def _plotted(self) -> Iterator[tuple[str, str]]:
        for claim in self.claims:
            found = self.found[claim.name][1]
            shown = [
                (one, found[one.name], self.figure(claim, one))
                for one in claim.measures
                if found[one.name].estimate is not None
            ]
            if shown:
                yield claim.name, forest(shown)
                if curves := drawn_curves(self.evidence, claim):
                    yield f"{claim.name}-curves", curves

    # What stands in rows

    def has_numbers(self, claim: Claim) -> bool:
        """Tell whether any measure of a claim has an effect."""
        return any(one.estimate for one in self.found[claim.name][1].values())

    def verdict(self, claim: Claim) -> str:
        """Return the verdict on a claim as it is shown."""
        decided, found = self.found[claim.name]
        if not self.has_numbers(claim) and (needs := self.register.needs(claim)):
            return f"{NOT_RUN} (needs {needs})"
        deciding = [(one, found[one.name]) for one in claim.measures if one.role == "claim"]
        waiting = [lacks_runs(one_found) for _, one_found in deciding]
        if decided.verdict == CANT_TELL:
            told = NOT_MEASURED if all(waiting) else IN_PART if any(waiting) else CANT_TELL
            told += " (a second look is due)" * (told == CANT_TELL and any(each.wants_more for _, each in deciding))
        else:
            told = f"**{decided.verdict}**"
        spoken = [
            (one.name, told_nuance(one, each) if each.verdict == decided.verdict or each.nuance == CONTRARY else "")
            for one, each in deciding
        ]
        told += f" ({nuances})" if (nuances := by_name(spoken)) else ""
        if decided.failed:
            told += f"; **CONTROL FAILS: {', '.join(decided.failed)}**"
        controls = [one for one in claim.measures if one.role == "control"]
        unclear = [claim.measure(name) for name in decided.open if not lacks_runs(found[name])]
        told += f"; {len(unclear)} of {len(controls)} controls can't tell" if unclear else ""
        contrary = [f"{one.name} is {told_nuance(one, found[one.name])}" for one in unclear if found[one.name].nuance]
        told += f": {', '.join(contrary)}" if contrary else ""
        return told + "; no control" * (not controls and decided.verdict != CANT_TELL)

    def here(self, claim: Claim, more: str = "more below") -> str:
        """Return what was measured of a claim, in a row; `more` is said of how many measures it does not show."""
        found = self.found[claim.name][1]
        deciding = [one for one in claim.measures if one.role == "claim" and found[one.name].estimate]
        decided = self.found[claim.name][0].verdict
        deciding.sort(key=lambda one: (found[one.name].verdict != decided, one.expects == "equal"))
        told = [
            f"{one.name}: " * (len(deciding) > 1)
            + shown_interval(found[one.name], one)
            + " (not judged)" * found[one.name].withheld
            for one in deciding[:SHOWN]
        ]
        if not told:
            return "–"
        left = len(deciding) - SHOWN
        waiting = sum(lacks_runs(found[one.name]) for one in claim.measures if one.role == "claim")
        return "; ".join(told + [f"{left} {more}"] * (left > 0) + [f"{waiting} {NOT_MEASURED}"] * (waiting > 0))

    def seeds(self, claim: Claim) -> str:
        """Return how many seeds stand behind a claim's measures."""
        numbers = {one.estimate.seeds for one in self.found[claim.name][1].values() if one.estimate}
        return "–" if not numbers else "–".join(map(str, sorted({min(numbers), max(numbers)})))

    def tasks(self, claim: Claim) -> str:
        """Return the tasks that a claim is measured on."""
        return ", ".join(
            f"`{task}`" for task in dict.fromkeys(self.register.variants[one].task for one in claim.variants)
        )

    def row(self, claim: Claim) -> str:
        """Return a claim's row of a table."""
        cells = [
            f"[{claim.number}](#{claim.name})",
            claim.says,
            self.tasks(claim),
            f"{claim.paper}: {claim.figure}",
        ]
        return _row([*cells, self.here(claim), self.seeds(claim), self.verdict(claim)])

    def table(self) -> list[str]:
        """Return the table of all claims; nothing where there are none."""
        head = ["", "Claim", "Task", "Paper", "Here, with 95 % interval", "Seeds", "Verdict"]
        rows = [self.row(claim) for claim in self.claims]
        return [_row(head), _row(["---"] * len(head)), *rows] if rows else []

    def headlines(self, link: str) -> list[str]:
        """Return the table of the claims that are known best; `link` leads to the page. Nothing of another register."""
        if not self.register.is_ours:
            return []
        head = ["Claim", "Paper", "Here, with 95 % interval", "Verdict"]
        rows = []
        for name in read_headlines(self.register):
            claim = self.register.claims[name]
            told = [f"{claim.paper}: {claim.figure}", self.here(claim, "more"), self.verdict(claim)]
            rows.append(_row([f"[{claim.says}]({link}#{name}) ({self.tasks(claim)})", *told]))
        return [_row(head), _row(["---"] * len(head)), *rows]

    def decided(self, link: str) -> list[str]:
        """Return a line for each claim on which there is a verdict, those that hold first; `link` leads to the page."""
        told = [(self.verdict(claim), claim) for claim in self.claims]
        return [
            f"- {verdict}: [{claim.says}]({link}#{claim.name}) ({claim.paper}; here {self.here(claim, 'more')})"
            for wanted in (HOLDS, DOES_NOT)
            for verdict, claim in told
            if verdict.startswith(f"**{wanted}**")
        ]

    # The page

    def lines(self) -> Iterator[str]:
        """Yield the page's lines."""
        commit = register_commit(self.register)
        looks, usual = self.register.rules.looks, Setting()
        yield from (
            "# What the papers claim, measured here",
            "",
            f"Written by `{COMMAND} report` from the register (`benchmarks/claims/register.yaml` and `register/`) and the "
            "results beside it; not edited by hand.",
            f"The register is that of commit {commit}." if commit else "The register is not committed.",
            f"{DIGEST} `{digest(self.register, self.evidence.results)}`.",
            "All runs but those of claims that need a GPU train tiny omni models on one CPU thread: they tell whether an effect "
            "is there, not how large it is for a model of billions of parameters.",
            "Runs that are compared begin with the same weights and have the same rows to train on. Seeds differ in the order of rows "
            "and in what is sampled: no interval counts how much another start, or another set, would change.",
            "",
            *self.warnings(),
            *self.table(),
            "",
            *self.counts(),
            "",
            "## How it is decided",
            "",
            f"Seeds 0 to {looks[0] - 1}"
            + "".join(f", then 0 to {look - 1} where these can't tell" for look in looks[1:])
            + f"; {self.register.rules.confidence:.0%} over all looks, each at {1 - self.register.rules.level:.2%}. "
            f"Carry out what is missing with `{COMMAND} run`, see what is left with `{COMMAND} status`, and how often these "
            f"rules find effects that are there, or not there, with `{COMMAND} simulate`: where runs differ by {usual.seeds:g} from "
            f"seed to seed, and two variants by {usual.questions:g} from question to question, a measure finds a difference of "
            f"{usual.effect:g} in accuracy in at least {STATED['planted']:.0%} of cases, and one where there is none in at most "
            f"{STATED['null']:.0%}.{self.measured_deviations()}{self.reaches()} A claim holds by all of its measures and does not by one: of many claims, "
            f"some do not by chance. On a machine with a GPU, `{COMMAND} run gpu --workers 1` "
            "carries out the claims that need one.",
            "",
            f"- **Interval.** {self.register.rules.interval}{self.blurred()}",
            f"- **Decision.** {self.register.rules.decision}",
            f"- **Stopping.** {self.register.rules.stopping}",
            "- **Verdicts on claims.** `less than +0.03` (`more than × 0.9`) says that an effect as large as would matter is excluded, and "
            "nothing of a smaller one, or of one of the other sign; `the other way round`, that there is one of the other sign; "
            "`smaller than would matter`, that there is one, which is. What is expected to be equal, or no worse, also holds where it "
            "is `apart` or `below` (`above`) `by less than` what would matter; `perhaps by` so much says that nobody knows. Where several "
            "measures decide, their names stand before what is said of some. `A second look is due` where five seeds can't tell. "
            f"`{IN_PART}`: a measure that decides still lacks runs. `no control`: nothing rules out that the effect is something "
            "else than what is claimed.",
            "- **Seconds.** Those of whole runs are judged only where every run had a core to itself (at most "
            f"{QUIET:g} wall seconds to a CPU second) and both of a pair are of the same code; they count the training process and "
            "not those that decode media. Step times are taken in turns within one process.",
            "- **Plots.** Filled points decide, hollow ones are controls or parts, or are not judged; grey ticks are the smallest effects that would "
            "matter, crosses what the paper reports. "
            "Bands of curves are 95 % intervals of each mean by itself; measures compare by seed, so that bands which overlap "
            "say nothing of them.",
        )
        yield from self.defaults()
        open_ones = [claim for claim in self.claims if not self.has_numbers(claim)]
        for claim in self.claims:
            if self.has_numbers(claim):
                yield from self.section(claim)
        if open_ones:
            yield from (
                "",
                f"<details><summary>{len(open_ones)} claims that are registered and not measured</summary>",
            )
            for claim in open_ones:
                yield from self.section(claim)
            yield from ("", "</details>")
        yield from self.made_with()
        yield from self.changes()
        yield from self.former()

    def measured_deviations(self) -> str:
        """Return by how much the results themselves differ; nothing without results."""
        usual = Setting()
        measured = measured_setting(self.evidence, usual)
        if measured == usual:
            return ""
        return (
            f" The accuracies on this page differ by {measured.seeds:.3f} and {measured.questions:.3f}; the command tells how "
            "often an effect is found then."
        )

    def blurred(self) -> str:
        """Return of how many measures the questions leave a larger error than is asked for; nothing where of none."""
        findings = [one for claim in self.claims for one in self.found[claim.name][1].values() if one.estimate]
        blurred = sum(one.blurred for one in findings)
        told = (
            f" In {blurred} of {len(findings)} measures the questions leave a larger error than the register asks for "
        )
        return told + "(**too large** in their rows); their intervals have it, and are wide by it." if blurred else ""

    def reaches(self) -> str:
        """Return how far intervals of differences in accuracy reach, by task; nothing where there are none."""
        by_task: dict[str, list[float]] = {}
        for claim in self.claims:
            for one in claim.measures:
                estimate = self.found[claim.name][1][one.name].estimate
                if estimate and one.effect == "difference" and one.metric.text.endswith(".accuracy.all"):
                    reach = (estimate.high - estimate.low) / 2
                    by_task.setdefault(self.register.variants[one.of].task, []).append(reach)
        told = ", ".join(f"{statistics.median(own):.3f} on `{task}`" for task, own in sorted(by_task.items()))
        return f" Half an interval of a difference in accuracy is, in the median, {told}." if told else ""

    def defaults(self) -> Iterator[str]:
        """Yield which defaults of the configs the results bear on, and what they say of other values."""
        if not self.register.is_ours:
            return
        head = ["Field", "Default", "From", "Held against", "By", "Corrected for", "Found"]
        yield from ("", "## Defaults, and what decides them", "", RULE, "", _row(head), _row(["---"] * len(head)))
        defaults = read_defaults(self.register)
        for one in defaults:
            for other in one.alternatives:
                told = []
                for claim, name in other.signs:
                    measure = self.register.claims[claim].measure(name)
                    found, failed = self.found[claim][1][name], self.found[claim][0].failed
                    beside = settings_beside(self.register, defaults, one, measure)
                    shared = ", ".join(f"{field} {json.dumps(value)}" for field, value in beside.items())
                    told.append(
                        f"[{claim}](#{claim}), {name}"
                        + (f" (with {shared})" if shared else "")
                        + (f": {shown_interval(found, measure)}" if found.estimate else "")
                        + (f" (control fails: {', '.join(failed)})" if found.estimate and failed else "")
                    )
                said = judge_alternative(other, self.found, self.register)
                cells = [f"`{one.config}.{one.field}`", f"`{json.dumps(one.value)}`", one.source, other.value]
                yield _row(
                    [
                        *cells,
                        "<br>".join(told),
                        str(other.tests),
                        f"**{said}: the default is to change**" if said == BETTER else said,
                    ]
                )

    def counts(self) -> list[str]:
        """Return how many claims have which verdict, and what these rest on."""
        plain = [re.split(r"[,;(]", self.verdict(claim).replace("*", ""))[0].strip() for claim in self.claims]
        order = (HOLDS, DOES_NOT, CANT_TELL, IN_PART, NOT_MEASURED, NOT_RUN)
        failing = sum(bool(self.found[claim.name][0].failed) for claim in self.claims)
        counted = ", ".join(f"{one}: {plain.count(one)}" for one in order if one in plain)
        told = [f"Of {len(self.claims)} claims: {counted or 'none'}. Claims with a control that fails: {failing}."]
        holding = [claim for claim, verdict in zip(self.claims, plain, strict=True) if verdict == HOLDS]
        if holding:
            failed = sum(bool(self.found[claim.name][0].failed) for claim in holding)
            bare = sum(all(one.role != "control" for one in claim.measures) for claim in holding)
            harmless = sum(not looks_for_an_effect(claim) for claim in holding)
            told.append(
                f"- Of those that hold, {failed} have a control that fails, {bare} have no control at all; {harmless} say that "
                "nothing is lost, or differs, which a change without any effect would pass too."
            )
        refused = [claim for claim, verdict in zip(self.claims, plain, strict=True) if verdict == DOES_NOT]
        short = [claim for claim in refused if self._only_excludes(claim)]
        if refused:
            beside = [own for claim in short if (own := self._beside_the_papers(claim))]
            within = sum(map(all, beside))
            told.append(
                f"- Of those that do not, {len(refused) - len(short)} are contradicted: at least one measure goes the other way, or "
                f"differs, or is worse, by as much as would matter. {len(short)} only lack an effect of the size that was asked for, "
                f"which says nothing of a smaller one: the paper has a figure for {len(beside)} of these, which the intervals "
                f"of {within} hold and those of {len(beside) - within} exclude."
            )
        return ["\n\n".join(told[:2]), *told[2:]]

    def _only_excludes(self, claim: Claim) -> bool:
        """Tell whether each measure by which a claim does not hold lacks an effect of some size, and may have a smaller one."""
        found = self.found[claim.name][1]
        against_it = [found[one.name] for one in claim.measures if one.role == "claim"]
        return all(one.nuance == EXCLUDED for one in against_it if one.verdict == DOES_NOT)

    def _beside_the_papers(self, claim: Claim) -> list[bool]:
        """Return of the measures by which a claim does not hold, and of which the paper has a figure, whether intervals hold it."""
        found = self.found[claim.name][1]
        against_it = [one for one in claim.measures if one.role == "claim" and found[one.name].verdict == DOES_NOT]
        pairs = [(self.figure(claim, one), found[one.name].estimate) for one in against_it]
        return [own.holds(figure) for figure, own in pairs if figure is not None and own is not None]

    def figure(self, claim: Claim, measure: Measure) -> float | None:
        """Return what the paper reports of a measure, where that is a number of the same kind."""
        return self.figures.get(claim.name, {}).get(measure.name)

    def warnings(self) -> list[str]:
        """Return what makes results less than registered evidence."""
        told = [f"{file} is not as it is committed." for file in uncommitted(self.register)]
        every = {file for claim in self.claims for *_, file in self.runs(claim)}
        if old := self.not_after(rules_at(self.register), every):
            told.append(
                f"{old} of {len(every)} runs were not committed after the rules that decide: see the changes for why."
            )
        for claim in self.claims:
            at = self._registered.get(claim.name)
            files = {file for *_, file in self.runs(claim)}
            if old := self.not_after(at, files):
                told.append(
                    f"{old} of {len(files)} runs of `{claim.name}` were not committed after its text in the register: see "
                    "the register's changes for why."
                )
            told += self.mixed(claim)
        return [*(f"> **Warning.** {one}" for one in told), ""] if told else []

    def not_after(self, at: int | None, files: Collection[Path]) -> int:
        """Count result files that were committed at a time or before it."""
        return 0 if at is None else sum(self._added[file] <= at for file in files if file in self._added)

    def mixed(self, claim: Claim) -> Iterator[str]:
        """Yield in what the runs of a claim differ beside what the register says."""
        of_package: dict[str, set[str]] = {}
        for *_, file in self.runs(claim):
            for package, version in self.evidence.read_file(file)["packages"].items():
                of_package.setdefault(package, set()).add(version)
        several = {package: own for package, own in of_package.items() if len(own) > 1}
        if several:
            told = "; ".join(f"{package} {', '.join(sorted(own))}" for package, own in sorted(several.items()))
            yield f"Runs of `{claim.name}` were made with different libraries, which change numbers: {told}."

    def made_with(self) -> Iterator[str]:
        """Yield the libraries and the states of this package that runs were made with."""
        runs = {run for claim in self.claims for run in self.runs(claim)}
        results = [self.evidence.read_file(file) for *_, file in sorted(runs)]
        made = Counter(
            (", ".join(f"{name} {one}" for name, one in sorted(result["packages"].items())), result.get("source", ""))
            for result in results
        )
        yield from (
            "",
            "## Made with",
            "",
            "A run is not made anew when code changes that is not meant to change its numbers: what it is known by has its options, "
            "its task and its instruments, with their versions, and the seed.",
            "",
        )
        if not made:
            yield "No results."
        for (packages, source), count in sorted(made.items()):
            yield f"- {count} runs: {packages or 'libraries unknown'}; source {source or 'unknown'}"

    def runs(self, claim: Claim) -> list[tuple[str, int, Path]]:
        """Return the runs that a claim's findings stand on, by variant and seed, with their results."""
        found = self.found[claim.name][1]
        behind = {one.name: one_found.estimate for one in claim.measures if (one_found := found[one.name])}
        return sorted(
            {
                (name, seed, file)
                for one in claim.measures
                if (estimate := behind.get(one.name)) is not None
                for seed in range(estimate.seeds)
                for name, file in zip(one.variants, self.evidence.pair(one, seed), strict=True)
            }
        )

    def section(self, claim: Claim) -> Iterator[str]:
        """Yield what is told of one claim."""
        decided, found = self.found[claim.name]
        yield from (
            "",
            f'<a id="{claim.name}"></a>',
            "",
            f"## {claim.number}. {claim.says}",
            "",
            f"**{self.verdict(claim).replace('**', '')}**",
            "",
            f"- Paper: {claim.paper}, {claim.source}: {claim.figure}",
            f"- Here: {claim.here}",
            f"- Task: {self.tasks(claim)}",
            f"- Command: `{COMMAND} run {claim.name}`",
        )
        yield from self.loud(claim, decided, found)
        yield from self.parts(claim, found)
        if claim.measures:
            head = [
                "Measure",
                "Metric",
                "Of",
                "Against",
                "Expected",
                "Effect",
                "Paper",
                "Seeds",
                "Error of evaluation",
                "Verdict",
            ]
            yield from ("", _row(head), _row(["---"] * len(head)))
            for measure in claim.measures:
                yield self.measure_row(claim, measure, found[measure.name])
        for name, what in (
            (claim.name, "Effects with their intervals"),
            (f"{claim.name}-curves", "Learning curves, means over seeds with their 95 % intervals"),
        ):
            if name in self.plots:
                yield from ("", f"![{what}](claims/{name}.svg)")
        yield from self.rests_on(claim)

    def loud(self, claim: Claim, decided: ClaimVerdict, found: Mapping[str, Finding]) -> list[str]:
        """Return what controls say, where they do not hold."""
        doubt = ": the effect may be something else than what is claimed" * (decided.verdict != DOES_NOT)
        told = [
            f"- **The control {name} fails{doubt}**: {shown_interval(found[name], claim.measure(name))}, expected "
            f"{expected(claim.measure(name))}."
            for name in decided.failed
        ]
        waiting = [name for name in decided.open if lacks_runs(found[name])]
        unclear = [
            name + f" ({shown_interval(found[name], claim.measure(name))})" * (found[name].estimate is not None)
            for name in decided.open
            if name not in waiting
        ]
        told += [f"- Controls that can't tell: {', '.join(unclear)}."] if unclear else []
        return told + ([f"- Controls that are not measured: {', '.join(waiting)}."] if waiting else [])

    def parts(self, claim: Claim, found: Mapping[str, Finding]) -> Iterator[str]:
        """Yield what parts of what was changed do alone, where an effect of theirs is clear."""
        for one in claim.measures:
            if one.role == "part" and found[one.name].verdict == HOLDS:
                yield f"- Of the effect, the part {one.name} has alone: {shown_interval(found[one.name], one)}."

    def measure_row(self, claim: Claim, measure: Measure, found: Finding) -> str:
        """Return a measure's row."""
        parts = [path.split(".")[0] for path in measure.metric.paths]
        asks = any(getattr(INSTRUMENTS.get(part), "ASKS", False) for part in parts)
        evaluation = "not counted" if asks and found.estimate else "–"
        if found.estimate and not math.isnan(found.estimate.evaluation):
            evaluation = f"{found.estimate.evaluation:.2g}" + (" (**too large**)" if found.blurred else "")
        verdict = ", ".join(filter(None, (found.verdict, told_nuance(measure, found))))
        figure = self.figure(claim, measure)
        if found.reason:
            verdict += f" ({found.reason})"
        if found.censored:
            verdict += f"; {found.censored} runs never got there"
        return _row(
            [
                measure.name if measure.role == "claim" else f"{measure.name} ({measure.role})",
                f"`{measure.metric.text}`",
                self.side(measure, measure.of, found),
                self.side(measure, measure.against, found),
                f"{measure.effect} {expected(measure)}",
                shown_interval(found, measure) if found.estimate else "–",
                "–" if figure is None else shown_number(figure, measure) + where_it_lies(figure, found),
                str(found.estimate.seeds) if found.estimate else "–",
                evaluation,
                found.reason if lacks_runs(found) else verdict,
            ]
        )

    def side(self, measure: Measure, whose: str | float, found: Finding) -> str:
        """Return a variant's name with the mean and the standard deviation of its metric."""
        if isinstance(whose, float):
            return f"{whose:g}"
        if found.estimate is None:
            return f"`{whose}`"
        try:
            values = self.evidence.sample(measure, whose, range(found.estimate.seeds)).value
        except MissingValueError:
            return f"`{whose}`"
        return f"`{whose}` {statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}"

    def rests_on(self, claim: Claim) -> Iterator[str]:
        """Yield the results that a claim's findings are computed from."""
        runs = self.runs(claim)
        if not runs:
            return
        results = [self.evidence.read_file(file) for *_, file in runs]
        codes = {one.get("source") for one in results}
        starts = {(one["task"], one.get("start")) for one in results}
        more = len(starts) - len({task for task, _ in starts})
        told = f"{len(runs)} runs" + f", by {len(codes)} states of this package's code" * (len(codes) > 1)
        told += f", from {len(starts)} starts" * (more > 0)
        if more and any(len(one.variants) > 1 for one in claim.measures):
            told += ", both of a pair from the same, so that a variant may have other runs in another row"
        yield from ("", f"<details><summary>{told}</summary>", "")
        for name in dict.fromkeys(name for name, *_ in runs):
            variant = self.register.variants[name]
            files = [f"[{seed}]({_link(file, self.docs)})" for whose, seed, file in runs if whose == name]
            options = ", ".join(f"{key}: {value}" for key, value in variant.options.items())
            what = f"`{variant.recipe}` on `{variant.task}`" + (f" with `{options}`" if options else "")
            what += "" if variant.trained else ", untrained"
            yield f"- `{name}`: {what}; seeds {', '.join(files)}"
        yield from ("", "</details>")

    def changes(self) -> Iterator[str]:
        """Yield what was changed of the register."""
        yield from ("", "## Changes of the register", "")
        if not self.register.changes:
            yield "None."
        for change in self.register.changes:
            yield f"- {change.date.isoformat()}: {change.what} {change.why}"

    def former(self) -> Iterator[str]:
        """Yield the results of what the register had once."""
        yield from ("", "## No longer in the register", "")
        files = forgotten(self.evidence)
        if not files:
            yield "No results."
        for file, result in files:
            options = ", ".join(f"{key}: {value}" for key, value in result.get("options", {}).items())
            accuracy = result["after"].get("trained", {}).get("accuracy", {}).get("all")
            yield (
                f"- [{file.stem}]({_link(file, self.docs)}): `{result.get('recipe')}` on `{result['task']}` "
                f"(version {result['task_version']})"
                + (f" with `{options}`" if options else "")
                + f", seed {result['seed']}"
                + (f": accuracy {accuracy:.3f}" if accuracy is not None else "")
            )


def read_headlines(register: Register, file: Path = HEADLINES) -> list[str]:
    """
    Return the names of the claims that README's table shows.

    Raises:
        RegisterError: for a claim that there is not, and one that stands twice.
    """
    names = load(file)[0]
    for name in names:
        if name not in register.claims:
            raise RegisterError(f"{file.name}: there is no claim {name!r}{did_you_mean(name, register.claims)}")
        if names.count(name) > 1:
            raise RegisterError(f"{file.name}: {name} stands there twice")
    return names


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _link(file: Path, docs: Path) -> str:
    return Path(os.path.relpath(file, docs.resolve())).as_posix()


# Files


def write_report(evidence: Evidence, docs: Path, readme: Path) -> list[Path]:
    """Write the page, its plots and, where a file has the two markers, the lines between them; return what was written."""
    page = Page(evidence, docs)
    plots = docs / "claims"
    plots.mkdir(parents=True, exist_ok=True)
    written = []
    for name, svg in page.plots.items():
        written.append(plots / f"{name}.svg")
        write_atomically(written[-1], svg)
    for stale in set(plots.glob("*.svg")) - set(written):
        stale.unlink()
    written.append(docs / "claims.md")
    write_atomically(written[-1], "\n".join(page.lines()) + "\n")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if BEGIN in text and END in text.partition(BEGIN)[2]:
        before, _, rest = text.partition(BEGIN)
        link = _link(docs.resolve() / "claims.md", readme.resolve().parent)
        told, decided = "\n".join(page.counts()) if page.claims else NO_CLAIM, "\n".join(page.decided(link))
        if headlines := "\n".join(page.headlines(link)):
            told = f"{headlines}\n\n{told}"
        if decided:  # by `markdown` the site reads it as the list that it is elsewhere anyhow
            told += f"\n\n<details markdown><summary>Those with a verdict</summary>\n\n{decided}\n\n</details>"
        write_atomically(readme, f"{before}{BEGIN}\n\n{told}\n\n{END}{rest.partition(END)[2]}")
        written.append(readme)
    return written


def as_json(evidence: Evidence) -> dict[str, Any]:
    """Return verdicts and intervals, by claim and measure."""
    told: dict[str, Any] = {}
    for claim in evidence.register.claims.values():
        decided, found = evidence.claim(claim)
        told[claim.name] = {
            "number": claim.number,
            "verdict": decided.verdict,
            "controls_failed": list(decided.failed),
            "measures": {
                name: {"verdict": one.verdict, "nuance": one.nuance, "reason": one.reason, "censored": one.censored}
                | (
                    {
                        "effect": one.estimate.value,
                        "interval": [one.estimate.low, one.estimate.high],
                        "seeds": one.estimate.seeds,
                    }
                    if one.estimate
                    else {}
                )
                for name, one in found.items()
            },
        }
    return told
