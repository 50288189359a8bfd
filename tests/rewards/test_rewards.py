"""Format and accuracy rewards: the published rule, and the ways in which a policy would cheat it."""

import datetime
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.modalities import ModalityTag
from maple_trl.rewards import accuracy_reward, extract_answer, format_reward, grade_answer
from maple_trl.rewards.answers import answer_key, chosen_option, completion_text, number, option_letter, option_texts


def conversational(text):
    return [{"role": "assistant", "content": text}]


def both_forms(function, texts, **columns):
    """Scores the texts as plain and as conversational completions; the two must agree."""
    ids = [[0]] * len(texts)
    plain = function(prompts=[""] * len(texts), completions=list(texts), completion_ids=ids, **columns)
    chats = function(
        prompts=[[{"role": "user", "content": ""}]] * len(texts),
        completions=[conversational(text) for text in texts],
        completion_ids=ids,
        **columns,
    )
    assert plain == chats
    return plain


WELL_FORMED = [
    "<think>red</think><answer>B</answer>",
    "<think>red</think> <answer>B</answer>",
    "\n <think>\nIt moves left.\n\nSo B.\n</think>\n\n<answer>\nB\n</answer>\n",
    "<think>x < y and y > z, <b>bold</b></think><answer>B</answer>",
    "<think>赤い</think><answer>正解</answer>",
]
MALFORMED = [
    "",
    " ",
    ":",
    "Thought process:",
    "B",
    "<answer>B</answer>",
    "<think>red</think>B",
    "<think>red</think>",
    "<think>red<answer>B</answer>",
    "<think>red</think><answer>B",
    "red</think><answer>B</answer>",
    "<think></think><answer>B</answer>",
    "<think>red</think><answer> </answer>",
    "<think> \n</think><answer>B</answer>",
    "<answer>B</answer><think>red</think>",
    "<think>red</think>so<answer>B</answer>",
    "Sure! <think>red</think><answer>B</answer>",
    "<think>red</think><answer>B</answer> Done.",
    "<think>red</think><answer>B</answer>.",
    "<think>red</think><answer>B</answer>\u200b",
    "<think>red</think><answer>B</answer><answer>C</answer>",
    "<think>red</think><answer>B</answer><think>red</think><answer>B</answer>",
    "<think>red</think><think>blue</think><answer>B</answer>",
    "<think><think>red</think></think><answer>B</answer>",
    "<think>red</think><answer><answer>B</answer></answer>",
    "<think><answer>B</answer></think><answer>B</answer>",
    "<think>red <answer></think><answer>B</answer>",
    "<think>red</think><answer><think>B</answer>",
    "<THINK>red</THINK><ANSWER>B</ANSWER>",
    "< think>red</ think>< answer>B</ answer>",
    "＜think＞red＜/think＞＜answer＞B＜/answer＞",
]


@pytest.mark.parametrize("text", WELL_FORMED)
def test_format_accepts(text):
    assert both_forms(format_reward, [text]) == [1.0]


@pytest.mark.parametrize("text", MALFORMED)
def test_format_rejects(text):
    assert both_forms(format_reward, [text]) == [0.0]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>red</think><answer> B </answer>", "B"),
        ("<answer>B</answer>", "B"),
        # The chat template opened the think block: the completion begins inside it.
        ("it is red</think><answer>B</answer>", "B"),
        ("it is red <answer>B</answer></think>", None),
        ("<think>maybe <answer>B</answer></think>", None),
        ("<think>maybe <answer>B</answer>", None),
        ("<think>a</think><think><answer>B</answer></think>", None),
        ("<think><answer>B</answer></think><answer>B</answer>", None),
        ("<answer>A</answer><answer>B</answer>", None),
        ("<answer>B</answer></answer>", None),
        ("<answer>A<answer>B</answer>", None),
        ("</answer>B<answer>", None),
        ("<answer>B", None),
        ("<answer>B</think></answer>", None),
        ("<answer></answer>", ""),
        ("The answer is B.", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "answer", ["B", "b", "B.", "(B)", "(b)", "B)", "B:", "(B).", "B. a red square", "(B) red", "B) red"]
)
def test_right_option(answer):
    for solution in ("B", "b", "(B)", "B. a red square", "<answer>B</answer>"):
        assert both_forms(accuracy_reward, [f"<think>x</think><answer>{answer}</answer>"], solution=[solution]) == [
            1.0
        ]


