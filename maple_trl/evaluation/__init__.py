"""Evaluation. What asks models is in `maple_trl.evaluation.evaluator`: it loads transformers, the metrics do without."""

from maple_trl.evaluation.options import EvalOptions, parse_access
from maple_trl.evaluation.results import evaluation_results
from maple_trl.evaluation.sampled import SampledAccuracy, choose_questions, sampled_accuracy
from maple_trl.metrics.accuracy import (
    TagAccuracies,
    TrainingEfficiency,
    fused_samples,
    fusion_gain,
    pass_at_k,
    pass_at_k_interval,
    superset_scores,
    tag_accuracies,
    training_efficiency,
)
from maple_trl.metrics.gaps import ModalityGap, modality_gap, modality_gap_intervals, tag_disparity
from maple_trl.metrics.hf_metrics import metric_folder
from maple_trl.metrics.intervals import Estimate, UndefinedMetricError, bootstrap_mean
from maple_trl.metrics.significance import PairedComparison, align_runs, compare_runs, mcnemar_exact
from maple_trl.metrics.spread import ClipSpread, EmbeddingSpread, clip_spread, embedding_spread
from maple_trl.records.evaluations import EvalStore, Evaluation, EvaluationError, load_evaluation


__all__ = [
    "ClipSpread",
    "EmbeddingSpread",
    "Estimate",
    "EvalOptions",
    "EvalStore",
    "Evaluation",
    "EvaluationError",
    "ModalityGap",
    "PairedComparison",
    "SampledAccuracy",
    "TagAccuracies",
    "TrainingEfficiency",
    "UndefinedMetricError",
    "align_runs",
    "bootstrap_mean",
    "choose_questions",
    "clip_spread",
    "compare_runs",
    "embedding_spread",
    "evaluation_results",
    "fused_samples",
    "fusion_gain",
    "load_evaluation",
    "mcnemar_exact",
    "metric_folder",
    "modality_gap",
    "modality_gap_intervals",
    "parse_access",
    "pass_at_k",
    "pass_at_k_interval",
    "sampled_accuracy",
    "superset_scores",
    "tag_accuracies",
    "tag_disparity",
    "training_efficiency",
]
