"""What MAPO logs per tag, against naive sums over the recorded rows and tokens; its gradient probe's refusals."""

import math
from collections import defaultdict
from statistics import fmean, pstdev, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_mapo import DEFAULTS, Diary, G, Watched, logs, tags_in, take, varied
from tiny_models import build_tiny

from maple_trl import MAPOConfig
from maple_trl.algorithms import clipped_tokens
from maple_trl.trainers.common.checkpoint import ResumeError
from maple_trl.trainers.common.tag_metrics import RunningMeans


pytestmark = pytest.mark.slow


class Tokens(Watched):
    """Notes tag, ratio, advantage and entropy of each token that is trained on, by optimizer step."""

    def __init__(self, *args, **kwargs):
        self.tokens = defaultdict(list)
        super().__init__(*args, **kwargs)

    def _add_to_optimizer_step(self, flight):
        logps, entropies, inputs = flight.logps.detach(), flight.entropies.detach(), flight.inputs
        tags = {prompt.key: tag for prompt, tag in zip(*self.tags_of_keys, strict=True)}
        old = inputs.get("old_per_token_logps")
        for i, prompt in enumerate(inputs["omni_prompts"]):
            for t, counted in enumerate(inputs["completion_mask"][i].tolist()):
                if counted:
                    then = logps[i, t] if old is None else old[i, t]
                    ratio = math.exp(float(logps[i, t] - then))
                    token = (tags[prompt.key], ratio, float(inputs["advantages"][i]), float(entropies[i, t]))
                    self.tokens[self.state.global_step].append(token)
        super()._add_to_optimizer_step(flight)

    def train(self):
        rows = self.train_dataset.to_list()
        self.tags_of_keys = self.encode_rows(rows)[1], [row["tag"] for row in rows]
        return super().train()


@pytest.fixture
def build(seven_tags, tmp_path):
    """A trainer of a tiny random model; more arguments are fields of the config."""

    def make(dataset, reward, trainer_class=Tokens, eval_dataset=None, **options):
        model, processor = build_tiny("qwen2_5_omni")
        options = {"output_dir": str(tmp_path / "run"), "media_root": str(seven_tags[0]), **DEFAULTS, **options}
        given = {"train_dataset": dataset, "eval_dataset": eval_dataset, "processing_class": processor}
        return trainer_class(model, reward, MAPOConfig(**options), **given)

    return make


# Rewards


def means(rows):
    """Per tag and over all, of (tag, value) pairs."""
    found = defaultdict(list)
    for tag, value in rows:
        if value is not None:
            found[tag].append(value)
            found["all"].append(value)
    return {tag: fmean(values) for tag, values in found.items()}


def pairs(call):
    return list(zip(call["tags"], call["rewards"], strict=True))


def mean_of_means(calls):
    """What an average of the batches' averages would be."""
    each = [means(pairs(call)) for call in calls]
    return {tag: fmean([found[tag] for found in each if tag in found]) for tag in set().union(*each)}


def test_an_evaluation_weighs_rows_and_not_batches(seven_tags, build):
    """Batches of two prompts, the last of one; a completion without a score counts nowhere."""
    data = take(seven_tags[1], VA=3, AS=2)
    values = dict(zip(data["id"], [1.0, 0.25, 0.0, 0.75, 0.125], strict=True))
    diary = Diary(lambda one, tag, copy, call: None if copy == 1 and values[one] == 1.0 else values[one])
    options = {"eval_dataset": data, "num_generations_eval": 2, "per_device_eval_batch_size": 4}
    options["task_reward"] = "diary"
    trainer = build(take(seven_tags[1], S=2), diary, Watched, **options)
    found = trainer.evaluate()
    assert sorted(len(call["ids"]) for call in diary.calls) == [2, 4, 4]
    expected = means(pair for call in diary.calls for pair in pairs(call))
    assert expected["VA"] == pytest.approx((1.0 + 2 * 0.25 + 2 * 0.0) / 5)
    other = mean_of_means(diary.calls)
    assert other["all"] != pytest.approx(expected["all"], abs=1e-3)
    for tag in ("VA", "AS", "all"):
        assert found[f"eval_tag/{tag}/reward"] == pytest.approx(expected[tag], abs=1e-6)
        assert found[f"eval_tag/{tag}/accuracy"] == pytest.approx(expected[tag], abs=1e-6)
    assert found["eval_tag/VA/unscorable"] == pytest.approx(1 / 6)
    assert found["eval_tag/all/unscorable"] == pytest.approx(1 / 10)
    again = trainer.evaluate()
    assert again["eval_tag/all/reward"] == pytest.approx(expected["all"], abs=1e-6)


