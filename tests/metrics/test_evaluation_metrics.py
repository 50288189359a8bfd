"""Metrics against counting by hand, exact combinatorics, simulated data and the paper's tables."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.evaluation import (
    UndefinedMetricError,
    align_runs,
    bootstrap_mean,
    clip_spread,
    compare_runs,
    embedding_spread,
    fused_samples,
    fusion_gain,
    mcnemar_exact,
    modality_gap,
    modality_gap_intervals,
    pass_at_k,
    pass_at_k_interval,
    tag_accuracies,
    tag_disparity,
    training_efficiency,
)
from maple_trl.metrics.intervals import resampled_means
from maple_trl.modalities import ModalityTag


TAGS = [str(tag) for tag in ModalityTag]
COUNTS = dict(zip(TAGS, (552, 75, 76, 1145, 1784, 171, 1198), strict=True))
# MAPLE (arXiv 2602.11596), Table 1: accuracies of V to VAS, their average, U-B, U-T, B-T and mean gap, in percent.
TABLE_1 = {
    "Zero-shot": (34.54, 36.89, 43.42, 37.79, 40.83, 42.30, 40.46, 39.38, 11.30, 13.17, 1.68, 8.72),
    "MUPO": (55.08, 65.34, 63.82, 57.47, 60.15, 58.77, 58.14, 58.58, 3.43, 1.79, 1.59, 2.27),
    "Token-level": (55.79, 65.78, 61.40, 57.85, 60.26, 59.06, 57.76, 58.68, 3.20, 0.52, 2.60, 2.11),
    "Sample-level": (55.74, 65.78, 62.28, 58.69, 60.42, 58.87, 57.48, 58.86, 3.79, 0.07, 3.72, 2.53),
    "Asymmetric": (55.44, 68.89, 57.89, 58.02, 60.65, 57.70, 57.18, 58.62, 4.17, 0.07, 3.93, 2.72),
    "Early filtering": (55.50, 64.89, 63.16, 64.63, 59.70, 58.48, 57.12, 58.00, 2.04, 0.37, 2.36, 1.59),
    "Mid-training": (55.32, 69.33, 61.84, 57.29, 60.18, 59.65, 57.10, 58.39, 2.71, 0.73, 3.35, 2.26),
    "Modality-based": (56.40, 65.78, 60.53, 58.05, 60.83, 59.65, 57.96, 59.05, 3.27, 0.19, 2.98, 2.15),
    "Full-recipe": (56.22, 67.55, 63.16, 57.50, 60.58, 56.92, 57.71, 58.72, 1.82, 0.81, 2.58, 1.74),
}

scores_in_tenths = st.integers(0, 10).map(lambda i: i / 10)


def derived(accuracy, weighting="sample"):
    """A row's average and gap columns in percent, as its accuracies and counts give them."""
    gap = modality_gap(accuracy, COUNTS, weighting)
    average = sum(accuracy[tag] * COUNTS[tag] for tag in TAGS) / sum(COUNTS.values())
    return np.array([average, *(100 * value for value in (gap.uni_bi, gap.uni_tri, gap.bi_tri, gap.mean))])


def row_of_table(name):
    row = TABLE_1[name]
    return dict(zip(TAGS, row[:7], strict=True)), np.array(row[7:])


class TestTable1:
    @pytest.mark.parametrize("name", [name for name in TABLE_1 if name != "Early filtering"])
    def test_columns_follow_from_accuracies_and_counts(self, name):
        accuracy, columns = row_of_table(name)
        np.testing.assert_allclose(derived(accuracy), columns, atol=0.02)

    def test_one_row_contradicts_itself_by_its_va_cell(self):
        accuracy, columns = row_of_table("Early filtering")
        off = np.abs(derived(accuracy) - columns)
        # U-T, which has no VA in it, is right; everything else is not.
        assert (off > 0.02).tolist() == [True, True, False, True, True]
        # One other accuracy of VA gives all five columns.
        rest = sum(accuracy[tag] * COUNTS[tag] for tag in TAGS if tag != "VA")
        accuracy["VA"] = (columns[0] * sum(COUNTS.values()) - rest) / COUNTS["VA"]
        assert accuracy["VA"] == pytest.approx(56.61, abs=0.03)
        np.testing.assert_allclose(derived(accuracy), columns, atol=0.03)

    def test_the_other_weighting_gives_other_columns(self):
        accuracy, columns = row_of_table("MUPO")
        assert np.abs(derived(accuracy, "tag") - columns)[1:].min() > 0.4

    def test_accuracies_from_rows_give_the_same_average_and_gap(self):
        right = {tag: round(COUNTS[tag] * value / 100) for tag, value in row_of_table("MUPO")[0].items()}
        scores = [score for tag in TAGS for score in [1] * right[tag] + [0] * (COUNTS[tag] - right[tag])]
        tags = [tag for tag in TAGS for _ in range(COUNTS[tag])]
        measured = tag_accuracies(scores, tags, resamples=10)
        assert measured.sample_mean.value == pytest.approx(0.5858, abs=0.001)
        assert measured.tag_mean.value == pytest.approx(0.5982, abs=0.002)
        assert modality_gap(measured.accuracy, measured.counts).mean == pytest.approx(0.0227, abs=0.002)

    def test_speed_up(self):
        before, after = training_efficiency([523.28], 256), training_efficiency([164.72], 256)
        assert before.seconds_per_step / after.seconds_per_step == pytest.approx(3.18, abs=0.005)


