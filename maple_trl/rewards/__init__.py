"""
Reward functions: plain callables with TRL's signature `(prompts, completions, completion_ids, **columns)`.

They return a number per completion, or `None` where a completion can't be scored.
"""

from .accuracy import AccuracyReward, accuracy_reward
from .answers import extract_answer, grade_answer
from .calls import RewardError
from .caption_judge import CaptionJudge
from .contrastive import ContrastiveRewardWeighting
from .format import format_reward
from .judge import OpenAIJudge, judge_callbacks
from .judge_limits import JudgeUnavailableError
from .length import LengthReward
from .local_scorer import LocalScorer
from .localisation import box_iou_reward, temporal_iou_reward
from .reasoning_judge import StepwiseReasoningJudge
from .routing import for_rows, for_tags
from .self_consistency import self_consistency_reward
from .similarity import BertScoreSimilarity


# The command line takes the names that end in `_reward`; what needs parameters is no such name.
__all__ = [
    "AccuracyReward",
    "BertScoreSimilarity",
    "CaptionJudge",
    "ContrastiveRewardWeighting",
    "JudgeUnavailableError",
    "LengthReward",
    "LocalScorer",
    "OpenAIJudge",
    "RewardError",
    "StepwiseReasoningJudge",
    "accuracy_reward",
    "box_iou_reward",
    "extract_answer",
    "for_rows",
    "for_tags",
    "format_reward",
    "grade_answer",
    "judge_callbacks",
    "self_consistency_reward",
    "temporal_iou_reward",
]
