"""Sampled accuracy: which questions are asked, how they are scored, and that training does not notice."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from omni_runs import build_trainer

from maple_trl.data.synthetic import write_seven_tags
from maple_trl.evaluation import choose_questions, sampled_accuracy
from maple_trl.modalities import ModalityTag
from maple_trl.rewards import accuracy_reward


TAGS = st.sampled_from(["V", "av", "S", "SVA", None])


def row(i, tag, solution="A"):
    return {"id": i, "tag": tag, "prompt": [{"role": "user", "content": "?"}], "solution": solution}


@given(tags=st.lists(TAGS, min_size=1, max_size=40), per_tag=st.integers(1, 8), seed=st.integers(0, 5))
def test_questions_are_at_most_so_many_of_each_tag_and_repeatable(tags, per_tag, seed):
    rows = [row(i, tag) for i, tag in enumerate(tags)]
    chosen = choose_questions(rows, per_tag, seed)
    assert chosen == choose_questions(rows, per_tag, seed)
    assert chosen == choose_questions(Dataset.from_list(rows), per_tag, seed)
    assert len({r["id"] for r in chosen}) == len(chosen)
    for tag in set(tags):
        assert sum(r["tag"] == tag for r in chosen) == min(per_tag, tags.count(tag))
    order = [list(ModalityTag).index(ModalityTag.parse(r["tag"])) for r in chosen if r["tag"]]
    assert order == sorted(order)


def answer(letter):
    return f"<think>x</think><answer>{letter}</answer>"


def test_accuracy_by_tag_against_counting_by_hand():
    rows = [
        row(i, tag, solution) for i, (tag, solution) in enumerate([("V", "A"), ("V", "B"), ("VA", "A"), ("S", "A")])
    ]
    given_answers = {0: answer("A"), 1: answer("A"), 2: answer("A"), 3: None}
    result = sampled_accuracy(lambda asked: [given_answers[r["id"]] for r in asked], rows, accuracy_reward)
    assert result.accuracy == {"all": pytest.approx(2 / 3), "V": 0.5, "VA": 1.0}
    assert result.questions == {"all": 3, "V": 2, "VA": 1}
    assert result.unusable == 1


def test_a_reward_is_told_of_every_row_all_that_some_row_has():
    """Questions given as mappings need not have the same columns; of a text the completion is a text."""
    told = {}

    def score(prompts, completions, **columns):
        told.update(columns, completions=completions)
        return [1.0] * len(prompts)

    rows = [row(0, "V") | {"prompt": "Which?"}, row(1, "V") | {"choices": ["red", "blue"]}]
    sampled_accuracy(lambda asked: [answer("A")] * 2, rows, score)
    one = told["id"].index(1)
    assert told["choices"][one] == ["red", "blue"] and told["choices"][1 - one] is None
    assert told["completions"][one] == [{"role": "assistant", "content": answer("A")}]
    assert told["completions"][1 - one] == answer("A")


def test_rows_without_a_solution_do_not_count():
    rows = [row(0, "V"), row(1, "V", None)]
    result = sampled_accuracy(lambda asked: [answer("A")] * len(asked), rows, accuracy_reward)
    assert result.questions == {"all": 1, "V": 1}
    with pytest.raises(ValueError, match="None of 1 questions could be scored"):
        sampled_accuracy(lambda asked: [answer("A")], [row(0, "V", None)], accuracy_reward)
    with pytest.raises(ValueError, match="None of 1 questions"):
        sampled_accuracy(lambda asked: [None], [row(0, "V")], accuracy_reward)


@pytest.mark.slow
def test_through_the_trainer_repeatable_and_without_touching_the_run(tmp_path):
    data = write_seven_tags(tmp_path, prompts_per_tag=2, seed=1)
    trainer = build_trainer(tmp_path, data["train"])
    rows = data["test"].to_list()
    trainer.model.train()
    state = torch.get_rng_state()
    weights = {n: p.clone() for n, p in trainer.model.state_dict().items()}
    results = []
    for batch_size in (None, 5):

        def generate(asked, batch_size=batch_size):
            texts = trainer.generate_completions(asked, batch_size)
            results.append(texts)
            return texts

        result = sampled_accuracy(generate, rows, accuracy_reward, seed=3)
        assert result.questions["all"] == len(rows) == 14
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.model.training
    again = sampled_accuracy(trainer.generate_completions, rows, lambda completions, **k: [1.0] * len(completions))
    assert set(again.accuracy.values()) == {1.0}
    first = []
    sampled_accuracy(
        lambda asked: first.extend(trainer.generate_completions(asked)) or first, rows, accuracy_reward, seed=3
    )
    assert first == results[0] and len(set(first)) > 1