class TestPassAtK:
    @given(st.data())
    def test_equals_exact_combinatorics(self, data):
        n = data.draw(st.integers(1, 60))
        c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12, abs=1e-12)

    @pytest.mark.parametrize("n", range(1, 8))
    def test_equals_the_share_of_subsets_with_a_right_one(self, n):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)

    def test_is_unbiased_where_the_plug_in_estimate_is_not(self):
        p, n, k = 0.3, 6, 3
        truth = 1 - (1 - p) ** k
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        assert np.dot(chance, pass_at_k(n, np.arange(n + 1), k)) == pytest.approx(truth, abs=1e-12)
        plug_in = [1 - (1 - c / n) ** k for c in range(n + 1)]
        assert abs(np.dot(chance, plug_in) - truth) > 0.02

    def test_over_arrays(self):
        values = pass_at_k([5, 10, 5], [0, 3, 5], 2)
        assert values.tolist() == [pass_at_k(5, 0, 2), pass_at_k(10, 3, 2), pass_at_k(5, 5, 2)]
        assert values[[0, 2]].tolist() == [0.0, 1.0]
        assert isinstance(pass_at_k(5, 2, 1), float)
        np.testing.assert_allclose(pass_at_k(5, np.arange(6), 1), np.arange(6) / 5)

    def test_many_samples_do_not_overflow(self):
        exact = 1 - Fraction(math.comb(99_000, 500), math.comb(100_000, 500))
        assert pass_at_k(100_000, 1000, 500) == pytest.approx(float(exact), rel=1e-9)

    @pytest.mark.parametrize(
        ("n", "c", "k", "error", "message"),
        [
            ([5, 3, 2], [1, 1, 1], 4, UndefinedMetricError, r"pass@4 needs 4 .* question 1 has n=3 \(2 of 3"),
            (2, 1, 3, UndefinedMetricError, "question 0 has n=2"),
            ([], [], 1, UndefinedMetricError, "pass@k of no question"),
            ([5, 5], [1, 6], 1, ValueError, "Question 1 has c=6 right of n=5"),
            (5, -1, 1, ValueError, "Question 0 has c=-1"),
            (5, 1, 0, ValueError, "k must be an integer of 1 or more, got 0"),
            (5, 1, 1.0, ValueError, "k must be an integer"),
            (5, 0.4, 1, ValueError, "c must be an integer or one integer per question, got float64"),
            ([[5]], [[1]], 1, ValueError, r"n must be .* of shape \(1, 1\)"),
        ],
    )
    def test_refusals(self, n, c, k, error, message):
        with pytest.raises(error, match=message):
            pass_at_k(n, c, k)

    def test_interval_is_over_questions(self):
        n, c = [5] * 40, [0, 5] * 20
        estimate = pass_at_k_interval(n, c, 1)
        assert (estimate.value, estimate.count) == (0.5, 40)
        # Over samples instead, 200 of them, it would be half as wide.
        assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), rel=0.15)


