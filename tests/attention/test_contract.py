"""What every attention function promises: causality, padding, GQA, decoding, dtypes, errors."""

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor

import danlu.attention as family
from danlu.attention import (
    ReRoPE,
    dynamic_rope_attention,
    feature_map,
    linear_attention,
    rerope_attention,
    rope_attention,
)


def linear(query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask=None, **options) -> Tensor:
    """Linear attention from queries and keys, as the other functions take them."""
    features = feature_map("elu1")(query, key, key_padding_mask)
    return linear_attention(*features, value, key_padding_mask=key_padding_mask, **options)


# Every public function, with the options that it needs.
CASES = {
    "rope_attention": rope_attention,
    "rerope_attention": partial(rerope_attention, window=3),
    "rerope_attention_leaky": partial(rerope_attention, window=3, slope=0.3),
    "rerope_attention_banded": partial(rerope_attention, window=3, slope=0.3, backend="banded"),
    "rerope_attention_log_n": partial(rerope_attention, window=3, logn="train", train_length=5),
    "dynamic_rope_attention": partial(dynamic_rope_attention, train_length=4, step=3),
    "linear_attention": linear,
}
# Those of scores; linear attention has none that could be masked or scaled, and with a mask of pairs a text has no
# length that frequencies could follow. What these two refuse is in their own tests.
SCORED = {name: function for name, function in CASES.items() if not name.startswith(("linear", "dynamic"))}
scored = pytest.mark.parametrize("function", SCORED.values(), ids=SCORED.keys())
functions = pytest.mark.parametrize("function", CASES.values(), ids=CASES.keys())
causality = pytest.mark.parametrize("is_causal", [True, False])


def tensors(*, heads=4, key_heads=2, queries=9, keys=9, dim=6, value_dim=5, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(batch, heads, queries, dim),
        draw(batch, key_heads, keys, dim),
        draw(batch, key_heads, keys, value_dim),
    )


def test_every_public_function_is_covered():
    public = {name for name in family.__all__ if inspect.isfunction(getattr(family, name))}
    # Not from (query, key, value) alone: span scores and what is read off them, in test_global_pointer.py; steps of
    # decoding, in test_rerope_decode.py and test_linear_attention.py; codebooks and attention to them, in
    # test_codebook_init.py and test_vq_attention.py; feature maps, in test_feature_maps.py; a report.
    elsewhere = {"decode_spans", "explain_backend", "rerope_decode", "init_codebook_from_keys", "vq_attention"}
    elsewhere |= {"hwfa_layer_plan", "window_mask"}
    # Masks by kind and attention under them, in test_mask_kinds.py and test_split_attention.py.
    elsewhere |= {"attention_mask", "block_mask", "split_attention"}
    assert public - elsewhere - {"feature_map", "linear_attention_step"} <= CASES.keys()
    assert {name for name in family.__all__ if inspect.isclass(getattr(family, name))} == {
        "AttentionMask",
        "BackendChoice",
        "EfficientGlobalPointer",
        "FavorFeatures",
        "GlobalPointer",
        "LayerPlan",
        "Quantized",
        "ReRoPE",
        "ReRoPECache",
        "VQAttention",
        "VQState",
        "VectorQuantizer",
        "LinearAttention",
        "LinearAttentionState",
        "SoftVQFeatures",
    }


@functions
@causality
def test_shape_and_dtype(function, is_causal):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        query, key, value = tensors(dtype=dtype)
        out = function(query, key, value, is_causal=is_causal)
        assert out.shape == (2, 4, 9, 5)
        assert out.dtype == dtype
        exact = function(*(x.double() for x in (query, key, value)), is_causal=is_causal)
        limit = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        assert (out.double() - exact).abs().max() <= limit


@functions
def test_causal_output_ignores_the_future(function):
    query, key, value = tensors()
    out = function(query, key, value)
    key[:, :, 5:], value[:, :, 5:] = 7.0, 1e4
    assert torch.equal(function(query, key, value)[:, :, :5], out[:, :, :5])


@functions
@causality
def test_grouped_heads_equal_repeated_heads(function, is_causal):
    query, key, value = tensors()
    out = function(query, key, value, is_causal=is_causal)
    repeated = function(query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1), is_causal=is_causal)
    torch.testing.assert_close(out, repeated, rtol=1e-12, atol=1e-12)


@functions
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_decoding_equals_the_full_pass(function, queries):
    query, key, value = tensors(queries=12, keys=12)
    full = function(query, key, value)
    last = function(query[:, :, -queries:], key, value)
    torch.testing.assert_close(last, full[:, :, -queries:], rtol=1e-12, atol=1e-12)
    steps = [function(query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1]) for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=2), full, rtol=1e-12, atol=1e-12)


