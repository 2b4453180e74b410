"""Optimizers: `torch.optim.Optimizer` classes, the functions behind them, parameter groups and schedules."""

from danlu.optim._amos import Amos
from danlu.optim._amos_functional import amos
from danlu.optim._amos_scales import amos_scales
from danlu.optim._amos_strategy import UpdateNormalized, amos_strategy
from danlu.optim._approximate_accumulation import FoldedAdamW, equivalent_beta
from danlu.optim._eg_sgd import EGSGD
from danlu.optim._exponentiated_gradient import ExponentiatedGradient
from danlu.optim._folded_adamw import folded_adamw
from danlu.optim._hybrid import HybridOptimizer
from danlu.optim._lion import Lion
from danlu.optim._lion_functional import lion
from danlu.optim._param_groups import parameter_groups
from danlu.optim._rounding import Rounding
from danlu.optim._schedules import inverse_square, inverse_time, piecewise_linear
from danlu.optim._step_size import EGStepSize
from danlu.optim._tie_embeddings import tie_embeddings
from danlu.optim._tiger import Tiger
from danlu.optim._tiger_functional import tiger

__all__ = [
    "EGSGD",
    "Amos",
    "EGStepSize",
    "ExponentiatedGradient",
    "FoldedAdamW",
    "HybridOptimizer",
    "Lion",
    "Rounding",
    "Tiger",
    "UpdateNormalized",
    "amos",
    "amos_scales",
    "amos_strategy",
    "equivalent_beta",
    "folded_adamw",
    "inverse_square",
    "inverse_time",
    "lion",
    "parameter_groups",
    "piecewise_linear",
    "tie_embeddings",
    "tiger",
]
