"""What every loss of the family promises: reductions, ignored rows, accumulation, extreme logits, gradients."""

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import danlu.losses as family
from danlu.losses import (
    EMO,
    CrossEntropy,
    EMOLoss,
    GeneralizedCE,
    GradientPenalty,
    MixCE,
    RowFunction,
    TaiLr,
    TaiLrLoss,
    emo_loss,
    entmax_loss,
    generalized_cross_entropy,
    input_gradient_penalty,
    linear_emo_loss,
    linear_loss,
    linear_margin_softmax_loss,
    linear_sparse_softmax_loss,
    linear_tailr_loss,
    margin_softmax_loss,
    mixce_loss,
    parameter_gradient_penalty,
    sparse_softmax_loss,
    sparsemax_loss,
    tailr_loss,
)

CLASSES = 7
HEAD = torch.eye(CLASSES, dtype=torch.float64)
MEANING = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
# Without weights that depend on the logits and are not differentiated, so that gradcheck has something to check.
EMO_OPTIONS = {"cost_embedding": MEANING, "mode": "fixed", "ce_weight": 0.7, "emo_weight": 2.0}


def through_head(function: Callable[..., Tensor], *extra) -> Callable[..., Tensor]:
    """A linear loss as a loss of logits: the head is the identity."""

    def loss(input: Tensor, target: Tensor, **options) -> Tensor:
        return function(input, HEAD.to(input.dtype), target, *extra, chunk_size=3, **options)

    return loss


# Every public loss as a function of (logits, target); row losses through the engine.
CASES = {
    "tailr_loss": tailr_loss,
    "tailr_loss_bounded": partial(tailr_loss, gamma=0.7, min_weight=0.3, label_smoothing=0.1),
    "emo_loss": partial(emo_loss, **EMO_OPTIONS),
    "emo_loss_matrix": partial(emo_loss, cost_matrix=MEANING[:, :1].sub(MEANING[:, 0]).abs(), mode="pure"),
    "generalized_cross_entropy": partial(generalized_cross_entropy, label_smoothing=0.1),
    "linear_emo_loss": partial(through_head(linear_emo_loss), **EMO_OPTIONS, label_smoothing=0.1),
    "mixce_loss": mixce_loss,
    "entmax_loss": entmax_loss,
    "entmax_loss_125": partial(entmax_loss, alpha=1.25),
    "linear_tailr_loss": through_head(linear_tailr_loss),
    "margin_softmax_loss": partial(margin_softmax_loss, temperature=1.0),
    "margin_softmax_loss_arcface": partial(margin_softmax_loss, kind="arcface", temperature=0.5),
    "linear_margin_softmax_loss": through_head(partial(linear_margin_softmax_loss, kind="arcface", temperature=0.5)),
    "sparse_softmax_loss": partial(sparse_softmax_loss, k=3),
    "linear_sparse_softmax_loss": through_head(partial(linear_sparse_softmax_loss, k=3)),
    "sparsemax_loss": sparsemax_loss,
    "linear_loss": through_head(linear_loss, partial(F.cross_entropy, reduction="none")),
    "EMO": through_head(linear_loss, EMO(cost_embedding="head", mode="pure")),
    "GeneralizedCE": through_head(linear_loss, GeneralizedCE()),
    "MixCE": through_head(linear_loss, MixCE(label_smoothing=0.1)),
    "RowFunction": through_head(linear_loss, RowFunction(lambda nll: nll.square())),
    "CrossEntropy": through_head(linear_loss, CrossEntropy(label_smoothing=0.2)),
    "TaiLr": through_head(linear_loss, TaiLr(0.3, min_weight=0.2, label_smoothing=0.1)),
}
losses = pytest.mark.parametrize("loss", CASES.values(), ids=CASES.keys())
NOT_A_LOSS = {
    "EMOLoss": "a module, see below",
    "EntmaxLoss": "a module",
    "MarginSoftmaxLoss": "a module",
    "SparseSoftmaxLoss": "a module",
    "SparsemaxLoss": "a module",
    "LinearStats": "a record",
    "TaiLrLoss": "a module, see below",
    "emo_bound": "its targets are probabilities",
    "tailr_unbias": "a map of probabilities",
    "topk_multilabel_loss": "its targets are sets",
}
# Of sets of labels, or of two passes, so (scores, one class) is not their signature; each has a file of its own.
OTHER_TARGETS = {
    "global_pointer_loss",
    "multilabel_cross_entropy",
    "rdrop",
    "symmetric_kl",
    "virtual_adversarial_loss",
}
# Terms of a loss that look at its gradient, so (scores, targets) is not their signature; decision 8. Each as a function
# of (function that computes the loss, model, inputs).
PENALTIES: dict[str, Callable[[Callable[[], Tensor], nn.Module, Tensor], Tensor]] = {
    "input_gradient_penalty": lambda loss, model, x: input_gradient_penalty(loss(), x),
    "parameter_gradient_penalty": lambda loss, model, x: parameter_gradient_penalty(loss, model)[1],
    "parameter_gradient_penalty_finite_difference": lambda loss, model, x: parameter_gradient_penalty(
        loss, model, method="finite_difference", radius=1e-4, central=True
    )[1],
    "parameter_gradient_penalty_per_sample": lambda loss, model, x: parameter_gradient_penalty(
        loss, model, scope="per_sample"
    )[1],
    "GradientPenalty": lambda loss, model, x: GradientPenalty(model, input=1.0, parameter=1.0)(loss, x) - loss().mean(),
}