class TestBootstrap:
    def test_repeats_by_seed_and_not_by_order(self):
        scores, tags = np.random.default_rng(0).random(50), ["V", "A"] * 25
        first = bootstrap_mean(scores, tags, seed=3)
        assert first == bootstrap_mean(scores, tags, seed=3)
        shuffled = np.random.default_rng(1).permutation(50)
        assert first == bootstrap_mean(scores[shuffled], [tags[i] for i in shuffled], seed=3)
        assert first != bootstrap_mean(scores, tags, seed=4)

    def test_draws_equal_all_resamples_of_three(self):
        scores = [0.0, 0.25, 1.0]
        exact = [np.mean(drawn) for drawn in itertools.product(scores, repeat=3)]
        draws = resampled_means(scores, resamples=20_000)[""]
        assert set(np.round(draws, 9)) == set(np.round(exact, 9))
        for mean in set(exact):
            assert np.isclose(draws, mean).mean() == pytest.approx(np.isclose(exact, mean).mean(), abs=0.02)

    @pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
    def test_coverage_on_simulated_questions(self, p):
        rng = np.random.default_rng(7)
        covered = 0
        for seed in range(300):
            estimate = bootstrap_mean(rng.random(80) < p, resamples=400, confidence=0.9, seed=seed)
            covered += estimate.low <= p <= estimate.high
        assert 0.84 <= covered / 300 <= 0.95

    def test_strata_take_the_difference_between_tags_out_of_the_interval(self):
        scores, tags = [1.0] * 29 + [0.0] + [0.0] * 29 + [1.0], ["V"] * 30 + ["A"] * 30
        stratified, pooled = bootstrap_mean(scores, tags), bootstrap_mean(scores)
        assert stratified.value == pooled.value == 0.5
        deviation = math.sqrt(29 / 30 * 1 / 30 / 60)
        assert stratified.high - stratified.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
        assert pooled.high - pooled.low > 2 * (stratified.high - stratified.low)

    def test_a_stratum_does_not_change_another(self):
        alone = resampled_means([0, 1, 1], ["V"] * 3, resamples=20)
        beside = resampled_means([0.5, 0, 1, 0.1, 1], ["A", "V", "V", "A", "V"], resamples=20)
        assert alone["V"].tolist() == beside["V"].tolist()

    def test_one_question_has_no_spread(self):
        estimate = bootstrap_mean([1.0])
        assert estimate.value == 1 and math.isnan(estimate.low) and math.isnan(estimate.high)
        assert math.isnan(bootstrap_mean([1.0, 0.0], ["V", "A"]).low)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"scores": []}, UndefinedMetricError, "scores are empty"),
            ({"scores": [1.0, math.nan, math.inf]}, ValueError, r"row 1 is nan \(2 of 3 rows"),
            ({"scores": [[1.0]]}, ValueError, r"one number per question, got an array of shape \(1, 1\)"),
            ({"scores": [1.0], "strata": ["V", "A"]}, ValueError, "1 scores, but 2 strata"),
            ({"scores": [1.0], "confidence": 95}, ValueError, "strictly between 0 and 1, e.g. 0.95, got 95"),
            ({"scores": [1.0], "resamples": 0}, ValueError, "resamples must be 1 or more"),
        ],
    )
    def test_refusals(self, arguments, error, message):
        with pytest.raises(error, match=message):
            bootstrap_mean(**arguments)


class TestTagAccuracies:
    @given(st.lists(st.tuples(st.one_of(st.none(), scores_in_tenths), st.sampled_from([*TAGS, "av", None, ""]))))
    def test_against_counting_by_hand(self, rows):
        scores, tags = [row[0] for row in rows], [row[1] for row in rows]
        known = [(score, "VA" if tag == "av" else tag or "") for score, tag in rows if score is not None]
        if not known:
            with pytest.raises(UndefinedMetricError, match=f"None of {len(rows)} questions has a score"):
                tag_accuracies(scores, tags, resamples=5)
            return
        measured = tag_accuracies(scores, tags, resamples=5)
        by_tag = {tag: [s for s, t in known if t == tag] for tag in TAGS}
        present = [tag for tag in TAGS if by_tag[tag]]
        assert list(measured.per_tag) == present and measured.missing == tuple(t for t in TAGS if t not in present)
        assert measured.counts == {tag: len(by_tag[tag]) for tag in present}
        for tag in present:
            assert measured.accuracy[tag] == pytest.approx(sum(by_tag[tag]) / len(by_tag[tag]))
        assert measured.sample_mean.value == pytest.approx(sum(s for s, _ in known) / len(known))
        if present:
            plain = sum(sum(by_tag[tag]) / len(by_tag[tag]) for tag in present) / len(present)
            assert measured.tag_mean.value == pytest.approx(plain)
        else:
            assert measured.tag_mean is None
        assert sum(measured.unscored.values()) == len(rows) - len(known)

    def test_the_two_averages_differ_and_have_their_own_intervals(self):
        scores, tags = [1.0] * 90 + [0, 1] * 5, ["V"] * 90 + ["A"] * 10
        measured = tag_accuracies(scores, tags)
        assert measured.sample_mean.value == pytest.approx(0.95) and measured.tag_mean.value == pytest.approx(0.75)
        # The ten hard questions are half of the plain mean and a tenth of the other.
        widths = [estimate.high - estimate.low for estimate in (measured.tag_mean, measured.sample_mean)]
        assert widths[0] == pytest.approx(5 * widths[1], rel=1e-6)
        assert measured.per_tag["A"].low < 0.5 < measured.per_tag["A"].high

    def test_what_could_not_be_scored_is_neither_right_nor_wrong(self):
        measured = tag_accuracies([1, None, math.nan, 0], ["V", "V", "AS", None])
        assert measured.accuracy == {"V": 1.0} and measured.unscored == {"V": 1, "AS": 1}
        assert measured.sample_mean.value == 0.5 and "AS" in measured.missing
        assert math.isnan(measured.per_tag["V"].low) and math.isnan(measured.tag_mean.low)

    @pytest.mark.parametrize(
        ("scores", "tags", "message"),
        [
            ([1, 55.0], ["V", "V"], r"row 1 is 55.0; a score must be a fraction"),
            ([1, 0], ["V", "VX"], "tags: row 1: 'VX' is not a modality tag"),
            ([1, 0], ["V"], "2 scores, but 1 tags"),
            ([], [], "None of 0 questions has a score"),
        ],
    )
    def test_refusals(self, scores, tags, message):
        with pytest.raises(ValueError, match=message):
            tag_accuracies(scores, tags)


