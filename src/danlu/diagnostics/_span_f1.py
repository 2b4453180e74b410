"""Precision, recall and F1 of spans that must be found exactly.

Shape letters: `S` spans.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SpanScores", "span_f1"]


@dataclass(frozen=True)
class SpanScores:
    r"""Counts of spans, and the rates that follow from them.

    Definition:
        With $c$ = `correct`, $p$ = `predicted` and $t$ = `target`, `precision` is $c/p$, `recall` is $c/t$ and `f1`
        is $2c/(p + t)$; each is 1 where its denominator is 0.

    Args:
        correct: spans that were predicted and are there.
        predicted: spans that were predicted.
        target: spans that are there.

    Numerics:
        Integers; scores of several batches are added as counts with `+`, never averaged as rates.

    Source:
        Standard definitions.

    Example:
        >>> from danlu.diagnostics import SpanScores
        >>> (SpanScores(1, 2, 1) + SpanScores(0, 0, 1)).f1
        0.5
    """

    correct: int
    predicted: int
    target: int

    @property
    def precision(self) -> float:
        """Share of the predicted spans that are there."""
        return self.correct / self.predicted if self.predicted else 1.0

    @property
    def recall(self) -> float:
        """Share of the spans that were found."""
        return self.correct / self.target if self.target else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        total = self.predicted + self.target
        return 2 * self.correct / total if total else 1.0

    def __add__(self, other: "SpanScores") -> "SpanScores":
        return SpanScores(self.correct + other.correct, self.predicted + other.predicted, self.target + other.target)


def span_f1(predicted: Tensor, target: Tensor) -> SpanScores:
    r"""Exact matches of predicted and true spans.

    Definition:
        A span is correct if the same row (sample, type, first, last) is in both sets; $F_1 = 2c/(p+t)$ over all
        samples and types (micro average).

    Args:
        predicted: int64, shape `(S, 4)`, as from [`decode_spans`][danlu.attention.decode_spans].
        target: the same, of another length.

    Returns:
        [`SpanScores`][danlu.diagnostics.SpanScores]; rows that occur twice, and rows of -1, do not count.

    Raises:
        TypeError: a tensor is not int64.
        ValueError: a tensor has another shape.

    Numerics:
        Sets of integers.

    Source:
        Standard definitions; the metric of arXiv 2208.03054.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import span_f1
        >>> span_f1(torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2]]), torch.tensor([[0, 0, 1, 2]]))
        SpanScores(correct=1, predicted=2, target=1)
    """
    sets = []
    for name, spans in (("predicted", predicted), ("target", target)):
        if not isinstance(spans, Tensor) or spans.dtype != torch.int64:
            kind = spans.dtype if isinstance(spans, Tensor) else type(spans).__name__
            raise TypeError(f"{name} must be an int64 tensor, got {kind}")
        if spans.ndim != 2 or spans.shape[1] != 4:
            raise ValueError(f"{name} must have shape (S, 4), got {tuple(spans.shape)}")
        sets.append({tuple(row) for row in spans.tolist() if row[0] >= 0})
    return SpanScores(len(sets[0] & sets[1]), len(sets[0]), len(sets[1]))
