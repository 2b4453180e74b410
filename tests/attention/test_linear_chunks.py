"""The chunks behind linear attention: equal to the dense sums, forward and backward, in linear memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danlu.attention import _linear_chunks as chunks
from danlu.attention import linear_attention
from danlu.attention._linear_chunks import causal_sums, reciprocal


def dense(query, key, value, state, *, eps=0.0, normalize=True):
    """Output and last state, by a matrix of all weights."""
    group = query.shape[1] // key.shape[1]
    if normalize:
        value = torch.cat((value, torch.ones_like(value[..., :1])), -1)
    last = state + key.mT @ value
    key, value, state = (x.repeat_interleave(group, 1) for x in (key, value, state))
    sums = (query @ key.mT).tril() @ value + query @ state
    return (sums[..., :-1] / (sums[..., -1:] + eps) if normalize else sums), last


def inputs(length, *, heads=4, shared=2, features=6, values=5, normalize=True, dtype=torch.float64, empty=False):
    generator = torch.Generator().manual_seed(length)
    shapes = [
        (2, heads, length, features),
        (2, shared, length, features),
        (2, shared, length, values),
        (2, shared, features, values + normalize),
    ]
    query, key, value, state = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    tensors = (query, key, value - 0.5, state * (not empty))
    return [x.to(dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("length", [1, 7, 8, 37, 64])
@pytest.mark.parametrize(("chunk", "block"), [(1, 2**19), (8, 2**19), (8, 1024), (5, 1), (100, 1)])
def test_chunks_equal_the_dense_sums(length, chunk, block, normalize, monkeypatch):
    """For groups of one chunk, of several, and of all of them."""
    monkeypatch.setattr(chunks, "_BLOCK", block)
    for shared in (4, 2, 1):
        tensors = inputs(length, shared=shared, normalize=normalize)
        options = {"eps": 0.3 if normalize else 0.0, "normalize": normalize}
        found = causal_sums(*tensors, chunk_size=chunk, **options)
        wanted = dense(*tensors, **options)
        weights = [torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape) for x in wanted]
        totals = [sum((x * w).sum() for x, w in zip(pair, weights, strict=True)) for pair in (found, wanted)]
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-15, atol=1e-14)
        grads = [torch.autograd.grad(total, tensors) for total in totals]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_error_of_the_chunks_is_that_of_rounding():
    tensors = inputs(512, features=16, values=16, empty=True)
    exact = dense(*tensors)[0].detach()
    for chunk in (16, 64, 128):
        out, _ = causal_sums(*(x.detach() for x in tensors), chunk_size=chunk, eps=0.0, normalize=True)
        assert (out - exact).abs().max() <= 4.5e-16


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    tensors = inputs(7, heads=2, shared=1, features=3, values=2, normalize=normalize)
    call = lambda *x: causal_sums(*x, chunk_size=3, eps=0.1 * normalize, normalize=normalize)  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)


def test_groups_cover_every_row_once():
    for length in (0, 1, 7, 64, 65):
        for chunk in (1, 8, 100):
            for count in (1, 3, 50):
                groups = chunks._groups(length, chunk, count)
                assert [i for rows, _ in groups for i in range(rows.start, rows.stop)] == list(range(length))
                assert all((rows.stop - rows.start) % size == 0 and size <= chunk for rows, size in groups)


def test_zero_denominators():
    """A row without any weight is 0 and has no gradient."""
    query, key, value, state = inputs(20, empty=True)
    with torch.no_grad():
        query[:, :, 3] = 0
        key[:, :, :2] = 0
    out, _ = causal_sums(query, key, value, state, chunk_size=8, eps=0.0, normalize=True)
    assert (out[:, :, [0, 1, 3]] == 0).all()
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, [0, 1, 3]] == 0).all()
    assert reciprocal(torch.tensor([0.0, 2.0]), 0.0).tolist() == [0.0, 0.5]
    assert reciprocal(torch.tensor([0.0, 1.5]), 0.5).tolist() == [2.0, 0.5]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, also within the operators."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_no_matrix_of_weights_is_held():
    """Held between the passes: tensors of the size of the inputs, and the states before groups of chunks."""
    saved = []
    for length in (2048, 4096):
        tensors = inputs(length, heads=1, shared=1, features=8, values=8, dtype=torch.float32)
        held = 0

        def count(x):
            nonlocal held
            held += x.numel()
            return x

        with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            causal_sums(*tensors, chunk_size=64, eps=0.0, normalize=True)[0].sum().backward()
        saved.append(held)
        # Half a million products of features in 128 chunks of 64 rows.
        assert seen.elements <= max(2**19, 2 * 64 * length)
    assert saved[1] < 2.1 * saved[0]
    assert saved[0] < 2 * 2048 * (4 * 8 + 1) * 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_float32(dtype):
    """4096 ones sum to 4096, which neither half dtype can count to."""
    ones = torch.ones(1, 1, 4096, 4, dtype=dtype)
    state = torch.zeros(1, 1, 4, 5)
    _, last = causal_sums(ones, ones, ones, state, chunk_size=64, eps=0.0, normalize=True)
    assert last.dtype == torch.float32
    assert (last == 4096).all()
    tensors = inputs(300, dtype=dtype, empty=True)
    tensors[3] = tensors[3].detach().float()
    out, _ = causal_sums(*tensors, chunk_size=32, eps=0.0, normalize=True)
    exact, _ = dense(*(x.detach().double() for x in tensors))
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps


def transforms():
    reference = {"backend": "reference"}
    for name, options in (("chunked", {"backend": "chunked", "chunk_size": 4}), ("reference", reference)):
        yield name, lambda *x, options=options: linear_attention(*x, **options)


def test_transforms_of_torch_func():
    """`vmap` and reverse mode in any order; forward mode and second derivatives say what to do instead."""
    query, key, value = (torch.stack([x.detach(), x.detach().flip(2)]) for x in inputs(19)[:3])
    found = {}
    for name, call in transforms():

        def loss(*x, call=call):
            return call(*x).square().sum()

        one = (query[0], key[0], value[0])
        found[name] = [
            torch.func.vmap(call)(query, key, value),
            torch.func.vmap(call, in_dims=(None, 0, None))(query[0], key, value[0]),
            torch.func.grad(loss, argnums=2)(*one),
            torch.func.vmap(torch.func.grad(loss, argnums=1))(query, key, value),
            torch.func.jacrev(lambda k, one=one, call=call: call(one[0], k, one[2])[0, 0, 5:9, 0])(one[1]),
        ]
    for mine, theirs in zip(found["chunked"], found["reference"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    chunked = next(call for name, call in transforms() if name == "chunked")
    with pytest.raises(RuntimeError, match="no forward-mode derivative; use backend='reference'"):
        torch.func.jvp(lambda q: chunked(q, key[0], value[0]), (query[0],), (query[1],))


def test_a_second_derivative_is_refused():
    tensors = inputs(20, empty=True)[:3]
    for compiled in (False, True):
        call = lambda *x: linear_attention(*x, chunk_size=8)  # noqa: E731
        out = (torch.compile(call, backend="eager") if compiled else call)(*tensors)
        (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
            grad.sum().backward()
    torch.autograd.gradgradcheck(
        lambda *x: linear_attention(*x, backend="reference"), inputs(5, heads=1, shared=1, features=2, values=2)[:3]
    )


def test_compiles_whole():
    tensors = inputs(80, dtype=torch.float32, empty=True)[:3]
    call = lambda *x: linear_attention(*x, chunk_size=16)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))
    for fast, slow in zip(*(torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, call)), strict=True):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("mapped", [True, False])
def test_operators_are_what_they_say(mapped):
    """Schema, fake outputs and autograd registration, by the checks of `torch.library`."""
    tensors = inputs(11, dtype=torch.float32, normalize=mapped)
    torch.library.opcheck(chunks._forward, (*tensors, 4, 2, 0.0, mapped), test_utils=["test_schema", "test_faketensor"])
    plain = [x.detach() for x in tensors]
    out, _, inverse, starts = chunks._forward(*plain, 4, 2, 0.0, mapped)
    rest = (out, inverse, starts, torch.ones_like(out), torch.ones_like(plain[3]), 4, 2, mapped)
    torch.library.opcheck(chunks._backward, (*plain[:3], *rest), test_utils=["test_schema", "test_faketensor"])
