"""The linear head with a loss: equal to the unfused computation, in any chunks, and never holding the logits."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from danlu.losses import (
    EMO,
    CrossEntropy,
    GeneralizedCE,
    MixCE,
    RowFunction,
    TaiLr,
    emo_loss,
    generalized_cross_entropy,
    linear_emo_loss,
    linear_loss,
    linear_tailr_loss,
    mixce_loss,
    tailr_loss,
)
from danlu.losses._linear_chunks import bytes_of_logit, default_chunk

ROWS, FEATURES, CLASSES = 65, 6, 11

MEANING = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
FIXED = {"mode": "fixed", "ce_weight": 0.3, "emo_weight": 2.0}
# A loss for the engine, and the same loss of logits.
LOSSES = {
    "emo": (EMO(cost_embedding=MEANING), partial(emo_loss, cost_embedding=MEANING)),
    "emo_fixed": (
        EMO(cost_embedding=MEANING, **FIXED, label_smoothing=0.2),
        partial(emo_loss, cost_embedding=MEANING, **FIXED, label_smoothing=0.2),
    ),
    "emo_matrix": (
        EMO(cost_matrix=MEANING.abs() @ MEANING.abs().T, mode="pure"),
        partial(emo_loss, cost_matrix=MEANING.abs() @ MEANING.abs().T, mode="pure"),
    ),
    "generalized": (GeneralizedCE(0.6, 0.1), partial(generalized_cross_entropy, q=0.6, label_smoothing=0.1)),
    "mixce": (MixCE(0.3), partial(mixce_loss, eta=0.3)),
    "function": (RowFunction(lambda nll: 1 - torch.exp(-nll)), partial(tailr_loss, gamma=1.0)),
    "cross_entropy": (CrossEntropy(), F.cross_entropy),
    "smoothed": (CrossEntropy(0.2), partial(F.cross_entropy, label_smoothing=0.2)),
    "tailr": (TaiLr(0.3), partial(tailr_loss, gamma=0.3)),
    "tailr_bounded": (
        TaiLr(0.7, min_weight=0.4, label_smoothing=0.1),
        partial(tailr_loss, gamma=0.7, min_weight=0.4, label_smoothing=0.1),
    ),
    "tailr_tensor": (TaiLr(torch.tensor(0.4, dtype=torch.float64)), partial(tailr_loss, gamma=0.4)),
    "callable": (partial(tailr_loss, gamma=0.2, reduction="none"), partial(tailr_loss, gamma=0.2)),
}


def problem(
    rows: int = ROWS, *, bias: bool = True, ignored: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[Tensor | None], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    target = torch.randint(CLASSES, (rows,), generator=generator)
    if ignored:
        target[::5] = -100
    return [draw(rows, FEATURES), draw(CLASSES, FEATURES), draw(CLASSES) if bias else None], target


def gradients(value: Tensor, inputs: list[Tensor | None], cotangent: Tensor | None = None) -> list[Tensor]:
    return list(torch.autograd.grad(value, [x for x in inputs if x is not None], cotangent))


def unfused(loss, inputs, target, **options) -> Tensor:
    return loss(F.linear(*inputs), target, **options)


def normalized_cross_entropy(plain, logits, target, *, reduction="mean", normalizer=None) -> Tensor:
    if normalizer is None:
        return plain(logits, target, reduction=reduction)
    return plain(logits, target, reduction="sum") / normalizer


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_size", [1, 7, 64, ROWS, 1000, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"reduction": "mean"}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 19}],
    ids=["mean", "sum", "none", "normalizer"],
)
def test_equals_the_unfused_loss(name, chunk_size, bias, options):
    row_loss, plain = LOSSES[name]
    inputs, target = problem(bias=bias)
    fused = linear_loss(*inputs[:2], target, row_loss, linear_bias=inputs[2], chunk_size=chunk_size, **options)
    if plain is F.cross_entropy or getattr(plain, "func", None) is F.cross_entropy:
        plain = partial(normalized_cross_entropy, plain)
    expected = unfused(plain, inputs, target, **options)
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)
    # Random upstream weights per row: a known weak spot of fused losses.
    cotangent = torch.randn_like(expected)
    for mine, theirs in zip(gradients(fused, inputs, cotangent), gradients(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


LOW = {
    "cross_entropy": (lambda h, w, y, **o: linear_loss(h, w, y, CrossEntropy(), **o), F.cross_entropy),
    "tailr": (linear_tailr_loss, tailr_loss),
    "emo": (partial(linear_emo_loss, cost_embedding="head", max_ratio=3.0), None),
}


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("chunk_size", [1, 7, 64, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_unfused_loss_in_low_precision(name, chunk_size, dtype, bias, tied):
    """Values to 1e-6 and gradients to 1e-5 of the float64 computation; half gradients to their own rounding."""
    fused, plain = LOW[name]
    inputs, target = problem(bias=bias, dtype=dtype)
    weight = torch.rand(ROWS, generator=torch.Generator().manual_seed(5))
    tokens = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(6))
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]

    def states(tensors):
        return tensors[0] + F.embedding(tokens, tensors[1]) if tied else tensors[0]

    value = fused(states(inputs), inputs[1], target, linear_bias=inputs[2], chunk_size=chunk_size, token_weight=weight)
    # The sum of states is rounded once, as it is in the model.
    hidden = states(exact)
    hidden = hidden + (states(inputs).detach().double() - hidden).detach()
    logits = F.linear(hidden, *exact[1:])
    if plain is None:
        rows = emo_loss(logits, target, cost_embedding=exact[1], max_ratio=3.0, reduction="none")
    else:
        rows = plain(logits, target, reduction="none")
    expected = (rows * weight.double()).sum() / (target != -100).sum()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients(value, inputs), gradients(expected, exact), strict=True):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error <= (1e-5 if dtype == torch.float32 else 5e-3)


# What changes the logits before the softmax.
TRANSFORMS = {
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "margin": {"target_shift": 0.7},
    "all": {"logit_scale": 2.5, "softcap": 3.0, "target_shift": 0.4, "label_smoothing": 0.3},
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scale_softcap_margin_and_smoothing(name, transform, reduction):
    row_loss, plain = LOSSES[name]
    options = dict(TRANSFORMS[transform])
    if name in ("callable",) and "label_smoothing" in options:
        with pytest.raises(ValueError, match="label_smoothing belongs to row losses"):
            linear_loss(*problem()[0][:2], problem()[1], row_loss, **options)
        return
    inputs, target = problem()
    margins = torch.rand(ROWS, dtype=torch.float64)
    if transform == "all":
        options["target_shift"] = margins
    fused = linear_loss(
        *inputs[:2], target, row_loss, linear_bias=inputs[2], chunk_size=16, reduction=reduction, **options
    )
    z = options.get("logit_scale", 1.0) * F.linear(*inputs)
    if "softcap" in options:
        z = options["softcap"] * (z / options["softcap"]).tanh()
    if "target_shift" in options:
        shift = torch.as_tensor(options["target_shift"], dtype=torch.float64).expand(ROWS)
        z = z - shift[:, None] * F.one_hot(target.clamp(min=0), CLASSES)
    if "label_smoothing" in options:
        plain = partial(plain, label_smoothing=options["label_smoothing"])
    expected = plain(z, target, reduction=reduction)
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    for mine, theirs in zip(gradients(fused, inputs, cotangent), gradients(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "emo", "callable"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics(name, reduction):
    inputs, target = problem(60)
    shape = (3, 20)
    value, stats = linear_loss(
        inputs[0].view(*shape, -1),
        inputs[1],
        target.view(shape),
        LOSSES[name][0],
        linear_bias=inputs[2],
        chunk_size=16,
        reduction=reduction,
        target_shift=0.5,
        return_stats=True,
    )
    plain = linear_loss(
        *inputs[:2],
        target,
        LOSSES[name][0],
        linear_bias=inputs[2],
        chunk_size=16,
        reduction=reduction,
        target_shift=0.5,
    )
    assert torch.equal(value.view(plain.shape), plain)
    logits = F.linear(*inputs).detach()
    shifted = logits - 0.5 * F.one_hot(target.clamp(min=0), CLASSES)
    nll = F.cross_entropy(shifted, target, reduction="none")
    kept = target != -100
    torch.testing.assert_close(stats.nll, nll.view(shape))
    torch.testing.assert_close(stats.target_probability, ((-nll).exp() * kept).view(shape))
    assert torch.equal(stats.correct, (logits.argmax(1) == target).view(shape))
    assert not any(part.requires_grad for part in stats if part is not None)
    if name == "emo":
        cost = emo_loss(shifted, target, cost_embedding=MEANING, mode="pure", reduction="none")
        torch.testing.assert_close(stats.cost, cost.view(shape))
    else:
        assert stats.cost is None
    gradients(value, inputs, torch.ones_like(value))


def test_memory_budget_chooses_the_chunk():
    hidden, weight = torch.randn(64, 4), torch.randn(100, 4)
    target = torch.randint(100, (64,))
    for loss, budget, rows in (
        (CrossEntropy(), 4 * 100 * 20, 16),
        (EMO(cost_embedding="head"), 4 * 100 * 20, 8 + 8),
        (CrossEntropy(), 1, 1),
    ):
        with torch.no_grad(), _Counter() as counter:
            value = linear_loss(hidden, weight, target, loss, memory_budget=budget)
        assert counter.largest == max(100, rows) * (rows if rows > 4 else 4)
        torch.testing.assert_close(value, linear_loss(hidden, weight, target, loss))


@pytest.mark.parametrize(
    ("loss", "dtype", "expected"),
    [
        (CrossEntropy(), torch.float32, 4),
        (CrossEntropy(), torch.float64, 8),
        (CrossEntropy(), torch.bfloat16, 4 + 2),
        (EMO(cost_embedding="head"), torch.float64, 16),
        (EMO(cost_embedding="head"), torch.float16, 8 + 2),
        (EMO(cost_matrix=torch.eye(5)), torch.float32, 4),
        (EMO(cost_embedding=torch.eye(5), cost_cache=True), torch.float32, 4),
        (F.cross_entropy, torch.float32, 8),
    ],
)
def test_bytes_of_a_chunk(loss, dtype, expected):
    assert bytes_of_logit(loss, dtype) == expected


def test_memory_budget_holds_in_float64():
    """Numbers of 8 bytes make a chunk of half as many rows."""
    (hidden, weight, _), target = problem(64)
    budget = 8 * CLASSES * 8
    with torch.no_grad(), _Counter() as counter:
        value = linear_loss(hidden, weight, target, CrossEntropy(), memory_budget=budget)
    assert counter.products == 8
    torch.testing.assert_close(value, linear_loss(hidden, weight, target, CrossEntropy()))


def test_distributed_tensors_are_refused():
    class DTensor(Tensor):
        pass

    sharded = torch.zeros(11, 6).as_subclass(DTensor)
    with pytest.raises(TypeError, match="linear_weight is a sharded DTensor; compute the loss inside the forward"):
        linear_tailr_loss(torch.zeros(8, 6), sharded, torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("name", ["cross_entropy", "tailr_bounded", "emo_fixed", "callable"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_all_rows_ignored(name, dtype, reduction, bias):
    inputs, target = problem(bias=bias, dtype=dtype)
    options = {"linear_bias": inputs[2], "reduction": reduction, "chunk_size": 7}
    value = linear_loss(*inputs[:2], torch.full_like(target, -100), LOSSES[name][0], **options)
    assert (value == 0).all()
    assert all((grad == 0).all() for grad in gradients(value.sum(), inputs))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_cross_entropy_equals_torch(label_smoothing):
    inputs, target = problem()
    mine = linear_loss(*inputs[:2], target, CrossEntropy(label_smoothing), linear_bias=inputs[2], chunk_size=8)
    torch.testing.assert_close(mine, F.cross_entropy(F.linear(*inputs), target, label_smoothing=label_smoothing))
    if hasattr(F, "linear_cross_entropy"):
        theirs = F.linear_cross_entropy(
            *inputs[:2], target, linear_bias=inputs[2], label_smoothing=label_smoothing, ignore_index=-100
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [(True, False), (False, True), (True, True)])
def test_frozen_parts_get_no_gradient(frozen):
    (hidden, weight, bias), target = problem()
    reference = gradients(linear_tailr_loss(hidden, weight, target, linear_bias=bias), [hidden, weight, bias])
    hidden.requires_grad_(not frozen[0])
    weight.requires_grad_(not frozen[1])
    value = linear_tailr_loss(hidden, weight, target, linear_bias=bias)
    value.backward()
    for tensor, expected, is_frozen in zip((hidden, weight), reference, frozen, strict=False):
        assert tensor.grad is None if is_frozen else torch.equal(tensor.grad, expected)
    torch.testing.assert_close(bias.grad, reference[2])


def test_no_gradient_work_without_gradients():
    inputs, target = problem()
    expected = linear_tailr_loss(*inputs[:2], target)
    with torch.no_grad():
        value = linear_tailr_loss(*inputs[:2], target)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    with torch.no_grad(), _Counter() as counter:
        linear_tailr_loss(*inputs[:2], target, chunk_size=16)
    assert counter.products == 5


def test_tied_weight_gets_both_gradients():
    (_, weight, _), target = problem(bias=False)
    tokens = torch.randint(CLASSES, (ROWS,))
    linear_tailr_loss(F.embedding(tokens, weight), weight, target, chunk_size=16).backward()
    mine, weight.grad = weight.grad, None
    tailr_loss(F.linear(F.embedding(tokens, weight), weight), target).backward()
    torch.testing.assert_close(mine, weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_through_a_retained_graph(reduction):
    (hidden, weight, bias), target = problem()
    value = linear_tailr_loss(hidden, weight, target, linear_bias=bias, reduction=reduction, chunk_size=16).sum()
    value.backward(retain_graph=True)
    first = [x.grad.clone() for x in (hidden, weight, bias)]
    (3 * value).backward()
    for tensor, once in zip((hidden, weight, bias), first, strict=True):
        torch.testing.assert_close(tensor.grad, 4 * once)


def test_upstream_factor_and_shapes():
    (hidden, weight, bias), target = problem(60)
    flat = linear_tailr_loss(hidden, weight, target, linear_bias=bias)
    shaped = linear_tailr_loss(hidden.view(3, 4, 5, -1), weight, target.view(3, 4, 5), linear_bias=bias)
    assert torch.equal(flat, shaped)
    (65536 * flat).backward()
    expected = gradients(unfused(tailr_loss, [hidden, weight, bias], target), [hidden, weight, bias])
    for tensor, grad in zip((hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(tensor.grad, 65536 * grad)
    strided = hidden.detach().t().contiguous().t()
    torch.testing.assert_close(linear_tailr_loss(strided, weight, target, linear_bias=bias), flat)


@pytest.mark.parametrize(
    "loss", [CrossEntropy(0.1), TaiLr(0.3, min_weight=0.2), LOSSES["emo_fixed"][0], LOSSES["callable"][0]]
)
def test_gradcheck_and_refused_second_derivative(loss):
    inputs, target = problem(5)

    def fused(hidden, weight, bias, reduction="mean"):
        return linear_loss(hidden, weight, target, loss, linear_bias=bias, chunk_size=2, reduction=reduction)

    assert torch.autograd.gradcheck(fused, inputs)
    assert torch.autograd.gradcheck(partial(fused, reduction="none"), inputs)
    (grad,) = torch.autograd.grad(fused(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), inputs[1])
    # Also in company: a penalty on the gradient must not pass for a constant.
    value = fused(*inputs)
    (grad,) = torch.autograd.grad(value, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (value + grad.square().sum()).backward()


# Forward mode makes torch compile decompositions of its own.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("loss", [TaiLr(0.3), LOSSES["callable"][0]], ids=["row_loss", "callable"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_function_transforms(loss, reduction):
    """Reverse mode works; everything else says so."""
    (hidden, weight, bias), target = problem(9)
    primals = tuple(x.detach() for x in (hidden, weight, bias))
    factors = torch.rand(9, dtype=torch.float64)

    def fused(h, w, b):
        value = linear_loss(h, w, target, loss, linear_bias=b, chunk_size=4, reduction=reduction)
        return (value * factors).sum()

    def plain(h, w, b):
        gamma = 0.3 if isinstance(loss, TaiLr) else 0.2
        return (tailr_loss(F.linear(h, w, b), target, gamma=gamma, reduction=reduction) * factors).sum()

    expected = torch.func.grad(plain, (0, 1, 2))(*primals)
    for mine, theirs in zip(torch.func.grad(fused, (0, 1, 2))(*primals), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.grad(fused, 1)(*primals), expected[1], rtol=1e-12, atol=1e-12)
    value, pull = torch.func.vjp(fused, *primals)
    for _ in range(2):
        torch.testing.assert_close(pull(2 * torch.ones_like(value))[0], 2 * expected[0], rtol=1e-12, atol=1e-12)

    def value_beside_a_gradient(function, w):
        return torch.func.grad_and_value(lambda h: function(h, w, primals[2]))(primals[0])[1]

    # The first backward of two nested transforms takes the prepared gradients, the other must not rely on them.
    mine = torch.func.grad(partial(value_beside_a_gradient, fused))(primals[1])
    torch.testing.assert_close(mine, expected[1], rtol=1e-12, atol=1e-12)

    def penalty(w):
        return torch.func.grad(fused)(primals[0], w, primals[2]).square().sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(penalty)(primals[1])
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty(weight).backward()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(fused, primals, primals)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.hessian(fused)(*primals)
    with pytest.raises(RuntimeError, match="under vmap"):
        torch.func.vmap(lambda h: fused(h, *primals[1:]))(primals[0][None])
    with pytest.raises(RuntimeError, match="under vmap"):
        torch.func.jacrev(fused)(*primals)


def test_a_loss_with_trainable_tensors_of_its_own_is_refused():
    """They would get no gradient."""
    inputs, target = problem()
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def scaled(logits, classes):
        return F.cross_entropy(logits * log_scale.exp(), classes, reduction="none")

    with pytest.raises(ValueError, match=r"loss may differentiate the logits only, .* shape \(\)"):
        linear_loss(*inputs[:2], target, scaled)
    with pytest.raises(ValueError, match="loss may differentiate the logits only"):
        linear_loss(*inputs[:2], target, scaled, reduction="none").sum().backward()
    with torch.no_grad():
        expected = linear_loss(*inputs[:2], target, CrossEntropy())
        torch.testing.assert_close(linear_loss(*inputs[:2], target, scaled), expected)


def test_accumulation_with_a_common_denominator():
    inputs, target = problem(64)
    kept = int((target != -100).sum())
    whole = gradients(linear_tailr_loss(*inputs[:2], target), inputs[:2])
    total = [torch.zeros_like(x) for x in inputs[:2]]
    for start in range(0, 64, 16):
        rows = slice(start, start + 16)
        value = linear_tailr_loss(inputs[0][rows], inputs[1], target[rows], normalizer=torch.tensor(kept))
        for into, grad in zip(total, gradients(value, inputs[:2]), strict=True):
            into += grad
    for mine, theirs in zip(total, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_masked_classes_and_nan_rows():
    (hidden, weight, bias), target = problem(ignored=False)
    bias = bias.detach().clone()
    bias[3] = float("-inf")
    target[target == 3] = 4
    rest = torch.arange(CLASSES) != 3
    renumbered = target - (target > 3).long()
    value = linear_tailr_loss(hidden, weight, target, linear_bias=bias, chunk_size=16)
    expected = tailr_loss(F.linear(hidden, weight[rest], bias[rest]), renumbered)
    torch.testing.assert_close(value, expected)
    d_hidden, d_weight = gradients(value, [hidden, weight])
    assert d_hidden.isfinite().all()
    assert (d_weight[3] == 0).all()
    broken = hidden.detach().clone()
    broken[7, 0] = float("nan")
    broken.requires_grad_()
    rows = linear_tailr_loss(broken, weight, target, reduction="none", chunk_size=16)
    others = torch.arange(ROWS) != 7
    assert rows[7].isnan()
    assert rows[others].isfinite().all()
    (d_hidden,) = gradients(rows[others].sum(), [broken])
    assert d_hidden[others].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_rows_without_any_class_are_nan_unless_ignored(name):
    (hidden, weight, _), target = problem()
    bias = torch.full((CLASSES,), float("-inf"), dtype=torch.float64)
    rows = linear_loss(hidden, weight, target, LOSSES[name][0], linear_bias=bias, chunk_size=16, reduction="none")
    assert rows[target != -100].isnan().all()
    assert (rows[target == -100] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [CrossEntropy(), LOSSES["emo_fixed"][0], LOSSES["callable"][0]])
def test_what_stands_in_an_ignored_row_reaches_no_gradient(loss, reduction):
    """Padding whose attention saw nothing is often NaN."""
    (hidden, weight, bias), target = problem()
    expected = gradients(
        linear_loss(hidden, weight, target, loss, linear_bias=bias, chunk_size=16), [hidden, weight, bias]
    )
    broken = hidden.detach().clone()
    broken[target == -100] = float("nan")
    broken.requires_grad_()
    value = linear_loss(broken, weight, target, loss, linear_bias=bias, chunk_size=16, reduction=reduction)
    value = value.sum() / (target != -100).sum() if reduction == "none" else value
    for mine, theirs in zip(gradients(value, [broken, weight, bias]), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


HALF = {
    "cross_entropy": (CrossEntropy(), F.cross_entropy),
    "tailr": LOSSES["tailr"],
    "emo": (
        EMO(cost_embedding="head", max_ratio=3.0),
        lambda z, y, w: emo_loss(z, y, cost_embedding=w, max_ratio=3.0),
    ),
}


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_half_inputs(name, dtype, bias):
    """As accurate as float32 logits, and no worse for more chunks."""
    row_loss, plain = HALF[name]
    inputs, target = problem(64, dtype=dtype, bias=bias)

    def dense(tensors: list[Tensor | None]) -> Tensor:
        more = [tensors[1]] if name == "emo" else []
        return plain(F.linear(*tensors), target, *more)

    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    expected = dense(exact)
    reference = gradients(expected, exact)
    errors = []
    for chunk_size in (64, 1):
        value = linear_loss(*inputs[:2], target, row_loss, linear_bias=inputs[2], chunk_size=chunk_size)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        found = gradients(value, inputs)
        assert all(grad.dtype == dtype for grad in found)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True)])
    single = [None if x is None else x.detach().float().requires_grad_() for x in inputs]
    of_float32 = gradients(dense(single), single)
    for one, many, grad, exact_grad in zip(*errors, of_float32, reference, strict=True):
        rounded = float((grad.to(dtype).double() - exact_grad).norm() / exact_grad.norm())
        assert one <= 1.2 * rounded
        assert many <= 1.02 * one


def test_autocast_keeps_dtypes():
    inputs, target = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_tailr_loss(inputs[0].bfloat16(), inputs[1], target)
    value.backward()
    assert value.dtype == torch.float32
    assert inputs[0].grad.dtype == inputs[1].grad.dtype == torch.float32


class _Counter(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [CrossEntropy(), LOSSES["callable"][0]], ids=["row_loss", "callable"])
def test_logits_of_all_rows_are_never_held(loss, reduction):
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with _Counter() as counter:
        value = linear_loss(hidden, weight, torch.randint(100, (64,)), loss, chunk_size=8, reduction=reduction)
        value.sum().backward()
    assert counter.largest <= 8 * 100
    assert counter.largest < 64 * 100 / 4
    # Three products per chunk; "none" makes the logits again in the backward.
    assert counter.products == 8 * (3 if reduction == "mean" else 4)


def test_gradient_checkpointing():
    inputs, target = problem()
    expected = gradients(linear_tailr_loss(*inputs[:2], target), inputs[:2])
    value = torch.utils.checkpoint.checkpoint(linear_tailr_loss, *inputs[:2], target, use_reentrant=False)
    for mine, theirs in zip(gradients(value, inputs[:2]), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "loss", [LOSSES["smoothed"][0], TaiLr(0.3), EMO(cost_embedding="head", max_ratio=3.0), LOSSES["callable"][0]]
)
def test_agrees_on_the_gpu(loss, reduction, dtype):
    inputs, target = problem(dtype=dtype)
    moved = [x.detach().cuda().requires_grad_() for x in inputs]
    options = {"chunk_size": 16, "reduction": reduction}
    here = linear_loss(*inputs[:2], target, loss, linear_bias=inputs[2], **options)
    there = linear_loss(*moved[:2], target.cuda(), loss, linear_bias=moved[2], **options)
    # On the GPU half products round the logits to half; on the CPU they run in float32.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    cotangent = torch.randn_like(here)
    found = [there, *gradients(there, moved, cotangent.cuda())]
    for mine, theirs in zip(found, [here, *gradients(here, inputs, cotangent)], strict=True):
        difference = mine.detach().cpu().double() - theirs.detach().double()
        assert difference.norm() <= tolerance * theirs.detach().double().norm()


def test_default_chunk_size():
    assert default_chunk(2048, 512, 32000) == 256
    assert default_chunk(16384, 4096, 128256) == 2048
    assert default_chunk(10, 512, 32000) == 10
    assert default_chunk(100_000, 64, 100) == 65536
    assert default_chunk(0, 8, 8) == 1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"linear_weight": torch.zeros(11, 5)}, ValueError, r"linear_weight must have shape \(V, 6\)"),
        ({"linear_weight": torch.zeros(11)}, ValueError, r"got \(11,\)"),
        ({"linear_weight": torch.zeros(11, 6).double()}, TypeError, "one dtype outside autocast"),
        ({"linear_weight": torch.zeros(11, 6, device="meta")}, ValueError, "linear_weight on meta"),
        ({"linear_bias": torch.zeros(10)}, ValueError, r"linear_bias must have shape \(11,\)"),
        ({"chunk_size": 4, "memory_budget": 100}, ValueError, "exclude each other"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be at least 1"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be in"),
        ({"softcap": -1.0}, ValueError, "softcap must be in"),
        ({"target_shift": torch.ones(7)}, ValueError, r"target_shift must have the shape of target \(8,\), got \(7,\)"),
        ({"target_shift": torch.ones(8, requires_grad=True)}, ValueError, "target_shift is not differentiated"),
        ({"target_shift": "wide"}, TypeError, "target_shift must be a real number"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
        ({"loss": EMO(cost_embedding=torch.eye(3))}, ValueError, "cost_embedding must have 11 rows"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size must be an int"),
        ({"loss": "tailr"}, TypeError, "loss must be a row loss or a callable"),
        ({"loss": CrossEntropy}, TypeError, "got the class CrossEntropy"),
        ({"loss": F.cross_entropy}, ValueError, r"one value per row, shape \(8,\), got \(\)"),
        ({"loss": lambda z, y: 1.0}, ValueError, "got float"),
        ({"target": torch.full((8,), 11)}, ValueError, r"in \[0, 11\)"),
    ],
)
def test_bad_input(change, error, match):
    arguments = {
        "input": torch.zeros(8, 6),
        "linear_weight": torch.zeros(11, 6),
        "target": torch.zeros(8, dtype=torch.int64),
        "loss": CrossEntropy(),
        **change,
    }
    with pytest.raises(error, match=match):
        linear_loss(**arguments)