class TestModalityGap:
    @given(
        st.lists(st.floats(0.01, 1), min_size=7, max_size=7),
        st.lists(st.integers(1, 500), min_size=7, max_size=7),
        st.sampled_from(["sample", "tag"]),
    )
    def test_against_the_formula(self, values, counts, weighting):
        w = counts if weighting == "sample" else [1] * 7
        u = sum(values[i] * w[i] for i in range(3)) / sum(w[:3])
        b = sum(values[i] * w[i] for i in range(3, 6)) / sum(w[3:6])
        t = values[6]
        accuracy = dict(zip(TAGS, values, strict=True))
        gap = modality_gap(accuracy, dict(zip(TAGS, counts, strict=True)), weighting)
        expected = [abs(b - u) / u, abs(t - u) / u, abs(t - b) / b]
        assert [gap.uni_bi, gap.uni_tri, gap.bi_tri] == pytest.approx(expected, abs=1e-9)
        assert gap.mean == pytest.approx(sum(expected) / 3, abs=1e-9)
        assert [gap.uni, gap.bi, gap.tri] == pytest.approx([u, b, t])

    def test_any_spelling_any_unit_and_no_all(self):
        accuracy = {"v": 0.5, "a": 0.5, "s": 0.5, "av": 0.6, "sv": 0.6, "sa": 0.6, "sav": 0.8, "all": 0.1}
        gap = modality_gap(accuracy, weighting="tag")
        assert [gap.uni_bi, gap.uni_tri, gap.bi_tri] == pytest.approx([0.2, 0.6, 1 / 3])
        percent = modality_gap({tag: 100 * value for tag, value in accuracy.items()}, weighting="tag")
        assert percent.mean == pytest.approx(gap.mean)

    def test_a_tag_with_no_right_answer(self):
        accuracy = dict.fromkeys(TAGS, 0.5)
        # One tag of a family: the family still has an accuracy.
        assert modality_gap({**accuracy, "A": 0.0}, weighting="tag").uni == pytest.approx(1 / 3)
        assert modality_gap({**accuracy, "VAS": 0.0}, weighting="tag").uni_tri == 1
        with pytest.raises(UndefinedMetricError, match="undefined: it divides by the accuracy of V, A, S, which is 0"):
            modality_gap({**accuracy, "V": 0, "A": 0, "S": 0}, weighting="tag")
        with pytest.raises(UndefinedMetricError, match="the accuracy of VA, VS, AS"):
            modality_gap({**accuracy, "VA": 0, "VS": 0, "AS": 0}, weighting="tag")

    @pytest.mark.parametrize(
        ("change", "counts", "weighting", "error", "message"),
        [
            ({}, None, "sample", ValueError, "needs counts"),
            ({}, COUNTS, "macro", ValueError, "weighting must be one of sample, tag, got 'macro'"),
            (
                {"VS": None, "A": None},
                None,
                "tag",
                UndefinedMetricError,
                "an accuracy of all seven tags; missing: A, VS",
            ),
            (
                {},
                {"V": 3},
                "sample",
                UndefinedMetricError,
                "a count of all seven tags; missing: A, S, VA, VS, AS, VAS",
            ),
            ({}, {**COUNTS, "AS": 0}, "sample", UndefinedMetricError, "questions of all seven tags; AS has none"),
            ({}, {**COUNTS, "AS": -1}, "sample", ValueError, "The count of AS"),
            ({"VA": math.nan}, COUNTS, "sample", ValueError, "The accuracy of VA must be a finite"),
            ({"VA": -0.1}, COUNTS, "sample", ValueError, "The accuracy of VA must be .* got -0.1"),
            ({"AV": 0.5}, COUNTS, "sample", ValueError, "accuracies hold the tag VA twice"),
            ({"X": 0.5}, COUNTS, "sample", ValueError, "'X' is not a modality tag"),
        ],
    )
    def test_refusals(self, change, counts, weighting, error, message):
        accuracy = {tag: value for tag, value in {**dict.fromkeys(TAGS, 0.5), **change}.items() if value is not None}
        with pytest.raises(error, match=message):
            modality_gap(accuracy, counts, weighting)

    def test_intervals_cover_and_repeat(self):
        rng = np.random.default_rng(5)
        truth = dict(zip(TAGS, (0.3, 0.4, 0.4, 0.6, 0.6, 0.7, 0.9), strict=True))
        expected = modality_gap(truth, dict.fromkeys(TAGS, 60)).uni_tri
        tags = [tag for tag in TAGS for _ in range(60)]
        covered = 0
        for seed in range(100):
            scores = rng.random(len(tags)) < [truth[tag] for tag in tags]
            gap = modality_gap_intervals(scores, tags, resamples=200, seed=seed)["uni_tri"]
            covered += gap.low <= expected <= gap.high
        assert 0.88 <= covered / 100
        assert gap == modality_gap_intervals(scores, tags, resamples=200, seed=99)["uni_tri"]
        assert gap.count == 420

    @pytest.mark.parametrize("weighting", ["sample", "tag"])
    def test_intervals_have_the_weighting_of_their_gap(self, weighting):
        # Without spread within the tags, every resample is the measured gap.
        counts = dict(zip(TAGS, range(2, 9), strict=True))
        accuracy = dict(zip(TAGS, (0.2, 0.4, 0.5, 0.3, 0.6, 0.9, 1.0), strict=True))
        tags = [tag for tag in TAGS for _ in range(counts[tag])]
        gap = modality_gap(accuracy, counts, weighting)
        for name, estimate in modality_gap_intervals([accuracy[tag] for tag in tags], tags, weighting).items():
            assert [estimate.value, estimate.low, estimate.high] == pytest.approx([getattr(gap, name)] * 3)

    def test_intervals_of_a_gap_that_some_resamples_leave_undefined(self):
        tags = [tag for tag in TAGS for _ in range(2)]
        scores = [1 if tag not in ("V", "A", "S") else 0 for tag in tags]
        with pytest.raises(UndefinedMetricError, match="the accuracy of V, A, S"):
            modality_gap_intervals(scores, tags)
        scores[0] = 1
        gaps = modality_gap_intervals([*scores, None], [*tags, "V"])
        assert gaps["uni_bi"].value == pytest.approx(5) and math.isnan(gaps["uni_bi"].low)
        assert (gaps["bi_tri"].low, gaps["bi_tri"].high) == (0, 0)
        with pytest.raises(UndefinedMetricError, match="missing: VAS"):
            modality_gap_intervals(scores[:-2], tags[:-2])


