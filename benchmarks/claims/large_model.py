"""
A larger model of the embedded one's architecture, taught the seven-tag set from nothing: what tasks for a GPU begin with.

It has the embedded model's tokenizer, so that the same rows, rules and think texts serve both. As the embedded one, which is trained
for 88 steps, it must not be sure of its answers: reinforcement learning has to find what it was not told. A model of this
size would come to be, so that it is told a wrong letter in a share of its rows, which it then gives as often.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supervised import train_supervised


SIZES = {"hidden_size": 512, "layers": 12, "heads": 8, "tower_size": 256, "tower_layers": 4}
"""About 58 M parameters, of which the embedded model has 0.3 M."""
EMBEDDED_WIDTH, EMBEDDED_RANGE, EMBEDDED_RATE = 64, 0.08, 2e-3
"""The embedded model's hidden size, and the spread of its first weights and the learning rate that suit that width."""
STEPS, BATCH, WARMUP = 600, 64, 50
PROMPTS_PER_TAG, CLIPS_PER_PAIR = 1024, 32
"""Rows of which each is seen five times: what is told wrongly is not to be learned by heart."""
SLIPS = 0.1
"""Share of rows that are told a wrong letter: each of the three is then given in one answer of thirty."""
ASKED, LEAST = 16, 0.5
"""Held-out questions of each tag, of which so large a share must be answered rightly: by chance it is a quarter."""


def scaled_rate(rate: float) -> float:
    """Return a learning rate of the embedded model for this one's width: a step of AdamW moves a wide layer's outputs by more."""
    return rate * EMBEDDED_WIDTH / SIZES["hidden_size"]


def slipping_target(row: Mapping[str, Any]) -> str:
    """Return the ideal completion of a row of the seven-tag set, in a share `SLIPS` of rows with a wrong letter."""
    from maple_trl.data.schema import LETTERS
    from maple_trl.data.tiny_omni import target_text

    draw = random.Random(f"slip {row['id']} {row['question']} {row['answer']}")
    told = row["answer"]
    if draw.random() < SLIPS:
        told = draw.choice([letter for letter in LETTERS if letter != told])
    return target_text({**row, "answer": told})


def write_large_model(folder: Path, steps: int, use_cpu: bool) -> str:
    """
    Teach a model of random weights the seven-tag set, whose clips go into `folder/perceived`; return the model's folder.

    Raises:
        RuntimeError: if it answers too few questions rightly then: what begins with it would tell nothing. Steps within the warm-up
            are of a run that only shows that it can be carried out.
    """
    from tasks.replay import asking

    from maple_trl.data.synthetic import write_seven_tags
    from maple_trl.data.tiny_omni import build_model, build_processor

    media = folder / "perceived"
    counts = {"train": PROMPTS_PER_TAG, "test": ASKED}
    tables = write_seven_tags(media, counts, seed=2000, clips_per_pair=CLIPS_PER_PAIR)
    told = [row | {"completion": [{"role": "assistant", "content": slipping_target(row)}]} for row in tables["train"]]
    processor = build_processor()
    spread = EMBEDDED_RANGE * (EMBEDDED_WIDTH / SIZES["hidden_size"]) ** 0.5
    model = train_supervised(
        folder,
        told,
        steps,
        build_model(processor.tokenizer, seed=0, initializer_range=spread, **SIZES),
        "perceiving",
        processing_class=processor,
        media_root=str(media),
        per_device_train_batch_size=BATCH,
        learning_rate=scaled_rate(EMBEDDED_RATE),
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        use_cpu=use_cpu,
    )
    right = asking(str(model), str(media), use_cpu)(tables["test"].to_list())
    if steps > WARMUP and (share := sum(right) / len(right)) < LEAST:
        raise RuntimeError(
            f"after {steps} steps the larger model answers {share:.2f} rightly, and {LEAST} is the least"
        )
    return str(model)