def batch(rows: int = 8, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(CLASSES, (rows,), generator=generator)


def test_every_public_name_is_covered():
    assert set(family.__all__) == {name for name in family.__all__ if name in CASES or name in PENALTIES} | (
        set(NOT_A_LOSS) | OTHER_TARGETS
    )
    assert inspect.isclass(family.TaiLrLoss)


@losses
def test_reductions(loss):
    logits, target = batch()
    target[[1, 4]] = -100
    rows = loss(logits, target, reduction="none")
    assert rows.shape == target.shape
    assert (rows[[1, 4]] == 0).all()
    torch.testing.assert_close(loss(logits, target, reduction="sum"), rows.sum())
    torch.testing.assert_close(loss(logits, target), rows.sum() / 6)
    torch.testing.assert_close(loss(logits, target, normalizer=24), rows.sum() / 24)
    torch.testing.assert_close(loss(logits, target, normalizer=torch.tensor(24)), rows.sum() / 24)
    shaped = loss(logits.view(2, 4, -1), target.view(2, 4), reduction="none")
    torch.testing.assert_close(shaped, rows.view(2, 4))


@losses
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_change_nothing_and_get_exact_zeros(loss, reduction):
    logits, target = batch()
    kept = torch.tensor([0, 2, 3, 6])
    target[[1, 4, 5, 7]] = 99
    # What an ignored row holds is nobody's business.
    logits[1], logits[4], logits[5, 0] = float("nan"), float("-inf"), float("inf")
    full = logits.clone().requires_grad_()
    alone = logits[kept].clone().requires_grad_()
    first = loss(full, target, ignore_index=99, reduction=reduction)
    second = loss(alone, target[kept], reduction=reduction)
    torch.testing.assert_close(first[kept] if reduction == "none" else first, second)
    first.sum().backward()
    second.sum().backward()
    torch.testing.assert_close(full.grad[kept], alone.grad)
    assert (full.grad[[1, 4, 5, 7]] == 0).all()


@losses
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_and_no_rows(loss, reduction):
    logits, target = batch()
    logits.requires_grad_()
    out = loss(logits, torch.full_like(target, -100), reduction=reduction)
    assert (out == 0).all()
    out.sum().backward()
    assert (logits.grad == 0).all()
    empty = loss(logits[:0], target[:0], reduction=reduction)
    assert empty.sum() == 0
    empty.sum().backward()


@losses
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weights(loss, reduction):
    """They multiply losses and gradients of rows; the denominator stays; ignored rows stay 0 whatever their weight."""
    logits, target = batch()
    target[[1, 4]] = -100
    weight = torch.rand(8, dtype=torch.float64)
    weight[4] = float("nan")
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = loss(mine, target, token_weight=weight, reduction=reduction)
    rows = loss(theirs, target, reduction="none") * weight.nan_to_num(7.0)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 6}[reduction]
    torch.testing.assert_close(value, expected)
    cotangent = torch.randn_like(expected)
    value.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(mine.grad, theirs.grad)
    shaped = loss(logits.view(2, 4, -1), target.view(2, 4), token_weight=weight.view(2, 4), reduction=reduction)
    torch.testing.assert_close(shaped, value.detach().view(2, 4) if reduction == "none" else value.detach())


