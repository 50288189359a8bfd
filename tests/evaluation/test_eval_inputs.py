"""Questions that are asked with several inputs: the two-stage mean, accuracies by required tag, captions of one clip."""

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.evaluation import evaluation_results, superset_scores
from maple_trl.modalities import ModalityTag
from maple_trl.records.evaluations import LINES


TAGS = [str(tag) for tag in ModalityTag]


def lines_of(asked):
    """Lines of dicts with `tag`, `fed`, `score` (or several, or none) and what else differs from a line of its own."""
    zeros = {name: 0 for name in LINES.names if name.endswith("_tokens")}
    lines = []
    for number, row in enumerate(asked):
        scores = row.get("score")
        own = {
            "row": number,
            "id": str(number),
            "access": "required",
            "notes": [],
            "status": "scored",
            "finish": "end",
        }
        own |= {name: value for name, value in row.items() if name != "score"}
        if scores is None:
            lines.append(own | {"status": "error", "reason": "unreadable", "finish": None})
            continue
        scores = scores if isinstance(scores, list) else [scores]
        extra = own.pop("extra", [None] * len(scores))
        lines += [own | zeros | {"sample": i, "score": score, "extra": extra[i]} for i, score in enumerate(scores)]
    return pa.Table.from_pylist([{"question": line["id"]} | line for line in lines], LINES)


def results(asked, accesses=("required",), samples=1):
    found = evaluation_results(lines_of(asked), list(accesses), samples)
    json.dumps(found, allow_nan=False)
    return found


def over_accesses(rows):
    """Lines of `(tag, {fed: score})`, asked under an access for each input."""
    return [
        {"row": row, "id": f"q{row}", "question": f"q{row}", "tag": tag, "fed": fed, "access": fed, "score": score}
        for row, (tag, scores) in enumerate(rows)
        for fed, score in scores.items()
    ]


def test_of_a_question_over_the_inputs_that_hold_its_tag_then_of_the_tags():
    rows = [
        ("V", {"V": 1.0, "A": 0.0, "VA": 0.5, "VAS": 0.0}),  # 1.5 / 3
        ("V", {"V": 1.0}),  # 1
        ("AS", {"AS": 0.2, "VAS": 0.6, "V": 1.0}),  # 0.4
    ]
    found = results(over_accesses(rows), TAGS)
    macro = found["superset_macro"]
    assert macro["value"] == pytest.approx(((0.5 + 1) / 2 + 0.4) / 2)
    assert macro["per_tag"]["V"]["value"] == pytest.approx(0.75) and macro["per_tag"]["V"]["count"] == 2
    assert (macro["count"], macro["inputs"], macro["left_out"]) == (3, {"1": 1, "2": 1, "3": 1}, 0)
    assert macro["missing_tags"] == ["A", "S", "VA", "VS", "VAS"]
    inputs = found["over_inputs"]
    assert inputs["per_tag"]["V"]["value"] == pytest.approx((1 + 0 + 0.5 + 0 + 1) / 5)
    assert inputs["per_tag"]["AS"]["value"] == pytest.approx((0.2 + 0.6 + 1) / 3)
    assert inputs["sample_mean"]["value"] == pytest.approx((2.5 + 1.8) / 8)
    means = {"exact": (2.2 / 3, 3), "superset": (1.1 / 3, 3), "deficit": (0.5, 2)}
    for stratum, own in found["strata"].items():
        assert (own["sample_mean"]["value"], own["sample_mean"]["count"]) == pytest.approx(means.pop(stratum))
    assert not means and found["strata"]["deficit"]["per_tag"]["AS"]["value"] == 1.0
    # By access, a tag is what the questions require and not what they were fed.
    assert found["accesses"]["VAS"]["accuracy"]["per_tag"]["V"]["value"] == 0.0
    assert found["accesses"]["V"]["accuracy"]["per_tag"]["AS"]["value"] == 1.0


def naive(rows):
    by_tag = {}
    for tag, scores in rows:
        holding = [score for fed, score in scores.items() if all(letter in fed for letter in tag)]
        if holding:
            by_tag.setdefault(tag, []).append(sum(holding) / len(holding))
    means = [sum(values) / len(values) for values in by_tag.values()]
    return sum(means) / len(means) if means else None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(TAGS),
            st.dictionaries(st.sampled_from(TAGS), st.integers(0, 5).map(lambda i: i / 5), min_size=1),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_against_the_two_means_written_out(rows):
    macro = results(over_accesses(rows), TAGS)["superset_macro"]
    expected = naive(rows)
    if expected is None:
        assert "No question with a tag was scored with an input that contains it" in macro["undefined"]
    else:
        assert macro["value"] == pytest.approx(expected)
        assert sum(macro["inputs"].values()) + macro["left_out"] == len(rows)


