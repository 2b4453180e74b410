"""Attention in parts equals attention under the mask, and holds no mask and no scores."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from danlu.attention import _split_attention as module
from danlu.attention import attention_mask, block_mask, rope_attention, split_attention

KINDS = [
    ("causal", None),
    ("bidirectional", None),
    ("backward", None),
    ("forward_backward", None),
    *((kind, prefix) for kind in ("prefix", "backward", "forward_backward") for prefix in (0, 1, 5, 12, 13)),
    *((kind, torch.tensor([5, 13, 0])) for kind in ("prefix", "backward", "forward_backward")),
]
kinds = pytest.mark.parametrize(("kind", "prefix"), KINDS, ids=str)


def tensors(heads=4, key_heads=2, rows=13, keys=13, dim=6, value_dim=6, batch=3, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, rows, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, value_dim))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def visibility(kind: str, keys: int, prefix, heads: int) -> Tensor:
    found = attention_mask(kind, keys, prefix_lengths=prefix, num_heads=heads if kind == "forward_backward" else None)
    if found.attn_mask is not None:
        return found.attn_mask
    everything = torch.ones(keys, keys).bool()
    return (everything.tril() if found.is_causal else everything)[None, None]


def oracle(query: Tensor, key: Tensor, value: Tensor, kind: str, prefix, padding=None, scale=None) -> Tensor:
    """The definition under the dense mask."""
    heads, rows, keys = query.shape[1], query.shape[2], key.shape[2]
    mask = visibility(kind, keys, prefix, heads)[:, :, keys - rows :]
    if padding is not None:
        mask = mask & padding[:, None, None, :] & padding[:, None, keys - rows :, None]
        value = value.masked_fill(~padding[:, None, :, None], 0)
    key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num() @ value


@kinds
@pytest.mark.parametrize(
    ("backend", "heads", "key_heads"),
    [("split", 4, 4), ("split", 4, 2), ("split", 6, 2), ("split", 3, 1), ("split", 1, 1), ("reference", 6, 2)],
)
def test_equals_the_masked_definition(kind, prefix, backend, heads, key_heads):
    """Also groups of an odd number of heads, whose neighbors go different ways."""
    query, key, value = tensors(heads, key_heads, value_dim=5)
    found = split_attention(query, key, value, kind=kind, prefix_lengths=prefix, scale=0.7, backend=backend)
    torch.testing.assert_close(found, oracle(query, key, value, kind, prefix, scale=0.7), rtol=1e-12, atol=1e-12)


@kinds
@pytest.mark.parametrize("rows", [1, 6, 12])
def test_the_last_rows(kind, prefix, rows):
    query, key, value = tensors(rows=rows)
    found = split_attention(query, key, value, kind=kind, prefix_lengths=prefix)
    torch.testing.assert_close(found, oracle(query, key, value, kind, prefix), rtol=1e-12, atol=1e-12)


@kinds
def test_gradients(kind, prefix):
    one = [x.requires_grad_() for x in tensors()]
    two = [x.detach().clone().requires_grad_() for x in one]
    upstream = torch.randn(3, 4, 13, 6, dtype=torch.float64)
    found = torch.autograd.grad(split_attention(*one, kind=kind, prefix_lengths=prefix), one, upstream)
    expected = torch.autograd.grad(oracle(*two, kind, prefix), two, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kind", "prefix"), [("prefix", 2), ("forward_backward", None), ("forward_backward", 3)])
def test_gradcheck_and_second_derivatives(kind, prefix):
    inputs = [x.requires_grad_() for x in tensors(heads=2, key_heads=1, rows=5, keys=5, dim=3, value_dim=2, batch=1)]
    call = partial(split_attention, kind=kind, prefix_lengths=prefix)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(partial(call, backend="reference"), inputs)
    grad = torch.autograd.grad(call(*inputs).sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


# ---- identities -----------------------------------------------------------------------------------------------------


def test_prefix_rows_are_bidirectional_on_the_prefix_and_the_others_causal():
    query, key, value = tensors()
    found = split_attention(query, key, value, kind="prefix", prefix_lengths=5)
    alone = split_attention(query[:, :, :5], key[:, :, :5], value[:, :, :5], kind="bidirectional")
    causal = split_attention(query, key, value, kind="causal")
    torch.testing.assert_close(found[:, :, :5], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[:, :, 5:], causal[:, :, 5:], rtol=1e-12, atol=1e-12)
    assert (found[:, :, :4] - causal[:, :, :4]).abs().amax(-1).min() > 1e-3
    for prefix, kind in ((0, "causal"), (13, "bidirectional")):
        same = split_attention(query, key, value, kind="prefix", prefix_lengths=prefix)
        torch.testing.assert_close(same, split_attention(query, key, value, kind=kind), rtol=1e-12, atol=1e-12)


def test_heads_are_causal_and_flipped_causal():
    query, key, value = tensors(key_heads=4)
    found = split_attention(query, key, value, kind="forward_backward")
    causal = split_attention(query, key, value, kind="causal")
    flipped = split_attention(query.flip(2), key.flip(2), value.flip(2), kind="causal").flip(2)
    torch.testing.assert_close(found[:, 0::2], causal[:, 0::2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[:, 1::2], flipped[:, 1::2], rtol=1e-12, atol=1e-12)
    mixed = split_attention(query, key, value, kind="forward_backward", prefix_lengths=5)
    torch.testing.assert_close(mixed[:, :, 5:], causal[:, :, 5:], rtol=1e-12, atol=1e-12)
    inside = split_attention(query[:, :, :5], key[:, :, :5], value[:, :, :5], kind="forward_backward")
    torch.testing.assert_close(mixed[:, :, :5], inside, rtol=1e-12, atol=1e-12)


@kinds
def test_what_is_hidden_changes_nothing(kind, prefix):
    """Changing token t changes exactly the outputs of the queries that see it."""
    query, key, value = tensors(key_heads=4)
    before = split_attention(query, key, value, kind=kind, prefix_lengths=prefix)
    visible = visibility(kind, 13, prefix, 4).expand(3, 4, 13, 13)
    for t in range(13):
        other = [x.clone() for x in (key, value)]
        for x in other:
            x[:, :, t] += 1.0
        moved = (split_attention(query, *other, kind=kind, prefix_lengths=prefix) != before).any(-1)
        assert torch.equal(moved, visible[..., t])


def test_causal_is_attention_without_rotations():
    query, key, value = tensors()
    still = rope_attention(query, key, value, inv_freq=torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(split_attention(query, key, value, kind="causal"), still, rtol=1e-12, atol=1e-12)


# ---- masks and precision --------------------------------------------------------------------------------------------

MASKS = {
    "left": torch.tensor([[True] * 13, [False] * 4 + [True] * 9, [False] * 7 + [True] * 6]),
    "right": torch.tensor([[True] * 13, [True] * 5 + [False] * 8, [True] * 9 + [False] * 4]),
    "gaps": torch.tensor([[True] * 13, [True, False] * 6 + [True], [True] * 3 + [False] * 3 + [True] * 7]),
    "empty": torch.tensor([[True] * 13, [False] * 13, [True] * 13]),
}


@kinds
@pytest.mark.parametrize(
    ("backend", "mask"), [*(("split", name) for name in MASKS), ("reference", "gaps"), ("reference", "empty")]
)
def test_padding(kind, prefix, backend, mask):
    mask = MASKS[mask]
    query, key, value = (x.requires_grad_() for x in tensors())
    call = partial(split_attention, kind=kind, prefix_lengths=prefix, key_padding_mask=mask, backend=backend)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        found = call(query, key, value)
        found.square().sum().backward()
    expected = oracle(*(x.detach() for x in (query, key, value)), kind, prefix, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    hidden = ~mask
    for x in (found, query.grad, key.grad, value.grad):
        assert x.isfinite().all()
        assert (x.transpose(1, 2)[hidden] == 0).all()
    for filler in (1e4, math.nan):
        changed = [x.detach().clone() for x in (query, key, value)]
        for x in changed[1:]:
            x.transpose(1, 2)[hidden] = filler
        torch.testing.assert_close(call(*changed), found, rtol=1e-12, atol=1e-12)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, MASKS["left"]], ids=["none", "left"])
def test_dtypes(kind, prefix, dtype, mask):
    inputs = [x.requires_grad_() for x in tensors(dtype=dtype)]
    found = split_attention(*inputs, kind=kind, prefix_lengths=prefix, key_padding_mask=mask)
    assert found.dtype == dtype
    found.float().square().sum().backward()
    exact = oracle(*(x.detach().double() for x in inputs), kind, prefix, mask)
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert (found.double() - exact).abs().max() <= limit
    assert all(x.grad.isfinite().all() for x in inputs)


@kinds
@pytest.mark.parametrize("last_rows", ["named", "mask", "padded"])
def test_other_kernels_give_the_same(kind, prefix, last_rows, monkeypatch):
    """Where there is no flash kernel of ours, torch's attention is called; here with its own dense fallback."""
    monkeypatch.setattr(module, "kernel_of", lambda query, value: "portable")
    monkeypatch.setattr(module, "_has_lower_right", lambda query: last_rows == "named")
    monkeypatch.setattr(module, "_FEW", 128 if last_rows == "mask" else 0)
    for rows in (13, 6):
        inputs = [x.requires_grad_() for x in tensors(rows=rows)]
        twice = [x.detach().clone().requires_grad_() for x in inputs]
        found = split_attention(*inputs, kind=kind, prefix_lengths=prefix)
        expected = oracle(*twice, kind, prefix)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        grads = (torch.autograd.grad(out.square().sum(), x) for out, x in ((found, inputs), (expected, twice)))
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kind", "prefix"), [("prefix", 5), ("forward_backward", 5)])
@pytest.mark.parametrize("few", [0, 128])
def test_other_kernels_compile(kind, prefix, few, monkeypatch):
    monkeypatch.setattr(module, "kernel_of", lambda query, value: "portable")
    monkeypatch.setattr(module, "_FEW", few)
    for rows in (13, 6):
        check_compiled("aot_eager", tensors(rows=rows), kind=kind, prefix_lengths=prefix)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("prefix", 300), ("forward_backward", None), ("forward_backward", 300), ("bidirectional", None)],
)
def test_no_mask_and_no_scores_are_held(kind, prefix):
    inputs = [x.requires_grad_() for x in tensors(heads=2, rows=1024, keys=1024, dim=8, value_dim=8, batch=1)]
    with Largest() as largest:
        split_attention(*inputs, kind=kind, prefix_lengths=prefix).sum().backward()
    # The tensors have 2 * 1024 * 8 elements, a mask 1024 * 1024.
    assert largest.elements <= 4 * 2 * 1024 * 8


