"""ReRoPE alone: the pairwise definition, limits, invariances, bad input."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from danlu.attention import ReRoPE, rerope_attention, rope_attention
from danlu.positions import apply_rope, rope_frequencies


def clipped(t: int, window: int, slope: float) -> float:
    """g(t), written from the definition."""
    size = abs(t)
    return math.copysign(size if size < window else window + (size - window) * slope, t)


def pairwise(query: Tensor, key: Tensor, value: Tensor, window: int, slope: float, is_causal: bool) -> Tensor:
    """The definition, one pair of positions at a time, for one head."""
    length, dim = query.shape
    inv_freq = rope_frequencies(dim)
    rows = []
    for i in range(length):
        seen = range(i + 1) if is_causal else range(length)
        scores = []
        for j in seen:
            relative = torch.tensor([-clipped(i - j, window, slope)], dtype=torch.float64)
            scores.append((query[i] * apply_rope(key[j : j + 1], relative, inv_freq)[0]).sum() * dim**-0.5)
        rows.append(torch.softmax(torch.stack(scores), 0) @ value[: len(scores)])
    return torch.stack(rows)


def one_head(length: int, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, length, dim, generator=generator, dtype=torch.float64)
    return query, key, value


@pytest.mark.parametrize(
    ("length", "window", "slope"),
    [
        (37, 8, 0.0),
        (37, 8, 0.25),
        (64, 16, 0.0),
        (64, 1, 0.0),
        (50, 64, 0.0),
        (50, 50, 0.0),
        (96, 32, 16.0),
        (33, 8, 0.0),
    ],
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_against_the_pairwise_definition(length, window, slope, is_causal):
    query, key, value = one_head(length)
    expected = pairwise(query, key, value, window, slope, is_causal)
    cotangent = torch.randn(length, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    out = rerope_attention(*(x[None, None] for x in inputs), window=window, slope=slope, is_causal=is_causal)[0, 0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    if length <= 37:
        reference = [x.clone().requires_grad_() for x in (query, key, value)]
        (pairwise(*reference, window, slope, is_causal) * cotangent).sum().backward()
        (out * cotangent).sum().backward()
        for mine, theirs in zip(inputs, reference, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


def test_rope_equals_scaled_dot_product_attention():
    query, key, value = (x[None, None] for x in one_head(20))
    positions, inv_freq = torch.arange(20), rope_frequencies(8)
    turned = [apply_rope(x, positions, inv_freq) for x in (query, key)]
    for is_causal in (True, False):
        expected = F.scaled_dot_product_attention(*turned, value, is_causal=is_causal)
        out = rope_attention(query, key, value, is_causal=is_causal)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@given(length=st.integers(1, 24), slope=st.floats(0, 3), is_causal=st.booleans(), seed=st.integers(0, 99))
def test_wide_window_is_rope_to_the_last_bit(length, slope, is_causal, seed):
    inputs = [x[None, None].float() for x in one_head(length, seed=seed)]
    expected = rope_attention(*inputs, is_causal=is_causal)
    for window in (length, length + 1, 10**6):
        assert torch.equal(rerope_attention(*inputs, window=window, slope=slope, is_causal=is_causal), expected)


@given(window=st.integers(1, 30), is_causal=st.booleans())
def test_slope_one_is_rope(window, is_causal):
    inputs = [x[None, None] for x in one_head(24)]
    out = rerope_attention(*inputs, window=window, slope=1.0, is_causal=is_causal)
    torch.testing.assert_close(out, rope_attention(*inputs, is_causal=is_causal), rtol=0, atol=1e-12)


def test_far_keys_are_a_set():
    """With slope 0 the last query does not know the order of keys beyond the window."""
    query, key, value = one_head(30)
    window = 6
    order = torch.cat((torch.randperm(30 - window), torch.arange(30 - window, 30)))
    # Keys at distance exactly `window` are far as well: distances window .. 29 are slots 0 .. 29 - window.
    out = rerope_attention(query[None, None], key[None, None], value[None, None], window=window)
    moved = rerope_attention(query[None, None], key[order][None, None], value[order][None, None], window=window)
    torch.testing.assert_close(moved[..., -1, :], out[..., -1, :], rtol=0, atol=1e-12)
    leaky = rerope_attention(query[None, None], key[None, None], value[None, None], window=window, slope=0.5)
    moved = rerope_attention(
        query[None, None], key[order][None, None], value[order][None, None], window=window, slope=0.5
    )
    assert (moved[..., -1, :] - leaky[..., -1, :]).abs().max() > 1e-3


@pytest.mark.parametrize("is_causal", [True, False])
def test_one_rotation_for_far_keys_on_both_sides_is_wrong(is_causal):
    """The published code rotates queries of far keys by +w wherever the key is; right for causal attention only."""
    query, key, value = one_head(37)
    window, inv_freq, slots = 8, rope_frequencies(8), torch.arange(37)
    distance = slots[:, None] - slots
    near = apply_rope(query, slots, inv_freq) @ apply_rope(key, slots, inv_freq).T
    far = apply_rope(query, torch.tensor([window]), inv_freq) @ key.T
    scores = torch.where(distance.abs() < window, near, far) * 8**-0.5
    if is_causal:
        scores = scores.masked_fill(distance < 0, -math.inf)
    published = torch.softmax(scores, -1) @ value
    out = rerope_attention(*(x[None, None] for x in (query, key, value)), window=window, is_causal=is_causal)[0, 0]
    error = (published - out).abs().max()
    assert error < 1e-12 if is_causal else error > 0.3


def test_shift_of_slots_changes_nothing():
    """Hidden slots in front shift every position, and only differences count."""
    inputs = [x[None, None] for x in one_head(20)]
    padded = [F.pad(x, (0, 0, 50, 0)) for x in inputs]
    mask = torch.arange(70)[None] >= 50
    for slope in (0.0, 0.3):
        out = rerope_attention(*inputs, window=5, slope=slope)
        shifted = rerope_attention(*padded, window=5, slope=slope, key_padding_mask=mask)
        torch.testing.assert_close(shifted[:, :, 50:], out, rtol=0, atol=1e-10)


def test_no_tensor_per_pair_and_channel():
    """Score matrices are held, but nothing of size M N D."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.size = max(self.size, out.numel())
            return out

    query, key, value = torch.randn(3, 1, 2, 64, 16)
    with Largest() as largest:
        rerope_attention(query, key, value, window=8)
    assert largest.size == 2 * 64 * 64


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 2.0}, TypeError, "window must be an int"),
        ({"window": 2, "slope": -0.1}, ValueError, "slope must be in"),
        ({"window": 2, "slope": float("inf")}, ValueError, "slope must be in"),
        ({"window": True}, TypeError, "window must be an int"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        rerope_attention(*torch.randn(3, 1, 1, 4, 4), **options)
    with pytest.raises(error, match=match):
        ReRoPE(**options)


def test_device_mismatch_names_the_tensors():
    query, key, value = torch.randn(3, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="query on cpu, key on meta, value on cpu"):
        rerope_attention(query, key.to("meta"), value, window=2)


def test_positions_that_are_slots_change_nothing():
    query, key, value = torch.randn(3, 2, 2, 30, 8, dtype=torch.float64)
    for options in ({"window": 7, "slope": 0.3}, {"window": 99}):
        for positions in (torch.arange(30), torch.arange(30.0) + 5, torch.arange(30).expand(2, -1) + 10**4):
            expected = rerope_attention(query, key, value, **options)
            found = rerope_attention(query, key, value, positions=positions, **options)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# Steps that are wide, narrow, none and fractions; samples of their own.
GIVEN = {
    "gaps": torch.tensor([0, 3, 4, 20, 21, 22, 23, 50, 51, 60]).repeat_interleave(7),
    "fractions": torch.linspace(0, 23.5, 70),
    "samples": torch.rand(2, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1) * 3,
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("queries", [70, 20])
def test_positions_against_the_pairwise_definition(given, is_causal, queries):
    positions = GIVEN[given].double().expand(2, -1)
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 1, queries, 8), (2, 1, 70, 8), (2, 1, 70, 8)
    query, key, value = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    window, slope, frequencies = 6, 0.4, rope_frequencies(8)
    own = positions[:, 70 - queries :]
    distance = own[:, :, None] - positions[:, None]
    clipped_to = distance.sign() * torch.where(
        distance.abs() < window, distance.abs(), window + (distance.abs() - window) * slope
    )
    angles = clipped_to[..., None] * frequencies
    first, second = key[:, 0, None, :, :4], key[:, 0, None, :, 4:]
    # The key turned back by the distance.
    turned = torch.cat((first * angles.cos() + second * angles.sin(), second * angles.cos() - first * angles.sin()), -1)
    scores = (query[:, 0, :, None] * turned).sum(-1) * 8**-0.5
    if is_causal:
        slots = torch.arange(70)
        scores = scores.masked_fill(slots > slots[70 - queries :, None], -torch.inf)
    expected = (torch.softmax(scores, -1) @ value[:, 0])[:, None]
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    results = [expected, *torch.autograd.grad(expected, (query, key, value), upstream, retain_graph=True)]
    for backend in ("reference", "banded"):
        found = rerope_attention(
            *(query, key, value),
            window=window,
            slope=slope,
            is_causal=is_causal,
            positions=GIVEN[given],
            backend=backend,
        )
        grads = torch.autograd.grad(found, (query, key, value), upstream)
        for x, y in zip((found, *grads), results, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    # Plain RoPE, whose bands need no tiles.
    plain = [
        rope_attention(query, key, value, is_causal=is_causal, positions=GIVEN[given], backend=backend)
        for backend in ("reference", "banded")
    ]
    torch.testing.assert_close(*plain, rtol=0, atol=1e-12)
    wide = rerope_attention(query, key, value, window=1000, is_causal=is_causal, positions=GIVEN[given])
    torch.testing.assert_close(wide, plain[0], rtol=0, atol=1e-12)


def test_positions_with_padding_and_log_n():
    query, key, value = torch.randn(3, 2, 2, 70, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visible = torch.arange(70) >= torch.tensor([[0], [30]])
    options = {"window": 6, "positions": GIVEN["samples"], "logn": "post", "train_length": 12}
    for backend in ("reference", "banded"):
        out = rerope_attention(query, key, value, key_padding_mask=visible, backend=backend, **options)
        assert (out[1, :, :30] == 0).all()
        alone = rerope_attention(
            *(x[1:, :, 30:] for x in (query, key, value)),
            **{**options, "positions": GIVEN["samples"][1:, 30:]},
        )
        torch.testing.assert_close(out[1:, :, 30:], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("positions", "error", "match"),
    [
        ([0, 1], TypeError, "positions must be integers, float32 or float64, got list"),
        (torch.arange(6).half(), TypeError, "got torch.float16"),
        (torch.arange(5), ValueError, r"positions must have shape \(N,\) or \(B, N\) = \(1, 6\), got \(5,\)"),
        (
            torch.tensor([0, 1, 3, 2, 4, 5]),
            ValueError,
            r"must not fall along the slots, but they do behind index \[2\]",
        ),
    ],
)
def test_bad_positions(positions, error, match):
    x = torch.randn(1, 2, 6, 8)
    for function in (rope_attention, partial(rerope_attention, window=2)):
        with pytest.raises(error, match=match):
            function(x, x, x, positions=positions)
        with pytest.raises(ValueError, match="so there cannot be others with cu_seqlens"):
            function(x, x, x, positions=torch.arange(6), cu_seqlens=torch.tensor([0, 6]))


def test_dropout_is_of_the_weights():
    """Each weight is 0 or 1 / (1 - p) of what it was, and the mean over many draws is attention without dropout."""
    query, key = torch.randn(2, 1, 2, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = torch.eye(12, dtype=torch.float64).expand(1, 2, -1, -1)
    torch.manual_seed(0)
    for function in (rope_attention, partial(rerope_attention, window=4), partial(rerope_attention, window=99)):
        plain = function(query, key, value)
        drawn = torch.stack([function(query, key, value, dropout_p=0.25) for _ in range(150)])
        kept = drawn != 0
        torch.testing.assert_close(drawn[kept], (plain / 0.75).expand_as(drawn)[kept])
        assert float(kept[:, plain != 0].double().mean()) == pytest.approx(0.75, abs=0.02)
        torch.testing.assert_close(drawn.mean(0), plain, rtol=0, atol=0.25)
    module = ReRoPE(window=4, dropout_p=0.5)
    assert "dropout_p=0.5" in repr(module)
    assert not torch.equal(module(query, key, value), module(query, key, value))
    module.eval()
    assert torch.equal(module(query, key, value), rerope_attention(query, key, value, window=4))


def test_dropout_where_there_is_none():
    x = torch.randn(1, 2, 300, 8)
    with pytest.raises(ValueError, match="backend='banded' cannot run: the bands have no dropout"):
        rerope_attention(x, x, x, window=4, dropout_p=0.1, backend="banded")
    with pytest.warns(UserWarning, match="holds all scores, because the bands have no dropout"):
        rerope_attention(x, x, x, window=4, dropout_p=0.1)
    for bad in (1.0, -0.1):
        with pytest.raises(ValueError, match="dropout_p must be in"):
            rerope_attention(x, x, x, window=4, dropout_p=bad)
    with pytest.raises(ValueError, match="dropout_p must be in"):
        ReRoPE(window=4, dropout_p=1.0)