@losses
def test_accumulation_equals_one_batch(loss):
    logits, target = batch(12)
    target[[0, 7]] = -100
    whole = logits.clone().requires_grad_()
    loss(whole, target).backward()
    parts = logits.clone().requires_grad_()
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        loss(parts[rows], target[rows], normalizer=10).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@losses
def test_normalizer_as_a_tensor(loss):
    """Any shape with one element and any dtype; 0, the count of a step without tokens, is no division by zero."""
    logits, target = batch(dtype=torch.float32)
    expected = loss(logits, target, normalizer=24)
    for normalizer in (torch.tensor([24]), torch.tensor(24.0, dtype=torch.float64)):
        value = loss(logits, target, normalizer=normalizer)
        assert value.shape == ()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected)
    logits.requires_grad_()
    value = loss(logits, torch.full_like(target, -100), normalizer=torch.tensor(0))
    value.backward()
    assert value == 0
    assert (logits.grad == 0).all()
    assert loss(logits, target, normalizer=torch.tensor(0)).isinf()


@losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_finite_at_extreme_logits(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0, 0, 0, 0, 0]] * 2, dtype=dtype, requires_grad=True)
    out = loss(logits, torch.tensor([0, 1]))
    out.backward()
    assert out.isfinite()
    assert logits.grad.isfinite().all()


@losses
def test_gradcheck(loss):
    logits, target = batch(5)
    logits.requires_grad_()
    target[2] = -100
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda z, r=reduction: loss(z, target, reduction=r), logits)


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_agrees_or_is_refused(name):
    """A directional derivative is the gradient times the direction, at NaN in ignored rows as well."""
    logits, target = batch(5)
    target[2] = -100
    logits[2] = float("nan")
    direction = torch.randn_like(logits)

    def loss(z: Tensor) -> Tensor:
        return CASES[name](z, target)

    # The engine of linear heads and the rows of entmax have reverse mode only.
    if name.startswith(("linear", "entmax", "sparsemax")) or name[0].isupper():
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative; take"):
            torch.func.jvp(loss, (logits,), (direction,))
        return
    found = torch.func.jvp(loss, (logits,), (direction,))[1]
    torch.testing.assert_close(found, (torch.func.grad(loss)(logits) * direction).sum())
    rows = torch.func.hessian(loss)(logits)
    torch.testing.assert_close(rows, torch.func.jacrev(torch.func.grad(loss))(logits))


def test_masked_logits():
    """A logit of -inf is as good as absent; the linear losses have the same test with a bias of -inf."""
    logits, target = batch(1)
    target[0] = 2
    expected = tailr_loss(torch.cat((logits[:, :4], logits[:, 5:]), 1), target)
    logits[0, 4] = float("-inf")
    logits.requires_grad_()
    value = tailr_loss(logits, target)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 4] == 0
    assert tailr_loss(torch.full((1, 4), float("-inf")), torch.tensor([0])).isnan()


@losses
def test_nan_stays_in_its_row(loss):
    logits, target = batch()
    logits[3, 1] = float("nan")
    logits.requires_grad_()
    rows = loss(logits, target, reduction="none")
    others = [0, 1, 2, 4, 5, 6, 7]
    assert rows[3].isnan()
    assert rows[others].isfinite().all()
    rows.sum().backward()
    assert logits.grad[others].isfinite().all()


@losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_float32(loss, dtype):
    logits, target = batch(dtype=dtype)
    out = loss(logits, target)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), loss(logits.double(), target), rtol=1e-5, atol=1e-6)
    logits.requires_grad_()
    loss(logits, target).backward()
    assert logits.grad.dtype == dtype