@pytest.mark.parametrize(
    ("kind", "prefix"), [("causal", None), ("prefix", 5), ("forward_backward", None), ("forward_backward", 5)]
)
@pytest.mark.parametrize("backend", ["split", "reference"])
def test_compile(kind, prefix, backend):
    check_compiled("aot_eager", tensors(), kind=kind, prefix_lengths=prefix, backend=backend)


@pytest.mark.parametrize("padded", [False, True])
def test_compile_to_code(padded):
    """The flash kernels inside of generated code, which relies on the strides of their gradients."""
    mask = MASKS["right"] if padded else None
    inputs = tensors(rows=12, dtype=torch.float32)
    check_compiled("inductor", inputs, kind="forward_backward", prefix_lengths=5, key_padding_mask=mask)


def check_compiled(compiler: str, inputs: list[Tensor], **options) -> None:
    def layer(*given: Tensor) -> Tensor:
        """As in a model: heads are views of one tensor, and go back into it."""
        heads = [(1.5 * x).transpose(1, 2).contiguous().transpose(1, 2) for x in given]
        return split_attention(*heads, **options).transpose(1, 2).flatten(2)

    for x in inputs:
        x.requires_grad_()
    expected = layer(*inputs)
    found = torch.compile(layer, fullgraph=True, backend=compiler)(*inputs)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, inputs, upstream) for out in (found, expected))
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two)


