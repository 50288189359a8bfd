"""Texts as a model reads them: means of its last hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maple_trl.omni.loading import load_model, load_processor


_TOKENS = 512  # of a text


@torch.no_grad()
def mean_hidden_states(name: str, texts: Sequence[str], batch_size: int = 16) -> NDArray[np.float64]:
    """
    The mean over a text's tokens of the last hidden states of a model that reads the text alone, without the prompt
    and without media; of the first 512 tokens.

    Args:
        name: of the model, as `--model` of `maple-trl eval` takes it.
        texts: N texts; an empty one is read as a space.

    Returns:
        of shape (N, hidden size).
    """
    model, processor = load_model(name, dtype="auto").eval(), load_processor(name)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = getattr(processor, "tokenizer", processor)
    found = []
    for start in range(0, len(texts), batch_size):
        rows = [
            tokenizer.encode(text or " ", add_special_tokens=False)[:_TOKENS]
            for text in texts[start : start + batch_size]
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        sums = (states.float() * mask[..., None]).sum(dim=1)
        found.append((sums / mask.sum(dim=1, keepdim=True)).double().cpu().numpy())
    return np.concatenate(found)
