"""The chunked loss of sparse softmax equals the dense one, forward and backward."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from danlu.losses import linear_sparse_softmax_loss, sparse_softmax_loss

N, D, V = 23, 6, 37


def head(dtype=torch.float64, seed=0, bias=True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(V, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, torch.randint(V, (N,), generator=generator), offset


def gradients(loss: Tensor, tensors) -> list[Tensor]:
    weights = torch.linspace(0.5, 2, max(1, loss.numel()), dtype=loss.dtype).view(loss.shape)
    return list(torch.autograd.grad((loss * weights).sum(), [t for t in tensors if t is not None]))


@pytest.mark.parametrize("chunk_size", [1, 7, 64, N, None])
@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_dense_loss(chunk_size, k, reduction, bias):
    hidden, weight, target, offset = head(bias=bias)
    target[::5] = -100
    options = {"k": k, "reduction": reduction, "token_weight": torch.rand(N, dtype=torch.float64)}
    dense = sparse_softmax_loss(F.linear(hidden, weight, offset), target, **options)
    found = linear_sparse_softmax_loss(hidden, weight, target, linear_bias=offset, chunk_size=chunk_size, **options)
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-13)
    tensors = (hidden, weight, offset)
    for a, b in zip(gradients(found, tensors), gradients(dense, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_all_classes_are_cross_entropy():
    hidden, weight, target, _ = head()
    found = linear_sparse_softmax_loss(hidden, weight, target, k=V)
    torch.testing.assert_close(found, F.cross_entropy(F.linear(hidden, weight), target), rtol=1e-12, atol=0)


def test_golden_values():
    x = torch.tensor([[0.5], [1.0], [1.4], [-0.3]], dtype=torch.float64)
    one = torch.ones(2, 1, dtype=torch.float64)
    rows = linear_sparse_softmax_loss(one, x, torch.tensor([2, 0]), k=2, reduction="none")
    torch.testing.assert_close(rows, torch.tensor([0.51301525, 1.41301525], dtype=torch.float64), atol=5e-9, rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 2, 8])
def test_ties_at_the_smallest_of_the_largest(chunk_size):
    """Equal rows of the head make equal logits, in some rows at the k-th place and in others not."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(
        [[2.0, 0], [1, 0], [1, 0], [1, 0], [0, 3], [0, 1], [0, 1]], dtype=torch.float64, requires_grad=True
    )
    target = torch.tensor([3, 0, 6, 1])
    for k in (1, 2, 3, 4):
        dense = sparse_softmax_loss(F.linear(hidden, weight), target, k=k, reduction="none")
        found = linear_sparse_softmax_loss(hidden, weight, target, k=k, reduction="none", chunk_size=chunk_size)
        torch.testing.assert_close(found, dense, rtol=1e-13, atol=1e-14)
        for a, b in zip(gradients(found, (hidden, weight)), gradients(dense, (hidden, weight)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


class _Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that was made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("zeros", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_head_of_zeros_is_right_and_small(chunk_size, zeros, dtype):
    """All logits tie, in all rows or in half of them: the entries of the gradient are as many as there are logits."""
    rows, classes, k = 64, 400, 3
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    hidden[: int(zeros * rows)] *= 0
    weight = torch.randn(classes, D, generator=generator, dtype=torch.float64)
    if zeros == 1.0:
        hidden, weight = torch.randn_like(hidden), torch.zeros_like(weight)
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, torch.zeros(classes, dtype=torch.float64))]
    target = torch.randint(classes, (rows,), generator=generator)
    target[::7] = -100
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with _Largest() as largest:
        found = linear_sparse_softmax_loss(*leaves[:2], target, k=k, linear_bias=leaves[2], chunk_size=chunk_size)
        grads = torch.autograd.grad(found, leaves)
    dense = sparse_softmax_loss(F.linear(*exact), target, k=k)
    torch.testing.assert_close(found.double(), dense, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    for a, b in zip(grads, torch.autograd.grad(dense, exact), strict=True):
        assert (a.double() - b).norm() <= (1e-12 if dtype == torch.float64 else 5e-3) * b.norm()
    width = 8 if dtype == torch.float64 else 4
    assert largest.bytes <= max(width * chunk_size * classes, width * classes * D, 2 * 8 * rows * (k + 1) * 2)
    weight = torch.rand(rows, dtype=torch.float64)
    found = linear_sparse_softmax_loss(
        *exact[:2], target, k=k, chunk_size=chunk_size, reduction="none", token_weight=weight
    )
    dense = sparse_softmax_loss(F.linear(*exact[:2]), target, k=k, reduction="none", token_weight=weight)
    for a, b in zip(gradients(found, exact[:2]), gradients(dense, exact[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_only_the_rows_of_the_largest_and_of_the_targets_get_a_gradient():
    hidden, weight, target, _ = head()
    logits = F.linear(hidden, weight).detach()
    (grad,) = torch.autograd.grad(linear_sparse_softmax_loss(hidden, weight, target, k=2), weight)
    touched = torch.zeros(V, dtype=torch.bool)
    touched[logits.topk(2).indices.flatten()] = True
    touched[target] = True
    assert torch.equal((grad != 0).any(1), touched)
    assert not touched.all()


def test_masks_nan_and_ignored_rows():
    hidden, weight, target, _ = head()
    offset = torch.zeros(V, dtype=torch.float64)
    offset[3:] = -math.inf
    target = target % 3
    dense = sparse_softmax_loss(F.linear(hidden, weight, offset), target, k=5, reduction="none")
    found = linear_sparse_softmax_loss(hidden, weight, target, k=5, linear_bias=offset, reduction="none")
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=0)
    assert all(grad.isfinite().all() for grad in gradients(found, (hidden, weight)))
    with torch.no_grad():
        hidden[4] = math.nan
    rows = linear_sparse_softmax_loss(hidden, weight, target, k=5, reduction="none")
    assert rows.isnan().tolist() == [i == 4 for i in range(N)]
    (by_hidden,) = gradients(rows, (hidden,))
    assert by_hidden.isnan().any(1).tolist() == [i == 4 for i in range(N)]
    target[4] = -100
    loss = linear_sparse_softmax_loss(hidden, weight, target, k=5)
    by_hidden, by_weight = gradients(loss, (hidden, weight))
    assert loss.isfinite()
    assert by_weight.isfinite().all()
    assert torch.equal(by_hidden[4], torch.zeros(D, dtype=torch.float64))


def test_all_ignored_and_no_rows():
    hidden, weight, target, offset = head()
    for h, t in ((hidden, torch.full_like(target, -100)), (hidden[:0], target[:0])):
        loss = linear_sparse_softmax_loss(h, weight, t, linear_bias=offset)
        assert loss.item() == 0
        assert all(not grad.any() for grad in gradients(loss, (hidden, weight, offset)))


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_frozen_tensors_get_no_gradient(frozen):
    hidden, weight, target, _ = head()
    (hidden if frozen == "input" else weight).requires_grad_(False)
    linear_sparse_softmax_loss(hidden, weight, target).backward()
    assert (hidden.grad is None) == (frozen == "input")
    assert (weight.grad is None) == (frozen == "weight")


def test_micro_batches_with_a_normalizer_equal_one_batch():
    hidden, weight, target, _ = head()
    whole = gradients(linear_sparse_softmax_loss(hidden, weight, target), (hidden, weight))
    parts = [
        gradients(linear_sparse_softmax_loss(hidden[rows], weight, target[rows], normalizer=N), (hidden, weight))
        for rows in (slice(0, 5), slice(5, 17), slice(17, N))
    ]
    for i in (0, 1):
        torch.testing.assert_close(sum(part[i] for part in parts), whole[i], rtol=1e-12, atol=1e-15)


def test_a_weight_tied_to_the_input():
    _, weight, target, _ = head()
    tokens = torch.arange(N)
    (tied,) = gradients(linear_sparse_softmax_loss(weight[tokens], weight, target, k=4), (weight,))
    (dense,) = gradients(sparse_softmax_loss(F.linear(weight[tokens], weight), target, k=4), (weight,))
    torch.testing.assert_close(tied, dense, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    hidden, weight, target, offset = head(dtype)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, offset)]
    loss = linear_sparse_softmax_loss(hidden, weight, target, linear_bias=offset, chunk_size=5)
    assert loss.dtype == torch.float32
    expected = sparse_softmax_loss(F.linear(*wide), target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(loss, (hidden, weight, offset)), gradients(expected, wide), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_a_second_backward_through_a_retained_graph():
    hidden, weight, target, _ = head()
    loss = linear_sparse_softmax_loss(hidden, weight, target)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck_and_what_is_refused():
    hidden, weight, target, offset = head()
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_sparse_softmax_loss(h, w, target, k=4, linear_bias=b, chunk_size=9),
        (hidden, weight, offset),
    )
    loss = linear_sparse_softmax_loss(hidden, weight, target)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda h: linear_sparse_softmax_loss(h, weight, target), (hidden,), (hidden,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda h: linear_sparse_softmax_loss(h[None], weight, target[:1]))(hidden)
    found = torch.func.grad(lambda h: linear_sparse_softmax_loss(h, weight, target))(hidden)
    torch.testing.assert_close(found, grad.detach())


def test_checkpointed():
    hidden, weight, target, _ = head()
    expected = gradients(linear_sparse_softmax_loss(hidden, weight, target), (hidden, weight))
    loss = torch.utils.checkpoint.checkpoint(linear_sparse_softmax_loss, hidden, weight, target, use_reentrant=False)
    for a, b in zip(gradients(loss, (hidden, weight)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": V + 1}, ValueError, "k must be at most the number of classes"),
        ({"k": 2.0}, TypeError, "k must be an int"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"normalizer": -1.0}, ValueError, "normalizer must be"),
        ({"token_weight": torch.ones(3)}, ValueError, "token_weight must have the shape of target"),
        ({"linear_bias": torch.ones(3, dtype=torch.float64)}, ValueError, "linear_bias must have shape"),
    ],
)
def test_bad_input(options, error, match):
    hidden, weight, target, _ = head()
    with pytest.raises(error, match=match):
        linear_sparse_softmax_loss(hidden, weight, target, **options)


def test_bad_tensors():
    hidden, weight, target, _ = head()
    with pytest.raises(ValueError, match="linear_weight must have shape"):
        linear_sparse_softmax_loss(hidden, weight[:, :3], target)
    with pytest.raises(ValueError, match=r"target must be in \[0, 37\)"):
        linear_sparse_softmax_loss(hidden, weight, target + V)
    with pytest.raises(TypeError, match="one dtype outside autocast"):
        linear_sparse_softmax_loss(hidden.float(), weight, target)


@pytest.mark.parametrize(("reduction", "zeros"), [("none", 30), ("mean", 2)])
def test_compiles_as_one_graph(reduction, zeros):
    """With the numbers of eager code, also where logits tie: some that are listed, and more than are."""
    hidden, weight, target, offset = head()
    target[::5] = -100
    with torch.no_grad():
        weight[:zeros], offset[:zeros] = 0, 4 if zeros else 0
    tensors = (hidden, weight, offset)
    weights = torch.rand(N, dtype=torch.float64)

    def call(h, w, b, y):
        rows = {"k": 4, "chunk_size": 8, "reduction": reduction, "token_weight": weights[: len(y)]}
        return linear_sparse_softmax_loss(h, w, y, linear_bias=b, **rows)

    run = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (N, 9):
        value, expected = (function(hidden[:rows], weight, offset, target[:rows]) for function in (run, call))
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
        for mine, theirs in zip(gradients(value, tensors), gradients(expected, tensors), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-15)
    # Of torch itself, which may free what it keeps.
    with pytest.raises(RuntimeError, match=r"double backward|donated buffer"):
        torch.autograd.grad(run(hidden, weight, offset, target).sum(), hidden, create_graph=True)[0].sum().backward()


def test_compiled_frozen_head_half_inputs_and_transforms():
    hidden, weight, target, _ = head(torch.bfloat16)
    weight = weight.detach()
    run = torch.compile(linear_sparse_softmax_loss, fullgraph=True, backend="eager")
    value, expected = (function(hidden, weight, target, k=4) for function in (run, linear_sparse_softmax_loss))
    (mine,), (theirs,) = (torch.autograd.grad(loss, hidden, create_graph=True) for loss in (value, expected))
    assert value == expected
    assert torch.equal(mine, theirs)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (value + mine.square().sum()).backward()
    gradient = torch.func.grad(lambda h: linear_sparse_softmax_loss(h, weight, target, k=4))
    primal = hidden.detach()
    assert torch.equal(torch.compile(gradient, backend="aot_eager")(primal), gradient(primal))
