"""Smooth top-k: golden numbers, brute force, symmetries, limits, thresholds, gradients, masks, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu import kernels
from danlu.kernels.soft_topk import hard_topk_cpu, soft_topk_cpu, soft_topk_vjp_cpu
from danlu.simplex import SoftTopK, log_esp, soft_topk, softmax, sparsemax
from danlu.simplex._topk_rows import _indicator, _reference, _value, _vjp

THRESHOLDS = ["exp", "laplace", "sigmoid", "clip"]
MAPS = [*THRESHOLDS, "grad"]
methods = pytest.mark.parametrize("method", MAPS)
thresholds = pytest.mark.parametrize("method", THRESHOLDS)


def scores(*shape, scale=1.0, seed=0, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def brute_force(x, k):
    """Inclusion probabilities and the logarithm of the sum over subsets."""
    sets = list(itertools.combinations(range(len(x)), k))
    weights = torch.stack([x[list(one)].sum() for one in sets]).softmax(0)
    p = torch.zeros_like(x)
    for one, weight in zip(sets, weights, strict=True):
        p[list(one)] += weight
    return p, torch.stack([x[list(one)].sum() for one in sets]).logsumexp(0)


GOLDEN = {
    "exp": [0.66524096, 0.24472847, 0.09003057, 1.0],
    "laplace": [0.69673467, 0.30326533, 0.11156508, 0.88843492],
    "sigmoid": [0.62245933, 0.37754067, 0.18242552, 0.81757448],
    "clip": [1.0, 0.0, 0.0, 1.0],
    "grad": [0.6944133, 0.3055867, 0.11920292, 0.88079708],
    "iter": [0.65504219, 0.31358521, 0.12294663, 0.90842596],
}


@pytest.mark.filterwarnings("ignore:the values of method='iter'")
@pytest.mark.parametrize("method", GOLDEN)
def test_golden_numbers(method):
    x = torch.tensor([3.0, 2.0, 1.0, 4.0], dtype=torch.float64)
    wanted = torch.tensor(GOLDEN[method], dtype=torch.float64)
    torch.testing.assert_close(soft_topk(x, 2, method=method), wanted, rtol=0, atol=5e-9)
    assert soft_topk(x, 2, return_threshold=True)[1].item() == pytest.approx(2.5, abs=1e-14)
    if method in ("laplace", "grad"):
        wanted = torch.tensor([0.79644992, 0.72523613, 0.62910757, 0.84920639], dtype=torch.float64)
        torch.testing.assert_close(soft_topk(0.3 * x, 3, method=method), wanted, rtol=0, atol=5e-9)


@pytest.mark.parametrize(("n", "k", "scale"), [(4, 2, 1), (7, 3, 3), (9, 8, 2), (12, 6, 5), (12, 1, 1)])
def test_subsets_by_brute_force(n, k, scale):
    x = scores(n, scale=scale, seed=n)
    p, total = brute_force(x, k)
    torch.testing.assert_close(soft_topk(x, k, method="grad"), p, rtol=0, atol=5e-15)
    torch.testing.assert_close(log_esp(x, k), total, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(soft_topk(x.float(), k, method="grad").double(), p, rtol=0, atol=3e-7)


def dynamic_program(x, k):
    """Inclusion probabilities from products of polynomials without each entry, with a common scale taken out."""
    e = (x - x.mean()).exp()
    whole = [torch.zeros(k + 1, dtype=torch.float64)]
    whole[0][0] = 1
    forward = [whole[0]]
    for value in e:
        new = forward[-1].clone()
        new[1:] += value * forward[-1][:-1]
        forward.append(new)
    backward = [forward[0]]
    for value in e.flip(0):
        new = backward[-1].clone()
        new[1:] += value * backward[-1][:-1]
        backward.append(new)
    total = forward[-1][k]
    return torch.stack(
        [e[i] * (forward[i][:k] * backward[len(e) - 1 - i][:k].flip(0)).sum() / total for i in range(len(e))]
    )


@pytest.mark.parametrize(("n", "k", "scale"), [(100, 10, 3), (200, 50, 1)])
def test_subsets_by_dynamic_programming(n, k, scale):
    x = scores(n, scale=scale)
    torch.testing.assert_close(soft_topk(x, k, method="grad"), dynamic_program(x, k), rtol=0, atol=1e-13)


def in_long_double(x, k):
    """The same in 80 bits, with a scale of each polynomial, and the logarithm of the sum."""
    wide = np.longdouble
    center = wide(x.double().mean().item())
    e = np.exp(x.double().numpy().astype(wide) - center)

    def products(e):
        rows, logs = np.zeros((len(e) + 1, k + 1), wide), np.zeros(len(e) + 1, wide)
        rows[0, 0] = 1
        for i, value in enumerate(e):
            rows[i + 1] = rows[i]
            rows[i + 1, 1:] += value * rows[i, :-1]
            logs[i + 1] = logs[i] + np.log(rows[i + 1].max())
            rows[i + 1] /= rows[i + 1].max()
        return rows, logs

    n, (forward, before), (backward, after) = len(e), products(e), products(e[::-1])
    total = np.log(forward[n, k]) + before[n]
    p = [
        e[i] * (forward[i, :k] * backward[n - 1 - i, :k][::-1]).sum() * np.exp(before[i] + after[n - 1 - i] - total)
        for i in range(n)
    ]
    return np.array(p), total + k * center


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="no wider numbers here")
@pytest.mark.parametrize(("n", "k", "scale"), [(100, 10, 3), (1000, 50, 3), (1000, 500, 5), (300, 290, 5)])
def test_subsets_to_the_last_digits(n, k, scale):
    x = scores(n, scale=scale)
    p, total = in_long_double(x, k)
    assert abs(soft_topk(x, k, method="grad").numpy().astype(np.longdouble) - p).max() <= 2e-15
    assert abs(log_esp(x, k).item() - total) <= 1e-15 * x.abs().sum().item()
    p, _ = in_long_double(x.float(), k)
    assert abs(soft_topk(x.float(), k, method="grad").numpy().astype(np.longdouble) - p).max() <= 2e-7


@methods
@given(n=st.integers(2, 12), seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 1.0, 10.0]), data=st.data())
def test_what_every_map_promises(method, n, seed, scale, data):
    k = data.draw(st.integers(1, n))
    x = scores(n, scale=scale, seed=seed)
    p = soft_topk(x, k, method=method)
    assert ((p >= 0) & (p <= 1)).all()
    assert p.sum().item() == pytest.approx(k, abs=1e-11)
    assert (p[x.argsort()].diff() >= -1e-14).all()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(soft_topk(x[order], k, method=method), p[order], rtol=0, atol=1e-11)
    torch.testing.assert_close(soft_topk(x + 7, k, method=method), p, rtol=0, atol=1e-10)
    if method != "exp":
        torch.testing.assert_close(1 - soft_topk(-x, n - k, method=method), p, rtol=0, atol=1e-11)


@methods
def test_tends_to_the_indicator(method):
    x = torch.tensor([0.3, 0.1, 0.7, 0.5, 0.2], dtype=torch.float64)
    hard = torch.tensor([0.0, 0, 1, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(soft_topk(x, 2, method=method, temperature=1e-3), hard, rtol=0, atol=1e-10)


def test_relations_for_one_and_for_all_but_one():
    x = scores(50, 9)
    torch.testing.assert_close(soft_topk(x, 1, method="exp"), softmax(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(soft_topk(x, 1, method="grad"), softmax(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(soft_topk(x, 1, method="clip"), sparsemax(x), rtol=1e-12, atol=1e-12)
    flat = softmax(x).amax(-1) <= 0.5
    same = (soft_topk(x, 1) - softmax(x)).abs().amax(-1) < 1e-12
    assert torch.equal(same, flat)
    assert 0 < flat.sum() < len(flat)
    mild = 0.1 * x
    torch.testing.assert_close(soft_topk(mild, 8), 1 - softmax(-mild), rtol=1e-12, atol=1e-12)


@thresholds
@pytest.mark.parametrize(("n", "k"), [(16, 2), (16, 8), (16, 15), (128, 100), (200, 190)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1000.0])
def test_no_bad_rows_at_any_scale(method, n, k, scale):
    x = scores(200, n, scale=scale, dtype=torch.float32)
    p = soft_topk(x, k, method=method)
    exact, _ = _reference(x, torch.tensor([[float(k)]]), method)
    assert (p.double().sum(-1) - k).abs().max() <= 1e-5 * k
    # A sum of k ones in float32 is known to about k times 1e-7.
    assert (p.double() - exact).abs().max() <= 1e-6 + 1e-7 * k
    assert (exact.sum(-1) - k).abs().max() <= 1e-9


# ------------------------------------------------------------------------------- what the article's formulas do


def test_correction_of_the_laplace_form():
    """With thresholds only down to the least score, and a difference of large numbers, rows are wrong."""

    def article(x, k):
        s = x.sort(descending=True).values
        shift = torch.full_like(s[..., :1], math.nan)
        for m in range(s.shape[-1]):
            a, b = (-s[..., :m]).exp().sum(-1, keepdim=True), s[..., m:].exp().sum(-1, keepdim=True)
            found = b.log() - (((k - m) ** 2 + a * b).sqrt() + (k - m)).log()
            fits = (found >= s[..., m : m + 1]) & (found <= s[..., m - 1 : m] if m else torch.tensor(True))
            shift = torch.where(fits & shift.isnan(), found, shift)
        return _value(x - shift, "laplace")

    for n, k, scale, least in ((16, 15, 0.1, 1.0), (16, 15, 1.0, 0.9), (128, 100, 0.1, 1.0)):
        for dtype in (torch.float32, torch.float64):
            x = scores(100, n, scale=scale, dtype=dtype)
            assert article(x, k).isnan().any(-1).double().mean() >= least
            assert (soft_topk(x, k).sum(-1) - k).abs().max() <= 1e-5 * k
    x = scores(100, 16, dtype=torch.float64)
    torch.testing.assert_close(article(x, 4), soft_topk(x, 4), rtol=0, atol=1e-13)

    x = torch.tensor([0.0, 0.1, 0.2, -20.0, -20.5])
    above, below, k, m = x[:3], x[3:], 2, 3
    a, b = (-above).exp().sum(), below.exp().sum()
    canceled = b.log() - (((k - m) ** 2 + a * b).sqrt() + (k - m)).log()
    assert (_value(x - canceled, "laplace").sum() - 2).abs() > 0.5
    wanted = torch.tensor([0.63283, 0.66778, 0.69939, 1.4e-9, 8.5e-10])
    torch.testing.assert_close(soft_topk(x, 2), wanted, rtol=0, atol=6e-6)
    torch.testing.assert_close(soft_topk(x, 2)[3:], wanted[3:], rtol=0.03, atol=0)


def test_correction_of_the_relation_to_softmax():
    x = torch.tensor([0.0, math.log(0.25)], dtype=torch.float64)
    torch.testing.assert_close(softmax(x), torch.tensor([0.8, 0.2], dtype=torch.float64))
    torch.testing.assert_close(soft_topk(x, 1), torch.tensor([0.75, 0.25], dtype=torch.float64))
    x = torch.stack((torch.zeros(4000), torch.linspace(-8, 0, 4000)), -1).double()
    assert (soft_topk(x, 1) - softmax(x)).abs().max().item() == pytest.approx(0.067, abs=5e-4)


def test_correction_of_the_recursion_for_subsets():
    def article(x, k):
        log_z, log_zi = torch.zeros_like(x[..., :1]), torch.full_like(x, -math.inf)
        for i in range(k):
            log_zi = x + (log_z.exp() - log_zi.exp()).log() if i else x
            log_z = log_zi.logsumexp(-1, keepdim=True) - math.log(i + 1)
        return (log_zi - log_z).exp()

    for n, k, scale, share in ((100, 10, 3.0, 0.4), (32, 16, 1.0, 0.25), (1000, 50, 3.0, 1.0)):
        x = scores(200, n, scale=scale, dtype=torch.float32)
        assert article(x, k).isnan().any(-1).double().mean().item() == pytest.approx(share, abs=0.1)
        assert (soft_topk(x[:20], k, method="grad").sum(-1) - k).abs().max() < 1e-4
    assert article(scores(20, 1000, scale=3.0), 50).isnan().any(-1).all()
    x = scores(20, 5)
    torch.testing.assert_close(article(x, 2), soft_topk(x, 2, method="grad"), rtol=0, atol=1e-12)


def test_correction_of_the_iterated_softmax():
    with pytest.warns(UserWarning, match="may exceed 1"):
        p = soft_topk(torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64), 2, method="iter")
    wanted = torch.tensor([0.34719672, 0.34719672, 1.30560657], dtype=torch.float64)
    torch.testing.assert_close(p, wanted, rtol=0, atol=5e-9)
    with pytest.warns(UserWarning, match="may exceed 1"):
        p = soft_topk(torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64), 2, method="iter")
    torch.testing.assert_close(p, torch.tensor([0.0895, 0.9566, 0.9539], dtype=torch.float64), rtol=0, atol=5e-5)


@pytest.mark.filterwarnings("ignore:the values of method='iter'")
def test_how_often_the_iterated_softmax_fails():
    above = unordered = largest = 0
    for k in (2, 3, 5, 8):
        for scale in (0.5, 1.0, 3.0, 10.0, 30.0):
            x = scores(2000, 12, scale=scale)
            p = soft_topk(x, k, method="iter")
            above += (p > 1 + 1e-9).any(-1).sum().item()
            unordered += (p.gather(-1, x.argsort()).diff(dim=-1) < -1e-9).any(-1).sum().item()
            largest = max(largest, p.max().item())
    assert largest == pytest.approx(1.74, abs=0.1)
    assert above / 40_000 == pytest.approx(0.24, abs=0.02)
    assert unordered / 40_000 == pytest.approx(0.31, abs=0.02)


def test_correction_of_the_weighted_iteration():
    """With the weights 1 - p outside of the exponentials the limit is not the indicator."""
    x = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64) / 0.05
    p = torch.zeros_like(x)
    for _ in range(2):
        weights = (1 - p).clamp(min=0) * (x - x.max()).exp()
        p = p + weights / weights.sum()
    torch.testing.assert_close(p, torch.tensor([1.5, 0.5, 0, 0], dtype=torch.float64), rtol=0, atol=1e-6)
    hard = torch.tensor([1.0, 1.0, 0, 0], dtype=torch.float64)
    for method in MAPS:
        torch.testing.assert_close(soft_topk(x, 2, method=method), hard, rtol=0, atol=1e-4)


def test_subsets_by_one_node_are_the_sigmoid():
    """With one node of the contour; alike where the number of fair coins is large, and only there."""

    def apart(n, k, scale):
        x = scores(100, n, scale=scale)
        return (soft_topk(x, k, method="grad") - soft_topk(x, k, method="sigmoid")).abs().max().item()

    assert 1e-6 < apart(1000, 50, 1.0) <= 5.5e-3
    assert apart(4, 2, 3.0) > 0.1


# ------------------------------------------------------------------------------------------------------ gradients


@methods
@pytest.mark.parametrize("k", [1, 3, 6])
def test_derivatives(method, k):
    x = scores(2, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_topk(x, k, method=method), x)
    assert torch.autograd.gradgradcheck(lambda x: soft_topk(x, k, method=method), x)
    jacobian = torch.func.jacrev(lambda x: soft_topk(x, k, method=method))(x[0].detach())
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(jacobian.sum(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)


@thresholds
def test_derivatives_by_size_temperature_and_threshold(method):
    x = scores(3, 7).requires_grad_()
    k = torch.tensor([[1.3], [2.0], [4.5]], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor([[0.7], [1.0], [2.0]], dtype=torch.float64, requires_grad=True)

    def both(x, k, tau):
        return soft_topk(x, k, method=method, temperature=tau, return_threshold=True)

    assert torch.autograd.gradcheck(both, (x, k, tau))
    assert torch.autograd.gradgradcheck(both, (x, k, tau))


def test_derivatives_of_the_subset_sum():
    x = scores(2, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: log_esp(x, torch.tensor([[2], [5]])), x)
    (grad,) = torch.autograd.grad(log_esp(x, 3).sum(), x)
    torch.testing.assert_close(grad, soft_topk(x, 3, method="grad"))


def test_saturated_rows_have_no_gradient():
    for method in THRESHOLDS:
        x = torch.tensor([1e4, 1e4 + 1, -1e4, 0.0], requires_grad=True)
        p, threshold = soft_topk(x, 2, method=method, return_threshold=True)
        assert torch.equal(p, torch.tensor([1.0, 1.0, 0.0, 0.0])) or method == "exp"
        p.sum().backward()
        assert torch.isfinite(x.grad).all()
    p, threshold = soft_topk(torch.tensor([500.0, -500.0], dtype=torch.float64), 1, return_threshold=True)
    assert p.tolist() == pytest.approx([1.0, 0.0], abs=1e-200)
    assert abs(threshold.item()) < 1e-9


@methods
def test_temperature_with_masks_has_a_gradient(method):
    x = torch.tensor([[1.0, 2.0, -math.inf, 0.5], [0.3, -math.inf, 0.1, 0.2]], dtype=torch.float64)
    dense = x[:, [0, 1, 3]].clone()
    dense[1] = x[1, [0, 2, 3]]
    grads = []
    for rows, weight in ((x, [[1.0, 5, 9, 2], [3, 9, 1, 4]]), (dense, [[1.0, 5, 2], [3, 1, 4]])):
        tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        p = soft_topk(rows, 2, method=method, temperature=tau)
        (p * torch.tensor(weight, dtype=torch.float64)).sum().backward()
        grads.append(tau.grad)
    assert grads[0].isfinite()
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@methods
def test_gradients_of_each_sample_by_vmap(method):
    x, v = scores(3, 6), scores(3, 6, seed=1)
    each = torch.vmap(torch.func.grad(lambda x, v: (soft_topk(x, 2, method=method) * v).sum()))(x, v)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(soft_topk(leaf, 2, method=method), leaf, v)
    torch.testing.assert_close(each, wanted, rtol=1e-10, atol=1e-12)


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_inputs(method, dtype):
    """Values just below 1 round to 1, where their slope is not 0."""
    x, v = scores(64, 1000, scale=3, dtype=dtype), scores(64, 1000, seed=1, dtype=dtype)
    found = []
    for leaf in (x.clone(), x.double()):
        leaf.requires_grad_()
        found.append(torch.autograd.grad(soft_topk(leaf, 100, method=method), leaf, v.to(leaf.dtype))[0])
    error = (found[0].double() - found[1]).abs().max() / found[1].abs().max()
    assert error <= 2 * torch.finfo(dtype).eps


def test_straight_through():
    x = scores(3, 8).requires_grad_()
    hard = soft_topk(x, torch.tensor([[1], [3], [8]]), hard=True)
    assert torch.equal(hard.sum(-1), torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64))
    assert set(hard.detach().unique().tolist()) == {0.0, 1.0}
    for row, k in enumerate((1, 3, 8)):
        assert set(hard[row].nonzero()[:, 0].tolist()) == set(x[row].topk(k).indices.tolist())
    v = scores(3, 8, seed=1)
    soft = soft_topk(x, torch.tensor([[1], [3], [8]]))
    assert torch.equal(*(torch.autograd.grad((p * v).sum(), x)[0] for p in (hard, soft)))


def test_straight_through_takes_the_first_of_equal_scores():
    x = torch.tensor([[1.0, 2, 1, 2, 1], [0, 0, 0, 0, 0], [3, 3, 1, 2, -math.inf]])
    wanted = torch.tensor([[1.0, 1, 0, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]])
    for k in (3, 3.0, torch.tensor([3]), torch.tensor([[3.0], [3], [3]])):
        assert torch.equal(soft_topk(x, k, hard=True), wanted)
    assert torch.equal(soft_topk(x, 0, hard=True), torch.zeros(3, 5))
    assert torch.equal(soft_topk(x[2], 5, hard=True), torch.tensor([1.0, 1, 1, 1, 0]))


@methods
def test_every_derivative_of_hard_is_that_of_soft(method):
    x, v, w = scores(3, 6), scores(3, 6, seed=1), scores(3, 6, seed=2)

    def weighed(hard):
        return lambda x, v: (soft_topk(x, 2, method=method, hard=hard) * v).sum()

    def per_row(hard):
        return lambda x, v: torch.vmap(weighed(hard))(x, v).sum()

    def twice(hard):
        return torch.func.grad(lambda x: (torch.func.grad(weighed(hard))(x, v) * w).sum())(x)

    wanted = torch.func.grad(weighed(False))(x, v)
    assert wanted.abs().max() > 0.01 or method == "clip"
    compiled = torch.compile(weighed(True), fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    for found in (
        torch.func.grad(weighed(True))(x, v),
        torch.vmap(torch.func.grad(weighed(True)))(x, v),
        torch.func.grad(per_row(True))(x, v),
        torch.autograd.grad(weighed(True)(leaf, v), leaf)[0],
        torch.autograd.grad(compiled(leaf, v), leaf)[0],
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(twice(True), twice(False), rtol=1e-12, atol=1e-14)
    changed = soft_topk(leaf, 2, method=method, hard=True)
    changed *= v
    torch.testing.assert_close(torch.autograd.grad(changed.sum(), leaf)[0], wanted, rtol=1e-12, atol=1e-14)
    for result in (torch.vmap(lambda x: soft_topk(x, 2, hard=True))(x), soft_topk(x.T, 2, hard=True, dim=0).T):
        assert torch.equal(result, soft_topk(leaf, 2, method=method, hard=True))
    # Without a smooth map the tangent would be 0 in silence.
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: soft_topk(x, 2, method=method, hard=True), (x,), (v,))


@pytest.mark.parametrize("method", [*MAPS, "iter"])
def test_hard_computes_no_smooth_map_where_no_gradient_is_wanted(method, monkeypatch):
    def fail(*_):
        raise AssertionError("a smooth map was computed")

    x = scores(3, 6)
    wanted = soft_topk(x.clone().requires_grad_(), 2, hard=True)
    for name in ("threshold_rows", "_by_rows", "_iterated"):
        monkeypatch.setattr(f"danlu.simplex._soft_topk.{name}", fail)
    assert torch.equal(soft_topk(x, 2, method=method, hard=True), wanted)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(soft_topk(leaf, 2, method=method, hard=True), wanted)
    for options in ({"k": 2}, {"k": 2, "temperature": torch.tensor(0.5, requires_grad=True)}):
        with pytest.raises(AssertionError, match="was computed"):
            soft_topk(leaf if len(options) == 1 else x, method=method, hard=True, **options)


# ------------------------------------------------------------------------------------------------- kernels, dtypes


def first_of_the_largest(x, sizes):
    """By Python's stable sort."""
    out = torch.zeros_like(x)
    for row, k, into in zip(x, sizes.flatten().tolist(), out, strict=True):
        order = sorted((i for i, value in enumerate(row.tolist()) if value != -math.inf), key=lambda i: -row[i].item())
        into[order[:k]] = 1
    out[x.isnan().any(-1)] = math.nan
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 65, 130, 1000])
def test_hard_rows_by_a_sort(n, dtype):
    compiled = kernels.explain("soft_topk", torch.zeros(1)) is None
    for scale in (1.0, 1e4, 1e-6):
        x = scores(6, n, scale=scale, seed=n)
        x[1] = x[1].sort().values
        x[2] = (x[2] / scale).round() * scale  # ties
        x[3, : n // 2] = -math.inf
        x[4, n // 3] = math.inf
        x[5] = x[5].clamp(min=0) * torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)  # both zeros
        x = x.to(dtype)
        for k in sorted({0, 1, n // 64, n // 3, n - 1, n}):
            sizes = torch.tensor([[k], [k], [k], [k], [k], [max(0, k - 1)]])
            wanted = first_of_the_largest(x, sizes)
            for function in (hard_topk_cpu, _indicator) if compiled else (_indicator,):
                assert torch.equal(function(x, sizes), wanted)
    x[0, n // 2] = math.nan
    for function in (hard_topk_cpu, _indicator) if compiled else (_indicator,):
        found = function(x, sizes)
        assert found[0].isnan().all()
        assert torch.equal(found[1:], wanted[1:])


@pytest.mark.skipif(kernels.explain("soft_topk", torch.zeros(1)) is not None, reason="no compiler")
@thresholds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_equals_the_reference(method, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (1, 2, 63, 1000, 70000):
            x = scores(3, n, scale=3, dtype=dtype)
            x[1, : n // 3] = -math.inf
            k = torch.tensor([[0.4], [min(n / 4, 400)], [min(n - 0.5, 500)]], dtype=torch.float64)
            p, threshold = soft_topk_cpu(x, k, method)
            exact, wanted = _reference(x, k, method)
            eps = torch.finfo(dtype).eps
            # A sum of k ones is known to about k units.
            unit = 1e-15 if dtype == torch.float64 else 1e-7
            torch.testing.assert_close(p.double(), exact, rtol=eps, atol=(10 + float(k.max())) * unit)
            torch.testing.assert_close(threshold.double(), wanted, rtol=1e-4, atol=1e-3)
            v = scores(3, n, seed=2).to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            fast, slow = soft_topk_vjp_cpu(p, v, method), _vjp(p.to(wide), v.to(wide), None, method)
            torch.testing.assert_close(fast.to(wide), slow, rtol=4 * eps, atol=4 * eps)
    finally:
        torch.set_num_threads(before)


@thresholds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_within_two_ulps_for_every_size(method, dtype):
    """Relative to each value, however small, next to however many that are nearly 1."""
    info = torch.finfo(dtype)
    for n in (2, 5, 600):
        for k in {1, n - 1, 1.5}:
            for scale in (1.0, 30.0, 100.0):
                x = scores(20, n, scale=scale, seed=n, dtype=dtype)
                exact, _ = _reference(x, torch.tensor([float(k)], dtype=torch.float64), method)
                spacing = info.eps * torch.exp2(exact.clamp(min=info.smallest_normal).log2().floor())
                assert ((soft_topk(x, k, method=method).double() - exact).abs() <= 2 * spacing).all()


@pytest.mark.parametrize("gap", [0.0, 1.0, 30.0, 78.0, 160.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_values_next_to_a_wide_gap(gap, dtype):
    """Sums near k do not tell where the threshold is; the small values on both sides of it do."""
    x = torch.tensor([3.0, 3.0, 3.0 - gap, 2.0 - gap], dtype=dtype)
    half, rest = math.exp(-gap / 2), math.exp(-gap) * (1 + math.exp(-1))
    # exp: 2 e^-lambda + the sum of the others is 2.
    known = {"exp": [2 * math.exp(-gap - below) / (2 + rest) for below in (0, 1)]}
    if gap > 0:
        # Both sides have the same sum: B e^-s = A e^s.
        known["laplace"] = [0.5 * half * math.sqrt(2 / (1 + math.exp(-1))) * math.exp(-below) for below in (0, 1)]
    values = {method: (soft_topk(x, 2, method=method)[2:], wanted) for method, wanted in known.items()}
    values["sigmoid"] = (
        soft_topk(torch.tensor([5.0, 5.0 - gap], dtype=dtype), 1, method="sigmoid")[1:],
        [half / (1 + half)],
    )
    info = torch.finfo(dtype)
    for value, wanted in values.values():
        expected = torch.tensor(wanted, dtype=torch.float64).to(dtype)
        torch.testing.assert_close(value, expected, rtol=100 * info.eps, atol=info.smallest_normal * info.eps)


def test_many_scores_without_a_sort():
    x = scores(2, 100_000, dtype=torch.float32)
    for method in THRESHOLDS:
        p = soft_topk(x, 64, method=method)
        assert (p.double().sum(-1) - 64).abs().max() <= 1e-5 * 64


# ------------------------------------------------------------------------------------------------- masks and edges


@methods
def test_masks(method):
    x = scores(4, 6).requires_grad_()
    visible = torch.ones(4, 6, dtype=torch.bool)
    visible[0, 2] = visible[1, :5] = visible[2] = False
    visible[3, 3:] = False
    p = soft_topk(x, 3, method=method, mask=visible)
    torch.testing.assert_close(p[0, [0, 1, 3, 4, 5]], soft_topk(x[0, [0, 1, 3, 4, 5]], 3, method=method))
    assert p[0, 2] == 0
    assert p[1].tolist() == [0, 0, 0, 0, 0, 1]
    assert (p[2] == 0).all()
    assert p[3].tolist() == [1, 1, 1, 0, 0, 0]
    (p * scores(4, 6, seed=1)).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[1:] == 0).all()
    torch.testing.assert_close(soft_topk(x.masked_fill(~visible, -math.inf), 3, method=method), p, rtol=0, atol=0)


@methods
def test_infinite_scores_and_the_ends_of_the_range(method):
    inf = math.inf
    one = soft_topk(torch.tensor([inf, 0.0, 0.0]), 1, method=method)
    assert torch.equal(one, torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(soft_topk(torch.tensor([inf, inf, 0.0]), 1, method=method), torch.tensor([0.5, 0.5, 0.0]))
    assert torch.equal(soft_topk(torch.tensor([inf, inf, -inf]), 1, method=method), torch.tensor([0.5, 0.5, 0.0]))
    for dtype in (torch.float32, torch.float64):
        x = torch.finfo(dtype).max * torch.tensor([0.9, -0.9, 0.5, 0.25, -0.5], dtype=dtype)
        wanted = torch.tensor([1, 0, 1, 0, 0], dtype=dtype)
        torch.testing.assert_close(soft_topk(x, 2, method=method), wanted, rtol=0, atol=1e-12)
        if method in THRESHOLDS:
            assert torch.equal(_reference(x, torch.tensor([2.0]), method)[0].to(dtype), wanted)


@methods
def test_edges(method):
    x = scores(2, 5)
    assert (soft_topk(x, 0, method=method) == 0).all()
    assert (soft_topk(x, 5, method=method) == 1).all()
    torch.testing.assert_close(soft_topk(torch.zeros(8), 3, method=method), torch.full((8,), 3 / 8))
    bad = soft_topk(torch.tensor([[math.nan, 0.0, 1.0], [0.0, 1.0, 2.0]]), 1, method=method)
    assert bad[0].isnan().all()
    assert bad[1].isfinite().all()
    torch.testing.assert_close(
        soft_topk(x.T, torch.tensor([[2, 3]]), method=method, dim=0).T,
        torch.stack([soft_topk(x[0], 2, method=method), soft_topk(x[1], 3, method=method)]),
    )


def test_trivial_subset_sums():
    x = torch.tensor([1.0, 2.0, -math.inf])
    assert log_esp(x, 0) == 0
    assert log_esp(x, 2) == 3
    assert log_esp(x, 3) == -math.inf
    assert log_esp(torch.tensor([1.0, 2.0, 3.0]).log(), 2).item() == pytest.approx(math.log(11))
    rows = torch.tensor([[math.nan, 1.0, 2.0], [0.0, 0.0, 0.0], [math.inf, 0.0, 1.0]])
    torch.testing.assert_close(log_esp(rows, 2), torch.tensor([math.nan, math.log(3), math.inf]), equal_nan=True)
    torch.testing.assert_close(log_esp(rows, 0), torch.tensor([math.nan, 0.0, 0.0]), equal_nan=True)


def test_many_subsets_of_many_scores_take_bounded_memory(monkeypatch):
    """Blocks of few nodes and few rows at a time give what all of them at once give."""
    x, v, k = scores(3, 40), scores(3, 40, seed=1), torch.tensor([[20], [3], [39]])
    results = []
    for piece in (1 << 22, 1 << 6):
        monkeypatch.setattr("danlu.simplex._subset_sums._PIECE", piece)
        leaf = x.clone().requires_grad_()
        p = soft_topk(leaf, k, method="grad")
        results.append((p, torch.autograd.grad(p, leaf, v)[0], log_esp(x, k)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"k": -1}, ValueError, "k"),
        ({"k": 4}, ValueError, "k must be at most N = 3"),
        ({"k": 1.5, "method": "grad"}, ValueError, "whole number"),
        ({"k": 1.5, "hard": True}, ValueError, "whole number"),
        ({"k": torch.tensor([5])}, ValueError, "k must be in"),
        ({"k": torch.tensor([0.5]), "method": "grad"}, ValueError, "whole numbers"),
        ({"k": torch.zeros(2)}, ValueError, "k must broadcast"),
        ({"k": torch.tensor([True])}, TypeError, "k must be a number"),
        ({"k": "2"}, TypeError, "k"),
        ({"k": 1, "method": "soft"}, ValueError, "method must be one of"),
        ({"k": 1, "temperature": 0.0}, ValueError, "temperature"),
        ({"k": 1, "temperature": torch.tensor(-1.0)}, ValueError, "temperature must be positive"),
        ({"k": 1, "temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "temperature must be positive"),
        ({"k": 1, "temperature": torch.ones(2)}, ValueError, "temperature must broadcast"),
        ({"k": 1, "mask": torch.ones(3)}, TypeError, "mask must be a bool"),
        ({"k": 1, "mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask must broadcast"),
        ({"k": 1, "method": "grad", "return_threshold": True}, ValueError, "return_threshold"),
        ({"k": torch.ones(1), "method": "iter"}, TypeError, "must be a number for method='iter'"),
        ({"k": 1, "dim": 3}, ValueError, "dim=3"),
    ],
)
def test_bad_input(options, error, match):
    with pytest.raises(error, match=match):
        soft_topk(torch.zeros(3), **options)


@pytest.mark.parametrize("options", [{"k": -1}, {"k": 1, "method": "soft"}, {"k": 1, "temperature": -1.0}])
def test_bad_options_of_the_module(options):
    with pytest.raises(ValueError, match=r"k|method|temperature"):
        SoftTopK(**options)
