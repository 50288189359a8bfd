"""
AVATAR with MAPLE's axes: the gradient of each optimizer step is that of

    loss = sum over tags m of w_m (mean over fresh F_m of l + alpha f mean over replayed P_m of l),

written out row by row. What was drawn and in which step it was trained is read off the trainer; advantages, weights,
baselines and log-probabilities are computed anew, from what the reward function was asked for and from the weights.
"""

import math
from collections import defaultdict, deque
from copy import deepcopy
from dataclasses import dataclass, field, fields
from statistics import fmean, stdev
from zlib import crc32

import pytest
import torch
from datasets import Dataset
from omni_runs import DEFAULTS
from test_avatar_config import ACCEPTED as AVATAR_ACCEPTED
from test_avatar_gradients import (
    COPIES,
    LAMBDA,
    LONGEST,
    OWN_HIGH,
    OWN_LOW,
    PLAIN_STEPS,
    REPLAYED,
    Formula,
    follow,
    graded,
    gradient_of,
    load,
    log_probs_under,
    number_of,
    omni_model,
    reference_for,
    row_loss,
    sometimes_graded,
    text_model,
)
from test_avatar_gradients import Completion as ReplayedCompletion
from test_avatar_gradients import Watched as AvatarWatched
from test_avatar_gradients import train_text as train_avatar
from test_grpo_parity import dataset
from test_mapo_gradients import informative
from test_mapo_gradients import set_advantages as set_fresh_advantages
from test_mapo_refusals import CASES as MAPO_REFUSALS
from test_processes import worst
from tiny_models import build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer, MAPOConfig, MAPOTrainer, OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.algorithms import StratifiedReplayBuffer
from maple_trl.modalities import ModalityTag
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.trainers.common.tag_metrics import TAGS as TAG_NAMES
from maple_trl.trainers.omni_grpo.trainer import PROMPTS_KEY


pytestmark = pytest.mark.slow


__all__ = ["omni_model", "text_model"]  # fixtures

ZERO_SHOT = {"S": 0.5, "VA": 0.1, "AS": 0.9}
TAGS = tuple(ZERO_SHOT)
HINT = "zebra quartz"  # in no prompt
HALF = 0.5  # replay_alpha of most runs
WINDOW = 6  # kl_window: so short that difficulties leave it


# Runs


class Graded:
    """
    A reward function that notes, per rollout and round, what it was asked for and what it said.

    Rows say how: `failed` and `solved` ones are always rewarded alike, the others in thirds; some completions cannot be
    scored if it `fails`.
    """

    __name__ = "graded"

    def __init__(self, fails=False):
        self.fails = fails
        self.rollouts = []

    def __call__(self, completion_ids, prompts, id, tag, kind, **_):
        values = [self.value(*row) for row in zip(completion_ids, kind, strict=True)]
        self.rollouts[-1].append(list(zip(id, tag, prompts, map(tuple, completion_ids), values, strict=True)))
        return values

    def value(self, ids, kind):
        number = number_of(ids)
        if self.fails and number % 7 == 0:
            return None
        return {"failed": 0.0, "solved": 1.0}.get(kind, number % 3 / 2)


class Notes:
    """Notes what is shown, and which rows are trained on. No two completions are alike."""

    _drawn = AvatarWatched._drawn
    real_ids = AvatarWatched.real_ids

    def _generate_and_score_completions(self, inputs):
        self.graded.rollouts.append([])
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        found = self._drawn(prompt_ids)
        shown = list(map(tuple, prompt_ids)) if self.family is None else list(self._serving)
        self.generated = [*getattr(self, "generated", []), shown]
        return found, None

    def _compute_loss(self, model, inputs):
        ids = self.real_ids(inputs, "completion")
        flags = inputs["replayed"].bool().tolist() if "replayed" in inputs else [False] * len(ids)
        prompts = self.real_ids(inputs, "prompt") if self.family is None else [p.key for p in inputs[PROMPTS_KEY]]
        rows = [Row(*row) for row in zip(ids, flags, prompts, strict=True) if row[0]]
        self.trained = [*getattr(self, "trained", []), rows]
        return super()._compute_loss(model, inputs)


class WatchedAvatar(Notes, AvatarTrainer):
    pass


class WatchedMAPO(Notes, MAPOTrainer):
    pass


AVATAR, MAPO = (WatchedAvatar, AvatarConfig), (WatchedMAPO, MAPOConfig)


@dataclass
class Row:
    """A row of a micro-batch that has a token that counts."""

    ids: tuple
    replayed: bool
    prompt: object


def text_rows(per_tag=4, tags=TAGS, **kinds):
    """Prompts of some tags, the last of which are as `kinds` says, as `VA=("failed", "solved")`."""
    rows = []
    for tag in tags:
        for i, kind in enumerate(("usual",) * (per_tag - len(kinds.get(tag, ()))) + kinds.get(tag, ())):
            hint = f"{HINT} {i}" if kind == "failed" else None
            text = f"what is {tag.lower()} {'red green blue yellow low mid high top'.split()[i]}?"
            rows.append({"prompt": text, "id": f"{tag}{i}", "tag": tag, "kind": kind, "hint": hint})
    return rows


def train_text(folder, tmp_path, rows=None, **options):
    model, tokenizer = build_tiny_text()
    model = type(model).from_pretrained(folder)
    return train(model, tokenizer, rows or text_rows(), tmp_path, **options)


def train_omni(folder, seven_tags, tmp_path, rows, **options):
    model, processor = load_model(str(folder), dtype="float32"), load_processor(str(folder))
    return train(model, processor, rows, tmp_path, media_root=str(seven_tags[0]), **options)


def train(model, processing_class, rows, tmp_path, rollouts=6, kind=AVATAR, fails=False, prompts=2, **options):
    """A run of so many rollouts of so many prompts; in two micro-batches of one step, if the options do not say else."""
    trainer_class, config_class = kind
    options = {
        **DEFAULTS,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": COPIES * prompts // 2,
        "gradient_accumulation_steps": 2,
        "num_generations": COPIES,
        "max_completion_length": LONGEST,
        **PLAIN_STEPS,
        "seed": 3,
        **({"replayed_generations": REPLAYED, "tas_lambda": LAMBDA} if config_class is AvatarConfig else {}),
        **options,
    }
    rounds = options.get("steps_per_generation", 2) * options.get("num_iterations", 1)
    steps = rollouts * rounds // options["gradient_accumulation_steps"]
    graded = Graded(fails)
    trainer = trainer_class(
        model,
        graded,
        config_class(**options | {"max_steps": steps}),
        train_dataset=Dataset.from_list(rows),
        processing_class=processing_class,
    )
    trainer.graded = graded
    training = follow(trainer, steps)
    assert len(graded.rollouts) == rollouts
    return training


