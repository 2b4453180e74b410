r"""Maps from scores to probability vectors, $\mathbb{R}^n \to \Delta^{n-1}$ along one axis."""

from danlu.simplex._entmax import Entmax, Entmax15, entmax, entmax15
from danlu.simplex._perturb_max import Noise, PerturbMax, perturb_argmax_sample, perturb_max
from danlu.simplex._soft_topk import SoftTopK, log_esp, soft_topk
from danlu.simplex._softmax import Softmax, softmax
from danlu.simplex._sparse_softmax import SparseSoftmax, sparse_softmax
from danlu.simplex._sparsemax import Sparsemax, sparsemax
from danlu.simplex._taylor_softmax import TaylorSoftmax, taylor_softmax

__all__ = [
    "Entmax",
    "Entmax15",
    "Noise",
    "PerturbMax",
    "SoftTopK",
    "Softmax",
    "SparseSoftmax",
    "Sparsemax",
    "TaylorSoftmax",
    "entmax",
    "entmax15",
    "log_esp",
    "perturb_argmax_sample",
    "perturb_max",
    "soft_topk",
    "softmax",
    "sparse_softmax",
    "sparsemax",
    "taylor_softmax",
]
