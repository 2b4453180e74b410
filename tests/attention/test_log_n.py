"""Factors of queries, and the number of keys that each of them sees."""

import math

import pytest
import torch

from danlu.attention import ReRoPE, rerope_attention, rope_attention
from danlu.attention._log_n import count_visible
from danlu.positions import logn_scale


def test_factors():
    count = torch.tensor([0, 1, 2, 8, 64, 512])
    train = logn_scale(count, 64, "train")
    expected = [math.log(max(n, 2)) / math.log(64) for n in count.tolist()]
    torch.testing.assert_close(train, torch.tensor(expected, dtype=torch.float64))
    assert logn_scale(count, 64, "post").tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 1.5]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("rows", [300, 7])
def test_counts_are_those_of_the_masks(is_causal, rows):
    """Against the sum of the visibility of every pair."""
    keys, device = 300, torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 3, rows, keys, generator=generator) > 0.4
    padding = torch.rand(2, keys, generator=generator) > 0.2
    causal = torch.ones(rows, keys, dtype=torch.bool)
    if is_causal:
        causal = causal.tril(keys - rows)

    def count(key_padding_mask=None, cu_seqlens=None, attn_mask=None):
        found = count_visible(
            rows,
            keys,
            device,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            attn_mask=attn_mask,
        )
        return found.expand(2, 3, rows, 1)[..., 0]

    everything = causal.expand(2, 3, rows, keys)
    assert torch.equal(count(), everything.sum(-1))
    assert torch.equal(count(padding), (everything & padding[:, None, None]).sum(-1))
    for given in (mask, mask[:1], mask[:, :1], mask[0, 0], mask[:, :, :1], mask[:, :, :, :1], mask[:1, :1, :1, :1]):
        assert torch.equal(count(attn_mask=given), (everything & given).sum(-1))
        assert torch.equal(count(padding, attn_mask=given), (everything & given & padding[:, None, None]).sum(-1))
    if rows == keys:
        owner = torch.arange(keys) // 100
        packed = count(cu_seqlens=torch.tensor([0, 100, 100, 200, 300], dtype=torch.int32))
        assert torch.equal(packed, (everything & (owner[:, None] == owner)).sum(-1))


@pytest.mark.parametrize("logn", ["train", "post"])
@pytest.mark.parametrize("function", ["rope", "rerope"])
def test_it_multiplies_the_query(logn, function):
    query, key, value = torch.randn(3, 2, 4, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention = rope_attention if function == "rope" else lambda *x, **o: rerope_attention(*x, window=5, **o)
    n = torch.arange(1, 31, dtype=torch.float64)
    factor = n.clamp(min=2).log() / math.log(10) if logn == "train" else (n.log() / math.log(10)).clamp(min=1)
    expected = attention(query * factor[:, None], key, value)
    out = attention(query, key, value, logn=logn, train_length=10)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert (out - attention(query, key, value)).abs().max() > 1e-3
    if logn == "post":
        plain = attention(query, key, value)
        torch.testing.assert_close(out[:, :, :10], plain[:, :, :10], rtol=0, atol=0)
    # An encoder sees all keys of the sample from everywhere.
    whole = attention(query, key, value, logn=logn, train_length=10, is_causal=False)
    scaled = attention(query * (math.log(30) / math.log(10)), key, value, is_causal=False)
    torch.testing.assert_close(whole, scaled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_is_not_counted(padding, is_causal):
    query, key, value = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visible = (torch.arange(30) >= 12)[None] if padding == "left" else (torch.arange(30) < 18)[None]
    options = {"window": 5, "logn": "train", "train_length": 6, "is_causal": is_causal}
    padded = rerope_attention(query, key, value, key_padding_mask=visible, **options)
    alone = rerope_attention(*(x[:, :, visible[0]] for x in (query, key, value)), **options)
    torch.testing.assert_close(padded[:, :, visible[0]], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"logn": "post"}, ValueError, "logn='post' needs train_length"),
        ({"logn": "always", "train_length": 4}, ValueError, "logn must be one of 'train', 'post', got 'always'"),
        ({"train_length": 4}, ValueError, "train_length is of use with logn only, got 4"),
        ({"logn": "train", "train_length": 1}, ValueError, "train_length must be at least 2, got 1"),
        ({"logn": "train", "train_length": 4.0}, TypeError, "train_length must be an int"),
    ],
)
def test_bad_options(options, error, match):
    for call in (
        lambda: ReRoPE(3, **options),
        lambda: rope_attention(*torch.zeros(3, 1, 1, 4, 4), **options),
        lambda: rerope_attention(*torch.zeros(3, 1, 1, 4, 4), window=2, **options),
    ):
        with pytest.raises(error, match=match):
            call()
