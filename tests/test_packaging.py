"""What a user installs: the wheel's content and metadata, and the files a fresh checkout starts from."""

import ast
import configparser
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


ROOT = Path(__file__).resolve().parents[1]
# Import names that differ from the distribution's.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "bert_score": "bert-score",
    "faster_whisper": "faster-whisper",
    "lmms_eval": "lmms-eval",
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this tree, built by its own backend from a copy, without a network."""
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        files = [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:  # a source archive
        kept = ("maple_trl", "recipes")
        files = [p.relative_to(ROOT) for top in kept for p in (ROOT / top).rglob("*") if p.is_file()]
        files += [
            Path(name) for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
        ]
    for name in files:
        if "__pycache__" not in name.parts:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    script = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run([sys.executable, "-c", script, str(out)], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def read_metadata(unpacked):
    (path,) = unpacked.glob("*.dist-info/METADATA")
    return Parser().parsestr(path.read_text(encoding="utf-8"))


def requirements(unpacked, extra=None):
    lines = map(Requirement, read_metadata(unpacked).get_all("Requires-Dist"))
    return {
        requirement.name: requirement.specifier
        for requirement in lines
        if (requirement.marker is None) == (extra is None)
        and (extra is None or requirement.marker.evaluate({"extra": extra}))
    }


def test_the_wheel_holds_every_module_and_asset(unpacked):
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "maple_trl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and (path.suffix == ".py" or "assets" in path.parts)
    }
    packed = {path.relative_to(unpacked).as_posix() for path in (unpacked / "maple_trl").rglob("*") if path.is_file()}
    assert expected - packed == set()
    assert not any(path.split("/")[0] in ("tests", "examples", "benchmarks") for path in packed)


def test_the_wheel_holds_recipes_license_and_command(unpacked):
    assert not list(unpacked.glob("*.data"))  # nothing lands beside the package
    data = unpacked / "maple_trl" / "recipes"
    installed = {str(path.relative_to(data)) for path in data.rglob("*.yaml")}
    assert installed == {str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*.yaml")}
    (license_file,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    text = license_file.read_text()
    assert "Apache License" in text and "Version 2.0" in text and "END OF TERMS AND CONDITIONS" in text
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read(entry_points)
    assert dict(parser["console_scripts"]) == {"maple-trl": "maple_trl.cli:main"}


@pytest.mark.long
def test_the_demo_would_run_from_the_wheel_outside_the_checkout(unpacked, tmp_path):
    """With its own recipes and model, in a folder that holds nothing."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "maple_trl.cli"]

    def said(*words):
        shown = subprocess.run(
            [*command, *words], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600
        )
        assert shown.returncode == 0, shown.stderr
        return shown.stdout

    assert Path(said("recipes", "demo", "--path").strip()) == unpacked / "maple_trl" / "recipes" / "demo.yaml"
    told = said("train", "--config", "demo", "--dry_run")
    assert "model builtin:tiny-omni (" in told and "optimizer steps" in told
    assert list(tmp_path.iterdir()) == []


def test_classifiers_are_those_of_the_pythons_that_are_checked(unpacked):
    listed = read_metadata(unpacked).get_all("Classifier")
    script = (ROOT / "scripts" / "check_packages.py").read_text(encoding="utf-8")
    (pythons,) = re.findall(r"^PYTHONS = (.*)$", script, re.MULTILINE)
    prefix = "Programming Language :: Python :: "
    assert [name.removeprefix(prefix) for name in listed if re.search(r":: 3\.\d+$", name)] == list(
        ast.literal_eval(pythons)
    )
    # Each extra has its imports in that script's table.
    for extra in set(read_metadata(unpacked).get_all("Provides-Extra")) - {"dev"}:
        assert f'"{extra}"' in script, extra