def test_a_log_entry_weighs_all_rows_since_the_last_alike(seven_tags, build):
    """Mixed batches hold a tag more or less often, and groups differ in what they are worth."""
    data = take(seven_tags[1], V=4, S=4, VA=4)
    number = {one: i for i, one in enumerate(data["id"])}
    spread = {one: 0.0 if i % 3 == 0 else i / 100 for one, i in number.items()}
    diary = Diary(lambda one, tag, copy, call: number[one] / 24 + copy * spread[one])
    options = {
        "task_reward": "diary",
        "batching": "mixed",
        "advantage_scope": "group",
        "per_device_train_batch_size": 6,
    }
    trainer = build(data, diary, Watched, logging_steps=4, max_steps=8, **options)
    trainer.train()
    assert len(diary.calls) == 8 and len(logs(trainer)) == 2
    differ = []
    for entry, calls in zip(logs(trainer), (diary.calls[:4], diary.calls[4:]), strict=True):
        expected, other = means(pair for call in calls for pair in pairs(call)), mean_of_means(calls)
        advantages, dull = defaultdict(list), defaultdict(list)
        for call in calls:
            for i in range(0, len(call["ids"]), G):
                group, tag = call["rewards"][i : i + G], call["tags"][i]
                for name in (tag, "all"):
                    advantages[name] += [(r - fmean(group)) / (stdev(group) + 1e-4) for r in group]
                    dull[name].append(len(set(group)) == 1)
        assert tags_in(entry, "reward") == set(expected) == set(advantages)
        for tag, mean in expected.items():
            assert entry[f"tag/{tag}/reward"] == pytest.approx(mean, abs=1e-6)
            assert entry[f"tag/{tag}/accuracy"] == pytest.approx(mean, abs=1e-6)
            assert entry[f"tag/{tag}/zero_variance"] == pytest.approx(fmean(dull[tag]))
            assert entry[f"tag/{tag}/advantage_std"] == pytest.approx(pstdev(advantages[tag]), abs=1e-4)
            assert entry[f"tag/{tag}/advantage_mean"] == pytest.approx(0, abs=1e-5)
            differ.append(abs(other[tag] - mean) > 1e-3)
        assert not any(name.endswith("_square") for name in entry)
    assert any(differ), "a mean of means would have done"


def test_the_deviation_of_advantages_is_that_of_the_whole_interval(seven_tags, build):
    """Two rollouts, one with advantages and one without: the mean of their deviations is another number."""
    diary = Diary(lambda one, tag, copy, call: copy / G if call == 0 else 0.5)
    trainer = build(take(seven_tags[1], S=4), diary, Watched, logging_steps=2)
    trainer.train()
    [first, second] = [call["rewards"] for call in diary.calls]
    advantages = [(r - fmean(first[:G])) / (stdev(first) + 1e-4) for r in first]
    [entry] = logs(trainer)
    assert entry["tag/S/advantage_std"] == pytest.approx(pstdev(advantages + [0.0] * len(second)), abs=1e-5)
    assert entry["tag/S/advantage_std"] != pytest.approx(pstdev(advantages) / 2, abs=0.05)


# Clipping and entropy


