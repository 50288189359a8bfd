"""The register: what is claimed and how it is decided, read from `register.yaml` and `register/*.yaml`, and checked."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from devices import has_gpu, on_gpu
from metrics import Metric, read_metric
from runs import HERE, KEPT, Run, is_kept
from tasks import load_task

from maple_trl.messages import did_you_mean


PAPERS = ("MAPLE", "AVATAR", "ours")
EFFECTS = ("difference", "ratio")
EXPECTATIONS = ("above", "below", "equal", "not below", "not above")
ROLES = ("claim", "control", "part")
NEEDS = {"gpu": "a GPU", "clips": "a folder of real clips with its `qa.json`, which MAPLE_CLIPS names"}
"""What a machine may lack, by the word in the register."""
IS_THERE = {
    "gpu": has_gpu,
    "clips": lambda: Path(os.environ.get("MAPLE_CLIPS") or "nowhere", "qa.json").is_file(),
}
"""Whether this one has it."""
LEAST_SEEDS = 5
ALWAYS = ("after", "cost", "log", "minutes", "stages")
"""What every result holds, beside its instruments; `stages` where the recipe has some."""


class RegisterError(ValueError):
    """The register says something that cannot be carried out; the message says where, and what would be right."""


@dataclass(frozen=True)
class Rules:
    """
    How measures are decided.

    Attributes:
        confidence: of an interval, over both looks.
        looks: numbers of seeds after which is looked.
        level: two-sided, of each look.
        evaluation: the largest standard error of an evaluation, as a share of the smallest effect that matters.
        interval, decision, stopping: the same in words.
    """

    confidence: float
    looks: tuple[int, ...]
    level: float
    evaluation: float
    interval: str
    decision: str
    stopping: str


@dataclass(frozen=True)
class Change:
    """What of the register was changed after it was first measured, and why."""

    date: datetime.date
    what: str
    why: str


@dataclass(frozen=True)
class Variant:
    """What is trained, by one name; its seeds are its runs."""

    name: str
    task: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    instruments: tuple[str, ...] = ()
    trained: bool = True

    def run(self, seed: int, quick: bool = False) -> Run:
        """Return the variant's run of a seed."""
        return Run(
            task=self.task,
            recipe=self.recipe,
            seed=seed,
            options=self.options,
            instruments=self.instruments,
            trained=self.trained,
            quick=quick,
        )


@dataclass(frozen=True)
class Measure:
    """
    One number that a claim stands on: a metric of a variant beside that of another, or beside a number.

    Attributes:
        effect: `difference` or `ratio`; `as` in the file.
        expects: `above`, `below`, `equal`, `not below` or `not above`, of no effect.
        least: the smallest effect that would matter; of a ratio, its distance from 1.
        role: `claim`; `control`: what the effect is not, or what must be there for it to mean anything; or `part`: what a part
            of what was changed does alone, which decides nothing and can't fail.
    """

    name: str
    metric: Metric
    of: str
    against: str | float
    effect: str
    expects: str
    least: float
    role: str

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants whose runs it needs."""
        return (self.of,) if isinstance(self.against, float) else (self.of, self.against)


@dataclass(frozen=True)
class Claim:
    """
    What a paper says, and what of it is measured here.

    Attributes:
        file, lines: where it is registered, lines from 1, both included.
        needs: what it can't be measured without, of `NEEDS`; [`Register.needs`] knows what its tasks need besides.
    """

    name: str
    number: int
    paper: str
    source: str
    says: str
    figure: str
    here: str
    measures: tuple[Measure, ...]
    file: Path
    lines: tuple[int, int]
    needs: str = ""

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants whose runs it needs, in the order in which its measures name them."""
        return tuple(dict.fromkeys(name for measure in self.measures for name in measure.variants))

    def measure(self, name: str) -> Measure:
        """Return a measure by its name, which must be one of the claim's."""
        return next(one for one in self.measures if one.name == name)