# The reference


@dataclass
class Completion(ReplayedCompletion):
    """
    A row as the formulas see it: of which prompt (the row's `id`) and tag, and what was shown for it: token ids, or an
    encoded prompt.
    """

    prompt: str = ""
    tag: str = ""
    shown: object = None


@dataclass
class Terms(Formula):
    """Terms of the objective; the defaults are those of [`train`]."""

    aggregation: str = "sample"
    strata: str = "tag"
    weighted: bool = False
    dropping: bool = False
    together: bool = False  # wrong: replayed completions in the mean of the fresh ones
    whole_share: bool = False  # wrong: alpha as it is where the buffer could serve a part alone
    early_baselines: bool = False  # baselines before the rounds that refill


@dataclass
class Rollout:
    """What counts of a rollout: the fresh completions that can be scored, those that are trained on, the replayed ones."""

    fresh: list
    kept: list
    replayed: list
    filled: float
    tags: list
    weights: dict
    baselines: tuple[dict, dict]
    left_over: bool
    prompts: list  # of each round
    steps: dict = field(default_factory=dict)


def difficulty(rewards):
    p = min(max(sum(r == 1 for r in rewards) / len(rewards), 1e-6), 1 - 1e-6)
    return p * math.log(p / (100 / 101)) + (1 - p) * math.log((1 - p) / (1 / 101))


class TagWeights:
    """Sigmoids of how hard tags are against a history over all tags."""

    def __init__(self):
        self.history = deque(maxlen=WINDOW)
        self.weights = defaultdict(lambda: 0.5)

    def observe(self, fresh):
        found = {tag: [c.reward for c in fresh if c.tag == tag] for tag in map(str, ModalityTag)}
        found = {tag: difficulty(rewards) for tag, rewards in found.items() if rewards}
        self.history.extend(found.values())
        for tag, value in found.items():
            z = 0.0
            if len(self.history) > 1:
                z = (value - fmean(self.history)) / (stdev(self.history) + 1e-4)
            self.weights[tag] = 1 / (1 + math.exp(-z))
        return found


def rollouts_of(training, model, terms):
    """What a run must have trained on, by bookkeeping of its own."""
    trainer, args, per_rollout = training.trainer, training.trainer.args, training.steps_of_rollout()
    shown, weights = iter(trainer.generated), TagWeights()
    history, stored, found = defaultdict(list), {}, []
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    for number, rounds in enumerate(trainer.graded.rollouts):
        steps = range(number * per_rollout, (number + 1) * per_rollout)
        everything, fresh, baselines = [], [], []
        for asked in rounds:
            pairs = zip(asked, next(shown), strict=True)
            made = [
                Completion(None, ids, reward, prompt=name, tag=tag, shown=prompt)
                for (name, tag, _, ids, reward), prompt in pairs
            ]
            everything.append(made)
            fresh += [c for c in made if c.reward is not None]
            for c in [c for c in made if c.reward is not None]:
                history[c.prompt].append(c.reward)
            baselines.append({name: list(rewards) for name, rewards in history.items()})
        weights.observe(fresh)
        groups = [list(dict.fromkeys(c.prompt for c in made)) for made in everything]
        assert len(set(sum(groups, []))) == sum(map(len, groups))  # no prompt twice
        kept = [c for c in fresh if not terms.dropping or c.prompt in informative(fresh)]
        rows = {step: training.rows(step) for step in steps}
        replayed = replayed_in(rows, stored)
        wanted = len(groups[0]) * getattr(args, "replayed_generations", 0)
        assert len(everything[0]) + len(replayed) == COPIES * len(groups[0])
        for prompts, made in zip(groups[1:], everything[1:], strict=True):
            size = COPIES - math.ceil(len(replayed) / len(groups[0]))
            assert [c.prompt for c in made] == [prompt for prompt in prompts for _ in range(size)]
        tags = sorted({c.tag for c in everything[0]})
        if args.batching == "stratified":
            assert {c.tag for c in replayed} <= set(tags)
        found.append(
            Rollout(
                fresh,
                kept,
                replayed,
                len(replayed) / wanted if wanted else 0.0,
                tags,
                dict(weights.weights),
                (baselines[0], baselines[-1]),
                args.batching == "stratified" and len(tags) > 1,
                groups,
            )
        )
        found[-1].steps = rows_of_steps(rows, kept + replayed, args)
        with torch.no_grad():
            for c in fresh:  # of groups that are not trained on as well: hints may have them stored
                load(model, training.weights[steps[0]])
                c.old = log_probs_under(trainer, model, c.shown, c.ids)
                if terms.beta:
                    load(model, original)
                    c.kl_from = log_probs_under(trainer, model, c.shown, c.ids)
        may_be_stored = kept if not getattr(args, "hints", False) else fresh
        stored |= {c.ids: c for c in may_be_stored}
    assert next(shown, None) is None
    return found


def replayed_in(rows, stored):
    """The replayed completions of a rollout's steps, each under the prompt that it was written under."""
    found = {}
    for row in (row for step in rows.values() for row in step if row.replayed):
        c = stored[row.ids]
        assert row.prompt == (c.shown if isinstance(c.shown, tuple) else c.shown.key)
        found[row.ids] = Completion(None, c.ids, c.reward, c.old, True, prompt=c.prompt, tag=c.tag, shown=c.shown)
    return list(found.values())


def rows_of_steps(rows, wanted, args):
    """The completions of each step; each that is trained on must be in each pass over the rollout once."""
    by_ids = {c.ids: c for c in wanted}
    assert len(by_ids) == len(wanted)
    for step in rows.values():
        assert all(by_ids[row.ids].replayed == row.replayed for row in step)
    found = {step: [by_ids[row.ids] for row in some] for step, some in rows.items()}
    steps, each = list(found.values()), len(found) // args.num_iterations
    for i in range(0, len(steps), each):
        assert sorted(c.ids for step in steps[i : i + each] for c in step) == sorted(by_ids)
    return found


