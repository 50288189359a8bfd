"""The benchmark of QA+ runs, at sizes far too small to measure anything: what it counts adds up."""

import importlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from maple_trl.data.schema import ROW_FEATURES


pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.long
def test_rows_and_memory_of_two_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("qa_plus")
    script.main(["--questions", "1", "30", "--modes", "evaluation", "--json", str(tmp_path / "told.json")])
    told = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert [(found["questions"], found["rows"]) for found in told["results"]] == [(1, 7), (30, 210)]
    assert all(found["peak_bytes"] > 10 << 20 and found["wall"] > found["cpu"] / 16 > 0 for found in told["results"])
    assert "210 rows" in capsys.readouterr().out and set(told["growth"]) == {"evaluation"}
    script.write_questions(tmp_path / "rows.parquet", 12, 0)
    table = pq.read_table(tmp_path / "rows.parquet")
    assert len(table) == 12 and table.schema.names == list(ROW_FEATURES)
