"""Self-consistency: the vote of a group, its ties, its groups, and what has no vote."""

import inspect
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maple_trl.rewards import SelfConsistencyReward, self_consistency_reward
from maple_trl.rewards.answers import answer_key


def said(*answers):
    return [f"<think>x</think><answer>{answer}</answer>" for answer in answers]


def vote(*answers, **columns):
    """The rewards of one group, as plain and as conversational completions."""
    texts = said(*answers)
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    plain = self_consistency_reward(prompts=["q"] * len(texts), completions=texts, **columns)
    question = [{"role": "user", "content": "q"}]
    assert self_consistency_reward(prompts=[question] * len(texts), completions=chats, **columns) == plain
    return plain


@pytest.mark.parametrize(
    "answers, rewards",
    [
        (["B", "B", "C"], [1, 1, 0]),
        (["C", "B", "B"], [0, 1, 1]),
        (["B", "(b)", "B.", "b. red", "C"], [1, 1, 1, 1, 0]),
        (["12", "12.0", "1.2e1", "13"], [1, 1, 1, 0]),
        (["13", "$12$", "The answer is 12.", "13 or 12", "−12"], [0, 1, 1, 0, 0]),
        (["Yes.", "yes", "No"], [1, 1, 0]),
        (["0", "-0.0", "1"], [1, 1, 0]),
        (["1,200", "1200", "1.2"], [1, 1, 0]),
        (["Red  cat", "red CAT", "blue cat"], [1, 1, 0]),
        # Alike for the eye only, Cyrillic: a text, not the option. The wide letter is one way to write it, as marks are.
        (["B", "В", "B"], [1, 0, 1]),
        (["C", "Ｂ", "**B**", "选B"], [0, 1, 1, 1]),
        # No vote, though they are the most.
        (["", "", "", "B"], [0, 0, 0, 1]),
        ([":", ":", ":", "B"], [0, 0, 0, 1]),
        (["A or B", "A or B", "B. or C.", "B. or C.", "C"], [0, 0, 0, 0, 1]),
        (["A, B, C, D"] * 4, [0, 0, 0, 0]),
        ([":"] * 4, [0, 0, 0, 0]),
        (["B"], [1]),
        ([], []),
    ],
)
def test_the_most_common_answer_is_right(answers, rewards):
    assert vote(*answers) == rewards


def test_what_is_no_answer_has_no_vote():
    texts = [
        "B",
        "B",
        "<think><answer>B</answer></think>",
        "<answer>B</answer><answer>B</answer>",
        "<answer>B",
        *said("C"),
    ]
    assert self_consistency_reward(prompts=["q"] * 6, completions=texts) == [0, 0, 0, 0, 0, 1]


def test_with_options_only_the_choice_of_one_is_an_answer():
    answers = ["I do not know", "I do not know", "I do not know", "red", "A", "B. red"]
    assert vote(*answers) == [1, 1, 1, 0, 0, 0]
    for name in ("options", "choices"):
        assert vote(*answers, **{name: [["red", "blue"]] * 6}) == [0, 0, 0, 1, 1, 0]
    # Each row has its own options; another row's do not matter.
    texts, ids = said("red", "A", "red", "A"), [0, 0, 1, 1]
    options = [["red", "blue"]] * 2 + [["blue", "red"]] * 2
    assert self_consistency_reward(completions=texts, group_ids=ids, options=options) == [1, 1, 1, 0]


@pytest.mark.parametrize(
    "logprobs, right",
    [
        (None, "A"),
        ([None] * 4, "A"),
        ([[-1.0], [-0.5], [-2.0], [-0.9]], "B"),
        ([[-1.0], [-0.5], [-0.1], [-0.9]], "A"),
        # The mean over tokens, not the sum: a long answer is not a worse one.
        ([[-1.0], [-0.5] * 40, [-1.0], [-1.0]], "B"),
        # The best completion counts, not the mean over an answer's completions.
        ([[-0.1], [-0.2], [-9.0], [-0.2]], "A"),
        ([None, None, None, [-9.0]], "B"),
        ([[], [-math.inf], [math.nan], [-50.0]], "B"),
        ([[-math.inf]] * 4, "A"),
        ([[-0.5]] * 4, "A"),
        (torch.tensor([[-1.0, -1.0], [-0.5, -0.5], [-2.0, 0.0], [-3.0, 0.0]]), "B"),
    ],
)
def test_ties_go_to_the_most_confident_completion(logprobs, right):
    rewards = vote("A", "B", "A", "B", completion_logprobs=logprobs)
    assert rewards == ([1, 0, 1, 0] if right == "A" else [0, 1, 0, 1])