def naive(ratio, advantage, low, high, surrogate):
    """PPO: the objective no longer grows with the ratio. CISPO: the weight is cut, and the token is pushed up."""
    if surrogate == "cispo":
        return advantage > 0 and ratio > high
    if advantage > 0:
        return ratio > 1 + high
    return advantage < 0 and ratio < 1 - low


numbers = st.floats(-2, 2, width=32)


@given(
    advantages=st.lists(st.one_of(st.just(0.0), numbers), min_size=1, max_size=5),
    low=st.floats(0, 0.875, width=32),
    high=st.floats(0, 3, width=32),
    surrogate=st.sampled_from(["dapo", "cispo"]),
    length=st.integers(0, 4),
    data=st.data(),
)
def test_clipped_tokens_against_a_loop(advantages, low, high, surrogate, length, data):
    near = st.sampled_from([1.0, 1 - low, 1 + high, high])
    row = st.lists(st.one_of(near, st.floats(0, 4, width=32)), min_size=length, max_size=length)
    ratios = data.draw(st.lists(row, min_size=len(advantages), max_size=len(advantages)))
    ratio_NT = torch.tensor(ratios, dtype=torch.float64).view(len(advantages), length)
    found = clipped_tokens(ratio_NT, torch.tensor(advantages), low, high, surrogate)
    expected = [
        [naive(ratio, advantage, low, high, surrogate) for ratio in of_row]
        for of_row, advantage in zip(ratios, advantages, strict=True)
    ]
    assert found.dtype == torch.bool and found.shape == ratio_NT.shape and found.tolist() == expected
    scaled = clipped_tokens(ratio_NT, 3 * torch.tensor(advantages), low, high, surrogate)
    assert torch.equal(found, scaled), "the weight of a row's loss makes no difference"


def test_worked_ratios():
    ratio = torch.tensor([[0.5, 0.85, 1.0, 1.25, 1.5, 6.0]] * 3)
    found = clipped_tokens(ratio, torch.tensor([1.0, -1.0, 0.0]), 0.2, 0.3, "dapo").int().tolist()
    assert found == [[0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0], [0] * 6]
    found = clipped_tokens(ratio, torch.tensor([1.0, -1.0, 0.0]), 0.2, 5.0, "cispo").int().tolist()
    assert found == [[0, 0, 0, 0, 0, 1], [0] * 6, [0] * 6]
    for surrogate in ("sapo", "vespo"):
        assert clipped_tokens(ratio, torch.ones(3), 0.2, 0.3, surrogate) is None


CLIPPING = {
    "dapo": {"epsilon": 0.02, "epsilon_high": 0.05},
    "cispo": {"epsilon_high": 1.05},
}
OFF_POLICY = {"num_iterations": 2, "learning_rate": 0.03, "max_steps": 4, "batching": "mixed"}


@pytest.mark.parametrize("surrogate", CLIPPING)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_clip_fraction_and_entropy_are_means_over_tokens(seven_tags, build, surrogate, accumulation):
    bounds = CLIPPING[surrogate]
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    data = take(seven_tags[1], V=2, S=2)
    trainer = build(data, Diary(varied), loss_type=surrogate, **bounds, **OFF_POLICY, **sizes)
    trainer.train()
    low, high = bounds.get("epsilon", 0.2), bounds["epsilon_high"]
    other = {"dapo": "cispo", "cispo": "dapo"}[surrogate]
    differ = []
    for step, entry in enumerate(logs(trainer)):
        tokens = trainer.tokens[step]
        clipped = means((tag, naive(ratio, a, low, high, surrogate)) for tag, ratio, a, _ in tokens)
        differ.append(clipped != means((tag, naive(ratio, a, low, high, other)) for tag, ratio, a, _ in tokens))
        entropies = means((tag, entropy) for tag, *_, entropy in tokens)
        assert tags_in(entry, "clip_fraction") == tags_in(entry, "entropy") == set(clipped)
        for tag, share in clipped.items():
            assert entry[f"tag/{tag}/clip_fraction"] == pytest.approx(share, abs=1e-6)
            assert entry[f"tag/{tag}/entropy"] == pytest.approx(entropies[tag], rel=1e-4)
        if accumulation == 1:  # TRL's is a mean over micro-batches
            name = "clip_ratio/region_mean" if surrogate == "dapo" else "cispo_clip_ratio"
            assert entry["tag/all/clip_fraction"] == pytest.approx(entry[name], abs=1e-6)
    shares = [entry["tag/all/clip_fraction"] for entry in logs(trainer)]
    assert shares[0] == shares[2] == 0 and shares[1] > 0 and shares[3] > 0 and any(differ)


