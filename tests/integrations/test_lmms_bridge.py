"""
The bridge to lmms-eval: rows become its tasks, and its tasks are asked of our models.

What needs lmms-eval itself is skipped where it is not installed.
"""

import configparser
import importlib.metadata
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from datasets import Dataset
from PIL import Image

from maple_trl.data import default_folder, load_seven_tags
from maple_trl.integrations.lmms_bridge import (
    ROOT_FIELD,
    VERSION,
    BridgeError,
    doc_to_messages,
    doc_to_text,
    doc_to_visual,
    manifest,
    require_lmms_eval,
    row_of,
    score_doc,
    write_task,
)
from maple_trl.omni import embedded
from maple_trl.omni.prompt_spec import prompt_columns
from maple_trl.rewards import accuracy_reward


REPOSITORY = Path(__file__).resolve().parents[2]


def installed() -> str | None:
    try:
        return importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:
        return None


needs_lmms = pytest.mark.skipif(
    installed() != VERSION, reason=f"lmms-eval {VERSION} is not installed (found: {installed()})"
)


@pytest.fixture(scope="module")
def rows():
    """Two questions of each of the seven tags."""
    test = load_seven_tags()["test"]
    tags = test["tag"]
    return test.select(sorted(i for tag in set(tags) for i in [n for n, t in enumerate(tags) if t == tag][:2]))


@pytest.fixture(scope="module")
def task(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "seven_tags", rows, default_folder(), generation={"max_new_tokens": 16})
    return folder


def documents(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "seven_tags.jsonl").read_text().splitlines()]


def test_a_task_is_written(rows, task):
    text = (task / "seven_tags.yaml").read_text()
    for function in ("doc_to_visual", "doc_to_text", "doc_to_messages", "doc_to_target", "process_results"):
        assert f"{function}: !function maple_task.{function}\n" in text
    fields = yaml.safe_load("".join(line for line in text.splitlines(True) if "!function" not in line))
    assert fields["task"] == "seven_tags" and fields["dataset_path"] == "json" and fields["test_split"] == "test"
    assert "video" not in fields["dataset_kwargs"]  # lmms-eval would download
    assert fields["generation_kwargs"]["until"] == [] and fields["generation_kwargs"]["max_new_tokens"] == 16
    assert [row_of(doc) for doc in documents(task)] == [
        {name: row[name] for name in ("id", "prompt", "tag", "subtitle", "video")} for row in rows
    ]


def test_a_document_is_the_row_with_all_that_a_prompt_depends_on(tmp_path):
    """Of each column that decides it: the one that is left out here once was the way in which sound stands."""
    row = {"prompt": [{"role": "user", "content": "?"}], "audio_in_video": True, "tag": "VAS", "subtitle": "Yes."}
    row |= {"video": "v.mp4", "audio": "a.wav", "images": ["i.png"], "solution": "B"}
    write_task(tmp_path, "seven_tags", [row], tmp_path)
    (doc,) = documents(tmp_path)
    assert prompt_columns(row_of(doc)) == prompt_columns(row) and "solution" not in row_of(doc)


def test_a_task_is_json_where_a_table_holds_nan(rows, tmp_path):
    """Which Parquet stores and JSON does not know."""
    table = Dataset.from_list([{**rows[0], "score": math.nan, "parts": [math.inf, 1.0]}])
    write_task(tmp_path, "t", table, default_folder())
    (line,) = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    written = json.loads(line, parse_constant=pytest.fail)
    assert (written["score"], written["parts"], written["solution"]) == (None, [None, 1.0], rows[0]["solution"])
    with pytest.raises(ValueError, match="row 0: field 'solution' is empty"):
        write_task(tmp_path, "t", [{**rows[0], "solution": math.nan}], default_folder())


