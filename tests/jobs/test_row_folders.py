"""A training job reads a folder of shards as it is, whole or streamed; pictures too."""

import json
import shutil

import pytest
import yaml
from datasets import Dataset
from PIL import Image as Picture

from maple_trl import cli
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.shards import write_shards
from maple_trl.data.validation import validate_tables
from maple_trl.jobs.data import filter_rows


@pytest.fixture(scope="module")
def media():
    load_seven_tags()
    return default_folder()


@pytest.fixture(scope="module")
def rows(media):
    """Two rows of each tag, in the form of the schema."""
    taken = {}
    for row in load_seven_tags()["train"]:
        if len(taken.setdefault(row["tag"], [])) < 2:
            known = {name: value for name, value in row.items() if name in ROW_FEATURES}
            taken[row["tag"]].append({**known, "clip": row["id"], "source": row["tag"], "split": "train"})
    return [row for of_tag in taken.values() for row in of_tag]


@pytest.fixture
def job(tmp_path, rows, media, monkeypatch):
    """Trains two steps on shards of the rows; returns the status and what the job wrote."""
    monkeypatch.chdir(tmp_path)
    options = {
        "model_name_or_path": "builtin:tiny-omni",
        "dtype": "float32",
        "dataset_name": "rows",
        "media_root": str(media),
        "num_frames": 2,
        "max_pixels": 3136,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "output_dir": "out",
    }

    def run(shards=rows, without=(), words=(), **changes):
        if not (tmp_path / "rows").exists():
            write_shards(shards, tmp_path / "rows", shard_rows=5)
        given = {
            name: value for name, value in (options | changes).items() if name not in without and value is not None
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(given))
        status = cli.main(["train", "--config", "job.yaml", *words])
        summary = tmp_path / "out" / "summary.json"
        return status, json.loads(summary.read_text()) if summary.is_file() else None

    return run


def test_the_rows_are_valid(tmp_path, rows, media):
    write_shards(rows, tmp_path / "rows")
    assert validate_tables([tmp_path / "rows"], media_root=media).counts == {}


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.matrix(cases=1)
def test_a_folder_of_shards_is_trained_on(job, tmp_path, capsys, streaming):
    """Its column `image` is empty in every row."""
    status, summary = job(dataset_streaming=streaming)
    assert status == 0, capsys.readouterr().err
    assert summary["steps"] == 2
    text = capsys.readouterr().out
    assert ("streamed" in text) == streaming


@pytest.mark.matrix(cases=1)
@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["mapo", "avatar"])
def test_the_other_trainers_take_the_columns_of_the_schema(job, capsys, trainer):
    status, summary = job(trainer=trainer, num_generations=8, per_device_train_batch_size=8)
    assert status == 0 and summary["steps"] == 2, capsys.readouterr().err


@pytest.mark.slow
def test_a_stream_is_filtered_and_taught(job, tmp_path, capsys):
    status, summary = job(
        trainer="omni_sft",
        dataset_streaming=True,
        dataset_filter={"source": ["VA", "S"]},
        completion_template="<answer>{solution}</answer>",
        without=("num_generations",),
    )
    assert status == 0 and summary["steps"] == 2, capsys.readouterr().err


@pytest.mark.slow
def test_a_stream_goes_on_where_a_run_stopped(job, tmp_path, capsys):
    def losses(*words, **changes):
        status, _ = job(
            trainer="omni_sft",
            dataset_streaming=True,
            completion_template="<answer>{solution}</answer>",
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="constant",
            without=("num_generations",),
            words=words,
            **changes,
        )
        assert status == 0, capsys.readouterr().err
        lines = (tmp_path / changes["output_dir"] / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    whole = losses(output_dir="whole", max_steps=3)
    assert losses(output_dir="cut", max_steps=2) == whole[:2]
    assert losses("--resume_from_checkpoint", "true", output_dir="cut", max_steps=3) == whole and len(set(whole)) == 3


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_steps": None}, "dataset_streaming needs max_steps"),
        ({"trainer": "mapo"}, "mapo batches rows by their tags, for which it needs the whole table"),
        (
            {"trainer": "avatar", "num_generations": 8, "per_device_train_batch_size": 8},
            "avatar finds the rows of what it replays again",
        ),
        (
            {"dataset_name": "builtin:seven-tags", "media_root": None},
            "dataset_streaming reads local Parquet files, and builtin",
        ),
        ({"dataset_filter": {"color": ["red"]}}, "dataset_filter: rows, split 'train' has no column 'color'"),
        ({"dataset_filter": {"source": ["none"]}}, "no row is left of the stream"),
    ],
)
def test_what_cannot_be_streamed_is_refused(job, capsys, changes, error):
    assert job(dataset_streaming=True, **changes)[0] == 2
    assert error in capsys.readouterr().err.splitlines()[-1]


def with_picture(rows, at):
    return [row | {"image": "a.png"} if number in at else row for number, row in enumerate(rows)]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.matrix(cases=1)
def test_rows_with_a_picture_are_fed_it(job, rows, media, tmp_path, capsys, streaming):
    """Those of tags with V have a picture beside their clip: the others' pictures are not fed."""
    root = tmp_path / "media"
    shutil.copytree(media, root)
    Picture.new("RGB", (56, 56), "red").save(root / "a.png")
    status, summary = job(
        with_picture(rows, range(len(rows))), dataset_streaming=streaming, media_root=str(root), max_steps=7
    )
    assert status == 0 and summary["steps"] == 7, capsys.readouterr().err
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    fed = [line["media_tokens/image"] for line in map(json.loads, lines) if "loss" in line]
    assert sum(fed) == 4 * 2 * 8  # of 14 rows twice, 8 with V, and four tokens a picture


def test_rows_without_a_value_can_be_chosen():
    rows = Dataset.from_dict({"image": [None, "a", None], "id": [0, 1, 2]})
    assert filter_rows(rows, {"image": [None]}, "rows")["id"] == [0, 2]