@kinds
def test_empty_and_strided(kind, prefix):
    if prefix is None:
        empty = [x[:, :, :0].requires_grad_() for x in tensors()]
        out = split_attention(*empty, kind=kind)
        assert out.shape == (3, 4, 0, 6)
        out.sum().backward()
        assert empty[0].grad.shape == (3, 4, 0, 6)
    query, key, value = tensors()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    found = split_attention(*strided, kind=kind, prefix_lengths=prefix)
    torch.testing.assert_close(found, oracle(query, key, value, kind, prefix), rtol=1e-12, atol=1e-12)


def test_the_peer():
    """`scaled_dot_product_attention` with the dense mask gives the same."""
    query, key, value = tensors(key_heads=4)
    for kind, prefix in (("prefix", 5), ("forward_backward", None)):
        mask = visibility(kind, 13, prefix, 4)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        found = split_attention(query, key, value, kind=kind, prefix_lengths=prefix)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("kind", "prefix"), [("prefix", torch.tensor([5, 13, 0])), ("forward_backward", 5)], ids=str)
def test_the_other_peer(kind, prefix):
    """Flex attention, not compiled, with our block mask."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value = (x.float() for x in tensors(key_heads=4))
    heads = 4 if kind == "forward_backward" else None
    mask = block_mask(kind, 13, prefix_lengths=prefix, num_heads=heads)
    expected = flex_attention(query, key, value, block_mask=mask)
    found = split_attention(query, key, value, kind=kind, prefix_lengths=prefix)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"kind": "full"}, ValueError, "kind must be one of 'causal', 'backward'"),
        ({"kind": "prefix"}, ValueError, "kind='prefix' needs prefix_lengths"),
        ({"kind": "prefix", "prefix_lengths": 14}, ValueError, "at most the length 13, got 14"),
        ({"kind": "prefix", "prefix_lengths": torch.tensor([1, 2])}, ValueError, r"must have shape \(3,\), got \(2,\)"),
        ({"kind": "prefix", "prefix_lengths": torch.tensor([1, 2, 14])}, ValueError, r"must be in \[0, 13\]"),
        ({"prefix_lengths": 3}, ValueError, "kind='causal' has no prefix"),
        ({"backend": "flash"}, ValueError, "backend must be one of 'auto', 'split', 'reference'"),
        ({"query": torch.zeros(3, 3, 13, 6).double()}, ValueError, "multiple of the number of key heads"),
        ({"query": torch.zeros(3, 13, 6).double()}, ValueError, r"query must have shape \(B, H, L, D\)"),
        ({"value": torch.zeros(3, 2, 13, 6)}, TypeError, "one dtype"),
        ({"key_padding_mask": torch.ones(3, 13)}, TypeError, "key_padding_mask must be a bool tensor"),
        ({"key_padding_mask": torch.ones(3, 12).bool()}, ValueError, r"must have shape \(B, N\)"),
        ({"scale": "1"}, TypeError, "scale must be a real number"),
    ],
)
def test_bad_input(change, error, match):
    query, key, value = tensors()
    with pytest.raises(error, match=match):
        split_attention(**{"query": query, "key": key, "value": value, "kind": "causal", **change})
