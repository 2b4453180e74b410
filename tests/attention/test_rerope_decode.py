"""A decoding step equals the last row of the full call, whatever the cache looks like."""

import pytest
import torch

from danlu.attention import rerope_attention, rerope_decode, rope_attention
from danlu.positions import apply_rope, rope_frequencies

WINDOW = 8
# Around the window's edge, where a key turns from near to far; and around the steps of the table of angles.
LENGTHS = [1, 2, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 31, 40]


def tensors(length, *, heads=4, key_heads=2, dim=8, value_dim=8, batch=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, length, dim), (batch, key_heads, length, dim), (batch, key_heads, length, value_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def static(key, value, slots=64, filler=float("nan")):
    """The same in a cache of more slots, whose rest holds anything."""
    return [torch.nn.functional.pad(x, (0, 0, 0, slots - x.shape[2]), value=filler) for x in (key, value)]


def leaky(key, slope):
    return apply_rope(key, torch.arange(key.shape[2]).to(torch.float64) * slope, rope_frequencies(key.shape[-1]))


@pytest.mark.parametrize(
    ("slope", "cache"),
    [
        *((slope, cache) for slope in (0.0, 0.3) for cache in ("dynamic", "static", "ragged")),
        (0.3, "rotated"),
    ],
)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_last_row_around_the_window(length, slope, cache):
    query, key, value = tensors(length)
    expected = rerope_attention(query, key, value, window=WINDOW, slope=slope)[:, :, -1:]
    options = {"window": WINDOW, "slope": slope}
    if cache == "static":
        key, value = static(key, value)
        options["length"] = length
    elif cache == "ragged":
        key, value = static(key, value)
        options["length"] = torch.full((3,), length)
    elif cache == "rotated":
        options["leaky_key"] = leaky(key, slope)
    out = rerope_decode(query[:, :, -1:], key, value, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("value_dim", [5, 8, 11])
def test_grouped_heads_and_value_sizes(key_heads, value_dim):
    query, key, value = tensors(40, key_heads=key_heads, value_dim=value_dim)
    expected = rerope_attention(query, key, value, window=WINDOW)[:, :, -1:]
    out = rerope_decode(query[:, :, -1:], key, value, window=WINDOW)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


PADDING = {
    "left": torch.arange(40) >= torch.tensor([[0], [5], [38]]),
    "within the far keys": (torch.arange(40) < 3) | (torch.arange(40) >= torch.tensor([[3], [4], [20]])),
    "all of one": torch.arange(40) >= torch.tensor([[0], [40], [7]]),
    "its own slot": torch.arange(40) != torch.tensor([[3], [39], [4]]),
}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("slope", [0.0, 0.3])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("logn", [None, "train", "post"])
def test_padding(padding, slope, ragged, logn):
    query, key, value = tensors(40)
    visible = PADDING[padding]
    options = {"window": WINDOW, "slope": slope, "logn": logn, "train_length": 6 if logn else None}
    for x in (key, value):
        x.transpose(1, 2)[~visible] = torch.nan
    expected = rerope_attention(query, key, value, key_padding_mask=visible, **options)[:, :, -1:]
    length = torch.tensor([40, 40, 40]) if ragged else None
    out = rerope_decode(query[:, :, -1:], key, value, key_padding_mask=visible, length=length, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    hidden = ~visible[:, -1]
    assert torch.equal(out[hidden], torch.zeros_like(out[hidden]))


@pytest.mark.parametrize("lengths", [[1, 8, 40], [7, 9, 0], [10, 31, 33], [6, 8, 10]])
@pytest.mark.parametrize("slope", [0.0, 0.3])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lengths_of_their_own(lengths, slope, rotated, dtype):
    """Padding on the right: what stands behind a sample's length is nothing, not even in NaN."""
    query, key, value = tensors(40, dtype=dtype)
    lengths = torch.tensor(lengths)
    for x in (key, value):
        x.transpose(1, 2)[torch.arange(40) >= lengths[:, None]] = torch.nan
    last = query.gather(2, (lengths - 1).clamp(min=0)[:, None, None, None].expand(-1, 4, -1, 8))
    options = {"window": WINDOW, "slope": slope, "logn": "post", "train_length": 6}
    rotated_key = leaky(key, slope) if rotated and slope else None
    out = rerope_decode(last, key, value, length=lengths, leaky_key=rotated_key, **options)
    for i, length in enumerate(lengths.tolist()):
        if length == 0:
            assert torch.equal(out[i], torch.zeros_like(out[i]))
            continue
        alone = [x[i : i + 1, :, :length].double() for x in (query, key, value)]
        expected = rerope_attention(*alone, **options)[:, :, -1:]
        limit = 1e-12 if dtype == torch.float64 else 2e-2
        torch.testing.assert_close(out[i : i + 1].double(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("interleaved", [False, True])
def test_options(interleaved):
    query, key, value = tensors(40)
    options = {"window": 5, "scale": 0.7, "inv_freq": torch.tensor([1.0, 0.3]), "interleaved": interleaved}
    expected = rerope_attention(query, key, value, **options)[:, :, -1:]
    torch.testing.assert_close(rerope_decode(query[:, :, -1:], key, value, **options), expected, rtol=0, atol=1e-12)


def test_wide_window_and_slope_one_are_rope():
    query, key, value = tensors(70)
    expected = rope_attention(query, key, value)[:, :, -1:]
    for options in ({"window": 1000}, {"window": 8, "slope": 1.0}):
        torch.testing.assert_close(rerope_decode(query[:, :, -1:], key, value, **options), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("options", [{}, {"key_padding_mask": PADDING["left"]}, {"slope": 0.3}])
@pytest.mark.parametrize("value_dim", [6, 8, 9])
def test_lower_precision(dtype, limit, options, value_dim):
    exact = tensors(40, value_dim=value_dim)
    query, key, value = (x.to(dtype) for x in exact)
    out = rerope_decode(query[:, :, -1:], key, value, window=WINDOW, **options)
    assert out.dtype == dtype
    expected = rerope_attention(*(x.to(dtype).double() for x in exact), window=WINDOW, **options)[:, :, -1:]
    assert (out.double() - expected).abs().max() <= limit
    # With a gradient, no kernel.
    dense = rerope_decode(query[:, :, -1:].requires_grad_(), key, value, window=WINDOW, **options)
    assert (dense.double() - expected).abs().max() <= limit


def test_gradients():
    query, key, value = (x.requires_grad_() for x in tensors(9, heads=2, key_heads=1, dim=4, value_dim=3, batch=2))
    visible = torch.arange(9) >= torch.tensor([[0], [2]])

    def step(q, k, v):
        return rerope_decode(
            q[:, :, -1:], k, v, window=3, slope=0.3, key_padding_mask=visible, length=torch.tensor([9, 8])
        )

    assert torch.autograd.gradcheck(step, (query, key, value))
    with torch.no_grad():
        key[1, :, :2] = value[1, :, :2] = torch.nan
    for grad in torch.autograd.grad(step(query, key, value).sum(), (query, key, value)):
        assert grad.isfinite().all()


def test_compiles():
    torch._dynamo.reset()
    query, key, value = tensors(40, dtype=torch.float32)
    compiled = torch.compile(rerope_decode, fullgraph=True, backend="aot_eager")
    for options in ({}, {"length": torch.tensor([3, 40, 20]), "key_padding_mask": PADDING["left"]}):
        expected = rerope_decode(query[:, :, -1:], key, value, window=WINDOW, **options)
        torch.testing.assert_close(compiled(query[:, :, -1:], key, value, window=WINDOW, **options), expected)


def test_far_keys_are_a_set():
    query, key, value = tensors(40)
    order = torch.cat((torch.randperm(32, generator=torch.Generator().manual_seed(1)), torch.arange(32, 40)))
    out = rerope_decode(query[:, :, -1:], key, value, window=WINDOW)
    moved = rerope_decode(query[:, :, -1:], key[:, :, order], value[:, :, order], window=WINDOW)
    torch.testing.assert_close(moved, out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_more_keys_than_are_rotated_at_a_time(slope):
    query, key, value = tensors(3100, heads=2, key_heads=1, dim=4, batch=1)
    for window in (1023, 1024, 1025, 2060):
        expected = rerope_attention(query[:, :, -1:], key, value, window=window, slope=slope, backend="reference")
        out = rerope_decode(query[:, :, -1:], key, value, window=window, slope=slope)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_far_positions_are_exact():
    """Angles of near keys are small, so slot 100000 is as good as slot 10."""
    query, key, value = tensors(100_000, heads=1, key_heads=1, dim=4, value_dim=4, batch=1)
    exact = rerope_decode(query[:, :, -1:], key, value, window=50)
    single = rerope_decode(*(x.float() for x in (query[:, :, -1:], key, value)), window=50)
    assert (single.double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": torch.zeros(3, 4, 2, 8)}, ValueError, r"one query per sample, got query \(3, 4, 2, 8\)"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"slope": -1.0}, ValueError, "slope must be in"),
        ({"length": 0}, ValueError, "length must be at least 1, got 0"),
        ({"length": 41}, ValueError, "at most the number of slots, 40, got 41"),
        ({"length": torch.ones(3)}, ValueError, r"length must be integers of shape \(B,\), got torch.float32"),
        ({"length": torch.ones(2, dtype=torch.int64)}, ValueError, r"got torch.int64 of \(2,\)"),
        ({"leaky_key": torch.zeros(3, 2, 40, 8)}, ValueError, "of use with slope > 0 only"),
        ({"slope": 0.5, "leaky_key": torch.zeros(3, 2, 39, 8)}, ValueError, "leaky_key must be like key"),
        ({"key_padding_mask": torch.ones(3, 40)}, TypeError, "key_padding_mask must be a bool tensor"),
        ({"inv_freq": torch.ones(5)}, ValueError, "R at most 8"),
        ({"logn": "post"}, ValueError, "logn='post' needs train_length"),
        ({"logn": "none", "train_length": 4}, ValueError, "logn must be one of"),
        ({"train_length": 4}, ValueError, "train_length is of use with logn only"),
        ({"logn": "post", "train_length": 1}, ValueError, "train_length must be at least 2"),
        ({"value": torch.zeros(3, 2, 40, 8, dtype=torch.float64)}, TypeError, "one dtype"),
    ],
)
def test_bad_input(change, error, match):
    query, key, value = tensors(40, dtype=torch.float32)
    with pytest.raises(error, match=match):
        rerope_decode(**{"query": query[:, :, -1:], "key": key, "value": value, "window": WINDOW, **change})