def test_scores_with_the_inputs_that_contain_the_tag():
    found = superset_scores([1, 0, 0.5, 1, 0], list("qqqqr"), ["v"] * 4 + ["AS"], ["V", "A", "av", "VA", "V"])
    assert found == {"q": [1.0, 0.75], "r": []}
    with pytest.raises(ValueError, match="row 1: question .q. must have one tag, got .V. and .A."):
        superset_scores([1, 0], ["q", "q"], ["V", "A"], ["V", "V"])
    with pytest.raises(ValueError, match="tags: row 0: 'X' is not a modality tag"):
        superset_scores([1], ["q"], ["V"], ["X"])


def test_asked_with_its_own_signals_alone_it_is_the_mean_of_tags():
    rows = [{"tag": tag, "fed": tag, "score": score} for tag, score in (("V", 1.0), ("V", 0.0), ("VA", 1.0))]
    found = results(rows)
    assert found["superset_macro"]["value"] == found["accesses"]["required"]["accuracy"]["tag_mean"]["value"] == 0.75
    assert "several inputs" in found["over_inputs"]["undefined"] and "several strata" in found["strata"]["undefined"]


def test_the_same_input_under_two_accesses_counts_once():
    row = {"row": 0, "id": "q", "question": "q", "tag": "V"}
    asked = [
        row | {"fed": "V", "access": "required", "score": 0.0},
        row | {"fed": "VAS", "access": "all", "score": 1.0},
        row | {"fed": "VAS", "access": "VAS", "score": 1.0},
        row | {"fed": "V", "access": "V", "score": 0.0},
    ]
    macro = results(asked, ["required", "all", "VAS", "V"])["superset_macro"]
    assert macro["value"] == 0.5 and macro["inputs"] == {"2": 1}


def test_rows_of_one_question_with_an_input_each():
    """As MAPLE-QA+ lists them: `tag` is what is required, `fed` the row's input, `question` joins the rows."""
    asked = [
        {"question": "q0", "tag": "V", "fed": "V", "score": [1.0, 0.0]},
        {"question": "q0", "tag": "V", "fed": "VA", "score": [1.0, 1.0]},
        {"question": "q0", "tag": "V", "fed": "A", "score": [0.0, 0.0]},
        {"question": "q1", "tag": "A", "fed": "A", "score": [0.0, 0.0]},
        {"question": "q1", "tag": "A", "fed": "VA", "score": None},
    ]
    found = results(asked, samples=2)
    assert found["superset_macro"]["value"] == pytest.approx((0.75 + 0) / 2)
    assert found["superset_macro"]["inputs"] == {"1": 1, "2": 1}
    assert found["accesses"]["required"]["accuracy"]["per_tag"]["V"]["value"] == pytest.approx(0.5)
    assert found["over_inputs"]["per_tag"]["V"]["value"] == pytest.approx(0.5)


def test_one_question_is_no_clip_for_itself_over_its_inputs():
    """Without a clip, inputs of a question still share their fate: the interval rests on two questions, not on six."""
    rows = [("V", {"V": 1.0, "VA": 1.0, "VAS": 1.0}), ("V", {"V": 0.0, "VA": 0.0, "VAS": 0.0})]
    found = results(over_accesses(rows), TAGS)["over_inputs"]["sample_mean"]
    assert (found["count"], found["clips"]) == (6, 2) and found["high"] - found["low"] > 0.9


def test_intervals_say_on_how_many_clips_and_questions_they_rest():
    asked = [
        {"tag": tag, "fed": tag, "clip": clip, "category": "c", "score": score}
        for tag, clip, score in (("V", "a", 1.0), ("V", "a", 1.0), ("V", "b", 0.0), ("VA", "b", 0.0), ("VA", "c", 1.0))
    ]
    found = results(asked)
    accuracy = found["accesses"]["required"]["accuracy"]
    for estimate, clips, count in (
        (accuracy["sample_mean"], 3, 5),
        (accuracy["tag_mean"], 3, 5),
        (accuracy["per_tag"]["V"], 2, 3),
        (accuracy["per_category"]["c"], 3, 5),
        (found["accesses"]["required"]["pass_at_k"]["1"], 3, 5),
        (found["superset_macro"], 3, 5),
    ):
        assert (estimate["clips"], estimate["count"]) == (clips, count)
        assert estimate["low"] < estimate["value"] < estimate["high"]
    # Without clips, by question as before.
    bare = results([{**row, "clip": None} for row in asked])["accesses"]["required"]["accuracy"]["sample_mean"]
    assert bare["clips"] is None and bare["count"] == 5 and bare["low"] != accuracy["sample_mean"]["low"]


