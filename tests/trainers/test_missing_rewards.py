"""
Rewards that failed are missing, never 0: gradients of MAPO, AVATAR and OmniGRPO with media are those of the formulas
written out row by row over the completions that can be scored.
"""

import logging
import math
from collections import Counter
from statistics import fmean, stdev

import pytest
import torch
from datasets import Dataset
from jobs.train_job import REWARDS, AvatarJobTrainer, JobTrainer, MAPOJobTrainer, NotesRows
from omni_runs import DEFAULTS
from test_mapo_gradients import (
    AGGREGATIONS,
    COPIES,
    HIGH,
    LONGEST,
    LOW,
    PROMPTS,
    RATE,
    SCOPES,
    SPLITS,
    TWO_STEPS,
    adaptive_weights,
    check,
    expected_gradients,
    generated,
    gradient_of,
    log_probs,
    loss_of,
    micro_batches_of,
    set_advantages,
    train,
    world,  # noqa: F401
)
from test_processes import worst
from tiny_models import build_tiny, build_tiny_text

from maple_trl import AvatarConfig, MAPOConfig, OmniGRPOConfig, OmniGRPOTrainer


pytestmark = pytest.mark.slow


WEIGHTS = [0.3, 0.7, 0.0]
NAMES = ["rule", "judge", "broken"]
# Of the six prompts of a rollout: the copies that the judge fails on. The judge is not for tag A, the last prompt.
FAILED = {0: {1}, 1: {0, 2}, 2: {3}, 3: {0, 1, 3}, 4: {0, 1, 2, 3}, 5: {0, 1, 2, 3}}
NO_RULE = {4: {0, 1, 2, 3}}  # nothing scores this prompt


@pytest.fixture(scope="module", autouse=True)
def rewards(world):  # noqa: F811
    """Three reward functions that fail on given completions, under the name `failing`."""
    numbers = {row["id"]: i for i, row in enumerate(world[1])}

    def graded(completion_ids, shift):
        return [(sum(ids) + shift) % 97 / 97 for ids in completion_ids]

    def scored(completion_ids, id, fails, shift, nothing):
        copies, found = Counter(), []
        for one, value in zip(id, graded(completion_ids, shift), strict=True):
            found.append(nothing if copies[one] in fails.get(numbers[one], ()) else value)
            copies[one] += 1
        return found

    def rule(completion_ids, id, **_):
        return scored(completion_ids, id, NO_RULE, 0, None)

    def judge(completion_ids, id, **_):
        return scored(completion_ids, id, FAILED, 31, math.nan)

    def broken(completion_ids, **_):
        """It has no weight."""
        return [None if sum(ids) % 2 else 1.0 for ids in completion_ids]

    def halves(completion_ids, id, **_):
        """A task reward that fails too: the completions of the judge, and more."""
        values = scored(completion_ids, id, FAILED, 31, None)
        return [None if value is None else float(value > 0.5) for value in values]

    REWARDS["failing"] = [rule, judge, broken]
    REWARDS["failing_task"] = [halves, rule]
    yield {"failing": [rule, judge, broken]}
    del REWARDS["failing"], REWARDS["failing_task"]


def completions_of(training, world, functions):  # noqa: F811
    """All completions of a rollout. `scores` are those of the functions that have a weight."""
    found, rows = generated(training, world), world[1]
    columns = {"completion_ids": [c.ids for c in found], "id": [rows[c.prompt]["id"] for c in found]}
    for c, *scores in zip(found, *(function(**columns) for function in functions[:2]), strict=True):
        c.scores = [None if s is None or math.isnan(s) else s for s in scores]
    return found


def set_rewards(completions, weights=WEIGHTS):
    """By the rule in words. `zero` is what TRL makes of them."""
    for c in completions:
        group = [other for other in completions if other.prompt == c.prompt]
        applying = [k for k in range(2) if any(other.scores[k] is not None for other in group)]
        known = applying and all(c.scores[k] is not None for k in applying)
        c.reward = sum(weights[k] * c.scores[k] for k in applying) if known else None
        c.zero = sum(w * s for w, s in zip(weights, c.scores, strict=False) if s is not None)
    return [c for c in completions if c.reward is not None]


