"""
The tables of docs/small_gpus.md, computed by the arithmetic of `maple-trl plan`: models on a card of 24 GB.

    python benchmarks/plan_small_gpus.py --json plan_small_gpus.json
    python benchmarks/plan_small_gpus.py --write docs/small_gpus.md

Nothing is measured here. LoRA of rank 16 on the language model, whose towers are frozen, in bfloat16 with `optim: adamw`;
transformers samples 8 completions of 512 tokens to a prompt, which make a micro-batch.
"""

from __future__ import annotations

import argparse
from typing import Any

from _plan_tables import add_outputs, give

from maple_trl.planning.catalogue import GPUS, MODELS
from maple_trl.planning.memory import weight_bytes
from maple_trl.planning.plan import make_plan
from maple_trl.planning.setup import GIB, Setup
from maple_trl.planning.sizes import Media, read_sizes


NAMES = ("Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen3-Omni-30B-A3B-Instruct")
BITS: dict[str, dict[str, bool]] = {
    "16": {},
    "8": {"load_in_8bit": True},
    "4": {"load_in_4bit": True},
    "4, nested": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "4, nested, towers too": {"load_in_4bit": True, "use_bnb_nested_quant": True, "quantize_towers": True},
}
PROMPTS = (2048, 4096, 8192)


def setup_of(name: str, prompt: int = 4096, **more: Any) -> Setup:
    return Setup(
        read_sizes(MODELS[name], name),
        GPUS["RTX-4090"],
        prompt=prompt,
        completion=512,
        media=Media(prompt * 3 / 4, prompt / 8),
        num_generations=8,
        per_device_train_batch_size=8,
        lora_r=16,
        trained=("llm",),
        **more,
    )


def models() -> list[dict[str, Any]]:
    """What weights take, and a job with prompts of 4096 tokens."""
    rows = []
    for name in NAMES:
        for bits, options in BITS.items():
            setup = setup_of(name, **options)
            plan = make_plan(setup)
            rows.append(
                {
                    "model": name.split("/")[1].removesuffix("-Instruct"),
                    "bits": bits,
                    "weights of few bits, G": sum(layer.weights for layer in setup.quantized) / 1e9,
                    "all others, G": (setup.model.parameters - sum(layer.weights for layer in setup.quantized)) / 1e9,
                    "GiB of weights": weight_bytes(setup) / GIB,
                    "GiB of the card, counted": plan.memory.peak / GIB,
                    "GiB, likely": plan.likely / GIB,
                    "24 GB": plan.verdict,
                }
            )
    return rows


def prompts() -> list[dict[str, Any]]:
    """Which prompts fit."""
    rows = []
    for name in NAMES[:2]:
        for bits in ("16", "8", "4, nested"):
            row: dict[str, Any] = {"model": name.split("/")[1], "bits": bits}
            for prompt in PROMPTS:
                plan = make_plan(setup_of(name, prompt, **BITS[bits]))
                row[f"prompt of {prompt}"] = f"{plan.likely / GIB:.1f} ({plan.verdict})"
            rows.append(row)
    return rows


def collect() -> dict[str, list[dict[str, Any]]]:
    return {"models": models(), "prompts": prompts()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_outputs(parser)
    args = parser.parse_args(argv)
    tables = collect()
    give(tables, args)


if __name__ == "__main__":
    main()
