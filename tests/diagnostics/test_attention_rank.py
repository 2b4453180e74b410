"""Rank of attention: matrices with known singular values, the determinant of causal attention, linear attention."""

import math

import pytest
import torch
from torch.nn import functional as F

from danlu.diagnostics import attention_rank_report


def orthogonal(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def test_known_singular_values():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0, 1e-3, 1e-9], dtype=torch.float64)
    found = attention_rank_report(orthogonal(6) @ values.diag() @ orthogonal(6))
    assert found.rank == 5
    share = values / values.sum()
    assert found.effective_rank.item() == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-9)
    assert found.stable_rank.item() == pytest.approx((values**2).sum().item() / 16, rel=1e-12)
    assert found.condition.item() == pytest.approx(4e9, rel=1e-4)
    assert found.log_det.item() == pytest.approx(values.log().sum().item(), rel=1e-6)
    assert attention_rank_report(orthogonal(6) @ values.diag() @ orthogonal(6), tol=1e-2).rank == 4


def test_uniform_and_identity():
    uniform = attention_rank_report(torch.full((8, 8), 1 / 8))
    assert uniform.rank == 1
    assert uniform.effective_rank.item() == pytest.approx(1)
    assert uniform.stable_rank.item() == pytest.approx(1)
    identity = attention_rank_report(torch.eye(8))
    assert (identity.rank, identity.log_det, identity.condition) == (8, 0, 1)
    assert identity.effective_rank.item() == pytest.approx(8)
    zero = attention_rank_report(torch.zeros(3, 3))
    assert zero.rank == 0
    assert zero.log_det == -math.inf


def softmax(n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional and causal attention of Gaussian queries and keys, and the scores' logarithm of the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    scores = query @ key.T * d**-0.5
    hidden = torch.ones(n, n).triu(1).bool()
    return scores.softmax(-1), scores.masked_fill(hidden, -math.inf).softmax(-1)


def test_the_determinant_of_causal_attention_is_the_product_of_its_diagonal():
    for seed in range(5):
        causal = softmax(32, 8, seed)[1]
        found = attention_rank_report(causal).log_det.item()
        assert found == pytest.approx(torch.linalg.slogdet(causal).logabsdet.item(), abs=1e-8)
        assert found == pytest.approx(causal.diagonal().log().sum().item(), abs=1e-8)


@pytest.mark.parametrize("d", [8, 32, 64])
def test_full_rank_does_not_tell_softmax_attention_apart(d):
    """Of 256 slots the bidirectional one is full (at 1e-10), and the causal one is not at any tolerance of float64."""
    bidirectional, causal = (attention_rank_report(a, tol=1e-10) for a in softmax(256, d, 0))
    assert bidirectional.rank == 256
    assert bidirectional.condition < 1e7
    assert 239 <= causal.rank <= 251
    assert causal.condition > 1e18
    assert causal.log_det.isfinite()


@pytest.mark.parametrize("d", [8, 32, 64])
def test_it_does_tell_linear_attention_apart(d):
    generator = torch.Generator().manual_seed(0)
    query, key = (F.elu(x) + 1 for x in torch.randn(2, 256, d, generator=generator, dtype=torch.float64))
    weights = query @ key.T
    assert attention_rank_report(weights / weights.sum(-1, keepdim=True)).rank == d
    causal = weights.tril()
    assert attention_rank_report(causal / causal.sum(-1, keepdim=True)).rank == 256


def test_batches_dtypes_and_bad_weights():
    weights = torch.rand(2, 3, 9, 9).softmax(-1)
    found = attention_rank_report(weights)
    for i in range(2):
        for j in range(3):
            one = attention_rank_report(weights[i, j])
            for name, value in vars(one).items():
                torch.testing.assert_close(getattr(found, name)[i, j], value)
    assert found.effective_rank.dtype == torch.float64
    half = attention_rank_report(weights.bfloat16())
    torch.testing.assert_close(half.effective_rank, found.effective_rank, rtol=0.05, atol=0)
    weights[0, 0, 4, 4] = math.nan
    bad = attention_rank_report(weights)
    assert bad.rank[0, 0] == 0
    assert bad.effective_rank.isnan().sum() == 1
    torch.testing.assert_close(bad.effective_rank[1], found.effective_rank[1])


def test_a_sample_is_a_principal_submatrix():
    causal = softmax(50, 8, 0)[1]
    found = attention_rank_report(causal, sample=20)
    assert found.rank <= 20
    # Still triangular: slots keep their order.
    assert found.log_det > attention_rank_report(causal).log_det
    assert attention_rank_report(causal, sample=50) == attention_rank_report(causal, sample=80)
    with pytest.raises(ValueError, match="more than 4096 slots need sample, got 4097"):
        attention_rank_report(torch.zeros(1, 1).expand(4097, 4097))
    assert attention_rank_report(torch.ones(1, 1).expand(4097, 4097), sample=4).rank == 1


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: attention_rank_report(torch.ones(3)), ValueError, r"weights must have shape \(\.\.\., n, n\)"),
        (lambda: attention_rank_report(torch.ones(3, 4)), ValueError, r"got \(3, 4\)"),
        (lambda: attention_rank_report(torch.ones(0, 0)), ValueError, r"got \(0, 0\)"),
        (lambda: attention_rank_report(torch.ones(3, 3).long()), TypeError, "weights must be a floating-point"),
        (
            lambda: attention_rank_report(torch.eye(3), tol=1e-7),
            ValueError,
            "at least 1e-06 for torch.float32",
        ),
        (lambda: attention_rank_report(torch.eye(3), tol=0), ValueError, "tol must be in"),
        (lambda: attention_rank_report(torch.eye(3), sample=0), ValueError, "sample must be at least 1"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_no_graph():
    weights = torch.eye(3, requires_grad=True)
    assert not any(value.requires_grad for value in vars(attention_rank_report(weights)).values())
