"""Rows become shards and come back as they were; a folder of shards appears whole or not at all."""

import hashlib
import os
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, List, Value, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.shards import ShardError, ShardWriter, find_shards, replace_split, split_of, write_shards


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def values(feature):
    """Values of a column, `None` among them."""
    if isinstance(feature, Value):
        return st.none() | TEXTS
    if isinstance(feature, List):
        return st.none() | st.lists(values(feature.feature), max_size=3)
    return st.fixed_dictionaries({name: values(member) for name, member in feature.items()})


ROWS = st.lists(
    st.fixed_dictionaries(
        {name: values(feature) for name, feature in ROW_FEATURES.items() if name != "split"}
        | {"split": st.sampled_from([None, "train", "test", "validation"])}
    ),
    min_size=1,
    max_size=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(ROWS, st.integers(1, 5))
def test_rows_come_back_from_shards(rows, shard_rows):
    with tempfile.TemporaryDirectory() as folder:
        counts = write_shards(rows, f"{folder}/rows", shard_rows=shard_rows)
        shards = find_shards(f"{folder}/rows")
        assert {split: len(paths) for split, paths in shards.items()} == {
            split: -(-count // shard_rows) for split, count in counts.items()
        }
        for split, paths in shards.items():
            back = [row for path in paths for row in pq.read_table(path).to_pylist()]
            assert back == [row for row in rows if (row["split"] or "train") == split]
            assert all(split_of(path) == split for path in paths)


def row(number, **changes):
    return {"id": f"r{number}", "clip": "c", "tag": "V", "source": "s", "prompt": [], **changes}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_rows_are_the_same_bytes_however_they_come(tmp_path):
    rows = [row(number) for number in range(2500)]
    write_shards(rows, tmp_path / "one", shard_rows=1200)
    with ShardWriter(tmp_path / "two", shard_rows=1200) as writer:
        for each in rows:
            writer.write(each)
    names = [f"train-{number:05}-of-00003.parquet" for number in range(3)]
    assert list(digests(tmp_path / "one")) == names and digests(tmp_path / "one") == digests(tmp_path / "two")
    groups = [pq.ParquetFile(tmp_path / "one" / name).metadata.num_row_groups for name in names]
    assert groups == [2, 2, 1]
    write_shards(rows[::-1], tmp_path / "other", shard_rows=1200)  # the control
    assert digests(tmp_path / "other") != digests(tmp_path / "one")


def test_the_datasets_library_reads_them_with_their_types(tmp_path):
    write_shards([row(0, options=["a", "b"], provenance=[{"field": "answer", "model": "m"}])], tmp_path / "rows")
    files = [str(path) for path in find_shards(tmp_path / "rows")["train"]]
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == ROW_FEATURES
    entry = {"field": "answer", "model": "m", "prompt_hash": None, "reviewer": None}
    assert loaded[0]["provenance"] == [entry] and loaded[0]["options"] == ["a", "b"] and loaded[0]["hint"] is None


def test_an_error_leaves_no_folder(tmp_path):
    def rows():
        yield from (row(number) for number in range(1500))
        raise OSError("the source has gone")

    with pytest.raises(OSError, match="the source has gone"):
        write_shards(rows(), tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], "there is no row to write"),
        ([row(0), row(1, options="A")], "split 'train', row 1: field 'options' must be list"),
        ([row(0), row(1, id=7)], "split 'train', row 1: field 'id' must be string"),
        ([row(0, split="a/b")], "split 'a/b' must be letters"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, rows, error):
    with pytest.raises(ShardError, match=error):
        write_shards(rows, tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    def write_and_die():
        with ShardWriter(tmp_path / "rows") as writer:
            for number in range(1500):
                writer.write(row(number))
            os._exit(9)  # as a kill: nothing is cleaned up

    child = os.fork()
    if child == 0:
        try:
            write_and_die()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    [left] = tmp_path.iterdir()
    assert left.name == f".rows.{child}.partial" and any(left.iterdir())
    running = tmp_path / f".rows.{os.getppid()}.partial"
    running.mkdir()
    write_shards([row(0)], tmp_path / "rows")
    assert {path.name for path in tmp_path.iterdir()} == {"rows", running.name}


def test_two_at_once_do_not_mix(tmp_path):
    with pytest.raises(ShardError, match="another process may have made it"), ShardWriter(tmp_path / "rows") as writer:
        writer.write(row(0))
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "train-00000-of-00001.parquet").write_bytes(b"theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    assert (tmp_path / "rows" / "train-00000-of-00001.parquet").read_bytes() == b"theirs"


def test_what_is_there_is_not_replaced(tmp_path):
    write_shards([row(0)], tmp_path)  # a folder that is empty
    before = digests(tmp_path)
    with pytest.raises(ShardError, match="is there already; name another folder"):
        write_shards([row(1)], tmp_path)
    assert digests(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="file/rows cannot be written"):
        write_shards([row(0)], tmp_path / "file" / "rows")


def test_an_incomplete_set_of_shards_is_refused(tmp_path):
    write_shards([row(number) for number in range(3)], tmp_path / "rows", shard_rows=1)
    (tmp_path / "rows" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ShardError, match="of split 'train' are not one whole set"):
        find_shards(tmp_path / "rows")
    with pytest.raises(ShardError, match="holds no shards"):
        find_shards(tmp_path)


def test_further_columns_are_kept(tmp_path):
    features = Features({**ROW_FEATURES, "completion": Value("string")})
    write_shards([row(0, completion="yes")], tmp_path / "rows", features)
    table = pq.read_table(find_shards(tmp_path / "rows")["train"][0])
    assert table.column("completion").to_pylist() == ["yes"]


@pytest.mark.parametrize("former_rows", [3, 1])  # of a shard: one shard, or as many as the new ones
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_is_left_when_a_split_could_not_be_replaced(tmp_path, monkeypatch, at, former_rows):
    """The former rows, or a set that is refused: never other rows without a word."""
    schema = pa.schema([("id", pa.string())])
    tables = {name: pa.table({"id": [f"{name}{i}" for i in range(3)]}, schema) for name in ("old", "new")}
    replace_split([tables["old"]], schema, tmp_path, "train", former_rows)
    replace, done = os.replace, []

    def failing(source, target):
        if len(done) == at:
            raise OSError("stopped here")
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="stopped here"):
        replace_split([tables["new"]], schema, tmp_path, "train", 1)
    monkeypatch.undo()
    if at == 0 and former_rows == 3:
        (path,) = find_shards(tmp_path)["train"]
        assert pq.read_table(path).equals(tables["old"])
    else:
        with pytest.raises(ShardError, match="not one whole set"):
            find_shards(tmp_path)
    replace_split([tables["new"]], schema, tmp_path, "train", 1)
    assert pa.concat_tables(map(pq.read_table, find_shards(tmp_path)["train"])).equals(tables["new"])


def test_one_of_two_that_write_a_split_at_once_is_refused(tmp_path):
    """The second comes while the first is within its rows, and neither mixes with the other."""
    schema = pa.schema([("id", pa.string())])
    within, refused, found = threading.Event(), threading.Event(), []

    def tables():
        for i in range(3):
            yield pa.table({"id": [f"a{i}"] * 3}, schema)
            within.set()
            assert refused.wait(30)

    first = threading.Thread(target=lambda: found.extend(replace_split(tables(), schema, tmp_path, "train", 2)))
    first.start()
    try:
        assert within.wait(30)
        with pytest.raises(ShardError, match="another process is writing split 'train'"):
            replace_split([pa.table({"id": ["b"] * 9}, schema)], schema, tmp_path, "train", 2)
        replace_split([pa.table({"id": ["c"]}, schema)], schema, tmp_path, "test", 2)  # another split waits for nobody
    finally:
        refused.set()
        first.join(30)
    assert find_shards(tmp_path)["train"] == found
    rows = [name for path in found for name in pq.read_table(path)["id"].to_pylist()]
    assert rows == ["a0"] * 3 + ["a1"] * 3 + ["a2"] * 3
    assert not list(tmp_path.glob(".*"))
    replace_split([pa.table({"id": ["b"]}, schema)], schema, tmp_path, "train", 2)  # nobody holds it any more
