"""QA+: what every row must be, against a checker of its own; faults that it finds; sizes, draws, refusals, files."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from qa_sets import TAGS, faults, question, questions, table

from maple_trl import cli
from maple_trl.data import qa_plus
from maple_trl.data.none_answers import NONE_ANSWERS, plain_option, says_none, speaks_of_others
from maple_trl.data.qa_items import Files
from maple_trl.data.qa_plus import Plan, QAPlusError, QAPlusOptions, build_qa_plus
from maple_trl.data.shards import ShardError, hold_split, write_shards
from maple_trl.data.validation import table_files, validate_tables
from maple_trl.modalities import ModalityTag


ROOT = Path(__file__).resolve().parents[2]


def made_of(rows, **options):
    """The rows that are made, and the plan."""
    plan = Plan(rows if isinstance(rows, Dataset) else table(rows), QAPlusOptions(**options))
    return [row for part in plan.tables() for row in part.to_pylist()], plan


# What holds of every set


names = st.text("abc\n é😀-", min_size=1, max_size=6)
texts = st.sampled_from(
    ["red", "green", "a car", "Ein Haus", "10", "1.0", "né", "two dogs", "{braces}", "x\ny", "B. x"]
)


@st.composite
def sets(draw):
    rows = []
    for name in draw(st.lists(names, min_size=1, max_size=12, unique=True)):
        options = draw(st.lists(texts, min_size=2, max_size=6, unique=True))
        has = {
            "video": draw(st.sampled_from(["a.mp4", None])),
            "subtitle": draw(st.sampled_from(["a.srt", "Hello!", None])),
        }
        has["audio"] = draw(st.sampled_from(["a.wav", None]))
        right = draw(st.integers(0, len(options) - 1))
        rows.append(question(name, draw(st.sampled_from(TAGS)), options, right, **has))
    return rows


def fed(row):
    heard = row["audio"] or row["video"]
    return {letter for letter, has in zip("VAS", (row["video"], heard, row["subtitle"]), strict=True) if has}


@given(
    sets(), st.sampled_from([0, 0.25, 0.5, 1]), st.sampled_from(["right", "wrong"]), st.integers(0, 3), st.booleans()
)
def test_every_row_is_what_its_stratum_says(rows, share, replace, seed, evaluation):
    options = {"none_share": share, "replace": replace, "seed": seed, "evaluation": evaluation}
    possible = [(row["id"], tag) for row in rows for tag in TAGS if set(tag) <= fed(row)]
    if not possible:
        with pytest.raises(QAPlusError, match="no row can be made of"):
            made_of(rows, **options)
        return
    made, plan = made_of(rows, **options)
    assert faults(made, rows, share, replace) == []
    got = [(row["question_id"], row["tag"]) for row in made]
    assert set(got) <= set(possible)
    if evaluation:
        assert sorted(got) == sorted(possible)
    else:  # one of each question that allows it
        tag_of = {row["id"]: ModalityTag(row["tag"]) for row in rows}
        allowed = {(name, tag_of[name].stratum_of(ModalityTag(tag))) for name, tag in possible}
        assert sorted((row["question_id"], row["stratum"]) for row in made) == sorted(allowed)
    assert plan.summary.total == len(made) and plan.summary.questions == len(rows)
    assert plan.summary.replaced == {
        stratum: sum(row["stratum"] == stratum and row["replaced"] is not None for row in made)
        for stratum in qa_plus.STRATA
    }
    # The order of rows decides nothing but the order of what comes out.
    mixed = random.Random(seed).sample(rows, len(rows))
    assert sorted(map(str, made_of(mixed, **options)[0])) == sorted(map(str, made))


@pytest.mark.slow
def test_a_quarter_of_many_rows_and_another_seed():
    rows = questions(4000)
    made, _ = made_of(rows)
    assert faults(made, rows) == []
    for stratum in ("exact", "superset"):
        own = [row for row in made if row["stratum"] == stratum]
        right = [row for row in own if row["options"]["ABCD".index(row["answer"])] in NONE_ANSWERS]
        assert abs(len(right) / len(own) - 0.25) <= 0.01
        by_tag = Counter(row["required_tag"] for row in own if row["replaced"])
        assert all(0.2 < by_tag[tag] / sum(row["required_tag"] == tag for row in own) < 0.3 for tag in ("VA", "VS"))
    said = Counter(text for row in made for text in row["options"] if text in NONE_ANSWERS)
    assert len(said) == 100 and max(said.values()) < 3 * min(said.values())
    inputs = Counter(row["tag"] for row in made if row["stratum"] == "deficit" and row["required_tag"] == "VAS")
    assert set(inputs) == set(TAGS) - {"VAS"} and max(inputs.values()) < 2 * min(inputs.values())
    other, _ = made_of(rows, seed=1)
    assert faults(other, rows) == []
    drawn = [{row["id"]: row["options"] for row in found} for found in (made, other)]
    assert drawn[0].keys() != drawn[1].keys()
    both = drawn[0].keys() & drawn[1].keys()
    assert sum(drawn[0][name] != drawn[1][name] for name in both) > 0.3 * len(both)


def test_a_row_more_changes_little():
    """What becomes of a question is drawn by its id: others move only where sizes and shares have to be kept."""
    rows = questions(1000)
    made = {row["id"]: row["options"] for row in made_of(rows)[0]}
    more = {row["id"]: row["options"] for row in made_of([question("new", "V"), *rows])[0]}
    assert sum(more.get(name) != options for name, options in made.items()) <= 2


# Faults that the checker finds


def coins(plan):
    draw = np.random.default_rng(0)
    return plan._chosen & ((plan._strata == 2) | (draw.random(plan._chosen.shape) < 0.25))


FAULTS = {
    "share": ("Plan._replace", coins),
    "true answer": (
        "_with_none",
        lambda options, right, *_: [*options[:-1], NONE_ANSWERS[0]] if right < 3 else options,
    ),
    "options": ("_with_none", lambda options, *_: ["none"] * len(options)),
    "prompt": ("replace_options", lambda prompt, *_: prompt),
    "stratum": ("_BITS", np.array([1, 2, 4, 3, 5, 6, 3], np.uint8)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    place, instead = FAULTS[fault]
    owner = qa_plus
    *above, name = place.split(".")
    for part in above:
        owner = getattr(owner, part)
    rows = questions(300)
    assert faults(made_of(rows)[0], rows) == []
    monkeypatch.setattr(owner, name, instead)
    assert fault in faults(made_of(rows)[0], rows)


def test_a_draw_by_place_is_found(monkeypatch):
    rows = questions(60)
    usual = sorted(map(str, made_of(rows)[0]))
    assert sorted(map(str, made_of(rows[::-1])[0])) == usual
    count, keys = iter(range(10_000)), qa_plus._keys
    monkeypatch.setattr(qa_plus, "_keys", lambda seed, use, name: keys(seed, use, str(next(count))))
    one = sorted(map(str, made_of(rows)[0]))
    assert sorted(map(str, made_of(rows[::-1])[0])) != one


# Sizes


def test_sizes_are_kept_and_second_inputs_come_after_all_first_ones():
    rows = questions(200)
    made, plan = made_of(rows, exact=150, superset=20, deficit=500)
    assert Counter(row["stratum"] for row in made) == {"exact": 150, "superset": 20, "deficit": 500}
    assert faults(made, rows) == []
    per_question = Counter(row["question_id"] for row in made if row["stratum"] == "deficit")
    assert len(per_question) == 200 and set(per_question.values()) >= {2, 3}
    assert plan.summary.rows["superset"].keys() <= {"VA", "VS", "AS", "VAS"}
    only, _ = made_of(rows, exact=0, superset=0)
    assert {row["stratum"] for row in only} == {"deficit"}


def test_questions_with_more_inputs_are_not_preferred():
    """A question of VAS has six deficient inputs, one of V has three; half of them are taken, of each the same share."""
    rows = [question(f"q{i}", "VAS" if i % 2 else "V") for i in range(2000)]
    made, _ = made_of(rows, exact=0, superset=0, deficit=1000)
    assert abs(sum(row["required_tag"] == "VAS" for row in made) - 500) < 60


@pytest.mark.slow
@pytest.mark.parametrize("part", [10, pytest.param(1, marks=pytest.mark.long)])
def test_published_sizes(part):
    """Of 47 893 questions 47 893 + 31 635 + 23 737 rows (B.2), a quarter of each replaced; of 4 864 questions 34 048."""
    sizes = {"exact": 47_893 // part, "superset": 31_635 // part, "deficit": 23_737 // part}
    rows, total = table(questions(sizes["exact"])), sum(sizes.values())
    plan = Plan(rows, QAPlusOptions(**sizes))
    assert {stratum: sum(by_tag.values()) for stratum, by_tag in plan.summary.rows.items()} == sizes
    assert plan.summary.total == sum(map(len, plan.tables())) == total and (part > 1 or total == 103_265)
    quarters = {stratum: round(sizes[stratum] / 4) for stratum in ("exact", "superset")}
    assert plan.summary.replaced == quarters | {"deficit": sizes["deficit"]}
    some = rows.select(range(4864 // part))
    made, _ = made_of(some, evaluation=True)
    assert len(made) == 7 * len(some) and set(Counter(row["question_id"] for row in made).values()) == {7}
    assert faults(made, some) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"superset": 10_000}, "superset: 10000 rows are asked for, and .* can be made of 40 questions"),
        ({"exact": -1}, "exact must be 0 or more rows"),
        ({"evaluation": True, "exact": 3}, "for evaluation every question has all inputs"),
        ({"none_share": 1.5}, "none_share must be a share in"),
        ({"replace": "both"}, "replace must be 'right' or 'wrong'"),
        ({"prompt_style": "loud"}, "there is no prompt style 'loud'; the styles are think, .* and 'keep'"),
        ({"exact": 0, "superset": 0, "deficit": 0}, "no row can be made of 40 questions"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(QAPlusError, match=message):
        made_of(questions(40), **options)


# Rows that cannot take part


def test_rows_that_are_no_questions_are_counted_and_named():
    caption = question("caption", options=(), question=None, reference="A red car.")
    rows = [
        question("good"),
        caption | {"options": None},
        question("open") | {"options": None, "answer": "a red car", "solution": "a red car"},
        question("several") | {"answer": "A,C", "solution": "A,C"},
        question("beyond") | {"answer": "E", "solution": "E"},
        question("gap") | {"options": ["red", None, "blue"]},
        question("done") | {"required_tag": "V", "stratum": "superset"},
        question("shown") | {"prompt": [{"role": "user", "content": "What is seen?"}]},
        question("silent") | {"prompt": [{"role": "system", "content": "Be good."}]},
        question("") | {"id": None},
        question("odd") | {"tag": "XY"},
    ]
    noted = []
    plan = Plan(table(rows), QAPlusOptions(), None, lambda *found: noted.append(found))
    assert {reason: found["ids"] for reason, found in plan.summary.left_out.items()} == {
        "caption": ["caption"],
        "open question": ["open"],
        "no answer": ["several", "beyond"],
        "bad options": ["gap"],
        "not exact": ["done"],
        "prompt without options": ["shown"],
        "no prompt": ["silent"],
        "no id": [None],
        "no tag": ["odd"],
    }
    assert plan.summary.read == len(rows) and plan.summary.questions == 1
    assert [place for place, *_ in noted] == list(range(1, len(rows)))
    assert "'XY' is not a modality tag" in noted[-1][3]
    with pytest.raises(
        QAPlusError,
        match="none of 10 rows is a question with options: 1 caption .the first, 'caption': it has field 'reference'",
    ):
        made_of(rows[1:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solution": "green"}, "field 'solution' must be the letter of an option .A, B, C, D., but is 'green'"),
        ({"solution": "C"}, "field 'solution' is 'C', but must mean the same option as 'answer', 'B'"),
        ({"answer": "green"}, "field 'answer' must be the letter of an option"),
        ({"answer": None, "solution": None}, "field 'answer' must be the letter of an option"),
    ],
)
def test_a_solution_that_would_not_follow_the_replaced_option(fields, message):
    """Of a deficit row the right answer would score 0: rewards read the solution, which is not written anew."""
    noted = []
    rows = [question("good"), question("bad") | fields]
    plan = Plan(table(rows), QAPlusOptions(), None, lambda *found: noted.append(found))
    assert plan.summary.left_out == {"no answer": {"count": 1, "ids": ["bad"]}}
    assert re.match(message, noted[0][3])


def test_a_solution_alone_or_in_another_form_of_the_letter():
    rows = [question("one") | {"answer": None}, question("two") | {"solution": "(B)"}, question("three", solution="")]
    assert made_of(rows)[1].summary.left_out == {}


def test_media_outside_the_root_are_not_there(tmp_path):
    """Training reads below the root alone."""
    root = tmp_path / "root"
    root.mkdir()
    for path in (root / "in.mp4", tmp_path / "out.mp4"):
        path.touch()
    (root / "link.mp4").symlink_to(tmp_path / "out.mp4")
    files = Files(root)
    assert files("in.mp4") and files(["in.mp4"]) and files("../root/in.mp4")
    for path in ("../out.mp4", str(tmp_path / "out.mp4"), "link.mp4", "in.mp4\0", "x" * 5000, ".", "absent.mp4"):
        assert not files(path) and not files(["in.mp4", path]), path
    assert Files(None)("../out.mp4")  # nobody looks


def test_what_a_question_requires_comes_before_what_it_is_fed():
    rows, plan = made_of([question("seen", "VA", required_tag="V")], none_share=0)
    strata = [(row["required_tag"], row["tag"], row["stratum"]) for row in rows]
    assert ("V", "V", "exact") in strata and Counter(required for required, *_ in strata) == {"V": 3}
    assert plan.summary.left_out == {}


@pytest.mark.parametrize("replace", ["right", "wrong"])
def test_what_was_written_for_the_old_options_goes_with_them(replace):
    said = "<think>The other three are wrong.</think><answer>B</answer>"
    told = [{"role": "assistant", "content": said}]
    source = Dataset.from_list([question(f"q{i}", "V", completion=told) for i in range(4)])
    rows, _ = made_of(source, none_share=0.5, replace=replace)
    assert {row["replaced"] for row in rows} == {None, "right", replace}  # a deficit row always lacks the right one
    assert {str(row["completion"]) for row in rows} == {"None", str(told)}
    assert all((row["completion"] is None) == (row["replaced"] is not None) for row in rows)
    assert all((row["hint"] is None) == (row["replaced"] == "right") for row in rows)


def test_options_that_cannot_be_replaced_are_named():
    options = {
        "twice": ("red", "Blue ", " blue", "grey"),
        "alike": ("red", "blue.", "ｂｌｕｅ", "grey"),
        "none": ("red", "blue", "None of the above", "grey"),
        "know": ("red", "blue", "It cannot be determined.", "grey"),
        "own": ("red", "blue", NONE_ANSWERS[7].upper(), "grey"),
        "both": ("red", "blue", "Both A and B", "grey"),
        "all": ("red", "blue", "All of the above", "grey"),
    }
    rows = [question(name, "VA", texts, 1) for name, texts in options.items()] + [
        question(f"good{i}") for i in range(20)
    ]
    made, plan = made_of(rows)
    assert faults(made, rows) == []
    special = [row for row in made if row["question_id"] in options]
    assert {row["stratum"] for row in special} == {"exact", "superset"} and {row["replaced"] for row in special} == {
        None
    }
    assert plan.summary.not_made["deficit"] == {
        "answer twice": 2,
        "has a none option": 3,
        "options speak of others": 2,
    }
    assert plan.summary.replaced["exact"] == 7  # of 27, from the others
    with pytest.raises(
        QAPlusError, match="none_share 1 of the exact rows is 27, but of only 20 an option can be replaced"
    ):
        made_of(rows, none_share=1)


def test_a_signal_that_a_row_lacks():
    rows = [
        question("whole", "V"),
        question("unread", "V", subtitle=None),
        question("heard", "A", video=None, audio="a.wav", subtitle=" "),
        question("blind", "VA", video=None, audio="a.wav"),
        question("all", "VAS"),
    ]
    made, plan = made_of(rows)
    by_name = {(row["question_id"], row["stratum"]): row["tag"] for row in made}
    assert by_name["unread", "superset"] == "VA" and by_name["unread", "deficit"] == "A"
    assert ("heard", "superset") not in by_name and ("heard", "deficit") not in by_name
    assert ("blind", "exact") not in by_name and by_name["blind", "deficit"] in ("A", "S", "AS")
    assert plan.summary.not_made == {
        "exact": {"no such signal": 1},
        "superset": {"requires all signals already": 1, "no such signal": 2},
        "deficit": {"no such signal": 1},
    }
    made, plan = made_of(rows, evaluation=True)
    assert Counter(row["question_id"] for row in made) == {"whole": 7, "unread": 3, "heard": 1, "blind": 3, "all": 7}
    lacking = {"VS": 1, "VA": 1, "AS": 1, "VAS": 3}
    assert plan.summary.not_made["superset"] == {f"{tag}: no such signal": n for tag, n in lacking.items()}
    assert sum(sum(found.values()) for found in plan.summary.not_made.values()) == 5 * 7 - len(made)


def test_pictures_are_a_visual_signal(tmp_path):
    """A picture is seen, and has no sound; a row's pictures go with it."""
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(b"x")
    rows = [
        question("one", "V", video=None, image="one.png"),
        question("several", "V", video=None, images=["one.png", "two.png"]),
        question("gone", "V", video=None, images=["one.png", "gone.png"]),
    ]
    plan = Plan(
        table([{**row, "subtitle": "Red, they say."} for row in rows]), QAPlusOptions(evaluation=True), tmp_path
    )
    made = [row for part in plan.tables() for row in part.to_pylist()]
    inputs = {name: {row["tag"] for row in made if row["question_id"] == name} for name in ("one", "several", "gone")}
    assert inputs == {"one": {"V", "S", "VS"}, "several": {"V", "S", "VS"}, "gone": {"S"}}
    assert all(row["images"] == ["one.png", "two.png"] for row in made if row["question_id"] == "several")


