"""Arithmetic and small stateful objects behind the trainers: tensors and numbers in, numbers out."""

from maple_trl.algorithms.advantages import group_advantages, register_scope
from maple_trl.algorithms.aggregation import row_coefficients, stratum_totals
from maple_trl.algorithms.clipping import clipped_tokens
from maple_trl.algorithms.crw import contrastive_rewards
from maple_trl.algorithms.curriculum import TagCurriculum, register_curriculum
from maple_trl.algorithms.difficulty import bernoulli_kl, beta_histogram_kl, tag_difficulty
from maple_trl.algorithms.experience import Experience
from maple_trl.algorithms.gradients import GradientMoments, GradientSample
from maple_trl.algorithms.hinting import HintTrigger
from maple_trl.algorithms.importance import raw_ratios, summarise_ratios
from maple_trl.algorithms.missing import left_alone, missing_scores, remaining_scale
from maple_trl.algorithms.off_policy import (
    effective_share,
    policy_divergence,
    replay_advantages,
    replayed_slots,
    term_scales,
)
from maple_trl.algorithms.replay import ReplayStateError, StratifiedReplayBuffer
from maple_trl.algorithms.replay_tiers import Vcrs
from maple_trl.algorithms.sampling import DynamicSampling, compared_groups, informative_groups, solved_groups
from maple_trl.algorithms.schedule import PromptBatch, StratifiedSchedule, rank_share
from maple_trl.algorithms.shaping import tas_weights
from maple_trl.algorithms.weights import AdaptiveTagWeights


__all__ = [
    "AdaptiveTagWeights",
    "DynamicSampling",
    "Experience",
    "GradientMoments",
    "GradientSample",
    "HintTrigger",
    "PromptBatch",
    "ReplayStateError",
    "StratifiedReplayBuffer",
    "StratifiedSchedule",
    "TagCurriculum",
    "Vcrs",
    "bernoulli_kl",
    "beta_histogram_kl",
    "clipped_tokens",
    "compared_groups",
    "contrastive_rewards",
    "effective_share",
    "group_advantages",
    "informative_groups",
    "left_alone",
    "missing_scores",
    "policy_divergence",
    "rank_share",
    "raw_ratios",
    "register_curriculum",
    "register_scope",
    "remaining_scale",
    "replay_advantages",
    "replayed_slots",
    "row_coefficients",
    "solved_groups",
    "stratum_totals",
    "summarise_ratios",
    "tag_difficulty",
    "tas_weights",
    "term_scales",
]
