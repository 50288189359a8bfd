"""The gradient of an AVATAR step is that of J_on + alpha J_off (AVATAR, eq. 3, 6 and 11), written out row by row."""

import gc
import math
import random
import types
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import fmean, stdev

import pytest
import torch
from datasets import Dataset
from omni_runs import DEFAULTS, watch_updates
from test_grpo_parity import dataset
from test_processes import worst
from tiny_models import build_tiny, build_tiny_text, save_tiny

from maple_trl import AvatarConfig, AvatarTrainer
from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.serving import serve_media
from maple_trl.trainers.omni_grpo.trainer import PROMPTS_KEY


pytestmark = pytest.mark.slow


COPIES, REPLAYED, GROUPS = 4, 2, 2
PROMPTS = 3  # of which an epoch, one rollout, takes two: some groups meet an empty buffer, some a filled one
LONGEST = 6
LAMBDA = 0.5
LOW, HIGH = 0.2, 0.3
OWN_LOW, OWN_HIGH = 0.05, 0.1
RATE = 0.02  # of plain gradient descent; it moves some ratios over the bounds of the clipping
PLAIN_STEPS = {
    "optim": "sgd",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "epsilon": LOW,
    "epsilon_high": HIGH,
}
STEPS = 5


def number_of(ids):
    return zlib.crc32(str(list(ids)).encode())


def graded(completion_ids, **_):
    return [number_of(ids) % 101 / 101 for ids in completion_ids]


def sometimes_graded(completion_ids, **_):
    """A third of the completions has no reward, is in no mean, and is never stored."""
    return [None if number_of(ids) % 3 == 0 else number_of(ids) % 101 / 101 for ids in completion_ids]


def sometimes_judged(completion_ids, prompts, **_):
    """A judge that fails on some completions, and is not for one of the prompts."""
    values = [math.nan if number_of(ids) % 5 < 2 else number_of(ids) % 89 / 89 for ids in completion_ids]
    return [None if hash_of(prompt) % 3 == 0 else value for value, prompt in zip(values, prompts, strict=True)]


def hash_of(prompt):
    return zlib.crc32(str(prompt).encode())


JUDGED = {"reward": [graded, sometimes_judged], "reward_weights": [0.2, 0.8]}


class Watched(AvatarTrainer):
    """Notes what it generates and trains on. Completions are drawn at random here, no two alike, or by the model."""

    by_model = False

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.by_model:
            found = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        else:
            found = self._drawn(prompt_ids), None
        keys = [tuple(ids) for ids in prompt_ids] if self.family is None else [p.key for p in self._serving]
        self.generated = [*getattr(self, "generated", []), list(zip(keys, map(tuple, found[0]), strict=True))]
        return found

    def _drawn(self, prompt_ids):
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        special = {*tokenizer.all_special_ids, *(self.family.suppressed_ids if self.family is not None else ())}
        words = [i for i in range(len(tokenizer)) if i not in special]
        draw = random.Random(f"{len(getattr(self, 'generated', []))}")
        return [draw.choices(words, k=draw.randint(2, LONGEST)) for _ in prompt_ids]

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.last_logps = found[0].detach()
        return found

    def _compute_loss(self, model, inputs):
        prompts = self.real_ids(inputs, "prompt")
        keys = prompts if self.family is None else [prompt.key for prompt in inputs[PROMPTS_KEY]]
        masks = inputs["completion_mask"].bool()
        loss = super()._compute_loss(model, inputs)
        ratios = (self.last_logps - inputs["old_per_token_logps"]).exp()
        ratios = [row[mask] for row, mask in zip(ratios, masks, strict=True)]
        flags = inputs["replayed"].bool().tolist()
        facts = zip(keys, self.real_ids(inputs, "completion"), flags, ratios, prompts, strict=True)
        rows = [Trained(*row) for row in facts if row[1]]  # what cannot be scored has no token that counts
        self.trained = [*getattr(self, "trained", []), rows]
        return loss

    def real_ids(self, inputs, part):
        pairs = zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"].bool(), strict=True)
        return [tuple(ids[mask].tolist()) for ids, mask in pairs]


@dataclass
class Trained:
    """A row of a micro-batch."""

    key: object
    ids: tuple
    replayed: bool
    ratios: torch.Tensor
    prompt: tuple