def set_advantages(rollout, terms):
    set_fresh_advantages(rollout.fresh, terms.scope)
    past, baselines = [c.reward for c in rollout.replayed], rollout.baselines[0 if terms.early_baselines else -1]
    for c in rollout.replayed:
        c.advantage = c.reward - fmean(baselines[c.prompt][-terms.window :])
        if max(past) - min(past) > 1e-6:
            c.advantage /= stdev(past) + 1e-4
        c.advantage = min(max(c.advantage, -terms.limit), terms.limit)


def mean_of(rows, logps, terms, factor):
    """The mean of the surrogate over a set of rows, each with its factor."""
    summed, tokens = torch.zeros(()), sum(len(c.ids) for c in rows)
    for c in rows:
        values = factor(c) * row_loss(c, logps[id(c)], Formula(**{**vars_of(terms), "beta": 0.0}))
        if terms.aggregation == "token":
            summed = summed + values.sum() / tokens
        elif terms.aggregation == "sample":
            summed = summed + values.mean() / len(rows)
        else:
            summed = summed + values.sum() / LONGEST / len(rows)
    return summed


def vars_of(terms):
    return {name: getattr(terms, name) for name in Formula.__dataclass_fields__}


def loss_of(rows, rollout, logps, terms):
    """The loss of an optimizer step on these rows of a rollout."""
    share = terms.alpha * (1.0 if terms.whole_share else rollout.filled)
    by_tag = terms.strata == "tag" and not rollout.left_over
    total = torch.zeros(())
    for tag in sorted({c.tag for c in rows}) if by_tag else [None]:
        fresh = [c for c in rows if tag in (None, c.tag) and not c.replayed]
        past = [c for c in rows if tag in (None, c.tag) and c.replayed]

        def weight(c):
            return rollout.weights.get(c.tag, 0.5) if terms.weighted else 1.0

        if terms.together:
            total = total + mean_of(fresh + past, logps, terms, lambda c: weight(c) * (share if c.replayed else 1.0))
        else:
            total = total + mean_of(fresh, logps, terms, weight) + share * mean_of(past, logps, terms, weight)
    return total + terms.beta * penalty([c for c in rows if not c.replayed], logps)


def penalty(fresh, logps):
    """TRL's estimate of the divergence from the reference model, a mean over tokens."""
    total, tokens = torch.zeros(()), sum(len(c.ids) for c in fresh)
    for c in fresh if fresh and fresh[0].kl_from is not None else ():
        now, away = logps[id(c)], c.kl_from - logps[id(c)]
        total = total + ((now - c.old).exp() * (away.exp() - away - 1)).sum() / tokens
    return total


def errors(training, model, rollouts, terms):
    """How far each step's gradient is from the formula's."""
    found = []
    for rollout in rollouts:
        set_advantages(rollout, terms)
        for step, rows in rollout.steps.items():
            load(model, training.weights[step])
            if not rows:
                assert not any(value.any() for value in training.gradients[step].values())
                continue
            logps = {id(c): log_probs_under(training.trainer, model, c.shown, c.ids) for c in rows}
            expected = gradient_of(loss_of(rows, rollout, logps, terms), model)
            found.append(worst(expected, training.gradients[step])[0])
    return found


def check(training, kind, terms, tolerance=1e-4):
    model = reference_for(kind)
    rollouts = rollouts_of(training, model, terms)
    found = errors(training, model, rollouts, terms)
    if max(found) > tolerance and any(len(rollout.prompts) > 1 for rollout in rollouts):
        # The rewards of a refill may count in a baseline of the same rollout or of the next one.
        found = errors(training, model, rollouts, Terms(**vars(terms) | {"early_baselines": True}))
    print(f"worst gradient error {max(found):.2e}")
    assert max(found) <= tolerance, found
    return rollouts


# The reference is that of both trainers where each is alone

# Steps of a rollout: half of its rows each, or all of them twice.
TWO_STEPS = {"per_device_train_batch_size": 4, "steps_per_generation": 4}
TWICE = {"num_iterations": 2}
EARLY = {"dynamic_sampling": "early"}
WEIGHTS = {"tag_weights": "adaptive", "kl_window": WINDOW}
ORDER = {"curriculum": "adaptive", "zero_shot_accuracy": ZERO_SHOT}
HINTS = {"hints": True, "hint_visits": 1, "hint_max_kl": 1e6}
SOME_ALIKE = {"S": ("failed", "solved"), "VA": ("failed",), "AS": ("solved",)}
OWN_CLIP = {"replay_epsilon": OWN_LOW, "replay_epsilon_high": OWN_HIGH}
CLIPS = {"own_low": OWN_LOW, "own_high": OWN_HIGH}
CAPPED = {"loss_type": "cispo", "epsilon_high": 1.2, "replay_epsilon_high": 1.05}
OF_CAPPED = {"loss_type": "cispo", "high": 1.2, "own_high": 1.05}

# One step on a rollout, in which AVATAR's means over a rollout are those of a step.
AVATAR_ALONE = {
    "token, hints, penalty": (
        HINTS
        | OWN_CLIP
        | {"fails": True, "replay_alpha": HALF, "replay_draw": "balanced", "beta": 0.1, "rollouts": 9},
        CLIPS | {"aggregation": "token", "alpha": HALF, "beta": 0.1},
    ),
    "sample, tags": (
        {"loss_type": "grpo", "batching": "stratified", "advantage_scope": "tag", "rollouts": 8},
        {"scope": "tag"},
    ),
    "prompt": ({"loss_type": "dr_grpo", "prompts": 4, "fails": True}, {"aggregation": "prompt"}),
}
MAPO_ALONE = {
    "sample, all axes": (
        WEIGHTS | ORDER | EARLY | {"refill_rounds": 2, "revisit": "unsolved", "fails": True, "rollouts": 8},
        {"weighted": True, "dropping": True},
    ),
    "token, two steps, mixed": (
        WEIGHTS
        | EARLY
        | TWO_STEPS
        | {"loss_aggregation": "token", "loss_type": "cispo", "epsilon_high": 1.2, "batching": "mixed", "prompts": 4},
        {"weighted": True, "dropping": True, "aggregation": "token", "loss_type": "cispo", "high": 1.2},
    ),
    "prompt, twice, left over": (
        WEIGHTS | TWICE | {"loss_aggregation": "prompt", "loss_type": "sapo", "leftover": "mixed", "prompts": 3},
        {"weighted": True, "aggregation": "prompt", "loss_type": "sapo"},
    ),
    "token, one set": (
        {"method": "mupo", "beta": 0.1, "loss_aggregation": "token", "prompts": 4, **EARLY},
        {"strata": "batch", "scope": "group", "beta": 0.1, "dropping": True, "aggregation": "token"},
    ),
}


