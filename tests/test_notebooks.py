"""The notebooks: what they show is of the code that they hold, and the quick start runs."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "scripts" / "run_notebooks.py")
run_notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_notebooks)
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_folder_lists_its_notebooks():
    told = (ROOT / "notebooks" / "README.md").read_text()
    assert re.findall(r"\| \[(\w+)\.ipynb\]\(\1\.ipynb\)", told)[0] == "quick_start"
    assert sorted(re.findall(r"\| \[(\w+)\.ipynb\]\(\1\.ipynb\)", told)) == [path.stem for path in NOTEBOOKS]


@notebooks
def test_what_is_kept_was_shown_by_this_code(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["maple_trl"]["code_sha256"] == run_notebooks.code_digest(notebook), "make notebooks"
    assert run_notebooks.faults(notebook, path.read_text(encoding="utf-8"), [str(ROOT), str(Path.home())]) == []
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [kind for cell in cells for output in cell.outputs for kind in output.get("data", ())]
    assert shown.count("image/png") >= 1


@notebooks
def test_what_it_imports_is_there(path):
    """Names that were moved or renamed since it was run."""
    for cell in code_of(nbformat.read(path, as_version=4)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "maple_trl":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


@notebooks
def test_where_it_leads_is_there(path):
    for cell in nbformat.read(path, as_version=4).cells:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", cell.source) if cell.cell_type == "markdown" else []
        assert all((path.parent / link).is_file() for link in links if "://" not in link)


def test_faults_are_found():
    """Negative controls: code that has changed since, an error, a place of this machine, a script, and a key."""
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    digest = run_notebooks.code_digest(notebook)
    cell = code_of(notebook)[0]
    cell.source += "\n\n\n# only a comment"
    assert run_notebooks.code_digest(notebook) == digest
    cell.source += "\nchanged = 1"
    assert run_notebooks.code_digest(notebook) != digest
    bad = {
        "shows '/home/'": {"output_type": "stream", "name": "stdout", "text": "/home/me/clips"},
        "shows '<script'": nbformat.v4.new_output("display_data", {"text/html": "<script>1</script>"}),
        "shows 'https://'": nbformat.v4.new_output("display_data", {"text/html": "<img src='https://a.b/c.png'>"}),
        "shows 'sk-'": nbformat.v4.new_output("display_data", {"text/plain": "sk-1234"}),
        "shows application/javascript": nbformat.v4.new_output("display_data", {"application/javascript": "1"}),
        "ends in ValueError: no": nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[]),
    }
    for fault, output in bad.items():
        cell.outputs = [nbformat.from_dict(output)]
        assert run_notebooks.faults(notebook, "") == [fault]
    cell.outputs = []
    assert run_notebooks.faults(notebook, "runs in /place/of/it", ["/place"]) == ["holds the path /place"]
    assert run_notebooks.faults(notebook, "x" * 300_001) == ["takes 300001 bytes, more than 300000"]


def kinds(notebook):
    """What each cell of code shows, by the types of its outputs."""
    return [[sorted(output.get("data", {})) for output in cell.outputs] for cell in code_of(notebook)]


@pytest.mark.long
@notebooks
def test_all_of_it_runs(path, tmp_path):
    """And shows as much as it did."""
    notebook = run_notebooks.execute(path, str(tmp_path))
    assert run_notebooks.faults(notebook, nbformat.writes(notebook), [str(tmp_path)]) == []
    assert kinds(notebook) == kinds(nbformat.read(path, as_version=4))


@pytest.mark.slow
def test_the_quick_start_runs(tmp_path):
    """In a kernel of its own; a trainer shows itself, its curves are a picture, and its table tells of rewards."""
    (path,) = [path for path in NOTEBOOKS if path.stem == "quick_start"]
    shorter = path.read_text(encoding="utf-8")
    for usual, fewer in (("max_steps=35", "max_steps=4"), ("logging_steps=7", "logging_steps=1")):
        assert shorter.count(usual) == 1
        shorter = shorter.replace(usual, fewer)
    (tmp_path / path.name).write_text(shorter, encoding="utf-8")
    notebook = run_notebooks.execute(tmp_path / path.name, str(tmp_path))
    assert run_notebooks.faults(notebook, nbformat.writes(notebook), [str(tmp_path)]) == []
    assert kinds(notebook) == kinds(nbformat.read(path, as_version=4))
    html = [
        output.data.get("text/html", "") for cell in code_of(notebook) for output in cell.outputs if "data" in output
    ]
    (table,) = [text for text in html if "<progress" in text]
    assert all(f"<th>{name}</th>" in table for name in ("reward", "acc %", "VAS")) and "No Log" not in table
    (itself,) = [text for text in html if text.startswith("<h4>MAPOTrainer: 4 steps</h4>")]
    assert "first tenth of the log" in itself and "<th>advantage</th>" in itself
