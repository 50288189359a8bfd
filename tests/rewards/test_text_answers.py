"""Answers in words: texts that are read off, sentences, and which object is where."""

import pickle
import sys

import pytest

from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.rewards import load_rewards
from maple_trl.rewards import AccuracyReward, ObjectPlaceReward, accuracy_reward, object_place_reward
from maple_trl.rewards.calls import check_rewards, required_columns
from maple_trl.rewards.places import parse_object_place
from maple_trl.rewards.text_scores import rouge_mean, word_error_score


def answer(text):
    return f"<think>x</think><answer>{text}</answer>"


# Word errors


def edits(said, right):
    """Word error rate by the textbook: the reference."""
    row = list(range(len(said) + 1))
    for i, word in enumerate(right, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(said, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1] / len(right)


@pytest.mark.parametrize(
    "said, right",
    [
        ("no exit", "no entry"),
        ("please do not enter here", "do not enter"),
        ("", "do not enter"),
        ("enter not do", "do not enter"),
        ("a b c d e f g", "x"),
        ("do not enter", "do not enter"),
    ],
)
def test_word_errors(said, right):
    assert word_error_score(said, right) == pytest.approx(max(0.0, 1.0 - edits(said.split(), right.split())))


def test_case_and_punctuation_are_no_errors():
    assert word_error_score("NO  entry!", "No entry.") == 1.0
    assert word_error_score("!", "!") == 1.0 and word_error_score("?", "!") == 0.0


def test_texts_without_spaces_are_compared_by_characters():
    assert word_error_score("今天天气真好", "今天天气很好") == pytest.approx(5 / 6)
    assert rouge_mean("今天天气真好", "今天天气很好") == pytest.approx((5 / 6 + 3 / 5 + 5 / 6) / 3)
    assert word_error_score("ไป", "今天") == 0.0 == rouge_mean("猫", "狗")


# ROUGE


def common(said, right, n):
    pairs = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in (said, right)]
    same = sum(min(pairs[0].count(pair), pairs[1].count(pair)) for pair in set(pairs[1]))
    return 2 * same / (len(pairs[0]) + len(pairs[1])) if same else 0.0


def test_rouge():
    said, right = "the dog barks at the man", "the dog barks at a cat"
    one, two = (common(said.split(), right.split(), n) for n in (1, 2))
    longest = 2 * 4 / 12  # the dog barks at
    assert rouge_mean(said, right) == pytest.approx((one + two + longest) / 3)
    assert rouge_mean(right, right) == rouge_mean("Dog.", "dog") == rouge_mean("собака лает", "Собака лает!") == 1.0
    assert rouge_mean("cat", "dog") == 0.0


# Accuracy by kind


def test_kinds_of_answers():
    reward = AccuracyReward(text_scores={"OCR": "wer", "free-form": "rouge"})
    columns = {
        "solution": ["No entry", "a dog barks", "No entry", "B", "10", None],
        "problem_type": ["OCR", "free-form", "other", "multiple choice", None, "OCR"],
    }
    completions = [answer(text) for text in ("no exit", "the dog barks", "no exit", "B", "9", "x")]
    found = reward(completions=completions, **columns)
    assert found == [0.5, pytest.approx(rouge_mean("the dog barks", "a dog barks")), 0.0, 1.0, 0.9, None]
    plain = accuracy_reward(completions=completions, **columns)
    assert plain == [0.0, 0.0, 0.0, 1.0, 0.9, None]  # the control: equality alone
    assert reward(completions=["no exit"] * 6, **columns) == [0.0] * 5 + [None]
    assert pickle.loads(pickle.dumps(reward))(completions=completions, **columns) == found  # as TRL's workers get it