class TestDisparity:
    @given(st.dictionaries(st.sampled_from(TAGS), scores_in_tenths, min_size=1))
    def test_against_the_formula(self, accuracy):
        matrix = tag_disparity(accuracy)
        for (i, first), (j, second) in itertools.product(enumerate(TAGS), repeat=2):
            if first in accuracy and second in accuracy:
                assert matrix[i, j] == abs(accuracy[first] - accuracy[second])
            else:
                assert math.isnan(matrix[i, j])

    def test_refusals(self):
        with pytest.raises(UndefinedMetricError, match="no tag"):
            tag_disparity({"all": 0.5})
        with pytest.raises(ValueError, match="The accuracy of VA must be a finite number, got nan"):
            tag_disparity({"AV": math.nan})


class TestFusionGain:
    @given(st.lists(st.lists(scores_in_tenths, min_size=7, max_size=7), min_size=1, max_size=20))
    def test_against_counting_by_hand(self, rows):
        gain = fusion_gain({tag: [row[i] for row in rows] for i, tag in enumerate(TAGS)})
        assert gain == sum(max(row[3:]) > max(row[:3]) for row in rows) / len(rows)

    def test_the_whole_set_and_bi_modal_inputs_count_alike(self):
        worst = dict.fromkeys(TAGS, [0.2, 0.2])
        for tag in ("VA", "VS", "AS", "VAS"):
            assert fusion_gain({**worst, tag: [0.4, 0.2]}) == 0.5
        for tag in ("V", "A", "S"):
            assert fusion_gain({**worst, tag: [0.4, 0.2]}) == 0

    def test_a_tie_by_rounding_is_no_gain(self):
        one, other = (0.6 + 0.8 + 0.2) / 3, (0.2 + 0.6 + 0.8) / 3
        values = sorted([one, other, math.nextafter(one, 0), math.nextafter(one, 1)])
        scores = {**dict.fromkeys(TAGS, [0.0]), "V": values[:1], "VAS": values[-1:]}
        assert values[-1] > values[0] and fusion_gain(scores) == 0
        assert fused_samples({**scores, "VAS": [one + 1e-6]}).tolist() == [True]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"AS": None}, UndefinedMetricError, "under all seven tags; missing: AS"),
            ({"AS": []}, UndefinedMetricError, "scores of AS are empty"),
            ({"AS": [0.5, math.nan]}, ValueError, "scores of AS: row 1 is nan"),
            ({"AS": [0.5]}, ValueError, "same samples under every tag, got as many as .*'AS': 1"),
        ],
    )
    def test_refusals(self, change, error, message):
        scores = {**dict.fromkeys(TAGS, [0.5, 0.5]), **change}
        with pytest.raises(error, match=message):
            fusion_gain({tag: column for tag, column in scores.items() if column is not None})


