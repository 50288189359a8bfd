"""What holds the plan against published figures and against this machine."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from maple_trl.planning.catalogue import RATES


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # Undone afterwards: a benchmark decides for its whole process which tokens the head reads.
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def test_constants_are_those_that_published_figures_give(script):
    fitted = script("plan_published").fits()
    assert {name: RATES[name].value for name in fitted} == pytest.approx(fitted, rel=0.03)
    assert fitted.keys() == {name for name, rate in RATES.items() if rate.origin == "published"}


def test_published_figures(script, tmp_path, capsys):
    """The errors that docs/scaling.md tells; each figure names where it is published."""
    file = tmp_path / "published.json"
    script("plan_published").main(["--json", str(file)])
    points = json.loads(file.read_text(encoding="utf-8"))["points"]
    assert all(point["source"].startswith("https://") for point in points)

    def errors(group):
        return [point["error"] for point in points if point["group"] == group and not point["fitted"]]

    assert len(errors("weights and cache")) == 28 and max(map(abs, errors("weights and cache"))) < 0.03
    assert max(map(abs, errors("a token, transformers"))) < 0.03
    assert max(map(abs, errors("a token, engine with CUDA graphs"))) < 0.35
    assert max(map(abs, errors("share of the peak in training"))) < 0.15
    # What is counted is a lower bound of what jobs take.
    jobs = errors("memory of a card") + errors("a rollout and its updates") + errors("an optimizer step")
    assert len(jobs) == 17 and all(-0.6 < error <= 0 for error in jobs)
    assert errors("likely memory of a card, within bounds") == [0, 0]
    assert "held out: 28" in capsys.readouterr().out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.matrix(cases=1)
def test_memory_of_a_pass_is_what_the_allocator_counts(script, checkpointing):
    points = script("plan_points")
    shape = points.Shape("small", "shared", 256, 32, 4, checkpointing)
    group = points.make_group(shape)
    points.passes.PASSES["train"](group, shape.side)
    group.model.zero_grad(set_to_none=True)
    measured = points.peak_of(lambda: points.passes.PASSES["train"](group, shape.side))
    setup = points.setup_of(shape, points.read_sizes(group.model.config.to_dict()))
    assert points.predicted_peak(setup) == pytest.approx(measured, rel=0.15)
    # Negative control: rows alone take more than that.
    alone = points.setup_of(points.Shape("small", "rows", 256, 32, 4, checkpointing), setup.model)
    assert points.predicted_peak(alone) > measured * 1.2


def test_a_fit_finds_what_made_the_times(script):
    points = script("plan_points")
    rows = [(1e9, 10.0), (2e9, 10.0), (4e9, 40.0)]
    found = points.fit(rows, [a * 1e-9 + b * 0.01 for a, b in rows])
    assert found == pytest.approx([1e-9, 0.01])


def test_points_names_what_it_needs(script, capsys):
    with pytest.raises(SystemExit):
        script("plan_points").main(["--parts", "clips"])
    assert "--parts clips needs --clips DIR" in capsys.readouterr().err


def test_the_page_has_the_tables_that_are_computed(script):
    """The command that writes them: python benchmarks/plan_scaling.py --write docs/scaling.md (and plan_published.py)."""
    page = (BENCHMARKS.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    scaling, published = script("plan_scaling"), script("plan_published")
    tables = scaling.collect(RATES["decode_seconds"].value) | {"published": published.summary(published.collect())}
    assert script("_plan_tables").with_tables(page, tables) == page
    assert f"`counted_memory` ({RATES['counted_memory'].value:.2f})" in page
    assert f"`counted_time` ({RATES['counted_time'].value:.2f})" in page
    assert f"take {RATES['decode_seconds'].value:g} s of a core" in page


def test_the_page_of_small_cards_has_the_tables_that_are_computed(script):
    """The command that writes them: python benchmarks/plan_small_gpus.py --write docs/small_gpus.md."""
    page = (BENCHMARKS.parent / "docs" / "small_gpus.md").read_text(encoding="utf-8")
    tables = script("plan_small_gpus").collect()
    assert script("_plan_tables").with_tables(page, tables) == page
