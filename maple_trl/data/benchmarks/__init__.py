"""Public benchmarks from local copies, all as rows of one form."""

from maple_trl.data.benchmarks.base import Benchmark, BenchmarkError
from maple_trl.data.benchmarks.loader import (
    BENCHMARKS,
    FEATURES,
    BenchmarkRows,
    LeftOut,
    check,
    load_benchmark,
    read_benchmark,
    register_benchmark,
)
from maple_trl.data.benchmarks.prompts import PROMPT_STYLES, PromptStyle


__all__ = [
    "BENCHMARKS",
    "FEATURES",
    "PROMPT_STYLES",
    "Benchmark",
    "BenchmarkError",
    "BenchmarkRows",
    "LeftOut",
    "PromptStyle",
    "check",
    "load_benchmark",
    "read_benchmark",
    "register_benchmark",
]
