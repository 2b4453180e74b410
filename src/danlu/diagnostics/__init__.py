"""Diagnostics, a tensor or a model to numbers to look at: scaling laws and the data sets that test them."""

from danlu.diagnostics._power_law import (
    JointFit,
    PowerLawFit,
    QuantaRelation,
    check_quanta_relation,
    fit_joint,
    fit_power_law,
)
from danlu.diagnostics._scaling_law import Emergence, QuantaModel, ScalingExponents
from danlu.diagnostics._sparse_parity import MultitaskSparseParity, TaskScores, learning_times

__all__ = [
    "Emergence",
    "JointFit",
    "MultitaskSparseParity",
    "PowerLawFit",
    "QuantaModel",
    "QuantaRelation",
    "ScalingExponents",
    "TaskScores",
    "check_quanta_relation",
    "fit_joint",
    "fit_power_law",
    "learning_times",
]
