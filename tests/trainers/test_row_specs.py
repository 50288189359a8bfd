"""What a row is fed is found out once for all its copies, and no two rows are taken for one."""

import copy

import numpy as np
import pytest
from datasets import Dataset, Video
from hypothesis import given
from hypothesis import strategies as st
from media_files import tone, write_video
from omni_runs import build_trainer
from PIL import Image
from tiny_models import build_tiny

from maple_trl.modalities import ModalityTag
from maple_trl.omni.families import family_for
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.prompt_spec import PROMPT_COLUMNS
from maple_trl.trainers.common import rows as row_module
from maple_trl.trainers.common.quarantine import Ranks
from maple_trl.trainers.common.rows import RowEncoder


G = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for i in range(3):
        write_video(root / f"clip{i}.mp4", frames=8, size=(56, 28 * (i + 1)), audio=tone(0.5, 16000))
    return root


@pytest.fixture(scope="module")
def builder(folder):
    limits = MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096)
    return PromptBuilder(family_for(*build_tiny("qwen2_5_omni")), MediaLoader(folder, limits))


def question(clip, word="what"):
    return {"prompt": [{"role": "user", "content": word}], "video": f"clip{clip}.mp4", "tag": "VA", "solution": "A"}


def test_another_access_feeds_the_same_row_other_signals(builder):
    encoder = RowEncoder(copy.copy(builder), Ranks())
    row = question(0) | {"tag": "V"}
    fed = {}
    for access in ("required", "all", "required"):
        encoder.builder.modality_access = access
        fed[access] = encoder.spec(dict(row)).fed
    assert fed == {"required": ModalityTag.V.modalities, "all": ModalityTag.VA.modalities}


# A training


def specs_of_a_training(folder):
    """How often a training of four rows over two epochs asks what a row is fed, and of how many distinct prompts."""
    data = Dataset.from_list([question(clip, word) for clip in (0, 1) for word in ("what", "who")])
    trainer = build_trainer(
        folder, data, per_device_train_batch_size=G, gradient_accumulation_steps=2, num_generations=G, max_steps=4,
        rollout_log_size=0, max_completion_length=2,
    )  # fmt: skip
    asked, spec = [], trainer.prompt_builder.spec
    trainer.prompt_builder.spec = lambda row: asked.append(spec(row)) or asked[-1]
    trainer.train()
    return len(asked), len({found.key for found in asked})


def test_a_training_asks_once_for_each_distinct_prompt(folder, monkeypatch):
    assert specs_of_a_training(folder) == (4, 4)
    # Without the comparison, as often as the rows come: in four rollouts, and looked at ahead before three of them.
    monkeypatch.setattr(row_module, "prompt_columns", lambda row: object())
    count, distinct = specs_of_a_training(folder)
    assert distinct == 4 and count >= 4 * 2 * G + 3 * 2


# Which rows are equal

ROW = {
    "prompt": [
        {"role": "system", "content": "be brief", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "video", "video": "clip0.mp4", "fps": 2}]},
    ],
    "video": None,
    "subtitle": "spoken",
}  # fmt: skip
BLOCK = ("prompt", 1, "content", 1)
PLACES = [
    *[(name,) for name in PROMPT_COLUMNS],
    *[("prompt", 0), ("prompt", 0, "content"), ("prompt", 0, "name"), ("prompt", 0, "tool_calls")],
    *[("prompt", 1, "role"), ("prompt", 1, "content"), ("prompt", 1, "content", 0, "text"), BLOCK],
    *[(*BLOCK, name) for name in ("type", "video", "path", "fps", "video_start", "nframes", "max_pixels", "other")],
]
VALUES = [
    *[0, 1, 2, 784, True, False, 0.0, -0.0, 1.0, 2.0, 784.0, float("nan"), None],
    *["", "1", "True", "user", "V", "text", "clip0.mp4", "clip1.mp4", b"clip0.mp4", ModalityTag.V],
    *[[], (), {}, [1], [True], (1,), ["clip0.mp4"], ("clip0.mp4",), {1: "a"}, {"1": "a"}, {True: "a"}, {1}, {True}],
    *[{"path": "clip0.mp4"}, {"path": "clip0.mp4", "bytes": None}, {"path": "clip0.mp4", "bytes": b"x"}],
    *[ROW["prompt"], tuple(ROW["prompt"]), ROW["prompt"][1]["content"], tuple(ROW["prompt"][1]["content"])],
    *[np.bool_(True), np.int64(1), np.float64(1), np.array([1]), np.array([True]), np.zeros(2000), np.arange(2000)],
    *[Image.new("L", (1, 1)), Image.new("L", (1, 1), 9), Video(), Video(decode=False), frozenset([1]), object()],
]