def test_files_that_are_not_there(tmp_path):
    rows = [question("here", "V"), question("gone", "V"), question("text", "V", subtitle="A text, and no file.")]
    for name in ("here.mp4", "here.srt", "gone.mp4", "text.mp4"):
        (tmp_path / name).touch()
    plan = Plan(table(rows), QAPlusOptions(evaluation=True), tmp_path)
    inputs = Counter(row["question_id"] for part in plan.tables() for row in part.to_pylist())
    assert inputs == {"here": 7, "gone": 3, "text": 7}


def test_two_rows_with_one_id():
    rows = [*questions(5), question("q3")]
    with pytest.raises(QAPlusError, match="row 3: another row has its id 'q3' too"):
        made_of(rows)
    with pytest.raises(QAPlusError, match="there is no column 'options'"):
        made_of(table(rows).remove_columns("options"))


# Prompts


@pytest.mark.parametrize("form", ["{}. {}", "({}) {}", "{}) {}", "{}: {}"])
def test_prompts_are_kept_but_for_their_options(form):
    options = ["red", "green", "blue"]
    lines = "\n".join(form.format(letter, text) for letter, text in zip("ABC", options, strict=True))
    prompt = [
        {"role": "system", "content": "Mind the options:\nA. yes"},
        {"role": "user", "content": f"<video>Which colour?\n{lines}\nAnswer in brackets, say [A]. red"},
    ]
    row = question("q", "VA", options, 0) | {"prompt": prompt}
    made, _ = made_of([row], exact=0, superset=0)
    (said,) = made
    assert said["prompt"][0] == prompt[0]
    new = "\n".join(form.format(letter, text) for letter, text in zip("ABC", said["options"], strict=True))
    assert said["options"][0] in NONE_ANSWERS
    assert said["prompt"][1]["content"] == f"<video>Which colour?\n{new}\nAnswer in brackets, say [A]. red"