def test_other_models_get_what_the_tag_feeds(task, tmp_path):
    for doc in documents(task):
        (message,) = doc_to_messages(doc)
        *media, text = message["content"]
        said = [block["text"] for block in media if block["type"] == "text"]
        media = [block for block in media if block["type"] != "text"]
        # The set has no sound files: the only way to another model's ear is the video.
        fed = doc["tag"] != "S"
        assert doc_to_visual(doc) == [block["url"] for block in media]
        assert [Path(block["url"]).is_file() and block["type"] for block in media] == ["video"] * fed
        assert text == {"type": "text", "text": doc["prompt"][0]["content"]}
        assert doc_to_text(doc) == "".join([*said, text["text"]])
        # The subtitle shows the one of its words that the set says it does.
        assert [doc["truth_S"] in words for words in said] == [True] * ("S" in doc["tag"]), doc
    own = {ROOT_FIELD: str(tmp_path), "prompt": [{"role": "user", "content": "?"}], "video": ["v.mp4"]}
    own |= {"audio": ["a.wav"], "subtitle": "Yes."}
    video, sound = (str(tmp_path / name) for name in ("v.mp4", "a.wav"))
    assert doc_to_visual({**own, "tag": "A"}) == [sound]
    assert doc_to_visual({**own, "tag": "VA"}) == [video, sound]
    assert doc_to_visual({**own, "tag": "V"}) == [video] and doc_to_text({**own, "tag": "V"}) == "?"
    assert doc_to_text({**own, "tag": "S"}) == doc_to_text(own) == "Subtitles:\nYes.\n?"


def test_other_models_get_media_and_subtitle_at_their_marks(tmp_path):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "i.png")
    text = "<video>First. <subtitle>\nThen <image>."
    doc = {ROOT_FIELD: str(tmp_path), "prompt": [{"role": "user", "content": text}], "subtitle": "Yes.", "tag": "VS"}
    doc |= {"video": {"path": "v.mp4", "bytes": None}, "images": [{"path": "i.png", "bytes": None}]}
    (message,) = doc_to_messages(doc)
    video, first, picture, last = message["content"]
    assert video == {"type": "video", "url": str(tmp_path / "v.mp4")} and picture["url"].getpixel((0, 0)) == (
        255,
        0,
        0,
    )
    assert (first["text"], last["text"]) == ("First. Yes.\nThen ", ".")
    assert doc_to_text(doc) == "First. Yes.\nThen ." and len(doc_to_visual(doc)) == 2
    assert doc_to_text({**doc, "tag": "V"}) == "First. \nThen ."
    # A video's own sound: one block with its pictures, and at its own mark where it is fed alone.
    heard = {**doc, "prompt": [{"role": "user", "content": "<video>See, <audio>hear."}], "images": None, "tag": "A"}
    (message,) = doc_to_messages(heard)
    assert message["content"] == [{"type": "text", "text": "See, "}, video, {"type": "text", "text": "hear."}]
    (message,) = doc_to_messages({**heard, "tag": "VA"})
    assert message["content"][0] == video and doc_to_text(heard) == "See, hear." and len(message["content"]) == 3


def test_media_within_a_table_are_handed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "FOLDER", tmp_path / "kept")
    Image.new("RGB", (6, 4), "red").save(tmp_path / "i.png")
    row = {"prompt": [{"role": "user", "content": "?"}], "tag": "V", "solution": "red"}
    row["image"] = {"path": "i.png", "bytes": (tmp_path / "i.png").read_bytes()}
    table = Dataset.from_list([row]).cast_column("image", datasets.Image())
    (tmp_path / "i.png").unlink()
    write_task(tmp_path, "seven_tags", table, tmp_path)
    (doc,) = documents(tmp_path)
    assert doc_to_visual(doc)[0].getpixel((0, 0)) == (255, 0, 0)


def test_other_models_get_pictures_as_such(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (6, 4), color).save(tmp_path / name)
    doc = {ROOT_FIELD: str(tmp_path), "prompt": [{"role": "user", "content": "?"}], "audio": "s.wav", "tag": "VA"}
    (message,) = doc_to_messages({**doc, "images": ["a.png", "b.png"]})
    *pictures, sound, _ = message["content"]
    assert [block["type"] for block in pictures] == ["image", "image"] and sound["url"] == str(tmp_path / "s.wav")
    assert [block["url"].getpixel((0, 0)) for block in pictures] == [(255, 0, 0), (0, 0, 255)]
    assert (
        len(doc_to_visual({**doc, "image": "a.png"})) == 2
        and len(doc_to_visual({**doc, "image": "a.png", "tag": "A"})) == 1
    )
    assert row_of({**doc, "image": "a.png", "images": None})["image"] == "a.png"