@pytest.mark.parametrize(
    "answer",
    [
        *("", " ", ":", ".", "()", "Thought process:", "A", "(A)", "A. B", "AB", "BB", "B C", "B, C", "A or B", "B/C"),
        *("B because", "the answer is not B", "option A", "A, B, C, D", "B.B", "((B))", "(B", "[A]", "*A*", "2"),
        # Look-alikes: Cyrillic, circled, bold, superscript. The wide `Ｂ` of East Asian texts is the letter.
        *("В", "Ⓑ", "𝐁", "ᴮ", "β", "Ａ"),
    ],
)
def test_wrong_option(answer):
    assert both_forms(accuracy_reward, [f"<think>x</think><answer>{answer}</answer>"], solution=["B"]) == [0.0]


@pytest.mark.parametrize(
    "answer",
    [
        *("B. C", "B. C.", "B. C. D.", "B) C)", "(B) (C)", "(B) or (C)", "B. or C.", "B. and C", "B: C: D", "B. / C"),
        *("B. red C) blue", "B. red (c) blue", "B. red or C. blue", "B. red, C", "B. red or C", "B. red\nC. blue"),
        *("B. red\n  C. blue", "B. red; C: blue", "(B) it may be\r\n(C)", "B. b", "B. A, C & D"),
    ],
)
def test_hedging_behind_a_letter_earns_nothing(answer):
    texts = ["<think>x</think><answer>" + answer + "</answer>"]
    for solution in "ABCD":
        assert both_forms(accuracy_reward, texts, solution=[solution]) == [0.0]
        assert both_forms(accuracy_reward, texts, solution=[solution], options=[["a", "b", "c", "d"]]) == [
            # With the options known, "B. b" is B with its text.
            float(answer == "B. b" and solution == "B")
        ]


@pytest.mark.parametrize(
    "answer",
    ["B. Tom and Ann", "B. vitamin C", "B) f(x1, y)", "(B) Mr. T. is here", "B. I do", "B. 3.5 m", "B. or else"],
)
def test_texts_that_name_no_second_option(answer):
    assert chosen_option(answer) == "B"


OPTIONS = ["red", "dark  Red", "3", "The cat."]


@pytest.mark.parametrize(
    "answer, letter",
    [
        *(
            ("B", "B"),
            ("(b)", "B"),
            ("dark red", "B"),
            ("DARK RED.", "B"),
            ("B. dark red", "B"),
            ("B) it is dark", "B"),
        ),
        *(("red", "A"), ("A. red", "A"), ("3", "C"), ("C. 3", "C"), ("(d) the cat", "D"), ("the cat", "D")),
        # The text of another option behind the letter; letters that are no options; texts that are none.
        *(("B. red", None), ("A. dark red", None), ("A. red or dark red", None), ("D. the cat is red", None)),
        *(("E", None), ("E. red", None), ("redd", None), ("it is red", None), ("3.0", None), ("red, 3", None)),
        *(("", None), (":", None), (".", None), ("red dark red", None), ("A: red (C) 3", None)),
    ],
)
def test_options_by_letter_and_text(answer, letter):
    given_as = [OPTIONS, [f"{x}. {text}" for x, text in zip("ABCD", OPTIONS, strict=True)]]
    given_as += [dict(zip("ABCD", OPTIONS, strict=True)), {"E": None, **dict(zip("abcd", OPTIONS, strict=True))}]
    for options in given_as:
        assert chosen_option(answer, option_texts(options)) == letter
        for right, text in zip("ABCD", OPTIONS, strict=True):
            for solution in (right, f"({right})", text):
                texts = [f"<think>x</think><answer>{answer}</answer>"]
                expected = [float(letter == right)]
                assert both_forms(accuracy_reward, texts, solution=[solution], options=[options]) == expected
                assert both_forms(accuracy_reward, texts, solution=[solution], choices=[options]) == expected


def test_a_letter_is_a_letter_where_options_are_letters():
    """Options "B", "A": the answer `B` is the letter, for it can't be both."""
    assert grade_answer("B", "B", ["B", "A"]) == 1.0
    assert grade_answer("B", "A", ["B", "A"]) == 0.0
    # A text that looks like an option of its own.
    assert grade_answer("A. Smith", "B", ["B. Jones", "A. Smith"]) == 1.0