@pytest.mark.parametrize("head", ["{}. ", "({}) ", "{}.", "{}、", "（{}）", "{} : ", "{}\u00a0: "])
@pytest.mark.parametrize("style", ["keep", "think"])
def test_options_with_their_letters_lose_them(head, style):
    """Else the option that is replaced would be the one that has no letter of its own, or the only one with a single letter."""
    lettered = [head.format(letter) + text for letter, text in zip("ABC", ("red", "green", "blue"), strict=True)]
    lines = "\n".join(lettered)
    row = question("q", "VA", lettered, 0) | {"prompt": [{"role": "user", "content": f"Which colour?\n{lines}"}]}
    made, _ = made_of([row], exact=0, superset=0, prompt_style=style)
    (said,) = made
    assert said["options"][0] in NONE_ANSWERS and said["options"][1:] == ["green", "blue"]
    own = head if style == "keep" else "{}. "
    new = "\n".join(own.format(letter) + text for letter, text in zip("ABC", said["options"], strict=True))
    assert f"\n{new}" in said["prompt"][0]["content"]


@pytest.mark.parametrize("given", [[3, 4, 5], ["3", "4", "5", None, ""], [3, 4, 5, None]])
@pytest.mark.parametrize("style", ["keep", "think"])
def test_options_that_are_numbers_or_padded(given, style):
    row = question("q", "VA", ["3", "4", "5"], 0)
    made, plan = made_of(Dataset.from_list([row | {"options": given}]), exact=0, superset=0, prompt_style=style)
    (said,) = made
    assert not plan.summary.left_out and said["options"][0] in NONE_ANSWERS and said["options"][1:] == ["4", "5"]
    new = "\n".join(f"{letter}. {text}" for letter, text in zip("ABC", said["options"], strict=True))
    assert f"\n{new}\n" in said["prompt"][0]["content"]


