"""Concentration of attention: ranges and identities of S, closed forms, and the bound of linear attention."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from danlu.diagnostics import attention_sparsity, linear_attention_sparsity_bound, sparsity_of_gaussian

FUNCTIONS = {
    "exp": torch.exp,
    "identity": lambda x: x,
    "relu": torch.relu,
    "square": torch.square,
    "relu2": lambda x: torch.relu(x).square(),
}
functions = pytest.mark.parametrize("f", FUNCTIONS)


def reference(row: torch.Tensor) -> float:
    """The definition, of one row."""
    return float(row.abs().mean() / row.square().mean().sqrt())


def test_definition_and_kinds():
    rows = torch.randn(3, 4, 11, dtype=torch.float64)
    found = attention_sparsity(rows)
    assert found.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert found[i, j].item() == pytest.approx(reference(rows[i, j]), rel=1e-12)
    torch.testing.assert_close(attention_sparsity(rows, kind="n_eff"), 11 * found.square(), rtol=1e-12, atol=0)
    torch.testing.assert_close(attention_sparsity(rows.movedim(-1, 0), dim=0), found, rtol=1e-12, atol=0)
    p = rows.softmax(-1)
    torch.testing.assert_close(attention_sparsity(p, kind="n_eff"), 1 / p.square().sum(-1), rtol=1e-12, atol=0)
    entropy = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(attention_sparsity(5 * p, kind="entropy"), entropy, rtol=1e-12, atol=0)
    torch.testing.assert_close(attention_sparsity(5 * p, kind="max"), p.amax(-1), rtol=1e-12, atol=0)


def test_uniform_over_seven_of_a_hundred_reads_exactly_seven():
    weights = torch.zeros(100, dtype=torch.float64)
    weights[10:17] = 1 / 7
    assert attention_sparsity(weights, kind="n_eff").item() == pytest.approx(7, rel=1e-14)
    assert attention_sparsity(weights, kind="entropy").item() == pytest.approx(math.log(7), rel=1e-14)
    assert attention_sparsity(weights).item() == pytest.approx(math.sqrt(0.07), rel=1e-14)
    # The square of S is something else.
    assert attention_sparsity(weights).item() != pytest.approx(0.07, rel=0.5)


@given(st.integers(2, 40), st.integers(0, 10**6))
def test_range_and_its_ends(n, seed):
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(n, generator=generator, dtype=torch.float64)
    value = attention_sparsity(row).item()
    assert n**-0.5 < value < 1
    # S = 1 iff all sizes are equal, and 1 / sqrt(n) iff one key has everything.
    signs = row.sign() * 0.37
    assert attention_sparsity(signs).item() == pytest.approx(1, abs=1e-15)
    one_hot = torch.zeros(n, dtype=torch.float64)
    one_hot[seed % n] = -2.5
    assert attention_sparsity(one_hot).item() == pytest.approx(n**-0.5, rel=1e-15)
    signs[0] *= 1.1
    assert attention_sparsity(signs).item() < 1 - 1e-6
    one_hot[(seed + 1) % n] = 0.1
    assert attention_sparsity(one_hot).item() > n**-0.5 * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-160, 1e-6, 3.0, 1e6, 1e160])
@pytest.mark.parametrize("kind", ["s", "n_eff", "entropy", "max"])
def test_scale_invariance(scale, kind):
    rows = torch.rand(5, 9, dtype=torch.float64)
    torch.testing.assert_close(
        attention_sparsity(scale * rows, kind=kind), attention_sparsity(rows, kind=kind), rtol=1e-12, atol=0
    )


def test_half_weights_do_not_underflow():
    weights = torch.full((1, 16384), 1 / 16384, dtype=torch.float16)
    # The uncorrected formula in float16: the squares are below the smallest number.
    assert weights.square().mean() == 0
    found = attention_sparsity(weights)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1, abs=1e-6)
    exact = torch.randn(6, 33).softmax(-1)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(attention_sparsity(exact.to(dtype)), attention_sparsity(exact), rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", ["s", "n_eff", "entropy", "max"])
def test_masks(kind):
    rows = torch.rand(4, 6, 6, dtype=torch.float64)
    mask = torch.ones(6, 6).tril().bool()
    found = attention_sparsity(rows, mask=mask, kind=kind)
    assert found[:, 0].isnan().all()
    for i in range(1, 6):
        alone = attention_sparsity(rows[:, i, : i + 1], kind=kind)
        torch.testing.assert_close(found[:, i], alone, rtol=1e-12, atol=0)
    # What is hidden has no influence, not even NaN or a sign.
    rows.masked_fill_(~mask, math.nan)
    torch.testing.assert_close(attention_sparsity(rows, mask=mask, kind=kind), found, rtol=0, atol=0, equal_nan=True)
    rows.masked_fill_(~mask, -1.0)
    torch.testing.assert_close(attention_sparsity(rows, mask=mask, kind=kind), found, rtol=0, atol=0, equal_nan=True)
    none = torch.zeros(6, dtype=torch.bool)
    assert attention_sparsity(rows, mask=none, kind=kind).isnan().all()


def test_nan_and_zero_rows_stay_in_their_row():
    rows = torch.ones(3, 4)
    rows[0, 1], rows[1] = math.nan, 0.0
    found = attention_sparsity(rows)
    assert found[:2].isnan().all()
    assert found[2] == 1


@functions
@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 1.0), (0.7, 0.8), (-0.9, 0.6), (2.0, 0.3), (-1.0, 0.9)])
def test_closed_forms_against_monte_carlo(f, beta, gamma):
    """Of exp the fourth moments are heavy, so a large deviation would need more draws."""
    gamma = min(gamma, 0.6) if f == "exp" else gamma
    draws = torch.randn(10**6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    measured = reference(FUNCTIONS[f](beta + gamma * draws))
    assert sparsity_of_gaussian(f, beta, gamma).item() == pytest.approx(measured, abs=2e-3)


@functions
@pytest.mark.parametrize("ratio", [-30.0, -15.0, -12.1, -11.9, -5.0, -1.0, -0.1, 0.0, 0.1, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_closed_forms_against_quadrature(f, ratio, gamma):
    beta = ratio * gamma
    x = torch.linspace(-40, 60, 400_001, dtype=torch.float64)
    # Shifted by the largest exponent, or the far tail of relu would be 0.
    exponent = -0.5 * x.square()
    value = FUNCTIONS[f](gamma * (x + ratio)).abs()
    peak = exponent[value > 0].max()
    weight = (exponent - peak).exp()
    first, second = (torch.trapezoid(value**k * weight, x) for k in (1, 2))
    expected = first / second.sqrt() * (peak.exp() / math.sqrt(2 * math.pi)).sqrt()
    assert sparsity_of_gaussian(f, beta, gamma).item() == pytest.approx(expected.item(), rel=2e-5)


def test_limits_of_the_closed_forms():
    beta = torch.linspace(-5, 5, 201, dtype=torch.float64)
    assert sparsity_of_gaussian("identity", beta, 1.0).min().item() == pytest.approx(math.sqrt(2 / math.pi), abs=1e-12)
    # The least of the square is 1 / sqrt(3), at a mean of 0.
    square = sparsity_of_gaussian("square", beta, 1.0)
    assert square.min().item() == pytest.approx(3**-0.5, abs=1e-12)
    assert square.argmin() == 100
    for f in ("relu", "relu2"):
        values = sparsity_of_gaussian(f, beta, 1.0)
        assert (values.diff() > 0).all()
        assert values[0] < 1e-3
    gamma = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    for mean in (-3.0, 0.0, 3.0):
        torch.testing.assert_close(sparsity_of_gaussian("exp", mean, gamma), torch.exp(-(gamma**2) / 2))
    # Without deviation all weights are equal; with none above 0 there is no row.
    for f in FUNCTIONS:
        assert sparsity_of_gaussian(f, 2.0, 0.0) == 1
    assert sparsity_of_gaussian("relu", -2.0, 0.0).isnan()
    assert sparsity_of_gaussian("identity", 0.0, 0.0).isnan()
    # Huge ratios neither overflow nor become NaN.
    assert sparsity_of_gaussian("relu2", torch.tensor([-1e300, 1e300], dtype=torch.float64), 1.0).tolist() == [0, 1]


def test_finite_rows_leave_the_formula():
    """512 keys: the formula says 0.607, 0.135, 0.011, 0.0003."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 512, generator=generator, dtype=torch.float64)
    actual = [attention_sparsity((gamma * scores).softmax(-1)).mean().item() for gamma in (1, 2, 3, 4)]
    assert actual == pytest.approx([0.617, 0.243, 0.133, 0.096], abs=4e-3)
    limit = sparsity_of_gaussian("exp", 0.0, torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)).tolist()
    assert limit == pytest.approx([0.607, 0.135, 0.011, 0.0003], abs=5e-4)


