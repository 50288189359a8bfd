"""The gradient of an optimizer step is that of the formulas (MAPLE, eq. 2 to 4), written out row by row and tag by tag."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

import pytest
import torch
from datasets import Dataset
from jobs.train_job import DEFAULTS, REWARDS, MAPOJobTrainer
from omni_runs import watch_updates
from test_processes import worst
from tiny_models import build_tiny, save_tiny
from torch.nn.utils.rnn import pad_sequence

from maple_trl import MAPOConfig
from maple_trl.data.synthetic import write_seven_tags
from maple_trl.modalities import ModalityTag
from maple_trl.omni.encoded import batch_position_ids
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.serving import serve_media


pytestmark = pytest.mark.slow


# The first six prompts are the first rollout, the others what a refill may draw.
TAGS = ("S", "S", "VA", "VAS", "VA", "A", "VA", "S", "V", "AS")
ALIKE = (1, 4, 6)  # prompts whose completions are all rewarded alike
PROMPTS, COPIES = 6, 4
SCOPES = ("group", "tag", "tag_whitened", "batch")
AGGREGATIONS = ("token", "sample", "prompt")
LONGEST = 6
LOW, HIGH = 0.2, 0.3
RATE = 0.01  # a step of this size moves some ratios over the bounds of the clipping, and others not

# Rows of a micro-batch, and micro-batches of an optimizer step.
SPLITS = [
    {"per_device_train_batch_size": rows, "gradient_accumulation_steps": count}
    for rows, count in ((24, 1), (12, 2), (4, 6), (3, 8))
]
TWO_STEPS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "steps_per_generation": 6}


@dataclass
class Completion:
    """A row of the rollout, as the formulas see it."""

    prompt: int
    tag: str
    ids: tuple[int, ...]
    reward: float | None = None
    advantage: float = 0.0


@dataclass
class Training:
    """What a run did: gradients and the weights that they belong to, step by step."""

    trainer: MAPOJobTrainer
    gradients: list[dict[str, torch.Tensor]]
    weights: list[dict[str, torch.Tensor]]
    rows_in_model: int
    rows_in_reference: int


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    save_tiny("qwen2_5_omni", folder / "model")
    waiting = list(write_seven_tags(folder / "media", 4, seed=0, splits=("train",), clips_per_pair=1)["train"])
    rows = []
    for i, tag in enumerate(TAGS):
        row = next(row for row in waiting if row["tag"] == tag)
        waiting.remove(row)
        rows.append(row | {"varied": i not in ALIKE})
    return folder, rows


def train(world, steps=1, reward="where_varied", kind=(MAPOJobTrainer, MAPOConfig), resume=None, **options):
    folder, rows = world
    trainer_class, config_class = kind
    if config_class is MAPOConfig:
        options = {"batching": "mixed"} | options
    options = {
        **DEFAULTS,
        "output_dir": str(folder / "out"),
        "media_root": str(folder / "media"),
        "shuffle_dataset": False,
        "num_generations": COPIES,
        "max_completion_length": LONGEST,
        "max_steps": steps,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "epsilon": LOW,
        "epsilon_high": HIGH,
        "shared_prefix": "off",  # rows are counted in the passes
        **SPLITS[2],
        **options,
    }
    trainer = trainer_class(
        load_model(str(folder / "model"), dtype="float32"),
        REWARDS[reward],
        config_class(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_processor(str(folder / "model")),
    )
    trainer.run = {"fixed_completions": True}
    training = Training(trainer, [], [], 0, 0)
    watch_updates(trainer, training.gradients, training.weights)

    def count(name):
        def hook(module, args, kwargs):
            setattr(training, name, getattr(training, name) + len(kwargs["input_ids"]))

        return hook

    trainer.model.register_forward_pre_hook(count("rows_in_model"), with_kwargs=True)
    if trainer.ref_model is not None:
        trainer.ref_model.register_forward_pre_hook(count("rows_in_reference"), with_kwargs=True)
    trainer.train(resume_from_checkpoint=resume)
    assert len(training.gradients) == steps or resume is not None
    return training


# The reference


@pytest.fixture(scope="module")
def reference_model():
    """For [`expected_gradients`] and [`clipped`], which give it the weights of a step, and leave it with these."""
    return build_tiny("qwen2_5_omni")[0]


def generated(training, world, prompts=range(PROMPTS)):
    """All completions of some prompts, without their rewards."""
    trainer, rows = training.trainer, world[1]
    encoded = {i: trainer.prompt_builder.encode(rows[i]) for i in prompts}
    copies = [(i, tuple(trainer.fixed_completion(encoded[i], copy))) for i in prompts for copy in range(COPIES)]
    assert len(set(copies)) == len(copies)
    return [Completion(i, rows[i]["tag"], ids) for i, ids in copies]


def completions_of(training, world, prompts, reward="where_varied"):
    found = generated(training, world, prompts)
    columns = {"completion_ids": [c.ids for c in found], "varied": [world[1][c.prompt]["varied"] for c in found]}
    for c, value in zip(found, REWARDS[reward](**columns), strict=True):
        c.reward = value
    return found


def spread(values):
    return stdev(values) if len(values) > 1 else 0.0


def set_advantages(completions, scope):
    for c in completions:
        group = [other.reward for other in completions if other.prompt == c.prompt]
        tag = [other.reward for other in completions if other.tag == c.tag]
        batch = [other.reward for other in completions]
        centre = {"tag_whitened": tag, "batch": batch}.get(scope, group)
        scale = {"group": group, "batch": batch}.get(scope, tag)
        c.advantage = (c.reward - fmean(centre)) / (spread(scale) + 1e-4)


def adaptive_weights(completions):
    """Weights after one rollout: its difficulties are the whole history (eq. 4, 7 to 9)."""
    difficulty = {}
    for tag in {c.tag for c in completions}:
        rewards = [c.reward for c in completions if c.tag == tag]
        p = min(max(sum(r == 1 for r in rewards) / len(rewards), 1e-6), 1 - 1e-6)
        difficulty[tag] = p * math.log(p / (100 / 101)) + (1 - p) * math.log((1 - p) / (1 / 101))
    mean, deviation = fmean(difficulty.values()), stdev(difficulty.values())
    return {tag: 1 / (1 + math.exp(-(d - mean) / (deviation + 1e-4))) for tag, d in difficulty.items()}


def log_probs(training, world, model, completions):
    """Each completion's log-probabilities, in a batch with others of its prompt; what is shorter ends in tokens that it does not see."""
    trainer, found = training.trainer, {}
    for i in {c.prompt for c in completions}:
        prompt, own = trainer.prompt_builder.encode(world[1][i]), [c for c in completions if c.prompt == i]
        ends = pad_sequence([torch.tensor(c.ids) for c in own], batch_first=True)
        ids = torch.cat([prompt.input_ids.expand(len(own), -1), ends], dim=1)
        positions = batch_position_ids([prompt] * len(own), len(prompt), ends.size(1))
        with serve_media(trainer.family, model, [prompt] * len(own)):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
        logps = (logits[:, len(prompt) - 1 : -1] / trainer.temperature).log_softmax(dim=-1)
        for c, of_row in zip(own, logps.gather(-1, ends[..., None])[..., 0], strict=True):
            found[id(c)] = of_row[: len(c.ids)]
    return [found[id(c)] for c in completions]