def test_prompts_in_another_style():
    row = question("q") | {"prompt": [{"role": "user", "content": "What is seen in q?"}]}
    with pytest.raises(QAPlusError, match="1 prompt without options"):
        made_of([row])
    made, _ = made_of([row], prompt_style="brackets")
    assert all("[LETTER]" in row["prompt"][0]["content"] for row in made)
    assert faults(made, [row]) == []


# None answers


def test_rows_without_prompts_are_asked_by_templates():
    """What a row is otherwise does not depend on whether it has a prompt."""
    whole = table(questions(40))
    bare = whole.remove_columns("prompt")
    with_prompts, without = made_of(whole)[0], made_of(bare.remove_columns("answer"))[0]  # `solution` says it too
    assert all("prompt" not in row for row in without)
    assert [{k: v for k, v in row.items() if k not in ("prompt", "answer")} for row in with_prompts] == without
    assert any(row["replaced"] for row in without)
    # A style writes them.
    written = made_of(bare, prompt_style="brackets")[0]
    assert written == made_of(whole, prompt_style="brackets")[0]
    assert all(option in row["prompt"][0]["content"] for row in written for option in row["options"])
    # Negative control: with the column, a row in which it is empty is no question.
    rows = [*questions(5), question("q9", prompt=[])]
    assert {row["question_id"] for row in made_of(table(rows))[0]} == {f"q{i}" for i in range(5)}


