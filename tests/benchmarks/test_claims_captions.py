"""The captions that the claims are measured on: judge, metrics and the policy that runs begin with."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml


CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
if str(CLAIMS) not in sys.path:
    sys.path.insert(0, str(CLAIMS))

import instruments_captions as instruments  # noqa: E402
import metrics_captions as metrics  # noqa: E402
import scores  # noqa: E402
from tasks import captions  # noqa: E402

from maple_trl.data.synthetic import ATTRIBUTES  # noqa: E402
from maple_trl.modalities import Modality, ModalityTag  # noqa: E402


TAGS = ("V", "A", "S", "VA", "VS", "AS", "VAS")
TRUTH = {
    "color": "green",
    "size": "big",
    "pitch": "top",
    "loudness": "soft",
    "word": "sun",
    "speaker": "user",
}  # indices 1, 3, 2: V+A 0, V+S 3, A+S 1, all 2 (mod 4)


@pytest.mark.parametrize(
    ("tag", "reference"),
    [
        ("V", "green big"),
        ("A", "top soft"),
        ("S", "sun user"),
        ("VA", "green big top soft A"),
        ("VS", "green big sun user D"),
        ("AS", "top soft sun user B"),
        ("VAS", "green big top soft sun user C"),
    ],
)
def test_a_reference_tells_the_facts_of_its_signals_and_what_follows_from_them_together(tag, reference):
    assert captions.reference_of(TRUTH, ModalityTag(tag)) == reference
    assert captions.judge(reference, reference) == pytest.approx(1.0 if len(tag) > 1 else 2.5 / 3)


@pytest.mark.parametrize(
    ("caption", "reference", "missing", "errors", "fusion"),
    [
        ("", "green big", 0, 0, 0),
        ("...", "green big", 0, 0, 0),
        ("green", "green big", 1 / 2, 1, 1 / 2),
        ("big green", "green big", 1, 1, 1 / 2),
        ("green thin", "green big", 1 / 2, 1 / 2, 1 / 2),
        ("green big top", "green big", 1, 1 / 2, 1 / 2),  # a pitch that nobody heard
        ("green big B", "green big", 1, 1 / 2, 1 / 2),  # nothing follows from one signal
        ("green green big", "green big", 1, 1, 1 / 2),
        ("green red big", "green big", 1 / 2, 1 / 2, 1 / 2),  # two colours are none
        ("A green purple elephant", "green big", 1 / 2, 0, 1 / 2),
        ("green big top soft", "green big top soft A", 1, 1, 0),
        ("green big top soft B", "green big top soft A", 1, 1 / 2, 0),
        ("green big top soft A B", "green big top soft A", 1, 1 / 2, 0),
        ("green big top A", "green big top soft A", 3 / 4, 1, 1),
        ("red thin low loud B", "green big top soft A", 0, 0, 0),
        ("C", "green big top soft sun user C", 0, 1, 1),
    ],
)
def test_the_judge_scores_what_is_missing_wrong_and_fused(caption, reference, missing, errors, fusion):
    assert captions.axes(caption, reference) == pytest.approx((missing, errors, fusion))
    assert captions.judge(caption, reference) == pytest.approx((missing + errors + fusion) / 3)


def test_a_guess_of_what_was_not_fed_costs_more_than_it_brings():
    silent = captions.judge("green big top soft", "green big top soft A")
    guesses = [captions.judge(f"green big top soft {letter}", "green big top soft A") for letter in "ABCD"]
    assert np.mean(guesses) < silent
    alone = [captions.judge(f"green big {letter}", "green big") for letter in "ABCD"]
    assert max(alone) < captions.judge("green big", "green big")


def test_no_word_belongs_to_two_facts_and_no_signal_alone_tells_the_joint_one():
    words = [value for values in captions.FACTS.values() for value in values]
    assert len(set(words)) == len(words)
    for tag in map(ModalityTag, ("VA", "VS", "AS", "VAS")):
        signals = [signal for signal in Modality if signal in tag.modalities]
        for hidden in signals:
            others = [signal for signal in signals if signal != hidden]
            for values in itertools.product(*(ATTRIBUTES[signal] for signal in others)):
                truth = dict(TRUTH) | {captions.OF_SIGNAL[s][0]: v for s, v in zip(others, values, strict=True)}
                name = captions.OF_SIGNAL[hidden][0]
                joint = {
                    captions.reference_of(truth | {name: value}, tag).split()[-1] for value in captions.FACTS[name]
                }
                assert joint == set("ABCD")


def test_noise_is_of_training_alone_and_is_the_same_for_the_same_caption():
    reference = "green big top soft A"
    rows = [f"row-{i}" for i in range(400)]
    noisy = [captions.noisy_score("green big top soft", reference, name) for name in rows]
    assert noisy == [captions.noisy_score("green big top soft", reference, name) for name in rows]
    assert len(set(noisy)) > 3 and all(0 <= value <= 1 for value in noisy)
    steps = np.array(noisy) * 15  # three axes in fifths
    assert np.allclose(steps, np.rint(steps))
    worse = [captions.noisy_score("green thin low soft", reference, name) for name in rows]
    assert np.mean(noisy) - np.mean(worse) > 0.2
    given = captions.score(completions=["green big top soft"] * 2, reference=[reference] * 2, id=rows[:2])
    assert given == [pytest.approx(2 / 3)] * 2
    told = captions.caption_score(
        completions=[[{"role": "assistant", "content": "green big top soft"}]] * 400,
        reference=[reference] * 400,
        id=rows,
    )
    assert told == noisy


def _result(scores: np.ndarray) -> dict:
    """Return a result of as many clips, of which a row has the sum of its captions' scores; rows come in any order."""
    questions = [
        [f"test-{clip:03}-{tag}", tag, float(scores[clip, number].sum())]
        for number, tag in enumerate(TAGS)
        for clip in range(len(scores))
    ]
    order = np.random.default_rng(5).permutation(len(questions))
    return {"after": {"required": {"questions": [questions[i] for i in order]}}}


