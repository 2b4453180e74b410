"""Diagnostics: numbers to look at, from tensors, models and measured losses; never part of a loss."""

from danlu.diagnostics._attention_concentration import (
    attention_sparsity,
    linear_attention_sparsity_bound,
    sparsity_of_gaussian,
)
from danlu.diagnostics._attention_rank import AttentionRankReport, attention_rank_report
from danlu.diagnostics._attention_weights import attention_weights
from danlu.diagnostics._embedding_health import EmbeddingHealth, embedding_health
from danlu.diagnostics._gradient_penalty import GradientPenaltyBound, gradient_penalty_bound
from danlu.diagnostics._power_law import (
    JointFit,
    PowerLawFit,
    QuantaRelation,
    check_quanta_relation,
    fit_joint,
    fit_power_law,
)
from danlu.diagnostics._scaling_law import Emergence, QuantaModel, ScalingExponents
from danlu.diagnostics._span_f1 import SpanScores, span_f1
from danlu.diagnostics._sparse_parity import MultitaskSparseParity, TaskScores, learning_times

__all__ = [
    "AttentionRankReport",
    "EmbeddingHealth",
    "Emergence",
    "GradientPenaltyBound",
    "JointFit",
    "MultitaskSparseParity",
    "PowerLawFit",
    "QuantaModel",
    "QuantaRelation",
    "ScalingExponents",
    "SpanScores",
    "TaskScores",
    "attention_rank_report",
    "attention_sparsity",
    "attention_weights",
    "check_quanta_relation",
    "embedding_health",
    "fit_joint",
    "fit_power_law",
    "gradient_penalty_bound",
    "learning_times",
    "linear_attention_sparsity_bound",
    "span_f1",
    "sparsity_of_gaussian",
]
