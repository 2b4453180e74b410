"""What is true of sparsemax alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.simplex import sparsemax


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_golden_values(impl):
    x = torch.tensor([0.5, 1.0, 1.4, -0.3], dtype=torch.float64)
    torch.testing.assert_close(sparsemax(x, impl=impl), torch.tensor([0.0, 0.3, 0.7, 0.0], dtype=torch.float64))


@given(n=st.integers(1, 30), seed=st.integers(0, 2**16))
def test_is_the_projection(n, seed):
    """No point of the simplex is nearer: the optimality of the projection, for its vertices."""
    x = draw(n, seed=seed)
    p = sparsemax(x)
    vertices = torch.eye(n, dtype=x.dtype)
    assert ((vertices - p) @ (x - p) <= 1e-12).all()
    torch.testing.assert_close(sparsemax(p), p, rtol=0, atol=1e-15)


@given(n=st.integers(2, 20), seed=st.integers(0, 2**16))
def test_jacobian_is_that_of_the_support(n, seed):
    x = draw(n, seed=seed)
    s = (sparsemax(x) > 0).double()
    expected = s.diag() - s.outer(s) / s.sum()
    torch.testing.assert_close(torch.func.jacrev(sparsemax)(x), expected, rtol=0, atol=1e-14)


def test_is_piecewise_linear():
    x = draw(4, 6).requires_grad_()
    v = draw(4, 6, seed=1).requires_grad_()
    (first,) = torch.autograd.grad((sparsemax(x) * v).sum(), x, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (x, v))
    assert (second[0] == 0).all()
    assert (second[1] != 0).any()


def test_ties_at_the_threshold():
    x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(sparsemax(x), x)
    assert torch.equal(sparsemax(torch.zeros(2, 4)), torch.full((2, 4), 0.25))
