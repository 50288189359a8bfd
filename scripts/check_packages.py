"""
Builds wheel and sdist, installs them as people do, and says what works: for each Python that is here, and for each extra alone.

    python scripts/check_packages.py --work .venv-packages
    python scripts/check_packages.py --work .venv-packages --pythons 3.13 --extras judge report
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# Of each extra: what it brings, and the modules here that are for it.
EXTRAS = {
    "judge": ("openai evaluate bert_score aiolimiter jsonschema", "maple_trl.rewards maple_trl.chat.client"),
    "plots": ("matplotlib.figure", "maple_trl.reports.plots"),
    "report": ("jinja2 plotly sklearn", "maple_trl.reports"),
    "curation": ("openai aiolimiter jsonschema", "maple_trl.data.curation"),
    "asr": ("faster_whisper", "maple_trl.data.curation"),
    "ray": ("ray.data", "maple_trl.data.curation"),
    "review": ("gradio fastapi uvicorn jinja2", "maple_trl.data.review.server"),
    "texts": ("jiwer rouge_score", "maple_trl.metrics.answers"),
    "quantization": ("bitsandbytes", "maple_trl.omni.quantization"),
    "torchcodec": ("torchcodec.decoders", "maple_trl.omni.media.loader"),
    "docs": ("mkdocs mkdocstrings", "maple_trl"),
    "lmms-eval": ("lmms_eval", "maple_trl.integrations.lmms_bridge"),
}
# Built against the torch and the CUDA of a machine: of these it is only found out whether the ranges can be met.
RESOLVED = ("vllm", "deepspeed")
CORE = "maple_trl maple_trl.cli maple_trl.train maple_trl.evaluation maple_trl.rewards maple_trl.data"
# Whoever installs for one user or into a folder has no dependencies here: what needs none has to find the recipes.
PLACES = ("recipes", "recipes demo --path")


class Matrix:
    """
    Runs one check after another, and keeps what became of each.

    Args:
        work: folder for environments, built anew.
    """

    def __init__(self, work: Path):
        self.work = work.absolute()
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        venv.create(self.work / "tools", with_pip=True)
        self.tools = self.work / "tools" / "bin" / "python"
        self.results: list[tuple[str, str]] = []
        self.run("uv", [self.tools, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv", "twine"])

    def run(self, name: str, command: list, **environment: str) -> str:
        """Run a command in an empty folder; return its output."""
        told = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment}
        with tempfile.TemporaryDirectory() as empty:
            done = subprocess.run(list(map(str, command)), cwd=empty, env=told, capture_output=True, text=True)
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        self.results.append((name, "ok" if done.returncode == 0 else f"FAILED: {''.join(last)[:160]}"))
        print(f"{name}: {self.results[-1][1]}", flush=True)
        return done.stdout

    def uv(self, name: str, *words: object, **environment: str) -> str:
        """Run uv."""
        return self.run(name, [self.tools, "-m", "uv", *words], **environment)

    def build(self) -> None:
        """Build wheel and sdist from what git knows, and check their metadata."""
        tree = self.work / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, tree / name)
        self.uv("build wheel and sdist", "build", "--quiet", "--out-dir", self.work / "dist", tree)
        (self.wheel,) = (self.work / "dist").glob("*.whl")
        (self.sdist,) = (self.work / "dist").glob("*.tar.gz")
        self.run("twine check", [self.tools, "-m", "twine", "check", "--strict", self.wheel, self.sdist])

    def python(self, version: str) -> str | None:
        """Return the interpreter of a version, where it is here."""
        command = [self.tools, "-m", "uv", "python", "find", "--system", "--no-python-downloads", version]
        found = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if found.returncode:
            self.results.append((f"Python {version}", "not here"))
            print(f"Python {version}: not here", flush=True)
        return found.stdout.strip() or None

    def environment(self, name: str, python: str, *wanted: object) -> Path:
        """Make an environment with what is wanted; return its folder of programs."""
        place = self.work / name
        self.uv(f"{name}: environment", "venv", "--quiet", "--python", python, place)
        if wanted:
            self.uv(f"{name}: install", "pip", "install", "--quiet", "--python", place / "bin" / "python", *wanted)
        return place / "bin"

    def check_python(self, version: str) -> None:
        """Install the wheel for a Python, and use it."""
        python = self.python(version)
        if python is None:
            return
        bin = self.environment(f"py{version}", python, self.wheel)
        self.uv(f"py{version}: requirements are met", "pip", "check", "--python", bin / "python")
        self.run(f"py{version}: imports", [bin / "python", "-c", _imports(CORE)])
        for words in ("--help", "recipes", "env --imports", "train --config demo --dry_run"):
            self.run(f"py{version}: maple-trl {words}", [bin / "maple-trl", *words.split()])

    def check_places(self, version: str) -> None:
        """Install from the sdist, as an editable, for one user and into a folder; the recipes must be found."""
        python = self.python(version)
        if python is None:
            return
        for name, source in (("sdist", [self.sdist]), ("editable", ["--editable", self.work / "tree"])):
            bin = self.environment(name, python, "--no-deps", *source)
            for words in PLACES:
                self.run(f"{name}: maple-trl {words}", [bin / "maple-trl", *words.split()])
        into = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", self.wheel]
        user = str(self.work / "user")
        pip = [python, "-m", "pip", *into]
        self.run(
            "--user: install",
            [*pip, "--user", "--force-reinstall"],
            PYTHONUSERBASE=user,
            PIP_BREAK_SYSTEM_PACKAGES="1",
        )
        self.run("--target: install", [*pip, "--target", self.work / "target"])
        for words in PLACES:
            program = [python, "-m", "maple_trl.cli", *words.split()]
            self.run(f"--user: maple-trl {words}", program, PYTHONUSERBASE=user)
            self.run(f"--target: maple-trl {words}", program, PYTHONPATH=str(self.work / "target"))

    def check_extra(self, version: str, extra: str) -> None:
        """Install the wheel with one extra, and import what it brings and what is for it."""
        python = self.python(version)
        if python is None:
            return
        if extra in RESOLVED:
            place = self.environment(f"extra {extra}", python)
            wanted = f"maple-trl[{extra}] @ {self.wheel.as_uri()}"
            self.uv(
                f"extra {extra}: can be resolved", "pip", "install", "--dry-run", "--python", place / "python", wanted
            )
            return
        bin = self.environment(f"extra-{extra}", python, f"maple-trl[{extra}] @ {self.wheel.as_uri()}")
        self.run(f"extra {extra}: imports", [bin / "python", "-c", _imports(" ".join(EXTRAS[extra]))])
        shutil.rmtree(bin.parent)


def _imports(names: str) -> str:
    return f"import importlib\nfor name in {names.split()!r}: importlib.import_module(name)"


def main() -> int:
    """Run the matrix; return 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, removed first")
    parser.add_argument("--pythons", nargs="*", default=PYTHONS, help="versions of Python")
    parser.add_argument("--extras", nargs="*", default=[*EXTRAS, *RESOLVED], help="extras, each alone")
    arguments = parser.parse_args()
    matrix = Matrix(arguments.work)
    matrix.build()
    for version in arguments.pythons:
        matrix.check_python(version)
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    if arguments.pythons:
        matrix.check_places(own)
    for extra in arguments.extras:
        matrix.check_extra(own, extra)
    failed = [name for name, told in matrix.results if told.startswith("FAILED")]
    print(f"{len(matrix.results) - len(failed)} ok, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
