"""Length and localisation rewards; what every rule reward does with hostile and with very long completions."""

import math
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import get_soft_overlong_punishment

from maple_trl import rewards
from maple_trl.rewards import AccuracyReward, LengthReward, box_iou_reward, temporal_iou_reward
from maple_trl.rewards.answers import answer_key, chosen_option, extract_bracketed, option_texts
from maple_trl.rewards.judge_prompts import CAPTION_SYSTEM, SCALE
from maple_trl.rewards.judge_texts import caption_text, echoes, harmless, read_plain_grades, says_nothing, think_block
from maple_trl.rewards.localisation import box_iou, interval_iou, parse_box, parse_intervals


def answer(text):
    return f"<think>x</think><answer>{text}</answer>"


# Length


@pytest.mark.parametrize(
    "tokens, reward", [(1, 1.0), (79, 1.0), (80, 1.0), (81, 0.95), (90, 0.5), (99, 0.05), (100, 0.0), (5000, 0.0)]
)
def test_length(tokens, reward):
    assert LengthReward(80, 100)(completions=["red"], completion_ids=[[1] * tokens]) == [pytest.approx(reward)]


@given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 150))
def test_length_is_trls_punishment_plus_one(soft, width, tokens):
    (reward,) = LengthReward(soft, soft + width)(completions=["red"], completion_ids=[[1] * tokens])
    (punishment,) = get_soft_overlong_punishment(soft + width, width)(completion_ids=[[1] * tokens])
    assert reward == pytest.approx(1 + punishment)
    assert 0.0 <= reward <= 1.0


@pytest.mark.parametrize("text", ["", " ", ":", "...", "<></>", "\u200b"])
def test_saying_nothing_is_not_rewarded_for_being_short(text):
    assert LengthReward(80, 100)(completions=[text], completion_ids=[[1]]) == [0.0]
    assert LengthReward(80, 100)(completions=[[{"role": "assistant", "content": text}]], completion_ids=[[1]]) == [0.0]


@pytest.mark.parametrize("soft, hard", [(-1, 5), (5, 5), (6, 5), (0, 0)])
def test_length_refuses_limits(soft, hard):
    with pytest.raises(ValueError, match=rf"0 <= soft_limit < hard_limit .*soft_limit={soft} and hard_limit={hard}"):
        LengthReward(soft, hard)


def test_length_needs_tokens():
    with pytest.raises(ValueError, match="needs `completion_ids`"):
        LengthReward(1, 2)(completions=["red"])


# Time intervals


@pytest.mark.parametrize(
    "text, intervals",
    [
        *(("12-15", [(12, 15)]), ("12.0 - 15.5", [(12, 15.5)]), ("12–15", [(12, 15)]), ("12 — 15", [(12, 15)])),
        *(("12 to 15", [(12, 15)]), ("12s-15s", [(12, 15)]), ("12 s to 15.5 seconds", [(12, 15.5)])),
        *(("[12.0, 15.5]", [(12, 15.5)]), ("(12, 15)", [(12, 15)]), ("[12 - 15]", [(12, 15)]), ("0-1", [(0, 1)])),
        *(("00:12-00:15", [(12, 15)]), ("1:30 - 2:00.5", [(90, 120.5)]), ("1:02:03 – 1:02:10", [(3723, 3730)])),
        *(("90:00-90:01", [(5400, 5401)]), ("59-1:00", [(59, 60)]), ("[00:12, 00:15]", [(12, 15)])),
        *(("1-2, 5-7", [(1, 2), (5, 7)]), ("1-2;5-7", [(1, 2), (5, 7)]), ("1-2 and 5-7", [(1, 2), (5, 7)])),
        *(
            ("[[1, 2], [5, 7]]", [(1, 2), (5, 7)]),
            ("[1, 2], [5, 7]", [(1, 2), (5, 7)]),
            ("1-2\n5-7", [(1, 2), (5, 7)]),
        ),
        *(
            ("[(1, 2), (5, 7)]", [(1, 2), (5, 7)]),
            ("[1-2, 5-7]", [(1, 2), (5, 7)]),
            ("5-7, and 1-3", [(5, 7), (1, 3)]),
        ),
        *(("  [ 1 , 2 ]  ", [(1, 2)]), ("00:12 to 00:15", [(12, 15)])),
    ],
)
def test_intervals_that_are_read(text, intervals):
    assert parse_intervals(text) == intervals


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ":", "-", "[]", "[", "]", "[[]]", "12", "12-", "-15", "12, 15", "[12, 15", "12, 15]", "(12, 15]"),
        *("15-12", "12-12", "[12, 15, 18]", "12-15-18", "1-2,", ",1-2", "1-2 5", "1-2, 15-12", "about 12-15"),
        *("12-15 or so", "from 12 to 15", "1:2-1:3", "1:75-2:00", "1:60:00-2:00:00", "0:0:0:1-2", "12m-15m", "-1-5"),
        *("1e1-2e1", "nan-nan", "0-inf", "0-" + "9" * 400, "٣-٥", "１-２", "1_0-2_0", "1-2 | 3-4", "the whole video"),
    ],
)
def test_intervals_that_are_refused(text):
    assert parse_intervals(text) is None
    assert temporal_iou_reward(completions=[answer(text)], solution=["0-15"]) == [0.0]


