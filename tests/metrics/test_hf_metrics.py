"""The metrics for Hugging Face's `evaluate`: loaded from their folders in a process that can't reach a network."""

import json
from importlib.util import find_spec
from pathlib import Path

import programs
import pytest

from maple_trl.evaluation import (
    bootstrap_mean,
    compare_runs,
    metric_folder,
    modality_gap_intervals,
    pass_at_k_interval,
    tag_accuracies,
)
from maple_trl.metrics.hf_metrics import NAMES
from maple_trl.modalities import ModalityTag


pytestmark = pytest.mark.slow


TAGS = [str(tag) for tag in ModalityTag]
SAMPLES = [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1]]
SCORES = [score for i in range(7) for score in (1.0, i / 6, 0.5)]
SCORE_TAGS = [tag for tag in TAGS for _ in range(3)]
FUSED = [(tag[::-1].lower(), name, gain * len(tag)) for name, gain in (("x", 0.3), ("y", 0.0)) for tag in TAGS]
CLIPS = [f"clip-{i % 5}" for i in range(len(SCORES))]
FIRST, SECOND = [1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 1]

# Every job gives its result, or the message of its error.
SCRIPT = """
import json, socket, sys

def refuse(*args):
    raise AssertionError(f"a metric tried to reach {args[1:]}")

socket.socket.connect = socket.socket.connect_ex = refuse
import evaluate

results = []
for folder, batches, options in json.load(open(sys.argv[1])):
    metric = evaluate.load(folder)
    try:
        for batch in batches[:-1]:
            metric.add_batch(**batch)
        results.append(metric.compute(**batches[-1], **options))
    except ValueError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def fused(rows):
    return {key: [row[i] for row in rows] for i, key in enumerate(("tags", "samples", "predictions"))}


JOBS = {
    "pass_at_k": ("pass_at_k", [{"predictions": SAMPLES}], {"k": [1, 2], "seed": 3}),
    "pass_at_k in batches": (
        "pass_at_k",
        [{"predictions": SAMPLES[:1]}, {"predictions": SAMPLES[1:]}, {}],
        {"k": 2, "seed": 3},
    ),
    "pass_at_k too few": ("pass_at_k", [{"predictions": [*SAMPLES, [1]]}], {"k": 2}),
    "tag_accuracy": ("tag_accuracy", [{"predictions": [*SCORES, float("nan")], "tags": [*SCORE_TAGS, "V"]}], {}),
    "tag_accuracy untagged": ("tag_accuracy", [{"predictions": [1, 0], "tags": ["", ""]}], {}),
    "modality_gap": ("modality_gap", [{"predictions": SCORES, "tags": SCORE_TAGS}], {}),
    "modality_gap by tag": (
        "modality_gap",
        [{"predictions": [*SCORES, 0.0], "tags": [*SCORE_TAGS, "A"]}],
        {"weighting": "tag", "resamples": 50},
    ),
    "modality_gap missing": ("modality_gap", [{"predictions": SCORES[:-3], "tags": SCORE_TAGS[:-3]}], {}),
    "fusion_gain": ("fusion_gain", [fused(FUSED)], {}),
    "fusion_gain missing": ("fusion_gain", [fused(FUSED[:-1])], {}),
    "fusion_gain twice": ("fusion_gain", [fused([*FUSED, FUSED[0]])], {}),
    "tag_accuracy by clip": ("tag_accuracy", [{"predictions": SCORES, "tags": SCORE_TAGS}], {"clusters": CLIPS}),
    "modality_gap by clip": ("modality_gap", [{"predictions": SCORES, "tags": SCORE_TAGS}], {"clusters": CLIPS}),
    "pass_at_k by clip": ("pass_at_k", [{"predictions": SAMPLES}], {"clusters": ["a", "a", "b", None]}),
    "fusion_gain by clip": ("fusion_gain", [fused(FUSED)], {"clusters": [name for _, name, _ in FUSED]}),
    "paired_comparison by clip": (
        "paired_comparison",
        [{"predictions1": FIRST, "predictions2": SECOND}],
        {"clusters": list("aabbcc")},
    ),
    "paired_comparison": ("paired_comparison", [{"predictions1": FIRST, "predictions2": SECOND}], {"seed": 1}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if find_spec("evaluate") is None:
        pytest.skip('needs pip install "maple-trl[judge]"')
    home = tmp_path_factory.mktemp("hf-home")
    jobs = [(metric_folder(name), batches, options) for name, batches, options in JOBS.values()]
    (home / "jobs.json").write_text(json.dumps(jobs))
    variables = {"HF_HOME": str(home), "HF_EVALUATE_OFFLINE": "1"}
    process = programs.run(["-c", SCRIPT, home / "jobs.json"], variables, home)
    assert process.returncode == 0, process.stderr
    return dict(zip(JOBS, json.loads(process.stdout.splitlines()[-1]), strict=True))


def test_pass_at_k(results):
    expected = {}
    for k in (1, 2):
        estimate = pass_at_k_interval([3] * 4, [2, 0, 3, 1], k, seed=3)
        expected |= {f"pass@{k}": estimate.value, f"pass@{k}_low": estimate.low, f"pass@{k}_high": estimate.high}
    assert results["pass_at_k"] == expected
    assert expected["pass@1"] == pytest.approx(0.5) and expected["pass@2"] == pytest.approx((1 + 0 + 1 + 2 / 3) / 4)
    assert results["pass_at_k in batches"] == {name: value for name, value in expected.items() if "pass@2" in name}
    assert "pass@2 needs 2 samples per question; question 4 has n=1" in results["pass_at_k too few"]


def test_tag_accuracy(results):
    measured, result = tag_accuracies(SCORES, SCORE_TAGS), results["tag_accuracy"]
    assert result["sample_mean"] == measured.sample_mean.value and result["tag_mean_low"] == measured.tag_mean.low
    for tag, estimate in measured.per_tag.items():
        names = [f"tag/{tag}{end}" for end in ("", "_low", "_high", "_count")]
        assert [result[name] for name in names] == [estimate.value, estimate.low, estimate.high, estimate.count]
    assert result["unscored"] == {"V": 1} and result["missing"] == []
    untagged = results["tag_accuracy untagged"]
    assert untagged["sample_mean"] == 0.5 and untagged["tag_mean"] is None and untagged["missing"] == TAGS


def test_modality_gap(results):
    for name, options, rows in (
        ("modality_gap", {}, (SCORES, SCORE_TAGS)),
        ("modality_gap by tag", {"weighting": "tag", "resamples": 50}, ([*SCORES, 0.0], [*SCORE_TAGS, "A"])),
    ):
        expected = {}
        for gap, estimate in modality_gap_intervals(*rows, **options).items():
            expected |= {gap: estimate.value, f"{gap}_low": estimate.low, f"{gap}_high": estimate.high}
        assert results[name] == expected
    assert "missing: VAS" in results["modality_gap missing"]


def test_fusion_gain(results):
    estimate = bootstrap_mean([True, False])
    assert results["fusion_gain"] == {
        "fusion_gain": 0.5,
        "fusion_gain_low": estimate.low,
        "fusion_gain_high": estimate.high,
        "samples": 2,
    }
    assert "Sample 'y' has no score with the input VAS" in results["fusion_gain missing"]
    assert "Sample 'x' has two scores with the input V" in results["fusion_gain twice"]


def test_paired_comparison(results):
    assert results["paired_comparison"] == vars(compare_runs(FIRST, SECOND, seed=1))
    assert results["paired_comparison"]["p_value"] == 2 * (1 + 5) / 2**5


def test_by_clip(results):
    found = results["tag_accuracy by clip"]
    expected = tag_accuracies(SCORES, SCORE_TAGS, clusters=CLIPS)
    assert (found["sample_mean_low"], found["sample_mean_clips"]) == (expected.sample_mean.low, 5)
    assert found["tag_mean_high"] == expected.tag_mean.high and found["tag/V_clips"] == 3
    assert results["modality_gap by clip"]["clips"] == 5
    gap = modality_gap_intervals(SCORES, SCORE_TAGS, clusters=CLIPS)["mean"]
    assert results["modality_gap by clip"]["mean_high"] == gap.high
    estimate = pass_at_k_interval([3] * 4, [2, 0, 3, 1], 1, clusters=["a", "a", "b", None])
    assert results["pass_at_k by clip"] == {
        "pass@1": estimate.value,
        "pass@1_low": estimate.low,
        "pass@1_high": estimate.high,
        "clips": 3,
    }
    assert results["fusion_gain by clip"]["clips"] == 2
    assert results["paired_comparison by clip"] == vars(compare_runs(FIRST, SECOND, clusters=list("aabbcc")))
    assert results["paired_comparison by clip"]["test"] == "permutation"


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_the_script_of_its_name_and_is_a_package(name):
    folder = Path(metric_folder(name))
    # `evaluate` looks for the first; without the second the folder would be in no wheel.
    assert (folder / f"{name}.py").is_file() and (folder / "__init__.py").is_file()
    assert {entry.parent.name for entry in folder.parent.glob("*/__init__.py")} == set(NAMES)


def test_an_unknown_metric_names_the_known_ones():
    with pytest.raises(ValueError, match="no metric 'bleu'; the metrics are fusion_gain, modality_gap"):
        metric_folder("bleu")