@pytest.mark.parametrize(
    "options", [None, [], ["red"], "red", "A. red", 3, [{}, 2], {"V": 1}, {"first": "red"}, ["a"] * 27]
)
def test_other_columns_of_that_name_are_left_alone(options):
    assert option_texts(options) == {}
    assert grade_answer("B. red", "B", options) == 1.0
    assert grade_answer("9", "10", options) == 0.9


@pytest.mark.parametrize(
    "first, second",
    [
        *(
            ("A. red", "B. blue"),
            ("A.red", "B.blue"),
            ("A: red", "B: blue"),
            ("A:red", "B:blue"),
            ("(A) red", "(B) blue"),
        ),
        *(("(A)red", "(B)blue"), ("A) red", "B) blue"), ("a. red", "b. blue"), (" A. red ", "B. blue\n")),
        *(
            ("A、red", "B、blue"),
            ("A．red", "B．blue"),
            ("Ａ．red", "Ｂ．blue"),
            ("（A）red", "（B）blue"),
            ("A：red", "B：blue"),
        ),
        *(("A : red", "B : blue"), ("A\u00a0: red", "B\u202f: blue"), ("(A) : red", "(B) : blue")),  # as in French
    ],
)
def test_options_with_their_letters_are_told_from_their_texts(first, second):
    assert option_texts([first, second]) == option_texts({"A": first, "B": second}) == {"A": "red", "B": "blue"}
    for answer, right in (("A", 1.0), ("red", 1.0), ("A. red", 1.0), ("A. blue", 0.0), ("blue", 0.0), ("B", 0.0)):
        assert grade_answer(answer, "A", [first, second]) == right
        assert grade_answer(answer, "red", [first, second]) == right


@pytest.mark.parametrize(
    "options", [["A. red", "blue"], ["B. red", "A. blue"], ["A.", "B."], ["A red", "B blue"], ["A. red", "C. blue"]]
)
def test_letters_that_are_not_those_of_all_options_are_of_their_texts(options):
    assert list(option_texts(options).values()) == options


def test_french_sets_a_space_before_the_colon():
    for answer, right in (("A : rouge", 1.0), ("B : bleu", 0.0), ("A : rouge\nB : bleu", 0.0), ("rouge", 1.0)):
        assert grade_answer(answer, "A", ["A : rouge", "B : bleu"]) == right
    assert option_texts(["A : rouge", "C : bleu"]) == {"A": "A : rouge", "B": "C : bleu"}
    # Without options it is no letter: what stands there may be a quantity, a ratio or who speaks.
    assert [option_letter(text) for text in ("B : bleu", "x : 5")] == [None, None]
    assert (grade_answer("x", "x : 5"), grade_answer("X : Y", "x : y")) == (0.0, 1.0)
    assert answer_key("x : 5") != answer_key("x : 6")


@pytest.mark.parametrize("mark", ["A.{}", "A:{}", "A){}", "(A){}", "Ａ．{}"])
def test_an_option_may_be_copied_as_its_row_spells_it(mark):
    options = [mark.format("red"), mark.replace("A", "B").replace("Ａ", "Ｂ").format("dark red")]
    assert option_texts(options) == {"A": "red", "B": "dark red"}
    assert [grade_answer(answer, "B", options) for answer in options[::-1]] == [1.0, 0.0]
    wrong = mark.replace("A", "B").replace("Ａ", "Ｂ").format("red")  # the letter of one, the text of the other
    assert grade_answer(wrong, "B", options) == 0.0


def test_options_may_be_numbers_and_padded():
    assert option_texts([2, 3.5, 4]) == {"A": "2", "B": "3.5", "C": "4"}
    for answer, right in (("4", 1.0), ("C", 1.0), ("C. 4", 1.0), ("5", 0.0), ("A", 0.0)):
        assert grade_answer(answer, "4", [2, 3, 4, 5]) == grade_answer(answer, 4, [2, 3, 4, 5]) == right
    assert option_texts(["red", "blue", None, None]) == option_texts({"A": "red", "B": "blue", "C": None})
    assert len(option_texts(["red"] * 26 + [None])) == 26 and option_texts(["red"] * 27) == {}
    for padding in (None, math.nan, "", " "):
        assert option_texts(["A. red", "B. blue", padding, padding]) == {"A": "red", "B": "blue"}
    assert option_texts(["red", "", "blue"]) == {"A": "red", "B": "", "C": "blue"}  # as prompts show it
    assert option_texts([3.0, 4.0]) == option_texts(np.array([3.0, 4.0])) == {"A": "3", "B": "4"}
    assert grade_answer("A. 3", "3", [3.0, 4.0]) == 1.0
    assert grade_answer("red", "A", ["red", "blue", None]) == 1.0
    assert grade_answer("A. blue", "A", ["red", "blue", None]) == 0.0


