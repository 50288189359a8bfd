"""
Reward functions: plain callables with TRL's signature `(prompts, completions, completion_ids, **columns)`, which return a
number per completion, or `None` where a completion can't be scored.
"""

from .accuracy import accuracy_reward
from .answers import extract_answer, grade_answer
from .format import format_reward
from .length import LengthReward
from .localisation import box_iou_reward, temporal_iou_reward
from .routing import for_rows, for_tags
from .self_consistency import self_consistency_reward


# The command line takes the names that end in `_reward`; what needs parameters is no such name.
__all__ = [
    "LengthReward",
    "accuracy_reward",
    "box_iou_reward",
    "extract_answer",
    "for_rows",
    "for_tags",
    "format_reward",
    "grade_answer",
    "self_consistency_reward",
    "temporal_iou_reward",
]