# MAPO


@pytest.fixture(scope="module")
def step(world, rewards):  # noqa: F811
    """The completions of the first rollout, and the gradient of the loss over some of them, by their rewards."""
    training, model = train(world, reward="failing", reward_weights=WEIGHTS), build_tiny("qwen2_5_omni")[0]
    completions = completions_of(training, world, rewards["failing"])
    logps = log_probs(training, world, model, completions)

    def gradient(chosen, scope, aggregation, **terms):
        if scope is not None:
            set_advantages(chosen, scope)
        now = [logps[completions.index(c)] for c in chosen]
        loss = loss_of(chosen, now, [value.detach() for value in now], aggregation, **terms)
        return gradient_of(loss, model, retain_graph=True)

    return completions, gradient


def right(step, scope, aggregation, **terms):
    completions, gradient = step
    return gradient(set_rewards(completions), scope, aggregation, **terms)


def as_zero(step, scope, aggregation, **terms):
    """The old behaviour: what failed counts as 0; only what nothing scored is left out."""
    completions, gradient = step
    set_rewards(completions)
    # What has no weight saves a completion there.
    scored = [c for c in completions if any(s is not None for s in c.scores) or sum(c.ids) % 2 == 0]
    for c in scored:
        c.reward = c.zero
    return gradient(scored, scope, aggregation, **terms)


def in_the_denominator(step, scope, aggregation, **terms):
    """The right advantages, in a mean over all rows."""
    completions, gradient = step
    known = set_rewards(completions)
    set_advantages(known, scope)
    for c in completions:
        if c not in known:
            c.advantage = 0.0
    return gradient(completions, None, aggregation, **terms)


# Scopes decide the advantages before a loss is made of them; that they do not act on each other is in test_mapo_gradients.py.
@pytest.mark.parametrize(("scope", "aggregation"), zip(SCOPES, (*AGGREGATIONS, "token"), strict=True))
@pytest.mark.matrix(cases=1)
def test_mapo_with_missing_rewards(world, step, scope, aggregation):  # noqa: F811
    number = SCOPES.index(scope) + AGGREGATIONS.index(aggregation)
    options = {"advantage_scope": scope, "loss_aggregation": aggregation} | SPLITS[number % len(SPLITS)]
    if number % 3 == 1:
        options["loss_strata"] = "batch"
    training = train(world, reward="failing", reward_weights=WEIGHTS, **options)
    terms = {"strata": options.get("loss_strata", "tag")}
    check(training, [right(step, scope, aggregation, **terms)])
    for wrong in (as_zero, in_the_denominator):
        error, _ = worst(wrong(step, scope, aggregation, **terms), training.gradients[0])
        assert error > 1e-2, wrong.__name__


def test_the_old_behaviour_fails_the_test(world, step, monkeypatch):  # noqa: F811
    """The control: a trainer that takes the scores as TRL does has the gradient of None = 0."""
    monkeypatch.setattr(MAPOJobTrainer, "_set_apart", lambda self, flight, scores, tags: scores)
    training = train(world, reward="failing", reward_weights=WEIGHTS)
    assert worst(right(step, "tag", "sample"), training.gradients[0])[0] > 1e-2
    assert worst(as_zero(step, "tag", "sample"), training.gradients[0])[0] <= 1e-4