@pytest.mark.parametrize(
    "options, solution, answer, right",
    [
        (["I", "II", "III", "IV"], "I", "A", 1.0),
        (["I", "II", "III", "IV"], "A", "I", 1.0),
        (["I", "II", "III", "IV"], "A", "II", 0.0),
        (["I", "II", "III", "IV"], "II", "I", 0.0),
        (["C", "D", "E", "F"], "D", "F", 1.0),  # the letter of F, whose text is no letter of the row's
        (["C", "D", "E", "F"], "F", "D", 1.0),
        (["C", "D", "E", "F"], "D", "D", 1.0),
        (["C", "D", "E", "F"], "D", "C", 0.0),
        (["x", "y", "z"], "A", "x", 1.0),
        (["x", "y", "z"], "A", "**x**", 1.0),
        (["x", "y", "z"], "A", "y", 0.0),
        (["x", "X", "z"], "A", "x", 0.0),  # which of the two is not told
    ],
)
def test_a_text_of_one_letter_is_a_text_where_the_row_has_no_such_letter(options, solution, answer, right):
    assert grade_answer(answer, solution, options) == right
    assert grade_answer(answer, f"<answer>{solution}</answer>", dict(zip("ABCD", options, strict=False))) == right


@pytest.mark.parametrize(
    "solution, answer, right",
    [
        *(
            ("E. coli", "E. faecalis", 0.0),
            ("J. Smith", "J. Doe", 0.0),
            ("B. red", "B. blue", 0.0),
            ("A：红色", "A：蓝色", 0.0),
        ),
        *(("E. coli", "E. coli", 1.0), ("E. coli", "e. Coli.", 1.0), ("B. red square", "B. The red square", 1.0)),
        *(("B. red", "B", 1.0), ("B", "B. red", 1.0), ("B. red", "B, B", 1.0), ("A：红色", "A：是红色", 1.0)),
    ],
)
def test_texts_behind_a_letter_count_in_a_row_without_options(solution, answer, right):
    assert grade_answer(answer, solution) == right


@pytest.mark.parametrize("hidden", ["\u200b", "\ufeff", "\u200e", "\u00ad"])
def test_invisible_characters_are_no_part_of_an_answer(hidden):
    for said, solution in (("B", "B"), ("12", 12), ("red cat", "red cat")):
        text = f"<answer>{said[:1]}{hidden}{said[1:]}</answer>"
        assert accuracy_reward(completions=[text], solution=[solution]) == [1.0]
        assert accuracy_reward(completions=[f"<answer>{said}</answer>"], solution=[f"{hidden}{solution}"]) == [1.0]
    assert accuracy_reward(completions=[f"[B{hidden}]"], solution=["B"], answer_format="brackets") == [1.0]


def test_an_accent_is_a_part_of_its_letter():
    assert grade_answer("cafe\u0301", "café") == grade_answer("A", "cafe\u0301", ["café", "bar"]) == 1.0
    assert grade_answer("cafe", "café") == 0.0


@pytest.mark.parametrize("solution", [["Paris", "paris"], ["A"], {"A": 1}, datetime.datetime(2020, 1, 1), b"A"])
def test_what_is_no_solution_is_refused(solution):
    with pytest.raises(ValueError, match=f"text or a number, .* but is a {type(solution).__name__}: "):
        accuracy_reward(completions=["<answer>A</answer>"], solution=[solution])


def test_options_that_do_not_hold_the_solution_are_not_used():
    assert grade_answer("9", "10", ["red", "blue"]) == 0.9
    assert grade_answer("E", "E", ["red", "blue"]) == 1.0
    assert grade_answer("red", "red", ["red", "red"]) == 1.0  # doubled: no letter can be told