def test_training_efficiency():
    measured = training_efficiency([2.0, 4.0], batch_size=8)
    assert (measured.seconds_per_step, measured.seconds_per_sample, measured.steps) == (3.0, 0.375, 2)
    with pytest.raises(UndefinedMetricError, match="step_seconds are empty"):
        training_efficiency([], 8)
    with pytest.raises(ValueError, match="step_seconds: row 1 is 0.0"):
        training_efficiency([1.0, 0.0], 8)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        training_efficiency([1.0], 0)


class TestEmbeddingSpread:
    @given(st.lists(st.sampled_from(TAGS), min_size=1, max_size=15), st.integers(0, 1000))
    def test_against_all_pairs(self, tags, seed):
        vectors = np.random.default_rng(seed).normal(size=(len(tags), 4))
        spread = embedding_spread(vectors, tags)

        def distance(i, j):
            return 1 - vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])

        within, between = [], []
        for (a, first), (b, second) in itertools.product(enumerate(TAGS), repeat=2):
            pairs = [
                distance(i, j)
                for i, j in itertools.permutations(range(len(tags)), 2)
                if tags[i] == first and tags[j] == second
            ]
            assert spread.distances[a, b] == pytest.approx(np.mean(pairs) if pairs else math.nan, nan_ok=True)
            if pairs and a <= b:
                (within if a == b else between).append(np.mean(pairs))
        assert spread.dispersion == pytest.approx(np.mean(within) if within else math.nan, nan_ok=True)
        assert spread.separation == pytest.approx(np.mean(between) if between else math.nan, nan_ok=True)
        assert spread.counts == {tag: tags.count(tag) for tag in TAGS if tag in tags}

    def test_collapsed_captions_against_separate_ones(self):
        same = embedding_spread([[1.0, 0], [2.0, 0], [3.0, 0], [1.0, 0]], ["V", "V", "A", "A"])
        assert (same.dispersion, same.separation) == (0, 0)
        apart = embedding_spread([[1.0, 0], [2.0, 0], [0, 3.0], [0, 1.0]], ["V", "V", "A", "A"])
        assert (apart.dispersion, apart.separation) == (0, 1)
        varied = embedding_spread([[1.0, 0], [0, 1.0], [1.0, 0], [0, 1.0]], ["V", "V", "A", "A"])
        assert (varied.dispersion, varied.separation) == (1, 0.5)

    @pytest.mark.parametrize(
        ("vectors", "tags", "error", "message"),
        [
            ([], [], UndefinedMetricError, "no caption"),
            ([[1.0], [0.0]], ["V", "A"], UndefinedMetricError, "row 1 has length 0"),
            ([[1.0], [math.nan]], ["V", "A"], ValueError, "row 1 holds a number that is not finite"),
            ([[1.0], [1.0]], ["V"], ValueError, r"must have shape \(1, D\), a row for each tag, got \(2, 1\)"),
            ([[1.0], [1.0]], ["V", None], ValueError, "tags: row 1 has no tag"),
        ],
    )
    def test_refusals(self, vectors, tags, error, message):
        with pytest.raises(error, match=message):
            embedding_spread(vectors, tags)


