"""Frequencies that follow the length: the dense definition, cuts of the text, padding, packed texts, bad options."""

import math

import pytest
import torch
from torch import Tensor

from danlu.attention import dynamic_rope_attention, rope_attention
from danlu.positions import apply_rope, dynamic_factor, rope_frequencies, scale_frequencies


def tensors(length=37, *, heads=4, key_heads=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, length, dim), (2, key_heads, length, dim), (2, key_heads, length, 5))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def dense(query, key, value, *, train_length, factor=1.0, step=1, method="ntk-aware", is_causal=True) -> Tensor:
    """One row at a time, as the definition has it."""
    count, plain = key.shape[2], rope_frequencies(query.shape[-1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    rows = []
    for i in range(count):
        seen = i + 1 if is_causal else count
        length = train_length + step * max(0, math.ceil((seen - train_length) / step))
        kappa = max(1.0, factor * length / train_length - (factor - 1))
        options = {"train_length": train_length} if method == "by-parts" else {}
        frequencies = scale_frequencies(plain, method=method, factor=kappa, **options)
        turned = apply_rope(query[:, :, i : i + 1], torch.tensor([i]), frequencies)
        keys = apply_rope(key[:, :, :seen], torch.arange(seen), frequencies)
        weights = (turned @ keys.mT * query.shape[-1] ** -0.5).softmax(-1)
        rows.append(weights @ value[:, :, :seen])
    return torch.cat(rows, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"train_length": 8},
        {"train_length": 8, "factor": 2.0, "step": 3},
        {"train_length": 1, "step": 7},
        {"train_length": 36, "factor": 4.0},
        {"train_length": 8, "step": 1000},
        {"train_length": 10, "step": 9, "is_causal": False},
        *({"train_length": 8, "step": 4, "method": method} for method in ("linear", "ntk-mixed", "by-parts")),
    ],
    ids=str,
)
def test_equals_the_definition(options):
    query, key, value = tensors()
    expected = dense(query, key, value, **options)
    for backend in ("auto", "reference", "banded"):
        out = dynamic_rope_attention(query, key, value, **{"step": 1, **options}, backend=backend)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    # It is not what one factor gives, nor plain RoPE.
    assert (rope_attention(query, key, value, is_causal=options.get("is_causal", True)) - expected).abs().max() > 1e-3


def test_the_step_is_an_eighth_of_the_training_length():
    query, key, value = tensors()
    for train_length, step in ((16, 2), (7, 1)):
        out = dynamic_rope_attention(query, key, value, train_length=train_length)
        assert torch.equal(out, dynamic_rope_attention(query, key, value, train_length=train_length, step=step))


@pytest.mark.parametrize("length", [37, 12, 8])
def test_any_cut_of_the_text_gives_the_same(length):
    query, key, value = tensors(length)
    options = {"train_length": 9, "factor": 2.0, "step": 4, "logn": "post"}
    full = dynamic_rope_attention(query, key, value, **options)
    for cut in range(1, length):
        parts = [
            dynamic_rope_attention(query[:, :, low:high], key[:, :, :high], value[:, :, :high], **options)
            for low, high in ((0, cut), (cut, length))
        ]
        torch.testing.assert_close(torch.cat(parts, 2), full, rtol=0, atol=1e-12)
    steps = [
        dynamic_rope_attention(query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], **options)
        for i in range(length)
    ]
    torch.testing.assert_close(torch.cat(steps, 2), full, rtol=0, atol=1e-12)


def test_short_text_is_plain_bit_for_bit():
    query, key, value = tensors(12)
    mask = torch.arange(12) >= torch.tensor([[0], [5]])
    for options in ({}, {"is_causal": False}, {"key_padding_mask": mask}):
        plain = rope_attention(query, key, value, **options)
        assert torch.equal(dynamic_rope_attention(query, key, value, train_length=12, factor=4.0, **options), plain)
    # And so is the beginning of long text.
    out = dynamic_rope_attention(query, key, value, train_length=7)
    torch.testing.assert_close(out[:, :, :7], rope_attention(query, key, value)[:, :, :7], rtol=0, atol=1e-14)


@pytest.mark.parametrize("queries", [37, 6, 1])
@pytest.mark.parametrize("hidden", ["left", "right", "both"])
def test_padding_counts_for_no_length(queries, hidden):
    query, key, value = tensors()
    slots = torch.arange(37)
    low, high = {"left": (20, 37), "right": (0, 15), "both": (3, 34)}[hidden]
    mask = torch.stack((slots >= 0, (slots >= low) & (slots < high)))
    options = {"train_length": 9, "factor": 2.0, "step": 4}
    out = dynamic_rope_attention(query[:, :, -queries:], key, value, key_padding_mask=mask, **options)
    full = torch.zeros(2, 4, 37, 5, dtype=torch.float64)
    full[:1] = dynamic_rope_attention(query[:1], key[:1], value[:1], **options)
    alone = [x[1:, :, low:high] for x in (query, key, value)]
    full[1:, :, low:high] = dynamic_rope_attention(*alone, **options)
    torch.testing.assert_close(out, full[:, :, -queries:], rtol=0, atol=1e-12)
    assert (out[1, :, ~mask[1, -queries:]] == 0).all()


