"""TaiLr alone: limits, bounds, the paper's form, robustness, the population optimum."""

import decimal
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from danlu.losses import TaiLr, TaiLrLoss, linear_tailr_loss, tailr_loss, tailr_unbias

GAMMAS = [0.0, 1e-7, 0.1, 0.3, 0.5, 0.500001, 0.8, 0.999999, 1.0]


def of_probability(p: torch.Tensor, gamma: float, **options) -> torch.Tensor:
    """The loss of rows with two classes whose target has probability `p`."""
    logits = torch.stack((p.log(), (1 - p).log()), -1)
    return tailr_loss(logits, torch.zeros(len(p), dtype=torch.int64), gamma=gamma, reduction="none", **options)


def definition(p: torch.Tensor, gamma: float) -> torch.Tensor:
    if gamma == 0.0:
        return -p.log()
    if gamma == 1.0:
        return 1 - p
    return -(gamma + (1 - gamma) * p).log() / (1 - gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_definition(gamma):
    p = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    # The definition itself loses digits where it divides by 1 - gamma = 1e-6.
    torch.testing.assert_close(of_probability(p, gamma), definition(p, gamma), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gamma", [1e-7, 1e-3, 0.1, 0.4999, 0.5, 0.5001, 0.9, 0.999999, 1 - 1e-12])
def test_twelve_digits_at_every_gamma(gamma):
    """Against 50 digits, of the value from l itself; a float and a tensor agree on both sides of the switch."""
    nll = torch.tensor([1e-6, 0.01, 0.7, 5.0, 30.0, 80.0], dtype=torch.float64)
    with decimal.localcontext() as context:
        context.prec = 50
        g = decimal.Decimal(gamma)
        exact = [float(-(g + (1 - g) * (-decimal.Decimal(x)).exp()).ln() / (1 - g)) for x in nll.tolist()]
    expected = torch.tensor(exact, dtype=torch.float64)
    for kind in (gamma, torch.tensor(gamma, dtype=torch.float64)):
        value = TaiLr(kind).value_and_derivative(nll)[0]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_golden_values():
    p = torch.tensor([0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(
        of_probability(p, 0.5), torch.tensor([-2 * math.log(0.75), -2 * math.log(0.55)], dtype=torch.float64)
    )
    torch.testing.assert_close(
        of_probability(p, 0.1), torch.tensor([-math.log(0.55) / 0.9, -math.log(0.19) / 0.9], dtype=torch.float64)
    )
    torch.testing.assert_close(of_probability(p, 1.0), torch.tensor([0.5, 0.9], dtype=torch.float64))


@given(gamma=st.floats(1e-6, 1.0), logits=st.lists(st.floats(-20, 20), min_size=3, max_size=6))
def test_between_zero_and_cross_entropy_and_bounded(gamma, logits):
    z, target = torch.tensor([logits], dtype=torch.float64), torch.tensor([0])
    value = tailr_loss(z, target, gamma=gamma)
    bound = 1.0 if gamma == 1.0 else -math.log(gamma) / (1 - gamma)
    assert -1e-12 <= value <= F.cross_entropy(z, target) + 1e-9
    assert value <= bound * (1 + 1e-9)


@pytest.mark.parametrize("gamma", [0.01, 0.3, 0.7])
@pytest.mark.parametrize("min_weight", [0.0, 0.3])
def test_decreasing_and_convex_in_the_probability(gamma, min_weight):
    p = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    value = of_probability(p, gamma, min_weight=min_weight)
    slopes = value.diff()
    assert (slopes < 0).all()
    assert (slopes.diff() > -1e-12).all()


def test_limits_are_reached_continuously():
    p = torch.linspace(0.01, 0.99, 30, dtype=torch.float64)
    torch.testing.assert_close(of_probability(p, 1e-12), of_probability(p, 0.0), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(of_probability(p, 1 - 1e-12), of_probability(p, 1.0), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(of_probability(p, 0.5), of_probability(p, 0.5 + 1e-13), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("min_weight", [0.0, 0.2, 1.0])
def test_gradient_is_that_of_the_papers_weighted_form(gamma, min_weight):
    """The weight without gradient times the negative log-likelihood."""
    logits = 2 * torch.randn(40, 5, dtype=torch.float64)
    target = torch.randint(5, (40,))
    mine = logits.clone().requires_grad_()
    tailr_loss(mine, target, gamma=gamma, min_weight=min_weight, reduction="sum").backward()
    theirs = logits.clone().requires_grad_()
    nll = F.cross_entropy(theirs, target, reduction="none")
    p = (-nll).exp().detach()
    weight = (p / (gamma + (1 - gamma) * p)).clamp(min=min_weight)
    (weight * nll).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)
    one_hot = F.one_hot(target, 5)
    torch.testing.assert_close(mine.grad, weight[:, None] * (logits.softmax(-1) - one_hot), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("min_weight", [0.0, 0.3])
def test_gradcheck_on_both_sides_of_the_threshold(gamma, min_weight):
    threshold = min_weight * gamma / (1 - min_weight * (1 - gamma))
    for p in {0.9, max(threshold / 2, 0.01), min(threshold * 2 + 0.01, 0.99)}:
        row = torch.tensor([[math.log(p), math.log((1 - p) / 2), math.log((1 - p) / 2)]], dtype=torch.float64)
        target = torch.tensor([0])

        def loss(z, target=target):
            return tailr_loss(z, target, gamma=gamma, min_weight=min_weight, label_smoothing=0.1)

        assert torch.autograd.gradcheck(loss, row.requires_grad_())
        assert torch.autograd.gradgradcheck(loss, row)


def test_bounded_weight_is_continuous():
    gamma, bound = 0.4, 0.25
    threshold = bound * gamma / (1 - bound * (1 - gamma))
    p = torch.tensor([threshold * (1 - 1e-9), threshold * (1 + 1e-9)], dtype=torch.float64)
    below, above = of_probability(p, gamma, min_weight=bound)
    assert abs(below - above) < 1e-8
    far = torch.tensor([threshold / 10], dtype=torch.float64)
    expected = definition(torch.tensor([threshold], dtype=torch.float64), gamma) + bound * math.log(10)
    torch.testing.assert_close(of_probability(far, gamma, min_weight=bound), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiny_probability_stays_finite_with_the_right_weight(dtype):
    logits = torch.tensor([[0.0, 80.0]], dtype=dtype, requires_grad=True)
    value = tailr_loss(logits, torch.tensor([0]), gamma=1e-7)
    value.backward()
    assert value.item() == pytest.approx(-math.log(1e-7) / (1 - 1e-7), rel=1e-6)
    assert logits.grad[0, 1].item() == pytest.approx(math.exp(-80) / 1e-7, rel=1e-4)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_wrong_labels_hardly_pull(gamma):
    """The gradient's 1-norm is at most 2 p / gamma: bounded influence of a label that the model finds impossible."""
    p = torch.logspace(-8, -2, 20, dtype=torch.float64)
    logits = torch.stack((p.log(), (1 - p).log()), -1).requires_grad_()
    tailr_loss(logits, torch.zeros(20, dtype=torch.int64), gamma=gamma, reduction="sum").backward()
    assert (logits.grad.abs().sum(-1) <= 2 * p / gamma * (1 + 1e-12)).all()


@pytest.mark.parametrize("gamma", [0.0, 1e-7, 0.3, 1.0])
@pytest.mark.parametrize("min_weight", [0.0, 0.2])
def test_weighted_value_is_the_papers_number_with_the_same_gradient(gamma, min_weight):
    logits, target = 2 * torch.randn(9, 5, dtype=torch.float64), torch.randint(5, (9,))
    logits.requires_grad_()
    options = {"gamma": gamma, "min_weight": min_weight, "label_smoothing": 0.1}
    mine, plain = (tailr_loss(logits, target, value=kind, **options) for kind in ("weighted", "potential"))
    nll = F.cross_entropy(logits, target, reduction="none")
    p = (-nll).exp().detach()
    weight = (p / (gamma + (1 - gamma) * p)).clamp(min=min_weight)
    expected = (0.9 * weight * nll - 0.1 * logits.log_softmax(-1).mean(-1)).mean()
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    for first, second in zip(torch.autograd.grad(mine, logits), torch.autograd.grad(plain, logits), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    fused = linear_tailr_loss(logits, torch.eye(5, dtype=torch.float64), target, value="weighted", **options)
    torch.testing.assert_close(fused, mine)


def test_weighted_value_is_not_monotone():
    p = torch.tensor([1e-6, 0.1, 0.999], dtype=torch.float64)
    low, middle, high = of_probability(p, 0.1, value="weighted")
    assert low < middle > high


def test_schedule():
    logits, target = torch.randn(4, 5), torch.randint(5, (4,))
    loss = TaiLrLoss(lambda step: min(0.5, step / 10))
    for step in range(8):
        assert loss.current_gamma == min(0.5, step / 10)
        assert torch.equal(loss(logits, target), tailr_loss(logits, target, gamma=min(0.5, step / 10)))
        loss.advance()
    loss.advance(3)
    assert loss.steps == 11
    tensor = TaiLrLoss(torch.tensor(0.3))
    torch.testing.assert_close(tensor(logits, target), tailr_loss(logits, target, gamma=0.3))
    with pytest.raises(ValueError, match="gamma must be in"):
        TaiLrLoss(lambda step: 2.0)
    wrong = TaiLrLoss(lambda step: float(step))
    wrong.advance(2)
    with pytest.raises(ValueError, match="gamma must be in"):
        wrong(logits, target)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        wrong.advance(-1)


def test_label_smoothing():
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    smoothed = tailr_loss(logits, target, gamma=0.3, label_smoothing=0.2)
    expected = 0.8 * tailr_loss(logits, target, gamma=0.3) - 0.2 * logits.log_softmax(-1).mean()
    torch.testing.assert_close(smoothed, expected)
    both = tailr_loss(logits, target, gamma=0.0, label_smoothing=0.2)
    torch.testing.assert_close(both, F.cross_entropy(logits, target, label_smoothing=0.2))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("min_weight", [0.0, 0.3, 1.0])
def test_gamma_as_a_tensor(gamma, min_weight):
    logits, target = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (6,))
    value = tailr_loss(logits, target, gamma=torch.tensor(gamma, dtype=torch.float64), min_weight=min_weight)
    (mine,) = torch.autograd.grad(value, logits)
    expected = tailr_loss(logits, target, gamma=gamma, min_weight=min_weight)
    (theirs,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("min_weight", [0.0, 0.3, 1.0])
def test_row_loss_agrees_with_autograd(gamma, min_weight):
    nll = torch.linspace(0.0, 30.0, 50, dtype=torch.float64, requires_grad=True)
    value, slope = TaiLr(gamma, min_weight=min_weight).value_and_derivative(nll)
    (expected,) = torch.autograd.grad(value.sum(), nll)
    # At the kink itself either side is a subgradient.
    close = (slope - expected).abs() <= 1e-9 + 1e-9 * expected.abs()
    assert close.sum() >= 49
    of_tensor = TaiLr(torch.tensor(gamma, dtype=torch.float64), min_weight=min_weight)
    torch.testing.assert_close(of_tensor.value_and_derivative(nll)[1], slope)


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        (0.05, (0.5526316, 0.3105263, 0.1289474, 0.0078947)),
        (0.2, (0.6710526, 0.3026316, 0.0263158, 0.0)),
    ],
)
def test_population_optimum(gamma, expected):
    """Minimize the expected loss by gradient descent on free logits."""
    truth = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    logits = truth.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], lr=1, max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        rows = tailr_loss(logits.expand(4, 4), torch.arange(4), gamma=gamma, reduction="none")
        (truth * rows).sum().backward()
        return (truth * rows.detach()).sum()

    for _ in range(5):
        optimizer.step(closure)
    probs = logits.detach().softmax(0)
    torch.testing.assert_close(probs, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-4)
    if min(expected) > 0:
        torch.testing.assert_close(tailr_unbias(probs, gamma=gamma), truth, rtol=0, atol=1e-4)


@given(gamma=st.floats(0, 1), seed=st.integers(0, 99), dim=st.integers(-2, 1))
def test_unbiased_probabilities_sum_to_one(gamma, seed, dim):
    probs = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(dim)
    out = tailr_unbias(probs, gamma=gamma, dim=dim)
    torch.testing.assert_close(out.sum(dim), torch.ones_like(out.sum(dim)))
    assert (out >= 0).all()


def test_weights_below_the_smallest_number_of_the_dtype():
    """At gamma = 1e-50 and a probability of e^-110 both underflow in float32; their ratio does not."""
    expected = math.exp(-110) / (1e-50 + math.exp(-110))
    _, slope = TaiLr(1e-50).value_and_derivative(torch.tensor([110.0]))
    assert slope.item() == pytest.approx(expected, rel=1e-4)
    logits = torch.tensor([[0.0, 110.0]], requires_grad=True)
    tailr_loss(logits, torch.tensor([0]), gamma=1e-50).backward()
    assert logits.grad[0, 1].item() == pytest.approx(expected, rel=1e-4)


def test_masked_class_with_label_smoothing_is_as_in_cross_entropy():
    logits = torch.tensor([[0.0, 1.0, float("-inf")]])
    value = tailr_loss(logits, torch.tensor([0]), gamma=0.0, label_smoothing=0.1)
    assert value == F.cross_entropy(logits, torch.tensor([0]), label_smoothing=0.1) == math.inf


def test_per_sample_gradients_with_vmap():
    logits, target = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(5, (3, 4))
    target[1, 2] = -100
    found = torch.func.vmap(torch.func.grad(lambda z, y: tailr_loss(z, y, gamma=0.3)))(logits, target)
    for sample, classes, grad in zip(logits, target, found, strict=True):
        torch.testing.assert_close(grad, torch.func.grad(lambda z, y=classes: tailr_loss(z, y, gamma=0.3))(sample))


def test_compile():
    logits, target = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(5, (3, 4))
    for options in ({}, {"min_weight": 0.2, "label_smoothing": 0.1}):
        compiled = torch.compile(lambda z, y, o=options: tailr_loss(z, y, **o), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, target), tailr_loss(logits, target, **options))


def test_compiled_gradients_of_ignored_rows_are_exact_zeros():
    logits, target = torch.randn(4, 5, dtype=torch.float64), torch.randint(5, (4,))
    target[1], logits[1, 2] = -100, math.nan
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.compile(lambda z, y: tailr_loss(z, y, gamma=0.3), fullgraph=True, backend="aot_eager")(
        mine, target
    ).backward()
    tailr_loss(theirs, target, gamma=0.3).backward()
    assert (mine.grad[1] == 0).all()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_checkpoint_and_autocast():
    logits, target = torch.randn(4, 5, requires_grad=True), torch.randint(5, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = tailr_loss(logits, target)
    assert value.dtype == torch.float32
    again = torch.utils.checkpoint.checkpoint(tailr_loss, logits, target, use_reentrant=False)
    torch.testing.assert_close(again, value)


def test_large_gamma_from_scratch_leaves_out_a_class():
    """The article's warning on clean digits: at gamma = 0.8 one class is never predicted, at 0.1 none is left out."""
    pytest.importorskip("sklearn")
    from danlu.lab.data import digits

    data = digits(seed=1)
    inputs, targets = torch.as_tensor(data.train_inputs).float(), torch.as_tensor(data.train_targets).long()
    predicted = {}
    for gamma in (0.1, 0.8):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        for _ in range(540):
            rows = torch.randint(len(inputs), (100,))
            optimizer.zero_grad()
            tailr_loss(net(inputs[rows]), targets[rows], gamma=gamma).backward()
            optimizer.step()
        predicted[gamma] = len(net(torch.as_tensor(data.test_inputs).float()).argmax(1).unique())
    assert predicted[0.1] == 10
    assert predicted[0.8] < 10


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gamma": -0.1}, "gamma must be in"),
        ({"gamma": 1.1}, "gamma must be in"),
        ({"gamma": float("nan")}, "gamma must be in"),
        ({"gamma": torch.ones(2)}, "gamma must be a number or a tensor with one element"),
        ({"gamma": torch.tensor(2.0)}, "gamma must be in"),
        ({"min_weight": 1.5}, "min_weight must be in"),
        ({"label_smoothing": -1.0}, "label_smoothing must be in"),
        ({"value": "paper"}, "value must be one of 'potential', 'weighted'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        tailr_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match=match):
        TaiLrLoss(**options)
    with pytest.raises(ValueError, match=match):
        TaiLr(**options)


def test_bad_unbias():
    with pytest.raises(ValueError, match="gamma must be in"):
        tailr_unbias(torch.ones(3) / 3, gamma=2.0)
    with pytest.raises(ValueError, match="dim=2 is out of range"):
        tailr_unbias(torch.ones(3) / 3, gamma=0.5, dim=2)
    with pytest.raises(TypeError, match="probs must be"):
        tailr_unbias(torch.ones(3).long(), gamma=0.5)