def test_what_is_counted_and_said(world, step, caplog):  # noqa: F811
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        training = train(world, reward="failing", reward_weights=WEIGHTS)
    trainer, (completions, _) = training.trainer, step
    known = set_rewards(completions)
    # The prompt that nothing scores misses both; the judge is not for the last one, and `broken` has no weight.
    failed = Counter({("judge", "S"): 3, ("judge", "VA"): 1 + 4, ("judge", "VAS"): 3, ("rule", "VA"): 4})
    assert trainer.missing_rewards == failed
    left_out = Counter(c.tag for c in completions if c not in known)
    assert trainer.unscorable_completions == left_out == {"S": 3, "VA": 5, "VAS": 3}
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    rows = Counter(c.tag for c in completions)
    for tag in rows:
        assert entry[f"tag/{tag}/unscorable"] == pytest.approx(left_out[tag] / rows[tag])
        assert entry[f"tag/{tag}/rewards/judge/missing"] == pytest.approx(failed["judge", tag] / rows[tag])
        assert entry[f"tag/{tag}/rewards/broken/missing"] == 0
        of_tag = [c.reward for c in known if c.tag == tag]
        assert entry[f"tag/{tag}/reward"] == pytest.approx(fmean(of_tag), abs=1e-6)
    assert entry["tag/VAS/alone"] == 1 / 4 and entry["tag/all/alone"] == pytest.approx(1 / 24)
    assert entry["rewards/judge/missing"] == pytest.approx(11 / 24)
    assert entry["rewards/rule/missing"] == pytest.approx(4 / 24) and entry["rewards/broken/missing"] == 0
    assert entry["reward"] == pytest.approx(fmean(c.reward for c in known), abs=1e-6)
    # Prompts of which one completion or none could be scored are neither alike nor not.
    assert (
        entry["tag/VA/zero_variance"] == entry["tag/all/zero_variance"] == 0 and "tag/VAS/zero_variance" not in entry
    )
    said = [record.getMessage() for record in caplog.records if "gave no reward" in record.getMessage()]
    assert any("'judge' gave no reward to 11 completions of step 0 (S 3, VA 5, VAS 3)" in line for line in said)
    # What the functions gave is still to be seen.
    logged = trainer._logs["rewards"]["rule"]
    assert sum(not math.isnan(value) for value in logged) == 20


@pytest.mark.parametrize("split", SPLITS[1:3])
def test_dropped_groups_and_missing_rewards(world, step, split):  # noqa: F811
    """Prompt 3 has one completion that can be scored, prompt 4 none: they leave, and it is not known what they are."""
    training = train(world, reward="failing", reward_weights=WEIGHTS, dynamic_sampling="early", **split)
    completions, gradient = step
    known = set_rewards(completions)
    set_advantages(known, "tag")
    kept = [c for c in known if c.prompt not in (3, 4)]
    check(training, [gradient(kept, None, "sample")])
    assert training.rows_in_model == len(kept)  # nothing is computed for what is left out
    assert training.trainer.sampling.state_dict()["uninformative"] == []


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.matrix(cases=1)
def test_two_steps_with_a_penalty(world, rewards, aggregation):  # noqa: F811
    options = {"num_iterations": 2, "loss_aggregation": aggregation, "beta": 0.1, "learning_rate": RATE}
    training = train(world, steps=4, reward="failing", reward_weights=WEIGHTS, **options, **TWO_STEPS)
    known = set_rewards(completions_of(training, world, rewards["failing"]))
    set_advantages(known, "tag")
    model = build_tiny("qwen2_5_omni")[0]
    check(training, expected_gradients(training, world, model, known, range(PROMPTS), aggregation, beta=0.1))


def test_difficulty_is_read_from_what_can_be_scored(world):  # noqa: F811
    """A completion that the rule fails on counts in no difficulty, though its task reward is known."""
    options = {"tag_weights": "adaptive", "kl_window": 50, "task_reward": "halves", "reward_weights": [0.5, 0.5]}
    training = train(world, reward="failing_task", **options)
    completions = completions_of(training, world, REWARDS["failing_task"])
    known = set_rewards(completions, [0.5, 0.5])
    for c in known:
        c.total, c.reward = c.reward, c.scores[0]
    judged = [c for c in known if c.reward is not None]
    weights = adaptive_weights(judged)
    assert set(weights) == {"S", "VA", "VAS"}  # the judge is not for A, whose weight stays
    for tag, weight in weights.items():
        assert training.trainer.tag_weights.weight(tag) == pytest.approx(weight)
    assert training.trainer.tag_weights.weight("A") == 0.5
    for c in known:
        c.reward = c.total
    set_advantages(known, "tag")
    model = build_tiny("qwen2_5_omni")[0]
    run = (training, world, model, known, range(PROMPTS), "sample")
    check(training, expected_gradients(*run, weights=weights | {"A": 0.5}))


