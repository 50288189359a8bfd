"""How a job ends once it has trained: the model and the numbers first, and no end for want of an ornament."""

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from maple_trl.jobs import console, train
from maple_trl.jobs.checks import PLOT_ENDINGS, check_files
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.model_config import OmniModelConfig
from maple_trl.jobs.options import OmniScriptArguments


needs_plots = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
LOG = [{"step": step, "reward": step / 4, "loss": 0.5} for step in (1, 2, 3)]


@dataclass
class Args:
    """What a job looks at of its trainer's configuration at its end."""

    output_dir: str
    resume_from_checkpoint: str | None = None
    process_index: int = 0
    world_size: int = 1

    def to_dict(self):
        return asdict(self)


class Trained:
    """A trainer of which nothing is asked but what a job does with it once it has trained."""

    family = None
    reward_funcs = ()
    was_asked_to_end = False

    def __init__(self, args):
        self.args = args
        self.state = SimpleNamespace(log_history=LOG, global_step=3)
        self.processing_class = SimpleNamespace(save_pretrained=lambda folder: None)
        self.clock = SimpleNamespace(before=0.0)
        self.accelerator = SimpleNamespace(wait_for_everyone=lambda: None, end_training=lambda: None)

    def __getattr__(self, name):  # fired, left_out, check_quarantine, train
        return lambda *args, **kwargs: []

    def is_world_process_zero(self):
        return True

    def save_model(self, folder):
        Path(folder, "model.safetensors").write_text("trained")


@pytest.fixture
def end(tmp_path, monkeypatch):
    """Run a job's end in a folder, with these options."""
    args = Args(str(tmp_path))
    monkeypatch.setattr(train, "build_trainer", lambda *job: (Trained(args), None))
    monkeypatch.setattr(console, "describe_run", lambda *_: None)
    monkeypatch.setattr(console, "show_messages", lambda: None)

    def run(**options):
        return train.run(OmniScriptArguments(**options), args, OmniModelConfig())

    return run


@needs_plots
@pytest.mark.parametrize("plot", ["curve", "curve.foo", "folder.png"])
def test_a_plot_that_cannot_be_drawn_costs_nothing(plot, end, tmp_path, capsys):
    """By whatever: an ending that is no format, or a folder in its place."""
    (tmp_path / "folder.png").mkdir()
    assert end(plot_file=str(tmp_path / plot))["steps"] == 3
    told = capsys.readouterr().out
    assert "no plot: " in told and "3 steps" in told
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3


@needs_plots
def test_a_plot_that_can_be_drawn_is_among_what_was_written(end, tmp_path, capsys):
    end(plot_file=str(tmp_path / "curve.png"))
    told = capsys.readouterr().out
    assert (tmp_path / "curve.png").is_file() and "no plot" not in told and "curve.png" in told


def test_a_report_that_cannot_be_written_costs_nothing(end, tmp_path, monkeypatch, capsys):
    reports = pytest.importorskip("maple_trl.reports")

    def broken(*_):
        raise KeyError("curves")

    monkeypatch.setattr(reports, "write_report", broken)
    assert end(report=True)["steps"] == 3
    assert "no report: 'curves'" in capsys.readouterr().out and (tmp_path / "summary.json").is_file()


def test_the_model_is_saved_before_its_log(end, tmp_path):
    """A log that has no place ends the job by an error, which has cost no training."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        end(metrics_file=str(tmp_path / "file" / "metrics.jsonl"))
    assert (tmp_path / "model.safetensors").read_text() == "trained"


@needs_plots
def test_the_ending_of_a_plot_is_looked_at_before_training(tmp_path):
    def options(name):
        return OmniScriptArguments(plot_file=str(tmp_path / name))

    for wrong in ("curve", "curve.foo", "runs.png/curve"):
        with pytest.raises(SetupError, match="plot_file: the ending of .* must be one of .png, .pdf, .svg"):
            check_files(options(wrong))
    for right in ("curve.png", "curve.PDF", "a.b/curve.svg"):
        check_files(options(right))
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    assert {ending[1:] for ending in PLOT_ENDINGS} <= set(FigureCanvasAgg.get_supported_filetypes())
