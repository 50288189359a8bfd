"""Memory and time of a GRPO step on given cards, by arithmetic alone, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from maple_trl.planning.duration import Phase, engine_rows, plan_time
from maple_trl.planning.memory import Memory, plan_memory
from maple_trl.planning.setup import GIB, SHARDINGS, Setup


@dataclass(frozen=True)
class Plan:
    """
    What a setup takes.

    Attributes:
        setup: what was asked.
        memory: bytes on a card.
        phases: seconds of a rollout and its updates.
        notes: what this arithmetic leaves out, where it matters.
    """

    setup: Setup
    memory: Memory
    phases: list[Phase]
    notes: list[str]

    @property
    def usable(self) -> float:
        """Bytes of a card that can be filled."""
        return self.setup.gpu.memory * GIB * self.setup.rate("usable_memory")

    @property
    def engine_fits(self) -> bool:
        """Whether the engine's share of a card holds the weights and a completion."""
        return engine_rows(self.setup)[1] >= 1

    @property
    def likely(self) -> float:
        """Bytes that such a job is likely to take, with what is not counted."""
        return self.memory.peak / self.setup.rate("counted_memory")

    @property
    def verdict(self) -> str:
        """`fits`, `tight` where only what is counted does, or `does not fit`."""
        if not self.engine_fits or self.memory.peak > self.usable:
            return "does not fit"
        return "fits" if self.likely <= self.usable else "tight"

    @property
    def seconds(self) -> float:
        """Time of an optimizer step, with its share of the rollout: what is counted of it."""
        return sum(phase.seconds for phase in self.phases) / self.setup.steps

    @property
    def likely_seconds(self) -> float:
        """Seconds that such a step is likely to take, with what is not counted."""
        return self.seconds / self.setup.rate("counted_time")

    @property
    def longest(self) -> Phase:
        """The phase that takes most of it."""
        return max(self.phases, key=lambda phase: phase.seconds)


def make_plan(setup: Setup) -> Plan:
    """Compute memory and time of a setup."""
    memory = plan_memory(setup)
    rows, at_once = engine_rows(setup)
    phases = plan_time(setup) if at_once >= 1 else []
    notes = []
    if setup.model.text.experts:
        notes.append(
            "Experts: times are what the chosen ones compute. transformers reaches far less: EasyR1 publishes 1.8 % of the "
            "peak for Qwen3-VL-30B-A3B on 8 H800 (assets/baselines.md)."
        )
    if setup.bits:
        quantized = sum(layer.weights for layer in setup.quantized)
        notes.append(
            f"{quantized / 1e9:.3g} of {setup.model.parameters / 1e9:.3g} G parameters have {setup.bits} bits: linear layers, "
            "not experts, embeddings or the head. Times are those of 16 bits: what unpacking takes is not computed."
        )
    if 1 <= at_once < rows and setup.rollout != "transformers":
        notes.append(f"The engine's cache holds {at_once:.0f} of its {rows:.0f} completions at once.")
    if setup.rollout == "vllm_server":
        notes.append("Training cards wait while the server samples, and the server while they train.")
    return Plan(setup, memory, phases, notes)


def remedies(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield changes that lower memory, the cheapest first, each with what it is called."""
    if not setup.gradient_checkpointing:
        yield "gradient_checkpointing true", replace(setup, gradient_checkpointing=True)
    if not setup.shared_prefix:
        yield "shared_prefix on", replace(setup, shared_prefix=True)
    batch = setup.per_device_train_batch_size
    if batch % 2 == 0:
        halved = replace(
            setup,
            per_device_train_batch_size=batch // 2,
            gradient_accumulation_steps=2 * setup.gradient_accumulation_steps,
            steps_per_generation=2 * setup.steps_per_generation,
        )
        yield f"per_device_train_batch_size {batch // 2}, gradient_accumulation_steps doubled", halved
    if setup.rollout == "transformers" and setup.generated_at_once > setup.num_generations:
        yield f"generation_batch {setup.num_generations}", replace(setup, generation_batch=setup.num_generations)
    if setup.trainers > 1 and not setup.bits:
        for sharding in SHARDINGS[SHARDINGS.index(setup.sharding) + 1 : 3]:
            yield f"sharding {sharding}", replace(setup, sharding=sharding)
    if setup.optim == "adamw":
        yield "optim adamw_8bit", replace(setup, optim="adamw_8bit")
    if not setup.lora_r:
        yield "use_peft true (lora_r 16)", replace(setup, lora_r=16)
    if setup.dtype == "float32" and setup.compute != "float32":
        yield "dtype bfloat16", replace(setup, dtype="bfloat16")
    if setup.lora_r and not setup.bits and setup.sharding == "none" and setup.rollout == "transformers":
        yield "load_in_8bit true", replace(setup, load_in_8bit=True)
        yield "load_in_4bit true", replace(setup, load_in_4bit=True)
    if setup.sharding != "none" and setup.rollout != "vllm_server":
        yield f"gpus {2 * setup.gpus}", replace(setup, gpus=2 * setup.gpus)


def advise(plan: Plan) -> list[tuple[str, float]]:
    """
    Return what to change where a plan does not fit: each change that alone makes it fit, or else several together.

    Returns:
        `list[tuple[str, float]]`: what to change, and the peak on a card in bytes; empty where nothing is enough.
    """
    alone = [(name, make_plan(changed)) for name, changed in remedies(plan.setup)]
    fitting = [(name, found.memory.peak) for name, found in alone if found.verdict == "fits"]
    if fitting:
        return fitting
    names, current = [], plan
    for _ in range(12):
        better = [(name, make_plan(changed)) for name, changed in remedies(current.setup)]
        better = [(name, found) for name, found in better if found.memory.peak < current.memory.peak]
        if not better:
            return []
        name, current = min(better, key=lambda pair: pair[1].memory.peak)
        names.append(name)
        if current.verdict == "fits":
            return [(" + ".join(names), current.memory.peak)]
    return []
