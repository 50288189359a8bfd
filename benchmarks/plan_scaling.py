"""
The tables of docs/scaling.md, computed by the arithmetic of `maple-trl plan`: from one card to hundreds.

    python benchmarks/plan_scaling.py --json plan_scaling.json
    python benchmarks/plan_scaling.py --write docs/scaling.md

Nothing is measured here. Qwen2.5-Omni-3B, whose towers are frozen, prompts of 4096 tokens of which 3072 are video and 512
sound, completions of 512 tokens, 8 of a prompt, on H100 in bfloat16 with `optim: adamw`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from _plan_tables import add_outputs, give

from maple_trl.planning.catalogue import GPUS, MODELS, RATES
from maple_trl.planning.plan import make_plan
from maple_trl.planning.setup import GIB, Setup
from maple_trl.planning.sizes import Media, read_sizes


BASE = Setup(
    read_sizes(MODELS["Qwen/Qwen2.5-Omni-3B"], "Qwen2.5-Omni-3B"),
    GPUS["H100"],
    prompt=4096,
    completion=512,
    media=Media(3072, 512),
    trained=("llm", "head"),
    rollout="vllm_colocate",
    vllm_gpu_memory_utilization=0.3,
)
CARDS = (1, 8, 32, 128, 256)


def phase(plan: Any, *names: str) -> float:
    return sum(found.seconds for found in plan.phases if found.name in names)


def growth() -> list[dict[str, Any]]:
    """The same work for each card, on more of them."""
    rows = []
    for cards in CARDS:
        for sharding in ("none", "zero2", "zero3"):
            if cards == 1 and sharding != "none":
                continue
            setup = replace(BASE, gpus=cards, sharding=sharding)
            plan = make_plan(setup)
            rows.append(
                {
                    "cards": cards,
                    "sharding": sharding,
                    "completions a step": setup.rows * cards,
                    "GiB of a card, counted": plan.memory.peak / GIB,
                    "verdict": plan.verdict,
                    "s a step, at least": plan.seconds,
                    "completions a second": setup.rows * cards / plan.seconds,
                    "longest": f"{plan.longest.name} ({plan.longest.bound})",
                }
            )
    return rows


def engines() -> list[dict[str, Any]]:
    """One card by what samples, and whether prompts are shared."""
    rows = []
    for rollout, shared in (("transformers", False), ("transformers", True), ("vllm_colocate", True)):
        plan = make_plan(replace(BASE, rollout=rollout, shared_prefix=shared))
        rows.append(
            {
                "rollout by": rollout,
                "shared prompts": "yes" if shared else "no",
                "GiB of a card, counted": plan.memory.peak / GIB,
                "towers, prefill, s": phase(plan, "towers", "prefill"),
                "decode, s": phase(plan, "decode"),
                "log-probabilities, train, s": phase(plan, "old log-probabilities", "train"),
                "s a step, at least": plan.seconds,
            }
        )
    return rows


def split() -> list[dict[str, Any]]:
    """512 completions on 16 cards: all of them for both, or some for a server."""
    rows = []
    for trainers in (16, 8, 4, 2):
        server = 16 - trainers
        setup = replace(
            BASE,
            gpus=16,
            rollout="vllm_server" if server else "vllm_colocate",
            rollout_gpus=server,
            vllm_gpu_memory_utilization=0.9 if server else 0.3,
            gradient_accumulation_steps=512 // (8 * trainers),
        )
        plan = make_plan(setup)
        sampling = phase(plan, "towers", "prefill", "decode")
        rows.append(
            {
                "cards that train": trainers,
                "cards that sample": server or "the same 16",
                "sampling, s": sampling,
                "log-probabilities, train, update, s": phase(plan, "old log-probabilities", "train", "update"),
                "weights to the engine, s": phase(plan, "weights to the engine"),
                "s a step, at least": plan.seconds,
            }
        )
    return rows


def decoders(seconds: float) -> list[dict[str, Any]]:
    """Processes that decode a node's clips, so that no step waits for them."""
    rows = []
    for clip in (seconds, 10 * seconds, 30 * seconds):
        alone = make_plan(replace(BASE, gpus=8, rates={"decode_seconds": 0}))
        prompts = alone.setup.prompts * 8
        needed = prompts * clip / alone.seconds
        few = make_plan(replace(BASE, gpus=8, media_workers=1, rates={"decode_seconds": clip}))
        rows.append(
            {
                "s of a processor for a clip": clip,
                "clips a second of 8 cards": prompts / alone.seconds,
                "decoder processes needed": math.ceil(needed),
                "step with 1 process a card, s": few.seconds,
                "without waiting, s": alone.seconds,
            }
        )
    return rows


def replay(capacity: int = 10_000, tokens: int = 2048) -> list[dict[str, Any]]:
    """The buffer, of which each rank holds all: token ids and log-probabilities in 4 bytes each."""
    rows = []
    for cards in CARDS:
        held = capacity * tokens * 8
        shared = BASE.rows * cards * tokens * 8
        network = min(BASE.gpu.link, BASE.gpu.network) if cards > BASE.gpus_per_node else BASE.gpu.link
        rows.append(
            {
                "cards": cards,
                "MB of a rank": held / 1e6,
                "GB of a node": held * min(cards, BASE.gpus_per_node) / 1e9,
                "MB exchanged a step": shared / 1e6,
                "s of the exchange": shared / (network * 1e9 * BASE.rate("link_share")),
            }
        )
    return rows


def judge() -> list[dict[str, Any]]:
    """A judge of every completion, whose calls take 2 s."""
    rows = []
    for cards in (8, 128):
        for concurrency in (32, 256, 1024):
            setup = replace(BASE, gpus=cards, sharding="zero2", judge_calls=1, judge_concurrency=concurrency)
            plan = make_plan(setup)
            calls = setup.rows * cards
            rows.append(
                {
                    "cards": cards,
                    "calls open at once": concurrency,
                    "calls a step": calls,
                    "judging, s": phase(plan, "judge"),
                    "step without it, s": plan.seconds - phase(plan, "judge"),
                    "calls a second while judging": calls / phase(plan, "judge"),
                }
            )
    return rows


def collect(clip_seconds: float) -> dict[str, list[dict[str, Any]]]:
    return {
        "engines": engines(),
        "growth": growth(),
        "split": split(),
        "decoders": decoders(clip_seconds),
        "replay": replay(),
        "judge": judge(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--clip-seconds",
        type=float,
        default=RATES["decode_seconds"].value,
        help="processor seconds of a clip (plan_points.py --clips)",
    )
    add_outputs(parser)
    args = parser.parse_args(argv)
    tables = collect(args.clip_seconds)
    give(tables, args)


if __name__ == "__main__":
    main()
