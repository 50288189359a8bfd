"""Files of records are read a record at a time, and what cannot be read is named."""

import io
import json
import math
import tempfile
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.data import record_files
from maple_trl.data.record_files import TableError, read_records
from maple_trl.data.row_tables import RowTable


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(max_size=6) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=4), max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_a_list_is_read_in_chunks_as_in_one(records, chunk, indent, escaped):
    text = json.dumps(records, indent=indent, ensure_ascii=escaped)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "_CHUNK", chunk)
        path = Path(folder, "records.json")
        path.write_text(text, encoding="utf-8")
        assert list(read_records(path)) == records == json.loads(text)


def test_all_forms_of_files(tmp_path):
    rows = [{"a": "1", "b": "x, y"}, {"a": "2", "b": None}]
    Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "t.json").write_text("\ufeff " + json.dumps(rows) + " \n\n", encoding="utf-8")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.csv").write_text('a,b\r\n1,"x, y"\r\n2,\r\n')
    (tmp_path / "t.tsv").write_text("a\tb\n1\tx, y\n2\t\n")
    (tmp_path / "spreadsheet.csv").write_text("a;b\n1;x, y\n\n2;\n", encoding="utf-8-sig")
    for path in sorted(tmp_path.iterdir()):
        assert list(read_records(path)) == rows, path
    (tmp_path / "none.json").write_text("[]")
    assert list(read_records(tmp_path / "none.json")) == []


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("t.json", '[{"a": 1}, 2]', "record 1: expected an object, got int"),
        ("t.json", '[{"a": 1} {"a": 2}]', "record 1: not JSON \\(expected a comma"),
        ("t.json", '[{"a": 1},]', "record 1: nothing stands behind the last comma"),
        ("t.json", '[{"a": 1}, {"a": "', "record 1: not JSON"),
        ("t.json", '[{"a": 1}', "record 1: not JSON"),
        ("t.json", '[{"a": 1}, {"a": 2}]\n[{"a": 3}]', "t.json, record 2: something stands behind the ]"),
        ("t.json", '[{"a": 1}] x', "t.json, record 1: something stands behind the ]"),
        ("t.json", '[]\n\n{"a": 1}', "t.json, record 0: something stands behind the ]"),
        ("t.json", f'[{{"a": 1}}, {{"a": {"9" * 5000}}}]', "t.json, record 1: .*digits"),
        ("t.jsonl", f'{{"a": 1}}\n{{"a": {"9" * 5000}}}', "t.jsonl, line 2: .*digits"),
        ("t.json", '{"a": 1}\n{"a":', "line 2: .*one object a line"),
        ("t.jsonl", '{"a": 1}\n[]', "line 2: expected an object, got list"),
        ("t.csv", "a,b\n1\n", "line 2: 1 cells, and the header has 2"),
        ("t.csv", 'a,b\n1,"2\n', "line 2: unexpected end of data"),
        ("t.csv", "a,b,a\n1,2,3\n", "line 1: the header must name every column once"),
        ("t.txt", "a", "a file of records is one of"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, error):
    (tmp_path / name).write_text(text)
    with pytest.raises(TableError, match=error):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize("source", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_written_rows_are_json_where_those_read_hold_nan(tmp_path, source):
    """A bare `NaN` is an empty cell of pandas' in JSON; Parquet stores it as a number."""
    rows = [{"id": "a", "score": math.nan, "parts": [0.5, math.nan]}, {"id": "b", "score": 1.5, "parts": None}]
    if source.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(tmp_path / source)
    else:
        (tmp_path / source).write_text(
            json.dumps(rows) if source.endswith(".json") else "\n".join(map(json.dumps, rows))
        )
    for target in ("out.jsonl", "out.json"):
        RowTable(tmp_path / source).write(tmp_path / target, "hint", ["Look.", None])
        assert "NaN" not in (tmp_path / target).read_text()
        first, second = read_records(tmp_path / target)
        assert first == {"id": "a", "score": None, "parts": [0.5, None], "hint": "Look."} and second["score"] == 1.5


def test_what_is_no_text_and_what_is_not_there(tmp_path):
    (tmp_path / "t.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(TableError, match="is not UTF-8"):
        list(read_records(tmp_path / "t.json"))
    with pytest.raises(TableError, match="there is no file"):
        list(read_records(tmp_path / "absent.json"))


def test_a_malformed_list_is_not_read_to_its_end(tmp_path):
    """Else a file of many gigabytes with a slip in its first record would be taken into memory."""
    (tmp_path / "t.json").write_text('[{"a": 1 "b": 2}, ' + ", ".join(['{"a": 1}'] * 400_000) + "]")
    items = record_files._Items(tmp_path / "t.json", io.StringIO((tmp_path / "t.json").read_text()))
    items.peek()
    with pytest.raises(TableError, match="record 0: not JSON"):
        next(iter(items))
    assert len(items.text) <= record_files._CHUNK