@dataclass(frozen=True)
class Register:
    """All that is registered."""

    folder: Path
    rules: Rules
    changes: tuple[Change, ...]
    variants: Mapping[str, Variant]
    claims: Mapping[str, Claim]

    @property
    def is_ours(self) -> bool:
        """Whether it is the one that comes with these benchmarks."""
        return self.folder == HERE

    @property
    def files(self) -> list[Path]:
        """The files that it was read from."""
        return register_files(self.folder)

    def needs(self, claim: Claim) -> str:
        """Return what a claim needs that a machine may lack, by itself or for its tasks; nothing of most."""
        return "; ".join(told for told, _ in self._needs(claim))

    def lacks(self, claim: Claim) -> str:
        """Return what a claim needs that is not here."""
        return "; ".join(told for told, there in self._needs(claim) if not there)

    def _needs(self, claim: Claim) -> Iterator[tuple[str, bool]]:
        if claim.needs:
            yield NEEDS[claim.needs], IS_THERE[claim.needs]()
        for name in dict.fromkeys(self.variants[variant].task for variant in claim.variants):
            task = load_task(name)
            if hasattr(task, "NEEDS"):
                yield task.NEEDS, task.is_there()

    def choose(self, names: Sequence[str]) -> list[Claim]:
        """Return claims by name, by number or by what they need (`gpu`), in the register's order; all where none is named."""
        wanted = set(names)
        by_word = {one.name: {one.name, str(one.number), one.needs} for one in self.claims.values()}
        found = [one for one in self.claims.values() if not names or by_word[one.name] & wanted]
        unknown = sorted(wanted.difference(*by_word.values()))
        if unknown:
            raise RegisterError(
                f"no claim {unknown[0]!r}"
                + did_you_mean(unknown[0], self.claims, f"there are {', '.join(self.claims)}")
            )
        return found


def register_files(folder: Path) -> list[Path]:
    """Return the register's files: its rules, then what is claimed by topic."""
    return [folder / "register.yaml", *sorted((folder / "register").glob("*.yaml"))]


def read_register(folder: Path = HERE) -> Register:
    """
    Read `register.yaml` and `register/*.yaml` of a folder.

    Raises:
        RegisterError: for the first mistake, with file, claim and field.
    """
    first, *topics = register_files(folder)
    if not first.is_file():
        raise RegisterError(f"no register in {folder}: it has no register.yaml")
    top = _Part(load(first)[0], first.name)
    top.only(required=("rules", "changes"))
    changes = tuple(_change(_Part(one, f"{first.name}: changes")) for one in top.typed("changes", list, "a list"))
    rules = _rules(top.part("rules"))
    variants: dict[str, Variant] = {}
    places: dict[str, str] = {}
    loaded = []
    for file in topics:
        told, lines = load(file)
        part = _Part(told, f"register/{file.name}")
        part.only(optional=("variants", "claims"))
        loaded.append((file, part, lines))
        for name, fields in part.items("variants"):
            if name in variants:
                raise fields.error(f"is also in {places[name]}; a variant has one place")
            variants[name], places[name] = _variant(name, fields), part.where
    claims: dict[str, Claim] = {}
    for file, part, lines in loaded:
        for name, fields in part.items("claims"):
            if name in claims:
                raise fields.error(f"is also in register/{claims[name].file.name}; a claim has one place")
            claims[name] = _claim(name, fields, variants, file, lines[name])
    ordered = dict(sorted(claims.items(), key=lambda item: item[1].number))
    return Register(folder, rules, changes, variants, ordered)


def check_jobs(register: Register, names: Sequence[str]) -> None:
    """
    Parse the jobs of variants, as their runs would, without making or training anything.

    Raises:
        RegisterError: for an option that no config has, and for whatever a config refuses.
    """
    from worker import parse_jobs

    for name in names:
        with tempfile.TemporaryDirectory(prefix="claims-") as output:
            try:
                parse_jobs(register.variants[name].run(0), Path("unprepared"), Path(output))
            except (ValueError, TypeError) as error:
                told = str(error).replace(f"{output}/", "")
                raise RegisterError(f"variant {name}: {told}") from error