def test_a_hundred_none_answers():
    assert len(NONE_ANSWERS) == 100 == len(set(map(plain_option, NONE_ANSWERS)))
    assert all(text == text.strip() and text.endswith(".") and 10 < len(text) < 90 for text in NONE_ANSWERS)
    assert all(says_none(plain_option(text)) for text in NONE_ANSWERS)


@pytest.mark.parametrize(
    "text, none, others",
    [
        ("None of the above", True, True),
        ("Cannot be determined", True, False),
        ("There is not enough information.", True, False),
        ("Unknown", True, False),
        ("both", False, True),
        ("A and C", False, True),
        ("Only (b) and (d)", False, True),
        ("All of these", False, True),
        ("Option C", False, True),
        ("He answers a phone call", False, False),
        ("All of them are dancing", False, False),
        ("Nothing falls off the table", False, False),
        ("Both dogs run away", False, False),
        ("A", False, False),
        ("The unknown soldier", False, False),
    ],
)
def test_options_that_say_none_or_speak_of_others(text, none, others):
    assert (says_none(plain_option(text)), speaks_of_others(plain_option(text))) == (none, others)


# Files


def test_shards_and_their_notes(tmp_path):
    rows = [*questions(30), question("open") | {"options": None}]
    options = QAPlusOptions(shard_rows=32)
    summary = build_qa_plus(table(rows), tmp_path / "out", "train", options)
    count = -(-summary.total // 32)
    assert summary.files == [f"train-{i:05}-of-{count:05}.parquet" for i in range(count)] and count > 2
    lengths = [pq.read_metadata(tmp_path / "out" / name).num_rows for name in summary.files]
    assert lengths == [32] * (count - 1) + [summary.total - 32 * (count - 1)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*summary.files, "left_out-train.jsonl", "qa_plus-train.json"]
    )
    assert [file.name for file in table_files(tmp_path / "out")] == summary.files  # the notes are no tables
    loaded = load_dataset(
        "parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train", cache_dir=tmp_path / "c"
    )
    assert faults(loaded, rows) == [] and loaded.features == Plan(table(rows), options).features
    (left,) = map(json.loads, (tmp_path / "out" / "left_out-train.jsonl").read_text().splitlines())
    assert (left["row"], left["id"], left["reason"]) == (30, "open", "open question")
    noted = json.loads((tmp_path / "out" / "qa_plus-train.json").read_text())
    assert noted["options"]["shard_rows"] == 32 and noted["rows"] == summary.rows
    # Another split joins it; the same one is refused, and replaced when asked, however many shards it had.
    build_qa_plus(table(questions(30, split="test")), tmp_path / "out", "test", QAPlusOptions(evaluation=True))
    with pytest.raises(QAPlusError, match="train-00000-of-.*is there already"):
        build_qa_plus(table(rows), tmp_path / "out", "train", options)
    (tmp_path / "out" / ".train.partial").mkdir()  # of a process that was killed
    assert build_qa_plus(table(rows), tmp_path / "out", "train", QAPlusOptions(), overwrite=True).files == [
        "train-00000-of-00001.parquet"
    ]
    assert len(list((tmp_path / "out").glob("train-*.parquet"))) == 1
    assert len(list((tmp_path / "out").glob("*test*"))) == 3 and not list((tmp_path / "out").glob(".*"))


