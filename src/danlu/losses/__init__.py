"""Losses, (scores, targets) to a number: token losses, and a linear head with any of them without its logits."""

from danlu.losses._linear import CrossEntropy, linear_loss
from danlu.losses._tailr import TaiLr, TaiLrLoss, linear_tailr_loss, tailr_loss, tailr_unbias

__all__ = ["CrossEntropy", "TaiLr", "TaiLrLoss", "linear_loss", "linear_tailr_loss", "tailr_loss", "tailr_unbias"]
