"""Mixed precision and compilation: a training step, a report of gains and losses, and an audit of hazards."""

from danlu.precision._audit import Finding, audit_precision
from danlu.precision._compile import CompileReport
from danlu.precision._mask_value import mask_value
from danlu.precision._report import ModeReport, PrecisionReport, precision_report
from danlu.precision._train_step import StepRecord, TrainStep

__all__ = [
    "CompileReport",
    "Finding",
    "ModeReport",
    "PrecisionReport",
    "StepRecord",
    "TrainStep",
    "audit_precision",
    "mask_value",
    "precision_report",
]