def test_rows_of_another_split_are_left_out(tmp_path):
    rows = [*questions(9), question("held out", split="test"), question("anywhere", split=None)]
    summary = build_qa_plus(table(rows), tmp_path / "out", "train", QAPlusOptions())
    assert summary.left_out == {"another split": {"count": 1, "ids": ["held out"]}} and summary.questions == 10
    with pytest.raises(QAPlusError, match="field 'split' is 'train', and rows of 'test' are asked for"):
        build_qa_plus(table(questions(2)), tmp_path / "none", "test", QAPlusOptions())
    assert not (tmp_path / "none").exists()
    assert validate_tables([tmp_path / "out"]).counts == {}


def test_nothing_is_replaced_by_what_failed(tmp_path, monkeypatch):
    build_qa_plus(table(questions(5)), tmp_path, "train", QAPlusOptions())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Plan, "tables", lambda plan: iter([pa.table({"id": ["x"]})]))
    with pytest.raises(ValueError):
        build_qa_plus(table(questions(9)), tmp_path, "train", QAPlusOptions(), overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_of_two_that_build_a_split_at_once_is_refused(tmp_path):
    """Its notes are not mixed into those of the first, either."""
    with hold_split(tmp_path / "out", "train"):
        (tmp_path / "out" / ".left_out-train.partial").write_text("of the first")
        with pytest.raises(ShardError, match="another process is writing split 'train'"):
            build_qa_plus(table(questions(3)), tmp_path / "out", "train", QAPlusOptions())
        assert (tmp_path / "out" / ".left_out-train.partial").read_text() == "of the first"
    build_qa_plus(table(questions(3)), tmp_path / "out", "train", QAPlusOptions())


BUILD = """
import sys
import pyarrow.parquet as pq
from datasets import Dataset
from maple_trl.data.qa_plus import QAPlusOptions, build_qa_plus
rows = Dataset(pq.read_table(sys.argv[1]))
build_qa_plus(rows, sys.argv[2], "train", QAPlusOptions(shard_rows=200))
"""


@pytest.mark.slow
def test_the_same_bytes_in_another_process(tmp_path):
    rows = table(questions(300))
    pq.write_table(rows.data.table, tmp_path / "rows.parquet")
    build_qa_plus(rows, tmp_path / "here", "train", QAPlusOptions(shard_rows=200))
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", BUILD, tmp_path / "rows.parquet", tmp_path / "there"]
    subprocess.run(words, check=True, env=environment, capture_output=True)
    here, there = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("here", "there")
    ]
    assert here == there and len(here) > 4


