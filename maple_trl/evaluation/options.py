"""How an evaluation asks its questions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from maple_trl.modalities import ModalityTag
from maple_trl.records.evaluations import EvaluationError


REQUIRED, ALL = "required", "all"

# Options of `GenerationConfig` that the evaluator sets itself, and those that would take sampling out of its hands.
_OWN_OPTIONS = {
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "num_return_sequences": "--samples",
}
_CLOSED_OPTIONS = ("do_sample", "num_beams", "max_length", "use_cache", "return_dict_in_generate")


class ScoringError(EvaluationError):
    """The scoring function failed; what was asked before is kept."""


class ServerError(EvaluationError):
    """The model's server does not answer, or not as it must; what was asked before is kept."""


def parse_access(text: str) -> tuple[str, ...]:
    """
    Read a list of accesses, e.g. `required`, `all`, or `V,A,S,VA,VS,AS,VAS`.

    Args:
        text: names joined by commas: `required` (a row is fed the signals of its tag), `all` (all that it has), or tags
            (every row is fed exactly these signals, whatever its own tag).

    Raises:
        EvaluationError: for another name, or one given twice.
    """
    accesses = []
    for name in text.split(","):
        name = name.strip()
        try:
            access = name if name in (REQUIRED, ALL) else ModalityTag.parse(name).value
        except ValueError:
            raise EvaluationError(
                f"access {name!r} is neither '{REQUIRED}', '{ALL}' nor a tag ({', '.join(ModalityTag)}); several are "
                "joined by commas, e.g. V,A,VA"
            ) from None
        if access in accesses:
            raise EvaluationError(f"access {access} is given twice in {text!r}")
        accesses.append(access)
    return tuple(accesses)


@dataclass(frozen=True)
class EvalOptions:
    """
    Options of asking questions, all of which decide the numbers.

    Args:
        access: names as of [`parse_access`]; kept as a tuple.
        samples: completions per question.
        batch_size: questions per pass, each with all of its samples. A part of the numbers, for rounding depends on the
            rows of a batch: batches are cut from the data set alone, and are the same in a run that was resumed or has
            several processes.
        seed: of the sampling. A sample is decided by it, the question's name and the sample's number; the same under
            every access, so that accesses are compared with the same luck.
        max_new_tokens: longest completion.
        temperature: 0 answers greedily, with one sample.
        top_p, top_k, min_p: cut the distribution; 1, 0 and 0 leave it whole.
        generation: further options of [`~transformers.GenerationConfig`], e.g. `{"repetition_penalty": 1.05}`. Those of
            the checkpoint are not used.
        shared_prompt: pass a question's prompt through the model once for all of its samples.

    Raises:
        EvaluationError: for a value out of range, or options that contradict each other.
    """

    access: list[str] = field(
        default_factory=lambda: ["required"],
        metadata={
            "help": "what rows are fed, one or several joined by commas: required (the signals of the row's tag), "
            "all (all it has), or tags (exactly these: V,A,S,VA,VS,AS,VAS is the whole ablation) (required)"
        },
    )
    samples: int = field(default=5, metadata={"aliases": ["--num_generations"], "help": "completions per question"})
    batch_size: int = field(
        default=8, metadata={"aliases": ["--per_device_eval_batch_size"], "help": "questions per pass"}
    )
    seed: int = field(default=0, metadata={"help": "of the sampling"})
    max_new_tokens: int = field(
        default=512, metadata={"aliases": ["--max_completion_length"], "help": "longest completion"}
    )
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy, with one sample"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus; 1 cuts nothing"})
    top_k: int = field(default=0, metadata={"help": "best K tokens; 0 cuts nothing"})
    min_p: float = field(default=0.0, metadata={"help": "share of the best token's probability"})
    generation: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "aliases": ["--generation_kwargs"],
            "help": "further options of GenerationConfig; with --server further fields of a request",
        },
    )
    shared_prompt: bool = field(
        default=True, metadata={"help": "pass a question's prompt once for all of its samples"}
    )

    def __post_init__(self):
        object.__setattr__(self, "access", parse_access(",".join(map(str, self.access))))
        for name, least in (("samples", 1), ("batch_size", 1), ("max_new_tokens", 1), ("seed", 0), ("top_k", 0)):
            if getattr(self, name) < least:
                raise EvaluationError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise EvaluationError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise EvaluationError(
                f"top_p must be in (0, 1] and min_p in [0, 1), got top_p={self.top_p}, min_p={self.min_p}"
            )
        if self.temperature == 0 and self.samples > 1:
            raise EvaluationError(
                f"temperature 0 gives {self.samples} times the same sample: set samples to 1, or a temperature above 0"
            )
        for name in self.generation:
            if name in _OWN_OPTIONS:
                raise EvaluationError(f"generation: {name} is set by {_OWN_OPTIONS[name]}")
            if name in _CLOSED_OPTIONS:
                raise EvaluationError(f"generation: {name} cannot be set here")
