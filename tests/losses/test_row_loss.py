"""Functions of the negative log-likelihood as row losses."""

import pytest
import torch

from danlu.losses import EMO, CrossEntropy, RowFunction, TaiLr, linear_loss
from danlu.losses._row_loss import is_row_loss, is_transport_loss


def test_protocols():
    assert is_row_loss(CrossEntropy())
    assert is_row_loss(RowFunction(torch.square))
    assert not is_transport_loss(CrossEntropy())
    assert is_transport_loss(EMO(cost_embedding="head"))
    assert not is_row_loss(torch.square)


def test_derivative_by_autograd_or_as_given():
    nll = torch.tensor([0.5, 2.0], dtype=torch.float64)
    value, slope = RowFunction(torch.square).value_and_derivative(nll)
    assert value.tolist() == [0.25, 4.0]
    assert slope.tolist() == [1.0, 4.0]
    with torch.no_grad():
        value, slope = RowFunction(lambda x: (x.square(), 3 * x)).value_and_derivative(nll)
    assert slope.tolist() == [1.5, 6.0]
    assert not value.requires_grad
    constant = RowFunction(torch.ones_like).value_and_derivative(nll)
    assert constant[1].tolist() == [0.0, 0.0]


def test_a_detached_weight_is_the_pair_of_value_and_weight():
    """The paper's form of TaiLr, written as its value and its weight."""
    hidden, head = torch.randn(6, 3, requires_grad=True), torch.randn(5, 3)
    target = torch.randint(5, (6,))

    def paper(nll):
        p = torch.exp(-nll)
        weight = p / (0.3 + 0.7 * p)
        return weight * nll, weight

    value = linear_loss(hidden, head, target, RowFunction(paper))
    expected = linear_loss(hidden, head, target, TaiLr(0.3, value="weighted"))
    torch.testing.assert_close(value, expected)
    for mine, theirs in zip(torch.autograd.grad(value, hidden), torch.autograd.grad(expected, hidden), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bad_functions():
    hidden, head, target = torch.randn(6, 3), torch.randn(5, 3), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(TypeError, match="function must be callable, got int"):
        RowFunction(3)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        RowFunction(torch.square, label_smoothing=-1.0)
    with pytest.raises(ValueError, match=r"one value per row, shape \([46],\), got \(\)"):
        linear_loss(hidden, head, target, RowFunction(torch.sum))
    with pytest.raises(ValueError, match=r"one value per row, .* got float"):
        linear_loss(hidden, head, target, RowFunction(lambda nll: (nll, 1.0)))
