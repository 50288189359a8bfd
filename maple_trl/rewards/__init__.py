"""
Reward functions: plain callables with TRL's signature `(prompts, completions, completion_ids, **columns)`.

They return a number per completion, or `None` where a completion can't be scored.
"""

from typing import Any

from maple_trl import Registry

from .accuracy import AccuracyReward, accuracy_reward
from .answer_judge import AnswerJudge
from .answers import extract_answer, grade_answer
from .caption_judge import CaptionJudge
from .contrastive import ContrastiveRewardWeighting
from .errors import RewardError
from .format import format_reward
from .judge import OpenAIJudge, judge_callbacks
from .judge_limits import JudgeUnavailableError
from .length import LengthReward
from .local_scorer import LocalScorer
from .localisation import box_iou_reward, temporal_iou_reward
from .measures import MeasuredReward
from .places import ObjectPlaceReward, object_place_reward
from .reasoning_judge import StepwiseReasoningJudge
from .routing import for_rows, for_tags
from .self_consistency import SelfConsistencyReward, self_consistency_reward
from .similarity import BertScoreSimilarity


REWARDS: Registry[Any] = Registry(
    "reward",
    "maple_trl.rewards",
    {
        "accuracy_reward": accuracy_reward,
        "box_iou_reward": box_iou_reward,
        "format_reward": format_reward,
        "object_place_reward": object_place_reward,
        "self_consistency_reward": self_consistency_reward,
        "temporal_iou_reward": temporal_iou_reward,
        "length_reward": LengthReward,
        "answer_judge": AnswerJudge,
        "caption_judge": CaptionJudge,
        "stepwise_reasoning_judge": StepwiseReasoningJudge,
    },
)
"""Reward functions by the name that YAML files and the command line take; of those that need parameters the class."""

__all__ = [
    "REWARDS",
    "AccuracyReward",
    "AnswerJudge",
    "BertScoreSimilarity",
    "CaptionJudge",
    "ContrastiveRewardWeighting",
    "JudgeUnavailableError",
    "LengthReward",
    "LocalScorer",
    "MeasuredReward",
    "ObjectPlaceReward",
    "OpenAIJudge",
    "RewardError",
    "SelfConsistencyReward",
    "StepwiseReasoningJudge",
    "accuracy_reward",
    "box_iou_reward",
    "extract_answer",
    "for_rows",
    "for_tags",
    "format_reward",
    "grade_answer",
    "judge_callbacks",
    "object_place_reward",
    "self_consistency_reward",
    "temporal_iou_reward",
]
