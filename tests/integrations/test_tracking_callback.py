"""What arrives in TensorBoard, trackio and W&B: every number by `report_to`, plots and tables by the callback."""

import html
import importlib.util
import io
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omni_runs import build_trainer, one_row_per_tag
from PIL import Image
from transformers import TrainerState

from maple_trl import MAPOTrainer, cli
from maple_trl.integrations.tracking import (
    PLOT,
    TABLE,
    TrackingCallback,
    markdown_table,
    plain_text,
)
from maple_trl.trainers.mapo.config import MAPOConfig


def installed(name):
    return importlib.util.find_spec(name) is not None


needs_tensorboard = pytest.mark.skipif(not installed("tensorboard"), reason="needs tensorboard")
needs_plots = pytest.mark.skipif(not installed("matplotlib"), reason="needs matplotlib")


def run(seven_tags, output, tracker, callback=True, **options):
    folder, dataset = seven_tags
    trainer = build_trainer(
        folder, one_row_per_tag(dataset), output_dir=str(output), report_to=[tracker], max_steps=3, **options
    )
    if callback:
        trainer.add_callback(TrackingCallback(trainer, every_steps=2, rows=3))
    trainer.train()
    return trainer


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    found.Reload()
    return found


def event_folder(output):
    (file,) = Path(output).rglob("events.out.tfevents.*")
    return file.parent


@pytest.mark.long
@needs_tensorboard
@needs_plots
def test_tensorboard_gets_plots_and_tables(seven_tags, tmp_path):
    trainer = run(seven_tags, tmp_path, "tensorboard")
    found = events(event_folder(tmp_path))
    scalars = found.Tags()["scalars"]
    for name in ("train/reward", "train/rewards/spread_reward/mean"):
        logged = [entry[name.removeprefix("train/")] for entry in trainer.state.log_history if "reward" in entry]
        assert [event.value for event in found.Scalars(name)] == pytest.approx(logged)
    assert any(name.startswith("train/tag/") for name in scalars)
    # Every second step, and what was left at the end.
    assert [event.step for event in found.Images(PLOT)] == [2, 3]
    for event in found.Images(PLOT):
        picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert picture.shape[0] > 300 and len(np.unique(picture)) > 20
    tables = found.Tensors(f"{TABLE}/text_summary")
    assert [event.step for event in tables] == [2, 3]
    text = tables[-1].tensor_proto.string_val[0].decode()
    assert len(text.splitlines()) == 2 + 3 and text.startswith("| prompt | completion | spread&#95;reward")
    last = f"{list(trainer._logs['rewards']['spread_reward'])[-1]:.4g}"
    assert last.replace(".", "&#46;") in text.splitlines()[-1] or last in text.splitlines()[-1]


@needs_tensorboard
def test_without_the_callback_there_are_numbers_alone(seven_tags, tmp_path):
    run(seven_tags, tmp_path, "tensorboard", callback=False)
    tags = events(event_folder(tmp_path)).Tags()
    assert tags["scalars"] and not tags["images"] and f"{TABLE}/text_summary" not in tags["tensors"]


@needs_tensorboard
@needs_plots
def test_a_job_sends_them_by_itself(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "demo.yaml"
    words = ["--max_steps", "2", "--output_dir", str(tmp_path), "--report_to", "tensorboard", "--logging_steps", "1"]
    words += ["--evaluate_before_after", "false"]
    assert cli.main(["train", "--config", str(recipe), *words]) == 0
    tags = events(event_folder(tmp_path)).Tags()
    assert PLOT in tags["images"] and f"{TABLE}/text_summary" in tags["tensors"]


@needs_tensorboard
def test_metrics_by_tag_of_mapo_arrive(seven_tags, tmp_path):
    folder, dataset = seven_tags
    from omni_runs import DEFAULTS
    from tiny_models import build_tiny

    from maple_trl.rewards import accuracy_reward

    model, processor = build_tiny("qwen2_5_omni")
    options = DEFAULTS | {"report_to": ["tensorboard"], "max_steps": 2, "num_generations": 2}
    trainer = MAPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=[accuracy_reward],
        args=MAPOConfig(output_dir=str(tmp_path), media_root=str(folder), **options),
        train_dataset=dataset,
    )
    trainer.add_callback(TrackingCallback(trainer, every_steps=1))
    trainer.train()
    found = events(event_folder(tmp_path))
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("tag/")}
    assert any(name.startswith("tag/all/") for name in logged) and len({name.split("/")[1] for name in logged}) >= 2
    assert logged <= {name.removeprefix("train/") for name in found.Tags()["scalars"]}


