r"""The ways to write an option: `[B]`, `**B**`, `\boxed{B}`, `选B`, `The answer is B.`; and what is none of them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.jobs.eval_job import EvalMedia
from maple_trl.jobs.rewards import load_rewards
from maple_trl.rewards import AccuracyReward, accuracy_reward
from maple_trl.rewards.answers import (
    answer_key,
    chosen_option,
    extract_bracketed,
    grade_answer,
    option_letter,
    option_texts,
)


MARKS = [
    *(
        "[{}]",
        "[[{}]]",
        "({})",
        "{}",
        "**{}**",
        "__{}__",
        "*{}*",
        "_{}_",
        "`{}`",
        '"{}"',
        "'{}'",
        "“{}”",
        "$ {} $",
        "${}$",
        "$${}$$",
    ),
    *(r"\boxed{{{}}}", r"\fbox{{{}}}", r"\boxed{{\text{{{}}}}}", r"\textbf{{{}}}", r"\({}\)", r"\[{}\]"),
    *("**[{}]**", "**({})**", "[({})]", r"$\boxed{{{}}}$", r"$$\boxed{{\mathrm{{{}}}}}$$", "**`{}`**"),
    *("（{}）", "【{}】", "「{}」", "{{{}}}"),
]
ENDS = ["", ".", "。", ":", "：", ")", "．"]
SAYINGS = [
    *("The answer is {}", "the answer is {}.", "The correct answer is {}.", "Answer: {}", "answer:{}", "ANSWER: {}"),
    *("The final answer is: {}", "Final answer: {}", "My answer is {}.", "So the answer is {}.", "Ans: {}"),
    *(
        "Therefore, the correct option is {}.",
        "Option {}",
        "option {}.",
        "Choice {}",
        "I pick option {}.",
    ),
    *("{} is correct", "{} is the correct answer.", "Option {} is correct."),
    *("The answer is:\n\n{}", "**Answer:** {}", "**The answer is** {}", "**Answer: {}**", "The answer is option {}."),
    *(
        "答案是{}",
        "答案：{}",
        "答案:{}",
        "答案为{}。",
        "正确答案是{}",
        "选{}",
        "选 {}",
        "所以选{}。",
        "故选{}",
        "选项{}",
        "{}选项",
    ),
    *("应选{}", "選{}", "答えは{}です。", "正解：{}", "정답은 {}입니다."),
]
TEXTS = ["{}. a red square", "({}) a red square", "**{}** a red square", "**({})** a red square", "[{}] a red square"]
TEXTS += [
    r"\boxed{{{}}} a red square",
    "{}: a red square",
    "{}) a red square",
    "{}。红色",
    "{}：红色",
    "**{}. a red square**",
]


def said(answer):
    return f"<think>x</think><answer>{answer}</answer>"


@pytest.mark.parametrize("form", MARKS + SAYINGS + TEXTS)
@pytest.mark.parametrize("letter", "BaDＣ")
def test_forms_of_an_option(form, letter):
    answer, right = form.format(letter), {"Ｃ": "C"}.get(letter, letter.upper())
    for solution in "ABCD":
        expected = [float(solution == right)]
        assert accuracy_reward(completions=[said(answer)], solution=[solution]) == expected
        assert accuracy_reward(completions=[said(answer)], solution=[f"({solution})"]) == expected
    assert answer_key(answer) == ("option", right)


@pytest.mark.parametrize("form", ["I choose {}", "It is {}", "It's {}.", "I would pick {}"])
def test_verbs_announce_a_letter_and_no_article(form):
    assert chosen_option(form.format("A")) == "A" and chosen_option(form.format("b")) == "B"
    assert chosen_option(form.format("a")) is None and chosen_option(form.format("**a**")) == "A"


@given(
    st.sampled_from("ABCDEFGHabcdefghＡＢＣＤ"),
    st.lists(st.sampled_from(MARKS), max_size=2),
    st.sampled_from(ENDS),
    st.sampled_from(["{}", *SAYINGS]),
    st.sampled_from(["", " ", "\n", "\t "]),
    st.sampled_from(["", "x", " a red square"]),
)
def test_random_wrappings_of_a_letter(letter, marks, end, saying, space, text):
    answer = letter
    for mark in marks:
        answer = mark.format(answer)
    answer = space + saying.format(answer + end * (not marks and saying[-1] == "}")) + space
    expected = letter.translate({0xFF21 + i: 65 + i for i in range(4)}).upper()
    read = chosen_option(answer)
    # Marks around marks may be more than is read, but are never read as another letter.
    assert read == expected or (read is None and len(marks) + saying.count("**") >= 2), answer
    # Never another letter, whatever stands behind.
    assert chosen_option(f"{answer} {text}") in (expected, None)


NONE = [
    *("I choose a", "It is a.", "A is"),
    *(
        "A dog runs",
        "a dog runs",
        "An apple",
        "I think it is red",
        "I am not sure.",
        "I",
        "It is a dog",
        "A",
        "none",
        "?",
    ),
    *(
        "The answer is a dog",
        "The answer is A dog",
        "I choose a dog",
        "A man is on the left",
        "A cat is right",
        '"A cat"',
    ),
    *(
        "**A cat**",
        "(A cat)",
        r"\boxed{A cat}",
        "It is 5 a.m.",
        "vitamin C",
        "Plan B",
        "The letter is unknown",
        "Answer:",
    ),
    *(
        "The answer is",
        "选",
        "答案是",
        "答案不是B",
        "不选B",
        "The answer is not B",
        "Not B",
        "B because",
        "Because",
        "Bob",
        "A-team",
    ),
    *(
        "((B))",
        "(B",
        "B]",
        "[B",
        "**B",
        "В",
        "Ⓑ",
        "𝐁",
        "[В]",
        "The answer is Ⓑ.",
        "[]",
        "**",
        "\\boxed{}",
        "$$",
        "AB",
        "[AB]",
    ),
]
SEVERAL = [
    *(
        "A or B",
        "[A] [B]",
        "[A][B]",
        "**A** or **B**",
        "**A** **B**",
        "选A或B",
        "选A。选B。",
        "答案是A和B",
        "A、B",
        "【A】【B】",
    ),
    *(
        "(A)(B)",
        "(A) (B)",
        r"\boxed{A} \boxed{B}",
        r"\boxed{A}\boxed{B}",
        "$A$ $B$",
        '"A" or "B"',
        "The answer is A or B",
    ),
    *(
        "Option A or option B",
        "[A] or [B]",
        "[A] and **B**",
        "A. The answer is B.",
        "A. option B",
        "A or B is correct",
        "A. 选B",
    ),
    *(
        "选AB",
        "选A,B",
        "B and C are right",
        "Both A and B.",
        "Either A or B",
        "**A. red** or **B. blue**",
        "[A] red [B] blue",
    ),
    *(
        "The answer is A. The answer is B.",
        "[A]. Or rather [B].",
        "**(A)** red, **(B)** blue",
        r"\boxed{A} or $\boxed{B}$",
    ),
]


@pytest.mark.parametrize("answer", [*NONE, *SEVERAL])
def test_what_names_no_option_or_several(answer):
    if answer in ("A", "I"):  # alone they are options, whatever they mean elsewhere
        assert chosen_option(answer) == answer
        return
    assert chosen_option(answer) is None
    assert all(accuracy_reward(completions=[said(answer)], solution=[letter]) == [0.0] for letter in "ABCDI")
    if answer in SEVERAL:
        key = answer_key(answer)
        assert key is None or key[0] == "text"


WORDS = "a A dog I cat runs the The man of option answer is red it and or then Bob vitamin 选 红色 because not choose".split()


@given(st.lists(st.sampled_from(WORDS), min_size=2, max_size=12).map(" ".join), st.sampled_from(["", ".", "!", "?"]))
def test_random_prose_without_a_marked_letter(words, end):
    """Only what announces a lone letter and nothing else may be read as one."""
    text = words + end
    *before, last = words.split()
    read = chosen_option(text)
    announced = set(before) <= {"The", "answer", "option", "is", "选", "I", "choose"} and end != "?"
    assert read is None or (announced and read == last.upper()), text


@given(st.text(max_size=60))
def test_any_text_is_read_as_one_letter_at_most_and_never_raises(text):
    for form in ("{}", "**{}**", "The answer is {}", "选{}", r"\boxed{{{}}}"):
        answer = form.format(text)
        letters = [letter for letter in "ABCDXYZ" if grade_answer(answer, letter) == 1.0]
        assert len(letters) <= 1
        assert extract_bracketed(answer) is None or "[" in answer


def test_with_options_the_text_behind_the_letter_must_not_be_anothers():
    texts = option_texts(["红色，深", "blue", "Option A", "dark red"])
    assert chosen_option("**A** 红色，深", texts) == "A" and chosen_option("A。红色，深", texts) == "A"
    assert chosen_option("**A** blue", texts) is None and chosen_option("[B] blue", texts) == "B"
    assert chosen_option("Option A", texts) == "C"  # it is the text of C
    assert chosen_option("Option B", texts) == "B" and chosen_option("[E]", texts) is None
    assert chosen_option("The answer is D. dark red", texts) == "D"


UMBRELLAS = ["一只红色的狗", "一只蓝色的猫", "狗", "不是"]


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("A. 一只红色的狗，不是一只蓝色的猫", None),
        ("A。一只蓝色的猫", None),
        ("A. 我看到了一只蓝色的猫在叫", None),
        ("B. 一只蓝色的猫，在门口", "B"),
        ("A. 红色的狗", "A"),
        ("A. 这是一只红色的狗，这不是第一次", "A"),  # `不是` is a part of what is said
        ("A. 狗", None),
        ("D. 不是", "D"),
        ("C. 这只狗在叫", "C"),
        ("C. 一只红色的狗", None),
    ],
)
def test_texts_of_other_options_in_scripts_without_spaces(answer, letter):
    assert chosen_option(answer, option_texts(UMBRELLAS)) == letter


def test_texts_of_other_options_in_thai_and_kana():
    thai, kana = option_texts(["รถสีแดง", "รถสีดำ"]), option_texts(["はい", "いいえ", "あかいくるま", "ねこ"])
    assert chosen_option("A. รถสีแดงไม่ใช่รถสีดำ", thai) is None and chosen_option("A. รถสีแดงคันใหญ่", thai) == "A"
    assert chosen_option("B. いいえ、これはいいものです", kana) == "B"
    assert chosen_option("D. ねこ。あかいくるまではない", kana) is None


@pytest.mark.parametrize(
    "form",
    ["{}, {}", "[{}] [{}]", "[{}][{}]", "**{}**, **{}**", "[{}] and [{}]", "({}) ({})", "{}，{}", "$ {} $ $ {} $"],
)
def test_one_letter_several_times_is_one_answer(form):
    for texts in (None, option_texts(["red", "blue", "green"])):
        assert chosen_option(form.format("B", "b"), texts) == "B"
        assert chosen_option(form.format("B", "C"), texts) is None


def test_solutions_are_read_alike():
    for solution in ("[B]", "**B**", r"\boxed{B}", "Option B", "答案：B", "<answer>[B]</answer>"):
        assert option_letter(solution.removeprefix("<answer>").removesuffix("</answer>")) == "B"
        assert accuracy_reward(completions=[said("B"), said("A")], solution=[solution] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[B]", "B"),
        ("It is red, so the answer is [B].", "B"),
        ("<think>Maybe [A], maybe [C].</think> [B]", "B"),
        ("maybe [A]</think>\n\n[B] a red square", "B"),
        ("<think>[B]</think>", None),
        ("<think>[B]", None),
        ("<think>x</think><think>[B]", None),
        ("[A] or [B]", None),
        ("[B], that is [b]", "b"),
        ("[(B)]", "(B)"),
        ("[B. a red square]", "B. a red square"),
        ("**[B]**", "B"),
        ("<answer>[B]</answer>", "B"),
        ("[Music] plays, then [B]", "B"),
        ("[12]", "12"),
        ("[Yes]", "Yes"),
        ("[12] [13]", None),
        ("[]", None),
        ("[ ]", None),
        ("B", None),
        ("<answer>B</answer>", None),
        ("[[B]]", "B"),
    ],
)
def test_answers_in_brackets(text, answer):
    assert extract_bracketed(text) == answer
    for completion in (text, [{"role": "assistant", "content": text}]):
        (score,) = AccuracyReward("brackets")(completions=[completion], solution=["B"])
        assert score == float(answer is not None and option_letter(answer) == "B")
        assert accuracy_reward(completions=[completion], solution=["B"], answer_format="brackets") == [score]


def test_a_format_for_each_row_and_an_unknown_one():
    columns = {"completions": ["[B]", "<answer>B</answer>", "[B]"], "solution": ["B"] * 3}
    assert accuracy_reward(**columns, answer_format=["brackets", "tags", None]) == [1.0, 1.0, 0.0]
    for make in (lambda: accuracy_reward(**columns, answer_format="boxed"), lambda: AccuracyReward("boxed")):
        with pytest.raises(ValueError, match="answer_format must be one of tags, brackets, got 'boxed'"):
            make()


@pytest.mark.parametrize(
    "entry, way",
    [
        (
            "accuracy_reward",
            "{reward: accuracy_reward, answer_format: brackets}; in Python AccuracyReward('brackets')",
        ),
        ("self_consistency_reward", "in Python SelfConsistencyReward('brackets')"),
        (
            {"reward": "self_consistency_reward", "tags": ["V"]},
            "{reward: self_consistency_reward, answer_format: brackets}",
        ),
        ("format_reward", "It knows no other form: leave it out"),
        ("temporal_iou_reward", "It knows no other form"),
        ({"reward": "box_iou_reward", "rows": {"kind": ["where"]}}, "It knows no other form"),
        ("object_place_reward", "It knows no other form"),
        ({"reward": "object_place_reward", "object_weight": 0.2}, "It knows no other form"),
    ],
    ids=str,
)
def test_a_reward_that_reads_another_form_than_the_prompts_ask_for_is_refused(entry, way):
    name = entry if isinstance(entry, str) else entry["reward"]
    bracketed, tagged = EvalMedia(prompt_template="maple-qa"), EvalMedia(prompt_template="think")
    rewards = load_rewards([entry])
    with pytest.raises(ValueError, match=f"form 'brackets', and {name} reads 'tags'.*{re.escape(way)}"):
        bracketed.check_answer_form(rewards)
    with pytest.raises(ValueError, match=f"and {name} reads 'tags'"):
        bracketed.check_answer_form([name])
    tagged.check_answer_form(rewards)
    bracketed.check_answer_form(rewards, ["answer_format"])
    if name in ("accuracy_reward", "self_consistency_reward"):
        told = load_rewards([{"reward": name, "answer_format": "brackets"}])
        bracketed.check_answer_form(told)
        with pytest.raises(ValueError, match=f"form 'tags', and {name} reads 'brackets'"):
            tagged.check_answer_form(told)