def test_scores_are_those_of_the_reward(task):
    doc = documents(task)[0]
    right = f"<answer>{doc['solution']}</answer>"
    wrong = f"<answer>{next(letter for letter in 'ABCD' if letter != doc['solution'])}</answer>"
    assert score_doc(doc, [right], accuracy_reward) == {"accuracy": 1.0}
    assert score_doc(doc, [wrong], accuracy_reward) == {"accuracy": 0.0}
    with pytest.raises(ValueError, match="cannot be scored: its solution is None"):
        score_doc({**doc, "solution": None}, [right], accuracy_reward)


def test_rows_that_are_no_task_are_named(rows, tmp_path):
    with pytest.raises(ValueError, match=re.escape("got 'a/b'")):
        write_task(tmp_path, "a/b", rows, default_folder())
    with pytest.raises(ValueError, match="row 1: field 'solution' is empty"):
        write_task(tmp_path, "t", [rows[0], {**rows[1], "solution": ""}], default_folder())
    with pytest.raises(ValueError, match="row 0: field 'prompt'"):
        write_task(tmp_path, "t", [{**rows[0], "prompt": "text"}], default_folder())
    with pytest.raises(ValueError, match="row 0: tag S needs subtitle"):
        write_task(tmp_path, "t", [{**rows[0], "tag": "S", "subtitle": None}], default_folder())
    with pytest.raises(ValueError, match="row 0: field 'video' is dict; it must be a path"):
        write_task(tmp_path, "t", [{**rows[0], "video": {"path": "v.mp4", "bytes": b"1"}}], default_folder())