def test_nobody_and_nothing():
    query, key, value = tensors()
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1] = False
    out = dynamic_rope_attention(query, key, value, train_length=9, key_padding_mask=mask)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[:1], dynamic_rope_attention(query[:1], key[:1], value[:1], train_length=9))
    for slots in (slice(0, 0), slice(0, 37)):
        empty = query[:, :, :0].clone().requires_grad_()
        out = dynamic_rope_attention(empty, key[:, :, slots], value[:, :, slots], train_length=9)
        assert out.shape == (2, 4, 0, 5)
        out.sum().backward()
        assert empty.grad.shape == empty.shape


def test_packed_texts_are_texts_of_their_own():
    query, key, value = (x[:1] for x in tensors())
    options = {"train_length": 5, "step": 2}
    borders = torch.tensor([0, 4, 4, 17, 37], dtype=torch.int32)
    out = dynamic_rope_attention(query, key, value, cu_seqlens=borders, **options)
    for low, high in ((0, 4), (4, 17), (17, 37)):
        alone = dynamic_rope_attention(*(x[:, :, low:high] for x in (query, key, value)), **options)
        torch.testing.assert_close(out[:, :, low:high], alone, rtol=0, atol=1e-12)


def test_options_reach_the_scores():
    query, key, value = tensors()
    inv_freq = torch.tensor([0.5, 0.01], dtype=torch.float64)
    for interleaved in (False, True):
        changed = {"inv_freq": inv_freq, "interleaved": interleaved}
        for rows in (query, query[:, :, -1:]):
            out = dynamic_rope_attention(rows, key, value, train_length=9, scale=0.7, **changed)
            rescaled = dynamic_rope_attention(rows * 0.7 * 8**0.5, key, value, train_length=9, **changed)
            torch.testing.assert_close(out, rescaled, rtol=1e-12, atol=1e-12)
            assert (out - dynamic_rope_attention(rows, key, value, train_length=9)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"train_length": 0}, ValueError, "train_length must be at least 1, got 0"),
        ({"train_length": 8.0}, TypeError, "train_length must be an int"),
        ({"step": 0}, ValueError, "step must be at least 1, got 0"),
        ({"factor": 0.5}, ValueError, r"factor must be in \[1, inf\), got 0.5"),
        ({"method": "dynamic"}, ValueError, "method must be one of"),
        ({"mixed_power": -1.0}, ValueError, "mixed_power must be in"),
        ({"key_padding_mask": torch.ones(2, 37)}, TypeError, "key_padding_mask must be a bool tensor"),
        ({"cu_seqlens": torch.tensor([0, 37])}, ValueError, "cu_seqlens needs one sample"),
        ({"logn": "always"}, ValueError, "logn must be one of"),
        ({"inv_freq": torch.ones(5)}, ValueError, "R at most 8"),
    ],
)
@pytest.mark.parametrize("length", [37, 8])
def test_bad_options_whatever_the_length(options, error, match, length):
    query, key, value = tensors(length)
    options = {name: x[:, :length] if name == "key_padding_mask" else x for name, x in options.items()}
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor([0, length])
    with pytest.raises(error, match=match):
        dynamic_rope_attention(query, key, value, **{"train_length": 8, **options})


def test_factors_of_lengths():
    # Of transformers: the base times (factor L / T - (factor - 1)) ^ (R / (R - 2)).
    for length, factor, expected in ((0, 2.0, 1.0), (64, 2.0, 1.0), (65, 2.0, 1 + 1 / 32), (512, 1.0, 8.0)):
        assert dynamic_factor(length, train_length=64, factor=factor) == expected
    kappa = dynamic_factor(200, train_length=64, factor=3.0)
    base = 10000.0 * (3.0 * 200 / 64 - 2.0) ** (8 / 6)
    torch.testing.assert_close(
        rope_frequencies(8, method="ntk-aware", factor=kappa), rope_frequencies(8, base=base), rtol=1e-12, atol=0
    )
    for options, error, match in (
        ({"length": -1}, ValueError, "length must be at least 0, got -1"),
        ({"train_length": 0}, ValueError, "train_length must be at least 1, got 0"),
        ({"factor": 0.9}, ValueError, "factor must be in"),
        ({"length": 2.0}, TypeError, "length must be an int"),
    ):
        with pytest.raises(error, match=match):
            dynamic_factor(**{"length": 8, "train_length": 4, **options})