def test_confidence_decides_nothing_but_ties():
    assert vote("A", "A", "B", completion_logprobs=[[-9.0], [-9.0], [-0.1]]) == [1, 1, 0]
    # A confident completion without an answer, or with a rarer one, has no say in the tie.
    logprobs = [[-5.0], [-4.0], [-5.0], [-5.0], [-0.1], [-0.1]]
    assert vote("A", "B", "A", "B", "", "C", completion_logprobs=logprobs) == [0, 1, 0, 1, 0, 0]


ANSWERS = {
    "B": "B",
    "(b)": "B",
    "B.": "B",
    "C": "C",
    "7": 7,
    "7.0": 7,
    "red": "red",
    "RED": "red",
    "": None,
    "A, B": None,
}


@given(
    st.lists(
        st.tuples(
            st.sampled_from("pqr"),
            st.sampled_from(list(ANSWERS)),
            st.one_of(st.none(), st.lists(st.integers(-8, 0), max_size=3)),
        ),
        max_size=16,
    )
)
def test_against_a_count_by_hand(rows):
    groups, answers, logprobs = zip(*rows, strict=True) if rows else ((), (), ())
    expected = [0.0] * len(rows)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group and ANSWERS[answers[i]] is not None]
        counts = [sum(ANSWERS[answers[j]] == ANSWERS[answers[i]] for j in members) for i in members]
        best = None
        for i, count in zip(members, counts, strict=True):
            confidence = -1e9 if not logprobs[i] else sum(logprobs[i]) / len(logprobs[i])
            if count == max(counts) and (best is None or confidence > best[0]):
                best = (confidence, ANSWERS[answers[i]])
        for i in members:
            expected[i] = float(ANSWERS[answers[i]] == best[1])
    texts = said(*answers)
    got = self_consistency_reward(completions=texts, group_ids=list(groups), completion_logprobs=list(logprobs))
    assert got == expected
    # Told by the prompts, the groups are the same.
    assert (
        self_consistency_reward(prompts=list(groups), completions=texts, completion_logprobs=list(logprobs))
        == expected
    )


def test_groups_need_not_be_consecutive():
    prompts = [[{"role": "user", "content": text}] for text in "abababab"]
    assert self_consistency_reward(prompts=prompts, completions=said(*"BCBCCBDD")) == [1, 1, 1, 1, 0, 0, 0, 0]
    order = random.Random(3).sample(range(8), 8)
    shuffled = self_consistency_reward(
        prompts=[prompts[i] for i in order], completions=[said(*"BCBCCBDD")[i] for i in order]
    )
    assert [shuffled[order.index(i)] for i in range(8)] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_group_ids_come_before_prompts():
    texts = said("B", "C", "C", "B")
    assert self_consistency_reward(prompts=["q"] * 4, completions=texts) == [1, 0, 0, 1]
    assert self_consistency_reward(prompts=["q"] * 4, completions=texts, group_ids=[0, 0, 1, 1]) == [1, 0, 1, 0]
    assert self_consistency_reward(prompts=list("abcd"), completions=texts, group_ids=["x"] * 4) == [1, 0, 0, 1]


def picture(shade):
    return Image.new("RGB", (4, 4), (shade, 0, 0))