def test_letters_that_only_case_folding_makes_equal():
    kelvin, long_s = "\u212a", "\u017f"
    assert kelvin.lower() == "k" and long_s.upper() == "S"
    assert grade_answer(kelvin, "K") == 0.0
    assert grade_answer(long_s, "S") == 0.0


def test_the_indefinite_article_names_no_option():
    assert option_letter("A cat") is None
    assert grade_answer("A cat", "A") == 0.0
    assert grade_answer("a  CAT", "A cat") == 1.0


@pytest.mark.parametrize(
    "answer, solution, reward",
    [
        ("10", "10", 1.0),
        ("9", "10", 0.9),
        ("11", 10, 0.9),
        ("5", 10.0, 0.5),
        ("20", "10", 0.0),
        ("21", "10", 0.0),
        ("-10", "10", 0.0),
        ("-9", "-10", 0.9),
        ("1e1", "10", 1.0),
        ("1,000", "1000", 1.0),
        (".5", "0.5", 1.0),
        ("+3", "3", 1.0),
        ("0", "0", 1.0),
        ("-0.0", 0, 1.0),
        ("1e-9", "0", 0.0),
        ("ten", "10", 0.0),
        ("10 apples", "10", 0.0),
        ("nan", "10", 0.0),
        ("inf", "10", 0.0),
        ("1e999", "10", 0.0),
        ("1_0", "10", 0.0),
        ("1,0", "10", 0.0),
        ("１０", "10", 0.0),
        ("٣", "3", 0.0),
        ("", "10", 0.0),
        (".", "0", 0.0),
        ("e5", "0", 0.0),
        ("-1e308", "1e308", 0.0),
        ("1e308", "5e-324", 0.0),
    ],
)
def test_numbers(answer, solution, reward):
    (got,) = both_forms(accuracy_reward, [f"<think>x</think><answer>{answer}</answer>"], solution=[solution])
    assert got == pytest.approx(reward, abs=1e-12)


NUMBER_FORMS = [
    *(
        "${}$",
        "$ {} $",
        "$${}$$",
        r"\({}\)",
        r"\[{}\]",
        r"\boxed{{{}}}",
        r"\fbox{{{}}}",
        r"$\boxed{{\text{{{}}}}}$",
        r"\mathrm{{{}}}",
    ),
    *("**{}**", "__{}__", "*{}*", "`{}`", '"{}"', "({})", "[{}]", "（{}）", "「{}」", "**{}**."),
    *(
        "The answer is {}",
        "the answer is {}.",
        "Answer: {}",
        "**Answer:** {}",
        "So the final answer is **{}**.",
        "It is {}.",
    ),
    *("I would say {}", "{} is correct", r"The answer is $\boxed{{{}}}$.", "答案是{}", "答案：{}。", "正解は{}です"),
]


@pytest.mark.parametrize("form", [*NUMBER_FORMS, "{}", "{}."])
def test_a_number_in_marks_or_announced(form):
    for said, reward in (("12", 1.0), ("9", 0.75), ("1,200", 0.0), ("-12", 0.0), ("12.0", 1.0), ("1.2e1", 1.0)):
        answer = f"<think>x</think><answer>{form.format(said)}</answer>"
        assert both_forms(accuracy_reward, [answer], solution=["12"]) == [reward]
        assert both_forms(accuracy_reward, [answer], solution=["zwölf"]) == [0.0]
    assert answer_key(form.format("12")) == answer_key("12.0") == ("number", 12.0)


@pytest.mark.parametrize(
    "answer, solution, reward",
    [
        ("−5", "-5", 1.0),
        ("-5", "−5", 1.0),
        ("−5", "5", 0.0),
        ("1e−1", "0.1", 1.0),
        ("$−5$", "-5", 1.0),
        ("−−5", "5", 0.0),
    ],
)
def test_the_sign_minus(answer, solution, reward):
    assert grade_answer(answer, solution) == reward


