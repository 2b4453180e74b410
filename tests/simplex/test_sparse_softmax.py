"""What is true of sparse softmax alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.simplex import SparseSoftmax, softmax, sparse_softmax

X = torch.tensor([0.5, 1.0, 1.4, -0.3], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden_values():
    golden = torch.tensor([0.0, 0.40131234, 0.59868766, 0.0], dtype=torch.float64)
    torch.testing.assert_close(sparse_softmax(X, k=2), golden, rtol=0, atol=5e-9)
    assert torch.equal(sparse_softmax(X, k=4), softmax(X))
    assert torch.equal(sparse_softmax(X, p=1.0), softmax(X))
    assert torch.equal(sparse_softmax(X, k=1), torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))


@given(n=st.integers(1, 20), k=st.integers(1, 20), seed=st.integers(0, 2**16))
def test_top_k_against_a_loop(n, k, seed):
    x, k = draw(n, seed=seed), min(n, k)
    kept = sorted(range(n), key=lambda i: -x[i])[:k]
    expected = torch.zeros_like(x)
    expected[kept] = torch.softmax(x[kept], 0)
    torch.testing.assert_close(sparse_softmax(x, k=k), expected)


@given(n=st.integers(1, 20), p=st.floats(0.01, 0.99), seed=st.integers(0, 2**16))
def test_nucleus_against_a_loop(n, p, seed):
    x = draw(n, seed=seed)
    mass, kept = 0.0, []
    for i in sorted(range(n), key=lambda i: -x[i]):
        kept.append(i)
        mass += float(torch.softmax(x, 0)[i])
        if mass >= p:
            break
    expected = torch.zeros_like(x)
    expected[kept] = torch.softmax(x[kept], 0)
    torch.testing.assert_close(sparse_softmax(x, p=p), expected)


def test_ties_are_kept_together():
    x = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert (sparse_softmax(x, k=2) > 0).tolist() == [True, True, True, False]
    assert (sparse_softmax(x, p=0.7) > 0).tolist() == [True, True, True, False]


def test_no_gradient_outside():
    x = draw(3, 8).requires_grad_()
    p = sparse_softmax(x, k=3)
    (p * draw(3, 8, seed=1)).sum().backward()
    assert ((x.grad == 0) == (p == 0)).all()


def test_masks():
    x = torch.tensor([[0.0, -torch.inf, -torch.inf], [-torch.inf] * 3])
    for options in ({"k": 2}, {"p": 0.9}):
        expected = torch.tensor([[1.0, 0.0, 0.0], [0.0] * 3])
        assert torch.equal(sparse_softmax(x, **options), expected)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({}, ValueError, "exactly one of k and p, got k=None and p=None"),
        ({"k": 2, "p": 0.5}, ValueError, "exactly one of k and p"),
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 2.0}, TypeError, "k must be an int"),
        ({"p": 0.0}, ValueError, r"p must be in \(0, 1\]"),
        ({"p": 1.5}, ValueError, r"p must be in \(0, 1\]"),
    ],
)
def test_errors(kwargs, error, match):
    with pytest.raises(error, match=match):
        sparse_softmax(X, **kwargs)
    with pytest.raises(error, match=match):
        SparseSoftmax(**kwargs)


def test_more_than_there_are():
    with pytest.raises(ValueError, match="k must be at most the length of the axis, got 5 for 4"):
        sparse_softmax(X, k=5)