def test_results_have_the_dtype_of_the_tensors_and_no_graph():
    beta = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    found = sparsity_of_gaussian("relu", beta, torch.ones(2, dtype=torch.float32))
    assert found.dtype == torch.float32
    assert found.shape == (3, 2)
    assert not found.requires_grad
    assert sparsity_of_gaussian("exp", beta, 1.0).dtype == torch.bfloat16
    assert sparsity_of_gaussian("exp", 0, 1).dtype == torch.float64


def test_linear_attention_exactly():
    r"""$S = (1 + q^\top \Sigma q / (q^\top \mu)^2)^{-1/2}$ with the moments of the keys at hand."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        keys = F.elu(torch.randn(200, 8, generator=generator, dtype=torch.float64)) + 1
        query = torch.rand(8, generator=generator, dtype=torch.float64)
        spread = query @ torch.cov(keys.T, correction=0) @ query
        expected = (1 + spread / (query @ keys.mean(0)) ** 2) ** -0.5
        assert attention_sparsity(keys @ query).item() == pytest.approx(expected.item(), rel=1e-12)
    # Independent features: only the ratio of the norms of the query counts.
    keys = torch.rand(10**6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    query = torch.tensor([3.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    ratio = (1 / 12) ** 0.5 / 0.7 * query.norm() / query.sum()
    assert attention_sparsity(keys @ query).item() == pytest.approx((1 + ratio.item() ** 2) ** -0.5, abs=2e-3)


def test_decay():
    for decay in (0.5, 0.9, 0.99):
        for n in (2, 10, 300):
            row = decay ** torch.arange(n, dtype=torch.float64)
            expected = math.sqrt((1 - decay**n) / (n * (1 - decay)) * (1 + decay) / (1 + decay**n))
            assert attention_sparsity(row).item() == pytest.approx(expected, rel=1e-12)


def test_bound_of_linear_attention_on_100_random_cases():
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        n, d = (int(torch.randint(low, 40, (), generator=generator)) for low in (2, 1))
        keys = torch.randn(n, d, generator=generator, dtype=torch.float64)
        features = (keys.relu(), F.elu(3 * keys) + 1, keys.exp())[seed % 3]
        bound = linear_attention_sparsity_bound(features)
        queries = torch.randn(50, d, generator=generator, dtype=torch.float64).relu() * 100
        # One feature alone reaches the bound.
        queries[:d] += 1e6 * torch.eye(d, dtype=torch.float64)[:50]
        found = attention_sparsity(queries @ features.T)
        found = found[~found.isnan()]
        assert (found >= bound * (1 - 1e-12)).all()
        single = attention_sparsity(features, dim=0)
        assert bound == single[~single.isnan()].min()


def test_softmax_is_sharper_than_linear_attention_can_be():
    """1000 keys of 16 features: 0.65 at best for elu + 1, 0.68 to 0.76 among 2000 queries, and 0.06 for softmax."""
    generator = torch.Generator().manual_seed(0)
    keys = 3 * torch.randn(1000, 16, generator=generator, dtype=torch.float64)
    features = F.elu(keys) + 1
    bound = linear_attention_sparsity_bound(features).item()
    assert bound == pytest.approx(0.65, abs=0.02)
    draws = torch.randn(2000, 16, generator=generator, dtype=torch.float64)
    best = min(attention_sparsity((F.elu(c * draws) + 1) @ features.T).min().item() for c in (0.3, 1, 3, 10))
    assert bound < best < 0.76
    softmax = attention_sparsity((5 * draws @ keys.T / 4).softmax(-1)).median().item()
    assert 1000**-0.5 <= softmax < 0.06


def test_bound_under_masks_and_of_empty_features():
    features = torch.rand(2, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = linear_attention_sparsity_bound(features, mask=mask)
    assert found[0] == linear_attention_sparsity_bound(features[0])
    torch.testing.assert_close(found[1], linear_attention_sparsity_bound(features[1, :4]), rtol=1e-12, atol=0)
    features[..., 1] = 0.0
    torch.testing.assert_close(
        linear_attention_sparsity_bound(features), linear_attention_sparsity_bound(features[..., [0, 2]])
    )
    assert linear_attention_sparsity_bound(torch.zeros(4, 2)).isnan()
    assert linear_attention_sparsity_bound(torch.ones(1, 2)).isnan()
    features[0, 0, 0] = math.nan
    assert linear_attention_sparsity_bound(features).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: attention_sparsity(torch.ones(3).long()), TypeError, "weights must be a floating-point tensor"),
        (lambda: attention_sparsity(torch.ones(3), dim=1), ValueError, "dim=1 is out of range"),
        (lambda: attention_sparsity(torch.ones(3, 0)), ValueError, r"of shape \(3, 0\) is empty"),
        (lambda: attention_sparsity(torch.ones(3), kind="S"), ValueError, "kind must be one of 's', 'n_eff'"),
        (lambda: attention_sparsity(torch.ones(3), mask=torch.ones(3)), TypeError, "mask must be a bool tensor"),
        (
            lambda: attention_sparsity(torch.ones(3), mask=torch.ones(4).bool()),
            ValueError,
            r"mask must broadcast to \(3,\), got \(4,\)",
        ),
        (lambda: attention_sparsity(-torch.ones(3), kind="entropy"), ValueError, "kind='entropy' needs weights"),
        (lambda: attention_sparsity(-torch.ones(3), kind="max"), ValueError, "kind='max' needs weights"),
        (lambda: sparsity_of_gaussian("elu", 0.0, 1.0), ValueError, "f must be one of 'exp', 'identity'"),
        (lambda: sparsity_of_gaussian("exp", 0.0, -1.0), ValueError, "gamma must be in"),
        (lambda: sparsity_of_gaussian("exp", "0", 1.0), TypeError, "beta must be a real number"),
        (lambda: sparsity_of_gaussian("exp", torch.ones(2).long(), 1.0), TypeError, "beta must be a floating-point"),
        (
            lambda: sparsity_of_gaussian("exp", torch.ones(2), torch.ones(3)),
            ValueError,
            r"beta and gamma must broadcast, got shapes \(2,\) and \(3,\)",
        ),
        (lambda: linear_attention_sparsity_bound(torch.ones(3)), ValueError, r"shape \(\.\.\., n, d\)"),
        (lambda: linear_attention_sparsity_bound(torch.ones(3, 0)), ValueError, r"got \(3, 0\)"),
        (lambda: linear_attention_sparsity_bound(-torch.ones(3, 2)), ValueError, "must not be negative"),
        (lambda: linear_attention_sparsity_bound(torch.ones(3, 2).long()), TypeError, "k_features must be"),
        (
            lambda: linear_attention_sparsity_bound(torch.ones(3, 2), mask=torch.ones(2).bool()),
            ValueError,
            r"mask must broadcast to \(3,\), got \(2,\)",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
