"""
On rows with pictures alone the omni trainer is TRL's GRPO trainer on the same table: losses, gradients, weights, completions.

Where a rollout has several optimizer steps, as many rows go into each, but others: with media, rows of a prompt stay together.
"""

import datasets
import pytest
import torch
from datasets import Dataset
from media_files import picture
from PIL import Image
from test_grpo_parity import build, run
from tiny_models import FAMILIES
from trl import GRPOConfig, GRPOTrainer

from maple_trl import OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.omni.families import family_for


pytestmark = pytest.mark.slow

PROMPTS = 8
QUESTIONS = ["what color is the square?", "what is red?", "is it green or blue?", "answer low", "high?"]


def table(folder, name, several=False, first=0):
    """Rows with one picture each, or with one to three, as `datasets.Image` keeps them; of whole patches, so nobody resizes."""
    multiple, number = FAMILIES[name].frame_multiple, first
    folder.mkdir(exist_ok=True)
    cells = []
    for i in range(PROMPTS):
        files = []
        for j in range(1 + i % 3 if several else 1):
            path = folder / f"{i}-{j}.png"
            height, width = 2 + (i + j) % 2, 2 + i % 3
            Image.fromarray(picture(number, height * multiple, width * multiple)).save(path)
            files.append(str(path))
            number += 1
        cells.append(files if several else files[0])
    prompts = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(PROMPTS)]
    column, feature = ("images", datasets.List(datasets.Image())) if several else ("image", datasets.Image())
    return Dataset.from_dict({"prompt": prompts, column: cells}).cast_column(column, feature)


class Seen:
    """A reward that keeps what it was given."""

    __name__ = "seen"

    def __init__(self):
        self.texts = []

    def __call__(self, completions, **columns):
        texts = [completion[0]["content"] for completion in completions]
        self.texts.append((texts, [prompt[-1]["content"] for prompt in columns["prompts"]]))
        return [sum(map(ord, text)) % 7 / 7 for text in texts]


def ours(name, tmp_path, data, folder, **options):
    model, processor = build(name, tmp_path)
    options |= {"shared_prefix": "off", "media_root": str(folder)}
    return run(OmniGRPOTrainer, OmniGRPOConfig, model, processor, tmp_path / "omni", data, **options)


CASES = {
    "default": {},
    "grpo loss, reference model": {"loss_type": "grpo", "beta": 0.1},
    "two iterations": {"num_iterations": 2, "epsilon_high": 0.3},
    "lengths differ": {"max_completion_length": 12},
}
SEEING = ("qwen2_5_vl", "qwen3_vl", "qwen2_5_omni")  # TRL cannot call the processor of Qwen3-Omni
RUNS = [("qwen2_5_vl", options, False) for options in CASES] + [(name, "default", True) for name in SEEING]


@pytest.mark.parametrize(("name", "case", "several"), RUNS)
@pytest.mark.matrix(cases=1)
def test_same_completions_losses_gradients_and_weights(name, case, several, tmp_path, monkeypatch):
    data, options = table(tmp_path / "media", name, several), CASES[case]
    model, processor = build(name, tmp_path)
    # TRL keeps only image tokens out of completions; ours keeps all media tokens out.
    suppressed = {"suppress_tokens": family_for(model, processor).suppressed_ids}
    rewards = [Seen(), Seen()]
    monkeypatch.setattr("test_grpo_parity.letters", rewards[0])
    expected = run(
        GRPOTrainer, GRPOConfig, model, processor, tmp_path / "trl", data, generation_kwargs=suppressed, **options
    )
    monkeypatch.setattr("test_grpo_parity.letters", rewards[1])
    found = ours(name, tmp_path, data, tmp_path / "media", **options)

    assert len(expected[0]) == len(found[0]) == 3
    assert [texts for texts, _ in rewards[1].texts] == [texts for texts, _ in rewards[0].texts]
    for theirs, mine in zip(expected[0], found[0], strict=True):
        for metric in ("loss", "grad_norm", "reward", "entropy", "kl"):
            # The entropy that is logged is a mean over micro-batches, and ours puts the rows of a prompt into one.
            rel = 1e-3 if (metric, case) == ("entropy", "lengths differ") else 1e-4
            if metric in theirs:
                assert mine[metric] == pytest.approx(theirs[metric], rel=rel, abs=1e-6), metric
    assert found[0][0]["media_tokens/image"] > 0
    for theirs, mine in zip(expected[1], found[1], strict=True):
        assert theirs.keys() == mine.keys()
        for weight in theirs:
            torch.testing.assert_close(
                mine[weight], theirs[weight], rtol=1e-4, atol=1e-6, msg=lambda m, n=weight: f"{n}: {m}"
            )
    for weight, value in expected[2].items():
        torch.testing.assert_close(found[2][weight], value, rtol=1e-4, atol=1e-5)
    assert any("visual" in weight and gradient.norm() > 1e-5 for weight, gradient in found[1][0].items())


def test_other_pictures_are_told_apart(tmp_path):
    """The negative control: the same questions and sizes, other pixels."""
    losses = []
    for first in (0, 5):
        folder = tmp_path / str(first)
        data = table(folder, "qwen2_5_vl", first=first)
        losses.append(ours("qwen2_5_vl", folder, data, folder)[0])
    assert losses[0][0]["grad_norm"] != pytest.approx(losses[1][0]["grad_norm"], rel=1e-4)
