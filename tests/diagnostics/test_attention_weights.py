"""Attention matrices: times values they are attention, kind by kind."""

import pytest
import torch

from danlu.attention import split_attention
from danlu.diagnostics import attention_rank_report, attention_sparsity, attention_weights


def tensors(heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 9, 6), (2, key_heads, 9, 6), (2, key_heads, 9, 5))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("causal", None),
        ("backward", None),
        ("bidirectional", None),
        ("forward_backward", None),
        ("prefix", 4),
        ("prefix", torch.tensor([9, 3])),
        ("forward_backward", 5),
    ],
    ids=str,
)
def test_times_values_they_are_attention(kind, prefix, scale):
    query, key, value = tensors()
    weights = attention_weights(query, key, kind=kind, prefix_lengths=prefix, scale=scale)
    assert weights.shape == (2, 4, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
    expected = split_attention(query, key, value, kind=kind, prefix_lengths=prefix, scale=scale)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), expected, rtol=1e-12, atol=1e-12)


def test_what_the_reports_say_of_them():
    query, key, _ = tensors(key_heads=4)
    causal = attention_weights(query, key)
    found = attention_rank_report(causal)
    torch.testing.assert_close(found.log_det, causal.diagonal(dim1=-2, dim2=-1).log().sum(-1), rtol=0, atol=1e-8)
    assert (found.rank == 9).all()
    even = attention_weights(torch.zeros_like(query), key, kind="bidirectional")
    torch.testing.assert_close(attention_sparsity(even, kind="n_eff"), torch.full((2, 4, 9), 9.0, dtype=torch.float64))


def test_dtypes_graph_and_empty():
    query, key, _ = tensors(dtype=torch.bfloat16)
    half = attention_weights(query.requires_grad_(), key)
    assert half.dtype == torch.float32
    assert not half.requires_grad
    torch.testing.assert_close(half, attention_weights(query.float(), key.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_weights(query, key), half)
    assert attention_weights(query[:, :, :0], key[:, :, :0]).shape == (2, 4, 0, 0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": torch.zeros(2, 9, 6)}, ValueError, r"query must have shape \(B, H, n, d\)"),
        ({"key": torch.zeros(2, 2, 9, 6).long()}, TypeError, "key must be a floating-point tensor"),
        ({"key": torch.zeros(2, 2, 9, 6)}, TypeError, "query and key must have one dtype"),
        ({"key": torch.zeros(2, 2, 8, 6).double()}, ValueError, "all but the number of heads must agree"),
        ({"key": torch.zeros(2, 3, 9, 6).double()}, ValueError, "be a multiple"),
        ({"kind": "full"}, ValueError, "kind must be one of"),
        ({"kind": "prefix"}, ValueError, "needs prefix_lengths"),
        ({"prefix_lengths": 3}, ValueError, "kind='causal' has no prefix"),
        ({"scale": "1"}, TypeError, "scale must be a real number"),
    ],
)
def test_bad_input(change, error, match):
    query, key, _ = tensors()
    with pytest.raises(error, match=match):
        attention_weights(**{"query": query, "key": key, **change})
