"""The steepest direction beats all others of length 1, by brute force and by the dual norm."""

import pytest
import torch

from danlu.flows import steepest_direction

F64 = torch.float64


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


METRIC = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 3.0]], dtype=F64)
LENGTHS = {
    "l2": lambda d: d.norm(),
    "linf": lambda d: d.abs().max(),
    "l1": lambda d: d.abs().sum(),
    "spectral": lambda d: torch.linalg.matrix_norm(d, 2),
    "kl": lambda d: (d.flatten() @ METRIC @ d.flatten()).sqrt(),
}
DUALS = {
    "l2": lambda g: g.norm(),
    "linf": lambda g: g.abs().sum(),
    "l1": lambda g: g.abs().max(),
    "spectral": lambda g: torch.linalg.matrix_norm(g, "nuc"),
    "kl": lambda g: (g.flatten() @ torch.linalg.solve(METRIC, g.flatten())).sqrt(),
}


def direction(g, norm):
    return steepest_direction(g, norm, metric=METRIC if norm == "kl" else None)


@pytest.mark.parametrize("norm", LENGTHS)
def test_no_direction_of_length_one_is_steeper(norm):
    shape = (3, 4) if norm == "spectral" else (3,)
    g = gaussian(*shape)
    best = direction(g, norm)
    assert best.shape == g.shape
    assert float(LENGTHS[norm](best)) == pytest.approx(1.0, abs=1e-12)
    assert float((g * best).sum()) == pytest.approx(float(DUALS[norm](g)), rel=1e-12)
    for seed in range(1, 300):
        other = gaussian(*shape, seed=seed)
        other = other / LENGTHS[norm](other)
        assert (g * other).sum() <= (g * best).sum() + 1e-12


def test_values():
    g = torch.tensor([3.0, -4.0, 0.0])
    assert steepest_direction(g, "linf").tolist() == [1.0, -1.0, 0.0]
    assert steepest_direction(g, "l1").tolist() == [0.0, -1.0, 0.0]
    assert steepest_direction(torch.tensor([2.0, -2.0]), "l1").tolist() == [1.0, 0.0]
    torch.testing.assert_close(steepest_direction(g, "l2"), torch.tensor([0.6, -0.8, 0.0]))
    rank_one = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(
        steepest_direction(rank_one, "spectral"), torch.tensor([[0.0, 0.6, 0.0], [0.0, 0.8, 0.0]])
    )
    batch = gaussian(2, 3, 4)
    torch.testing.assert_close(steepest_direction(batch, "spectral")[1], steepest_direction(batch[1], "spectral"))
    # With the identity as metric, natural gradient is the plain one.
    torch.testing.assert_close(steepest_direction(g, "kl", metric=torch.eye(3)), steepest_direction(g, "l2"))


def test_natural_gradient_is_steepest_for_the_kl_divergence():
    """Among small steps of equal KL divergence of a categorical distribution, by brute force over the circle."""
    logits, target = torch.tensor([0.3, -0.5], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)

    def log_probabilities(z):
        return torch.cat([z, z.new_zeros(1)]).log_softmax(0)

    def loss(z):
        return -(target * log_probabilities(z)).sum()

    p = log_probabilities(logits).exp()[:2]
    fisher = p.diag() - p.outer(p)
    best = steepest_direction(torch.func.grad(loss)(logits), "kl", metric=fisher)
    radius = 1e-3
    found = {}
    for k in range(720):
        angle = torch.tensor(k * torch.pi / 360, dtype=F64)
        d = torch.stack([angle.cos(), angle.sin()])
        base = log_probabilities(logits)
        length = ((base.exp() * (base - log_probabilities(logits + 1e-4 * d))).sum() * 2).sqrt() / 1e-4
        step = radius * d / length
        found[k] = (float(loss(logits + step)), step / radius)
    _, steepest = max(found.values(), key=lambda pair: pair[0])
    torch.testing.assert_close(steepest, best, rtol=0, atol=0.02)


@pytest.mark.parametrize("norm", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zeros_extremes_and_dtypes(norm, dtype):
    shape = (3, 1) if norm == "spectral" else (3,)
    zero = direction(torch.zeros(shape, dtype=dtype), norm)
    assert zero.dtype == dtype
    assert (zero == 0).all()
    for size in (1e-30, 1e30):
        g = (torch.tensor([1.0, -2.0, 0.5]).reshape(shape) * size).to(dtype)
        found = direction(g, norm)
        assert found.isfinite().all()
        # Up to the rounding of the input itself, the direction does not depend on the size.
        torch.testing.assert_close(
            found, direction((g.double() / size).to(dtype), norm), rtol=0, atol=8 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize(
    ("args", "metric", "error", "match"),
    [
        ((torch.ones(2, dtype=torch.int64), "l2"), None, TypeError, "g must be a floating-point tensor"),
        ((torch.ones(2), "l3"), None, ValueError, "norm must be one of"),
        ((torch.ones(2), "spectral"), None, ValueError, "needs a matrix"),
        ((torch.ones(2), "kl"), None, ValueError, "needs a metric"),
        ((torch.ones(2), "l2"), torch.eye(2), ValueError, "metric has no meaning with norm='l2'"),
        ((torch.ones(2), "kl"), torch.eye(3), ValueError, r"metric must have shape \(2, 2\)"),
        ((torch.ones(2), "kl"), torch.eye(2, dtype=torch.int64), TypeError, "metric must be a floating"),
        ((torch.ones(2), "kl"), -torch.eye(2), RuntimeError, "positive-definite"),
    ],
)
def test_bad_input(args, metric, error, match):
    with pytest.raises(error, match=match):
        steepest_direction(*args, metric=metric)