@losses
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"target": torch.zeros(8, dtype=torch.int32)}, TypeError, "target must be int64"),
        ({"target": torch.zeros(7, dtype=torch.int64)}, ValueError, r"got input \(8, 7\) and target \(7,\)"),
        ({"target": torch.full((8,), 7)}, ValueError, r"target must be in \[0, 7\) or ignore_index=-100, got 7"),
        ({"target": torch.full((8,), -1)}, ValueError, "got -1"),
        ({"target": [0] * 8}, TypeError, r"target must be a torch\.Tensor"),
        ({"input": torch.zeros(8, 7).long()}, TypeError, "input must be a floating-point tensor"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        ({"normalizer": 0.0}, ValueError, "normalizer must be in"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer must be a number or a tensor with one element"),
        ({"normalizer": 3.0, "reduction": "sum"}, ValueError, "normalizer replaces the denominator"),
        ({"ignore": 3}, TypeError, "ignore"),
        ({"token_weight": torch.ones(8).long()}, TypeError, "token_weight must be a floating-point tensor"),
        ({"token_weight": torch.ones(7)}, ValueError, r"token_weight must have the shape of target \(8,\), got \(7,\)"),
        ({"token_weight": torch.ones(8, requires_grad=True)}, ValueError, "token_weight is not differentiated"),
    ],
)
def test_bad_input(loss, change, error, match):
    logits, target = batch()
    with pytest.raises(error, match=match):
        loss(**{"input": logits, "target": target, **change})


@losses
def test_looking_for_wrong_targets_changes_nothing(loss):
    logits, target = batch()
    assert torch.equal(loss(logits, target, check=True), loss(logits, target))
    with pytest.raises(ValueError, match=r"target must be in \[0, 7\)"):
        loss(logits, target + CLASSES, check=True)


@pytest.mark.gpu
def test_targets_on_the_gpu_are_looked_at_on_demand():
    logits, target = batch()
    with pytest.raises(ValueError, match=r"target must be in \[0, 7\)"):
        sparse_softmax_loss(logits.cuda(), (target + CLASSES).cuda(), k=3, check=True)


def test_module_equals_function():
    module: nn.Module = TaiLrLoss(0.3, min_weight=0.2, label_smoothing=0.1, ignore_index=3, reduction="sum")
    logits, target = batch()
    options = {"gamma": 0.3, "min_weight": 0.2, "label_smoothing": 0.1, "ignore_index": 3, "reduction": "sum"}
    assert torch.equal(module(logits, target), tailr_loss(logits, target, **options))
    for option in ("gamma=0.3, min_weight=0.2, label_smoothing=0.1", "ignore_index=3, reduction='sum'"):
        assert option in repr(module)
    assert module.state_dict() == {}
    module.gamma = 0.9
    assert torch.equal(module(logits, target), tailr_loss(logits, target, **{**options, "gamma": 0.9}))
    assert torch.equal(TaiLrLoss()(logits, target, normalizer=5), tailr_loss(logits, target, normalizer=5))


def test_emo_module_equals_function():
    options = {"mode": "ce_anchored", "max_ratio": 3.0, "label_smoothing": 0.1, "ignore_index": 3, "reduction": "sum"}
    module: nn.Module = EMOLoss(MEANING, **options)
    logits, target = batch()
    torch.testing.assert_close(module(logits, target), emo_loss(logits, target, cost_embedding=MEANING, **options))
    assert "mode='ce_anchored'" in repr(module)
    assert "max_ratio=3.0" in repr(module)
    assert module.state_dict() == {}
    weight = torch.rand(8, dtype=torch.float64)
    value = EMOLoss(MEANING)(logits, target, normalizer=5, token_weight=weight)
    expected = emo_loss(logits, target, cost_embedding=MEANING, normalizer=5, token_weight=weight)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
def test_penalties_are_squares_of_gradients(penalty):
    """A non-negative scalar, quadratic in the loss, differentiable in the parameters, and without side effects."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    _, target = batch()
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)

    def scaled(factor: float) -> Callable[[], Tensor]:
        return lambda: factor * F.cross_entropy(model(x), target, reduction="none")

    value = penalty(scaled(1.0), model, x)
    assert value.shape == ()
    assert value > 0
    assert all(tensor.grad is None for tensor in (x, *model.parameters()))
    torch.testing.assert_close(penalty(scaled(3.0), model, x), 9 * value)
    torch.testing.assert_close(penalty(lambda: scaled(1.0)().mean(), model, x), value)
    assert penalty(scaled(0.0), model, x) == 0
    weight = model[0].weight
    grad = torch.autograd.grad(value, weight)[0]
    step = torch.zeros_like(weight)
    step[2, 1] = 1e-5
    with torch.no_grad():
        weight += step
    ahead = penalty(scaled(1.0), model, x)
    with torch.no_grad():
        weight -= 2 * step
    slope = (ahead - penalty(scaled(1.0), model, x)).detach() / 2e-5
    torch.testing.assert_close(grad[2, 1], slope, rtol=1e-5, atol=1e-8)
