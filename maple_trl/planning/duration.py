"""
Seconds of a step, by phase.

Operations and bytes of each phase, divided by what a card reaches of its data sheet
([`RATES`][maple_trl.planning.catalogue.RATES]), and what a layer costs whatever it computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from maple_trl.planning.memory import cache_bytes, gradient_bytes, optimizer_bytes, towers_of, trained_size
from maple_trl.planning.setup import DTYPES, GIB, Setup
from maple_trl.planning.sizes import TextSizes, Work, generation_work, plain_work, shared_work


@dataclass(frozen=True)
class Phase:
    """
    A phase of a step.

    Attributes:
        name: what it is.
        seconds: on each card, for the rollout and all that follows it.
        bound: what takes the time.
    """

    name: str
    seconds: float
    bound: str


def _longest(**seconds: float) -> tuple[float, str]:
    """Return the longest of several things that go on at once, and its name."""
    name = max(seconds, key=lambda key: seconds[key])
    return seconds[name], name.replace("_", " ")


def _compute_seconds(setup: Setup, operations: float) -> float:
    return operations / (setup.gpu.teraflops * 1e12 * setup.rate("compute_share"))


def _pass_seconds(setup: Setup, operations: float, layers: int, passes: float) -> tuple[float, str]:
    """Return the time of a pass over many tokens; `passes` are the forwards that its layers cost."""
    compute = _compute_seconds(setup, operations)
    launches = layers * passes * setup.rate("launch_layer_ms") / 1e3
    if setup.sharded_weights and setup.trainers > 1:
        # Weights for each direction, and gradients on the way back.
        moved = setup.model.parameters * 2 if passes == 1 else (2 * setup.model.parameters + setup.trainable) * 2
        compute += layers * passes * setup.rate("sharded_layer_ms") / 1e3
        return _longest(
            operations=compute, kernel_launches=launches, communication=moved / _link(setup, setup.trainers)
        )
    return _longest(operations=compute, kernel_launches=launches)


def _link(setup: Setup, cards: int) -> float:
    """Return the bytes per second between some cards, which may be on several nodes."""
    slowest = setup.gpu.link if cards <= setup.gpus_per_node else min(setup.gpu.link, setup.gpu.network)
    return slowest * 1e9 * setup.rate("link_share")


def _tower_layers(setup: Setup) -> int:
    return sum(tower.layers for tower, *_ in towers_of(setup.model, setup.media, 2))


def _layers(setup: Setup) -> int:
    """Return the layers of a training pass."""
    return setup.model.text.layers + (_tower_layers(setup) if setup.towers_in_passes else 0)


def _train_passes(setup: Setup) -> int:
    """Return the forwards that a forward with its backward costs: that is two, and recomputed activations are one more."""
    return 3 + setup.gradient_checkpointing


def _forward_work(setup: Setup) -> Work:
    """Return the work of a micro-batch's forward; prompts that several micro-batches hold pass in each."""
    rows = setup.per_device_train_batch_size
    if not setup.shared_prefix:
        return plain_work(setup.prompt, setup.completion, rows)
    prompts = setup.micro_prompts
    return shared_work(setup.prompt, setup.completion, rows / prompts) * prompts


def pass_operations(setup: Setup, train: bool) -> float:
    """Count the operations of a micro-batch: a log-probability pass, or forward and backward."""
    times = _train_passes(setup) if train else 1
    language = setup.model.text.operations(_forward_work(setup)) * times
    if not setup.towers_in_passes:
        return language
    towers = setup.model.tower_operations(setup.media) * setup.micro_prompts
    return language + towers * (times if train and setup.trains_towers else 1)


def _train_phase(setup: Setup) -> Phase:
    operations = pass_operations(setup, train=True)
    seconds, bound = _pass_seconds(setup, operations, _layers(setup), _train_passes(setup))
    return Phase("train", seconds * setup.rounds * setup.num_iterations, bound)


def _score_phase(setup: Setup, name: str) -> Phase:
    seconds, bound = _pass_seconds(setup, pass_operations(setup, train=False), _layers(setup), 1)
    return Phase(name, seconds * setup.rounds, bound)


def _needs_old(setup: Setup) -> bool:
    """Tell whether TRL computes log-probabilities of the policy before it is trained."""
    between = setup.rounds * setup.num_iterations
    return setup.gradient_accumulation_steps % between != 0 or setup.rollout != "transformers"


def _tower_phase(setup: Setup) -> Phase:
    """Encode the media of a rollout's new prompts."""
    operations = setup.model.tower_operations(setup.media) * setup.prompts
    cards = setup.rollout_gpus / setup.trainers if setup.rollout == "vllm_server" else 1
    compute = _compute_seconds(setup, operations) / cards
    launches = _tower_layers(setup) * setup.prompts * setup.rate("launch_layer_ms") / 1e3 / cards
    return Phase("towers", *_longest(operations=compute, kernel_launches=launches))


def _decode_reads(text: TextSizes, rows: float) -> float:
    """Return the weights that a decode step reads: of experts those that some row has chosen."""
    always = text.active - text.sparse * text.chosen * text.expert_weights + text.vocab * text.hidden
    if not text.experts:
        return always
    read = text.experts * (1 - math.pow(1 - text.chosen / text.experts, rows))
    return always + text.sparse * read * text.expert_weights