@dataclass
class Training:
    """What a run did: gradients and the weights that they belong to, step by step."""

    trainer: Watched
    gradients: list = field(default_factory=list)
    weights: list = field(default_factory=list)
    rows_in_model: int = 0
    encoded: dict = field(default_factory=dict)  # prompts, once the reference has asked for them

    def steps_of_rollout(self):
        args = self.trainer.args
        return args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations

    def rows(self, step):
        slots = self.trainer.args.gradient_accumulation_steps
        return [row for rows in self.trainer.trained[step * slots : (step + 1) * slots] for row in rows]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A folder with the model, for TRL to load a reference model from."""
    folder = tmp_path_factory.mktemp("text")
    model, tokenizer = build_tiny_text()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def omni_model(tmp_path_factory):
    return save_tiny("qwen2_5_omni", tmp_path_factory.mktemp("omni"))


def train_text(folder, tmp_path, steps=STEPS, reward=graded, by_model=False, data=None, **options):
    model, tokenizer = build_tiny_text()
    model = type(model).from_pretrained(folder)
    data = dataset(conversational=False).select(range(PROMPTS)) if data is None else data
    return train(model, tokenizer, data, tmp_path, steps, reward, by_model, **options)


def train_omni(
    folder,
    seven_tags,
    tmp_path,
    steps=STEPS,
    reward=graded,
    by_model=False,
    tags=("VAS", "V", "A"),
    hint=None,
    **options,
):
    media, rows = seven_tags
    chosen = [next(row for row in rows if row["tag"] == tag) | ({"hint": hint} if hint else {}) for tag in tags]
    options = {"media_root": str(media)} | options
    model, processor = load_model(str(folder), dtype="float32"), load_processor(str(folder))
    return train(model, processor, Dataset.from_list(chosen), tmp_path, steps, reward, by_model, **options)


def train(model, processing_class, data, tmp_path, steps, reward, by_model, **options):
    options = {
        **DEFAULTS,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": COPIES * GROUPS,
        "gradient_accumulation_steps": 1,
        "num_generations": COPIES,
        "replayed_generations": REPLAYED,
        "replay_scope": "prompt",
        "max_completion_length": LONGEST,
        "max_steps": steps,
        **PLAIN_STEPS,
        "tas_lambda": LAMBDA,
        "seed": 3,
        **options,
    }
    trainer = Watched(model, reward, AvatarConfig(**options), train_dataset=data, processing_class=processing_class)
    trainer.by_model = by_model
    return follow(trainer, steps)


def follow(trainer, steps):
    """Trains; what happened."""
    training = Training(trainer)
    watch_updates(trainer, training.gradients, training.weights)

    def count(module, args, kwargs):
        if torch.is_grad_enabled():  # neither to generate nor to look back
            training.rows_in_model += len(kwargs["input_ids"])

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert len(training.gradients) == steps
    return training


# The reference


@dataclass
class Completion:
    """A row as the formulas see it. `old` are its log-probabilities under the policy that wrote it."""

    key: object
    ids: tuple
    reward: float | None
    old: torch.Tensor | None = None
    replayed: bool = False
    advantage: float = 0.0
    kl_from: torch.Tensor | None = None


@dataclass
class Formula:
    """Terms of the objective; the defaults are those of [`train`]."""

    loss_type: str = "dapo"
    alpha: float = 1.0
    shape: str = "parabolic"
    lam: float = LAMBDA
    beta: float = 0.0
    group: str = "fresh"
    scope: str = "group"
    low: float = LOW
    high: float = HIGH
    own_low: float = LOW
    own_high: float = HIGH
    sequence: bool = False
    replayed: int = REPLAYED
    window: int = 20
    limit: float = 5.0
    baseline: str = "vcrs"
    whole_alpha: bool = False
    current_policy: bool = False
    scope_of_replay: str = "prompt"


@dataclass
class Rollout:
    """What counts of a rollout: the fresh completions that can be scored, and the replayed ones."""

    fresh: list
    replayed: list
    filled: float


def tas(t, length, lam, shape):
    if length == 1 or shape == "uniform":
        return 1.0
    x = t / (length - 1)
    curve = {"parabolic": (2 * x - 1) ** 2, "linear_decay": 1 - x, "linear_incline": x}
    curve["inverse_parabolic"] = 1 - curve["parabolic"]
    return 1 + lam * curve[shape]


def spread(rewards):
    return stdev(rewards) if len(rewards) > 1 else 0.0


def set_advantages(rollout, history, formula):
    for c in rollout.fresh:
        pool = rollout.fresh + rollout.replayed if formula.group == "mixed" else rollout.fresh
        if formula.scope == "group":
            pool = [other for other in pool if other.key == c.key]
        rewards = [other.reward for other in pool]
        c.advantage = (c.reward - fmean(rewards)) / (spread(rewards) + 1e-4)
    past = [c.reward for c in rollout.replayed]
    for c in rollout.replayed:
        baseline = fmean(history[c.key][-formula.window :]) if formula.baseline == "vcrs" else fmean(past)
        difference = c.reward - baseline
        if max(past) - min(past) > 1e-6:
            difference /= stdev(past) + 1e-4
        c.advantage = min(max(difference, -formula.limit), formula.limit)


def row_loss(c, now, formula, temperature=(1.0, 1.05)):
    """Loss of each token of a row."""
    old = now.detach() if formula.current_policy and c.replayed else c.old
    low, high = (formula.own_low, formula.own_high) if c.replayed else (formula.low, formula.high)
    weights = torch.tensor([tas(t, len(c.ids), formula.lam, formula.shape) for t in range(len(c.ids))])
    advantages = c.advantage * weights
    ratios = (now - old).exp()
    if formula.sequence:
        ratios = (now - old).mean().exp().expand(len(c.ids))
    if formula.loss_type == "cispo":
        values = -ratios.clamp(max=high).detach() * advantages * now
    elif formula.loss_type == "sapo":
        tau = temperature[0] if c.advantage > 0 else temperature[1]
        values = -torch.sigmoid(tau * (ratios - 1)) * 4 / tau * advantages
    else:
        values = -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    if formula.beta and not c.replayed:
        away = c.kl_from - now
        values = values + formula.beta * ratios * (away.exp() - away - 1)  # TRL corrects for the ratio
    return values


def mean_loss(rows, total, logps, formula):
    """The part of `rows` in the mean over `total`."""
    summed = torch.zeros(())
    tokens = sum(len(c.ids) for c in total)
    for c in rows:
        values = row_loss(c, logps[id(c)], formula)
        if formula.loss_type in ("dapo", "cispo"):
            summed = summed + values.sum() / tokens
        elif formula.loss_type == "dr_grpo":
            summed = summed + values.sum() / LONGEST / len(total)
        else:
            summed = summed + values.mean() / len(total)
    return summed


def loss_of(rows, rollout, logps, formula):
    """J_on + alpha J_off, over those of the rollout's rows that a step trains on."""
    fresh = mean_loss([c for c in rows if not c.replayed], rollout.fresh, logps, formula)
    if not rollout.replayed:
        return fresh
    past = mean_loss([c for c in rows if c.replayed], rollout.replayed, logps, formula)
    return fresh + formula.alpha * (1.0 if formula.whole_alpha else rollout.filled) * past


