"""Evaluation."""

from maple_trl.evaluation.sampled import SampledAccuracy, choose_questions, sampled_accuracy


__all__ = ["SampledAccuracy", "choose_questions", "sampled_accuracy"]
