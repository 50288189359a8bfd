"""How alike two texts are: by BERTScore (Zhang et al., arXiv 1904.09675), or by their words."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from cachetools import LRUCache

from maple_trl.metrics.answers import words


BUILTIN_SIMILARITY = "builtin:words"
"""Stands for [`word_similarity`] where a job's file names a model of similarity."""


def word_similarity(texts: Sequence[str], others: Sequence[str]) -> list[float]:
    """
    Return the F1 of the words that pairs of texts share, each as often as it occurs, in `[0, 1]`.

    It knows no meaning: for trials without a model, where BERTScore would be downloaded.
    """
    return [
        2 * (first & second).total() / max(first.total() + second.total(), 1)
        for first, second in zip(_counted(texts), _counted(others), strict=True)
    ]


def _counted(texts: Sequence[str]) -> Iterator[Counter[str]]:
    return map(Counter, map(words, texts))


class BertScoreSimilarity:
    r"""
    BERTScore F1 (arXiv 1904.09675, section 3) of pairs of texts, in `[0, 1]`, with a model of your own.

    The tokens of either text are matched to the most similar of the other by the cosine of their contextual embeddings;
    F1 is of the mean matches of both sides, so the order of a pair does not matter. It is neither weighted by inverse
    document frequency nor rescaled with a baseline: what counts as unlike depends on model and layer. With
    `roberta-large` even unrelated sentences score above 0.8, so look at the logged similarities before choosing a
    threshold.

    A text without any token, e.g. an empty one, scores 0.0 with every other.

    The model is loaded when it is first needed, and is no part of a pickled copy.

    Args:
        model (`str`, *optional*, defaults to `"roberta-large"`):
            A folder or Hub id of an encoder, which `AutoModel` can load. (`roberta-large` is what the authors of
            BERTScore advise for English.)
        num_layers (`int`, *optional*):
            The layer whose embeddings are compared, from 1 on. Those above are not loaded. Must be given for a model
            that bert_score has no advice for, e.g. one in a folder.
        device (`str`, *optional*):
            Where the model runs; default: CUDA where there is any, else the CPU.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts per forward pass.
        max_tokens (`int`, *optional*, defaults to `512`):
            Tokens of a text beyond which the rest is left out, or fewer where the tokenizer says so.
        cache_size (`int`, *optional*, defaults to `10000`):
            Pairs whose similarity is remembered; the ones that were not asked for longest are forgotten.

    Raises:
        ImportError: when bert_score is not installed (`pip install "maple-trl[judge]"`).
        ValueError: for a number out of range, or a model without `num_layers` that bert_score has no advice for.

    Example:
    ```python
    >>> from maple_trl.rewards import BertScoreSimilarity

    >>> similarity = BertScoreSimilarity("/models/all-MiniLM-L6-v2", num_layers=5)
    >>> values = similarity(["a dog barks", "a dog barks", ""], ["a dog barks", "stocks fell on Monday", "a dog barks"])
    >>> [round(value, 2) for value in values]
    [1.0, 0.35, 0.0]
    ```
    """

    def __init__(
        self,
        model: str = "roberta-large",
        num_layers: int | None = None,
        *,
        device: str | None = None,
        batch_size: int = 64,
        max_tokens: int = 512,
        cache_size: int = 10_000,
    ):
        if importlib.util.find_spec("bert_score") is None:
            raise ImportError('BertScoreSimilarity needs bert_score: pip install "maple-trl[judge]"')
        numbers = {"batch_size": (batch_size, 1), "max_tokens": (max_tokens, 3), "cache_size": (cache_size, 1)}
        if num_layers is not None:
            numbers["num_layers"] = (num_layers, 1)
        for name, (value, least) in numbers.items():
            if value < least:
                raise ValueError(f"BertScoreSimilarity: {name} must be at least {least}, got {value}")
        self.model = str(model)
        self.num_layers = _advised_layer(self.model) if num_layers is None else num_layers
        self.device = device
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.cache_size = cache_size
        self._start()

    def _start(self) -> None:
        self._encoder, self._tokenizer = None, None
        self._known = LRUCache(self.cache_size)
        self._lock = threading.Lock()  # several rewards may share one model, each in a thread of its own

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def load(self) -> None:
        """
        Load the model now, so that a wrong name does not come to light after the first rollout.

        Raises:
            OSError: when there is no such model, or it cannot be downloaded.
            ValueError: when weights of the model are missing from the checkpoint, when it has too few layers, or when
                its tokenizer cannot pad.
        """
        with self._lock:
            self._load()

    def __call__(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """
        Compare pairs of texts.

        Args:
            texts (`Sequence[str]`):
                N texts.
            others (`Sequence[str]`):
                N texts to compare them with, each with the one in its place.

        Returns:
            `list[float]`: N similarities in `[0, 1]`.

        Raises:
            ValueError: when there are not as many of both, and as [`load`].
        """
        if len(texts) != len(others):
            raise ValueError(f"BertScoreSimilarity compares pairs, got {len(texts)} texts and {len(others)} others")
        pairs = list(zip(map(_encodable, texts), map(_encodable, others), strict=True))
        keys = [_digest(pair) for pair in pairs]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
            # bert_score fails on an empty text.
            found |= {key: 0.0 for key, pair in zip(keys, pairs, strict=True) if not all(map(str.strip, pair))}
            missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in found}
            if missing:
                scores = self._score(list(missing.values()))
                new = dict(zip(missing, scores, strict=True))
                self._known.update(new)
                found |= new
        return [found[key] for key in keys]

    def _score(self, pairs: list[tuple[str, str]]) -> list[float]:
        from bert_score.utils import bert_cos_score_idf

        self._load()
        tokenizer = self._tokenizer
        weights = defaultdict(lambda: 1.0, dict.fromkeys((tokenizer.cls_token_id, tokenizer.sep_token_id), 0.0))
        candidates, references = (list(side) for side in zip(*pairs, strict=True))
        scores = bert_cos_score_idf(
            self._encoder,
            references,
            candidates,
            tokenizer,
            weights,
            batch_size=self.batch_size,
            device=self._encoder.device,
        )
        # Cosines can be a little above 1, and negative.
        return scores[:, 2].clamp(0, 1).tolist()

    def _load(self) -> None:
        """
        Load the model without bert_score, which starts T5 models from random weights.

        It takes every name with "t5" in it, also that of a folder, for a T5.
        """
        if self._encoder is not None:
            return
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging

        config = AutoConfig.from_pretrained(self.model, trust_remote_code=False)
        if self.num_layers > config.num_hidden_layers:
            raise ValueError(
                f"BertScoreSimilarity: {self.model} has {config.num_hidden_layers} layers, got num_layers="
                f"{self.num_layers}"
            )
        config.num_hidden_layers = self.num_layers
        tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
        if tokenizer.pad_token_id is None:
            raise ValueError(f"BertScoreSimilarity: the tokenizer of {self.model} has no padding token")
        tokenizer.model_max_length = min(tokenizer.model_max_length, self.max_tokens)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would report every weight of the layers that are left out
        try:
            # Weights that a checkpoint lacks are drawn at random: not from the numbers that the run samples with.
            with torch.random.fork_rng(devices=[]):
                encoder, report = AutoModel.from_pretrained(
                    self.model, config=config, dtype=torch.float32, output_loading_info=True
                )
        finally:
            logging.set_verbosity(verbosity)
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)  # which is not used
        if missing:
            raise ValueError(
                f"BertScoreSimilarity: {len(missing)} weights of {type(encoder).__name__} are missing from {self.model}, "
                f"the first is {missing[0]}: it is no checkpoint of such a model"
            )
        if config.is_encoder_decoder:
            encoder = encoder.get_encoder()
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder, self._tokenizer = encoder.to(device).eval().requires_grad_(False), tokenizer


def _advised_layer(model: str) -> int:
    from bert_score.utils import model2layers

    if model not in model2layers:
        raise ValueError(
            f"BertScoreSimilarity: bert_score does not say which layer of {model!r} to compare; give num_layers, e.g. "
            "about three quarters of its layers"
        )
    return model2layers[model]


def _encodable(text: str) -> str:
    """Replace half of a surrogate pair, which tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _digest(pair: tuple[str, str]) -> bytes:
    """Digest a pair at a fixed size, however long the texts are; their order does not matter."""
    digests = [hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest() for text in pair]
    return b"".join(sorted(digests))
