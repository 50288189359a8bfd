"""Vectors of completions: out of a file, of their wording, or a model's hidden states."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maple_trl.records.run_folder import EMBEDDINGS_FILE
from maple_trl.reports.folders import ReportError, RunData
from maple_trl.reports.series import TAGS


_DIMENSIONS = 1024
_CHARACTERS = 2000  # of a completion
_TOKENS = 512  # of a text that a model reads
_WORDING = (
    "how often each sequence of three characters stands in a completion (TF-IDF, hashed to 1024 numbers): it shows "
    "wording, not what a model makes of it"
)


@dataclass(frozen=True)
class Sample:
    """
    Completions of a run that are compared.

    Attributes:
        tags: of each.
        clips: of each; `None` where it is not known.
        texts: of each.
        vectors: of shape (N, D), once they are known.
    """

    tags: list[str]
    clips: list[str | None]
    texts: list[str]
    vectors: NDArray[np.float64] | None = None

    def take(self, lines: Sequence[int]) -> Sample:
        """Return some of them."""
        columns = ([column[i] for i in lines] for column in (self.tags, self.clips, self.texts))
        return Sample(*columns, None if self.vectors is None else self.vectors[list(lines)])

    def with_directions(self) -> tuple[NDArray[np.float64], list[str | None], list[str]]:
        """Return vectors, clips and tags of those whose vector has a length: an empty text has none."""
        kept = np.flatnonzero(np.linalg.norm(self.vectors, axis=1)) if len(self.tags) else []
        some = self.take([int(i) for i in kept])
        return some.vectors, some.clips, some.tags


class Embedder:
    """
    Gives texts vectors.

    Without a model, a text is described by how often it has each sequence of three characters, hashed to 1024 numbers,
    weighed by how rare the sequence is (TF-IDF), and scaled to length 1. That shows wording, not what a model makes of it.

    Args:
        model: describe texts by the mean of this model's last hidden states instead; see [`mean_hidden_states`]. It is
            loaded once, and reads each text once.
    """

    def __init__(self, model: str | None = None):
        self.model = model
        self._known: dict[str, NDArray[np.float64]] = {}
        self._reader: tuple[Any, Any] | None = None

    @property
    def method(self) -> str:
        """What the vectors are, for the reader of the report."""
        if self.model is None:
            return _WORDING
        return f"means of the last hidden states of {self.model}, which reads each completion's text alone"

    def vectors(self, parts: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """
        Return vectors of the texts of each part, of shape (N, D).

        Raises:
            ReportError: where the model cannot be loaded.
        """
        if self.model is None or not any(parts):
            return text_vectors(parts)
        new = list(dict.fromkeys(text for part in parts for text in part if text not in self._known))
        try:
            self._reader = self._reader or _load_reader(self.model)
            states = mean_hidden_states(self.model, new, reader=self._reader) if new else []
        except (OSError, ValueError) as error:
            raise ReportError(f"--embeddings {self.model}: {error}") from error
        self._known |= dict(zip(new, states, strict=True))
        width = len(next(iter(self._known.values())))
        return [np.array([self._known[text] for text in part]).reshape(-1, width) for part in parts]


def vectors_of(
    runs: Sequence[RunData], samples: Sequence[Sample], embedder: Embedder
) -> tuple[list[Sample], str, str | None]:
    """
    Give completions vectors that can be compared between the runs.

    Where every folder has a file `embeddings.parquet` with the columns `tag` and `embedding` (lists of numbers, such
    as means of hidden states), and `clip` and `text` where there are any, it stands in place of the samples. Otherwise
    an [`Embedder`] describes their texts.

    Returns:
        the samples with vectors, how they were made, and what is wrong with the files (else `None`).
    """
    files = [run.folder / EMBEDDINGS_FILE for run in runs]
    if all(path.is_file() for path in files):
        try:
            read = [_from_file(path) for path in files]
        except (OSError, KeyError, ValueError) as error:  # what Arrow raises is a ValueError
            return list(samples), "", f"{EMBEDDINGS_FILE} cannot be read: {error}"
        if len({sample.vectors.shape[1] for sample in read if len(sample.tags)}) > 1:
            return list(samples), "", f"The vectors of {EMBEDDINGS_FILE} differ in length between the runs."
        return read, f"vectors of {EMBEDDINGS_FILE}", None
    vectors = embedder.vectors([sample.texts for sample in samples])
    return [replace(s, vectors=v) for s, v in zip(samples, vectors, strict=True)], embedder.method, None


def _from_file(path: Path) -> Sample:
    table = pq.ParquetFile(path).read()
    tags = table["tag"].to_pylist()
    kept = [i for i, tag in enumerate(tags) if tag in TAGS]
    vectors = np.array(table["embedding"].to_pylist(), dtype=np.float64)
    texts, clips = (
        table[name].to_pylist() if name in table.column_names else [None] * len(tags) for name in ("text", "clip")
    )
    return Sample(tags, clips, [text or "" for text in texts], vectors).take(kept)


def write_embeddings(
    folder: Path,
    embeddings: NDArray[np.floating],
    tags: Sequence[str],
    texts: Sequence[str],
    clips: Sequence[str | None] | None = None,
) -> Path:
    """
    Write vectors for the report to draw.

    Args:
        folder: of a run or an evaluation.
        embeddings: of shape (N, D), e.g. the mean over a completion's tokens of a model's last hidden states.
        tags, texts: of the N completions.
        clips: that they are about.
    """
    columns = {"tag": list(tags), "text": list(texts), "embedding": np.asarray(embeddings, np.float32).tolist()}
    columns |= {} if clips is None else {"clip": list(clips)}
    path = Path(folder, EMBEDDINGS_FILE)
    pq.write_table(pa.table(columns), path)
    return path


def text_vectors(parts: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
    """Return TF-IDF vectors of texts, of shape (N, 1024) for each part; the rareness is that over all parts."""
    texts = [text for part in parts for text in part]
    counts = np.zeros((len(texts), _DIMENSIONS))
    for i, text in enumerate(texts):
        data = f" {text[:_CHARACTERS]} ".lower().encode()
        for start in range(len(data) - 2):
            counts[i, zlib.crc32(data[start : start + 3]) % _DIMENSIONS] += 1
    rareness = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0))) + 1
    vectors = np.log1p(counts) * rareness
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, lengths, out=vectors, where=lengths > 0)
    return np.split(vectors, np.cumsum([len(part) for part in parts])[:-1])


def _load_reader(name: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer."""
    import torch

    from maple_trl.omni.loading import load_model, load_processor

    model, processor = load_model(name, dtype="auto").eval(), load_processor(name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), getattr(processor, "tokenizer", processor)


def mean_hidden_states(
    name: str, texts: Sequence[str], batch_size: int = 16, reader: tuple[Any, Any] | None = None
) -> NDArray[np.float64]:
    """
    Average a model's last hidden states over the first 512 tokens of each text.

    The model reads the text alone, without the prompt and without media.

    Args:
        name: of the model, as `--model` of `maple-trl eval` takes it.
        texts: N texts; an empty one is read as a space.
        reader: the model and its tokenizer, where they are loaded already.

    Returns:
        of shape (N, hidden size).
    """
    import torch

    model, tokenizer = reader or _load_reader(name)
    found = []
    for start in range(0, len(texts), batch_size):
        rows = [
            tokenizer.encode(text or " ", add_special_tokens=False)[:_TOKENS]
            for text in texts[start : start + batch_size]
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        sums = (states.float() * mask[..., None]).sum(dim=1)
        found.append((sums / mask.sum(dim=1, keepdim=True)).double().cpu().numpy())
    return np.concatenate(found)