def test_the_column_of_kinds_is_asked_for():
    reward = AccuracyReward(text_scores={"OCR": "wer"}, type_column="kind")
    assert required_columns(reward) == ["solution", "kind"] and required_columns(AccuracyReward()) == ["solution"]
    with pytest.raises(ValueError, match="needs a column 'kind'"):
        check_rewards([reward], ["prompt", "solution"], "train")
    with pytest.raises(ValueError, match="needs a column `kind` in the dataset"):
        reward(completions=[answer("B")], solution=["B"])


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"text_scores": {"OCR": "bleu"}}, "a score of texts must be one of wer, rouge, got 'bleu'"),
        ({"text_scores": {}}, "text_scores must map kinds of rows to scores"),
        ({"text_scores": "wer"}, "text_scores must map kinds of rows to scores"),
        ({"text_score": {"OCR": "wer"}}, "unknown field 'text_score'; did you mean text_scores"),
    ],
)
def test_scores_that_there_are_not(entry, message):
    with pytest.raises(SetupError, match=message):
        load_rewards([{"reward": "accuracy_reward"} | entry])


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match=r"needs jiwer, which is not installed: pip install 'maple-trl\[texts\]'"):
        AccuracyReward(text_scores={"OCR": "wer"})


# Objects and places


@pytest.mark.parametrize(
    "said, reward",
    [
        ("dog, left", 1.0),
        ("The dog is on the left side of the picture.", 1.0),
        ("left: the dogs", 1.0),
        ("dog in the centre", 0.75),
        ("dog", 0.5),
        ("dog, right", 0.5),
        ("dog, left and right", 0.5),
        ("cat, left", 0.0),
        ("left", 0.0),
        ("", 0.0),
        ("brown dog, left", pytest.approx(2 / 3)),
        ("dog, cat, man, car, left", 0.0),
        ("dog or cat, left", 0.0),
        ("dog on the left, near the tree", 1.0),
        ("puppy, left", 0.0),
    ],
)
def test_objects_and_places(said, reward):
    assert object_place_reward(completions=[answer(said)], solution=["dog, left"]) == [reward]


def test_each_axis_that_the_solution_names_counts_alike():
    def grade(said, right):
        return ObjectPlaceReward(0.0)(completions=[answer(said)], solution=[right])[0]

    assert grade("man, bottom left", "man, bottom left") == 1.0
    assert grade("man, top left", "man, bottom left") == 0.5
    assert grade("man, left", "man, bottom left") == 0.5
    assert grade("man in the middle", "man, bottom left") == 0.25
    assert grade("man, bottom left", "man, left") == 1.0
    assert grade("man in the background on the right", "man, right, in the back") == 1.0
    assert grade("man, bottom centre", "man, bottom centre") == 1.0
    assert grade("man", "man") == 1.0


def test_as_many_objects_as_the_solution_has():
    said = [
        answer(text) for text in ("man and dog, left", "the dog and the man on the left", "man, left", "man, dog, cat")
    ]
    found = object_place_reward(completions=said, solution=["man and dog, left"] * 4)
    assert found == [1.0, 1.0, pytest.approx(2 / 3), 0.0]


def test_synonyms_and_weights():
    reward = ObjectPlaceReward(0.8, {"dog": ["puppy", "small hound"]})
    said = [answer(text) for text in ("puppy, left", "the small hound on the right", "cat, left")]
    assert reward(completions=said, solution=["the dog, left"] * 3) == [1.0, 0.8, 0.0]
    assert reward(completions=[answer("puppy, left")], solution=["puppy, left"]) == [1.0]


def test_what_may_be_mistaken_for_a_place_and_letters():
    assert parse_object_place("the screen on the left").object == ("screen",)
    assert object_place_reward(completions=[answer("A"), answer("B")], solution=["A", "A"]) == [1.0, 0.0]
    assert object_place_reward(completions=["dog, left", answer("dog")], solution=["dog", None]) == [0.0, None]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"object_weight": 2}, r"object_weight must be a number in \[0, 1\], got 2"),
        ({"synonyms": {"dog": "puppy"}}, "synonyms must map a name to a list of others"),
        ({"weight": 1}, "unknown field 'weight'"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(SetupError, match=message):
        load_rewards([{"reward": "object_place_reward"} | values])
    (reward,) = load_rewards([{"reward": "object_place_reward", "object_weight": 0.5, "name": "where"}])
    assert reward.__name__ == "where"
    with pytest.raises(ValueError, match="the solution of row 'r1' must name an object, such as"):
        reward(completions=[answer("dog")], solution=["left"], id=["r1"])
    with pytest.raises(ValueError, match="needs a `solution` column"):
        reward(completions=[answer("dog")])
