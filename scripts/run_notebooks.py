"""
Run notebooks and keep what they show: `make notebooks`, or `python scripts/run_notebooks.py notebooks/quick_start.ipynb`.

Each runs in a kernel and an empty folder of its own. Kept are text, tables and pictures, without progress bars and warnings (what goes
to stderr) and without times. With them a digest of the code is kept, by which the tests know outputs of other code.
"""

import argparse
import ast
import base64
import hashlib
import io
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
LONGEST = 300_000  # bytes of a file
TIMEOUT = 3600  # seconds of a cell


def code_digest(notebook) -> str:
    """A digest of all code of a notebook, however it is formatted."""
    code = [ast.dump(ast.parse(cell.source)) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def smaller(picture: str) -> str:
    """The same picture with at most 64 colours, in base64 as it came: charts need no more."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as drawn, io.BytesIO() as small:
        drawn.convert("RGB").quantize(64).save(small, "png", optimize=True)
        return base64.b64encode(small.getvalue()).decode()


def execute(path: Path, folder: str):
    """Run a notebook in a folder; return it with what it shows."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    here = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), here]))
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        record_timing=False,
        resources={"metadata": {"path": folder}},
        store_widget_state=False,
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [shown for shown in cell.outputs if shown.get("name") != "stderr"]
            for shown in cell.outputs:
                if "image/png" in shown.get("data", {}):
                    shown.data["image/png"] = smaller(shown.data["image/png"])
    notebook.metadata["maple_trl"] = {"code_sha256": code_digest(notebook)}
    return notebook


def faults(notebook, text: str, folders=()) -> list[str]:
    """What must not be kept: places of the machine it ran on, scripts, addresses and keys, too many bytes."""
    found = [f"holds the path {folder}" for folder in folders if folder in text]
    for cell in notebook.cells:
        for shown in cell.get("outputs", ()):
            if shown.output_type == "error":
                found.append(f"ends in {shown.ename}: {shown.evalue}")
            parts = dict(shown.get("data", {})) | ({"text/plain": shown.text} if "text" in shown else {})
            told = "\n".join(str(value) for kind, value in parts.items() if not kind.startswith("image/"))
            marks = ("/home/", "/tmp/", "/root/", "/work/", "http://", "https://", "<script", "sk-")
            found += [f"shows {mark!r}" for mark in marks if mark in told]
            found += [f"shows {kind}" for kind in parts if "javascript" in kind or "widget" in kind]
    if len(text.encode()) > LONGEST:
        found.append(f"takes {len(text.encode())} bytes, more than {LONGEST}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Run notebooks and keep what they show.")
    parser.add_argument("paths", nargs="*", type=Path, help="all of notebooks/ by default")
    status = 0
    for path in parser.parse_args().paths or sorted(NOTEBOOKS.glob("*.ipynb")):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        before = used.ru_utime + used.ru_stime
        with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
            try:
                notebook = execute(path, folder)
            except CellExecutionError as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                status = 1
                continue
        text = nbformat.writes(notebook) + "\n"
        path.write_text(text, encoding="utf-8")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = used.ru_utime + used.ru_stime - before
        print(f"{path.name}: {seconds:.0f} CPU seconds, {len(text.encode()) // 1000} kB", flush=True)
        for fault in faults(notebook, text, [folder, str(ROOT), str(Path.home())]):
            print(f"{path.name} {fault}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