# OmniGRPO with media


class NotingTrainer(NotesRows, JobTrainer):
    pass


OMNI = (NotingTrainer, OmniGRPOConfig)
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CLIP = {"cispo": {"epsilon_high": 5.0}}  # a clip of the ratio itself


def omni_loss(micro_batches, logps, loss_type):
    """The loss of an optimizer step at ratios of 1, where all surrogates have the gradient of A log p."""
    rows = [c for part in micro_batches for c in part]
    sums = {id(c): -c.advantage * logps[id(c)].sum() for c in rows}
    if loss_type == "bnpo":
        parts = [part for part in micro_batches if part]
        return sum(sum(sums[id(c)] for c in part) / sum(len(c.ids) for c in part) for part in parts) / len(parts)
    total = torch.zeros(())
    for c in rows:
        divisor = {"grpo": len(c.ids), "sapo": len(c.ids), "dr_grpo": LONGEST, "luspo": 1}.get(loss_type)
        tokens = sum(len(other.ids) for other in rows)
        total = total + sums[id(c)] / (tokens if divisor is None else divisor * len(rows))
    return total


@pytest.fixture(scope="module")
def omni_step(world, step):  # noqa: F811
    """Completions as in the other tests, with a gradient by log-probabilities that are computed once."""
    completions, _ = step
    training, model = train(world, reward="failing", reward_weights=WEIGHTS, kind=OMNI), build_tiny("qwen2_5_omni")[0]
    logps = log_probs(training, world, model, completions)
    by_content = {(c.prompt, c.ids): value for c, value in zip(completions, logps, strict=True)}

    def gradient(micro_batches, loss_type):
        of_row = {id(c): by_content[c.prompt, c.ids] for part in micro_batches for c in part}
        return gradient_of(omni_loss(micro_batches, of_row, loss_type), model, retain_graph=True)

    return completions, gradient


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.matrix(cases=2)
def test_omni_grpo_with_missing_rewards(world, omni_step, loss_type):  # noqa: F811
    completions, gradient = omni_step
    split = SPLITS[LOSSES.index(loss_type) % len(SPLITS)]
    options = {"loss_type": loss_type, "reward_weights": WEIGHTS} | CLIP.get(loss_type, {}) | split
    training = train(world, reward="failing", kind=OMNI, **options)
    known = set_rewards(completions)
    set_advantages(known, "group")
    micro_batches = micro_batches_of(training, world, known)
    assert sorted(map(id, sum(micro_batches, []))) == sorted(map(id, known))
    expected = gradient(micro_batches, loss_type)
    check(training, [expected])
    for c in completions:  # the control: what failed is 0
        c.reward = c.zero
    set_advantages(completions, "group")
    assert worst(gradient([completions], loss_type), training.gradients[0])[0] > 1e-2
    assert training.trainer.missing_rewards["judge", "S"] == 3


@pytest.mark.parametrize("options", [{"scale_rewards": "batch"}, {"scale_rewards": "none"}], ids=["batch", "none"])
def test_other_scales_of_rewards(world, omni_step, options):  # noqa: F811
    completions, gradient = omni_step
    training = train(world, reward="failing", kind=OMNI, loss_type="grpo", reward_weights=WEIGHTS, **options)
    known = set_rewards(completions)
    for c in known:
        group = [other.reward for other in known if other.prompt == c.prompt]
        scale = stdev(other.reward for other in known) + 1e-4 if "batch" in options.values() else 1.0
        c.advantage = (c.reward - fmean(group)) / scale
    check(training, [gradient(micro_batches_of(training, world, known), "grpo")])