def changed(place, value):
    """The row with another value in one place."""
    row = inner = copy.deepcopy(ROW)
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return row


def told(spec, row):
    """All that is found out, with the types of it; or the error."""
    try:
        found = spec(row)
        return repr(found), found.key
    except Exception as error:
        return type(error), str(error)


def check_copies(builder, rows):
    """Among its copies and the others, each row is fed what it is fed alone."""
    encoder = RowEncoder(builder, Ranks())
    for row in [*rows, *copy.deepcopy(rows), *rows[::-1]]:
        assert told(encoder.spec, row) == told(builder.spec, row)


@given(place=st.sampled_from(PLACES), values=st.lists(st.sampled_from(VALUES), min_size=2, max_size=6))
def test_rows_that_differ_in_one_place_are_told_apart(builder, place, values):
    check_copies(builder, [changed(place, value) for value in values])


@pytest.mark.parametrize(
    ("place", "values"),
    [(("audio_in_video",), (True, 1)), ((*BLOCK, "fps"), (1.0, True)), (("prompt",), (ROW["prompt"], tuple(ROW["prompt"])))],
)  # fmt: skip
def test_values_alone_do_not_tell_rows_apart(builder, monkeypatch, place, values):
    """The control of the test above: compared by `==`, one row is taken for another."""

    def without_types(value):
        if isinstance(value, (list, tuple, dict)):
            return tuple(map(without_types, value.items() if isinstance(value, dict) else value))
        return value

    check_copies(builder, [changed(place, value) for value in values])
    monkeypatch.setattr(row_module, "prompt_columns", lambda row: without_types([*map(row.get, PROMPT_COLUMNS)]))
    with pytest.raises(AssertionError):
        check_copies(builder, [changed(place, value) for value in values])


def test_a_prompt_depends_on_its_columns_alone(builder):
    read = set()

    class Noting(dict):
        def get(self, name, default=None):
            read.add(name)
            return super().get(name, default)

        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

    for row in (ROW, question(0), {**ROW, "prompt": "text", "audio_in_video": False}, {**question(0), "audio": ["x"]}):
        told(builder.spec, Noting(row))
    assert read == set(PROMPT_COLUMNS)
    spec = RowEncoder(builder, Ranks()).spec
    assert spec(question(0)).key == spec({**question(0), "solution": "B"}).key != spec(question(1)).key


# Files that change


def test_files_are_looked_at_in_every_rollout(folder, tmp_path):
    for i in range(3):
        (tmp_path / f"clip{i}.mp4").write_bytes((folder / f"clip{i}.mp4").read_bytes())
    data = Dataset.from_list([question(i) | {"solution": str(i)} for i in range(3)])
    trainer = build_trainer(tmp_path, data, output_dir=str(tmp_path / "run"))

    def rollout():
        rows, prompts = trainer.encode_rows([data[i] for i in (0, 0, 0, 1, 1, 1)])
        assert [prompt is prompts[i // 3 * 3] for i, prompt in enumerate(prompts)] == [True] * 6
        return [row["solution"] for row in rows], prompts[0].media_digest("video")

    fed, before = rollout()
    assert fed == [*"000111"]
    (tmp_path / "clip0.mp4").write_bytes((folder / "clip2.mp4").read_bytes())
    fed, after = rollout()
    assert fed == [*"000111"] and after != before
    (tmp_path / "clip0.mp4").write_bytes(b"no clip")
    assert rollout()[0] == [*"111111"]
    assert [prompt.path for prompt in trainer.row_encoder.quarantined] == ["clip0.mp4"]
    # What is looked at ahead is the row that stands in.
    ahead = []
    trainer.loader.prefetch = ahead.extend
    trainer._prefetch([data[0], data[0], data[2]], [])
    assert [call.args[0].videos for call in ahead] == [("clip1.mp4",), ("clip2.mp4",)]