def captions(clips, score):
    return [
        {
            "tag": tag,
            "fed": tag,
            "clip": clip,
            "prompt": f"user: {'[video] ' * ('V' in tag)}Describe it.",
            "score": score(clip, tag),
        }
        for clip in clips
        for tag in TAGS
    ]


def test_captions_of_a_clip_are_its_seven_inputs():
    gains = {"a": True, "b": False, "c": True}
    asked = captions("abc", lambda clip, tag: 0.5 + 0.1 * (gains[clip] and len(tag) > 1))
    gain = results(asked)["fusion_gain"]
    assert (gain["value"], gain["count"], gain["clips"], gain["left_out"]) == (pytest.approx(2 / 3), 3, 3, 0)
    # A clip without one of its references is left out.
    less = [row for row in asked if (row["clip"], row["tag"]) != ("b", "VS")]
    gain = results(less)["fusion_gain"]
    assert (gain["value"], gain["count"], gain["left_out"]) == (1.0, 2, 1)
    # Prompts may differ by tag; what has a solution is a question, and different ones are no inputs of one.
    different = [row | {"prompt": f"user: Question {i}?"} for i, row in enumerate(asked)]
    assert results(different)["fusion_gain"]["value"] == pytest.approx(2 / 3)
    questions = [row | {"solution": "B"} for row in different]
    assert "not asked: V, A, S, VA" in results(questions)["fusion_gain"]["undefined"]
    # Two captions of each input are told apart by what was asked, where the prompts say so.
    twice = [row | {"prompt": f"user: {how}."} for row in asked for how in ("Shortly", "At length")]
    gain = results(twice)["fusion_gain"]
    assert (gain["value"], gain["count"], gain["clips"]) == (pytest.approx(2 / 3), 6, 3)


def test_captions_of_a_clip_are_one_under_every_access():
    """The rows of a clip are the same seven captions, asked again: their mean counts once for the clip."""
    asked = [
        {"row": row, "id": f"{clip}{own}", "tag": own, "fed": fed, "access": fed, "clip": clip, "score": score}
        for row, (clip, own) in enumerate((clip, own) for clip in "ab" for own in TAGS)
        for fed in TAGS
        for score in [0.5 + 0.3 * (fed == "VA" and clip == "a" and own != "V") - 0.1 * (len(fed) > 1 and clip == "b")]
    ]
    gain = results(asked, TAGS)["fusion_gain"]
    assert (gain["value"], gain["count"], gain["clips"]) == (0.5, 2, 2)
    # Negative control: with solutions they are fourteen questions, of which one of the first clip gains nothing.
    gain = results([row | {"solution": "B"} for row in asked], TAGS)["fusion_gain"]
    assert (gain["value"], gain["count"]) == (pytest.approx(6 / 14), 14)


def test_strata_by_required_tag():
    """As MAPLE-QA+ lists its rows: each with the question's input, beside what it requires."""
    asked = [
        {"question": q, "tag": tag, "fed": fed, "clip": q, "score": score}
        for q, tag, fed, score in (
            ("q0", "V", "V", 1.0),
            ("q0", "V", "VA", 0.5),
            ("q0", "V", "VAS", 0.0),
            ("q0", "V", "A", 0.0),
            ("q1", "VA", "VA", 0.5),
            ("q1", "VA", "V", 1.0),
        )
    ]
    found = results(asked)
    strata = found["strata"]
    assert list(strata) == ["exact", "superset", "deficit"]
    means = {name: own["sample_mean"]["value"] for name, own in strata.items()}
    assert means == pytest.approx({"exact": 0.75, "superset": 0.25, "deficit": 0.5})
    assert strata["deficit"]["per_tag"]["VA"]["value"] == 1.0 and strata["exact"]["sample_mean"]["clips"] == 2
    # Table 4: by required tag over all inputs, and over all rows.
    assert found["over_inputs"]["per_tag"]["V"]["value"] == pytest.approx(1.5 / 4)
    assert found["over_inputs"]["per_tag"]["VA"]["value"] == pytest.approx(0.75)
    assert found["over_inputs"]["sample_mean"]["value"] == pytest.approx(3.0 / 6)
    assert found["superset_macro"]["value"] == pytest.approx((0.5 + 0.5) / 2)
    alone = [row for row in asked if row["fed"] == row["tag"]]
    assert "inputs of several strata" in results(alone)["strata"]["undefined"]


def test_lines_of_an_earlier_version():
    table = lines_of([{"tag": "V", "fed": "V", "clip": "a", "score": 1.0}]).drop_columns(["fed", "clip", "question"])
    found = evaluation_results(table, ["required"], 1)
    assert found["superset_macro"]["value"] == 1.0
    assert found["accesses"]["required"]["accuracy"]["sample_mean"]["clips"] is None