@pytest.mark.parametrize("name", AVATAR_ALONE)
@pytest.mark.matrix(cases=1)
def test_the_reference_is_that_of_avatar(name, text_model, tmp_path):
    options, terms = AVATAR_ALONE[name]
    training = train_text(text_model, tmp_path, text_rows(**SOME_ALIKE), **options)
    rollouts = check(training, "text", Terms(**{"strata": "batch"} | terms))
    assert sum(len(rollout.replayed) for rollout in rollouts) >= 8
    assert ("hints" in name) == any(HINT in str(shown) for *_, shown in asked(training))


@pytest.mark.parametrize("name", MAPO_ALONE)
@pytest.mark.matrix(cases=1)
def test_the_reference_is_that_of_mapo(name, text_model, tmp_path):
    options, terms = MAPO_ALONE[name]
    training = train_text(text_model, tmp_path, text_rows(**SOME_ALIKE), kind=MAPO, **options)
    rollouts = check(training, "text", Terms(**{"scope": "tag", "lam": 0.0} | terms))
    assert ("refill_rounds" in options) == any(len(rollout.prompts) > 1 for rollout in rollouts)
    assert ("left over" in name) == any(rollout.left_over for rollout in rollouts)
    if "all axes" in name:
        in_order(rollouts)


def asked(training):
    """Row, tag and prompt as it was shown, of all completions."""
    rounds = [entries for rollout in training.trainer.graded.rollouts for entries in rollout]
    return [(name, tag, shown) for entries in rounds for name, tag, shown, *_ in entries]


def in_order(rollouts, per_tag=4):
    """The first round of tags is in ascending order of accuracy, the second one in descending order of difficulty."""
    first = rollouts[: len(TAGS)]
    assert [rollout.tags for rollout in first] == [[tag] for tag in sorted(TAGS, key=ZERO_SHOT.get)]
    known = {rollout.tags[0]: difficulty([c.reward for c in rollout.fresh]) for rollout in first}
    left = [
        rollout.tags[0] for rollout in first if sum(map(len, rollout.prompts)) < per_tag
    ]  # refills took the others
    second = rollouts[len(TAGS) : len(TAGS) + len(left)]
    assert len(left) > 1 and len(set(known.values())) == len(TAGS)
    assert [rollout.tags for rollout in second] == [[tag] for tag in sorted(left, key=known.get, reverse=True)]


# Both together

BOTH = {"method": "mapo", "replay_alpha": HALF, "replay_draw": "balanced"}
OF_BOTH = {"scope": "tag", "alpha": HALF}
LOSSES = {
    "dapo": (OWN_CLIP, CLIPS),
    "cispo": (CAPPED, OF_CAPPED),
    "sapo": ({"loss_type": "sapo"}, {"loss_type": "sapo"}),
}
AGGREGATIONS = ("token", "sample", "prompt")
MIXED = {"batching": "mixed", "prompts": 4, "rollouts": 4}
ONE_TAG = {"rollouts": 7}
# Each of these meets each surrogate, aggregation and kind of strata at least once.
SETTINGS = {
    "one step, unscorable": (MIXED | {"fails": True, "replay_draw": "uniform"}, {}),
    "two steps, filtered": (MIXED | EARLY | TWO_STEPS, {"dropping": True}),
    "one tag, refilled, unscorable": (ONE_TAG | EARLY | {"refill_rounds": 2, "fails": True}, {"dropping": True}),
    "twice, filtered, refilled once": (MIXED | EARLY | TWICE | {"refill_rounds": 1}, {"dropping": True}),
    "one tag, two steps, own prompts": (
        ONE_TAG
        | EARLY
        | {"replay_scope": "prompt", "rollouts": 9, "steps_per_generation": 4, "per_device_train_batch_size": 2},
        {"dropping": True},
    ),
    "left over, unscorable": ({"prompts": 3, "leftover": "mixed", "rollouts": 8, "fails": True}, {}),
}
# Half of it has every two of strata, aggregation and surrogate together, and each setting; `make test-long` runs the rest.
MATRIX = [
    pytest.param(
        (strata, aggregation, loss, setting := list(SETTINGS)[(2 * i + j + 3 * k) % len(SETTINGS)]),
        id=f"{strata}-{aggregation}-{loss}-{setting}",
        marks=[pytest.mark.long] * ((i + j + k) % 2),
    )
    for k, strata in enumerate(("tag", "batch"))
    for i, aggregation in enumerate(AGGREGATIONS)
    for j, loss in enumerate(LOSSES)
]


def both(strata, aggregation, loss, setting):
    """Options of a run of `MATRIX`, and what they make of the formula."""
    (of_loss, loss_terms), (of_setting, setting_terms) = LOSSES[loss], SETTINGS[setting]
    options = BOTH | of_loss | of_setting | {"loss_strata": strata, "loss_aggregation": aggregation}
    terms = OF_BOTH | loss_terms | setting_terms | {"strata": strata, "aggregation": aggregation}
    if strata == "tag":
        options, terms = options | WEIGHTS, terms | {"weighted": True}
    return options, Terms(**terms)