INTERVALS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1])), min_size=1
)
FORMS = {
    "dash": lambda pairs: ", ".join(f"{a}-{b}" for a, b in pairs),
    "clock": lambda pairs: "; ".join(f"00:{a:02}-00:{b:02}.0" for a, b in pairs),
    "brackets": lambda pairs: str([list(pair) for pair in pairs]),
}


@given(INTERVALS, INTERVALS, st.sampled_from(list(FORMS)))
def test_overlap_of_intervals_against_counted_seconds(said, truth, form):
    said_seconds = {second for a, b in said for second in range(a, b)}
    true_seconds = {second for a, b in truth for second in range(a, b)}
    expected = len(said_seconds & true_seconds) / len(said_seconds | true_seconds)
    assert interval_iou(said, truth) == pytest.approx(expected)
    for solution in (truth, [list(pair) for pair in truth], FORMS["dash"](truth)):
        (reward,) = temporal_iou_reward(completions=[answer(FORMS[form](said))], solution=[solution])
        assert reward == pytest.approx(expected)


@given(INTERVALS, st.randoms())
def test_order_and_doubled_intervals_do_not_matter(truth, random):
    said = truth + truth[:1]
    random.shuffle(said)
    assert temporal_iou_reward(completions=[answer(FORMS["dash"](said))], solution=[truth]) == [1.0]


def test_naming_more_time_than_is_right_costs():
    answers = ["10-20", "0-100", "0-" + "9" * 300, "10-20, 30-40", ", ".join(f"{i}-{i}.5" for i in range(100))]
    scores = temporal_iou_reward(completions=[answer(text) for text in answers], solution=["10-20"] * 5)
    assert scores == [1.0, 0.1, pytest.approx(0.0), 0.5, pytest.approx(5 / 55)]


# Boxes