@pytest.mark.skipif(installed() is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_the_bridge_says_how_to_get_it():
    for call in (require_lmms_eval, manifest):
        with pytest.raises(BridgeError, match=r"needs lmms-eval 0\.7\.3, but it is not installed.*--override"):
            call()


def test_it_is_installed_as_the_docs_say():
    """In one way: the page, the error, and what `make test-packages` carries out."""
    page = (REPOSITORY / "docs/evaluation.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r'^printf "(.*)" > overrides\.txt$', page, re.MULTILINE)
    (wanted,) = re.findall(r'^uv pip install maple-trl "(.*)" --override overrides\.txt$', page, re.MULTILINE)
    script = (REPOSITORY / "scripts/check_packages.py").read_text(encoding="utf-8")
    assert wanted == f"lmms-eval=={VERSION}" and f'LMMS_EVAL, OVERRIDES = "{wanted}", "{lines}"' in script
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    needed = dict(line.split(" ", 1) for line in setup["options"]["install_requires"].split("\n") if " " in line)
    for line in lines.split("\\n")[:-1]:  # nothing is overridden that this package asks for
        name, bound = re.fullmatch(r"(\w+)(.*)", line).groups()
        assert bound[0] == "<" or needed[name].startswith(bound), line


# With lmms-eval


@pytest.fixture(scope="module")
def model():
    from maple_trl.integrations.lmms_model import MapleModel

    return MapleModel("builtin:tiny-omni", device="cpu", num_frames=4, batch_size=4, max_pixels=4 * 28 * 28)


@needs_lmms
def test_the_entry_point_names_the_class():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from maple_trl.integrations.lmms_model import MapleModel

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("maple_trl") is MapleModel


@needs_lmms
def test_its_defaults_are_those_of_eval():
    from maple_trl.integrations.lmms_model import MapleModel
    from maple_trl.jobs.eval_job import EvalArguments, EvalMedia

    media, model = EvalMedia(), MapleModel("builtin:tiny-omni", device="cpu")
    own = model._builder(str(default_folder()))
    with media.media_loader(str(default_folder())) as loader:
        assert own.loader.limits == loader.limits and own.loader.backend == loader.backend
        theirs = media.prompt_builder(model.family, loader, EvalArguments().chat_template_kwargs)
    assert vars(own) | {"loader": loader} == vars(theirs)
    assert inspect.signature(MapleModel).parameters["dtype"].default == EvalArguments().dtype


@needs_lmms
def test_its_numbers_are_ours(rows, task, model):
    """The same rows through lmms-eval and through the evaluator alone: the same completions, and the same accuracy."""
    from maple_trl.evaluation.evaluator import EvalOptions, Evaluator
    from maple_trl.integrations.lmms_bridge import evaluate_with_lmms
    from maple_trl.omni.media.loader import MediaLoader
    from maple_trl.omni.prompt import PromptBuilder

    found = evaluate_with_lmms(["seven_tags"], model, include_path=task)
    theirs = {sample["doc_id"]: sample["filtered_resps"][0] for sample in found["samples"]["seven_tags"]}
    builder = PromptBuilder(model.family, MediaLoader(default_folder(), model.limits))
    options = EvalOptions(samples=1, batch_size=4, temperature=0, max_new_tokens=16, shared_prompt=False)
    evaluator = Evaluator(model.model, builder, list(rows), accuracy_reward, lambda text: text, options)
    lines = [line for batch in evaluator.batches for line in evaluator.run(batch)]
    assert theirs == {line["row"]: line["completion"] for line in lines}
    accuracy = sum(line["score"] for line in lines) / len(lines)
    assert found["results"]["seven_tags"]["accuracy,none"] == pytest.approx(accuracy)
    assert len(theirs) == len(rows) and len(set(theirs.values())) > 1 and not model.errors


FOREIGN_CODE = """
def doc_to_visual(doc):
    return [doc["clip"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]


def process_results(doc, results):
    return {"accuracy": float(doc["letter"] in results[0])}
"""


@needs_lmms
def test_a_task_written_for_other_models_is_asked(rows, tmp_path):
    """A task that knows nothing of this package: a clip's path, a text, its own metric."""
    from maple_trl.integrations.lmms_bridge import evaluate_with_lmms
    from maple_trl.integrations.lmms_model import MapleModel

    chosen = [row for row in rows if row["tag"] == "VA"]
    documents = [
        {
            "clip": str(default_folder() / row["video"]),
            "text": row["prompt"][0]["content"],
            "letter": row["solution"],
        }
        for row in chosen
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in documents))
    (tmp_path / "foreign.py").write_text(FOREIGN_CODE)
    task = {
        "task": "foreign",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "letter",
        "generation_kwargs": {"max_new_tokens": 16},
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
    }
    functions = "".join(
        f"{name}: !function foreign.{name}\n" for name in ("doc_to_visual", "doc_to_text", "process_results")
    )
    (tmp_path / "foreign.yaml").write_text(yaml.safe_dump(task) + functions)

    def answers(tag, root):
        model = MapleModel("builtin:tiny-omni", device="cpu", num_frames=4, tag=tag, media_root=str(root))
        found = evaluate_with_lmms(["foreign"], model, include_path=tmp_path)
        return [sample["filtered_resps"][0] for sample in found["samples"]["foreign"]]

    write_task(tmp_path / "own", "own", chosen, default_folder(), generation={"max_new_tokens": 16})
    model = MapleModel("builtin:tiny-omni", device="cpu", num_frames=4)
    own = evaluate_with_lmms(["own"], model, include_path=tmp_path / "own")["samples"]["own"]
    assert answers("VA", default_folder()) == [sample["filtered_resps"][0] for sample in own]
    with pytest.raises(BridgeError, match="outside-media-root"):
        answers("VA", tmp_path)


@needs_lmms
def test_a_task_that_is_not_there_is_an_error(task, model):
    from maple_trl.integrations.lmms_bridge import evaluate_with_lmms

    with pytest.raises(BridgeError, match="has no task 'seven_tag' in .*: seven_tags"):
        evaluate_with_lmms(["seven_tag"], model, include_path=task)


@needs_lmms
def test_broken_media_stops_the_run_or_is_listed(rows, tmp_path, model):
    from maple_trl.integrations.lmms_bridge import evaluate_with_lmms

    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    row = {**next(row for row in rows if row["tag"] == "V"), "video": "broken.mp4"}
    write_task(tmp_path, "broken", [row], tmp_path)
    with pytest.raises(BridgeError, match=r"broken/test/0: not-media.*on_error=empty"):
        evaluate_with_lmms(["broken"], model, include_path=tmp_path)
    model.errors.clear()
    model.on_error = "empty"
    try:
        found = evaluate_with_lmms(["broken"], model, include_path=tmp_path)
    finally:
        model.on_error = "raise"
    assert found["results"]["broken"]["accuracy,none"] == 0 and len(model.errors) == 1
    model.errors.clear()


def message(*blocks):
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": "What is it?"}]}]


@needs_lmms
def test_messages_of_other_tasks_become_rows(model, tmp_path):
    clip = str(default_folder() / load_seven_tags()["test"][0]["video"])
    root, row = model._foreign_row(message({"type": "video", "url": clip}), "t")
    text = {"type": "text", "text": "What is it?"}
    assert root == model.media_root
    assert row == {"prompt": [{"role": "user", "content": [text]}], "video": [clip]}
    # A place between or behind texts is kept.
    behind = [{"role": "user", "content": [text, {"type": "video", "url": clip}]}]
    _, row = model._foreign_row(behind, "t")
    assert row == {"prompt": [{"role": "user", "content": [text, {"type": "video", "video": clip}]}]}
    sound = {"array": np.sin(np.arange(16_000) / 9), "sampling_rate": 16_000}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (57, 56, 3), dtype=np.uint8))
    # lmms-eval marks a sound without a type as video.
    root, row = model._foreign_row(message({"type": "video", "url": sound}, {"type": "image", "url": picture}), "t")
    prompt = model._builder(root).encode(row)
    assert prompt.media_tokens["audio"] == 25 and prompt.media_tokens["image"] > 0 and "video" not in prompt.kinds
    with pytest.raises(BridgeError, match="t: it has both files and media without a file"):
        model._foreign_row(message({"type": "video", "url": clip}, {"type": "image", "url": picture}), "t")
    with pytest.raises(BridgeError, match="t: it asks for a part of a clip"):
        model._foreign_row(message({"type": "video", "url": {"video_start": 1.0, "url": clip}}), "t")


