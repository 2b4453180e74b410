"""ReRoPE within attention on quantized keys: near keys rotated by their distance, cached codewords at the window."""

import pytest
import torch

from danlu.attention import _vq_calls, rerope_attention, vq_attention
from danlu.attention._vector_quantizer import look_up, nearest_codes
from danlu.positions import apply_rope, rope_frequencies

# Length, block, codewords.
CASES = [(64, 16, 8), (70, 16, 32), (10, 16, 4), (150, 8, 7), (33, 1, 3)]


def tensors(keys, codes, *, queries=None, value_dim=8, dtype=torch.float64):
    """Query, key, value (which require gradients) and a codebook, 4 heads on 2."""
    generator = torch.Generator().manual_seed(keys + codes)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = draw(2, 4, queries or keys, 8), draw(2, 2, keys, 8), draw(2, 2, keys, value_dim)
    return [x.requires_grad_() for x in leaves], draw(2, codes, 8)


def bias_of(block, dtype=torch.float64):
    return torch.linspace(-1, 2, 8 * block, dtype=dtype).sin().view(4, 2 * block).requires_grad_()


def windows(block):
    """Up to the longest."""
    return sorted({1, 2, max(1, block // 2), block, block + 1} & set(range(1, block + 2)))


def assert_equal_to_the_definition(inputs, codebook, bias=None, **options):
    results = []
    for backend in ("blocks", "reference"):
        out = vq_attention(*inputs, codebook, bias=bias, backend=backend, **options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, [*inputs, *([] if bias is None else [bias])], upstream)])
    for fast, dense in zip(*results, strict=True):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "block", "codes"), CASES)
def test_is_rerope_of_quantized_keys(length, block, codes):
    """Exactly, for every window that the cache allows, although the cache holds no position."""
    for queries in {1, min(length, 25), length}:
        (query, key, value), codebook = tensors(length, codes, queries=queries)
        words = look_up(codebook, nearest_codes(key, codebook))
        for window in windows(block):
            for backend in ("blocks", "reference"):
                found = vq_attention(query, key, value, codebook, block_size=block, window=window, backend=backend)
                expected = rerope_attention(query, words, value, window=window, backend="reference")
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "block", "codes"), CASES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_blocks_equal_the_definition(length, block, codes, with_bias):
    bias = bias_of(block) if with_bias else None
    for queries in {min(length, 25), length}:
        for value_dim in (8, 5):
            inputs, codebook = tensors(length, codes, queries=queries, value_dim=value_dim)
            for window in windows(block):
                assert_equal_to_the_definition(inputs, codebook, bias, block_size=block, window=window)


def test_many_small_calls(monkeypatch):
    monkeypatch.setitem(_vq_calls._HELD, "cpu", 700)
    for value_dim in (8, 5):
        inputs, codebook = tensors(70, 9, value_dim=value_dim)
        assert_equal_to_the_definition(inputs, codebook, bias_of(8), block_size=8, window=5)


def test_gradients_of_near_keys_are_those_of_rerope():
    """With all keys near, straight through the quantizer; the others get none from the cache."""
    inputs, codebook = tensors(30, 6)
    found = torch.autograd.grad(vq_attention(*inputs, codebook, block_size=15, window=9).square().sum(), inputs)
    query, key, value = inputs
    words = look_up(codebook, nearest_codes(key, codebook)).requires_grad_()
    exact = rerope_attention(query, words, value, window=9, backend="reference")
    expected = torch.autograd.grad(exact.square().sum(), (query, words, value))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_rotated_keys_have_no_common_codewords():
    """Why RoPE does not fit: equal keys are one codeword, equal keys rotated by their places are many."""
    key = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(1, 1, 64, 8)
    rotated = apply_rope(key, torch.arange(64), rope_frequencies(8))
    codebook = torch.stack((key[0, 0, 0], -key[0, 0, 0]))[None]

    def error(keys):
        return float((keys - look_up(codebook, nearest_codes(keys, codebook))).square().sum() / keys.square().sum())

    assert error(key) == 0
    assert error(rotated) > 0.2


