"""Attention in bands equals the dense definition: outputs, gradients, padding, cross lengths, dtypes; and memory."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danlu.attention import ReRoPE, rerope_attention, rope_attention
from danlu.attention._bands import _calls, visible_spans

# Keys, queries, window, slope; the first eight are the cases of the article's algorithm.
CASES = [
    (37, 37, 8, 0.0),
    (37, 37, 8, 0.25),
    (64, 64, 16, 0.0),
    (64, 64, 1, 0.0),
    (50, 50, 64, 0.0),
    (50, 50, 50, 0.0),
    (96, 96, 32, 16.0),
    (33, 33, 8, 0.0),
    (200, 200, 70, 0.0),
    (200, 50, 70, 0.3),
    (200, 50, 160, 0.0),
    (200, 140, 70, 0.0),
    (200, 1, 64, 0.0),
    (300, 299, 3, 0.0),
    (1, 1, 1, 0.0),
]


def tensors(keys, queries, *, heads=4, key_heads=2, dim=16, batch=2, dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(keys + queries)
    shapes = (batch, heads, queries, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, dim)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in drawn]


def both(inputs, **options):
    """Output and gradients in bands and by definition."""
    results = []
    for backend in ("banded", "reference"):
        out = rerope_attention(*inputs, backend=backend, **options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    return zip(*results, strict=True)


@pytest.mark.parametrize(("keys", "queries", "window", "slope"), CASES)
def test_equals_the_definition(keys, queries, window, slope):
    for fast, dense in both(tensors(keys, queries), window=window, slope=slope):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_options(interleaved, scale):
    options = {"interleaved": interleaved, "scale": scale, "inv_freq": torch.tensor([1.0, 0.3, 0.01])}
    for fast, dense in both(tensors(90, 90), window=20, **options):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_keys(key_heads):
    for fast, dense in both(tensors(70, 70, key_heads=key_heads), window=9):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries", [40, 12, 1])
def test_padding_on_both_sides(queries):
    visible = torch.ones(5, 40, dtype=torch.bool)
    visible[0, :13] = False
    visible[1, 33:] = False
    visible[2] = False
    visible[3, :5] = visible[3, 38:] = False
    inputs = tensors(40, queries, batch=5)
    with torch.no_grad():
        inputs[1][0, :, :13], inputs[2][0, :, :13] = torch.nan, torch.inf
    for fast, dense in both(inputs, window=7, key_padding_mask=visible):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)
    out = rope_attention(*inputs, key_padding_mask=visible, backend="banded")
    torch.testing.assert_close(out, rope_attention(*inputs, key_padding_mask=visible, backend="reference"))
    assert torch.equal(out[2], torch.zeros_like(out[2]))


@pytest.mark.parametrize("split", range(1, 38))
def test_prefill_in_chunks(split):
    query, key, value = tensors(37, 37)
    whole = rerope_attention(query, key, value, window=8, slope=0.3, backend="banded")
    head = [x[:, :, :split] for x in (query, key, value)]
    first = rerope_attention(*head, window=8, slope=0.3, backend="banded")
    parts = [first]
    if split < 37:
        parts.append(rerope_attention(query[:, :, split:], key, value, window=8, slope=0.3, backend="banded"))
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_gradcheck(slope):
    inputs = tensors(11, 9, heads=2, key_heads=1, dim=4, batch=1)
    assert torch.autograd.gradcheck(lambda *x: rerope_attention(*x, window=3, slope=slope, backend="banded"), inputs)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precision(dtype, limit):
    inputs = tensors(150, 150, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, dense = rerope_attention(*inputs, window=40, backend="banded"), rerope_attention(*exact, window=40)
    assert out.dtype == dtype
    assert (out.double() - dense).abs().max() <= limit
    for fast, slow in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(dense.sum(), exact), strict=True):
        assert (fast.double() - slow).abs().max() <= limit * slow.abs().max()


def test_far_keys_are_a_set():
    query, key, value = tensors(200, 200, requires_grad=False)
    out = rerope_attention(query, key, value, window=40, backend="banded")
    order = torch.cat((torch.randperm(160, generator=torch.Generator().manual_seed(3)), torch.arange(160, 200)))
    shuffled = rerope_attention(query, key[:, :, order], value[:, :, order], window=40, backend="banded")
    torch.testing.assert_close(shuffled[:, :, -1], out[:, :, -1], rtol=0, atol=1e-12)


def test_every_visible_pair_is_scored_once():
    for keys, queries, window, _ in CASES:
        seen = torch.zeros(queries, keys, dtype=torch.int64)
        for call in _calls(queries, keys, window):
            rows, columns = torch.arange(keys)[call.rows], torch.arange(keys)[call.keys]
            if call.is_causal:
                assert len(rows) == len(columns)
                seen[call.rows, call.keys] += torch.ones(len(rows), len(rows), dtype=torch.int64).tril()
            elif call.mask_from is None:
                seen[call.rows, call.keys] += 1
            else:
                distance = (rows + keys - queries)[:, None] - columns
                seen[call.rows, call.keys] += ((distance >= 0) & (distance < window)).long()
        assert torch.equal(seen, torch.ones(queries, keys, dtype=torch.int64).tril(keys - queries))


def test_spans():
    visible = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    found = {span: samples.tolist() for span, samples in visible_spans(visible).items()}
    assert found == {(1, 3): [0, 3], (0, 4): [1], (0, 0): [2]}
    assert visible_spans(torch.tensor([[1, 0, 1]]).bool()) is None


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_no_scores_are_held():
    inputs = tensors(4096, 4096, heads=1, key_heads=1, dim=8, batch=1, dtype=torch.float32)
    with Largest() as seen:
        rerope_attention(*inputs, window=256).sum().backward()
    assert seen.elements < 4096**2 / 4


def test_a_second_derivative_is_refused():
    inputs = tensors(40, 40)
    out = rerope_attention(*inputs, window=8, backend="banded")
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_compiles_whole():
    inputs = tensors(80, 80, dtype=torch.float32)
    module = ReRoPE(window=8, backend="banded")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
    for fast, slow in zip(*(torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, module)), strict=True):
        torch.testing.assert_close(fast, slow)


def test_what_the_kernels_cannot_do_is_refused_with_the_reason():
    query, key, value = tensors(20, 20, requires_grad=False)
    gaps = torch.ones(2, 20, dtype=torch.bool)
    gaps[0, 4] = False
    for options, reason in (
        ({"is_causal": False}, "it is not causal"),
        ({"attn_mask": torch.ones(20, 20).bool()}, "there is an attn_mask"),
        ({"key_padding_mask": gaps}, "have gaps"),
    ):
        with pytest.raises(ValueError, match=reason):
            rerope_attention(query, key, value, window=4, backend="banded", **options)
    with pytest.raises(ValueError, match="head size of value"):
        rope_attention(query, key, value[..., :5], backend="banded")
    with pytest.raises(ValueError, match="backend must be"):
        rope_attention(query, key, value, backend="flash")
    with pytest.raises(ValueError, match="backend must be"):
        ReRoPE(window=4, backend="flash")


def test_falling_back_to_the_memory_of_all_scores_is_said():
    query, key, value = tensors(256, 256, dim=4, batch=1, dtype=torch.float32, requires_grad=False)
    with pytest.warns(UserWarning, match="holds all scores, because it is not causal"):
        rerope_attention(query, key, value, window=64, is_causal=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rerope_attention(query, key, value, window=64)
        rerope_attention(query, key, value, window=64, is_causal=False, backend="reference")
        rerope_attention(query[:, :, :9], key[:, :, :9], value[:, :, :9], window=4, is_causal=False)