def test_a_run_without_trackers_and_a_wrong_number(seven_tags, tmp_path):
    folder, dataset = seven_tags
    trainer = build_trainer(folder, one_row_per_tag(dataset), output_dir=str(tmp_path), max_steps=1)
    trainer.add_callback(TrackingCallback(trainer, every_steps=1))
    trainer.train()
    assert not list(tmp_path.rglob("events.out*"))
    with pytest.raises(ValueError, match="every_steps must be 1 or more, got 0"):
        TrackingCallback(trainer, every_steps=0)
    with pytest.raises(ValueError, match="rows must be 0 or more, got -1"):
        TrackingCallback(trainer, rows=-1)


@pytest.mark.skipif(not installed("trackio"), reason="needs trackio")
def test_trackio_gets_plots_and_tables(seven_tags, tmp_path):
    folder, dataset = seven_tags
    one_row_per_tag(dataset).to_parquet(tmp_path / "rows.parquet")
    # In a process of its own: trackio reads its folder from the environment when it is imported.
    script = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[1])!r}]
sys.path += {[path for path in sys.path if path.startswith("/")]!r}
from datasets import Dataset
from omni_runs import build_trainer
from maple_trl.integrations.tracking import TrackingCallback
data = Dataset.from_parquet({str(tmp_path / "rows.parquet")!r})
options = dict(output_dir={str(tmp_path / "out")!r}, report_to=["trackio"], max_steps=3, project="maple-test")
trainer = build_trainer({str(folder)!r}, data, **options)
trainer.add_callback(TrackingCallback(trainer, every_steps=2, rows=3))
trainer.train()
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "trackio").rglob("maple-test*.db")
    with closing(sqlite3.connect(file)) as connection:
        logged = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics")]
    assert any("train/reward" in entry for entry in logged)
    assert [PLOT in entry and TABLE in entry for entry in logged].count(True) == 2
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2


@pytest.mark.skipif(not installed("wandb"), reason="needs wandb")
def test_wandb_gets_plots_and_tables_offline(seven_tags, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    run(seven_tags, tmp_path / "out", "wandb")
    wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    pictures, tables = (sorted(folder.rglob(ending)) for ending in ("*.png", "*.table.json"))
    assert len(pictures) == 2 and len(tables) == 2
    table = json.loads(tables[-1].read_text())
    assert table["columns"][:2] == ["prompt", "completion"] and len(table["data"]) == 3


class Tracker:
    """In the place of wandb: notes what is sent, or fails."""

    run = "run"
    Image = staticmethod(lambda picture: picture.size)

    def __init__(self, fails=False):
        self.sent, self.fails = [], fails

    def Table(self, columns, data):
        return data

    def log(self, found):
        self.sent.append(set(found) - {"train/global_step"})
        if self.fails:
            raise ConnectionError("the tracker is away")


@needs_plots
@pytest.mark.parametrize("fault", ["nothing", "no place for a picture", "a table that is none", "the tracker"])
def test_no_run_ends_for_what_is_sent_of_it(fault, tmp_path, monkeypatch, caplog):
    """What fails is told once and not tried again; the rest is sent."""
    tracker = Tracker(fails=fault == "the tracker")
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    logs = {"prompt": ["p"], "completion": ["c"], "rewards": {"r": [1.0]}, "advantages": [0.0]}
    if fault == "a table that is none":
        logs["rewards"] = None
    if fault == "no place for a picture":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    args = SimpleNamespace(report_to=["wandb"], log_completions=False)
    state = TrainerState(log_history=[{"step": 1, "reward": 0.5}], is_world_process_zero=True)
    callback = TrackingCallback(SimpleNamespace(_logs=logs), every_steps=1)
    for state.global_step in (1, 2, 3):
        callback.on_log(args, state, None, {"loss": 1.0})
    lost = {"no place for a picture": {PLOT}, "a table that is none": {TABLE}}.get(fault, set())
    assert tracker.sent == [{PLOT, TABLE} - lost] * (1 if fault == "the tracker" else 3)
    assert len(caplog.records) == (fault != "nothing")


# Texts


def test_tables_hold_text_and_nothing_else():
    text = plain_text([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "which?"}]}])
    assert text == "user: [video] which?"
    assert plain_text("x" * 2000) == "x" * 999 + "…"
    rendered = markdown_table(
        {"said": ["<script>alert(1)</script>", "a|b\n**bold** [x](javascript:y)"], "n": [0.5, None]}
    )
    assert "<script" not in rendered and "**" not in rendered and "](" not in rendered
    head, rule, first, second = rendered.splitlines()
    assert rule == "| --- | --- |" and first.endswith("| 0.5 |") and second.endswith("|  |")
    assert second.count("|") == 3 and "<br>" in second


@needs_tensorboard
def test_markup_of_a_completion_is_shown_as_text():
    """As TensorBoard renders it."""
    from tensorboard.plugin_util import markdown_to_safe_html

    rendered = markdown_to_safe_html(markdown_table({"said": ["<img src=x onerror=y> **b** `c` | d"]}))
    assert "<img" not in rendered and "<strong>" not in rendered and "<code>" not in rendered
    assert "<td><img src=x onerror=y> **b** `c` | d</td>" in html.unescape(rendered)