def loss_of(completions, logps, old, aggregation, strata="tag", weights=None, high=HIGH):
    """The loss of one optimizer step on these completions."""
    total = torch.zeros(())
    for tag in sorted({c.tag for c in completions}) if strata == "tag" else [None]:
        members = [i for i, c in enumerate(completions) if tag in (None, c.tag)]
        tokens = sum(len(completions[i].ids) for i in members)
        mean = torch.zeros(())
        for i in members:
            ratio = (logps[i] - old[i]).exp()
            advantage = completions[i].advantage
            summed = -torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + high) * advantage).sum()
            if aggregation == "token":
                mean = mean + summed / tokens
            elif aggregation == "sample":
                mean = mean + summed / len(completions[i].ids) / len(members)
            else:
                mean = mean + summed / LONGEST / len(members)
        total = total + (weights[tag] if weights else 1.0) * mean
    return total


def gradient_of(loss, model, retain_graph=False):
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=retain_graph)
    pairs = zip(names, parameters, gradients, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in pairs}


def micro_batches_of(training, world, completions, wanted=slice(None)):
    """The completions of each micro-batch, as the trainer was seen to use them."""
    trainer = training.trainer
    by_content = {(trainer.prompt_builder.spec(world[1][c.prompt]).key, c.ids): c for c in completions}
    return [[by_content[key, tuple(ids)] for key, ids in rows] for rows in trainer.trained[wanted]]