MASKS = {
    "none": None,
    "left": torch.tensor([[True] * 9, [False] * 4 + [True] * 5]),
    "right": torch.tensor([[True] * 9, [True] * 5 + [False] * 4]),
    "one_empty": torch.tensor([[True] * 9, [False] * 9]),
}


@functions
@causality
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_padding(function, is_causal, mask):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        check_padding(function, is_causal, mask, dtype)


def check_padding(function, is_causal, mask, dtype):
    query, key, value = (x.requires_grad_() for x in tensors(dtype=dtype))
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        out = function(query, key, value, is_causal=is_causal, key_padding_mask=mask)
        out.float().square().sum().backward()
    for tensor in (out, query.grad, key.grad, value.grad):
        assert tensor.isfinite().all()
    if mask is None:
        return
    hidden = ~mask
    assert (out.transpose(1, 2)[hidden] == 0).all()
    assert (query.grad.transpose(1, 2)[hidden] == 0).all()
    assert (value.grad.transpose(1, 2)[hidden] == 0).all()
    # The content of padding changes nothing, not even NaN.
    for filler in (1e4, float("nan")):
        changed = [x.detach().clone() for x in (query, key, value)]
        for x in changed:
            x.transpose(1, 2)[hidden] = filler
        again = function(*changed, is_causal=is_causal, key_padding_mask=mask)
        assert torch.equal(again, out)
    # Rows of a padded sample equal those of the sample without its padding.
    if mask[1].any():
        alone = [x.detach()[1:, :, mask[1]] for x in (query, key, value)]
        expected = function(*alone, is_causal=is_causal)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(out[1:, :, mask[1]], expected, rtol=tolerance, atol=tolerance)


@scored
@causality
def test_masks_combine(function, is_causal):
    """Blocks of a packed batch equal separate sequences, whatever else is hidden."""
    query, key, value = tensors()
    block = torch.zeros(9, 9, dtype=torch.bool)
    block[:4, :4] = block[4:, 4:] = True
    out = function(query, key, value, is_causal=is_causal, attn_mask=block)
    for rows in (slice(0, 4), slice(4, 9)):
        alone = function(*(x[:, :, rows] for x in (query, key, value)), is_causal=is_causal)
        torch.testing.assert_close(out[:, :, rows], alone, rtol=1e-12, atol=1e-12)
    padding = MASKS["left"]
    both = function(query, key, value, is_causal=is_causal, attn_mask=block, key_padding_mask=padding)
    assert (both[1, :, :4] == 0).all()
    torch.testing.assert_close(both[:, :, 4:], out[:, :, 4:], rtol=1e-12, atol=1e-12)


@scored
@causality
def test_floating_masks_are_added_to_the_scores(function, is_causal):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        check_floating_masks(function, is_causal, dtype)


def check_floating_masks(function, is_causal, dtype):
    query, key, value = tensors()
    generator = torch.Generator().manual_seed(1)
    visible = torch.rand(2, 1, 9, 9, generator=generator) > 0.3
    visible[0, 0, 4] = False
    inputs = [x.to(dtype) for x in (query, key, value)]
    expected = function(*inputs, is_causal=is_causal, attn_mask=visible)
    # Whatever number stands for hidden; two of the lowest may have been added.
    for hidden in (-torch.inf, torch.finfo(dtype).min, torch.finfo(dtype).min / 2):
        mask = torch.zeros(2, 1, 9, 9, dtype=dtype).masked_fill(~visible, hidden)
        out = function(*inputs, is_causal=is_causal, attn_mask=mask)
        torch.testing.assert_close(out, expected, rtol=0, atol=0 if dtype == torch.float64 else 1e-2)
        assert torch.equal(out[0, :, 4], torch.zeros_like(out[0, :, 4]))
    # A number for each query moves nothing, one for each key weighs it by its exponential.
    rows = torch.randn(2, 4, 9, 1, generator=generator, dtype=torch.float64).to(dtype)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    plain = function(*inputs, is_causal=is_causal)
    torch.testing.assert_close(function(*inputs, is_causal=is_causal, attn_mask=rows), plain, rtol=0, atol=limit)


@scored
@causality
def test_floating_masks_weigh_keys_by_their_exponentials(function, is_causal):
    """Values that are the identity show the weights."""
    query, key, _ = tensors()
    value = torch.eye(9, dtype=torch.float64).expand(2, 2, 9, 9)
    bias = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = function(query, key, value, is_causal=is_causal)
    expected = weights * bias.exp()
    out = function(query, key, value, is_causal=is_causal, attn_mask=bias)
    torch.testing.assert_close(out, expected / expected.sum(-1, keepdim=True), rtol=0, atol=1e-12)


