"""Associative recall: read one value out of many pairs, by attention with one of several kernels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.diagnostics import attention_sparsity
from danlu.lab.errors import TrialError
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar

__all__ = ["AssociativeRecall", "check_kernel", "recall_weights"]

_KEYS = 512
_VALUES = 32


# Scores to weights that need not sum to 1; softmax is apart, since it is shifted before it is an exponential.
_KERNELS: Mapping[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "softmax": None,
    "elu1": lambda query, key: (F.elu(query) + 1) @ (F.elu(key) + 1).transpose(-2, -1),
    "relu2": lambda query, key: F.relu(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).square(),
}


class _Recall(nn.Module):
    """One attention layer with one head: a pair is one token, the query a key."""

    def __init__(self, kernel: str, width: int, head_dim: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.keys = nn.Embedding(_KEYS, width)
        self.values = nn.Embedding(_VALUES, width)
        # With biases, so that scores can have a negative mean, which relu needs to be sparse.
        self.query = nn.Linear(width, head_dim)
        self.key = nn.Linear(width, head_dim)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, _VALUES)

    def weights_and_logits(self, pairs: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Attention weights `(n, 1, pairs)` and logits `(n, values)` of pairs `(n, pairs, 2)` and keys `(n,)`."""
        query = self.query(self.keys(asked))[:, None]
        weights = recall_weights(self.kernel, query, self.key(self.keys(pairs[..., 0])))
        read = weights @ self.value(self.values(pairs[..., 1]))
        return weights, self.out(read[:, 0])


def check_kernel(kernel: str) -> None:
    """Raise unless there is a kernel of that name."""
    if kernel not in _KERNELS:
        raise TrialError(f"unknown kernel {kernel!r}; known: {', '.join(_KERNELS)}")


def recall_weights(kernel: str, query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention weights `(..., m, n)` of queries `(..., m, d)` and keys `(..., n, d)` by the kernel of that name.

    Rows sum to 1; a row without a positive weight reads nothing. `visible` says which weights are not 0.
    """
    check_kernel(kernel)
    weigh = _KERNELS[kernel]
    if weigh is None:
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        return (scores if visible is None else scores.masked_fill(~visible, -math.inf)).softmax(-1)
    weights = weigh(query, key)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


@dataclass(frozen=True)
class AssociativeRecall:
    """Pairs of distinct keys (of 512) and values (of 32), and one of the keys: which value was with it?

    A training batch has 4, 8, ... or `pairs` pairs a sample, drawn anew for every batch. Kernels: "softmax", "elu1"
    (linear attention with elu + 1) and "relu2" (the square of relu), each with rows that sum to 1.

    Metrics, for each number of pairs p: `accuracy@p` (chance is 1/32), `n_eff@p`, the median number of pairs that a
    query reads, and `zero@p`, the share of weights that are exactly 0; `accuracy`, the mean over p.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "associative recall"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "kernel": "softmax",
            "pairs": 128,
            "width": 64,
            "head_dim": 16,
            "batch_size": 128,
            "device": "cpu",
        }
        return {**OPTIMIZER_OPTIONS, **own}

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"samples": 2048}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        return {"name": "random pairs", "sha256": "generated", "license": "none needed", "split": "fresh samples"}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device = training_device(options)
        kernel = str(options["kernel"])
        check_kernel(kernel)
        torch.manual_seed(seed)
        model = _Recall(kernel, int(options["width"]), int(options["head_dim"]))
        model.to(device)
        optimizer = make_optimizer(model, options)
        sizes, batch_size = _sizes(options), int(options["batch_size"])

        def loss(step: int) -> Tensor:
            draw = generator("batch", seed, step)
            count = sizes[int(torch.randint(len(sizes), (), generator=draw))]
            pairs, asked, answer = (x.to(device) for x in _draw(batch_size, count, draw))
            return F.cross_entropy(model.weights_and_logits(pairs, asked)[1], answer)

        return GradientFit(
            model,
            optimizer,
            loss=loss,
            schedule=lambda step: set_learning_rate(optimizer, options, step, steps),
        )

    @torch.no_grad()
    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on fresh samples, the same for every arm and seed."""
        model = fit.model
        if not isinstance(model, _Recall):
            raise TypeError(f"the fit is not one of this task: {type(model).__name__}")
        metrics: dict[str, float] = {}
        sizes = _sizes(options)
        for count in sizes:
            draw = generator(split, count)
            pairs, asked, answer = (x.to(training_device(options)) for x in _draw(int(options["samples"]), count, draw))
            weights, logits = model.weights_and_logits(pairs, asked)
            metrics[f"accuracy@{count}"] = float((logits.argmax(-1) == answer).double().mean())
            metrics[f"n_eff@{count}"] = float(attention_sparsity(weights, kind="n_eff").nanmedian())
            metrics[f"zero@{count}"] = float((weights == 0).double().mean())
        metrics["accuracy"] = sum(metrics[f"accuracy@{count}"] for count in sizes) / len(sizes)
        return metrics


def _sizes(options: Options) -> list[int]:
    """Numbers of pairs: powers of 2 from 4 on."""
    most = int(options["pairs"])
    if most < 4 or most > _KEYS or most & (most - 1):
        raise TrialError(f"pairs must be a power of 2 from 4 to {_KEYS}, got {most}")
    return [2**i for i in range(2, most.bit_length())]


def _draw(samples: int, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs `(samples, count, 2)` with distinct keys, the key that is asked for, and its value."""
    keys = torch.rand(samples, _KEYS, generator=draw).topk(count).indices
    values = torch.randint(_VALUES, (samples, count), generator=draw)
    place = torch.randint(count, (samples, 1), generator=draw)
    return torch.stack((keys, values), -1), keys.gather(1, place)[:, 0], values.gather(1, place)[:, 0]