class _Part:
    """A mapping of the register with where it stands, for errors."""

    def __init__(self, fields: Any, where: str):
        self.where = where
        if not isinstance(fields, dict):
            raise self.error(f"must be a mapping, got {fields!r}")
        self.fields = fields

    def error(self, what: str) -> RegisterError:
        return RegisterError(f"{self.where}: {what}")

    def only(self, required: Sequence[str] = (), optional: Sequence[str] = ()) -> None:
        known = [*required, *optional]
        for name in self.fields:
            if name not in known:
                advice = did_you_mean(str(name), known, f"there are {', '.join(known)}")
                raise self.error(f"unknown key {name!r}{advice}")
        for name in required:
            if self.fields.get(name) is None:
                raise self.error(f"{name} is missing")

    def typed(self, name: str, kind: type | tuple[type, ...], said: str, default: Any = None) -> Any:
        value = self.fields.get(name)
        value = default if value is None else value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{name} must be {said}, got {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.typed(name, str, "text", default)
        if default is None and not value.strip():
            raise self.error(f"{name} is empty")
        return " ".join(value.split())

    def number(self, name: str, low: float, high: float) -> float:
        value = self.typed(name, (int, float), "a number")
        if not low < value < high:
            raise self.error(f"{name} must be above {low} and below {high}, got {value}")
        return float(value)

    def one_of(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        value = self.fields.get(name, default)
        if value not in known:
            raise self.error(f"{name} must be one of {', '.join(filter(None, known))}, got {value!r}")
        return value

    def part(self, name: str) -> _Part:
        return _Part(self.fields[name], f"{self.where}: {name}")

    def items(self, name: str) -> list[tuple[str, _Part]]:
        fields = self.typed(name, dict, "a mapping of names", {})
        singular = {"variants": "variant", "claims": "claim", "measures": "measure"}[name]
        for one in fields:
            if not isinstance(one, str) or not one.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise self.error(f"{singular} {one!r}: a name is of letters, digits, '-', '_' and '.'")
        return [(one, _Part(value, f"{self.where}: {singular} {one}")) for one, value in fields.items()]


def _rules(part: _Part) -> Rules:
    part.only(required=("confidence", "looks", "level", "evaluation", "interval", "decision", "stopping"))
    looks = part.typed("looks", list, "a list of numbers of seeds")
    if not looks or any(not isinstance(look, int) or look < LEAST_SEEDS for look in looks):
        raise part.error(f"looks must be numbers of at least {LEAST_SEEDS} seeds, got {looks}")
    if sorted(set(looks)) != looks:
        raise part.error(f"looks must grow, got {looks}")
    confidence, level = part.number("confidence", 0.5, 1), part.number("level", 0, 0.5)
    if len(looks) > 1 and level >= round(1 - confidence, 9):
        raise part.error(
            f"level {level} is not corrected for {len(looks)} looks: it must be below {1 - confidence:.4g}, "
            "e.g. 0.0294 for two at 95 % (Pocock)"
        )
    return Rules(
        confidence,
        tuple(looks),
        level,
        part.number("evaluation", 0, 1),
        *(part.text(name) for name in ("interval", "decision", "stopping")),
    )


def _change(part: _Part) -> Change:
    part.only(required=("date", "what", "why"))
    return Change(part.typed("date", datetime.date, "a date such as 2026-12-24"), part.text("what"), part.text("why"))


def _variant(name: str, part: _Part) -> Variant:
    part.only(required=("task", "recipe"), optional=("options", "instruments", "trained"))
    options = part.typed("options", dict, "a mapping of job options", {})
    if "seed" in options:
        raise part.error("options: seed is no option of a variant; its runs differ by it")
    instruments = part.typed("instruments", list, "a list of names", [])
    variant = Variant(
        name,
        part.text("task"),
        part.text("recipe"),
        options,
        tuple(instruments),
        part.typed("trained", bool, "true or false", True),
    )
    try:
        load_task(variant.task)
        variant.run(0).config()
    except ValueError as error:
        raise part.error(str(error)) from error
    return variant


_CLAIM = ("number", "paper", "source", "says", "figure", "here", "measures")


def _claim(name: str, part: _Part, variants: Mapping[str, Variant], file: Path, lines: tuple[int, int]) -> Claim:
    part.only(required=_CLAIM, optional=("needs",))
    measures = tuple(_measure(one, fields, variants) for one, fields in part.items("measures"))
    if not any(measure.role == "claim" for measure in measures):
        raise part.error("measures: none has the role claim, so that nothing would decide it")
    needs = part.one_of("needs", ("", *NEEDS), "")
    for variant in (variants[one] for measure in measures for one in measure.variants):
        if needs != "gpu" and on_gpu(load_task(variant.task)):
            raise part.error(f"needs must be gpu, on which runs of the task {variant.task} are carried out")
    return Claim(
        name,
        part.typed("number", int, "the claim's number"),
        part.one_of("paper", PAPERS),
        *(part.text(field) for field in ("source", "says", "figure", "here")),
        measures,
        file,
        lines,
        needs,
    )


def _measure(name: str, part: _Part, variants: Mapping[str, Variant]) -> Measure:
    part.only(required=("metric", "of", "against", "expects", "least"), optional=("as", "role"))
    effect, expects = part.one_of("as", EFFECTS, "difference"), part.one_of("expects", EXPECTATIONS)
    against = part.typed("against", (str, int, float), "a variant, or a number")
    if not isinstance(against, str):
        against = part.number("against", 0 if effect == "ratio" else -1e18, 1e18)
    upwards = expects in ("above", "not above")
    least = part.number("least", 0, 1 if effect == "ratio" and not upwards else 1e18)
    try:
        metric = read_metric(part.text("metric"))
    except ValueError as error:
        raise part.error(f"metric: {error}") from error
    measure = Measure(
        name, metric, part.text("of"), against, effect, expects, least, part.one_of("role", ROLES, "claim")
    )
    for field_name, variant in zip(("of", "against"), measure.variants, strict=False):
        if variant not in variants:
            advice = did_you_mean(variant, variants, f"there are {', '.join(variants)}")
            raise part.error(f"{field_name}: no variant {variant!r}{advice}")
        _check_paths(part, metric, variants[variant])
    if measure.of == measure.against:
        raise part.error(f"against is {measure.of}, too: a variant differs from itself by nothing")
    if len(tasks := {variants[one].task for one in measure.variants}) > 1:
        raise part.error(
            f"of and against are of different tasks, {' and '.join(sorted(tasks))}, and begin from different starts"
        )
    return measure


def _check_paths(part: _Part, metric: Metric, variant: Variant) -> None:
    """See that results of a variant have what a metric reads."""
    for path in metric.paths:
        first, _, rest = path.partition(".")
        if first not in (*ALWAYS, *variant.instruments):
            raise part.error(
                f"metric {metric.text} reads {first!r}, which is no instrument of {variant.name}; a result has "
                f"{', '.join(ALWAYS)} and, of this variant, {', '.join(variant.instruments) or 'no instrument'}"
            )
        if first == "log" and rest and not is_kept(rest):
            raise part.error(f"metric {metric.text} reads {rest!r} of the log; kept of it is {', '.join(KEPT)}")
        if first == "after" and rest:
            access = rest.split(".")[0]
            known = ("trained", *load_task(variant.task).ACCESSES)
            if access not in known:
                raise part.error(
                    f"metric {metric.text}: {variant.task} is not asked by {access!r}, but by {', '.join(known)}"
                )


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses a name that is given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise RegisterError(f"line {line}: {key!r} cannot be a name")
            if key in seen:
                raise RegisterError(f"line {line}: {key} is given twice, first in line {seen[key]}")
            seen[key] = line
        return super().construct_mapping(node, deep)


def load(file: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """
    Return what a file holds, and the first and last line of each of its claims.

    Raises:
        RegisterError: for a name that is given twice, and for what is no YAML.
    """
    text = file.read_text(encoding="utf-8")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        told = loader.construct_document(root) if root else None
    except RegisterError as error:
        raise RegisterError(f"{file.name}: {error}") from error
    except yaml.YAMLError as error:
        raise RegisterError(f"{file.name}: is no YAML: {error}") from error
    lines: dict[str, tuple[int, int]] = {}
    rows = text.splitlines()
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "claims" and isinstance(value, yaml.MappingNode):
            for name, claim in value.value:
                last = claim.end_mark.line + bool(claim.flow_style)  # of a block, the mark is at what follows it
                while rows[last - 1].split("#")[0].strip() == "":
                    last -= 1
                lines[name.value] = (name.start_mark.line + 1, last)
    return told, lines