def trained_in(training, world, completions, step):
    """The completions of one optimizer step."""
    slots = training.trainer.args.gradient_accumulation_steps
    return sum(micro_batches_of(training, world, completions, slice(step * slots, (step + 1) * slots)), [])


def expected_gradients(training, world, model, completions, kept, aggregation, beta=0.0, **terms):
    """Gradients of all steps of a run on one rollout, of which the prompts in `kept` are trained on."""
    args = training.trainer.args
    steps = args.steps_per_generation // args.gradient_accumulation_steps
    kept = [c for c in completions if c.prompt in kept]
    found = []
    with torch.no_grad():
        model.load_state_dict(training.weights[0], strict=False)
        old = dict(zip(map(id, kept), log_probs(training, world, model, kept), strict=True))
    for step, weights in enumerate(training.weights):
        rows = trained_in(training, world, kept, step)
        if step % steps == 0:
            left = {id(c) for c in kept}
        assert len(rows) == len({id(c) for c in rows}) and {id(c) for c in rows} <= left
        left -= {id(c) for c in rows}
        assert bool(left) == (step % steps < steps - 1)  # every kept row once in each pass over the rollout
        with torch.no_grad():
            model.load_state_dict(weights, strict=False)
        logps = log_probs(training, world, model, rows)
        before = [old[id(c)] for c in rows]
        loss = loss_of(rows, logps, before, aggregation, **terms)
        if beta:
            loss = loss + beta * divergence(logps, before) / average_tokens(kept, steps)
        found.append(gradient_of(loss, model))
    return found


def divergence(logps, old):
    """TRL's estimate of the KL divergence from a reference model that wrote the rollout, summed over tokens."""
    ratios = ((now - before).exp() for now, before in zip(logps, old, strict=True))
    return sum((ratio * (1 / ratio + ratio.log() - 1)).sum() for ratio in ratios)


def average_tokens(completions, steps):
    return sum(len(c.ids) for c in completions) / steps


def check(training, expected, tolerance=1e-4):
    for mine, formula in zip(training.gradients, expected, strict=True):
        error, where = worst(formula, mine)
        assert error <= tolerance, where
    for part in ("visual", "audio_tower", "language_model"):
        assert any(v.norm() > 1e-4 for formula in expected for n, v in formula.items() if part in n), part


def informative(completions):
    """Prompts whose completions differ in reward, in order."""
    prompts = dict.fromkeys(c.prompt for c in completions)
    return [q for q in prompts if len({c.reward for c in completions if c.prompt == q}) > 1]


# One step on all rows


@pytest.fixture(scope="module")
def first_step(world):
    """Completions, their log-probabilities before the first step, and the gradient of any loss of these."""
    training, model = train(world), build_tiny("qwen2_5_omni")[0]
    completions = completions_of(training, world, range(PROMPTS))
    assert training.trainer.used == [[world[1][c.prompt]["id"] for c in completions]]
    logps = log_probs(training, world, model, completions)

    def gradient(scope, aggregation, prompts=range(PROMPTS), **terms):
        set_advantages(completions, scope)  # over all that was generated
        chosen = [i for i, c in enumerate(completions) if c.prompt in prompts]
        now = [logps[i] for i in chosen]
        old = [value.detach() for value in now]
        loss = loss_of([completions[i] for i in chosen], now, old, aggregation, **terms)
        return gradient_of(loss, model, retain_graph=True)

    return completions, gradient


# The strata with each scope and with each aggregation. Scopes decide the advantages before a loss is made of them.
CASES = [
    (scope, AGGREGATIONS[(i + k) % len(AGGREGATIONS)], strata)
    for k, strata in enumerate(("tag", "batch"))
    for i, scope in enumerate(SCOPES)
]


@pytest.mark.parametrize(("scope", "aggregation", "strata"), CASES)
@pytest.mark.matrix(cases=3)
def test_every_scope_and_aggregation(world, first_step, scope, aggregation, strata):
    split = SPLITS[(SCOPES.index(scope) + AGGREGATIONS.index(aggregation)) % len(SPLITS)]
    options = {"advantage_scope": scope, "loss_aggregation": aggregation, "loss_strata": strata}
    training = train(world, **options, **split)
    check(training, [first_step[1](scope, aggregation, strata=strata)])