@needs_lmms
def test_generation_options_are_read_or_refused(model):
    from maple_trl.integrations.lmms_model import _cut, _eval_options, _until

    assert _eval_options({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3}, 2).temperature == 0.7
    assert _eval_options({"temperature": 0.7, "do_sample": False}, 1).temperature == 0
    with pytest.raises(BridgeError, match="generation option 'typical_p'"):
        _eval_options({"typical_p": 0.2}, 1)
    with pytest.raises(BridgeError, match="num_beams must be 1"):
        _eval_options({"num_beams": 3}, 1)
    assert _until(["\n\n"]) == [] and _cut("a\n\nb STOP c", _until(["STOP"])) == "a\n\nb "


@needs_lmms
def test_its_command_line_asks_our_task(task, tmp_path):
    """By the name that the entry point registers; the entry point is that of a package made here, on the path."""
    plugin = tmp_path / "plugin"
    info = plugin / "maple_plugin-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: maple-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[lmms_eval.models]\nmaple_trl = maple_trl.integrations.lmms_bridge:manifest\n"
    )
    arguments = ["--model", "maple_trl", "--model_args", "pretrained=builtin:tiny-omni,num_frames=4,device=cpu"]
    arguments += ["--tasks", "seven_tags", "--include_path", str(task), "--limit", "3", "--batch_size", "3"]
    arguments += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(plugin)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    results = list((tmp_path / "out").rglob("*_results.json"))
    assert done.returncode == 0 and len(results) == 1, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(results[0].read_text())["results"]["seven_tags"]
    assert 0 <= found["accuracy,none"] <= 1