def has_happened(training, rollouts, options):
    """Whether a run shows what it is there for."""
    assert sum(len(rollout.replayed) for rollout in rollouts) >= 4
    if "dynamic_sampling" in options:
        assert any(len(rollout.kept) < len(rollout.fresh) for rollout in rollouts)
        # Replayed completions are trained on in the places of groups that are not.
        assert any(rollout.replayed and len(rollout.kept) < len(rollout.fresh) for rollout in rollouts)
    assert bool(options.get("refill_rounds")) == any(len(rollout.prompts) > 1 for rollout in rollouts)
    assert (options.get("leftover") == "mixed") == any(rollout.left_over for rollout in rollouts)
    assert bool(options.get("fails")) == any(
        len(r.fresh) < sum(map(len, a)) for r, a in by_rollout(training, rollouts)
    )
    if options.get("batching") == "mixed":
        assert any(len({c.tag for c in rollout.replayed}) > 1 for rollout in rollouts)


def by_rollout(training, rollouts):
    return zip(rollouts, training.trainer.graded.rollouts, strict=True)


def remembered(training):
    """The completions that the buffer holds."""
    return {tuple(e.completion_ids.tolist()): e for e in stored_in(training.trainer)}


def stored_in(trainer):
    buffer = trainer.memory.buffer
    return [e for key in buffer.prompts() for e in buffer.stored(key)]


@pytest.mark.parametrize("case", MATRIX)
@pytest.mark.matrix(cases=2)
def test_every_strata_aggregation_and_surrogate(case, text_model, tmp_path):
    options, terms = both(*case)
    rows = text_rows(**SOME_ALIKE)
    training = train_text(text_model, tmp_path, rows, **options)
    rollouts = check(training, "text", terms)
    has_happened(training, rollouts, options)
    # What is not trained on is not stored.
    assert remembered(training).keys() == {c.ids for rollout in rollouts for c in rollout.kept}


@pytest.fixture(scope="module")
def everything(text_model, tmp_path_factory):
    """All axes and hints in one run."""
    options = BOTH | WEIGHTS | ORDER | EARLY | HINTS | OWN_CLIP
    options |= {"revisit": "unsolved", "refill_rounds": 2, "fails": True, "rollouts": 18}
    rows = text_rows(**SOME_ALIKE | {"S": ("failed",)})
    training = train_text(text_model, tmp_path_factory.mktemp("everything"), rows, **options)
    terms = Terms(**OF_BOTH | CLIPS | {"weighted": True, "dropping": True})
    return training, check(training, "text", terms), terms, options


@pytest.fixture(scope="module")
def mixed(text_model, tmp_path_factory):
    """Rollouts of several tags, in which replayed completions have other tags than the groups that they stand in."""
    options, terms = both("tag", "sample", "dapo", "one step, unscorable")
    options |= {"rollouts": 5, "replay_capacity": 7}  # fewer than are asked for
    training = train_text(text_model, tmp_path_factory.mktemp("mixed"), text_rows(), **options)
    return training, check(training, "text", terms), terms, options


def test_everything_in_one(everything):
    training, rollouts, terms, options = everything
    has_happened(training, rollouts, options)
    in_order(rollouts)
    assert len({round(rollout.weights[rollout.tags[0]], 2) for rollout in rollouts}) > 3
    told = training.trainer.tag_weights
    assert {tag: told.weight(tag) for tag in TAGS} == pytest.approx(rollouts[-1].weights)
    hinted = {name for name, _, shown in asked(training) if HINT in shown}
    assert hinted and hinted <= {"S3", "VA3"}
    assert any(HINT in text_of(training, c) for rollout in rollouts for c in rollout.replayed)
    # Beside what is trained on, completions of prompts that are stuck alone are stored.
    trained = {c.ids for rollout in rollouts for c in rollout.kept}
    found = remembered(training)
    assert trained < found.keys()
    others = [c for rollout in rollouts for c in rollout.fresh if c.ids in found.keys() - trained]
    assert {"S3", "VA3"} <= {c.prompt for c in others} and not any(c.prompt == "AS3" for c in others)  # solved ones
    for c in others:
        assert torch.allclose(found[c.ids].logps, c.old, atol=1e-5)
    # Every step passes what it trains on, and no more, through the model with a gradient.
    assert training.rows_in_model == sum(len(rows) for rollout in rollouts for rows in rollout.steps.values())


def text_of(training, completion):
    return training.trainer.processing_class.decode(completion.shown)


def test_rewards_are_asked_for_once(everything):
    calls = [asked for rollout in everything[0].trainer.graded.rollouts for asked in rollout]
    assert len({ids for asked in calls for *_, ids, _ in asked}) == sum(map(len, calls))