NO_NUMBER = [
    *(
        "{} or 13",
        "{}, 13",
        "{} 13",
        "{}/13",
        "{}-13",
        "{} and 13",
        "13 or {}",
        "{} apples",
        "about {}",
        "not {}",
        "{} cm",
        "{}%",
    ),
    *(
        "x = {}",
        "{} = {}",
        "${}$ or $13$",
        "${}$ $13$",
        r"\boxed{{{}}} \boxed{{13}}",
        r"\boxed{{{}}} or 13",
        "**{}** or **13**",
    ),
    *(
        "[{}] [13]",
        "[{}, 13]",
        "({})(13)",
        '"{}" "13"',
        "The answer is {} or 13",
        "The answer is not {}",
        "Answer: {}. Or 13.",
    ),
    *(
        "The answer is {}. The answer is 13.",
        "{} is correct, 13 too",
        "{} is correct and 13 is correct",
        "I choose {} and 13",
    ),
    *(
        "答案是{}或13",
        "答案是{}、13",
        "There are {} dogs and 13 cats.",
        "Of 20 dogs {} bark.",
        "{}!",
        "$1${}",
        "{}$",
        "**{}",
        "1_{}",
    ),
]


@pytest.mark.parametrize("form", NO_NUMBER)
def test_a_number_beside_anything_else_is_none(form):
    answer = form.format(*["12"] * form.count("{}"))
    for solution in ("12", "13", "-13", "20", "1"):
        assert grade_answer(answer, solution) == 0.0


@given(
    st.lists(
        st.sampled_from(
            ["12", "13", "-7", "or", "and", "is", "$", "**", ",", " ", "[", "]", "(", ")", ".", "the answer is "]
        ),
        max_size=9,
    )
)
def test_naming_several_numbers_never_pays(pieces):
    """Whatever stands around them: at most one of the numbers that a text names is what it says."""
    text = "".join(pieces)
    graded = [solution for solution in ("12", "13", "-7") if grade_answer(text, solution) == 1.0]
    assert len(graded) <= 1
    if graded:
        assert {*re.findall("[0-9]+", text)} == {graded[0].strip("-")}


@pytest.mark.parametrize(
    "answer, solution, reward",
    [
        ("Yes.", "Yes", 1.0),
        ("yes", "Yes.", 1.0),
        ("A  cat .", "a cat", 1.0),
        ("是的。", "是的", 1.0),
        ("Yes!", "Yes", 0.0),
        ("Yes, no.", "Yes", 0.0),
        ("Yes. No.", "Yes", 0.0),
        ("", ".", 0.0),
        (".", ".", 1.0),
        ("..", ".", 0.0),
        ("", "B.C", 0.0),
        # Several letters, in order.
        ("A, C", "A,C", 1.0),
        ("a ,c.", "A, C", 1.0),
        ("A，C", "A,C", 1.0),
        ("A、C", "A, C", 1.0),
        ("C,A", "A,C", 0.0),
        ("A or C", "A,C", 0.0),
        ("A C", "A,C", 0.0),
        ("A,B,C", "A,C", 0.0),
        ("A", "A,C", 0.0),
        ("A,C", "A", 0.0),
        ("1, 200", "1,200", 0.0),
        ("1,200", "1, 200", 0.0),
        ("red,blue", "red, blue", 0.0),
    ],
)
def test_texts(answer, solution, reward):
    assert grade_answer(answer, solution) == reward
    if reward:
        assert grade_answer(answer, solution, ["red", "blue", "green"]) == reward


@pytest.mark.parametrize("solution", [None, "", "  ", math.nan, "<answer></answer>"])
def test_a_row_without_solution_is_skipped(solution):
    texts = ["<answer>B</answer>", "nothing"]
    assert both_forms(accuracy_reward, texts, solution=[solution, "B"]) == [None, 0.0]


def test_a_dataset_without_the_column_is_an_error():
    with pytest.raises(ValueError, match=r"`solution` column.*\['answer', 'tag'\]"):
        accuracy_reward(prompts=[""], completions=["<answer>B</answer>"], answer=["B"], tag=["V"])


def test_as_many_solutions_as_completions():
    with pytest.raises(ValueError):
        accuracy_reward(completions=["<answer>B</answer>"] * 2, solution=["B"])


@pytest.mark.parametrize("text", ["<answer>A</answer><answer>B</answer>", "<think><answer>B</answer></think>", "B"])
def test_only_the_one_answer_outside_the_think_block_counts(text):
    assert both_forms(accuracy_reward, [text], solution=["B"]) == [0.0]


