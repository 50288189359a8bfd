"""
Makes the embedded model `builtin:tiny-omni`: builds a tiny Qwen2.5-Omni Thinker and trains it on a seven-tag set.

    python scripts/make_tiny_omni.py

The training set is written for this purpose with a seed of its own, so the clips of `builtin:seven-tags` stay unseen.
Training stops early on purpose: the model keeps to the answer format and perceives all three signals, but is often
wrong, which leaves reinforcement learning something to do. The same machine gives the same weights.
"""

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils import logging

from maple_trl.data.synthetic import LETTERS, write_seven_tags
from maple_trl.data.tiny_omni import build_model, build_processor, target_text
from maple_trl.evaluation.sampled import sampled_accuracy
from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids, generation_position_ids
from maple_trl.omni.families import OmniFamily, family_for
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media
from maple_trl.rewards import accuracy_reward, format_reward


OUTPUT = Path(__file__).resolve().parents[1] / "maple_trl" / "assets" / "tiny-omni"
TRAIN_SEED = 1_000
MAX_COMPLETION = 14
LETTER_WEIGHT = 0.25


def encode(family: OmniFamily, table, folder: str | os.PathLike) -> list[EncodedPrompt]:
    builder = PromptBuilder(family, MediaLoader(folder, MediaLimits(num_frames=4)))
    return [builder.encode(row) for row in table]


def pad_left(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value, padding_side="left")


def supervised_loss(
    family: OmniFamily, model: PreTrainedModel, prompts: list[EncodedPrompt], targets: list[torch.Tensor]
) -> torch.Tensor:
    """
    Cross-entropy of the targets, plus that of the answer letters once more with `LETTER_WEIGHT`.

    Without the second term the letter, a sum of up to three indices and one token of nine, stays at chance for tags of
    several modalities; with a weight of 1 the format is learned too late.
    """
    tokenizer = family.tokenizer
    input_ids = pad_left([prompt.input_ids for prompt in prompts], tokenizer.pad_token_id)
    width = input_ids.size(1)
    completion = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    length = completion.size(1)
    with serve_media(family, model, prompts):
        logits = model(
            input_ids=torch.cat([input_ids, completion.clamp(min=0)], dim=1),
            attention_mask=torch.cat([input_ids != tokenizer.pad_token_id, completion >= 0], dim=1).long(),
            position_ids=batch_position_ids(prompts, width, length),
            use_cache=False,
        ).logits[:, width - 1 : -1]
    mask = completion >= 0
    losses = cross_entropy(logits[mask], completion[mask], reduction="none")
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS)))
    return losses.mean() + LETTER_WEIGHT * losses[torch.isin(completion[mask], letters)].mean()


def train(family: OmniFamily, model: PreTrainedModel, table, folder, args: argparse.Namespace) -> None:
    prompts = encode(family, table, folder)
    eos = family.tokenizer.eos_token
    targets = [
        torch.tensor(family.tokenizer(target_text(row) + eos, add_special_tokens=False)["input_ids"]) for row in table
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=50)
    rng = np.random.default_rng(args.seed)
    model.train()
    for step in range(1, args.steps + 1):
        rows = rng.choice(len(prompts), args.batch_size, replace=False)
        loss = supervised_loss(family, model, [prompts[i] for i in rows], [targets[i] for i in rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        if step % 10 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)


def evaluate(family: OmniFamily, model: PreTrainedModel, table, folder: str | os.PathLike) -> None:
    """Prints the share of completions in the answer format and the accuracy per tag, sampled at temperature 1."""

    @torch.no_grad()
    def generate(rows) -> list[str]:
        prompts = encode(family, rows, folder)
        input_ids = pad_left([prompt.input_ids for prompt in prompts], family.tokenizer.pad_token_id)
        with serve_media(family, model, prompts):
            output = model.generate(
                input_ids=input_ids,
                attention_mask=(input_ids != family.tokenizer.pad_token_id).long(),
                position_ids=generation_position_ids(prompts, input_ids.size(1)),
                max_new_tokens=MAX_COMPLETION,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                suppress_tokens=family.suppressed_ids,
            )
        completions = family.tokenizer.batch_decode(output[:, input_ids.size(1) :], skip_special_tokens=True)
        print(f"valid format      {np.mean(format_reward(completions=completions)):.3f}")
        return completions

    model.eval()
    accuracy = sampled_accuracy(generate, table, accuracy_reward).accuracy
    print("sampled accuracy ", "  ".join(f"{group} {value:.3f}" for group, value in accuracy.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded model builtin:tiny-omni.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=88, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32, help="rows per step")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of AdamW, after 50 steps of warm-up")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the row order")
    args = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The order of float additions depends on the number of threads; one thread gives the same weights every time.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    processor = build_processor()
    model = build_model(processor.tokenizer, seed=args.seed)
    family = family_for(model, processor)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table = write_seven_tags(folder, prompts_per_tag=256, seed=TRAIN_SEED, splits=["train"])["train"]
        train(family, model, table, folder, args)
    print(f"trained in {time.perf_counter() - start:.0f} s")

    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)  # written for its owner alone
    weights = (args.output / "model.safetensors").read_bytes()
    print(f"{args.output}: {sum(f.stat().st_size for f in args.output.iterdir()) / 2**20:.2f} MiB")
    print(f"sha256 of the weights: {hashlib.sha256(weights).hexdigest()}")
    with tempfile.TemporaryDirectory() as folder:
        evaluate(family, model, write_seven_tags(folder, splits=["test"])["test"], folder)


if __name__ == "__main__":
    main()