def test_fusion_gain_is_the_share_of_clips_whose_best_caption_of_several_signals_wins():
    scores = np.random.default_rng(0).integers(0, 6, (200, 7, 4)) / 6
    wins = 0
    for clip in scores.tolist():
        means = {tag: round(sum(own) * 6) for tag, own in zip(TAGS, clip, strict=True)}
        wins += max(means["VA"], means["VS"], means["AS"], means["VAS"]) > max(means["V"], means["A"], means["S"])
    assert 0 < wins < 200
    assert metrics.caption_fusion_gain(_result(scores)) == wins / 200
    partly = _result(scores)
    partly["after"]["required"]["questions"] += [["test-900-V", "V", 0.0], ["test-900-VAS", "VAS", 4.0]]
    assert metrics.caption_fusion_gain(partly) == wins / 200  # that clip was not asked with all seven inputs
    with pytest.raises(ValueError, match="none of 1 clips was asked with all seven"):
        metrics.caption_fusion_gain({"after": {"required": {"questions": [["test-900-V", "V", 1.0]]}}})
    equal = np.full((3, 7, 4), 0.5)
    assert metrics.caption_fusion_gain(_result(equal)) == 0  # a tie is no gain
    assert metrics.caption_fusion_gain(_result(equal + np.eye(7)[6][None, :, None] / 10)) == 1
    assert metrics.caption_fusion_gain(_result(equal + np.eye(7)[1][None, :, None] / 10)) == 0


def test_disparity_is_the_mean_difference_of_two_tags():
    accuracy = dict(zip(TAGS, (0.5, 0.6, 0.7, 0.4, 0.4, 0.9, 0.1), strict=True))
    pairs = [abs(accuracy[a] - accuracy[b]) for a, b in itertools.combinations(TAGS, 2)]
    result = {"after": {"required": {"accuracy": accuracy | {"all": 0.5}}}}
    assert metrics.caption_disparity(result) == pytest.approx(np.mean(pairs))


def _clips(number: int) -> list[dict]:
    rng = np.random.default_rng(1)
    rows = []
    for clip in range(number):
        truth = {fact: str(rng.choice(captions.FACTS[fact])) for fact in TRUTH}
        rows += captions.rows_of_clip(f"clip-{clip}", truth, "v.mp4", "s.srt")
    return rows


def test_axes_are_means_over_the_captions_of_a_tag():
    rows = [row for row in _clips(6) for _ in range(2)]
    texts = [row["reference"] if number % 2 else "" for number, row in enumerate(rows)]
    found = instruments.axes_by_tag(texts, rows)
    assert found == {tag: pytest.approx([0.5, 0.5, 0.5 if len(tag) > 1 else 0.25]) for tag in TAGS}
    others = instruments.axes_by_tag(texts[-14:] + texts[:-14], rows)  # each clip another's captions
    assert all(others[tag][0] < 0.5 for tag in TAGS)


def test_spread_is_the_mean_cosine_distance_of_words():
    texts = ["red big", "red big", "blue big", "low soft", "", "low loud"]
    tags, clips = ["V", "V", "V", "A", "A", "A"], ["1", "2", "3", "1", "2", "3"]
    found = instruments.spread(texts, clips, tags)
    assert found["silent"] == 1
    assert found["dispersion"] == pytest.approx(((0 + 0.5 + 0.5) / 3 + 0.5) / 2)
    assert found["separation"] == pytest.approx(1.0)
    assert found["clip_dispersion"] == pytest.approx(1.0)
    same = instruments.spread(["red big"] * 6, clips, tags)  # whatever is fed: modes have collapsed
    assert same["dispersion"] == same["separation"] == same["clip_dispersion"] == pytest.approx(0.0)
    assert instruments.spread([""] * 6, clips, tags) == {
        "silent": 6,
        **dict.fromkeys(("dispersion", "separation", "clip_dispersion", "clip_separation", "distances")),
    }