class TestClipSpread:
    @given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(TAGS)), max_size=12), st.integers(0, 1000))
    def test_against_all_pairs(self, captions, seed):
        captions = [("a", "V"), ("a", "A"), *captions]
        clips, tags = zip(*captions, strict=True)
        vectors = np.random.default_rng(seed).normal(size=(len(tags), 4))
        spread = clip_spread(vectors, clips, tags)
        within, between, everything = {}, {}, []
        for i, j in itertools.combinations(range(len(tags)), 2):
            distance = 1 - vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
            if clips[i] != clips[j]:
                between.setdefault(frozenset((clips[i], clips[j])), []).append(distance)
            elif tags[i] != tags[j]:
                within.setdefault(clips[i], []).append(distance)
                everything.append(distance)
        assert sorted(spread.distances) == pytest.approx(sorted(everything)) and spread.clips == len(within)
        assert spread.dispersion == pytest.approx(np.mean([np.mean(found) for found in within.values()]))
        expected = np.mean([np.mean(found) for found in between.values()]) if between else math.nan
        assert spread.separation == pytest.approx(expected, nan_ok=True)

    def test_captions_that_ignore_what_is_fed(self):
        """The groups of the other definition are the tags: what is far there is near here."""
        vectors, clips, tags = [[1.0, 0], [2.0, 0], [0, 1.0], [0, 3.0]], ["a", "a", "b", "b"], ["V", "A", "V", "A"]
        spread = clip_spread(vectors, clips, tags)
        assert (spread.dispersion, spread.separation, spread.clips) == (0, 1, 2)
        assert embedding_spread(vectors, tags).dispersion == 1

    def test_refusals(self):
        with pytest.raises(UndefinedMetricError, match="No clip has captions of two tags or more"):
            clip_spread([[1.0], [2.0]], ["a", "b"], ["V", "A"])
        with pytest.raises(ValueError, match="clips must name one for each of the 2 captions, got 1"):
            clip_spread([[1.0], [2.0]], ["a"], ["V", "A"])
        with pytest.raises(UndefinedMetricError, match="row 1 has length 0"):
            clip_spread([[1.0], [0.0]], ["a", "a"], ["V", "A"])