@functions
@causality
def test_gradients(function, is_causal):
    inputs = [x.requires_grad_() for x in tensors(batch=1, heads=2, key_heads=1, queries=4, keys=5, dim=4, value_dim=2)]
    mask = torch.tensor([[False, True, True, True, True]])
    attend = partial(function, is_causal=is_causal, key_padding_mask=mask)
    assert torch.autograd.gradcheck(attend, inputs)
    if function is not CASES["rerope_attention_banded"]:
        assert torch.autograd.gradgradcheck(attend, inputs)


@functions
def test_compile_empty_and_strided(function):
    query, key, value = tensors()
    expected = function(query, key, value)
    # Variants of one function; log n in bands is compiled in test_bands.py.
    if function not in (CASES["rerope_attention_leaky"], CASES["rerope_attention_log_n"]):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(query, key, value), expected)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    torch.testing.assert_close(function(*strided), expected, rtol=1e-12, atol=1e-12)
    empty = [x[:, :, :0].requires_grad_() for x in (query, key, value)]
    out = function(*empty)
    assert out.shape == (2, 4, 0, 5)
    out.sum().backward()
    assert empty[0].grad.shape == (2, 4, 0, 6)


@scored
@pytest.mark.parametrize("interleaved", [False, True])
def test_options_reach_the_scores(function, interleaved):
    query, key, value = tensors()
    inv_freq = torch.tensor([0.5, 0.01], dtype=torch.float64)
    plain = function(query, key, value)
    changed = function(query, key, value, inv_freq=inv_freq, scale=0.7, interleaved=interleaved)
    assert (plain - changed).abs().max() > 1e-3
    rescaled = function(query * 0.7 * 6**0.5, key, value, inv_freq=inv_freq, interleaved=interleaved)
    torch.testing.assert_close(changed, rescaled, rtol=1e-12, atol=1e-12)


@scored
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"query": torch.zeros(2, 3, 9, 6)},
            ValueError,
            r"multiple of the number of key heads, got query \(2, 3, 9, 6\)",
        ),
        ({"query": torch.zeros(2, 4, 9, 8)}, ValueError, "same head_dim"),
        ({"query": torch.zeros(2, 4, 10, 6)}, ValueError, "cannot be more of them"),
        ({"query": torch.zeros(4, 9, 6)}, ValueError, r"query must have shape \(B, H, L, D\)"),
        ({"key": torch.zeros(2, 2, 8, 6)}, ValueError, "key length must agree"),
        ({"value": torch.zeros(2, 2, 9, 5).double()}, TypeError, "one dtype"),
        ({"value": torch.zeros(2, 2, 9, 5).long()}, TypeError, "value must be a floating-point tensor"),
        ({"key_padding_mask": torch.ones(2, 9)}, TypeError, "key_padding_mask must be a bool tensor"),
        ({"key_padding_mask": torch.ones(2, 8).bool()}, ValueError, r"must have shape \(B, N\) = \(2, 9\)"),
        (
            {"attn_mask": torch.ones(9, 9).long()},
            TypeError,
            "attn_mask must be bool .* or floating and added to scores, got torch.int64",
        ),
        ({"attn_mask": [[True]]}, TypeError, "attn_mask must be bool .* got list"),
        (
            {"attn_mask": torch.ones(3, 1, 9, 9).bool()},
            ValueError,
            r"must broadcast to \(B, H, M, N\) = \(2, 4, 9, 9\)",
        ),
        ({"inv_freq": torch.ones(4)}, ValueError, "R at most 6"),
        ({"scale": "big"}, TypeError, "scale must be a real number"),
        ({"window_size": 3}, TypeError, "window_size"),
    ],
)
def test_bad_input(function, change, error, match):
    query, key, value = tensors(dtype=torch.float32)
    with pytest.raises(error, match=match):
        function(**{"query": query, "key": key, "value": value, **change})


def test_odd_head_size_needs_frequencies():
    query, key, value = tensors(dim=7)
    with pytest.raises(ValueError, match="head_dim must be even"):
        rope_attention(query, key, value)
    assert rope_attention(query, key, value, inv_freq=torch.ones(3)).shape == (2, 4, 9, 5)


def test_class_equals_function():
    query, key, value = tensors()
    mask = MASKS["left"]
    module = ReRoPE(3, slope=0.25, is_causal=False, interleaved=True)
    expected = rerope_attention(
        query, key, value, window=3, slope=0.25, is_causal=False, interleaved=True, key_padding_mask=mask
    )
    assert torch.equal(module(query, key, value, mask), expected)
    assert "window=3, slope=0.25, base=10000.0, is_causal=False, interleaved=True, logn=None" in repr(module)
    assert module.state_dict() == {}
