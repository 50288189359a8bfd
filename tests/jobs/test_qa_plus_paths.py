"""QA+ of the embedded set on its real path: the command, a step of MAPO on its rows, an evaluation over all inputs."""

import json
import re

import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer, say
from eval_runs import MODEL, SMALL, evaluate, lines_of, result_of
from qa_sets import TAGS, faults

from maple_trl import cli
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.data.none_answers import NONE_ANSWERS


pytestmark = pytest.mark.slow

STYLE = ["--prompt_style", "answer"]  # the set's own prompts show no options


def qa_plus(*words):
    return cli.main(["data", "qa-plus", "builtin:seven-tags", *map(str, words), *STYLE])


def rows_of(folder, split):
    return [row for path in sorted(folder.glob(f"{split}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def without_lines(made, source):
    """Faults of rows of the set, which has no columns `clip`, `source`, `provenance` and `hint`."""
    more = {"clip": None, "source": None, "provenance": None, "hint": None}
    return faults([row | more for row in made], [row | more for row in source])


def test_a_step_of_mapo_on_rows_of_all_strata(tmp_path, capsys):
    assert qa_plus(tmp_path / "qa", "--exact", "14", "--superset", "14", "--deficit", "28", "--json") == 0
    root = json.loads(capsys.readouterr().out)["media_root"]
    assert root == str(default_folder())
    rows = rows_of(tmp_path / "qa", "train")
    assert without_lines(rows, load_seven_tags()["train"]) == [] and len(rows) == 56
    words = [
        "--trainer",
        "mapo",
        "--model_name_or_path",
        "builtin:tiny-omni",
        "--dtype",
        "float32",
        "--use_cpu",
        "true",
    ]
    words += ["--dataset_name", tmp_path / "qa", "--media_root", root, "--num_frames", "4", "--max_pixels", "3136"]
    words += ["--reward_funcs", "format_reward", "accuracy_reward", "--num_generations", "4", "--max_steps", "1"]
    words += [
        "--per_device_train_batch_size",
        "4",
        "--max_completion_length",
        "4",
        "--report_to",
        "none",
        "--bf16",
        "false",
    ]
    words += ["--save_strategy", "no", "--logging_steps", "1", "--gradient_checkpointing", "false", "--seed", "7"]
    words += ["--evaluate_before_after", "false", "--output_dir", tmp_path / "out"]
    assert cli.main(["train", *map(str, words)]) == 0
    (file,) = (tmp_path / "out" / "rollouts").glob("*.parquet")
    rollouts = pq.read_table(file).to_pylist()
    assert rollouts and {row["tag"] for row in rollouts} <= set(TAGS)


def test_accuracy_by_stratum_and_required_tag_over_all_inputs(tmp_path, capsys):
    """A server that always finds that the question cannot be answered is right on every deficit row, and a quarter else."""
    assert qa_plus(tmp_path / "qa", "--evaluation") == 0
    rows = rows_of(tmp_path / "qa", "test")
    assert len(rows) == 7 * len(load_seven_tags()["test"]) == 3136
    # Two questions of each tag, with all of their inputs.
    names = {tag: sorted({row["question_id"] for row in rows if row["required_tag"] == tag})[:2] for tag in TAGS}
    chosen = {name for found in names.values() for name in found}
    capsys.readouterr()

    def choose(number, body):
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else "".join(block.get("text", "") for block in content)
        letter = next((line[0] for line in text.split("\n") if line[3:] in NONE_ANSWERS), "?")
        media = [block for block in content if not isinstance(block, str) and block["type"] != "text"]
        return say(f"<answer>{letter}</answer>", prompt_tokens=10 + len(text) + 50 * len(media))

    words = [
        "--data",
        tmp_path / "qa",
        "--media-root",
        default_folder(),
        *SMALL,
        "--samples",
        "1",
        "--temperature",
        "0",
    ]
    words += ["--filter", json.dumps({"question_id": sorted(chosen)}), "--quiet", "--output", tmp_path / "out"]
    with ChatServer(choose) as server:
        assert evaluate("--model", "served", "--server", server.url, *words) == 0
    told = capsys.readouterr().out
    found = result_of(tmp_path / "out")["over_inputs"]
    asked = [row for row in rows if row["question_id"] in chosen]
    assert len(lines_of(tmp_path / "out")) == len(asked) == 98

    def share(kept):
        kept = [row["replaced"] == "right" for row in asked if kept(row)]
        return sum(kept) / len(kept)

    strata = result_of(tmp_path / "out")["strata"]
    for stratum, own in strata.items():
        value = own["sample_mean"]["value"]
        assert value == pytest.approx(share(lambda row, stratum=stratum: row["stratum"] == stratum))
    assert strata["deficit"]["sample_mean"]["value"] == 1.0 > strata["superset"]["sample_mean"]["value"]
    counts = {stratum: own["sample_mean"]["count"] for stratum, own in strata.items()}
    assert counts == {"exact": 14, "superset": 24, "deficit": 60}
    for tag in TAGS:
        estimate = found["per_tag"][tag]
        assert estimate["value"] == pytest.approx(share(lambda row, tag=tag: row["required_tag"] == tag))
        assert estimate["count"] == 14
    assert (
        found["sample_mean"]["value"] == pytest.approx(share(lambda row: True)) and found["sample_mean"]["count"] == 98
    )
    shown = told.split("By required tag, over inputs")[1].split("superset macro")[0]
    lines = {cells[0]: cells[1:] for cells in (re.findall(r"[\w.]+", line) for line in shown.split("\n")) if cells}
    assert lines["required"] == ["all", "inputs", "exact", "superset", "deficit"]
    columns = [found, *strata.values()]
    assert lines["scored"] == ["98", "14", "24", "60"]
    for tag in TAGS:
        values = [column["per_tag"].get(tag, {}).get("value") for column in columns]
        assert lines[tag] == [f"{value:.3f}" for value in values if value is not None]


def test_a_model_in_this_process_over_all_inputs(tmp_path, capsys):
    assert qa_plus(tmp_path / "qa", "--evaluation") == 0
    words = [*MODEL, "--data", tmp_path / "qa", "--media-root", default_folder(), "--samples", "2", "--limit", "14"]
    assert evaluate(*words, "--quiet", "--output", tmp_path / "out") == 0
    strata = result_of(tmp_path / "out")["strata"]
    assert sum(own["sample_mean"]["count"] for own in strata.values()) == 14
    assert "By required tag, over inputs" in capsys.readouterr().out