def test_completion_text():
    blocks = [{"type": "text", "text": "<answer>"}, {"type": "image"}, {"type": "text", "text": "B</answer>"}]
    assert completion_text([{"role": "assistant", "content": blocks}]) == "<answer>B</answer>"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    assert completion_text([]) == ""
    # A tool's output is not the model's answer.
    messages = [
        {"role": "tool", "content": "<answer>A</answer>"},
        {"role": "assistant", "content": "<answer>B</answer>"},
    ]
    assert extract_answer(completion_text(messages)) == "B"


PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "B", "(B)", "12", "-0", "1e9", ",", ".", "\n", " ", "\x00", "Б"]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join))
SOLUTIONS = st.one_of(
    st.none(), st.integers(), st.floats(), st.sampled_from(["A", "B", "(C)", "0", "12", "red"]), TEXTS
)


OPTION_COLUMNS = st.one_of(
    st.none(), st.lists(st.sampled_from(["red", "B", "12", "a cat", "A. x", "", None, 3]), max_size=4), TEXTS
)


@given(TEXTS, SOLUTIONS, OPTION_COLUMNS)
def test_options_never_raise_and_give_one_letter_at_most(text, solution, options):
    (accuracy,) = both_forms(accuracy_reward, [text], solution=[solution], options=[options])
    assert accuracy is None or 0.0 <= accuracy <= 1.0
    # One answer is right for one letter at most: naming several can't pay.
    answer = f"<answer>{text}</answer>"
    letters = [letter for letter in "ABCDXYZ" if accuracy_reward(completions=[answer], solution=[letter]) == [1.0]]
    assert len(letters) <= 1


def naive_choice(answer, options):
    """All the ways to write the choice of one option, written out."""
    ways = {}
    for letter, text in zip("ABCD", options, strict=True):
        for way in (
            text,
            *(f"{x}{rest}" for x in (letter, letter.lower()) for rest in ("", ".", ")", ":", f". {text}")),
        ):
            ways.setdefault(way, set()).add(letter)
    found = ways.get(answer, set())
    return min(found) if len(found) == 1 else None


@given(
    st.lists(st.sampled_from(["red", "blue", "a cat", "seven", "12", "up"]), min_size=4, max_size=4, unique=True),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(["{0}", "{1}", "{0}.", "{0})", "{0}: ", "{0}. {1}", "{0}, {2}", "{1} {3}", "{0}. {3}", "{0} {1}"]),
)
def test_choices_against_all_ways_written_out(options, one, other, form):
    answer = form.format("ABCD"[one], options[one], "ABCD"[other], options[other]).strip()
    expected = "ABCD"[one] if form == "{0}, {2}" and one == other else naive_choice(answer, options)
    assert chosen_option(answer, option_texts(options)) == expected


@given(TEXTS, SOLUTIONS)
def test_rewards_never_raise_and_stay_in_range(text, solution):
    (form,) = both_forms(format_reward, [text])
    (accuracy,) = both_forms(accuracy_reward, [text], solution=[solution])
    assert form in (0.0, 1.0)
    assert accuracy is None or 0.0 <= accuracy <= 1.0
    if form:
        assert extract_answer(text) is not None
    if accuracy:
        assert extract_answer(text)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_follow_the_formula(value, truth):
    expected = float(value == 0) if truth == 0 else max(0.0, 1.0 - abs(value - truth) / abs(truth))
    assert grade_answer(repr(value), truth) == expected
    assert number(repr(value)) == value


@given(st.text(alphabet="0123456789eE+-.,_ ", max_size=12))
def test_number_reads_no_more_than_python_does(text):
    value = number(text)
    if value is not None:
        assert value == float(text.replace(",", ""))


def test_called_as_trl_calls_it():
    """TRL passes everything by keyword: the dataset columns, and tools of its own that a reward may ignore."""
    columns = {
        "solution": ["B", None],
        "tag": [ModalityTag.V, "A"],
        "options": [["red", "blue"], None],
        "trainer_state": None,
        "log_extra": None,
        "log_metric": None,
    }
    completions = [conversational("<think>x</think><answer>B</answer>")] * 2
    arguments = {"prompts": [[], []], "completions": completions, "completion_ids": [[1], [1]]}
    assert accuracy_reward(**arguments, **columns) == [1.0, None]
    assert format_reward(**arguments, **columns) == [1.0, 1.0]
