"""Losses, (scores, targets) to a number: token losses, a linear head with any of them, and gradient penalties."""

from danlu.losses._gradient_penalty import GradientPenalty, input_gradient_penalty, parameter_gradient_penalty
from danlu.losses._linear import CrossEntropy, linear_loss
from danlu.losses._subset import topk_multilabel_loss
from danlu.losses._tailr import TaiLr, TaiLrLoss, linear_tailr_loss, tailr_loss, tailr_unbias

__all__ = [
    "CrossEntropy",
    "GradientPenalty",
    "TaiLr",
    "TaiLrLoss",
    "input_gradient_penalty",
    "linear_loss",
    "linear_tailr_loss",
    "parameter_gradient_penalty",
    "tailr_loss",
    "tailr_unbias",
    "topk_multilabel_loss",
]