def test_only_the_distance_counts():
    """Tokens in front that nobody sees change nothing, nor does the order of cached ones."""
    (query, key, value), codebook = tensors(70, 9)
    options = {"codebook": codebook, "block_size": 16, "window": 16}
    out = vq_attention(query, key, value, **options)
    order = torch.cat((torch.randperm(48, generator=torch.Generator().manual_seed(3)), torch.arange(48, 70)))
    shuffled = vq_attention(query, key[:, :, order], value[:, :, order], **options)
    torch.testing.assert_close(shuffled[:, :, 64:], out[:, :, 64:], rtol=0, atol=1e-12)
    assert not torch.allclose(shuffled[:, :, 20:40], out[:, :, 20:40], atol=1e-2)
    front = [torch.cat((torch.full_like(x[:, :, :5], torch.nan), x.detach()), 2) for x in (query, key, value)]
    mask = torch.arange(75).expand(2, -1) >= 5
    later = vq_attention(*front, key_padding_mask=mask, **options)
    assert (later[:, :, :5] == 0).all()
    torch.testing.assert_close(later[:, :, 5:], out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("token", [0, 7, 8, 20, 39])
def test_causality(token):
    (query, key, value), codebook = tensors(40, 6)
    options = {"codebook": codebook, "block_size": 8, "window": 6}
    out = vq_attention(query, key, value, **options)
    changed = [torch.cat((x[:, :, :token], x[:, :, token:].flip(-1) * 3), 2) for x in (query, key, value)]
    again = vq_attention(*changed, **options)
    torch.testing.assert_close(again[:, :, :token], out[:, :, :token], rtol=0, atol=1e-14)
    assert (again - out)[:, :, token:].abs().max() > 1e-2


@pytest.mark.parametrize("queries", [20, 9, 1])
def test_padding(queries):
    masks = {
        "left": torch.tensor([[True] * 20, [False] * 7 + [True] * 13]),
        "right": torch.tensor([[True] * 20, [True] * 9 + [False] * 11]),
        "gaps": torch.tensor([[True, True, False, True] * 5, [False, True] * 10]),
        "one_empty": torch.tensor([[True] * 20, [False] * 20]),
    }
    for mask in masks.values():
        inputs, codebook = tensors(20, 5, queries=queries)
        for window in (3, 4):
            assert_equal_to_the_definition(
                inputs, codebook, bias_of(4), block_size=4, window=window, key_padding_mask=mask
            )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precision(dtype, limit):
    inputs, codebook = tensors(150, 9, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    options = {"block_size": 16, "window": 16}
    out, dense = vq_attention(*inputs, codebook, **options), vq_attention(*exact, codebook, **options)
    assert out.dtype == dtype
    assert (out.double() - dense).abs().max() <= limit
    for fast, slow in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(dense.sum(), exact), strict=True):
        assert (fast.double() - slow).abs().max() <= limit * slow.abs().max()


def test_other_frequencies_and_partial_rotation():
    (query, key, value), codebook = tensors(40, 6)
    words = look_up(codebook, nearest_codes(key, codebook))
    for frequencies in (rope_frequencies(8, base=50.0), rope_frequencies(4)):
        found = vq_attention(query, key, value, codebook, block_size=8, window=8, inv_freq=frequencies, scale=0.9)
        expected = rerope_attention(query, words, value, window=8, inv_freq=frequencies, scale=0.9, backend="reference")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_compiles_whole():
    inputs, codebook = tensors(40, 6)
    options = {"codebook": codebook, "block_size": 8, "window": 5}
    compiled = torch.compile(vq_attention, fullgraph=True, backend="aot_eager")
    found, expected = (f(*inputs, **options) for f in (compiled, vq_attention))
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"window": 6}, ValueError, r"window must be at most block_size \+ 1 = 5.*got 6"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 2.0}, TypeError, "window must be an int"),
        ({"window": 2, "is_causal": False}, ValueError, "window needs is_causal=True"),
        ({"inv_freq": torch.ones(4)}, ValueError, "inv_freq needs a window"),
        ({"window": 2, "inv_freq": torch.ones(5)}, ValueError, r"inv_freq must have shape \(R / 2,\)"),
        ({"window": 2, "inv_freq": torch.ones(4).long()}, TypeError, "inv_freq must be a floating-point tensor"),
    ],
)
def test_bad_input(change, error, match):
    (query, key, value), codebook = tensors(9, 3)
    with pytest.raises(error, match=match):
        vq_attention(query, key, value, codebook, **{"block_size": 4, **change})