def test_what_is_written_is_what_the_others_read(tmp_path, capsys, monkeypatch):
    """With the media in the folder in which the command is given, and the rows in another."""
    rows = questions(20)
    (tmp_path / "clips").mkdir()
    for name in {row[kind] for row in rows for kind in ("video", "subtitle")}:
        (tmp_path / "clips" / name).touch()
    write_shards(rows, tmp_path / "rows")
    monkeypatch.chdir(tmp_path / "clips")
    assert cli.main(["data", "qa-plus", "../rows", "../qa", "--media_root", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["media_root"] == str(tmp_path / "clips")
    assert cli.main(["data", "validate", "../qa", "--media_root", "."]) == 0
    told = capsys.readouterr().out
    assert (
        "not read, as it is none of the tables that training takes: ../qa/qa_plus-train.json" in told
        and "no problem found" in told
    )


def test_the_command(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(40)))
    words = ["data", "qa-plus", str(tmp_path / "rows.jsonl"), str(tmp_path / "out")]
    assert (
        cli.main([*words, "--check_files", "false", "--exact", "40", "--superset", "20", "--deficit", "9", "--json"])
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert {stratum: sum(found.values()) for stratum, found in summary["rows"].items()} == {
        "exact": 40,
        "superset": 20,
        "deficit": 9,
    }
    assert cli.main([*words, "--check_files", "false", "--overwrite", "--replace", "wrong", "--seed", "3"]) == 0
    told = capsys.readouterr().out
    assert "Rows by stratum and input" in told and f"media_root: {tmp_path}" in told
    for more, message in (
        (["--overwrite"], f"media were looked for in {tmp_path}"),  # there are no clips
        (["--check_files", "false"], "is there already"),
        (["--check_files", "false", "--superset", "999", "--overwrite"], "999 rows are asked for"),
        (["--prompt_stile", "think"], "--prompt_style?"),
        (["--split", "train", "--replace", "both"], "--replace: invalid choice"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    for words, message in (
        ([str(tmp_path / "out" / "qa_plus-train.json")], "cannot be written"),
        ([str(tmp_path / "new"), "--media_root", str(tmp_path / "absent")], "media_root: there is no folder"),
    ):
        assert cli.main(["data", "qa-plus", str(tmp_path / "rows.jsonl"), *words, "--check_files", "false"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert cli.main(["data", "qa-plus", str(tmp_path / "none"), "o"]) == 2
    assert cli.main(["data", "qa-plus", "--help"]) == 0
