"""Each folder imports only from those above it, and no module leads back to itself; read from the sources."""

import ast
import importlib
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import maple_trl


ROOT = Path(maple_trl.__file__).parent
ORDER = ["modalities", "files", "locks", "messages", "packages", "algorithms", "metrics", "planning", "chat", "omni"]
ORDER += [
    "records",
    "hub",
    "data",
    "rewards",
    "rollout",
    "evaluation",
    "trainers",
    "reports",
    "integrations",
    "jobs",
    "cli",
]
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports(module: str, source: str, modules=MODULES) -> set[str]:
    """The modules of the package that a source imports, at its top, within functions, and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") + ["__init__"] * (modules.get(module, Path()).name == "__init__.py")
            above = parts[: -node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            found |= {name if (name := f"{origin}.{a.name}") in modules else origin for a in node.names}
    return {name for name in found if name in modules and name not in (module, "maple_trl")}


@pytest.fixture(scope="module")
def graph():
    """What each module imports."""
    return {module: imports(module, path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def wrong_ways(graph: dict[str, set[str]]) -> list[str]:
    def place(module):
        return ORDER.index(module.split(".")[1])

    inner = {module: uses for module, uses in graph.items() if module not in ("maple_trl", "maple_trl.train")}
    return [f"{a} -> {b}" for a, uses in inner.items() for b in uses if b != "maple_trl.train" and place(b) > place(a)]


def test_each_folder_imports_only_from_those_above_it(graph):
    assert wrong_ways(graph) == []


def test_a_step_of_training_imports_no_reports(graph):
    seen, waiting = set(), ["maple_trl.trainers.mapo.trainer", "maple_trl.trainers.avatar.trainer"]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph[module]
    assert {name.split(".")[1] for name in seen} <= set(ORDER[: ORDER.index("trainers") + 1])


def test_no_module_leads_back_to_itself(graph):
    TopologicalSorter(graph).prepare()


def test_what_stands_at_the_root():
    files = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    modules = {f"{name}.py" for name in ORDER[:5]}
    folders = {*ORDER[5:], "assets"}
    assert files == {"__init__.py", "py.typed", "train.py"} | modules | folders


def test_the_product_uses_no_mocks():
    assert [module for module, path in MODULES.items() if "unittest" in path.read_text(encoding="utf-8")] == []


def test_faults_are_found():
    """Negative controls: an import that goes down, one within a function, and a circle."""
    down = "def late():\n    from maple_trl.trainers.mapo.trainer import MAPOTrainer\n"
    graph = {"maple_trl.algorithms.weights": imports("maple_trl.algorithms.weights", down)}
    assert wrong_ways(graph) == ["maple_trl.algorithms.weights -> maple_trl.trainers.mapo.trainer"]
    graph = {"maple_trl.chat.client": {"maple_trl.chat.cache"}, "maple_trl.chat.cache": {"maple_trl.chat.client"}}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("before", sorted(maple_trl._MOVED))
def test_former_names_of_modules_lead_to_them(before):
    now = f"maple_trl.{maple_trl._MOVED[before]}"
    if before.startswith("evaluation.lmms_model"):
        pytest.importorskip("lmms_eval")
    module = importlib.import_module(f"maple_trl.{before}")
    assert module is sys.modules[now] and module.__spec__.name == module.__name__ == now


def test_former_names_of_trainers():
    from maple_trl.trainers.avatar import AvatarTrainer
    from maple_trl.trainers.mapo import MAPOTrainer
    from maple_trl.trainers.omni_grpo import OmniGRPOTrainer
    from maple_trl.trainers.omni_sft import OmniSFTTrainer

    assert maple_trl.MAPOTrainer is MAPOTrainer and maple_trl.AvatarTrainer is AvatarTrainer
    assert maple_trl.OmniGRPOTrainer is OmniGRPOTrainer and maple_trl.OmniSFTTrainer is OmniSFTTrainer
    assert importlib.import_module("maple_trl.train") is sys.modules["maple_trl.jobs.train"]
    with pytest.raises(ImportError):
        importlib.import_module("maple_trl.trainers.never_there")
