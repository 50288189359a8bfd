"""Intervals and paired tests over clips: what they cover and reject by simulation, and by-hand values of small cases."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.evaluation import (
    UndefinedMetricError,
    bootstrap_mean,
    compare_runs,
    modality_gap_intervals,
    pass_at_k_interval,
    sampled_accuracy,
    tag_accuracies,
)
from maple_trl.metrics.clip_intervals import standard_error, sum_by_clip
from maple_trl.metrics.clips import clip_of, clips_of
from maple_trl.modalities import SUBTITLE_SUFFIXES, ModalityTag


TAGS = [str(tag) for tag in ModalityTag]
DRAWS = 500
COVERS, REJECTS = (0.92, 0.98), (0.03, 0.07)

SIZES = {
    "uniform": lambda rng, clips: rng.integers(2, 30, clips),
    "few": lambda rng, clips: rng.integers(1, 5, clips),
    "skewed": lambda rng, clips: np.maximum(1, np.exp(rng.normal(2, 1, clips))).astype(int),
}


def easiness(rng, mean, deviation, clips):
    """Accuracies of clips, from a beta distribution of this mean and deviation."""
    total = mean * (1 - mean) / deviation**2 - 1
    return rng.beta(mean * total, (1 - mean) * total, clips)


def questions(rng, clips, sizes, mean=0.58, deviation=0.1):
    """Scores (means of five samples) of questions about clips, and the clip of each."""
    of = np.repeat(np.arange(clips), SIZES[sizes](rng, clips))
    return rng.binomial(5, easiness(rng, mean, deviation, clips)[of]) / 5, of


def share(draw):
    return sum(map(draw, range(DRAWS))) / DRAWS


class TestCoverage:
    @pytest.mark.parametrize(
        ("clips", "sizes", "mean", "deviation"),
        [
            (68, "uniform", 0.58, 0.1),
            (68, "skewed", 0.58, 0.1),
            (68, "few", 0.58, 0.1),
            (68, "uniform", 0.58, 0.3),
            (68, "uniform", 0.9, 0.1),
            (20, "uniform", 0.58, 0.1),
            (20, "skewed", 0.58, 0.1),
            (20, "few", 0.3, 0.1),
            (20, "uniform", 0.8, 0.1),
            (8, "uniform", 0.58, 0.1),
        ],
    )
    @pytest.mark.matrix(cases=6)
    def test_of_the_mean(self, clips, sizes, mean, deviation):
        rng = np.random.default_rng(0)

        def covers(_):
            scores, of = questions(rng, clips, sizes, mean, deviation)
            found = bootstrap_mean(scores, clusters=of)
            assert found.clips == clips and found.count == len(scores)
            return found.low <= mean <= found.high

        assert COVERS[0] <= share(covers) <= COVERS[1]

    def test_control_by_question_covers_far_too_little(self):
        rng = np.random.default_rng(0)
        covered = []
        for seed in range(100):
            scores, _ = questions(rng, 68, "uniform")
            found = bootstrap_mean(scores, resamples=200, seed=seed)
            covered.append(found.low <= 0.58 <= found.high)
        assert np.mean(covered) < COVERS[0] - 0.1

    @pytest.mark.long
    @pytest.mark.slow
    @pytest.mark.parametrize(("clips", "nested"), [(20, False), (68, True)])
    @pytest.mark.matrix(cases=1)
    def test_of_means_over_tags_and_of_gaps(self, clips, nested):
        rng = np.random.default_rng(1)
        harder = np.linspace(-0.15, 0.15, 7)  # an accuracy for each tag, around the clip's
        truth = 0.58 + harder
        u, b, t = truth[:3].mean(), truth[3:6].mean(), truth[6]
        gaps = [abs(b - u) / u, abs(t - u) / u, abs(t - b) / b]
        right = {"macro": 0, "V": 0, "uni_bi": 0, "mean": 0}
        for _ in range(DRAWS):
            sizes = rng.integers(3, 12, clips)
            of = np.repeat(np.arange(clips), sizes)  # nested: a clip has questions of one tag
            tag = of % 7 if nested else rng.integers(7, size=len(of))
            own = np.clip(0.58 + 0.1 * np.clip(rng.standard_normal(clips), -2.5, 2.5), 0.2, 0.82)
            scores = rng.binomial(5, np.clip(own[of] + harder[tag], 0.01, 0.99)) / 5
            names = [TAGS[i] for i in tag]
            found = tag_accuracies(scores, names, clusters=of)
            gap = modality_gap_intervals(scores, names, "tag", clusters=of)
            for name, estimate, true in (
                ("macro", found.tag_mean, truth.mean()),
                ("V", found.per_tag["V"], truth[0]),
                ("uni_bi", gap["uni_bi"], gaps[0]),
                ("mean", gap["mean"], sum(gaps) / 3),
            ):
                right[name] += estimate.low <= true <= estimate.high
        covered = {name: value / DRAWS for name, value in right.items()}
        assert all(COVERS[0] <= value <= COVERS[1] for value in covered.values()), covered

    def test_a_gap_of_nothing_is_covered(self):
        """The absolute value hides the sign, so that a percentile interval lies above a gap of 0; this one does not."""
        rng = np.random.default_rng(2)

        def covers(_):
            scores, of = questions(rng, 30, "few")
            gap = modality_gap_intervals(scores, [TAGS[i] for i in rng.integers(7, size=len(of))], clusters=of)
            return gap["uni_bi"].low == 0

        assert COVERS[0] <= share(covers) <= COVERS[1]


class TestPairedTest:
    @staticmethod
    def runs(rng, clips, sizes, samples=5):
        """Two runs that are equal on average: each clip is easier for one or the other."""
        of = np.repeat(np.arange(clips), SIZES[sizes](rng, clips))
        own, shift = easiness(rng, 0.58, 0.1, clips), 0.15 * rng.standard_normal(clips)
        chances = (own, np.clip(own + shift, 0.02, 0.98))
        return [rng.binomial(samples, chance[of]) / samples for chance in chances], of

    @pytest.mark.parametrize(
        ("clips", "sizes", "samples"),
        [(68, "skewed", 5), (68, "uniform", 1), (20, "uniform", 5), (20, "few", 5)],
    )
    def test_equal_runs_are_told_apart_as_often_as_said(self, clips, sizes, samples):
        rng = np.random.default_rng(3)
        rejected = covered = 0
        for seed in range(DRAWS):
            runs, of = self.runs(rng, clips, sizes, samples)
            found = compare_runs(*runs, clusters=of, resamples=199, seed=seed)
            assert found.test == "permutation" and found.clips == clips and found.count == len(of)
            rejected += found.p_value <= 0.05
            covered += found.low <= 0 <= found.high
        assert REJECTS[0] <= rejected / DRAWS <= REJECTS[1]
        assert COVERS[0] <= covered / DRAWS <= COVERS[1]

    @pytest.mark.parametrize("samples", [5, 1], ids=["permutation", "mcnemar"])
    def test_control_by_question_rejects_far_too_often(self, samples):
        rng = np.random.default_rng(3)
        rejected = 0
        for seed in range(100):
            runs, _ = self.runs(rng, 68, "uniform", samples)
            rejected += compare_runs(*runs, resamples=199, seed=seed).p_value <= 0.05
        assert rejected / 100 > REJECTS[1]

    def test_a_difference_is_found(self):
        rng = np.random.default_rng(4)
        runs, of = self.runs(rng, 68, "uniform")
        found = compare_runs(runs[0], np.minimum(1, runs[1] + 0.1), clusters=of)
        assert found.p_value < 0.01 and found.low > 0

    def test_equals_all_signs_of_the_clips(self):
        first = [0.0, 0.2, 0.4, 1.0, 0.6, 0.2, 0.0]
        second = [0.4, 0.2, 1.0, 0.8, 0.8, 0.6, 1.0]
        clips = ["a", "a", "b", "b", "c", "c", None]
        sums = [0.4, 0.4, 0.6, 1.0]
        exact = np.mean(
            [
                abs(sum(sign * value for sign, value in zip(signs, sums, strict=True))) >= sum(sums) - 1e-9
                for signs in itertools.product((-1, 1), repeat=4)
            ]
        )
        found = compare_runs(first, second, clusters=clips)
        assert (found.p_value, found.exact, found.clips) == (exact, True, 4) and exact == 2 / 16
        assert found.difference == pytest.approx(sum(sums) / 7) and (found.better, found.worse) == (5, 1)

    def test_clips_of_one_question_are_questions(self):
        first, second = [1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 1]
        by_question = compare_runs(first, second)
        by_clip = compare_runs(first, second, clusters=list("abcdef"))
        assert by_clip.test == by_question.test == "mcnemar" and by_clip.p_value == by_question.p_value
        assert (by_question.clips, by_clip.clips) == (None, 6)

    def test_mcnemar_refuses_questions_that_share_clips(self):
        with pytest.raises(ValueError, match="questions as independent, but 3 questions share 2 clips"):
            compare_runs([0, 1, 1], [1, 1, 0], test="mcnemar", clusters=["a", "a", "b"])
        assert compare_runs([0, 1, 1], [1, 1, 0], clusters=["a", "a", "b"]).test == "permutation"

    def test_one_clip_says_nothing(self):
        found = compare_runs([0.0] * 9, [1.0] * 9, clusters=["a"] * 9)
        assert found.difference == 1 and found.p_value == 1 and math.isnan(found.low) and found.clips == 1


class TestValues:
    @given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 1)), min_size=1, max_size=30))
    def test_error_against_leaving_out_by_hand(self, rows):
        clips, scores = [row[0] for row in rows], [row[1] for row in rows]
        names = sorted(set(clips))
        error = standard_error(scores, clips)
        if len(names) < 2:
            assert math.isnan(error) and math.isnan(bootstrap_mean(scores, clusters=clips).low)
            return
        mean = np.mean(scores)
        without = [np.mean([s for c, s in rows if c != name]) for name in names]
        by_hand = math.sqrt((len(names) - 1) / len(names) * sum((value - mean) ** 2 for value in without))
        assert error == pytest.approx(by_hand, abs=1e-12)

    def test_without_clips_the_error_is_that_of_a_mean(self):
        scores = [0.0, 0.2, 1.0, 0.4]
        assert standard_error(scores) == pytest.approx(np.std(scores, ddof=1) / 2)
        assert standard_error(scores, [None, "", math.nan, None]) == standard_error(scores)

    def test_questions_without_a_clip_stand_alone(self):
        found = bootstrap_mean([0, 1, 1, 0, 1], clusters=["a", "a", None, None, ""])
        assert (found.clips, found.count) == (4, 5)
        # Where none has one, the interval is over questions as before.
        assert bootstrap_mean([0, 1, 1, 0], clusters=[None] * 4) == bootstrap_mean([0, 1, 1, 0])
        assert bootstrap_mean([0, 1, 1, 0]).clips is None

    def test_all_right(self):
        found = bootstrap_mean([1.0] * 6, clusters=list("aabbcc"))
        assert (found.value, found.low, found.high, found.clips) == (1, 1, 1, 3)

    def test_an_interval_of_a_share_stays_a_share(self):
        found = bootstrap_mean([1.0, 1.0, 1.0, 0.0], clusters=list("abcc"))
        assert 0 < found.low < found.value < found.high < 1

    def test_in_any_order_and_with_nothing_drawn(self):
        rng = np.random.default_rng(5)
        scores, of = questions(rng, 10, "few")
        tags = [TAGS[i % 7] for i in range(len(of))]
        order = rng.permutation(len(of))
        one = bootstrap_mean(scores, tags, clusters=of, seed=1)
        other = bootstrap_mean(scores[order], [tags[i] for i in order], clusters=of[order], seed=2)
        assert (one.value, one.clips) == (other.value, other.clips)
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-12)

    def test_strata_keep_their_shares(self):
        """A clip easy for one tag and hard for another: with tags apart, the clips do not differ."""
        scores, tags, clips = [1, 1, 0, 1, 0, 0], list("VVAVAA"), list("aaabbb")
        apart, pooled = bootstrap_mean(scores, tags, clusters=clips), bootstrap_mean(scores, clusters=clips)
        assert apart.low == apart.high == 0.5 and pooled.low < 0.3

    def test_a_tag_of_one_clip_has_no_interval_and_adds_no_spread(self):
        scores, tags, clips = [1, 0, 1, 1, 0, 1], list("VVVVAA"), list("aabbcc")
        found = tag_accuracies(scores, tags, clusters=clips)
        assert math.isnan(found.per_tag["A"].low) and found.per_tag["A"].clips == 1
        assert found.per_tag["V"].low < 0.75 < found.per_tag["V"].high
        assert found.tag_mean.low < found.tag_mean.value < found.tag_mean.high and found.tag_mean.clips == 3

    def test_tags_without_questions_and_questions_without_tags_or_scores(self):
        scores = [1, 0, None, 1, 0, 1]
        found = tag_accuracies(scores, ["V", "V", "A", None, "VA", "VA"], clusters=list("abccab"))
        assert found.missing == ("A", "S", "VS", "AS", "VAS") and found.unscored == {"A": 1}
        assert (found.sample_mean.clips, found.sample_mean.count) == (3, 5)
        assert (found.tag_mean.clips, found.tag_mean.count) == (2, 4)
        with pytest.raises(UndefinedMetricError, match="None of 1 questions"):
            tag_accuracies([None], ["V"], clusters=["a"])

    def test_gaps_of_one_clip_and_of_tags_that_one_clip_answers(self):
        one = modality_gap_intervals([1, 0.5, 1, 1, 1, 1, 0], TAGS, clusters=["a"] * 7)
        assert all(math.isnan(estimate.low) and estimate.clips == 1 for estimate in one.values())
        # Without clip `a` no uni-modal question is right: the gap would divide by 0.
        scores, tags = [1, 0, 0, 1, 1, 1, 1] + [0, 0, 0, 1, 1, 1, 1], TAGS * 2
        found = modality_gap_intervals(scores, tags, clusters=["a"] * 7 + ["b"] * 7)
        assert math.isfinite(found["uni_bi"].value)

    def test_pass_at_k(self):
        found = pass_at_k_interval([5] * 6, [0, 0, 5, 5, 5, 2], 2, clusters=list("aabbcc"))
        assert found.clips == 3 and found.low < found.value < found.high

    @pytest.mark.parametrize(
        "function", [bootstrap_mean, lambda s, clusters: tag_accuracies(s, ["V"] * 2, clusters=clusters)]
    )
    def test_refusals(self, function):
        with pytest.raises(ValueError, match="2 scores, but 1 clusters"):
            function([1.0, 0.0], clusters=["a"])

    def test_confidence_is_checked(self):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            bootstrap_mean([1.0, 0.0], clusters=["a", "b"], confidence=95)
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            modality_gap_intervals([1.0] * 7, TAGS, clusters=["a"] * 7, confidence=95)

    def test_sums(self):
        sums = sum_by_clip(np.array([1.0, 0.5, 0.25]), ["a", "b", "a"], ["V", "V", "A"])
        assert sums.strata == ("A", "V") and sums.scores_GK.tolist() == [[0.25, 1.0], [0.0, 0.5]]
        assert sums.counts_GK.tolist() == [[1, 1], [0, 1]]


class TestClipsOfRows:
    @pytest.mark.parametrize(
        ("row", "clip"),
        [
            ({"video_id": "x1", "video": "a.mp4"}, "x1"),
            ({"clip": "c", "video_id": "x1"}, "c"),
            ({"video_id": 7}, "7"),
            ({"video_id": "", "video": "a.mp4", "audio": "a.wav"}, "a.mp4"),
            ({"video": "./test/../a.mp4"}, "a.mp4"),
            ({"video": ["a.mp4", "b.mp4"]}, "a.mp4"),
            ({"video": {"path": "a.mp4", "bytes": None}}, "a.mp4"),
            ({"video": None, "audio": "a.wav", "subtitle": "a.srt"}, "a.wav"),
            ({"image": "./a.png", "audio": "a.wav"}, "a.png"),
            ({"image": None, "images": ["a.png", "b.png"], "audio": "a.wav"}, "a.png"),
            ({"image": "a.png", "video": "a.mp4"}, "a.mp4"),
            ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}, "a.png"),
            *(({"video": [], "audio": "", "subtitle": f"subs/a{end}"}, f"subs/a{end}") for end in SUBTITLE_SUFFIXES),
            ({"subtitle": "What they say, in a file called a.srt: nothing."}, None),
            ({"prompt": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "a.mp4"),
            ({"prompt": [{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}]}, "a.wav"),
            ({"prompt": [{"role": "user", "content": "?"}]}, None),
            ({"video": "https://host/a//b.mp4"}, "https://host/a//b.mp4"),
            ({}, None),
        ],
    )
    def test_a_row(self, row, clip):
        assert clip_of(row) == clip and clips_of([row]) == [clip]

    def test_standard_errors_of_sampled_accuracies_are_over_clips(self):
        rows = [
            {"id": i, "tag": tag, "prompt": "?", "solution": "A", "video": f"{i // 2}.mp4"}
            for i, tag in enumerate(["V", "V", "V", "V", "A", "A"])
        ]
        answers = {0: "AAAAA", 1: "AAAAB", 2: "BBBBB", 3: "BBBBA", 4: "AABBB", 5: "ABABA"}
        given = {i: iter(letters) for i, letters in answers.items()}
        found = sampled_accuracy(
            lambda asked: [next(given[row["id"]]) for row in asked],
            rows,
            lambda completions, **columns: [float(text == "A") for text in completions],
            samples=5,
        )
        assert found.accuracy == pytest.approx({"all": 15 / 30, "V": 0.5, "A": 0.5})
        assert found.questions == {"all": 6, "V": 4, "A": 2}
        assert found.errors["V"] == pytest.approx(standard_error([1, 0.8, 0, 0.2], ["0", "0", "1", "1"]))
        assert found.errors["V"] == pytest.approx(0.4) and math.isnan(found.errors["A"])
        with pytest.raises(ValueError, match="samples must be 1 or more, got 0"):
            sampled_accuracy(lambda asked: [], rows, lambda **columns: [], samples=0)
