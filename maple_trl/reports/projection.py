"""Completions of all runs as points of a plane."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maple_trl.files import as_json
from maple_trl.metrics.intervals import UndefinedMetricError
from maple_trl.metrics.spread import embedding_spread
from maple_trl.reports.folders import ReportError, RunData
from maple_trl.reports.rollouts import Rollouts
from maple_trl.reports.sections import lines_by_phase, lines_by_tag
from maple_trl.reports.series import TAGS, rounded


EMBEDDINGS_FILE = "embeddings.parquet"
PER_TAG = 150
"""Completions of a tag that are drawn, at most."""
_DIMENSIONS = 1024
_CHARACTERS = 2000  # of a completion
_TOKENS = 512  # of a text that a model reads


def project(
    runs: Sequence[RunData], rollouts: Sequence[Rollouts | None], model: str | None = None
) -> list[dict[str, Any]]:
    """
    Return two principal components of completions' embeddings, the same for all runs, so that points can be compared.

    Where every folder has a file `embeddings.parquet` with the columns `tag` and `embedding` (lists of numbers, such
    as means of hidden states), its vectors are taken. Otherwise a completion is described by its text alone: how
    often it has each sequence of three characters, hashed to 1024 numbers, weighed by how rare the sequence is
    (TF-IDF), and scaled to length 1. That shows wording, not what a model makes of it.

    Args:
        model: describe the texts by the mean of this model's last hidden states instead; see [`mean_hidden_states`].

    Returns:
        for each run `x`, `y`, `tag` and `text` of the points, `method`, `explained` (shares of the variance) and the
        mean cosine distances of [`~maple_trl.evaluation.embedding_spread`]; `{"missing": why}` where nothing is there.
    """
    files = [run.folder / EMBEDDINGS_FILE for run in runs]
    if all(path.is_file() for path in files):
        try:
            parts = [_from_file(path) for path in files]
        except (OSError, KeyError, ValueError) as error:  # what Arrow raises is a ValueError
            return [{"missing": f"{EMBEDDINGS_FILE} cannot be read: {error}"} for _ in runs]
        method = f"vectors of {EMBEDDINGS_FILE}"
        vectors = [part[0] for part in parts]
        if len({part.shape[1] for part in vectors}) > 1:
            return [{"missing": f"The vectors of {EMBEDDINGS_FILE} differ in length between the runs."} for _ in runs]
    else:
        parts = [_sample(run, found) for run, found in zip(runs, rollouts, strict=True)]
        method = (
            "how often each sequence of three characters stands in a completion (TF-IDF, hashed to 1024 numbers): it "
            f"shows wording, not what a model makes of it. At most {PER_TAG} completions a tag; of a training run, of "
            "the last fifth of the tag's steps; of an evaluation, of its first access"
        )
        vectors = text_vectors([part[2] for part in parts])
        if model is not None and any(part[2] for part in parts):
            method = f"means of the last hidden states of {model}, which reads each completion's text alone"
            try:
                states = mean_hidden_states(model, [text for part in parts for text in part[2]])
            except (OSError, ValueError) as error:
                raise ReportError(f"--embeddings {model}: {error}") from error
            vectors = np.split(states, np.cumsum([len(part[2]) for part in parts])[:-1])
    counts = [len(part[1]) for part in parts]
    if sum(counts) < 3:
        why = "There are fewer than three completions with a tag to draw."
        return [{"missing": why} for _ in runs]
    points, explained = principal_components(np.concatenate(vectors))
    ends_of = np.cumsum(counts)
    found = []
    for (_, tags, texts), own, end, count in zip(parts, vectors, ends_of, counts, strict=True):
        if not count:
            found.append({"missing": "The run has no completion with a tag."})
            continue
        x, y = points[end - count : end].T
        found.append(
            {
                "x": rounded(x, 4),
                "y": rounded(y, 4),
                "tag": tags,
                "text": [text[:160] for text in texts],
                "method": method,
                "explained": rounded(explained, 3),
                "spread": _spread(own, tags),
            }
        )
    return found


def _sample(run: RunData, rollouts: Rollouts | None) -> tuple[None, list[str], list[str]]:
    """Return tags and texts to draw: of the last fifth of a tag's steps, or of an evaluation's first access."""
    if rollouts is None or not len(rollouts):
        return None, [], []
    picked = []
    for lines in lines_by_tag(rollouts).values():
        *_, lines = lines_by_phase(run, rollouts, lines).values()
        picked += [lines[i] for i in np.unique(np.linspace(0, len(lines) - 1, PER_TAG).astype(int))] if lines else []
    tags = rollouts.get("tag")
    texts = rollouts.get("completion")
    return None, [tags[i] for i in picked], [texts[i] or "" for i in picked]


def _from_file(path: Path) -> tuple[NDArray[np.float64], list[str], list[str]]:
    table = pq.ParquetFile(path).read()
    tags = table["tag"].to_pylist()
    kept = [i for i, tag in enumerate(tags) if tag in TAGS]
    vectors = np.array(table["embedding"].to_pylist(), dtype=np.float64)[kept]
    texts = table["text"].to_pylist() if "text" in table.column_names else [""] * len(tags)
    return vectors, [tags[i] for i in kept], [texts[i] or "" for i in kept]


def write_embeddings(
    folder: Path, embeddings: NDArray[np.floating], tags: Sequence[str], texts: Sequence[str]
) -> Path:
    """
    Write vectors for the report to draw.

    Args:
        folder: of a run or an evaluation.
        embeddings: of shape (N, D), e.g. the mean over a completion's tokens of a model's last hidden states.
        tags, texts: of the N completions.
    """
    columns = {"tag": list(tags), "text": list(texts), "embedding": np.asarray(embeddings, np.float32).tolist()}
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


def mean_hidden_states(name: str, texts: Sequence[str], batch_size: int = 16) -> NDArray[np.float64]:
    """
    Average a model's last hidden states over the first 512 tokens of each text.

    The model reads the text alone, without the prompt and without media.

    Args:
        name: of the model, as `--model` of `maple-trl eval` takes it.
        texts: N texts; an empty one is read as a space.

    Returns:
        of shape (N, hidden size).
    """
    import torch

    from maple_trl.omni.loading import load_model, load_processor

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
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        sums = (states.float() * mask[..., None]).sum(dim=1)
        found.append((sums / mask.sum(dim=1, keepdim=True)).double().cpu().numpy())
    return np.concatenate(found)


def principal_components(vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Return the two directions in which vectors vary most.

    Args:
        vectors: of shape (N, D).

    Returns:
        the coordinates, of shape (N, 2), and the share of the variance that each explains. Of each direction the sign
        is that which makes its largest component positive, so that the same vectors always give the same picture.
    """
    centred = vectors - vectors.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, ::-1][:, :2]
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, np.arange(directions.shape[1])])
    points = np.zeros((len(vectors), 2))
    points[:, : directions.shape[1]] = centred @ directions
    total = values.clip(min=0).sum()
    explained = np.zeros(2)
    explained[: directions.shape[1]] = values[::-1][:2].clip(min=0) / total if total > 0 else 0
    return points, explained


def _spread(vectors: NDArray[np.float64], tags: Sequence[str]) -> dict[str, Any]:
    try:
        found = embedding_spread(vectors, tags)
    except UndefinedMetricError as error:
        return {"undefined": str(error)}
    return as_json({"dispersion": found.dispersion, "separation": found.separation})