@pytest.mark.parametrize(
    "text, box",
    [
        ("[0, 0, 10, 20]", (0, 0, 10, 20)),
        ("(0,0,10,20)", (0, 0, 10, 20)),
        ("0 0 10 20", (0, 0, 10, 20)),
        ("[ 0.1, -0.5 , .5, 1]", None),
        ("[-0.5, +0.25, 0.5, 1]", (-0.5, 0.25, 0.5, 1)),
        *((text, None) for text in ("", ":", "[]", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[3, 0, 1, 2]", "[0, 2, 1, 1]")),
        *((text, None) for text in ("[0, 0, 0, 1]", "[0, 0, 1, 2", "(0, 0, 1, 2]", "[0, 0, 1, 2], [0, 0, 2, 2]")),
        *(
            (text, None)
            for text in ("[0, 0, inf, 1]", "[0, 0, nan, 1]", "[0, 0, 1e3, 1]", "box [0, 0, 1, 1]", "[[0,0,1,1]]")
        ),
        ("[0, 0, 1, " + "9" * 400 + "]", None),
    ],
)
def test_boxes(text, box):
    assert parse_box(text) == box
    (reward,) = box_iou_reward(completions=[answer(text)], solution=[box or [0, 0, 5, 5]])
    assert reward == (1.0 if box else 0.0)


BOXES = st.tuples(st.integers(-6, 6), st.integers(-6, 6), st.integers(1, 8), st.integers(1, 8)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(BOXES, BOXES)
def test_overlap_of_boxes_against_counted_cells(said, truth):
    def cells(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    expected = len(cells(said) & cells(truth)) / len(cells(said) | cells(truth))
    assert box_iou(said, truth) == pytest.approx(expected)
    for solution in (truth, list(truth), str(list(truth)), answer(str(truth))):
        (reward,) = box_iou_reward(completions=[answer(str(list(said)))], solution=[solution])
        assert reward == pytest.approx(expected)


HUGE = st.floats(min_value=-1.7e308, max_value=1.7e308)


@given(st.lists(HUGE, min_size=4, max_size=4), st.lists(HUGE, min_size=4, max_size=4))
def test_no_size_of_number_leaves_the_range(first, second):
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in (first, second)]
    assert 0.0 <= box_iou(*boxes) <= 1.0
    times = [[tuple(sorted(map(abs, pair))) for pair in (numbers[:2], numbers[2:])] for numbers in (first, second)]
    assert 0.0 <= interval_iou(*times) <= 1.0


@pytest.mark.parametrize("reward", [temporal_iou_reward, box_iou_reward])
@pytest.mark.parametrize("solution", [None, "", " ", [], (), math.nan, "<answer> </answer>"])
def test_rows_without_a_solution_are_skipped(reward, solution):
    assert reward(completions=[answer("1-2")], solution=[solution]) == [None]


@pytest.mark.parametrize(
    "reward, solution, said",
    [
        (temporal_iou_reward, "B", "time intervals in seconds with start < end.*'B'"),
        (temporal_iou_reward, [5, 3], r"got \[5, 3\]"),
        (temporal_iou_reward, [[1, 2], [3]], r"got \[\[1, 2\], \[3\]\]"),
        (temporal_iou_reward, [1, 2, 3], "start < end"),
        (temporal_iou_reward, [-1, 2], "start < end"),
        (temporal_iou_reward, [True, 2], "start < end"),
        (temporal_iou_reward, [0, math.inf], "start < end"),
        (temporal_iou_reward, ["1", "2"], "start < end"),
        (temporal_iou_reward, 7.5, "'7.5'"),
        (temporal_iou_reward, [0, 10**400], "start < end"),
        (temporal_iou_reward, [math.nan, 2], "start < end"),
        (box_iou_reward, "B", r"a box \[x1, y1, x2, y2\] with x1 < x2 and y1 < y2, got 'B'"),
        (box_iou_reward, [1, 2, 3], "a box"),
        (box_iou_reward, [3, 0, 1, 1], "x1 < x2"),
        (box_iou_reward, [0, 0, math.nan, 1], "x1 < x2"),
        (box_iou_reward, [[0, 0, 1, 1]], "x1 < x2"),
        (box_iou_reward, [0, 0, 10**400, 1], "x1 < x2"),
    ],
)
def test_a_malformed_solution_is_an_error_that_names_the_row(reward, solution, said):
    good = "1-2" if reward is temporal_iou_reward else "[0, 0, 1, 1]"
    arguments = {"completions": [answer(good)] * 2, "solution": [good, solution]}
    with pytest.raises(ValueError, match=rf"{reward.__name__}: the solution of row 1 of the batch must be .*{said}"):
        reward(**arguments)
    with pytest.raises(ValueError, match=r"row 1 of the batch \(id 'q-7'\)"):
        reward(**arguments, id=["q-6", "q-7"])


@pytest.mark.parametrize("reward", [temporal_iou_reward, box_iou_reward])
def test_a_set_without_the_column_is_an_error(reward):
    with pytest.raises(ValueError, match=rf"{reward.__name__} needs a `solution` column.*\['tag'\]"):
        reward(completions=[answer("1-2")], tag=["V"])


# All rule rewards

BUILTIN = [getattr(rewards, name) for name in rewards.__all__ if name.endswith("_reward")]
SOLUTIONS = {"temporal_iou_reward": "10-20", "box_iou_reward": "[0, 0, 10, 10]"}


def score(reward, texts, prompts=None, **columns):
    """Each text is a group of its own for self-consistency, unless prompts say otherwise."""
    return reward(
        prompts=prompts or [str(i) for i in range(len(texts))],
        completions=list(texts),
        completion_ids=[[1] * 5] * len(texts),
        **({"solution": [SOLUTIONS.get(reward.__name__, "B")] * len(texts)} | columns),
    )


def test_the_names_that_the_command_line_takes():
    assert [reward.__name__ for reward in BUILTIN] == [name for name in rewards.__all__ if name.endswith("_reward")]
    assert {"accuracy_reward", "format_reward", "self_consistency_reward"} < {reward.__name__ for reward in BUILTIN}
    assert LengthReward(1, 2).__name__ == "length_reward"


@pytest.mark.parametrize("reward", [r for r in BUILTIN if r.__name__ != "format_reward"], ids=lambda r: r.__name__)
@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            ":",
            answer(""),
            answer(" "),
            answer(":"),
            answer("."),
            answer("()"),
            answer("\u200b"),
            answer("[]"),
        ),
        *(
            answer("A, B, C, D"),
            answer("A or B"),
            answer("A/B"),
            answer("B and C"),
            answer("A B C D"),
            answer("B. or C."),
        ),
        *("<answer>B</answer>" * 2, "<answer>10-20</answer>" * 2, "<answer>B<answer>B</answer></answer>"),
        *("<answer>B", "B</answer>", "<answer>10-20", "<think><answer>B</answer></think>", "</answer>B<answer>"),
        *("<answer>B</think></answer>", "B", "10-20", "[0, 0, 10, 10]", "<ANSWER>B</ANSWER>"),
        *(
            "＜answer＞B＜/answer＞",
            answer("\n\n"),
            answer("<>"),
            "<think>B</think>",
            "give 1.0 to all",
        ),
    ],
)
def test_canaries_earn_nothing(reward, text):
    assert score(reward, [text]) == [0.0]
    assert score(reward, [text] * 4, prompts=["same"] * 4) == [0.0] * 4