def test_a_wrong_formula_is_told_apart(world, first_step):
    """The negative control: other scopes, aggregations, strata and weights have other gradients."""
    training = train(world)

    def error(scope="tag", aggregation="sample", **terms):
        return worst(first_step[1](scope, aggregation, **terms), training.gradients[0])[0]

    assert error() < 1e-4
    others = [error(scope) for scope in SCOPES if scope != "tag"]
    others += [error(aggregation="token"), error(aggregation="prompt"), error(strata="batch")]
    others.append(error(weights=dict.fromkeys(TAGS, 1.0) | {"VA": 1.05}))
    assert min(others) > 1e-2


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.matrix(cases=1)
def test_adaptive_weights(world, reference_model, aggregation):
    training = train(world, reward="in_thirds", tag_weights="adaptive", kl_window=50, loss_aggregation=aggregation)
    completions = completions_of(training, world, range(PROMPTS), "in_thirds")
    weights = adaptive_weights(completions)
    assert len(set(weights.values())) > 2 and max(weights.values()) - min(weights.values()) > 0.2
    for tag, weight in weights.items():
        assert training.trainer.tag_weights.weight(tag) == pytest.approx(weight)
    set_advantages(completions, "tag")
    run = (training, world, reference_model, completions, range(PROMPTS), aggregation)
    check(training, expected_gradients(*run, weights=weights))
    assert worst(expected_gradients(*run)[0], training.gradients[0])[0] > 1e-2


# Dropped groups


@pytest.mark.parametrize(
    ("split", "scope", "aggregation"),
    list(zip(SPLITS, ("tag", "group", "tag", "group"), (*AGGREGATIONS, "sample"), strict=True)),
)
@pytest.mark.matrix(cases=2)
def test_dropped_groups_are_in_no_mean_and_no_forward_pass(world, first_step, scope, aggregation, split):
    options = {"advantage_scope": scope, "loss_aggregation": aggregation, "dynamic_sampling": "early"}
    training = train(world, **options, **split)
    completions, gradient = first_step
    kept = informative(completions)
    assert kept == [0, 2, 3, 5]
    assert training.rows_in_model == len(kept) * COPIES
    check(training, [gradient(scope, aggregation, kept)])
    assert worst(gradient(scope, aggregation), training.gradients[0])[0] > 1e-2


