"""The divergences are what they say, keep their digits, and R-Drop and VAT have the papers' factors."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn import functional as F

from danlu.losses import multilabel_cross_entropy, rdrop, symmetric_kl, virtual_adversarial_loss

INFINITY = float("inf")
kinds = pytest.mark.parametrize("kind", ["bernoulli", "softmax"])


def pair(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


@kinds
def test_is_the_symmetric_kl(kind):
    s, t = pair(4, 6)
    if kind == "bernoulli":
        first, second = Bernoulli(logits=s), Bernoulli(logits=t)
        expected = (kl_divergence(first, second) + kl_divergence(second, first)).sum(-1)
    else:
        first, second = Categorical(logits=s), Categorical(logits=t)
        expected = kl_divergence(first, second) + kl_divergence(second, first)
    found = symmetric_kl(s, t, kind=kind, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(symmetric_kl(s, t, kind=kind), expected.mean())
    torch.testing.assert_close(symmetric_kl(s, t, kind=kind, reduction="sum"), expected.sum())
    torch.testing.assert_close(symmetric_kl(s, t, kind=kind, normalizer=2), expected.sum() / 2)


@kinds
def test_symmetric_nonnegative_and_zero_at_equal_scores(kind):
    s, t = pair(50, 6)
    forth, back = (symmetric_kl(a, b, kind=kind, reduction="none") for a, b in ((s, t), (t, s)))
    torch.testing.assert_close(forth, back, rtol=1e-14, atol=0)
    assert (forth > 0).all()
    assert (symmetric_kl(s, s, kind=kind, reduction="none") == 0).all()
    shifted = symmetric_kl(s, s + 1, kind=kind)
    # A softmax does not see a shift, a sigmoid does.
    assert (shifted > 0.1) if kind == "bernoulli" else (shifted < 1e-14)


def test_gradient_of_the_bernoulli_divergence():
    s, t = pair(5)
    s.requires_grad_()
    symmetric_kl(s, t).backward()
    p, q = s.detach().sigmoid(), t.sigmoid()
    torch.testing.assert_close(s.grad, p * (1 - p) * (s.detach() - t) + p - q, rtol=1e-13, atol=1e-15)


@kinds
def test_gradcheck(kind):
    s, t = (x.requires_grad_() for x in pair(3, 4))
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    for options in ({}, {"mask": mask}):
        call = lambda a, b, o=options: symmetric_kl(a, b, kind=kind, reduction="none", **o)  # noqa: E731
        assert torch.autograd.gradcheck(call, (s, t), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, (s, t))


def test_extreme_scores():
    for sign in (1, -1):
        value = symmetric_kl(torch.tensor([40.0 * sign]), torch.tensor([41.0 * sign]))
        # The difference of sigmoids as it stands is 0 at 40 and 41 in float32; this one keeps its digits.
        assert value.item() == pytest.approx(math.exp(-40) - math.exp(-41), rel=1e-5)
    for kind in ("bernoulli", "softmax"):
        s, t = torch.tensor([1e4, -1e4], requires_grad=True), torch.tensor([-1e4, 1e4])
        value = symmetric_kl(s, t, kind=kind)
        assert value.item() == pytest.approx(4e4)
        value.backward()
        assert s.grad.isfinite().all()


@kinds
def test_masked_scores(kind):
    """-inf - (-inf) is NaN: the formula as it stands fails on masked scores, values and gradients."""
    s, t = pair(2, 5)
    for x in (s, t):
        x[0, 3:] = -INFINITY
        x[1] = -INFINITY
    assert ((s.sigmoid() - t.sigmoid()) * (s - t)).isnan().any()
    alone = symmetric_kl(s[:1, :3], t[:1, :3], kind=kind)
    mask = torch.tensor([[True, True, True, False, False], [False] * 5])
    for options in ({}, {"mask": mask}):
        for filler in (-INFINITY, 7.0, float("nan")) if options else (-INFINITY,):
            a, b = (x.masked_fill(~mask, filler).requires_grad_() for x in (s, t))
            rows = symmetric_kl(a, b, kind=kind, reduction="none", **options)
            torch.testing.assert_close(rows[0], alone, rtol=1e-14, atol=0)
            assert rows[1] == 0
            rows.sum().backward()
            for x in (a, b):
                assert (x.grad[~mask] == 0).all()
                assert x.grad.isfinite().all()
    lost = s.clone()
    lost[0, 0] = -INFINITY  # masked on one side only: no finite divergence
    assert symmetric_kl(lost, t, kind=kind, reduction="none")[0] == INFINITY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_half_is_computed_in_float32(kind, dtype):
    s, t = pair(3, 8, dtype=dtype)
    value = symmetric_kl(s, t, kind=kind)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), symmetric_kl(s.double(), t.double(), kind=kind), rtol=1e-5, atol=1e-6)


@kinds
def test_vmap(kind):
    s, t = pair(4, 5)
    mapped = torch.func.vmap(lambda a, b: symmetric_kl(a, b, kind=kind))(s, t)
    torch.testing.assert_close(mapped, symmetric_kl(s, t, kind=kind, reduction="none"))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"other": torch.zeros(2)}, ValueError, r"must have one shape \(\.\.\., C\), got \(3,\) and \(2,\)"),
        ({"input": torch.zeros(3).long()}, TypeError, "input must be a floating-point tensor"),
        ({"other": [0.0] * 3}, TypeError, r"other must be a torch\.Tensor"),
        ({"kind": "gauss"}, ValueError, "kind must be one of 'bernoulli', 'softmax'"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "does not broadcast"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    ],
)
def test_bad_input(changes, error, match):
    with pytest.raises(error, match=match):
        symmetric_kl(**{"input": torch.zeros(3), "other": torch.zeros(3), **changes})


@kinds
def test_rdrop_has_the_factors_of_the_paper(kind):
    s, t = pair(4, 6)
    s.requires_grad_()
    target = torch.tensor([[0], [3], [2], [-1]])
    loss = lambda z: multilabel_cross_entropy(z, target, sparse=True)  # noqa: E731
    for weight in (0.0, 0.3, 1.0, 5.0):
        value = rdrop(iter((s, t)).__next__, loss, weight=weight, kind=kind)
        expected = (loss(s) + loss(t)) / 2 + weight / 4 * symmetric_kl(s, t, kind=kind)
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
        # Twice the value is the paper's sum of losses plus alpha times the mean of both divergences.
        paper = loss(s) + loss(t) + weight * 0.5 * symmetric_kl(s, t, kind=kind)
        torch.testing.assert_close(2 * value, paper, rtol=1e-14, atol=0)


def test_rdrop_draws_two_dropouts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 5))
    features, target = torch.randn(16, 8), torch.zeros(16, 1, dtype=torch.int64)
    loss = lambda z: multilabel_cross_entropy(z, target, sparse=True)  # noqa: E731
    with_noise = rdrop(lambda: model(features), loss, weight=1.0) - rdrop(lambda: model(features), loss, weight=0.0)
    assert with_noise.abs() > 1e-3
    model.eval()
    plain = rdrop(lambda: model(features), loss, weight=9.0)
    torch.testing.assert_close(plain, loss(model(features)))
    plain.backward()
    assert model[1].weight.grad is not None


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"forward": 3}, TypeError, "forward must be callable"),
        ({"loss": None}, TypeError, "loss must be callable"),
        ({"weight": -1.0}, ValueError, r"weight must be in \[0"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum'"),
    ],
)
def test_bad_rdrop(changes, error, match):
    with pytest.raises(error, match=match):
        rdrop(**{"forward": lambda: torch.zeros(3), "loss": torch.sum, **changes})


@kinds
def test_vat_finds_the_worst_direction(kind):
    """Of a linear map the worst direction is the first singular vector of its curvature, here known."""
    weight = torch.diag(torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64))[:, [2, 0, 1]]
    model = lambda x: x @ weight.T  # noqa: E731
    x = torch.zeros(4, 3, dtype=torch.float64)
    options = {"kind": kind, "generator": torch.Generator().manual_seed(0), "reduction": "none"}
    found = virtual_adversarial_loss(model, x, epsilon=1e-3, num_iterations=40, **options)
    directions = F.normalize(torch.randn(4000, 3, dtype=torch.float64), dim=-1)
    others = symmetric_kl(
        model(1e-3 * directions), torch.zeros(4000, 3, dtype=torch.float64), kind=kind, reduction="none"
    )
    assert found.min() >= others.max() * (1 - 1e-2)  # of third order in the change
    once = virtual_adversarial_loss(model, x, epsilon=1e-3, **options)
    assert once.mean() > others.mean()


def test_vat_is_the_divergence_from_the_clean_scores():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(5, 6)
    seen = []

    def forward(inputs):
        seen.append(inputs.detach())
        return model(inputs)

    value = virtual_adversarial_loss(forward, x, epsilon=0.5, xi=0.1, num_iterations=2)
    assert len(seen) == 4  # clean, two iterations, the change
    assert torch.equal(seen[0], x)
    for moved in seen[1:3]:
        torch.testing.assert_close((moved - x).norm(dim=-1), torch.full((5,), 0.1), rtol=1e-4, atol=0)
    torch.testing.assert_close((seen[3] - x).norm(dim=-1), torch.full((5,), 0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(value, symmetric_kl(model(seen[3]), model(x).detach()))
    assert all(p.grad is None for p in model.parameters())
    value.backward()
    expected = torch.autograd.grad(symmetric_kl(model(seen[3]), model(x).detach()), model[0].weight)[0]
    torch.testing.assert_close(model[0].weight.grad, expected)


def test_vat_norms_are_per_sample_and_scores_can_be_given():
    x, seen = torch.randn(3, 4, 5), []

    def forward(inputs):
        seen.append(inputs)
        return inputs.sin()

    rows = virtual_adversarial_loss(forward, x, scores=x.sin(), epsilon=2.0, reduction="none")
    assert rows.shape == (3, 4)
    assert len(seen) == 2
    torch.testing.assert_close((seen[1] - x).flatten(1).norm(dim=-1), torch.full((3,), 2.0), rtol=1e-4, atol=0)


def test_vat_where_nothing_depends_on_the_input():
    constant = torch.ones(2, 3)
    assert virtual_adversarial_loss(lambda x: constant, torch.zeros(2, 3)) == 0
    assert virtual_adversarial_loss(lambda x: constant + 0 * x, torch.zeros(2, 3)) == 0


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"forward": 1}, TypeError, "forward must be callable"),
        ({"input": torch.zeros(2, 2).long()}, TypeError, "input must be a floating"),
        ({"input": torch.zeros(2)}, ValueError, r"input must have shape \(B, \.\.\.\)"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be in"),
        ({"xi": -1.0}, ValueError, "xi must be in"),
        ({"num_iterations": 0}, ValueError, "num_iterations must be at least 1"),
    ],
)
def test_bad_vat(changes, error, match):
    with pytest.raises(error, match=match):
        virtual_adversarial_loss(**{"forward": torch.sin, "input": torch.zeros(2, 2), **changes})
