"""Reward functions: plain callables with TRL's signature `(prompts, completions, completion_ids, **columns)`."""

from .accuracy import accuracy_reward
from .answers import extract_answer, grade_answer
from .format import format_reward


__all__ = ["accuracy_reward", "extract_answer", "format_reward", "grade_answer"]
