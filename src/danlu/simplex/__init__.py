r"""Maps from scores to probability vectors, $\mathbb{R}^n \to \Delta^{n-1}$ along one axis."""

from danlu.simplex._softmax import Softmax, softmax

__all__ = ["Softmax", "softmax"]