@pytest.mark.parametrize("reward", BUILTIN, ids=lambda r: r.__name__)
def test_the_control_of_the_canaries(reward):
    """The same check passes a right answer, so it is not that everything scores 0."""
    assert score(reward, [answer(SOLUTIONS.get(reward.__name__, "B"))]) == [1.0]


LONG = {  # texts of `n` characters or a few more
    "prose": lambda n: "word " * (n // 5),
    "spaces": lambda n: answer(" " * n),
    "newlines": lambda n: answer("B." + "\n" * n + "C"),
    "commas": lambda n: answer("B. red" + ", " * (n // 2)),
    "answers": lambda n: "<answer>B</answer>" * (n // 18),
    "open answers": lambda n: "<answer>" * (n // 8),
    "open and closed": lambda n: "<answer>" * (n // 17) + "</answer>" * (n // 17),
    "closed and open": lambda n: "<think>" + "</think><answer></answer>x" * (n // 26),
    "thinks": lambda n: "<think>" * (n // 15) + "</think>" * (n // 15) + answer("B"),
    "think and answer": lambda n: "<think></think>" * (n // 15) + "<answer>B</answer>" + "<think></think>" * 2,
    "long answer": lambda n: answer("B. " + "red " * (n // 4)),
    "letters": lambda n: answer("B, " * (n // 3)),
    "options": lambda n: answer("B. " + "red blue " * (n // 9)),
    "brackets": lambda n: answer("[" * n),
    "digits": lambda n: answer("1" * n),
    "fraction": lambda n: answer("0." + "1" * n + "x"),
    "thousands": lambda n: answer("1" + ",111" * (n // 4) + "x"),
    "two numbers": lambda n: answer("1" * (n // 2) + "-" + "1" * (n // 2) + "x"),
    "intervals": lambda n: answer("1-2, " * (n // 5) + "3-4"),
    "intervals, then none": lambda n: answer("[" + "1-2, " * (n // 5) + "]"),
    "boxes": lambda n: answer("[1, 2, 3, 4], " * (n // 14)),
    "times": lambda n: answer("0:01" + ":01" * (n // 3)),
    "combining": lambda n: answer("e\u0301\u0323" * (n // 3)),
}


def seconds(function, argument):
    """The least of a few runs: what the function needs, without what others on the machine take."""
    best = math.inf
    for _ in range(2):
        began = time.process_time()
        function(argument)
        best = min(best, time.process_time() - began)
    return best


def growth(function, make, small=10_000, times=16):
    """How much longer `times` the text takes; a floor keeps noise out of what takes next to no time."""
    floor = 2e-4
    return max(seconds(function, make(small * times)), floor) / max(seconds(function, make(small)), floor)


# Linear is 16 (and less below the floor), quadratic 256.
BOUND = 80


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.matrix(cases=6)
def test_long_completions_take_linear_time(shape):
    options = [["red", "blue", "green", "a cat"]]

    def all_rewards(text):
        for reward in (*BUILTIN, AccuracyReward("brackets")):
            (plain,), (chosen,) = score(reward, [text]), score(reward, [text], options=options)
            assert 0.0 <= plain <= 1.0 and 0.0 <= chosen <= 1.0

    assert growth(all_rewards, LONG[shape]) < BOUND


# Marks and words around an option, over and over.
LONG_OPTIONS = {
    "emphasis": "**",
    "macros": "\\text{",
    "boxes": "\\boxed{",
    "brackets": "[A] ",
    "open brackets": "[A",
    "dollars": "$B",
    "announced": "the answer is ",
    "announced elsewhere": "答案是",
    "spaces": " ",
    "said behind": " is the correct answer",
    "second options": "option B, **B** ",
}


@pytest.mark.parametrize("shape", LONG_OPTIONS)
@pytest.mark.matrix(cases=8)
def test_forms_of_options_take_linear_time(shape):
    texts = option_texts(["red", "blue", "green", "a cat"])

    def read(text):
        for start in ("", "B. ", "The answer is:"):
            chosen_option(f"{start}{text}B")
            chosen_option(f"{start}{text}B", texts)
        answer_key(text)
        extract_bracketed(text)

    assert growth(read, lambda n: LONG_OPTIONS[shape] * (n // len(LONG_OPTIONS[shape])), small=4_000) < BOUND


@pytest.mark.parametrize("shape", LONG)
def test_what_judges_do_by_rule_takes_linear_time(shape):
    """Reading the judged text, the rules that need no call, and making text harmless."""

    def by_rule(text):
        for read in (caption_text, think_block):
            says_nothing(read(text) or "")
        echoes(text[:16_000], CAPTION_SYSTEM)
        harmless(text)
        read_plain_grades(text, ("missing", "errors", "fusion"), SCALE)

    assert growth(by_rule, LONG[shape]) < BOUND


def test_the_control_of_linear_time():
    """The same measure shows a quadratic pattern."""
    quadratic = re.compile(r"(?:x)*?y")

    def search(text):
        quadratic.search(text)

    assert growth(search, lambda n: "x" * n, small=500) > BOUND


TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<answer>", "</answer>", "[", "]", "(", "1", "12:30", "-", ", ", "B.", " ", "to"]
        ),
        max_size=14,
    ).map("".join),
    st.text(alphabet="0123456789:.,-[]() sto", max_size=20).map(answer),
)


@given(TEXTS)
def test_rewards_never_raise_and_stay_in_range(text):
    for reward in BUILTIN:
        (plain,) = score(reward, [text])
        (chat,) = score(reward, [[{"role": "assistant", "content": text}]])
        assert plain == chat and 0.0 <= plain <= 1.0
