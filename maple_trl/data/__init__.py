"""Data sets: the embedded seven-tag set, the code of the tiny omni model that goes with it, and public benchmarks."""

from maple_trl.data.benchmarks import BENCHMARKS, load_benchmark
from maple_trl.data.synthetic import ATTRIBUTES, default_folder, load_seven_tags, right_letter, write_seven_tags


__all__ = [
    "ATTRIBUTES",
    "BENCHMARKS",
    "default_folder",
    "load_benchmark",
    "load_seven_tags",
    "right_letter",
    "write_seven_tags",
]
