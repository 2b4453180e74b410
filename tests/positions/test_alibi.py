"""ALiBi: the slopes of the paper, the bias against loops, and bad input."""

import pytest
import torch
from torch.nn import functional as F

from danlu.positions import alibi_bias, alibi_slopes


def test_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(16)[1::2], alibi_slopes(8), rtol=1e-15, atol=0)
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert len(alibi_slopes(12)) == 12


def test_bias_against_loops():
    slopes = alibi_slopes(3).float()
    queries, keys = torch.tensor([[4, 5], [0, 9]]), torch.tensor([[0.0, 4.5, 7.0], [1.0, 2.0, 3.0]])
    bias = alibi_bias(slopes, queries, keys)
    assert bias.shape == (2, 3, 2, 3)
    assert bias.dtype == torch.float32
    for b in range(2):
        for h in range(3):
            for i in range(2):
                for j in range(3):
                    expected = -slopes[h].item() * abs(queries[b, i].item() - keys[b, j].item())
                    assert bias[b, h, i, j].item() == pytest.approx(expected, rel=1e-6)


def test_it_is_a_mask_of_attention():
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
    positions = torch.arange(6)
    bias = alibi_bias(alibi_slopes(2), positions, positions)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = q @ k.transpose(-2, -1) / 2.0 + bias
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
    # Positions matter by their differences alone.
    torch.testing.assert_close(bias, alibi_bias(alibi_slopes(2), positions + 70, positions + 70))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.arange(2), torch.arange(2), torch.arange(2)), TypeError, "slopes must be a floating-point"),
        ((torch.ones(2, 2), torch.arange(2), torch.arange(2)), ValueError, r"slopes must have shape \(H,\)"),
        ((torch.ones(2), [0, 1], torch.arange(2)), TypeError, "query_positions must be a torch"),
        ((torch.ones(2), torch.arange(2), torch.ones(2).half()), TypeError, "key_positions must be integers"),
        ((torch.ones(2), torch.tensor(3), torch.arange(2)), ValueError, "query_positions must have shape"),
    ],
)
def test_bad_bias(arguments, error, match):
    with pytest.raises(error, match=match):
        alibi_bias(*arguments)


def test_bad_slopes():
    with pytest.raises(ValueError, match="num_heads must be at least 1"):
        alibi_slopes(0)
    with pytest.raises(TypeError, match="num_heads must be an int"):
        alibi_slopes(2.0)
