"""Pairwise estimates against dense formulas written with autograd, in chunks, near and far."""

import math

import pytest
import torch
from torch.nn import functional as F

from danlu.flows import _density_terms
from danlu.flows._density_terms import (
    Pairs,
    gaussian_entropy_and_score,
    kernel_score,
    log_density,
    median_bandwidth,
    stein_velocity,
)

F64 = torch.float64


def cloud(n=23, d=3, dtype=F64):
    return (torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(0)) + 2).to(dtype)


def uneven(n=23):
    w = torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(1)) + 0.05
    return w / w.sum()


def dense_log_density(at, x, w, h):
    """log (K * q) at any place, with the normalized kernel."""
    d = x.shape[1]
    exponent = -(at.unsqueeze(1) - x).square().sum(-1) / (2 * h**2)
    return torch.logsumexp(exponent + w.log(), -1) - d * math.log(h * math.sqrt(2 * math.pi))


@pytest.fixture(params=[True, False, None], ids=["expanded", "differences", "auto"])
def expand(request, monkeypatch):
    # Several chunks, of which the last is ragged.
    monkeypatch.setattr(_density_terms, "_CHUNK_NUMBERS", 5 * 23)
    return request.param


def test_kernel_estimate_is_the_gradient_of_its_logarithm(expand):
    x, w, h = cloud(), uneven(), 0.8
    at = x.clone().requires_grad_()
    log_q = dense_log_density(at, x, w, h)
    (score,) = torch.autograd.grad(log_q.sum(), at)
    pairs = Pairs(x, w, torch.tensor(h, dtype=F64), expand=expand)
    found_log, found = kernel_score(pairs, blob=False)
    torch.testing.assert_close(found_log, log_q.detach())
    torch.testing.assert_close(found, score)
    torch.testing.assert_close(log_density(pairs), log_q.detach())


def test_blob_is_the_gradient_of_the_mollified_entropy(expand):
    x, w, h = cloud().requires_grad_(), uneven(), 0.8
    entropy = w @ dense_log_density(x, x, w, h)
    (whole,) = torch.autograd.grad(entropy, x)
    pairs = Pairs(x.detach(), w, torch.tensor(h, dtype=F64), expand=expand)
    _, found = kernel_score(pairs, blob=True)
    torch.testing.assert_close(found, whole / w.unsqueeze(-1))


def test_stein_velocity_by_autograd(expand):
    x, w, h = cloud(), uneven(), 0.8
    drift = cloud().sin()
    expected = torch.zeros_like(x)
    for i in range(len(x)):
        y = x.clone().requires_grad_()
        kernel = torch.exp(-(x[i] - y).square().sum(-1) / (2 * h**2))
        (slope,) = torch.autograd.grad((w * kernel).sum(), y)
        expected[i] = (w * kernel.detach()) @ drift + 0.7 * slope.sum(0)
    pairs = Pairs(x, w, torch.tensor(h, dtype=F64), expand=expand)
    torch.testing.assert_close(stein_velocity(pairs, drift, 0.7), expected)


@pytest.mark.parametrize("blob", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_float32_equals_float64_also_for_distant_clusters(blob, spread):
    centers = torch.tensor([[0.0] * 3, [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])[torch.arange(60) % 3] * spread
    x = cloud(60, dtype=torch.float32) + centers
    h = torch.tensor(0.6)
    uniform = torch.full((60,), 1 / 60)
    single = kernel_score(Pairs(x, uniform, h), blob=blob)[1]
    double = kernel_score(Pairs(x.double(), uniform.double(), h.double(), expand=False), blob=blob)[1]
    # One unit in the last place of a coordinate is spread * 1.2e-7, and the score divides it by h^2.
    torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=2e-3)


def test_expansion_is_used_only_where_it_is_accurate():
    x = cloud(dtype=torch.float32)
    for h, expected in ((1.0, True), (0.1, True), (1e-3, False)):
        assert Pairs(x, torch.full((23,), 1 / 23), torch.tensor(h)).expands is expected


def test_memory_is_a_chunk_of_rows():
    n = 4000
    pairs = Pairs(cloud(n), torch.full((n,), 1 / n, dtype=F64), torch.tensor(1.0, dtype=F64))
    sizes = {tuple(kernel.shape) for _, kernel in pairs.chunks()}
    assert max(rows for rows, _ in sizes) * n <= 2**18
    assert sum(rows.stop - rows.start for rows, _ in pairs.chunks()) == n


def test_median_bandwidth():
    x = cloud(40)
    expected = F.pdist(x).median() / math.sqrt(2 * math.log(41))
    torch.testing.assert_close(median_bandwidth(x), expected)
    many = cloud(2000)
    exact = F.pdist(many).median() / math.sqrt(2 * math.log(2001))
    assert float(median_bandwidth(many)) == pytest.approx(float(exact), rel=0.05)
    for x in (torch.ones(9, 2), torch.ones(1, 2), torch.zeros(5, 0)):
        assert 0 < float(median_bandwidth(x)) < 1e-3


def test_gaussian_score_and_entropy():
    x, w = cloud(50), uneven(50)
    mean = w @ x
    cov = (x - mean).T @ ((x - mean) * w.unsqueeze(-1))
    q = torch.distributions.MultivariateNormal(mean, cov)
    negentropy, score = gaussian_entropy_and_score(x, w)
    torch.testing.assert_close(negentropy, -q.entropy())
    torch.testing.assert_close(score, -(x - mean) @ torch.linalg.inv(cov))


def test_gaussian_without_variance_in_a_direction():
    flat = cloud(50)
    flat[:, 2] = 1.7
    uniform = torch.full((50,), 0.02, dtype=F64)
    negentropy, score = gaussian_entropy_and_score(flat, uniform)
    in_plane = gaussian_entropy_and_score(flat[:, :2].contiguous(), uniform)
    torch.testing.assert_close(negentropy, in_plane[0])
    torch.testing.assert_close(score[:, :2], in_plane[1])
    assert score[:, 2].abs().max() < 1e-9
    for dtype in (torch.float32, F64):
        few = torch.tensor([[1.1, 2.3, 5.7, -1.0], [0.3, 2.2, 5.1, 0.4]], dtype=dtype)
        score = gaussian_entropy_and_score(few, torch.full((2,), 0.5, dtype=dtype))[1]
        # Along the line through both, in units of half the distance.
        half = (few[0] - few[1]) / 2
        torch.testing.assert_close(score[0], -half / half.square().sum(), rtol=1e-3, atol=1e-3)