def log_probs(training, model, completion):
    """A completion's log-probabilities, alone in a batch."""
    trainer, key = training.trainer, completion.key
    if trainer.family is not None:
        training.encoded = training.encoded or encoded(trainer)
    return log_probs_under(trainer, model, key if trainer.family is None else training.encoded[key], completion.ids)


def log_probs_under(trainer, model, prompt, ids):
    """The same of some tokens, given what was shown: token ids, or an encoded prompt with its media."""
    ids = torch.tensor(ids)
    if trainer.family is None:
        whole = torch.cat([torch.tensor(prompt), ids])[None]
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0]
    else:
        whole = torch.cat([prompt.input_ids, ids])[None]
        positions = batch_position_ids([prompt], len(prompt), len(ids))
        with serve_media(trainer.family, model, [prompt]):
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), position_ids=positions).logits[0]
    logits = logits[-len(ids) - 1 : -1] / trainer.temperature
    return logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids]


def encoded(trainer):
    prompts = [trainer.prompt_builder.encode(row) for row in trainer.train_dataset]
    return {prompt.key: prompt for prompt in prompts}


def set_rewards(fresh, stored, rewards, weights, prompts):
    """
    The rewards of a rollout's completions, `None` for one that a function failed on which scored others of its prompt, be
    they stored ones.
    """
    set_scores(fresh, rewards, prompts)
    for c in fresh:
        group = [other for other in (*fresh, *stored[c.key]) if other.key == c.key]
        applying = [k for k in range(len(rewards)) if any(other.scores[k] is not None for other in group)]
        if applying and all(c.scores[k] is not None for k in applying):
            c.reward = sum(weights[k] * c.scores[k] for k in applying)


def set_scores(fresh, rewards, prompts):
    for c in fresh:
        values = [function(completion_ids=[c.ids], prompts=[prompts[c.key]])[0] for function in rewards]
        c.scores = [None if value is None or math.isnan(value) else value for value in values]


def prompts_of(trainer):
    """The prompts of the rows as rewards are handed them, by key."""
    if trainer.family is not None:
        return {trainer.prompt_builder.encode(row).key: row["prompt"] for row in trainer.train_dataset}
    prompts = list(trainer.train_dataset["prompt"])
    return {tuple(trainer._tokenize_prompts([prompt])[0][0]): prompt for prompt in prompts}