def decode_step(setup: Setup, rows: float, context: float) -> tuple[float, str]:
    """
    Return the seconds of a step that gives each of some rows a token, and what takes them.

    Args:
        rows: of an engine, or of a card's `generate()`.
        context: tokens that a row attends to.
    """
    text, size = setup.model.text, DTYPES[setup.compute]
    engine = setup.rollout != "transformers"
    cards = setup.vllm_tensor_parallel_size if engine else 1
    read = (_decode_reads(text, rows) * size + cache_bytes(text, rows * context, size)) / cards
    share = setup.rate("engine_share" if engine else "decode_share")
    reading = read / (setup.gpu.bandwidth * 1e9 * share)
    work = Work(rows, rows * context, rows)
    compute = _compute_seconds(setup, text.operations(work) / cards)
    if engine:
        reading += text.layers * setup.rate("engine_layer_ms") / 1e3
        return _longest(memory_bandwidth=reading, operations=compute)
    launches = text.layers * setup.rate("launch_layer_ms") / 1e3
    return _longest(memory_bandwidth=reading, operations=compute, kernel_launches=launches)


def engine_rows(setup: Setup) -> tuple[float, float]:
    """Return the completions of a rollout that an engine samples, and how many of them its cache holds at once."""
    if setup.rollout == "transformers":
        return setup.rows, setup.generated_at_once
    cards = setup.rollout_gpus if setup.rollout == "vllm_server" else setup.trainers
    rows = setup.rows * setup.trainers / (cards / setup.vllm_tensor_parallel_size)
    text, size = setup.model.text, DTYPES[setup.compute]
    room = setup.vllm_gpu_memory_utilization * setup.gpu.memory * GIB * setup.vllm_tensor_parallel_size
    room -= setup.model.parameters * size
    prompt = setup.prompt / setup.num_generations  # prefixes are cached
    fits = math.floor(room / cache_bytes(text, prompt + setup.completion, size))
    return rows, min(rows, fits)


def _rollout_phases(setup: Setup) -> Iterator[Phase]:
    text = setup.model.text
    rows, at_once = engine_rows(setup)
    shared = setup.shared_prefix or setup.rollout != "transformers"
    group = setup.num_generations
    operations = text.operations(generation_work(setup.prompt, 1, group, shared)) * rows / group
    cards = setup.vllm_tensor_parallel_size if setup.rollout != "transformers" else 1
    pieces = math.ceil(rows / at_once)
    compute = _compute_seconds(setup, operations / cards)
    launches = text.layers * pieces * setup.rate("launch_layer_ms") / 1e3
    yield Phase("prefill", *_longest(operations=compute, kernel_launches=launches))
    seconds, bound = decode_step(setup, rows / pieces, setup.prompt + setup.completion / 2)
    yield Phase("decode", seconds * (setup.completion - 1) * pieces, bound)


def _sync_phase(setup: Setup) -> Phase:
    """Renew the engine's weights: read and written, and gathered or sent where they lie elsewhere."""
    size = setup.model.parameters * DTYPES[setup.compute]
    copied = 2 * size / (setup.gpu.bandwidth * 1e9)
    gathered = setup.sharded_weights and setup.trainers > 1
    moved = size / _link(setup, setup.trainers) if gathered else 0
    if setup.rollout == "vllm_server":
        moved += size / _link(setup, setup.gpus)
    return Phase("weights to the engine", *_longest(memory_bandwidth=copied, communication=moved))


def _update_phase(setup: Setup) -> Phase:
    """Average gradients over all cards, and update what is trained."""
    touched = 2 * (optimizer_bytes(setup) + gradient_bytes(setup) + setup.trainable * 2 / setup.shards)
    local = touched / (setup.gpu.bandwidth * 1e9)
    moved = 0.0
    if setup.trainers > 1 and not setup.sharded_weights:
        moved = 2 * setup.trainable * trained_size(setup) / _link(setup, setup.trainers)
    seconds, bound = _longest(memory_bandwidth=local, communication=moved)
    return Phase("update", seconds * setup.steps, bound)


def plan_time(setup: Setup) -> list[Phase]:
    """Return the phases of a rollout and of all updates that follow it, in order."""
    phases = []
    if setup.media.video or setup.media.audio:
        phases.append(_tower_phase(setup))
    phases += _rollout_phases(setup)
    if setup.judge_calls:
        calls = setup.judge_calls * setup.rows * setup.trainers
        waits = math.ceil(calls / setup.judge_concurrency) * setup.judge_seconds
        phases.append(Phase("judge", waits, "latency and concurrency of the judge"))
    if _needs_old(setup):
        phases.append(_score_phase(setup, "old log-probabilities"))
    if setup.beta:
        phases.append(_score_phase(setup, "reference log-probabilities"))
    phases.append(_train_phase(setup))
    phases.append(_update_phase(setup))
    if setup.rollout != "transformers":
        phases.append(_sync_phase(setup))
    if setup.media.video or setup.media.audio:
        decoding = setup.prompts * setup.rate("decode_seconds") / max(setup.media_workers, 1)
        ahead = sum(phase.seconds for phase in phases) if setup.media_prefetch and setup.media_workers else 0
        phases.insert(0, Phase("decoding of media", max(decoding - ahead, 0), "decoder processes"))
    return phases
