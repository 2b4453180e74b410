"""Attention in bands equals the dense definition: outputs, gradients, masks, cross lengths, dtypes; and memory."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danlu.attention import ReRoPE, _bands, rerope_attention, rope_attention
from danlu.attention._band_calls import Call
from danlu.attention._band_kernels import Plan, forward

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


causality = pytest.mark.parametrize("is_causal", [True, False])


@pytest.fixture(params=["flash", "portable"])
def kernel(request, monkeypatch):
    """Both kernels; the portable one is what other devices run."""
    if request.param == "portable":
        monkeypatch.setattr(_bands, "kernel_of", lambda query, value: "portable")
    return request.param


@causality
@pytest.mark.parametrize(("keys", "queries", "window", "slope"), CASES)
def test_equals_the_definition(keys, queries, window, slope, is_causal, kernel):
    for fast, dense in both(tensors(keys, queries), window=window, slope=slope, is_causal=is_causal):
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


@causality
@pytest.mark.parametrize("queries", [40, 12, 1])
@pytest.mark.parametrize("gaps", [False, True])
def test_padding(queries, gaps, is_causal, kernel):
    visible = torch.ones(5, 40, dtype=torch.bool)
    visible[0, :13] = False
    visible[1, 33:] = False
    visible[2] = False
    visible[3, :5] = visible[3, 38:] = False
    if gaps:
        visible[4, 7:23] = visible[4, 38] = False
    inputs = tensors(40, queries, batch=5)
    with torch.no_grad():
        inputs[1][0, :, :13], inputs[2][0, :, :13] = torch.nan, torch.inf
        # Queries in padding, too.
        inputs[0].transpose(1, 2)[~visible[:, 40 - queries :]] = torch.nan
    options = {"window": 7, "is_causal": is_causal, "key_padding_mask": visible}
    for fast, dense in both(inputs, **options):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)
    out = rope_attention(*inputs, is_causal=is_causal, key_padding_mask=visible, backend="banded")
    expected = rope_attention(*inputs, is_causal=is_causal, key_padding_mask=visible, backend="reference")
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[2], torch.zeros_like(out[2]))


def masks(queries, keys):
    generator = torch.Generator().manual_seed(5)
    random = torch.rand(2, 4, queries, keys, generator=generator) > 0.6
    random[0, 1, 3] = False
    return {
        "each head": random,
        "each sample": random[:, :1],
        "all": random[0, 0],
        "column": random[:, :, :, :1],
        "row": random[:1, :, :1],
        "expanded": random[:, :1, :1].expand(2, 4, queries, keys),
        "nothing": torch.zeros(queries, keys, dtype=torch.bool),
        "everything": torch.ones(1, 1, dtype=torch.bool),
    }


@causality
@pytest.mark.parametrize(("keys", "queries", "window", "slope"), [(150, 150, 20, 0.0), (150, 70, 100, 0.3)])
@pytest.mark.parametrize("mask", masks(9, 9))
def test_any_mask(mask, keys, queries, window, slope, is_causal, kernel):
    attn_mask = masks(queries, keys)[mask]
    for padding in (None, torch.arange(keys) >= torch.tensor([[0], [9]])):
        options = {"window": window, "slope": slope, "is_causal": is_causal, "key_padding_mask": padding}
        for fast, dense in both(tensors(keys, queries), attn_mask=attn_mask, **options):
            torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)


@causality
@pytest.mark.parametrize("shape", [(2, 4, 130, 130), (130, 130), (4, 1, 130), (130, 1), (1, 1)])
def test_floating_masks(shape, is_causal, kernel):
    # Of another dtype than the scores, which makes no difference.
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask[mask > 1.2] = -torch.inf
    for fast, dense in both(tensors(130, 130), window=12, slope=0.3, is_causal=is_causal, attn_mask=mask):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)


def test_a_floating_mask_is_not_rounded_to_half_precision():
    query, key, value = tensors(130, 130, requires_grad=False)
    mask = 5 * torch.randn(130, 130, generator=torch.Generator().manual_seed(2))
    exact = rerope_attention(*(x.bfloat16().double() for x in (query, key, value)), window=12, attn_mask=mask)
    half = [x.bfloat16() for x in (query, key, value)]
    out = rerope_attention(*half, window=12, attn_mask=mask, backend="banded")
    assert (out.double() - exact).abs().max() < 2e-2


@causality
@pytest.mark.parametrize("borders", [[0, 130], [0, 1, 9, 9, 10, 80, 130], [0, 0, 64, 128, 130, 130]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_separate_sequences(borders, dtype, is_causal, kernel):
    inputs = tensors(130, 130, batch=1)
    options = {"window": 12, "slope": 0.3, "is_causal": is_causal}
    for fast, dense in both(inputs, cu_seqlens=torch.tensor(borders, dtype=dtype), **options):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)
    packed = rerope_attention(*inputs, cu_seqlens=torch.tensor(borders, dtype=dtype), backend="banded", **options)
    alone = [rerope_attention(*(x[:, :, low:high] for x in inputs), **options) for low, high in pairwise(borders)]
    torch.testing.assert_close(packed, torch.cat(alone, 2), rtol=0, atol=1e-12)


def test_prefill_in_chunks_at_every_split(kernel):
    query, key, value = tensors(37, 37, requires_grad=False)
    options = {"window": 8, "slope": 0.3, "backend": "banded"}
    whole = rerope_attention(query, key, value, **options)
    for split in range(38):
        head = rerope_attention(*(x[:, :, :split] for x in (query, key, value)), **options)
        tail = rerope_attention(query[:, :, split:], key, value, **options)
        torch.testing.assert_close(torch.cat((head, tail), 2), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value_dim", [3, 16, 21])
def test_value_size(value_dim, kernel):
    query, key, value = tensors(80, 80)
    wide = value.detach()[..., [i % 16 for i in range(value_dim)]].requires_grad_()
    for fast, dense in both([query, key, wide], window=9):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)


@causality
@pytest.mark.parametrize("logn", ["train", "post"])
@pytest.mark.parametrize("option", ["none", "padding", "gaps", "packed", "mask"])
def test_log_n(logn, option, is_causal):
    masked = torch.rand(2, 1, 90, 90, generator=torch.Generator().manual_seed(0)) > 0.2
    options = {
        "none": {},
        "padding": {"key_padding_mask": torch.arange(90) >= torch.tensor([[0], [17]])},
        "gaps": {"key_padding_mask": masked[:, 0, 0]},
        "packed": {"cu_seqlens": torch.tensor([0, 30, 90])},
        "mask": {"attn_mask": masked},
    }[option]
    inputs = tensors(90, 90, batch=1 if option == "packed" else 2)
    for fast, dense in both(inputs, window=12, logn=logn, train_length=20, is_causal=is_causal, **options):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("slope", "is_causal"), [(0.0, True), (0.3, False)])
def test_gradcheck(slope, is_causal):
    """Other cases and the portable kernel have the gradients of the reference, which has this check, too."""
    inputs = tensors(11, 9, heads=2, key_heads=1, dim=4, batch=1)
    attention = partial(rerope_attention, window=3, slope=slope, is_causal=is_causal, backend="banded")
    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@causality
def test_lower_precision(dtype, limit, is_causal, kernel):
    inputs = tensors(150, 150, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    attention = partial(rerope_attention, window=40, is_causal=is_causal)
    out, dense = attention(*inputs, backend="banded"), attention(*exact)
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


def test_merging_with_empty_bands():
    """Where neither part has seen anything the output is 0 and the log-sum-exp -inf; where one has, it is that part."""
    part, rows = torch.ones(1, 1, 4, 2), torch.tensor([[[0.3, -torch.inf, 0.3, -torch.inf]]])
    out, total = 5 * torch.ones(1, 1, 4, 2), torch.tensor([[[-0.7, -0.7, -torch.inf, -torch.inf]]])
    out[:, :, 2:] = 0
    _bands._merge(out, total, part, rows)
    share = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(
        out[0, 0, :, 0], torch.stack((share + 5 * (1 - share), 5 * share**0, share**0, 0 * share))
    )
    expected = torch.logaddexp(torch.tensor(0.3), torch.tensor(-0.7))
    assert total[0, 0].tolist() == pytest.approx([float(expected), -0.7, 0.3, -torch.inf])


def test_the_kernel_says_zero_for_rows_that_see_nothing():
    """Which merged as it is would count as a sum of 1; the repaired log-sum-exp does not count."""
    query, key, value = tensors(4, 4, heads=1, key_heads=1, batch=1, requires_grad=False)
    hidden = torch.full((1, 1, 4, 4), -torch.inf, dtype=torch.float64)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, total = flash(query, key, value, 0.0, False, attn_mask=hidden)
    assert torch.equal(total, torch.zeros_like(total))
    near, near_total = flash(query, key, value, 0.0, True)
    wrong, wrong_total = near.clone(), near_total.clone().contiguous()
    _bands._merge(wrong, wrong_total, out, total)
    assert (wrong - near).abs().max() > 0.1
    call = Call("left", slice(0, 4), slice(0, 4), "masked")
    out, total = forward(call, query, key, value, hidden, Plan("cpu", 1.0, 4, is_causal=True))
    right, right_total = near.clone(), near_total.clone().contiguous()
    _bands._merge(right, right_total, out, total)
    assert torch.equal(right, near)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("option", ["causal", "both sides", "padding", "gaps", "packed", "mask", "log n"])
def test_no_scores_are_held(option):
    length = 8192
    visible = torch.arange(length)[None] % 1000 > 17
    options = {
        "causal": {},
        "both sides": {"is_causal": False},
        "padding": {"key_padding_mask": torch.arange(length)[None] >= 100},
        "gaps": {"key_padding_mask": visible},
        "packed": {"cu_seqlens": torch.tensor([0, 1000, length])},
        # One row, or the mask itself would be the largest tensor.
        "mask": {"attn_mask": visible[None, None]},
        "log n": {"logn": "post", "train_length": 100, "attn_mask": visible[None, None]},
    }[option]
    inputs = tensors(length, length, heads=1, key_heads=1, dim=4, batch=1, dtype=torch.float32)
    with Largest() as seen:
        rerope_attention(*inputs, window=256, **options).sum().backward()
    assert seen.elements < length**2 / 4


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


def test_compiles_whole_with_masks():
    query, key, value = tensors(80, 80, dtype=torch.float32)
    padding = torch.arange(80) >= torch.tensor([[0], [9]])
    for options in (
        {"key_padding_mask": padding, "positions": torch.arange(80).expand(2, -1) * 2},
        {"attn_mask": padding[:, None, None], "is_causal": False, "logn": "post", "train_length": 8},
    ):
        function = partial(rerope_attention, window=8, backend="banded", **options)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(query, key, value), function(query, key, value))
    packed = partial(rerope_attention, window=8, backend="banded", cu_seqlens=torch.tensor([0, 30, 80]))
    alone = [x[:1] for x in (query, key, value)]
    torch.testing.assert_close(torch.compile(packed, fullgraph=True, backend="aot_eager")(*alone), packed(*alone))


def test_unknown_backends_are_refused():
    query, key, value = tensors(20, 20, requires_grad=False)
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'banded', 'reference', got 'flash'"):
        rope_attention(query, key, value, backend="flash")
    with pytest.raises(ValueError, match="backend must be"):
        ReRoPE(window=4, backend="flash")


@pytest.mark.parametrize("is_causal", [True, False])
def test_strides_are_those_that_the_fake_promises(is_causal):
    """Long enough that the kernel's gradients come as they are, in strides of its own; a compiler relies on ours."""
    query, key, value = (torch.randn(1, 2, 320, 16).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(3))
    for far in ((None, None, None), (query, None if is_causal else query, key)):
        given = query, key, *far, value, None, None, None, None
        options = is_causal, 64 if far[0] is not None else 320, 0.25, "cpu"
        out, total = _bands._forward(*given, *options)
        grads = _bands._backward(*given, out, total, out, *options)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            faked = [None if x is None else mode.from_tensor(x) for x in given]
            promised = _bands._forward(*faked, *options)
            promised = [*promised, *_bands._backward(*faked, *promised, promised[0], *options)]
        for real, fake in zip((out, total, *grads), promised, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.slow
def test_compiled_gradients_of_whole_bands():
    function = partial(rerope_attention, window=64, backend="banded")
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 320, 16, generator=generator).requires_grad_() for _ in range(3)]
    expected = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    compiled = torch.compile(function, fullgraph=True)
    found = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    for a, b in zip(found, expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [4, 64])
def test_forward_mode_is_refused(window):
    """The operator would give tangents of 0 without a word."""
    query, key, value = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))

    def attend(q, backend):
        return rerope_attention(q, key, value, window=window, backend=backend)

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: attend(q, "banded"), (query,), (torch.ones_like(query),))
    _, tangent = torch.func.jvp(lambda q: attend(q, "reference"), (query,), (torch.ones_like(query),))
    assert tangent.abs().max() > 0
