"""Exact matches of spans: known counts, empty sets, repetitions, batches."""

import pytest
import torch

from danlu.diagnostics import SpanScores, span_f1


def test_known_counts():
    predicted = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2], [1, 0, 0, 0], [0, 0, 1, 2], [-1, -1, -1, -1]])
    target = torch.tensor([[0, 0, 1, 2], [1, 0, 0, 0], [1, 1, 0, 0], [1, 2, 0, 0], [-1, -1, -1, -1]])
    found = span_f1(predicted, target)
    assert found == SpanScores(correct=2, predicted=3, target=4)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == 0.5
    assert found.f1 == pytest.approx(4 / 7)
    assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))


def test_empty_sets():
    none, one = torch.zeros(0, 4).long(), torch.tensor([[0, 0, 0, 0]])
    assert span_f1(none, none).f1 == 1
    missed = span_f1(none, one)
    assert (missed.precision, missed.recall, missed.f1) == (1, 0, 0)
    invented = span_f1(one, none)
    assert (invented.precision, invented.recall, invented.f1) == (0, 1, 0)


def test_batches_are_added_as_counts():
    total = SpanScores(1, 1, 1) + SpanScores(0, 3, 1)
    assert total == SpanScores(1, 4, 2)
    assert total.f1 == pytest.approx(1 / 3)  # and not the mean of 1 and 0


@pytest.mark.parametrize(
    ("predicted", "error", "match"),
    [
        ([[0, 0, 0, 0]], TypeError, "predicted must be an int64 tensor, got list"),
        (torch.zeros(1, 4), TypeError, "got torch.float32"),
        (torch.zeros(4).long(), ValueError, r"predicted must have shape \(S, 4\)"),
        (torch.zeros(1, 3).long(), ValueError, "predicted must have shape"),
    ],
)
def test_bad_input(predicted, error, match):
    with pytest.raises(error, match=match):
        span_f1(predicted, torch.zeros(1, 4).long())