@pytest.mark.parametrize(
    "one, same, other",
    [
        (picture(1), picture(1), picture(2)),
        (picture(1), picture(1), Image.new("L", (4, 4), 1)),
        (np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((3, 2))),
        (b"\x00", b"\x00", b"\x01"),
        ({"path": "a.mp4", "fps": 2}, {"fps": 2, "path": "a.mp4"}, {"path": "b.mp4", "fps": 2}),
    ],
)
def test_prompts_are_compared_by_content(one, same, other):
    """Copies of one prompt are one group, as are the rows that a data set reads anew for each completion."""

    def prompt(medium):
        return [{"role": "user", "content": [{"type": "image", "image": medium}, {"type": "text", "text": "q"}]}]

    texts = said("B", "C", "B", "C")
    same_group = [prompt(medium) for medium in (one, same, same, one)]
    assert self_consistency_reward(prompts=same_group, completions=texts) == [1, 0, 1, 0]
    two_groups = [prompt(medium) for medium in (one, other, same, other)]
    assert self_consistency_reward(prompts=two_groups, completions=texts) == [1, 1, 1, 1]


@pytest.mark.parametrize("column", ["video", "audio", "subtitle", "image", "images", "tag", "audio_in_video"])
def test_rows_that_share_a_question_are_told_apart_by_what_they_are_fed(column):
    texts = said("B", "C", "C", "B")
    fed = {column: ["a", "a", "b", "b"]}
    assert self_consistency_reward(prompts=["q"] * 4, completions=texts, **fed) == [1, 0, 1, 0]
    assert self_consistency_reward(prompts=["q"] * 4, completions=texts, other=["a", "a", "b", "b"]) == [1, 0, 0, 1]


def test_what_cannot_be_grouped_is_an_error():
    with pytest.raises(ValueError, match="needs `group_ids` or `prompts`"):
        self_consistency_reward(completions=said("B"))
    with pytest.raises(ValueError, match="they hold object, which it can't compare by content; hand over `group_ids`"):
        self_consistency_reward(prompts=[[{"role": "user", "content": [{"video": object()}]}]], completions=said("B"))
    for column in ("group_ids", "completion_logprobs", "options"):
        arguments = {"group_ids": [1, 1], column: [None]}
        with pytest.raises(ValueError, match=rf"{column}.* must have one entry per completion \(2\), got 1"):
            self_consistency_reward(completions=said("B", "B"), **arguments)


@pytest.mark.parametrize(
    "answer", [None, "", " ", ":", "...", "()", "A or B", "(A) (B)", "A. red or B. blue", "A/B/C"]
)
def test_what_says_nothing_has_no_key(answer):
    assert answer_key(answer) is None


def test_keys_tell_kinds_apart():
    keys = [answer_key(answer) for answer in ("B", "12", "b2", "red", "twelve")]
    assert keys == [("option", "B"), ("number", 12.0), ("text", "b2"), ("text", "red"), ("text", "twelve")]
    assert answer_key("blue", ["red", "blue"]) == answer_key("(b)", ["red", "blue"]) == ("option", "B")


def test_answers_in_brackets_vote_too():
    texts, prompts = ["[B]", "so [b]", "<think>[C]</think> **[B]**", "[C]"], ["q"] * 4
    assert self_consistency_reward(prompts=prompts, completions=texts) == [0.0] * 4  # none has an answer in tags
    assert self_consistency_reward(prompts=prompts, completions=texts, answer_format="brackets") == [1, 1, 1, 0]
    reward = SelfConsistencyReward("brackets")
    assert reward(prompts, texts, None) == [1, 1, 1, 0]
    assert reward(completions=texts, group_ids=[0, 0, 1, 1], completion_logprobs=[None, None, [-2.0], [-1.0]]) == [
        1,
        1,
        0,
        1,
    ]
    # A column says it row by row; a row without a word of it has tags.
    mixed = [*texts[:2], *said("B", "C")]
    forms = ["brackets", "brackets", "tags", None]
    assert self_consistency_reward(prompts=prompts, completions=mixed, answer_format=forms) == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="answer_format must be one of tags, brackets, got 'braces'"):
        SelfConsistencyReward("braces")


def test_the_trainer_sees_what_the_class_asks_for():
    named = set(inspect.signature(SelfConsistencyReward()).parameters)
    assert {
        "group_ids",
        "completion_logprobs",
    } <= named and SelfConsistencyReward().__name__ == "self_consistency_reward"