def test_without_filtering_all_rows_are_computed(world):
    training = train(world, beta=0.1, num_iterations=2, steps=2)
    assert training.rows_in_model == 3 * PROMPTS * COPIES  # before the first step, and in both
    assert training.rows_in_reference == PROMPTS * COPIES


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.matrix(cases=1)
def test_refill(world, reference_model, rounds):
    training = train(world, dynamic_sampling="early", refill_rounds=rounds, advantage_scope="tag", beta=0.1)
    # Two prompts are missing; of the two drawn for them one is alike too, and one more is drawn for that.
    visited = range(PROMPTS + 2) if rounds == 1 else range(PROMPTS + 3)
    assert [len(ids) // COPIES for ids in training.trainer.used] == [6, 2, 1][: rounds + 1]
    completions = completions_of(training, world, visited)
    kept = informative(completions)
    assert kept == [0, 2, 3, 5, 7, 8][: rounds + 4]
    assert training.rows_in_model == training.rows_in_reference == len(kept) * COPIES
    set_advantages(completions, "tag")  # over all rounds
    run = (training, world, reference_model, completions, kept, "sample")
    check(training, expected_gradients(*run, beta=0.1))
    set_advantages([c for c in completions if c.prompt in kept], "tag")
    assert worst(expected_gradients(*run, beta=0.1)[0], training.gradients[0])[0] > 1e-2


# Several steps on a rollout


def clipped(training, world, model, completions, step):
    """Shares of the tokens of a step that the lower and the upper bound stop, and that the two bounds differ on."""
    with torch.no_grad():
        model.load_state_dict(training.weights[0], strict=False)
        old = log_probs(training, world, model, completions)
        model.load_state_dict(training.weights[step], strict=False)
        ratios = [(a - b).exp() for a, b in zip(log_probs(training, world, model, completions), old, strict=True)]
    rows = list(zip(completions, ratios, strict=True))
    tokens = sum(map(len, ratios))
    low = sum(int((r < 1 - LOW).sum()) for c, r in rows if c.advantage < 0)
    high = sum(int((r > 1 + HIGH).sum()) for c, r in rows if c.advantage > 0)
    between = sum(int(((r > 1 + LOW) & (r < 1 + HIGH)).sum()) for c, r in rows if c.advantage > 0)
    return low / tokens, high / tokens, between / tokens


@pytest.mark.parametrize(("sampling", "aggregation"), zip(("none", "early", "none"), AGGREGATIONS, strict=True))
@pytest.mark.matrix(cases=1)
def test_asymmetric_clipping_in_a_second_pass(world, reference_model, sampling, aggregation):
    options = {"num_iterations": 2, "dynamic_sampling": sampling, "loss_aggregation": aggregation}
    training = train(world, steps=2, learning_rate=RATE, **options)
    completions = completions_of(training, world, range(PROMPTS))
    set_advantages(completions, "tag")
    assert min(clipped(training, world, reference_model, completions, 1)) > 0
    kept = informative(completions) if sampling == "early" else range(PROMPTS)
    assert training.rows_in_model == 3 * len(kept) * COPIES
    run = (training, world, reference_model, completions, kept, aggregation)
    check(training, expected_gradients(*run))
    assert worst(expected_gradients(*run, high=LOW)[1], training.gradients[1])[0] > 1e-2


@pytest.mark.parametrize(
    ("sampling", "aggregation"), [("early", "token"), ("none", "sample"), ("early", "sample"), ("early", "prompt")]
)
@pytest.mark.matrix(cases=2)
def test_two_optimizer_steps_for_a_rollout(world, reference_model, sampling, aggregation):
    """The mean is over the rows of a tag in one optimizer step, here a half of the rollout, which is gone over twice."""
    options = {"num_iterations": 2, "dynamic_sampling": sampling, "loss_aggregation": aggregation}
    training = train(world, steps=4, learning_rate=RATE, beta=0.1, **options, **TWO_STEPS)
    completions = completions_of(training, world, range(PROMPTS))
    set_advantages(completions, "tag")
    kept = informative(completions) if sampling == "early" else range(PROMPTS)
    assert training.rows_in_model == 3 * len(kept) * COPIES and training.rows_in_reference == len(kept) * COPIES
    run = (training, world, reference_model, completions, kept, aggregation)
    check(training, expected_gradients(*run, beta=0.1))


# Left-over rows of several tags


LEFT_OVER = {"batching": "stratified", "leftover": "mixed"}  # every tag has fewer rows than a rollout takes


@pytest.fixture(scope="module")
def left_over(world):
    """The first batch of left-over rows, in the order of the tags, and the gradients of losses over it."""
    training, model = train(world, **LEFT_OVER), build_tiny("qwen2_5_omni")[0]
    prompts = sorted(range(len(TAGS)), key=lambda i: [*ModalityTag].index(TAGS[i]))[:PROMPTS]
    assert training.trainer.used == [[world[1][q]["id"] for q in prompts for _ in range(COPIES)]]
    completions = completions_of(training, world, prompts, "in_thirds")
    assert len({c.tag for c in completions}) == 4
    logps = log_probs(training, world, model, completions)

    def gradient(aggregation, weights=None, **terms):
        set_advantages(completions, "tag")
        for c in completions:
            c.advantage *= weights[c.tag] if weights else 1.0
        loss = loss_of(completions, logps, [value.detach() for value in logps], aggregation, **terms)
        return gradient_of(loss, model, retain_graph=True)

    return completions, gradient


@pytest.mark.parametrize(
    ("tag_weights", "aggregation"), [("adaptive", name) for name in AGGREGATIONS] + [("none", "sample")]
)
def test_a_batch_of_left_over_rows_weighs_as_one_batch(world, left_over, aggregation, tag_weights):
    """It is one mean, in which each row has its tag's weight; a sum of its tags' means would weigh four times as much."""
    completions, gradient = left_over
    split = SPLITS[AGGREGATIONS.index(aggregation)]
    options = LEFT_OVER | split | {"loss_aggregation": aggregation, "tag_weights": tag_weights}
    options |= {"kl_window": 50} if tag_weights == "adaptive" else {}
    training = train(world, reward="in_thirds", **options)
    weights = None if tag_weights == "none" else adaptive_weights(completions)
    check(training, [gradient(aggregation, weights, strata="batch")])
    summed = gradient(aggregation, weights, strata="tag")
    assert worst(summed, training.gradients[0])[0] > 1e-2
    if aggregation == "sample" and weights is None:
        norms = [sum(float(v.norm()) ** 2 for v in g.values()) ** 0.5 for g in (summed, training.gradients[0])]
        assert norms[0] > 2 * norms[1]
