"""Losses, (scores, targets) to a number: token losses, a linear head with any of them, and gradient penalties."""

from danlu.losses._consistency import rdrop, symmetric_kl, virtual_adversarial_loss
from danlu.losses._emo import EMO, emo_bound, emo_loss, linear_emo_loss
from danlu.losses._emo_module import EMOLoss
from danlu.losses._fenchel_young import EntmaxLoss, SparsemaxLoss, entmax_loss, sparsemax_loss
from danlu.losses._generalized_cross_entropy import GeneralizedCE, MixCE, generalized_cross_entropy, mixce_loss
from danlu.losses._global_pointer import global_pointer_loss
from danlu.losses._gradient_penalty import GradientPenalty, input_gradient_penalty, parameter_gradient_penalty
from danlu.losses._linear import LinearStats, linear_loss
from danlu.losses._linear_sparse_softmax import linear_sparse_softmax_loss
from danlu.losses._margin_softmax import MarginSoftmaxLoss, linear_margin_softmax_loss, margin_softmax_loss
from danlu.losses._multilabel import multilabel_cross_entropy
from danlu.losses._row_loss import CrossEntropy, RowFunction
from danlu.losses._sparse_softmax import SparseSoftmaxLoss, sparse_softmax_loss
from danlu.losses._subset import topk_multilabel_loss
from danlu.losses._tailr import TaiLr, TaiLrLoss, linear_tailr_loss, tailr_loss, tailr_unbias

__all__ = [
    "EMO",
    "CrossEntropy",
    "EMOLoss",
    "EntmaxLoss",
    "GeneralizedCE",
    "GradientPenalty",
    "LinearStats",
    "MarginSoftmaxLoss",
    "MixCE",
    "RowFunction",
    "SparseSoftmaxLoss",
    "SparsemaxLoss",
    "TaiLr",
    "TaiLrLoss",
    "emo_bound",
    "emo_loss",
    "entmax_loss",
    "generalized_cross_entropy",
    "global_pointer_loss",
    "input_gradient_penalty",
    "linear_emo_loss",
    "linear_loss",
    "linear_margin_softmax_loss",
    "linear_sparse_softmax_loss",
    "linear_tailr_loss",
    "margin_softmax_loss",
    "mixce_loss",
    "multilabel_cross_entropy",
    "parameter_gradient_penalty",
    "rdrop",
    "sparse_softmax_loss",
    "sparsemax_loss",
    "symmetric_kl",
    "tailr_loss",
    "tailr_unbias",
    "topk_multilabel_loss",
    "virtual_adversarial_loss",
]