class TestCompareRuns:
    @given(st.integers(0, 40), st.integers(0, 40))
    def test_mcnemar_equals_the_binomial_sum(self, first_only, second_only):
        m = first_only + second_only
        tail = sum(Fraction(math.comb(m, i), 2**m) for i in range(min(first_only, second_only) + 1))
        assert mcnemar_exact(first_only, second_only) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)

    @given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 5))
    def test_on_right_or_wrong_scores_both_tests_are_the_same(self, better, worse, same):
        first = [0] * better + [1] * worse + [1] * (same + 1)
        second = [1] * better + [0] * worse + [1] * (same + 1)
        exact = compare_runs(first, second, resamples=10)
        flipped = compare_runs(first, second, test="permutation", resamples=10)
        assert exact.test == "mcnemar" and flipped.test == "permutation" and flipped.exact
        assert exact.p_value == pytest.approx(flipped.p_value, abs=1e-12)
        assert (exact.better, exact.worse, exact.count) == (better, worse, better + worse + same + 1)

    @given(st.lists(st.tuples(scores_in_tenths, scores_in_tenths), min_size=1, max_size=8))
    def test_permutation_equals_all_exchanges(self, pairs):
        first, second = zip(*pairs, strict=True)
        observed = abs(sum(round(10 * b) - round(10 * a) for a, b in pairs))
        exchanges = itertools.product([1, -1], repeat=len(pairs))
        sums = [
            abs(sum(s * (round(10 * b) - round(10 * a)) for s, (a, b) in zip(signs, pairs, strict=True)))
            for signs in exchanges
        ]
        expected = sum(value >= observed for value in sums) / len(sums)
        compared = compare_runs(first, second, test="permutation", resamples=10)
        assert compared.p_value == pytest.approx(expected, abs=1e-12)
        assert compared.difference == pytest.approx(np.mean(second) - np.mean(first))

    def test_random_signs_come_near_the_exact_value(self):
        first, second = [0] * 30 + [1] * 15, [1] * 30 + [0] * 15
        sampled = compare_runs(first, second, test="permutation")
        assert not sampled.exact
        assert sampled.p_value == pytest.approx(mcnemar_exact(15, 30), abs=0.006)
        assert sampled == compare_runs(first, second, test="permutation")
        # Random signs never reach the observed ones here; the observed ones count as one of them.
        assert compare_runs([0] * 40, [1] * 40, test="permutation", resamples=99).p_value == 1 / 100

    def test_rejects_as_often_as_it_says_where_runs_do_not_differ(self):
        rng = np.random.default_rng(11)
        p_values = [
            compare_runs(*rng.integers(0, 6, size=(2, 40)) / 5, resamples=200, seed=seed).p_value
            for seed in range(300)
        ]
        assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09
        better = [
            compare_runs(rng.random(40) * 0.8, rng.random(40) * 0.8 + 0.2, resamples=200, seed=seed).p_value
            for seed in range(50)
        ]
        assert np.mean(np.array(better) <= 0.05) > 0.9

    def test_interval_and_its_strata(self):
        first, second, tags = [0.0] * 40, [0.0] * 20 + [1.0] * 20, ["V"] * 20 + ["A"] * 20
        pooled = compare_runs(first, second)
        assert pooled.low < pooled.difference == 0.5 < pooled.high
        assert pooled.p_value < 1e-4
        assert (compare_runs(first, second, tags).low, compare_runs(first, second, tags).high) == (0.5, 0.5)
        back = compare_runs(second, first)
        assert (back.difference, back.p_value, back.better, back.worse) == (-0.5, pooled.p_value, 0, 20)

    def test_pairing_matters(self):
        rng = np.random.default_rng(2)
        easy = rng.random(200)
        run, other = easy, np.clip(easy + 0.02, 0, 1)
        assert compare_runs(run, other).p_value < 0.001
        assert compare_runs(run, rng.permutation(other)).p_value > 0.05

    def test_no_difference(self):
        compared = compare_runs([0.1 + 0.2, 1.0], [0.3, 1.0])
        assert (compared.better, compared.worse, compared.p_value, compared.difference) == (0, 0, 1.0, 0.0)

    @pytest.mark.parametrize(
        ("first", "second", "test", "message"),
        [
            ([], [], "auto", "first run are empty"),
            ([1], [1, 0], "auto", "the first has 1, the second 2"),
            ([1, 0], [1, math.nan], "auto", "second run: row 1 is nan"),
            ([1, 0.4], [1, 1], "mcnemar", 'row 1 has 0.4 and 1.0. Use test="permutation"'),
            ([1], [1], "t", "test must be one of auto, mcnemar, permutation, got 't'"),
        ],
    )
    def test_refusals(self, first, second, test, message):
        with pytest.raises(ValueError, match=message):
            compare_runs(first, second, test=test)
        with pytest.raises(ValueError, match="0 or more, got -1"):
            mcnemar_exact(-1, 2)

    def test_runs_are_aligned_by_name(self):
        names, first, second = align_runs({"a": 1, "b": 0}, {"b": 1, "a": 0.5})
        assert (names, first.tolist(), second.tolist()) == (["a", "b"], [1, 0], [0.5, 1])
        with pytest.raises(ValueError, match="the second run lacks 7: 0, 1, 2, 3, 4, ..."):
            align_runs({str(i): 1 for i in range(8)}, {"7": 1})
        with pytest.raises(ValueError, match="the first run lacks 1: z"):
            align_runs({"a": 1}, {"a": 1, "z": 0})


@pytest.mark.long
def test_ten_thousand_questions():
    rng = np.random.default_rng(0)
    tags = rng.choice(TAGS, 10_000).tolist()
    scores = pass_at_k(5, rng.integers(0, 6, 10_000), 1)
    measured = tag_accuracies(scores, tags)
    gaps = modality_gap_intervals(scores, tags)
    assert gaps["mean"].value == pytest.approx(modality_gap(measured.accuracy, measured.counts).mean)
    assert measured.sample_mean.high - measured.sample_mean.low == pytest.approx(
        2 * 1.96 * scores.std() / 100, rel=0.1
    )
    assert compare_runs(scores, rng.permutation(scores), tags).count == 10_000
