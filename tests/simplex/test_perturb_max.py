"""What is true of perturb-and-max alone."""

import math

import pytest
import torch

from danlu.simplex import Noise, PerturbMax, perturb_argmax_sample, perturb_max, softmax

X = torch.tensor([0.5, 1.0, 1.4, -0.3], dtype=torch.float64)
GUMBEL = Noise(log_cdf=lambda y: -torch.exp(-y), log_hazard=lambda y: -y)
NORMAL = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("noise", "golden"),
    [
        ("normal", [0.15295268, 0.30704027, 0.50032969, 0.03967736]),
        ("logistic", [0.199845, 0.2978719, 0.40184787, 0.10043523]),
        ("gumbel", [0.17993206, 0.29665781, 0.44256145, 0.08084868]),
    ],
)
def test_golden_values(noise, golden):
    golden = torch.tensor(golden, dtype=torch.float64)
    torch.testing.assert_close(perturb_max(X, noise=noise), golden, rtol=0, atol=6e-9)


def test_gumbel_noise_is_softmax():
    x = draw(5, 30)
    torch.testing.assert_close(perturb_max(x, noise=GUMBEL), softmax(x), rtol=0, atol=1e-10)
    assert torch.equal(perturb_max(x, noise="gumbel"), softmax(x))


@pytest.mark.parametrize(
    ("noise", "nodes", "error"),
    [("normal", 16, 5e-7), ("normal", 24, 5e-12), ("logistic", 32, 4e-6), ("logistic", 64, 1e-12)],
)
def test_error_of_the_sum_of_four_scores(noise, nodes, error):
    exact = perturb_max(X, noise=noise, nodes=4000)
    assert (perturb_max(X, noise=noise, nodes=nodes) - exact).abs().max() <= error


@pytest.mark.parametrize("n", [2, 20, 200, 2000])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_error_of_the_sum(n, spread):
    """The trapezoid rule needs more nodes for more scores, whose largest is more concentrated."""
    x = spread / 2 * draw(3, n, seed=n)
    for noise, errors in (("normal", {64: 3e-12, 24: 5e-9 if n <= 20 else 4e-6}), ("logistic", {64: 1e-10, 32: 5e-5})):
        exact = perturb_max(x, noise=noise, nodes=500)
        for nodes, error in errors.items():
            assert (perturb_max(x, noise=noise, nodes=nodes) - exact).abs().max() <= error


def test_two_scores_in_closed_form():
    """For two scores the difference of the noises decides: normal with variance 2."""
    x = draw(50, 2)
    expected = NORMAL.cdf((x[:, 0] - x[:, 1]) / math.sqrt(2))
    torch.testing.assert_close(perturb_max(x)[:, 0], expected, rtol=0, atol=1e-11)


def quantile_rule(x: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """A mean over quantiles of the noise of the winner, as the article has it."""
    noise = NORMAL.icdf(quantiles)
    below = NORMAL.cdf(x[:, None, None] + noise[:, None] - x)
    for i in range(len(x)):
        below[i, :, i] = 1.0
    return below.prod(-1).mean(-1)


def test_the_rule_of_the_article_is_not_precise():
    exact = perturb_max(X, nodes=4000)
    for nodes, error, total in ((32, 1.0e-2, 0.976), (200, 2.0e-3, 0.995)):
        steps = torch.arange(1, nodes, dtype=torch.float64)
        rule = quantile_rule(X, steps / nodes)
        assert float((rule - exact).abs().max()) == pytest.approx(error, rel=0.05)
        assert float(rule.sum()) == pytest.approx(total, abs=3e-3)
        # Midpoints are better than that, and not good either.
        middle = quantile_rule(X, (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes)
        assert (middle - exact).abs().max() > 5e-5
    assert (perturb_max(X, nodes=32) - exact).abs().max() < 1e-10


def test_jacobian():
    for noise in ("normal", "logistic"):
        jacobian = torch.func.jacrev(lambda x, noise=noise: perturb_max(x, noise=noise))(draw(7))
        torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-10)
        torch.testing.assert_close(jacobian.sum(0), torch.zeros(7).double(), rtol=0, atol=1e-14)
        torch.testing.assert_close(jacobian.sum(1), torch.zeros(7).double(), rtol=0, atol=1e-10)
        assert torch.linalg.eigvalsh(jacobian).min() > -1e-10


def test_wide_and_narrow_noise_of_a_user():
    wide = Noise(lambda y: torch.nn.functional.logsigmoid(y / 50), lambda y: torch.nn.functional.logsigmoid(-y / 50))
    torch.testing.assert_close(perturb_max(50 * X, noise=wide), perturb_max(X, noise="logistic"), rtol=0, atol=1e-10)


def test_long_rows():
    x = draw(2, 5000).float()
    p = perturb_max(x, nodes=32)
    assert (p.sum(-1) - 1).abs().max() < 2e-6
    torch.testing.assert_close(p.double(), perturb_max(x.double()), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("noise", ["normal", "logistic", "gumbel"])
@pytest.mark.parametrize("dim", [0, -1])
def test_samples(noise, dim):
    x = draw(3, 4)
    x[0, 1] = -torch.inf
    generator = torch.Generator().manual_seed(0)
    samples = 40_000
    counts = perturb_argmax_sample(x, samples, noise=noise, dim=dim, generator=generator)
    assert counts.dtype == torch.int64
    assert (counts.sum(dim) == samples).all()
    assert counts[0, 1] == 0
    p = perturb_max(x, noise=noise, dim=dim)
    error = (counts / samples - p).abs() / (p * (1 - p) / samples).sqrt().clamp(min=1e-9)
    assert error[p > 0].max() < 4


def test_samples_in_pieces_and_masked_rows(monkeypatch):
    from danlu.simplex import _perturb_max

    monkeypatch.setattr(_perturb_max, "_CHUNK", 7)
    x = torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]])
    assert perturb_argmax_sample(x, 10).sum(-1).tolist() == [10, 0]
    assert perturb_argmax_sample(x.to(torch.bfloat16), 1, dim=0).sum(0).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (
            {"noise": "cauchy"},
            ValueError,
            "noise must be one of 'gumbel', 'normal', 'logistic' or a Noise, got 'cauchy'",
        ),
        ({"noise": 1.0}, TypeError, "noise must be a name or a Noise, got float"),
        ({"nodes": 1}, ValueError, "nodes must be at least 2"),
        ({"nodes": 8.0}, TypeError, "nodes must be an int"),
    ],
)
def test_errors(kwargs, error, match):
    with pytest.raises(error, match=match):
        perturb_max(X, **kwargs)
    with pytest.raises(error, match=match):
        PerturbMax(**kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((X, 0), {}, ValueError, "num_samples must be at least 1"),
        ((X, 1.5), {}, TypeError, "num_samples must be an int"),
        ((X, 1), {"noise": "cauchy"}, ValueError, "noise must be one of"),
        ((X, 1), {"dim": 1}, ValueError, "out of range"),
        ((X.long(), 1), {}, TypeError, "floating-point"),
    ],
)
def test_errors_of_samples(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        perturb_argmax_sample(*args, **kwargs)
