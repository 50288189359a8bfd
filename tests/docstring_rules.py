"""
What docstrings of public names must say, read without importing anything.

griffe, which makes the reference's pages of them, finds the names and takes the docstrings apart. `python
tests/docstring_rules.py` lists what is missing.
"""

import ast
import re
from functools import cache
from pathlib import Path

import griffe


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "maple_trl"

# Beside all of maple_trl.algorithms: what implements a formula, a table or a figure of a paper.
SOURCED = {
    "maple_trl.evaluation": "bootstrap_mean clip_spread embedding_spread evaluation_results fused_samples fusion_gain "
    "mcnemar_exact modality_gap pass_at_k superset_scores tag_disparity training_efficiency",
    "maple_trl.modalities": "ModalityTag",
    "maple_trl.rewards": "BertScoreSimilarity CaptionJudge ContrastiveRewardWeighting LengthReward StepwiseReasoningJudge "
    "accuracy_reward format_reward self_consistency_reward",
    "maple_trl.trainers.avatar.trainer": "AvatarTrainer AvatarTrainer.assign",
    "maple_trl.trainers.mapo.trainer": "MAPOTrainer MAPOTrainer.assign",
}
# Where batches and files are handed about, there is nothing to cite.
UNSOURCED = {"maple_trl.algorithms.ReplayStateError", "maple_trl.algorithms.rank_share"}

# A paper by name or number with the place in it, a work by author or journal and year, or the word that there is none.
PAPER = r"(?:MAPLE|AVATAR|DAPO|PPO|arXiv \d{4}\.\d{5})(?: \(arXiv \d{4}\.\d{5}\))?,? "
PLACE = (
    r"(?:(?:eq\.|[Ss]ections?|Tables?|Fig\.|figures?|Algorithm|[Aa]ppendix) (?=[\dA-F])|(?=\d\.\d\b)|(?=[A-F]\.\d\b))"
)
WORK = r"\([A-Z][\w ,]{3,40}\b(?:19|20)\d\d[,)]"
SOURCE = re.compile(rf"{PAPER}{PLACE}|{WORK}|\b[Oo]f no paper\b")

# `Tensor` of shape (N, T), of any shape, a scalar.
ARRAYS = re.compile(r"\b(?:\w*Tensor|ndarray|NDArray|ArrayLike)\b")
SIDE = r"(?:\w+(?: ?[-+*/] ?\w+)*|\.\.\.)"
SHAPE = re.compile(rf"\((?:{SIDE}, ?)+{SIDE}?\)|\b(?:scalars?|any shape|same shape|shapes? of)\b")

NUMBER = re.compile(r"^(?:int|float)\b|\[.*\bfloat\b")
# A unit in the name itself, or by how the name ends what the description must hold.
IN_NAME = re.compile(
    r"(?:^|_)(?:seconds?|minutes|hours|days|ms|bytes|pixels|fps|hz|tokens?|frames|samples|steps?|rows|epochs?|percent"
    r"|fractions?|per)(?:_|$)"
)
TIME = r"\b(?:seconds?|minutes|hours|days|steps|epochs)\b"
COUNT = (
    r"\b(?:bytes|[KMG]i?B|pixels|tokens|frames|rows|samples|seconds|bins|prompts|texts|pairs|requests|completions"
    r"|experiences|clips|questions)\b"
)
RATE = r"\bper (?:second|step|minute|token)\b|\bHz\b|\bshare\b"
SHARE = r"\[0, 1\]|\b(?:fractions?|percent|bytes)\b|\b(?:from|between) 0 (?:to|and) 1\b|\bshares? of\b"
UNITS = {
    r"(?:time|times|timeout|duration|delay|wait|interval|elapsed|deadline|age|start|end)": TIME,
    r"(?:size|length|budget|memory|capacity|width|height|resolution)": COUNT,
    r"(?:rate|rates|lr)": RATE,
    r"(?:ratio|share|shares|accuracy|confidence|level|quantile|probability)": SHARE,
}


# What is public

STANDS_FOR = {"maple_trl.train": "maple_trl.jobs.train"}


def read(package, folder=ROOT):
    return griffe.load(
        package,
        search_paths=[str(folder)],
        allow_inspection=False,
        docstring_parser="google",
        docstring_options={"warnings": False},
    )


@cache
def package():
    return read(PACKAGE)


def reference():
    """The names that the reference's pages show."""
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def public(found):
    """Functions and classes below an object of griffe, with classes' own public methods, by the name they are shown by."""
    if found.is_alias:
        found = found.final_target
    if found.is_module:
        chosen = found.exports or [
            name for name, each in found.members.items() if name[0] != "_" and not each.is_alias
        ]
        for name in map(str, chosen):
            if not found[name].is_module:
                yield from ((f"{found.path}.{name}{below}", each) for below, each in public(found[name]))
    elif found.is_function or found.is_class:
        yield "", found
        for name, member in found.members.items() if found.is_class else ():
            if name[0] != "_" and not member.is_alias and (member.is_function or "property" in member.labels):
                yield f".{name}", member