def test_constraints_are_exact_versions_inside_the_ranges(unpacked):
    """And say nothing of where they come from: any index will do."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    locked = {}
    for line in lines:
        if not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.!+]+( ; [^@/]+)?", line), line
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                locked[requirement.name] = next(iter(requirement.specifier)).version
    wanted = requirements(unpacked) | requirements(unpacked, "dev") | requirements(unpacked, "plots")
    for name, specifier in wanted.items():
        assert specifier.contains(locked[name.replace("_", "-").lower()]), f"{name}: run make constraints"


def test_versions(unpacked):
    metadata = read_metadata(unpacked)
    assert metadata["Name"] == "maple-trl"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(">=3.11")
    core = requirements(unpacked)
    # The two whose private parts this package touches are bounded above; the ones in use are inside every range.
    assert core["trl"] == SpecifierSet(">=1.16,<1.17")
    assert core["transformers"] == SpecifierSet(">=5.23,<5.25")
    from importlib import metadata as installed

    for name, specifier in core.items():
        assert specifier.contains(installed.version(name).split("+")[0], prereleases=True), name
        assert any(clause.operator in (">=", "~=") for clause in specifier), f"{name} has no lower bound"


def test_extras_bring_what_the_core_does_without(unpacked):
    core = requirements(unpacked)
    assert {"vllm", "deepspeed", "judge", "plots", "torchcodec", "dev"} <= set(
        read_metadata(unpacked).get_all("Provides-Extra")
    )
    wanted = {
        "vllm": {"fastapi", "vllm"},
        "deepspeed": {"deepspeed"},
        "judge": {"openai", "evaluate", "aiolimiter", "jsonschema", "bert-score"},
        "plots": {"matplotlib"},
        "torchcodec": {"torchcodec"},
    }
    for extra, names in wanted.items():
        assert set(requirements(unpacked, extra)) == names
        assert not names & set(core)


def imported_distributions():
    """Distributions that modules of the package import, each with a place where it does so."""
    found = {}
    for path in (ROOT / "maple_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                top = name.split(".")[0]
                if top != "maple_trl" and top not in sys.stdlib_module_names:
                    found[DISTRIBUTIONS.get(top, top)] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_import_is_declared(unpacked):
    """What comes only through another package's requirements disappears when that package drops it."""
    declared = set(requirements(unpacked))
    for extra in read_metadata(unpacked).get_all("Provides-Extra"):
        declared |= set(requirements(unpacked, extra)) if extra != "dev" else set()
    undeclared = {name: place for name, place in imported_distributions().items() if name not in declared}
    # It cannot be declared: tests/integrations/test_lmms_bridge.py holds how it is installed.
    assert list(undeclared) == ["lmms-eval"]


def test_no_module_unpickles():
    """A checkpoint, a buffer or a cache that is unpickled runs whatever its author wrote into it."""
    banned = re.compile(r"\b(?:import (?:pickle|dill|cloudpickle|joblib)|torch\.load\(|allow_pickle\s*=\s*True)")
    hits = {
        path.name: banned.findall(path.read_text(encoding="utf-8"))
        for path in (ROOT / "maple_trl").rglob("*.py")
        if banned.search(path.read_text(encoding="utf-8"))
    }
    # What looks into the pickles of others puts a stub in the place of whatever they name: tests/safety/test_pickles.py.
    assert hits == {"pickles.py": ["import pickle"]}
    text = (ROOT / "maple_trl/trainers/common/pickles.py").read_text(encoding="utf-8")
    assert set(re.findall(r"\bpickle\.(\w+)", text)) == {"Unpickler", "UnpicklingError"}


def test_the_doctor_reads_the_tested_ranges_from_the_metadata(unpacked):
    def report(metadata_text=None):
        (path,) = unpacked.glob("*.dist-info/METADATA")
        original = path.read_text(encoding="utf-8")
        try:
            path.write_text(metadata_text(original) if metadata_text else original, encoding="utf-8")
            script = "import json; from maple_trl.cli.env import collect; print(json.dumps(collect()))"
            shown = subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                timeout=300,
                cwd=unpacked,
                env={**os.environ, "PYTHONPATH": str(unpacked)},
            )
            assert shown.returncode == 0, shown.stderr
            import json

            return json.loads(shown.stdout.splitlines()[-1])
        finally:
            path.write_text(original, encoding="utf-8")

    sound = report()
    packages = {package["name"]: package for package in sound["packages"]}
    assert packages["trl"]["tested"] == "<1.17,>=1.16" and packages["trl"]["in_range"] is True
    assert packages["trl"]["required"] is True
    assert packages["vllm"]["extra"] == "vllm" and packages["vllm"]["required"] is False
    assert "pytest" not in packages  # the tools of the work on this package are nobody else's business
    assert sound["warnings"] == [] and sound["problems"] == []
    for item in sound["missing"]:
        assert item["name"] not in ("torch", "trl")
        if item["name"] == "vllm":
            assert item["brings_it"] == 'pip install "maple-trl[vllm]"'
    # Ranges that the installed versions miss, and a requirement that is not there at all.
    other = report(lambda text: text.replace("trl<1.17,>=1.16", "trl<1.16,>=1.15").replace("rich>=", "no-such-rich>="))
    assert any(re.match(r"trl \S+ is outside the tested range <1.16,>=1.15", text) for text in other["warnings"])
    assert any(text.startswith("no-such-rich: not installed") for text in other["problems"])


# A fresh checkout


def test_make_help_names_its_targets():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for target in ("help", "install", "demo", "test", "check", "bench", "clean"):
        assert f"make {target} " in shown.stdout


def test_make_refuses_an_old_python(tmp_path):
    """Before it makes anything: a Python that says it is 3.10 ends the target with a sentence."""
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode != 0
    assert "older than 3.11" in shown.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "make test" in script.read_text() and "make test" in (ROOT / "README.md").read_text()