def test_rewards_that_are_normalised_each(world, omni_step):  # noqa: F811
    """A completion alone in its group has no deviation: its normalised rewards, and its advantage, are 0."""
    completions, gradient = omni_step
    options = {"multi_objective_aggregation": "normalize_then_sum", "loss_type": "grpo", "reward_weights": WEIGHTS}
    training = train(world, reward="failing", kind=OMNI, **options)
    known = set_rewards(completions)
    for c in known:
        group = [other for other in known if other.prompt == c.prompt]
        c.summed = 0.0
        for k in range(2):
            values = [other.scores[k] for other in group if other.scores[k] is not None]
            if len(values) > 1:
                c.summed += WEIGHTS[k] * (c.scores[k] - fmean(values)) / (stdev(values) + 1e-4)
    mean, deviation = fmean(c.summed for c in known), stdev(c.summed for c in known)
    assert mean == pytest.approx(0, abs=1e-9) and [c.summed for c in known].count(0.0) == 1
    for c in known:
        c.advantage = c.summed / (deviation + 1e-4)
    check(training, [gradient(micro_batches_of(training, world, known), "grpo")])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.matrix(cases=1)
def test_a_penalty_is_over_what_can_be_scored(world, step, loss_type):  # noqa: F811
    """In the second pass over a rollout the policy has moved away from the reference model."""
    completions, _ = step
    options = {"loss_type": loss_type, "beta": 0.1, "num_iterations": 2, "learning_rate": RATE}
    training = train(world, 2, reward="failing", kind=OMNI, reward_weights=WEIGHTS, **options)
    known = set_rewards(completions)
    set_advantages(known, "group")
    model = build_tiny("qwen2_5_omni")[0]
    with torch.no_grad():
        old = log_probs(training, world, model, known)
        model.load_state_dict(training.weights[1], strict=False)
    now, total = log_probs(training, world, model, known), torch.zeros(())
    for c, new, before in zip(known, now, old, strict=True):
        ratio, away = (new - before).exp(), before - new
        values = -torch.minimum(ratio * c.advantage, ratio.clamp(1 - LOW, 1 + HIGH) * c.advantage)
        summed = (values + 0.1 * ratio * (away.exp() - away - 1)).sum()  # TRL corrects for the ratio
        tokens = sum(len(other.ids) for other in known)
        total = total + summed / {"grpo": len(c.ids) * len(known), "dr_grpo": LONGEST * len(known)}.get(
            loss_type, tokens
        )
    error, where = worst(gradient_of(total, model), training.gradients[1])
    assert error <= 1e-4, where


@pytest.mark.parametrize("shared", ["on", "off"])
@pytest.mark.parametrize("name", ["mapo", "omni"])
@pytest.mark.matrix(cases=2)
def test_prompts_are_shared_with_completions_that_do_not_count(world, step, name, shared):  # noqa: F811
    """A completion without a token that counts stands beside others of its prompt in one packed sequence."""
    options = {"reward_weights": WEIGHTS, "shared_prefix": shared} | SPLITS[1]
    if name == "omni":
        options |= {"kind": OMNI, "loss_type": "grpo"}
    training = train(world, reward="failing", **options)
    assert training.trainer._sharing == (shared == "on")
    terms = ("group", "sample", "batch") if name == "omni" else ("tag", "sample", "tag")
    check(training, [right(step, *terms[:2], strata=terms[2])])


# Text alone