def declared(module):
    """The package's modules that say by `__all__` what of them is public."""
    if module.exports:
        yield module.path
    for each in module.modules.values():
        if not each.is_alias:
            yield from declared(each)


def imported():
    """What the pages, examples and notebooks import from the package."""
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    paths += [*(ROOT / "examples").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8")
        for module, told in re.findall(rf"from ({PACKAGE}[\w.]*) import ([\w, ]+)", text):
            module = STANDS_FOR.get(module, module)
            yield from (f"{module}.{name.strip()}" for name in told.split(",") if name.strip())


@cache
def names():
    """Everything public by the name that users import it by; the same object once."""
    found = {}
    for name in [*reference(), *declared(package()), *imported()]:
        target = package()[name.removeprefix(f"{PACKAGE}.")] if name != PACKAGE else package()
        for below, each in public(target):
            found.setdefault(each.path, (below if target.is_module else name + below, each))
    return dict(found.values())


# Reading


@cache
def definitions(path):
    """Every class and function of a file by its name from the module on, and its line."""
    found = {}

    def walk(nodes, above):
        for node in nodes:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found[above + node.name, node.lineno] = node
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{above}{node.name}.")
            elif isinstance(node, (ast.If, ast.Try)):
                walk(ast.iter_child_nodes(node), above)

    walk(ast.parse(Path(path).read_text(encoding="utf-8")).body, "")
    return found


def node_of(found):
    """The definition in the file; that of griffe begins at the first decorator."""
    below = found.path.removeprefix(f"{found.module.path}.")
    first = [found.lineno, *(decorator.lineno for decorator in getattr(found, "decorators", ()))]
    return next(
        node
        for (name, line), node in definitions(str(found.filepath)).items()
        if name == below and min(first) <= line <= found.endlineno
    )


class Told:
    """A docstring taken apart: its text, what it says of each argument, of the result, and which errors it names."""

    def __init__(self, docstring):
        self.text = docstring.value if docstring else ""
        self.of, self.listed, self.result, self.errors, self.prose = {}, set(), "", "", ""
        for section in docstring.parsed if docstring else ():
            kind = section.kind.value
            if kind in ("parameters", "other parameters", "attributes"):
                for each in section.value:
                    for name in each.name.replace("*", "").split(","):
                        self.of[name.strip("` ")] = f"{each.annotation or ''} {each.description}"
                        self.listed |= {name.strip("` ")} if kind == "parameters" else set()
            elif kind in ("returns", "yields"):
                self.result += " ".join(f"{each.annotation or ''} {each.description}" for each in section.value)
            elif kind == "raises":
                self.errors += " ".join(f"{each.annotation} " for each in section.value)
            elif kind == "text":
                self.prose += section.value


def docstring_of(found):
    """Its own docstring, or that of the method of ours which it overrides."""
    if found.docstring or not found.parent or not found.parent.is_class:
        return found.docstring
    for base in found.parent.mro():
        if found.name in base.members and base.members[found.name].docstring:
            return base.members[found.name].docstring
    return None


def arguments(node):
    listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    listed += [each for each in (node.args.vararg, node.args.kwarg) if each]
    shown = [each for each in listed if each.arg[0] != "_" and each.arg not in ("self", "cls")]
    return {each.arg: ast.unparse(each.annotation) if each.annotation else "" for each in shown}


def is_dataclass(node):
    return any("dataclass" in ast.unparse(each) for each in node.decorator_list) or any(
        ast.unparse(base) in ("NamedTuple", "TypedDict") for base in node.bases
    )


def own_fields(node):
    """Public fields of a dataclass: annotation, and what a help text or a line below says of each."""
    found = {}
    for each, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.target.id[0] != "_":
            annotation = ast.unparse(each.annotation)
            if annotation.startswith("ClassVar") or (each.value and "init=False" in ast.unparse(each.value)):
                continue
            said = [after.value.value] if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else []
            for inner in ast.walk(each.value) if each.value else ():
                if isinstance(inner, ast.Dict):
                    keys = [getattr(key, "value", None) for key in inner.keys]
                    said += [ast.unparse(inner.values[keys.index("help")])] if "help" in keys else []
            found[each.target.id] = annotation, " ".join(said)
    return found


def raised(node):
    """Names of the errors that a body raises itself, but for those that it catches again."""
    found = set()

    def walk(node, caught):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            return
        if isinstance(node, ast.Raise) and node.exc:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(error).rpartition(".")[2]
            if name[:1].isupper() and name not in caught and not caught & {"Exception", "BaseException"}:
                found.add(name)
        if isinstance(node, ast.Try):
            here = {
                inner.id
                for handler in node.handlers
                if handler.type
                for inner in ast.walk(handler.type)
                if isinstance(inner, ast.Name)
            }
            for inner in node.body:
                walk(inner, caught | here)
            for inner in [*node.handlers, *node.orelse, *node.finalbody]:
                walk(inner, caught)
            return
        for inner in ast.iter_child_nodes(node):
            walk(inner, caught)

    for each in node.body:
        walk(each, frozenset())
    is_abstract = len(node.body) <= 2  # a docstring, and that it is for subclasses to write
    return found - ({"NotImplementedError"} if is_abstract else set())


# What says that something is as somewhere else, so that it need not be said again.
LIKE = r"\b(?:as|like) \[`~?([\w.]+)`\]"
SEE = re.compile(r"\b(?:as (?:in|of)|see|[Ll]ike|as) \[`")
FOREIGN = ("transformers.", "trl.")


def delegated(name):
    """The arguments that a docstring describes to which another one points; of a class that is not ours, all."""
    if name.startswith(FOREIGN):
        return ["*"]
    return [
        key for shown, each in names().items() if f".{shown}".endswith(f".{name}") for key in Told(each.docstring).of
    ]


def overrides(found):
    """Whether a method may be that of a base class that is not ours, whose docstring stands elsewhere."""
    if not found.parent.is_class:
        return False
    ours = [found.parent, *found.parent.mro()]
    bases = {base.canonical_path for each in ours for base in each.bases if not isinstance(base, str)}
    return bool(bases - {each.path for each in ours})


# The rules


class Subject:
    """What the rules look at: arguments with annotation and description, the result, errors, the text."""

    def __init__(self, name, found):
        self.name, node, told = name, node_of(found), Told(docstring_of(found))
        self.text, self.prose, self.errors = told.text, told.prose, told.errors
        self.described, self.listed = dict(told.of), told.listed
        self.inherits = not told.text and overrides(found)
        self.like = {name for names in map(delegated, re.findall(LIKE, self.prose)) for name in names}
        self.result, self.result_said = "", told.result or told.prose
        if isinstance(node, ast.ClassDef):
            self._read_class(found, node)
        else:
            self.arguments, self.raised = arguments(node), raised(node)
            self.result = ast.unparse(node.returns) if node.returns else ""
        self.few = len(self.arguments) <= 2

    def _read_class(self, found, node):
        methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
        self.arguments = {}
        if "__init__" in methods:
            inner = Told(found.members["__init__"].docstring)
            self.described |= inner.of
            self.errors += inner.errors
            self.arguments = arguments(methods["__init__"])
        elif is_dataclass(node):
            for name, (annotation, said) in own_fields(node).items():
                self.arguments[name] = annotation
                self.described |= {name: said} if said else {}
        makers = [methods[name] for name in ("__init__", "__post_init__", "__new__") if name in methods]
        self.raised = set().union(*map(raised, makers))


def undescribed(subject):
    for name in subject.arguments:
        plain = re.sub(r"_[A-Z]+$", "", name)
        in_sentence = subject.few and re.search(rf"\b(?:{name}|{plain})\b", subject.prose)
        if not (subject.described.get(name, "").strip() or in_sentence or subject.like & {name, "*"}):
            yield f"argument {name} is not described"


def absent(subject):
    takes_any = not subject.arguments or "kwargs" in subject.arguments
    for name in sorted(subject.listed - set(subject.arguments)) if not takes_any else ():
        yield f"there is no argument {name}"


def unnamed_errors(subject):
    for error in sorted(subject.raised):
        if not re.search(rf"\b{error}\b", subject.errors):
            yield f"Raises: does not name {error}"


def shapeless(subject):
    for name, annotation in subject.arguments.items():
        if ARRAYS.search(annotation) and not SHAPE.search(subject.described.get(name) or subject.prose):
            yield f"argument {name} has no shape"
    if ARRAYS.search(subject.result) and not SHAPE.search(subject.result_said):
        yield "the result has no shape"


def unitless(subject):
    numbers = {
        name: (annotation, subject.described.get(name) or subject.prose)
        for name, annotation in subject.arguments.items()
    }
    numbers[subject.name.rpartition(".")[2]] = subject.result, subject.result_said
    for name, (annotation, said) in numbers.items():
        if not NUMBER.search(annotation) or IN_NAME.search(name):
            continue
        for ending, unit in UNITS.items():
            is_said = re.search(unit, said, re.IGNORECASE) or SEE.search(said)
            if re.search(rf"(?:^|_){ending}$", name) and not is_said:
                yield f"{name} has no unit"


def sourceless(subject):
    if not SOURCE.search(" ".join(subject.text.split())):
        yield "names no source"


def faults(name, found, sourced=False):
    subject = Subject(name, found)
    if not subject.text:
        return [] if subject.inherits else ["there is no docstring"]
    rules = [undescribed, absent, unnamed_errors, shapeless, unitless] + [sourceless] * sourced
    return [fault for rule in rules for fault in rule(subject)]


def is_sourced(name):
    if re.fullmatch(rf"{PACKAGE}\.algorithms\.\w+", name):
        return name not in UNSOURCED
    return name in {f"{module}.{each}" for module, told in SOURCED.items() for each in told.split()}


@cache
def all_faults():
    found = {name: faults(name, each, is_sourced(name)) for name, each in names().items()}
    return {name: told for name, told in found.items() if told}


if __name__ == "__main__":
    for name, told in all_faults().items():
        print(name, *told, sep="\n    ")