# Other readings, and the runs that must tell them apart.
WRONG = {
    "weights left out": {"weighted": False},
    "alpha ignored": {"alpha": 1.0},
    "replay without weight": {"alpha": 0.0},
    "replayed completions in the fresh mean": {"together": True},
    "no shaping": {"lam": 0.0},
    "the latest reward as baseline": {"window": 1},
    "fresh advantages within the group": {"scope": "group"},
}
WRONG_OF_MIXED = WRONG | {
    "one mean for all tags": {"strata": "batch", "weighted": False},
    "the whole alpha where a part is filled": {"whole_share": True},
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.matrix(cases=2)
def test_a_wrong_formula_is_told_apart(name, everything):
    tell_apart(name, everything, WRONG)


@pytest.mark.parametrize("name", WRONG_OF_MIXED)
@pytest.mark.matrix(cases=3)
def test_a_wrong_formula_is_told_apart_in_rollouts_of_several_tags(name, mixed):
    tell_apart(name, mixed, WRONG_OF_MIXED)


def tell_apart(name, run, wrong):
    training, rollouts, terms, _ = run
    found = max(errors(training, reference_for("text"), rollouts, Terms(**vars(terms) | wrong[name])))
    print(f"{name}: {found:.2e}")
    assert found > 1e-2


def test_replayed_completions_count_by_their_own_tags(mixed):
    """The control: by the tag of another one's prompt, they would be in other sets."""
    training, rollouts, terms, _ = mixed
    rollouts = deepcopy(rollouts)
    for rollout in rollouts:
        tags = deque(c.tag for c in rollout.replayed)
        tags.rotate(1)
        for c, tag in zip(rollout.replayed, tags, strict=True):
            c.tag = tag
    assert max(errors(training, reference_for("text"), rollouts, terms)) > 1e-2


def test_axes_without_a_preset(text_model, tmp_path):
    """Any axis can be set alone; the divergence from a reference model is over fresh tokens, and has no weight."""
    options = {"loss_strata": "tag", "loss_aggregation": "sample", "replay_scope": "buffer", "beta": 0.1}
    options |= WEIGHTS | MIXED | {"advantage_scope": "tag_whitened", "fails": True}
    training = train_text(text_model, tmp_path, text_rows(**SOME_ALIKE), **options)
    assert training.trainer.args.method == "avatar" and training.trainer.args.curriculum == "none"
    terms = Terms(scope="tag_whitened", weighted=True, beta=0.1)
    has_happened(training, check(training, "text", terms), options)


def test_an_omni_model(omni_model, seven_tags, tmp_path):
    """All seven tags, with everything that rollouts of several tags can have."""
    waiting, rows = list(seven_tags[1]), []
    for tag in map(str, ModalityTag):
        row = next(row for row in waiting if row["tag"] == tag)
        kind = {"V": "failed", "AS": "solved"}.get(tag, "usual")
        rows.append(row | {"kind": kind, "hint": f"{HINT} look" if kind == "failed" else None})
    options = BOTH | WEIGHTS | EARLY | HINTS | OWN_CLIP | {"batching": "mixed", "refill_rounds": 1, "rollouts": 12}
    training = train_omni(omni_model, seven_tags, tmp_path, rows, fails=True, **options)
    rollouts = check(training, "omni", Terms(**OF_BOTH | CLIPS | {"weighted": True, "dropping": True}))
    has_happened(training, rollouts, options | {"fails": True})
    assert any(HINT in str(shown) for *_, shown in asked(training))
    for part in ("visual", "audio_tower", "language_model"):
        assert any(v.norm() > 1e-4 for step in training.gradients for n, v in step.items() if part in n), part


def test_replayed_completions_have_their_own_tags_where_rows_are_left_out(omni_model, seven_tags, tmp_path):
    """Rows are counted over the whole set, of which those with broken media are left out before training."""
    usable = [next(row for row in seven_tags[1] if row["tag"] == tag) | {"kind": "usual"} for tag in ("A", "VA")]
    rows = [usable[1] | {"video": "gone.mp4"}, *usable]
    options = {"loss_strata": "tag", "prompts": 1, "rollouts": 4, "max_quarantined_share": 1.0}
    trainer = train_omni(omni_model, seven_tags, tmp_path, rows, **options).trainer
    assert trainer.row_encoder.registries["train_dataset"].left_out == [0]
    found = {trainer._row_of(e.prompt)["tag"]: str(TAG_NAMES[trainer._tag_of(e)]) for e in stored_in(trainer)}
    assert found == {"A": "A", "VA": "VA"}


def test_one_tag_after_the_other_without_a_preset(text_model, tmp_path):
    """The control: without rounds the batches of an epoch are in random order."""
    found = {}
    for granularity in ("cycle", "epoch"):
        options = {"batching": "stratified", "curriculum_granularity": granularity, "rollouts": 6}
        training = train_text(text_model, tmp_path / granularity, **options)
        tags = [rounds[0][0][1] for rounds in training.trainer.graded.rollouts]
        found[granularity] = [set(tags[:3]), set(tags[3:])]
    assert found["cycle"] == [set(TAGS)] * 2 != found["epoch"]


# Hints for prompts that filtering leaves out


def stuck_run(text_model, tmp_path, **options):
    """A prompt that always fails, one that is always solved and two others, all of them visited in each rollout."""
    rows = text_rows(tags=("S",), S=("failed", "solved"))
    options = {"prompts": 4, "rollouts": 5, "learning_rate": 0.0} | EARLY | HINTS | {"hint_max_kl": 1e-4} | options
    training = train_text(text_model, tmp_path, rows, **options)
    told = training.trainer.graded.rollouts
    return training, [{name for name, _, shown, *_ in asked[0] if HINT in shown} for asked in told]


@pytest.mark.parametrize("visits", [1, 3])
def test_a_prompt_that_filtering_leaves_out_gets_its_hint(visits, text_model, tmp_path):
    training, hinted = stuck_run(text_model, tmp_path, hint_visits=visits)
    first = max(visits, 2)  # at the first visit nothing is replayed, so that no divergence is known
    assert hinted == [set()] * first + [{"S2"}] * (5 - first)
    # It was never trained on as a fresh one, but is replayed, and with the log-probabilities of the policy that wrote it.
    rows = [row for step in range(len(training.gradients)) for row in training.rows(step)]
    fresh, replayed = ({row.ids for row in rows if row.replayed == flag} for flag in (False, True))
    entries = [entry for rollout in training.trainer.graded.rollouts for asked in rollout for entry in asked]
    failed, solved = ({ids for name, *_, ids, _ in entries if name == which} for which in ("S2", "S3"))
    assert failed & replayed and not failed & fresh
    assert not solved & (fresh | replayed | remembered(training).keys())
    assert training.rows_in_model == len(rows)
    logs = [entry for entry in training.trainer.state.log_history if "replay/ratio_max" in entry]
    assert logs and all(entry["replay/ratio_max"] == pytest.approx(1, abs=1e-5) for entry in logs)
    assert all(entry["replay/ratio_p05"] == pytest.approx(1, abs=1e-5) for entry in logs)


def test_were_they_not_stored_there_would_be_no_hint(text_model, tmp_path, monkeypatch):
    """The control: a buffer that takes what is trained on alone."""
    add = StratifiedReplayBuffer.add

    def without_failed(self, experiences, baselines):
        add(self, [e for e in experiences if baselines.baseline(e.prompt) > 0], baselines)

    monkeypatch.setattr(StratifiedReplayBuffer, "add", without_failed)
    assert stuck_run(text_model, tmp_path)[1] == [set()] * 5


# Refusals


def config(tmp_path, **options):
    return AvatarConfig(str(tmp_path), **{"bf16": False, "report_to": [], "use_cpu": True, **options})


MIXED_GROUP = {"advantage_group": "mixed"}
# What is refused, the words that say so, and with what instead it is accepted.
REFUSED = [
    (HINTS | EARLY | {"revisit": "informative"}, ("revisit", "hints"), {"revisit": "unsolved"}),
    (MIXED_GROUP | EARLY, ("advantage_group", "dynamic_sampling"), {"dynamic_sampling": "none"}),
    (
        MIXED_GROUP | {"dynamic_sampling": "mid"},
        ("advantage_group", "dynamic_sampling"),
        {"advantage_group": "fresh"},
    ),
    (MIXED_GROUP | {"method": "mapo"}, ("advantage_group", "advantage_scope"), {"advantage_scope": "group"}),
    ({"replay_scope": "buffer", "method": "mapo"}, ("replay_scope", "batching"), {"batching": "mixed"}),
    ({"replay_scope": "buffer", "method": "mapo"}, ("replay_scope", "batching"), {"replay_scope": "prompt"}),
    ({"tag_weights": "adaptive"}, ("tag_weights", "loss_strata"), {"loss_strata": "tag"}),
    ({"tag_weights": "adaptive", "method": "mupo"}, ("tag_weights", "loss_strata"), {"method": "mapo"}),
    ({"curriculum": "static"}, ("curriculum", "batching"), {"batching": "stratified"}),
    ({"curriculum": "adaptive", "method": "mupo"}, ("curriculum", "batching"), {"method": "mapo"}),
    ({"loss_type": "grpo", "loss_strata": "tag"}, ("loss_type", "grpo"), {"loss_strata": None}),
    ({"loss_type": "dr_grpo", "method": "mapo"}, ("loss_type", "dr_grpo"), {"loss_type": "sapo"}),
    (
        {"loss_type": "vespo", "loss_strata": "batch"},
        ("loss_type", "vespo"),
        {"replayed_generations": 0, "tas_lambda": 0.0},
    ),
    ({"loss_type": "vespo", "method": "mapo"}, ("loss_type", "vespo"), {"loss_type": "cispo", "epsilon_high": 5.0}),
    (
        {"replayed_generations": 7} | EARLY,  # of 8
        ("replayed_generations", "advantage_scope", "at least 2"),
        {"replayed_generations": 6},
    ),
    ({"difficulty": "continuous"}, ("difficulty", "loss_strata"), {"loss_strata": "batch"}),
    ({"refill_rounds": 1}, ("refill_rounds", "dynamic_sampling"), EARLY),
    ({"revisit": "unsolved"}, ("revisit", "dynamic_sampling"), EARLY),
    ({"advantage_scope": "batch"} | EARLY, ("dynamic_sampling", "advantage_scope"), {"advantage_scope": "group"}),
    ({"method": "maple"}, ("method", "avatar", "mapo", "mupo"), {"method": "mupo"}),
]


@pytest.mark.parametrize(("options", "named", "instead"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_does_not_fit_together_is_refused_by_name(tmp_path, options, named, instead):
    with pytest.raises(ValueError) as caught:
        config(tmp_path, **options)
    assert all(name in str(caught.value) for name in named), caught.value
    accepted = config(tmp_path, **options | instead)
    assert {name: getattr(accepted, name) for name in instead} == instead


@pytest.mark.parametrize("loss_strata", [None, "tag"])
def test_losses_that_are_offered_are_accepted(tmp_path, loss_strata):
    with pytest.raises(ValueError, match="loss_type must be one of") as caught:
        config(tmp_path, loss_type="vespo", loss_strata=loss_strata)
    offered = str(caught.value).removeprefix("loss_type must be one of ").partition(" with ")[0].split(", ")
    assert len(offered) > 2
    for loss_type in offered:
        bound = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
        config(tmp_path, loss_type=loss_type, loss_strata=loss_strata, **bound)


@pytest.mark.parametrize(("options", "message", "instead"), MAPO_REFUSALS, ids=lambda value: str(value)[:60])
def test_what_mapo_refuses_is_refused_with_replay(tmp_path, options, message, instead):
    options = {"method": "mapo"} | options
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
    config(tmp_path, **options | instead)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Makes a trainer of these rows, which is not to be run."""
    (model, tokenizer), folder = build_tiny_text(), tmp_path_factory.mktemp("build")

    def of(rows, **options):
        sizes = {"num_generations": COPIES, "per_device_train_batch_size": COPIES, "max_steps": 2}
        options = {"replayed_generations": REPLAYED} | sizes | options
        args = config(folder, gradient_checkpointing=False, **options)
        return AvatarTrainer(model, graded, args, train_dataset=rows, processing_class=tokenizer)

    return of


TAGGED = [
    {"loss_strata": "tag"},
    {"loss_strata": "tag", "tag_weights": "adaptive"},
    {"batching": "stratified", "curriculum": "static"},
    {"advantage_scope": "tag"},
    {"method": "mapo"},
]


@pytest.mark.parametrize("options", TAGGED, ids=str)
def test_rows_without_tags_are_refused_where_an_axis_needs_them(build, options):
    rows = Dataset.from_list(text_rows(2))
    with pytest.raises(ValueError, match="'?tag'?"):
        build(rows.remove_columns("tag"), **options)
    wrong = rows.map(lambda row, i: {"tag": "X" if i == 3 else row["tag"]}, with_indices=True)
    with pytest.raises(ValueError, match="row 3.*tag"):
        build(wrong, **options)
    build(rows, **options)


def test_no_axis_needs_no_tags(build):
    build(Dataset.from_list(text_rows(2)).remove_columns("tag"))


@pytest.mark.parametrize("options", [EARLY, {"batching": "stratified"}, {"method": "mapo"}], ids=str)
def test_streamed_rows_are_refused_where_a_schedule_needs_all(build, options):
    stream = Dataset.from_list(text_rows(2)).to_iterable_dataset()
    with pytest.raises(ValueError, match="IterableDataset"):
        build(stream, replay_scope="prompt", shuffle_dataset=False, **options)
    build(stream, replay_scope="prompt", shuffle_dataset=False)


def test_columns_by_which_rows_are_found_again_are_not_dropped(build):
    rows = Dataset.from_list(text_rows(2))
    with pytest.raises(ValueError, match="remove_unused_columns=True drops id, kind.*replay_scope"):
        build(rows, remove_unused_columns=True)
    build(rows.remove_columns(["id", "kind"]), remove_unused_columns=True)
    build(rows, remove_unused_columns=True, replayed_generations=0)


def test_the_loss_of_an_evaluation_is_that_of_grpo(text_model, tmp_path):
    """Nothing is replayed there, and what cannot be scored is in no mean; the divergence from the reference model is seen."""
    losses = []
    for kind in (
        (AvatarTrainer, AvatarConfig, {"replayed_generations": REPLAYED}),
        (OmniGRPOTrainer, OmniGRPOConfig, {}),
    ):
        trainer_class, config_class, own = kind
        model, tokenizer = build_tiny_text()
        options = DEFAULTS | {"num_generations": COPIES, "max_completion_length": LONGEST, "loss_type": "grpo"}
        sizes = {"per_device_train_batch_size": COPIES, "per_device_eval_batch_size": 6 * COPIES}
        trainer = trainer_class(
            type(model).from_pretrained(text_model),
            Graded(fails=True),
            config_class(str(tmp_path), **options | sizes | own | {"beta": 0.5, "max_steps": 1}),
            train_dataset=Dataset.from_list(text_rows()),
            eval_dataset=Dataset.from_list(text_rows(2)),
            processing_class=tokenizer,
        )
        trainer.reward_funcs[0].rollouts.append([])
        moved, draw = trainer.model.get_input_embeddings().weight, torch.Generator().manual_seed(0)
        moved.data += torch.randn(moved.shape, generator=draw) / 10
        torch.manual_seed(0)
        losses.append(trainer.evaluate()["eval_loss"])
        values = [value for *_, value in trainer.reward_funcs[0].rollouts[0][0]]
        assert None in values and values.count(None) < len(values)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[1] > 1e-3


def test_accuracy_is_that_of_the_task_reward(text_model, tmp_path):
    """The control: the reward is another number."""

    def usual(completion_ids, **_):
        return [1.0 for _ in completion_ids]

    training = train_avatar(
        text_model,
        tmp_path,
        steps=2,
        reward=[graded, usual],
        data=Dataset.from_list(text_rows(2)),
        task_reward="usual",
    )
    logs = [entry for entry in training.trainer.state.log_history if "tag/all/accuracy" in entry]
    assert len(logs) == 2 and all(entry["tag/all/accuracy"] == 1 < entry["tag/all/reward"] for entry in logs)


# Without any axis it is what it was

# Of runs before there were any: loss and gradient norm of each step, and a checksum of what was trained on.
BEFORE = {
    "usual": (
        {"steps": 5, "by_model": True},
        [
            (7.450580596923828e-09, 5.886340618133545),
            (-0.35569849610328674, 11.484112739562988),
            (0.33811166882514954, 7.4955830574035645),
            (-0.29338106513023376, 5.992434024810791),
            (0.39972367882728577, 12.349699020385742),
        ],
        647229961,
    ),
    "two steps, twice": (
        TWICE
        | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2, "steps": 8}
        | {"replay_draw": "balanced", "loss_type": "grpo", "advantage_scope": "batch", "beta": 0.1}
        | {"reward": sometimes_graded},
        [
            (0.9232650399208069, 18.341482162475586),
            (-0.9148998260498047, 8.524599075317383),
            (0.7448968291282654, 0.2560950517654419),
            (-1.059609293937683, 9.311786651611328),
            (1.4917844533920288, 11.890485763549805),
            (-1.2635085582733154, 13.070700645446777),
            (1.3413811922073364, 3.8434863090515137),
            (-1.558948040008545, 8.787445068359375),
        ],
        2172179584,
    ),
    "by tag": (
        {"steps": 5, "by_model": True, "batching": "stratified", "advantage_scope": "tag"},
        [
            (0.0, 5.511701583862305),
            (0.13664059340953827, 10.95748519897461),
            (7.450580596923828e-09, 5.835414409637451),
            (0.20877718925476074, 7.927987575531006),
            (-1.873342514038086, 20.3433837890625),
        ],
        4100842863,
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_without_axes_a_run_is_what_it_was(name, text_model, tmp_path):
    options, before, checksum = BEFORE[name]
    data = dataset(conversational=False)
    if "tag" in name:
        data = data.add_column("tag", ["S", "VA"] * 4)
    data = data.select(range(4)) if "twice" in name else data
    options = {"data": data, "replay_scope": "tiers", "learning_rate": 2e-3} | options
    training = train_avatar(text_model, tmp_path, **options)
    found = [(entry["loss"], entry["grad_norm"]) for entry in training.trainer.state.log_history if "loss" in entry]
    print(f"bitwise: {found == before}")  # as on the machine where the numbers were noted
    assert [value for pair in found for value in pair] == pytest.approx(
        [value for pair in before for value in pair], rel=1e-4, abs=1e-5
    )
    rows = [(row.ids, row.replayed) for step in range(options["steps"]) for row in training.rows(step)]
    assert crc32(str(rows).encode()) == checksum


def test_defaults_change_nothing_of_the_parents(tmp_path):
    """What a preset of MAPO fills in, or its defaults for a run of its own, is not AVATAR's."""
    mine, base = config(tmp_path), OmniGRPOConfig(str(tmp_path), bf16=False, report_to=[], use_cpu=True)
    for each in fields(OmniGRPOConfig):
        assert getattr(mine, each.name) == getattr(base, each.name), each.name
    neutral = {"method": "avatar", "batching": "mixed", "advantage_scope": "group", "loss_strata": None}
    neutral |= {"curriculum": "none", "dynamic_sampling": "none", "tag_weights": "none", "modality_access": "required"}
    assert {name: getattr(mine, name) for name in neutral} == neutral


ACCEPTED_BEFORE = [
    {"remove_unused_columns": True},
    {"ignore_data_skip": True},
    {"fp16": True},
    {"entropy_coef": 0.01},
    {"use_adaptive_entropy": True},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 3},  # steps and rollouts do not end together
    {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    {"loss_type": "sapo", "beta": 0.1},
    {"advantage_scope": "tag_whitened"},
    {"advantage_scope": "batch", "batching": "stratified"},
    {"advantage_group": "mixed", "batching": "stratified"},
    {"modality_access": "all"},
    {"importance_sampling_level": "sequence"},
    {"top_entropy_quantile": 0.5},
    {"cast_lm_head_to_fp32": True},
]


@pytest.mark.parametrize("options", ACCEPTED_BEFORE + AVATAR_ACCEPTED, ids=str)
def test_what_was_accepted_is_accepted(tmp_path, options):
    config(tmp_path, **options)
