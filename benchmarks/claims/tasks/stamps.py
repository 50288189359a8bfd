"""
Real pictures, voices and written names in the seven tags, and a model of the same architecture that begins from nothing.

The media are those of Debian's tuxpaint-stamps-default (GPL-2), which `fetch_stamps.py` brings; neither they nor clips made of them
are part of the project. Cold start, reinforcement learning and held-out questions have objects of their own (see `stamps_media`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from fetch_stamps import COMMAND, PACKAGE, unpacked
from stamps_media import ATTRIBUTES, NOUNS, read_pools, write_split
from supervised import train_supervised

from maple_trl.rewards import accuracy_reward, format_reward


VERSION = 1
NEEDS = f"the media of Debian's {PACKAGE.name}, which `{COMMAND}` fetches"
ACCESSES = ("required", "all")
QUESTIONS, SAMPLES = 320, 2


@dataclass(frozen=True)
class Sizes:
    """Questions of each tag, clips of each kind of thing with each voice, and rows of a step of the cold start."""

    cold_rows: int = 512
    cold_clips: int = 64
    train_rows: int = 112
    train_clips: int = 32
    test_rows: int = 320
    test_clips: int = 40
    batch: int = 32


SIZES = Sizes()
COLD_STEPS = 450
VOCABULARY = 768


def is_there() -> bool:
    return unpacked() is not None


def prepare(folder: Path) -> None:
    root = unpacked()
    if root is None:
        raise FileNotFoundError(
            f"the task stamps needs the media of {PACKAGE.name} {PACKAGE.version} ({PACKAGE.license}); run: {COMMAND}"
        )
    print(
        f"stamps: clips are made of {PACKAGE.name}, which is under the {PACKAGE.license}: keep them in {folder}",
        flush=True,
    )
    pools = read_pools(root)
    cold = write_split(root, pools, folder / "cold", "cold", SIZES.cold_rows, SIZES.cold_clips)
    write_split(root, pools, folder / "data", "train", SIZES.train_rows, SIZES.train_clips)
    write_split(root, pools, folder / "data", "test", SIZES.test_rows, SIZES.test_clips)
    names = [
        signal.text
        for (signal_of, _, split), own in pools.items()
        if (signal_of, split) == ("S", "cold")
        for signal in own
    ]
    cold_start(folder, cold, names)


def cold_start(folder: Path, cold: Dataset, names: Sequence[str]) -> None:
    """Teach a model of random weights the questions of the cold start, on both accesses."""
    from maple_trl.data.tiny_omni import build_model, build_processor, target_text
    from maple_trl.modalities import ModalityTag

    told = [row | {"completion": [{"role": "assistant", "content": target_text(row)}]} for row in cold]
    told += [row | {"tag": ModalityTag.VAS.value} for row in told]  # a tag says here what is fed
    processor = build_processor()
    processor.tokenizer = build_tokenizer(names)
    train_supervised(
        folder,
        told,
        COLD_STEPS,
        build_model(processor.tokenizer, seed=0),
        processing_class=processor,
        per_device_train_batch_size=SIZES.batch,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=30,
    )


def build_tokenizer(names: Sequence[str]) -> Any:
    """Build the tiny model's tokenizer anew, with one token for each word of the answers and pieces of the written names."""
    from maple_trl.data import tiny_omni

    words = [word for values in ATTRIBUTES.values() for word in values] + list(NOUNS.values())
    words += ["user", "assistant", "system", "subtitle", "Subtitle", "subtitles", "Subtitles", "answer", "Answer"]
    corpus = [f"{word} {word}" for word in words] * 500 + sorted(names)  # the counts make whole words win the merges
    size = VOCABULARY - len(tiny_omni.ANSWER_TOKENS)
    tokenizer = tiny_omni.build_tokenizer().train_new_from_iterator(corpus, size, show_progress=False)
    tokenizer.add_tokens(list(tiny_omni.ANSWER_TOKENS))
    return tokenizer


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
        "max_steps": 294,  # three epochs, as the recipes' own number is of the embedded set
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)


def score(**columns: Any) -> list[float | None]:
    return accuracy_reward(**columns)


def shuffled_reward(**columns: Any) -> list[float]:
    """Return a batch's rewards dealt anew over its completions: as much is given, to whom has nothing to do with the answer."""
    rewards = [
        accuracy + 0.1 * form
        for accuracy, form in zip(accuracy_reward(**columns), format_reward(**columns), strict=True)
    ]
    random.Random(json.dumps(columns["completions"])).shuffle(rewards)
    return rewards