def _register() -> dict:
    return yaml.safe_load((CLAIMS / "register" / "captions.yaml").read_text(encoding="utf-8"))


def test_data_of_one_seed_is_one_data(tmp_path):
    first = captions.write_clips(tmp_path / "a", "train", 5, seed=3)
    again = captions.write_clips(tmp_path / "b", "train", 5, seed=3)
    other = captions.write_clips(tmp_path / "c", "train", 5, seed=4)
    assert first.to_list() == again.to_list() and first.to_list() != other.to_list()
    files = sorted(file.name for file in (tmp_path / "a" / "train").iterdir())
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "a" / "train" / file).read_bytes() == (tmp_path / "b" / "train" / file).read_bytes()
    by_clip = {clip: {row["tag"] for row in first if row["clip"] == clip} for clip in first["clip"]}
    assert all(tags == set(TAGS) for tags in by_clip.values()) and len(by_clip) == 5


def test_the_cold_start_errs_in_the_second_fact_of_a_signal_alone():
    rows = _clips(60)
    told = captions.with_targets(rows, seed=0)
    wrong, second = 0, 0
    for row, one in zip(rows, told, strict=True):
        pairs = zip(row["reference"].split(), one["completion"][0]["content"].split(), strict=True)
        for right, word in pairs:
            (fact,) = captions.told_facts(right)
            assert list(captions.told_facts(word)) == [fact]
            if fact in ("size", "loudness", "speaker"):
                wrong, second = wrong + (word != right), second + 1
            else:
                assert word == right
    assert 0.2 < wrong / second < 0.3
    assert told.to_list() == captions.with_targets(rows, seed=0).to_list()


def test_size_and_loudness_are_there_to_be_told():
    rng = np.random.default_rng(0)
    pixels = {
        size: [(captions.draw_shape("yellow", size, rng)[0, :, :, 0] > 100).sum() for _ in range(40)]
        for size in ("thin", "big")
    }
    assert np.median(pixels["big"]) > 2 * np.median(pixels["thin"])
    levels = {
        loudness: [np.abs(captions.draw_tone("mid", loudness, rng)).max() for _ in range(20)]
        for loudness in ("soft", "loud")
    }
    assert max(levels["soft"]) < min(levels["loud"])


def _by_chance() -> float:
    """Return the score of captions that tell all facts of all signals and know none."""
    rng = np.random.default_rng(0)
    rows = [row for row in _clips(100) if row["tag"] == "VAS"]
    texts = [" ".join(str(rng.choice(values)) for values in captions.FACTS.values()) for _ in rows]
    return float(np.mean(captions.score(completions=texts, reference=[row["reference"] for row in rows])))


@pytest.mark.slow
@pytest.mark.claims
def test_runs_start_above_chance_with_headroom_and_their_captions_are_read(tmp_path):
    """The start itself, and a few steps of contrastive weighting, through the worker."""

    crw = _register()["variants"]["captions-crw"]["options"]
    runs = {
        "start": {"recipe": "tiny/caption_mapo", "options": {}, "trained": False},
        "crw": {"recipe": "tiny/caption_crw", "options": {"max_steps": 14} | crw},
    }
    for name, run in runs.items():
        told = {"task": "captions", "seed": 100, "instruments": ["captions"]} | run
        (tmp_path / f"{name}.run").write_text(json.dumps(told))
    fewer = "import worker; from tasks import captions; captions.TEST_CLIPS = captions.QUESTIONS = 64"
    calls = [f"worker.main([{str(tmp_path / name) + '.run'!r}, {str(tmp_path / name) + '.json'!r}])" for name in runs]
    places = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(CLAIMS), str(CLAIMS.parents[1])]),
    }
    subprocess.run(
        [sys.executable, "-c", "; ".join([fewer, *calls])], check=True, env=os.environ | places, capture_output=True
    )
    start, run = (json.loads((tmp_path / f"{name}.json").read_text()) for name in runs)
    after = start["after"]["required"]
    judge = after["accuracy"]
    alone, together = [judge[tag] for tag in TAGS[:3]], [judge[tag] for tag in TAGS[3:]]
    assert 0.5 < min(alone) and max(alone) < 2.5 / 3 - 0.1
    assert _by_chance() + 0.1 < min(together) == judge["VAS"] and max(together) < 0.7
    assert after["error"] < 0.015
    questions = json.loads((tmp_path / f"questions-{captions.VERSION}.json").read_text())
    assert 0.1 < metrics.caption_fusion_gain(scores.whole(start, questions)) < 0.5
    assert start["captions"]["contrast"] == {} and set(run["captions"]["contrast"]) == {"similarity", "bonus_share"}
    assert 0.3 < run["captions"]["contrast"]["bonus_share"] < 0.7  # about half, by the choice of tau
    assert run["after"]["required"]["accuracy"] != judge
    assert run["captions"]["separation"] != start["captions"]["separation"]
