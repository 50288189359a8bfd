"""Evaluation. What asks models is in `maple_trl.evaluation.evaluator`: it loads transformers, the metrics do without."""

from maple_trl.evaluation.eval_options import EvalOptions, EvaluationError, parse_access
from maple_trl.evaluation.eval_results import evaluation_results
from maple_trl.evaluation.eval_store import EvalStore, Evaluation, load_evaluation
from maple_trl.evaluation.gaps import ModalityGap, modality_gap, modality_gap_intervals, tag_disparity
from maple_trl.evaluation.hf_metrics import metric_folder
from maple_trl.evaluation.intervals import Estimate, UndefinedMetricError, bootstrap_mean
from maple_trl.evaluation.metrics import (
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
from maple_trl.evaluation.sampled import SampledAccuracy, choose_questions, sampled_accuracy
from maple_trl.evaluation.significance import PairedComparison, align_runs, compare_runs, mcnemar_exact
from maple_trl.evaluation.spread import EmbeddingSpread, embedding_spread


__all__ = [
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