@pytest.mark.parametrize("tagged", [True, False])
def test_a_text_model_does_as_trl_does_but_for_rows_with_tags(tmp_path, tagged):
    """Three of four completions are judged 1 and the fourth not at all; the format is right in all."""
    rows = [{"prompt": f"which of {i}?"} | ({"tag": "S"} if tagged else {}) for i in range(2)]

    def form(completions, **_):
        return [1.0] * len(completions)

    def judge(completions, **_):
        return [None if i % 4 == 0 else 1.0 for i in range(len(completions))]

    model, tokenizer = build_tiny_text()
    options = {"output_dir": str(tmp_path), "reward_weights": [0.2, 0.8], "per_device_train_batch_size": 8}
    options = {**DEFAULTS, **options, "gradient_accumulation_steps": 1}
    trainer = OmniGRPOTrainer(
        model, [form, judge], OmniGRPOConfig(**options), Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    advantages = list(trainer._logs["advantages"])
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    if tagged:
        assert advantages == [0.0] * 8 and trainer.missing_rewards == {("judge", "S"): 2}
        assert entry["reward"] == 1 and entry["tag/S/unscorable"] == 1 / 4
    else:
        assert advantages == pytest.approx([-1.5, 0.5, 0.5, 0.5] * 2, abs=0.01)
        assert entry["reward"] == pytest.approx(0.8) and not any("unscorable" in name for name in entry)
        assert not trainer.missing_rewards


# Nothing to learn from


def in_the_first_rollout(completion_ids, trainer_state, **_):
    rewards = [(sum(ids) % 97) / 97 for ids in completion_ids]
    return rewards if trainer_state.global_step == 0 else [None] * len(rewards)


@pytest.mark.parametrize("split", SPLITS[1:3])
@pytest.mark.parametrize("kind", [(MAPOJobTrainer, MAPOConfig), OMNI, (AvatarJobTrainer, AvatarConfig)])
@pytest.mark.matrix(cases=2)
def test_a_rollout_without_rewards_is_no_step(world, kind, split, monkeypatch):  # noqa: F811
    """Momentum and decay of the weights would move them without a gradient too."""
    monkeypatch.setitem(REWARDS, "in_the_first_rollout", in_the_first_rollout)
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1} | split
    if kind[1] is AvatarConfig:
        options["replayed_generations"] = 0
    training = train(world, 3, reward="in_the_first_rollout", kind=kind, **options)
    first, second, third = training.weights
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(second[name], third[name]) for name in second)
    entries = [entry for entry in training.trainer.state.log_history if "loss" in entry]
    assert [entry["sampling/steps_without_update"] for entry in entries] == [0, 1, 1]
    assert [entry["tag/all/unscorable"] for entry in entries] == [0, 1, 1]
    assert sum(training.trainer.missing_rewards.values()) == 2 * PROMPTS * COPIES
    assert entries[1]["reward"] is None and entries[1]["grad_norm"] == 0


# Resumed runs


RESUMED = {
    "mapo": ((MAPOJobTrainer, MAPOConfig), {"loss_type": "sapo", "beta": 0.1}),
    "omni": (OMNI, {"loss_type": "grpo", "beta": 0.1}),
    "avatar": ((AvatarJobTrainer, AvatarConfig), {"replayed_generations": 0, "loss_type": "grpo"}),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.matrix(cases=1)
def test_a_run_goes_on_within_a_rollout_with_missing_rewards(world, name, tmp_path):  # noqa: F811
    """Checkpoint 1 stands between the two steps on a rollout; what was missing in it is not counted again."""
    kind, options = RESUMED[name]
    options = {**options, **TWO_STEPS, "reward_weights": WEIGHTS, "learning_rate": RATE, "kind": kind}
    options |= {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    whole = train(world, 3, reward="failing", **options)
    again = train(world, 3, reward="failing", resume=str(tmp_path / "checkpoint-1"), **options)
    for one, two in zip(whole.weights[1:], again.weights, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole.trainer.missing_rewards == again.trainer.missing_rewards
    assert whole.trainer.missing_rewards["judge", "S"] >= 3
    assert whole.trainer.unscorable_completions == again.trainer.unscorable_completions
