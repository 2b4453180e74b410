"""What is true of margin softmax."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from danlu.losses import MarginSoftmaxLoss, linear_margin_softmax_loss, margin_softmax_loss

KINDS = ["cosface", "arcface"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosines(rows: int = 6, classes: int = 5) -> Tensor:
    return F.linear(F.normalize(draw(rows, 8)), F.normalize(draw(classes, 8, seed=1)))


TARGET = torch.tensor([0, 1, 2, 3, 4, 0])


def by_hand(c: Tensor, target: int, kind: str, margin: float, temperature: float) -> Tensor:
    angle = torch.arccos(c[target])
    if kind == "cosface":
        harder = c[target] - margin
    elif angle + margin <= math.pi:
        harder = torch.cos(angle + margin)
    else:
        harder = c[target] - margin * math.sin(margin)
    top = torch.exp(harder / temperature)
    rest = sum(torch.exp(one / temperature) for j, one in enumerate(c) if j != target)
    return -torch.log(top / (top + rest))


@pytest.mark.parametrize("kind", KINDS)
def test_definition(kind):
    c = cosines()
    c[0, 0] = -0.95
    rows = margin_softmax_loss(c, TARGET, kind=kind, margin=0.4, temperature=0.2, reduction="none")
    for row, line, target in zip(rows, c, TARGET, strict=True):
        torch.testing.assert_close(row, by_hand(line, int(target), kind, 0.4, 0.2))


def test_defaults_and_no_margin():
    c = cosines()
    default = margin_softmax_loss(c, TARGET)
    torch.testing.assert_close(default, margin_softmax_loss(c, TARGET, margin=0.35, temperature=1 / 30))
    default = margin_softmax_loss(c, TARGET, kind="arcface")
    torch.testing.assert_close(default, margin_softmax_loss(c, TARGET, kind="arcface", margin=0.5))
    for kind in KINDS:
        plain = margin_softmax_loss(c, TARGET, kind=kind, margin=0.0, temperature=0.1)
        torch.testing.assert_close(plain, F.cross_entropy(c / 0.1, TARGET))


@pytest.mark.parametrize("kind", KINDS)
def test_more_margin_is_more_loss_and_the_target_is_monotone(kind):
    c = cosines()
    values = [float(margin_softmax_loss(c, TARGET, kind=kind, margin=m, temperature=0.3)) for m in (0.0, 0.2, 0.4)]
    assert values == sorted(values)
    line = torch.linspace(-1, 1, 401, dtype=torch.float64)
    scores = torch.stack([line, torch.zeros_like(line)], 1)
    rows = margin_softmax_loss(scores, torch.zeros(401).long(), kind=kind, temperature=0.5, reduction="none")
    assert (rows.diff() < 0).all()


def test_ends_of_the_interval_are_safe():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        beyond = 1 + 4 * torch.finfo(dtype).eps
        c = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [beyond, 0.0], [-beyond, 0.0]], dtype=dtype, requires_grad=True)
        loss = margin_softmax_loss(c, torch.zeros(4).long(), kind="arcface")
        loss.backward()
        assert loss.isfinite()
        assert c.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind):
    c = cosines(3).requires_grad_()
    target = TARGET[:3]

    def loss(c):
        return margin_softmax_loss(c, target, kind=kind, temperature=0.5)

    assert torch.autograd.gradcheck(loss, c)
    assert torch.autograd.gradgradcheck(loss, c)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_linear_form_equals_the_dense_one(kind, chunk_size):
    features, vectors = draw(6, 8).requires_grad_(), draw(5, 8, seed=1).requires_grad_()
    target = TARGET.clone()
    target[2] = -100
    for reduction in ("mean", "none"):
        dense = margin_softmax_loss(
            F.linear(F.normalize(features), F.normalize(vectors)), target, kind=kind, reduction=reduction
        )
        fused = linear_margin_softmax_loss(
            features, vectors, target, kind=kind, reduction=reduction, chunk_size=chunk_size
        )
        torch.testing.assert_close(fused, dense)
        weights = torch.linspace(0.5, 2, dense.numel(), dtype=torch.float64).view(dense.shape)
        grads = [torch.autograd.grad((value * weights).sum(), (features, vectors)) for value in (dense, fused)]
        for first, second in zip(*grads, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_features_of_an_ignored_row_reach_no_gradient(kind):
    features, vectors, target = draw(6, 8), draw(5, 8, seed=1).requires_grad_(), TARGET.clone()
    target[2] = -100
    expected = linear_margin_softmax_loss(features, vectors, target, kind=kind)
    features[2] = math.nan
    features.requires_grad_()
    found = linear_margin_softmax_loss(features, vectors, target, kind=kind)
    torch.testing.assert_close(found, expected)
    (by_features, by_vectors) = torch.autograd.grad(found, (features, vectors))
    assert by_features.isfinite().all()
    assert (by_features[2] == 0).all()
    torch.testing.assert_close(by_vectors, torch.autograd.grad(expected, vectors)[0])


def test_only_directions_count():
    features, vectors = draw(6, 8), draw(5, 8, seed=1)
    value = linear_margin_softmax_loss(features, vectors, TARGET)
    torch.testing.assert_close(linear_margin_softmax_loss(7 * features, 0.1 * vectors, TARGET), value)
    zero = linear_margin_softmax_loss(torch.zeros(1, 8).double(), vectors, TARGET[:1], margin=0.0)
    torch.testing.assert_close(zero, torch.tensor(math.log(5)).double())


def test_module_learns_class_vectors():
    torch.manual_seed(0)
    module = MarginSoftmaxLoss(8, 5, kind="arcface", temperature=0.2, ignore_index=7, reduction="sum")
    features = draw(6, 8).float()
    expected = linear_margin_softmax_loss(
        features, module.weight, TARGET, kind="arcface", margin=0.5, temperature=0.2, reduction="sum"
    )
    torch.testing.assert_close(module(features, TARGET), expected)
    assert "num_features=8, num_classes=5, kind='arcface', margin=0.5, temperature=0.2" in repr(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    before = float(module(features, TARGET).detach())
    for _ in range(30):
        optimizer.zero_grad()
        module(features, TARGET).backward()
        optimizer.step()
    assert float(module(features, TARGET).detach()) < 0.8 * before


def test_token_weight():
    c = cosines()
    weight = torch.tensor([1.0, 0.0, 5.0, 2.0, 1.0, 1.0])
    rows = margin_softmax_loss(c, TARGET, reduction="none")
    torch.testing.assert_close(margin_softmax_loss(c, TARGET, token_weight=weight, reduction="none"), rows * weight)
    for kind in KINDS:
        linear = linear_margin_softmax_loss(draw(6, 8), draw(5, 8, seed=1), TARGET, kind=kind, token_weight=weight)
        dense = margin_softmax_loss(c, TARGET, kind=kind, token_weight=weight)
        torch.testing.assert_close(linear, dense)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"kind": "sphereface"}, "kind must be one of 'cosface', 'arcface', got 'sphereface'"),
        ({"margin": -0.1}, r"margin must be in \[0, 2\]"),
        ({"kind": "arcface", "margin": 1.6}, r"margin must be in \[0, 1\.5708\]"),
        ({"temperature": 0.0}, r"temperature must be in \(0, inf\)"),
    ],
)
def test_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        margin_softmax_loss(cosines(), TARGET, **kwargs)
    with pytest.raises(ValueError, match=match):
        linear_margin_softmax_loss(draw(6, 8), draw(5, 8), TARGET, **kwargs)
    with pytest.raises(ValueError, match=match):
        MarginSoftmaxLoss(8, 5, **kwargs)


def test_errors_of_the_linear_form():
    with pytest.raises(TypeError, match="linear_weight must be a torch"):
        linear_margin_softmax_loss(draw(6, 8), [0.0], TARGET)
    with pytest.raises(ValueError, match=r"target must be in \[0, 4\)"):
        linear_margin_softmax_loss(draw(6, 8), draw(4, 8), TARGET)
    features = draw(6, 8).requires_grad_()
    loss = linear_margin_softmax_loss(features, draw(5, 8), TARGET)
    (grad,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.square().sum().backward()
