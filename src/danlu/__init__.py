"""danlu: training methods for PyTorch, each with a reference, tests and a trial on real data.

Families are imported by name: `from danlu.optim import Tiger`, `from danlu.losses import tailr_loss`.
"""

__all__ = ["__version__"]

__version__ = "0.1.0.dev0"