def test_a_log_entry_weighs_all_tokens_since_the_last_alike(seven_tags, build):
    trainer = build(take(seven_tags[1], V=2, S=2), Diary(varied), logging_steps=4, **CLIPPING["dapo"], **OFF_POLICY)
    trainer.train()
    [entry] = logs(trainer)
    tokens = [token for step in range(4) for token in trainer.tokens[step]]
    clipped = means((tag, naive(ratio, a, 0.02, 0.05, "dapo")) for tag, ratio, a, _ in tokens)
    for tag, share in clipped.items():
        assert entry[f"tag/{tag}/clip_fraction"] == pytest.approx(share, abs=1e-6) and share > 0


@pytest.mark.parametrize("surrogate", ["sapo", "vespo"])
def test_surrogates_that_do_not_clip_log_no_share(seven_tags, build, surrogate):
    trainer = build(take(seven_tags[1], V=2, S=2), Diary(varied), Watched, loss_type=surrogate, **OFF_POLICY)
    trainer.train()
    for entry in logs(trainer):
        assert not tags_in(entry, "clip_fraction") and "all" in tags_in(entry, "entropy")


@pytest.mark.parametrize("partner", ["rewards/r_mean", None])
def test_a_square_without_its_mean_is_an_ordinary_name(partner):
    """A reward may be called so: only what is squared beside its mean becomes a deviation."""
    means = RunningMeans()
    means.add({"tag/all/rewards/r_square": (3.0, 2)} | ({f"tag/all/{partner}": (2.0, 2)} if partner else {}))
    means.add({"tag/all/rewards/r_square": (1.0, 2)} | ({f"tag/all/{partner}": (0.0, 2)} if partner else {}))
    deviation = {"tag/all/rewards/r_mean": 0.5, "tag/all/rewards/r_std": 0.75**0.5}
    assert means.take() == (pytest.approx(deviation) if partner else {"tag/all/rewards/r_square": 1.0})
    assert means.take() == {}


# The gradient probe


def test_a_pattern_that_matches_nothing_is_refused_before_training(seven_tags, build):
    data = take(seven_tags[1], S=2)
    with pytest.raises(ValueError, match="gradient_probe_pattern: Pattern 'no_such' matches none"):
        build(data, Diary(varied), gradient_probe=7, gradient_probe_pattern="no_such")
    build(data, Diary(varied), gradient_probe=7, gradient_probe_pattern="lm_head")


def test_a_checkpoint_of_other_coordinates_is_refused(seven_tags, build):
    data = take(seven_tags[1], S=4)

    def train(steps, **options):
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, **options}
        trainer = build(data, Diary(varied), Watched, **options)
        trainer.train(resume_from_checkpoint=True)
        return trainer

    train(1, gradient_probe=7)
    with pytest.raises(
        ResumeError, match="gradient_probe: the checkpoint's has 7 coordinates, this run's 9; resume wi"
    ):
        train(2, gradient_probe=9)
    resumed = train(2, gradient_probe=7)
    assert resumed.state.global_step == 2 and "tag/S/grad_variance" in logs(resumed)[-1]
    without = train(3, gradient_probe=0)
    assert without.state.global_step == 3
    later = train(4, gradient_probe=9)  # the checkpoint of a run without a probe holds nothing to contradict
    assert later.state.global_step == 4 and "tag/S/grad_variance" not in logs(later)[-1]