def rollouts_of(training, model, reward, formula, whole=True):
    """
    What a run must have trained on, by bookkeeping of its own: the rollouts, and the rows of each step. With `whole` it is
    asserted that those are all of its rows.
    """
    trainer, per_rollout = training.trainer, training.steps_of_rollout()
    rewards, prompts = reward if isinstance(reward, list) else [reward], prompts_of(trainer)
    weights = trainer.args.reward_weights or [1.0] * len(rewards)
    stored, history = defaultdict(list), defaultdict(list)
    found = []
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    for number, generated in enumerate(trainer.generated):
        steps = range(number * per_rollout, (number + 1) * per_rollout)
        everything = [Completion(key, ids, None) for key, ids in generated]
        set_rewards(everything, stored, rewards, weights, prompts)
        fresh = [c for c in everything if c.reward is not None]
        for c in fresh:
            with torch.no_grad():
                load(model, training.weights[steps[0]])
                c.old = log_probs(training, model, c)
                load(model, original)
                c.kl_from = log_probs(training, model, c)
            history[c.key].append(c.reward)
        chosen = {(row.key, row.ids): row for step in steps for row in training.rows(step)}
        own = {(c.key, c.ids) for c in fresh}
        assert len(own) == len(fresh)
        assert not whole or own == {content for content, row in chosen.items() if not row.replayed}
        replayed = []
        for content, row in chosen.items():
            if row.replayed:
                (c,) = [c for c in stored[row.key] if (c.key, c.ids) == content]
                replayed.append(Completion(c.key, c.ids, c.reward, c.old, True))
        keys = list(dict.fromkeys(c.key for c in everything))
        counts = Counter(c.key for c in replayed)
        if formula.scope_of_replay == "tiers":  # of any prompts
            held = sum(map(len, stored.values()))
            assert len(replayed) == min(formula.replayed * len(keys), held)
            assert len(replayed) + len(everything) == COPIES * len(keys)
        for key in (
            keys if formula.scope_of_replay == "prompt" else ()
        ):  # as many as there are, and only what is missing is generated
            assert counts[key] == min(formula.replayed, len(stored[key]))
            assert counts[key] + sum(c.key == key for c in everything) == COPIES
        rollout = Rollout(fresh, replayed, len(replayed) / (len(keys) * formula.replayed))
        set_advantages(rollout, history, formula)
        by_content = {(c.key, c.ids): c for c in fresh + replayed}
        contents = [[(row.key, row.ids) for row in training.rows(step)] for step in steps]
        rows = [[by_content[content] for content in step if content in by_content] for step in contents]
        for i in range(0, per_rollout, per_rollout // trainer.args.num_iterations):
            passed = sum(rows[i : i + per_rollout // trainer.args.num_iterations], [])
            assert sorted(map(id, passed)) == sorted(map(id, by_content.values()))  # each row once in each pass
        found.append((rollout, dict(zip(steps, rows, strict=True)), {k: list(v) for k, v in history.items()}))
        for c in fresh:
            stored[c.key].append(c)
    return found


def load(model, weights):
    model.load_state_dict(weights, strict=False)


def gradient_of(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(names, parameters, gradients, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in pairs}


def expected_gradients(training, model, rollouts, formula):
    args = training.trainer.args
    parts = args.steps_per_generation // args.gradient_accumulation_steps
    found = []
    for rollout, steps, history in rollouts:
        set_advantages(rollout, history, formula)
        for step, rows in steps.items():
            with torch.no_grad():
                load(model, training.weights[step])
            logps = {id(c): log_probs(training, model, c) for c in rows}
            found.append(gradient_of(parts * loss_of(rows, rollout, logps, formula), model))
    return found


def errors(expected, training):
    return [worst(formula, mine)[0] for formula, mine in zip(expected, training.gradients, strict=True)]


def reference_for(kind):
    return build_tiny_text()[0] if kind == "text" else build_tiny("qwen2_5_omni")[0]


def check(training, kind, reward, formula, tolerance=1e-4):
    model = reference_for(kind)
    rollouts = rollouts_of(training, model, reward, formula)
    found = errors(expected_gradients(training, model, rollouts, formula), training)
    print(f"worst gradient error {max(found):.2e}")
    assert max(found) <= tolerance, found
    return rollouts


# Gradients


GRPO, DR_GRPO, SAPO = ({"loss_type": name} for name in ("grpo", "dr_grpo", "sapo"))
OWN_CLIP = {"replay_epsilon": OWN_LOW, "replay_epsilon_high": OWN_HIGH}
CLIPS = {"own_low": OWN_LOW, "own_high": OWN_HIGH}
HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
TWO_STEPS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
FOUR_STEPS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
SPARSE = {"reward": sometimes_graded}
LONE, OF_LONE = {"replayed_generations": 3, "advantage_scope": "batch"}, {"replayed": 3, "scope": "batch"}
TIERS, OF_TIERS = {"replay_scope": "tiers"}, {"scope_of_replay": "tiers"}


def steps_for(options):
    """Whole rollouts, of the second of which at least the buffer serves a part."""
    parts = options.get("steps_per_generation", 1) // options.get("gradient_accumulation_steps", 1)
    return STEPS * max(parts, 1) * options.get("num_iterations", 1)


# Options of a run, and what they make of the formula.
CASES = {
    "dapo": ({}, {}),
    "dapo, half alpha": ({"replay_alpha": 0.5}, {"alpha": 0.5}),
    "dapo, no alpha": ({"replay_alpha": 0.0}, {"alpha": 0.0}),
    "dapo, penalty": ({"beta": 0.1}, {"beta": 0.1}),
    "dapo, two micro-batches": (HALVES, {}),
    "dapo, two steps, twice, penalty": (TWO_STEPS | {"num_iterations": 2, "beta": 0.1}, {"beta": 0.1}),
    "dapo, own clip": (OWN_CLIP, CLIPS),
    "dapo, mixed groups": ({"advantage_group": "mixed"}, {"group": "mixed"}),
    "dapo, one fresh": (
        {"replayed_generations": 3, "advantage_group": "mixed"},
        {"replayed": 3, "group": "mixed"},
    ),
    "dapo, partly filled": (SPARSE, {}),
    "dapo, sequence ratios": ({"importance_sampling_level": "sequence"}, {"sequence": True}),
    "grpo": (GRPO, GRPO),
    "grpo, half alpha, penalty": (GRPO | {"replay_alpha": 0.5, "beta": 0.1}, GRPO | {"alpha": 0.5, "beta": 0.1}),
    "grpo, own clip, two micro-batches": (GRPO | OWN_CLIP | HALVES, GRPO | CLIPS),
    "grpo, four micro-batches, two steps, twice": (GRPO | FOUR_STEPS | {"num_iterations": 2}, GRPO),
    "grpo, partly filled, mixed groups": (SPARSE | GRPO | {"advantage_group": "mixed"}, GRPO | {"group": "mixed"}),
    "grpo, whole batch": (GRPO | {"advantage_scope": "batch"}, GRPO | {"scope": "batch"}),
    "dr_grpo": (DR_GRPO, DR_GRPO),
    "dr_grpo, half alpha, two steps, penalty": (
        DR_GRPO | TWO_STEPS | {"replay_alpha": 0.5, "beta": 0.1},
        DR_GRPO | {"alpha": 0.5, "beta": 0.1},
    ),
    "cispo, own clip": (
        {"loss_type": "cispo", "epsilon_high": 1.2, "replay_epsilon_high": 1.05},
        {"loss_type": "cispo", "high": 1.2, "own_high": 1.05},
    ),
    "tiers": (TIERS, OF_TIERS),
    "tiers, half alpha, two micro-batches, penalty": (
        TIERS | HALVES | {"replay_alpha": 0.5, "beta": 0.1, "replay_draw": "priority"},
        OF_TIERS | {"alpha": 0.5, "beta": 0.1},
    ),
    "tiers, grpo, two steps, partly filled": (
        TIERS | GRPO | TWO_STEPS | SPARSE | LONE | {"replay_draw": "diverse"},
        OF_TIERS | GRPO | OF_LONE,
    ),
    "sapo, half alpha": (SAPO | {"replay_alpha": 0.5}, SAPO | {"alpha": 0.5}),
    "judged, dapo, two micro-batches, penalty": (JUDGED | HALVES | {"beta": 0.1}, {"beta": 0.1}),
    "judged, grpo, two steps, half alpha, penalty": (
        JUDGED | GRPO | TWO_STEPS | {"replay_alpha": 0.5, "beta": 0.1},
        GRPO | {"alpha": 0.5, "beta": 0.1},
    ),
    "judged, dr_grpo, mixed groups": (JUDGED | DR_GRPO | {"advantage_group": "mixed"}, DR_GRPO | {"group": "mixed"}),
    "judged, sapo, whole batch": (JUDGED | SAPO | {"advantage_scope": "batch"}, SAPO | {"scope": "batch"}),
    "judged, one fresh": (JUDGED | LONE, OF_LONE),
    "no shaping": ({"tas_lambda": 0.0}, {"lam": 0.0}),
    "linear shaping": ({"tas_shape": "linear_decay", "tas_lambda": 2.0}, {"shape": "linear_decay", "lam": 2.0}),
    "short window, low limit": (
        {"vcrs_window": 1, "replay_advantage_limit": 0.5},
        {"window": 1, "limit": 0.5},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.matrix(cases=3)
def test_gradients_of_a_text_model(name, text_model, tmp_path):
    options, terms = CASES[name]
    training = train_text(text_model, tmp_path, steps=steps_for(options), **options)
    rollouts = check(training, "text", options.get("reward", graded), Formula(**terms))
    filled = [rollout.filled for rollout, *_ in rollouts]
    assert filled[0] == 0 and max(filled) > 0
    if "judged" in name:
        assert training.trainer.missing_rewards.keys() == {("sometimes_judged", "")}
    if "partly" in name:
        assert any(0 < share < 1 for share in filled)


@pytest.mark.parametrize("options", [{}, GRPO], ids=["dapo", "grpo"])
def test_failed_rewards_that_count_as_zero_are_told_apart(options, text_model, tmp_path, monkeypatch):
    """The control of the judged cases: a trainer that takes the scores as TRL does."""
    monkeypatch.setattr(Watched, "_set_apart", lambda self, flight, scores, tags: scores)
    training = train_text(text_model, tmp_path, steps=1, **JUDGED | options)
    model, formula = reference_for("text"), Formula(**options)
    monkeypatch.setitem(globals(), "set_rewards", as_zero)
    rollouts = rollouts_of(training, model, JUDGED["reward"], formula)
    assert max(errors(expected_gradients(training, model, rollouts, formula), training)) <= 1e-4
    monkeypatch.undo()
    rollouts = rollouts_of(training, model, JUDGED["reward"], formula, whole=False)
    assert max(errors(expected_gradients(training, model, rollouts, formula), training)) > 1e-2


def as_zero(fresh, stored, rewards, weights, prompts):
    set_scores(fresh, rewards, prompts)
    for c in fresh:
        c.reward = sum(weight * score for weight, score in zip(weights, c.scores, strict=True) if score is not None)


@pytest.mark.parametrize("bound", ["replay_epsilon", "replay_epsilon_high"])
def test_one_bound_of_its_own(bound, text_model, tmp_path):
    """The other one is that of fresh completions."""
    training = train_text(text_model, tmp_path, **{bound: OWN_CLIP[bound]})
    own = {"replay_epsilon": {"own_low": OWN_LOW}, "replay_epsilon_high": {"own_high": OWN_HIGH}}[bound]
    check(training, "text", graded, Formula(**own))


def test_gradients_of_a_conversation(text_model, tmp_path):
    data = dataset(conversational=True).select(range(PROMPTS))
    check(train_text(text_model, tmp_path, data=data, **GRPO), "text", graded, Formula(**GRPO))


OMNI_CASES = {
    "dapo, half alpha, two micro-batches": (HALVES | {"replay_alpha": 0.5}, {"alpha": 0.5}),
    "grpo, two steps, twice, penalty": (
        GRPO | TWO_STEPS | {"num_iterations": 2, "beta": 0.1},
        GRPO | {"beta": 0.1},
    ),
    "tiers, dapo": (TIERS, OF_TIERS),
    "dr_grpo, own clip, mixed groups": (
        DR_GRPO | OWN_CLIP | {"advantage_group": "mixed"},
        DR_GRPO | CLIPS | {"group": "mixed"},
    ),
}


@pytest.mark.parametrize("name", OMNI_CASES)
@pytest.mark.matrix(cases=1)
def test_gradients_of_an_omni_model(name, omni_model, seven_tags, tmp_path):
    options, terms = OMNI_CASES[name]
    training = train_omni(omni_model, seven_tags, tmp_path, steps=steps_for(options), **options)
    rollouts = check(training, "omni", graded, Formula(**terms))
    assert any(rollout.replayed for rollout, *_ in rollouts)
    for part in ("visual", "audio_tower", "language_model"):
        assert any(v.norm() > 1e-4 for step in training.gradients for n, v in step.items() if part in n), part


def test_what_is_replayed_reaches_the_towers(omni_model, seven_tags, tmp_path):
    """The fresh completions of groups of equal rewards have no gradient: all of it is that of replayed ones."""

    def by_visit(completion_ids, **_):
        by_visit.calls += 1
        return [float(by_visit.calls % 2)] * len(completion_ids)

    by_visit.calls = 0
    training = train_omni(
        omni_model, seven_tags, tmp_path, steps=4, reward=by_visit, tags=("VAS", "VA"), learning_rate=0.0
    )
    towers = [
        [float(v.norm()) for n, v in step.items() if "visual" in n or "audio_tower" in n]
        for step in training.gradients
    ]
    assert max(towers[0]) == 0
    assert min(max(step) for step in towers[1:]) > 1e-4


@pytest.fixture(scope="module")
def plain_run(text_model, tmp_path_factory):
    """A run whose replayed rows have moved away, with rollouts that could be served in part alone."""
    options = SPARSE | GRPO | OWN_CLIP | {"replay_alpha": 0.5, "beta": 0.1}
    training = train_text(text_model, tmp_path_factory.mktemp("plain"), **options)
    formula = Formula(**GRPO, **CLIPS, alpha=0.5, beta=0.1)
    model = reference_for("text")
    return training, model, rollouts_of(training, model, sometimes_graded, formula), formula


WRONG = {
    "no shaping": {"shape": "uniform"},
    "another shape": {"shape": "inverse_parabolic"},
    "replay without weight": {"alpha": 0.0},
    "another weight": {"alpha": 0.6},
    "the batch's mean as baseline": {"baseline": "batch"},
    "the latest reward as baseline": {"window": 1},
    "mixed groups": {"group": "mixed"},
    "the whole weight where a part is filled": {"whole_alpha": True},
    "the current policy as the behaviour policy": {"current_policy": True},
    "one clip for all": {"own_low": LOW, "own_high": HIGH},
    "token mean": {"loss_type": "dapo"},
    "no penalty": {"beta": 0.0},
}


def test_the_right_formula_of_the_controls(plain_run):
    training, model, rollouts, formula = plain_run
    assert max(errors(expected_gradients(training, model, rollouts, formula), training)) <= 1e-4


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.matrix(cases=6)
def test_a_wrong_formula_is_told_apart(name, plain_run):
    training, model, rollouts, formula = plain_run
    wrong = Formula(**vars(formula) | WRONG[name])
    found = max(errors(expected_gradients(training, model, rollouts, wrong), training))
    print(f"{name}: {found:.2e}")
    assert found > 1e-2


# Counts and ratios


def bookkeeping(training, copies=COPIES, wanted=REPLAYED):
    """Replayed rows of each rollout by a count of what was generated; every replayed row was generated before."""
    stored, counts = defaultdict(Counter), []
    for step, generated in enumerate(training.trainer.generated):
        rows = training.rows(step)
        fresh = Counter((row.key, row.ids) for row in rows if not row.replayed)
        assert fresh == Counter(generated)
        expected = 0
        for key in dict.fromkeys(row.key for row in rows):
            replayed = Counter(row.ids for row in rows if row.replayed and row.key == key)
            assert not replayed - stored[key]  # none that was not written before, none more often than it was
            assert replayed.total() == min(wanted, stored[key].total())
            assert replayed.total() + sum(k == key for k, _ in generated) == copies
            expected += replayed.total()
        counts.append(expected)
        for key, ids in generated:
            stored[key][ids] += 1
    return counts


@pytest.mark.parametrize("kind", ["text", "omni"])
def test_replayed_rows_are_counted(kind, text_model, omni_model, seven_tags, tmp_path):
    """With completions of the model itself, which may repeat."""
    if kind == "text":
        training = train_text(text_model, tmp_path, by_model=True, steps=6)
    else:
        training = train_omni(omni_model, seven_tags, tmp_path, by_model=True, steps=6, shared_prefix="off")
    counts = bookkeeping(training)
    assert counts[0] == 0 and sum(counts) >= 3 * REPLAYED
    assert training.rows_in_model == 6 * GROUPS * COPIES
    logs = [entry for entry in training.trainer.state.log_history if "replay/share" in entry]
    assert [entry["replay/share"] * GROUPS * COPIES for entry in logs] == counts
    assert [entry["replay/generated"] for entry in logs] == [GROUPS * COPIES - count for count in counts]


def ratio_errors(training):
    """How far the ratios of replayed tokens are from 1, at each step that replays."""
    rows = [training.rows(step) for step in range(len(training.gradients))]
    ratios = [[row.ratios for row in step if row.replayed] for step in rows]
    return [float((torch.cat(step) - 1).abs().max()) for step in ratios if step]


@pytest.mark.parametrize("by_model", [False, True])
@pytest.mark.parametrize("options", [{}, TWO_STEPS | {"num_iterations": 2}], ids=["one step", "two steps, twice"])
@pytest.mark.parametrize("kind", ["text", "omni"])
@pytest.mark.matrix(cases=3)
def test_ratios_are_one_while_the_policy_stands_still(
    kind, options, by_model, text_model, omni_model, seven_tags, tmp_path
):
    options = {"learning_rate": 0.0, "steps": steps_for(options), "by_model": by_model} | options
    if kind == "text":
        training = train_text(text_model, tmp_path, **options)
    else:
        training = train_omni(omni_model, seven_tags, tmp_path, **options)
    found = ratio_errors(training)
    print(f"worst ratio error {max(found):.2e}")
    assert len(found) >= 3 and max(found) <= 1e-5
    logged = [entry for entry in training.trainer.state.log_history if "replay/ratio_max" in entry]
    assert len(logged) == len(found)
    for entry in logged:
        assert entry["replay/ratio_p05"] == pytest.approx(1, abs=1e-5)
        assert entry["replay/ratio_max"] == pytest.approx(1, abs=1e-5)
        assert entry["replay/effective_share"] == pytest.approx(1, abs=1e-5)


def test_ratios_move_with_the_policy(text_model, tmp_path):
    """The control: what the test above must notice."""
    assert min(ratio_errors(train_text(text_model, tmp_path))) > 1e-3


@pytest.mark.matrix(cases=2)
@pytest.mark.parametrize("kind", ["text", "conversation", "omni"])
def test_replayed_rows_have_the_prompt_that_they_were_written_under(
    kind, text_model, omni_model, seven_tags, tmp_path
):
    """From the third visit on all prompts, which always fail, show their hint; what was written before does not."""

    def failing(completion_ids, **_):
        return [0.0] * len(completion_ids)

    hint = "listen to the tone"
    options = {"learning_rate": 0.0, "steps": 6, "reward": failing, "hints": True, "hint_visits": 1}
    if kind == "omni":
        training = train_omni(omni_model, seven_tags, tmp_path, tags=("VAS", "VA"), hint=hint, **options)
    else:
        data = dataset(conversational=kind != "text").select(range(GROUPS)).add_column("hint", [hint] * GROUPS)
        training = train_text(text_model, tmp_path, data=data, **options)
    processing_class = training.trainer.processing_class
    texts = [[(row, hint in processing_class.decode(row.prompt)) for row in training.rows(step)] for step in range(6)]
    for step, rows in enumerate(texts):
        assert {shown for row, shown in rows if not row.replayed} == {step >= 2}
    assert {shown for step in texts for row, shown in step if row.replayed} == {False, True}
    stored = defaultdict(set)
    for rows in texts:
        for row, _ in rows:
            assert not row.replayed or row.ids in stored[row.prompt]
        for row, _ in rows:
            stored[row.prompt].add(row.ids)
    assert max(ratio_errors(training)) <= 1e-5
    logged = [entry for entry in training.trainer.state.log_history if "hint/given" in entry]
    assert [entry["hint/given"] for entry in logged] == [0, 0, GROUPS, GROUPS, GROUPS, GROUPS]
    if kind == "text":  # the control: under the other prompt it would not be 1
        model = reference_for("text")
        row = next(row for row, shown in texts[-1] if row.replayed)
        one, other = (
            log_probs(training, model, Completion(key, row.ids, None)) for key in list(stored)[:: len(stored) - 1]
        )
        assert float(((one - other).exp() - 1).abs().max()) > 1e-3


# What is kept


def reachable(*roots):
    """All objects that some refer to, but for code."""
    code = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.FrameType)
    seen, waiting = {}, list(roots)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, code):
            continue
        seen[id(thing)] = thing
        waiting += gc.get_referents(thing)
        waiting += [thing.__dict__] if hasattr(thing, "__dict__") else []
    return list(seen.values())


def largest_tensor(things):
    """In bytes, with what a view keeps alive."""
    return max((t.untyped_storage().nbytes() for t in things if isinstance(t, torch.Tensor)), default=0)


def test_no_pixels_are_kept(omni_model, seven_tags, tmp_path):
    training = train_omni(omni_model, seven_tags, tmp_path, tags=("VAS", "VA", "V"))
    memory = training.trainer.memory
    kept = reachable(memory)
    tensors = [thing for thing in kept if isinstance(thing, torch.Tensor)]
    assert len(memory.buffer) >= PROMPTS * REPLAYED and len(tensors) == 2 * len(memory.buffer)
    assert largest_tensor(kept) <= 4 * LONGEST
    assert not any(isinstance(thing, EncodedPrompt) for thing in kept)
    assert not any(isinstance(thing, (bytes, bytearray)) and len(thing) > 1000 for thing in kept)
    # The control: a prompt in the buffer would have been found.
    prompt = next(iter(encoded(training.trainer).values()))
    memory.buffer.remembered = [{"prompt": prompt}]
    found = reachable(memory)
    assert any(isinstance(thing, EncodedPrompt) for thing in found) and largest_tensor(found) > 10_000
