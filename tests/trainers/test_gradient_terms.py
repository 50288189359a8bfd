"""The gradients of J_on and of J_off apart, against the row-by-row reference; training does not notice that they are taken."""

import math

import pytest
import torch
from omni_runs import QUIET_ON_CPU
from test_avatar_gradients import (
    FOUR_STEPS,
    HALVES,
    OF_TIERS,
    TIERS,
    Formula,
    graded,
    gradient_of,
    load,
    log_probs,
    loss_of,
    omni_model,
    reference_for,
    rollouts_of,
    set_advantages,
    steps_for,
    text_model,
    train_omni,
    train_text,
)
from test_grpo_parity import dataset
from tiny_models import build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer


pytestmark = pytest.mark.slow


__all__ = ["omni_model", "text_model"]  # fixtures

PROBED = {"replay_gradient_steps": 1}
NAMES = ("replay/gradient_on", "replay/gradient_off", "replay/gradient_cosine")


def logged(training):
    return [entry for entry in training.trainer.state.log_history if "loss" in entry]


def flat(gradients):
    return torch.cat([value.double().flatten() for value in gradients.values()])


def expected_terms(training, kind, formula):
    """Per step the gradient of its fresh rows alone, and that of its replayed ones alone."""
    model, args = reference_for(kind), training.trainer.args
    parts = args.steps_per_generation // args.gradient_accumulation_steps
    found = []
    for rollout, steps, history in rollouts_of(training, model, graded, formula):
        set_advantages(rollout, history, formula)
        for step, rows in steps.items():
            with torch.no_grad():
                load(model, training.weights[step])
            terms = []
            for past in (False, True):
                chosen = [c for c in rows if c.replayed == past]
                logps = {id(c): log_probs(training, model, c) for c in chosen}
                loss = parts * loss_of(chosen, rollout, logps, formula)
                terms.append(flat(gradient_of(loss, model)) if chosen else torch.zeros(1, dtype=torch.float64))
            found.append(terms)
    return found


CASES = {
    "dapo": (TIERS, OF_TIERS),
    "dapo, own prompt, two micro-batches, half alpha, penalty": (
        HALVES | {"replay_alpha": 0.5, "beta": 0.1},
        {"alpha": 0.5, "beta": 0.1},
    ),
    # The draw keeps the two norms 10 % apart at each step; by chance they are 0.6 % apart at one with that by default.
    "grpo, four micro-batches, two steps, twice": (
        TIERS | FOUR_STEPS | {"loss_type": "grpo", "num_iterations": 2, "replay_draw": "balanced"},
        OF_TIERS | {"loss_type": "grpo"},
    ),
}


@pytest.mark.parametrize(("kind", "name"), [*(("text", name) for name in CASES), ("omni", "dapo")])
@pytest.mark.matrix(cases=1)
def test_norms_are_those_of_the_reference(kind, name, text_model, omni_model, seven_tags, tmp_path):
    options, terms = CASES[name]
    given = {"steps": steps_for(options), **PROBED, **options}
    if kind == "text":
        training = train_text(text_model, tmp_path, **given)
    else:
        training = train_omni(omni_model, seven_tags, tmp_path, **given)
    expected = expected_terms(training, kind, Formula(**terms))
    entries = logged(training)
    assert len(entries) == len(expected)
    replayed = 0
    for entry, (on, off) in zip(entries, expected, strict=True):
        assert entry["replay/gradient_on"] == pytest.approx(float(on.norm()), rel=1e-3, abs=1e-5)
        assert entry["replay/gradient_off"] == pytest.approx(float(off.norm()), rel=1e-3, abs=1e-5)
        if off.norm() > 0 and on.norm() > 0:
            replayed += 1
            cosine = float(on @ off / (on.norm() * off.norm()))
            assert entry["replay/gradient_cosine"] == pytest.approx(cosine, abs=1e-3)
            # Together they are the gradient that is trained with.
            assert entry["grad_norm"] == pytest.approx(float((on + off).norm()), rel=1e-3)
            # The control: neither norm would pass for the other's, nor for the whole one.
            assert entry["replay/gradient_on"] != pytest.approx(float(off.norm()), rel=1e-2)
    assert replayed >= 2
    assert not math.isclose(entries[-1]["replay/gradient_off"], entries[-1]["grad_norm"], rel_tol=1e-2)


def numbers(training):
    """All that training made: gradients, weights, and what it logged of both."""
    values = [value for step in (*training.gradients, *training.weights) for value in step.values()]
    logs = [{k: v for k, v in entry.items() if k in ("loss", "grad_norm", "reward")} for entry in logged(training)]
    return values, logs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["text", "omni"])
@pytest.mark.matrix(cases=1)
def test_training_is_the_same_to_the_last_bit(kind, checkpointing, text_model, omni_model, seven_tags, tmp_path):
    runs = []
    for every in (0, 1, 3):
        options = {"replay_gradient_steps": every, "gradient_checkpointing": checkpointing, **TIERS, **HALVES}
        folder = tmp_path / str(every)
        if kind == "text":
            runs.append(train_text(text_model, folder, steps=4, **options))
        else:
            runs.append(train_omni(omni_model, seven_tags, folder, steps=4, **options))
    (values, logs), *others = (numbers(run) for run in runs)
    for other, entries in others:
        assert len(other) == len(values) and all(map(torch.equal, other, values))
        assert entries == logs
    probed = [[NAMES[0] in entry for entry in logged(run)] for run in runs]
    assert probed == [[False] * 4, [True] * 4, [False, True, False, False]]


@pytest.mark.parametrize(
    "options",
    [
        {"replayed_generations": 0},
        # Such checkpoints allow no gradient but that of the whole backward pass.
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["no replay", "reentrant checkpoints"],
)
def test_where_nothing_can_be_probed_nothing_is(options, tmp_path):
    model, tokenizer = build_tiny_text()
    options = {"gradient_checkpointing": False, "per_device_train_batch_size": 8, "max_steps": 3, **options}
    config = AvatarConfig(str(tmp_path), max_completion_length=6, tas_lambda=0.0, **QUIET_ON_CPU, **options)
    rows = dataset(conversational=False)
    trainer = AvatarTrainer(model, graded, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3 and not any(name in entry for entry in entries for name in NAMES)
