"""Windows: masks against brute force, the reach of stacked windows, and bad input."""

import pytest
import torch

from danlu.attention import LayerPlan, hwfa_layer_plan, rope_attention, window_mask


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 8, 20])
@pytest.mark.parametrize("length", [0, 1, 5, 8])
def test_masks_against_brute_force(length, window):
    causal, both = window_mask(length, window=window), window_mask(length, window=window, is_causal=False)
    assert causal.dtype == both.dtype == torch.bool
    for i in range(length):
        assert causal[i].nonzero()[:, 0].tolist() == list(range(max(0, i - window + 1), i + 1))
        # The nearest tokens, the earlier one where two are equally near, in one piece.
        nearest = sorted(range(length), key=lambda j, i=i: (abs(i - j), j))[:window]
        if min(i, length - 1 - i) >= window // 2 or window >= length:
            assert both[i].nonzero()[:, 0].tolist() == sorted(nearest)
        assert both[i].sum() == min(window, length)
        assert both[i, i]
        seen = both[i].nonzero()[:, 0]
        assert (seen - i).abs().max() < max(window, 1)


def test_a_window_of_the_text_is_no_window():
    assert window_mask(6, window=6, is_causal=False).all()
    assert torch.equal(window_mask(6, window=6), torch.ones(6, 6, dtype=torch.bool).tril())
    q, k, v = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64)
    masked = rope_attention(q, k, v, attn_mask=window_mask(6, window=6))
    torch.testing.assert_close(masked, rope_attention(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layers", "length"), [(2, 16), (4, 64), (12, 512), (24, 512), (3, 40)])
def test_stacked_windows_reach_no_further_than_the_plan_says(layers, length):
    plan = hwfa_layer_plan(layers, train_length=length)
    assert len(plan) == layers
    assert plan[-1] == LayerPlan(window=None, rope=False, logn=True)
    assert set(plan[:-1]) == {LayerPlan(window=plan[0].window, rope=True, logn=False)}
    window = plan[0].window
    one = window_mask(2 * length, window=window).float()
    reach = torch.zeros(2 * length)
    reach[-1] = 1
    for _ in range(layers - 1):
        reach = ((reach @ one) > 0).float()
    seen = int(reach.sum())
    assert seen == (window - 1) * (layers - 1) + 1 <= 0.75 * length
    # The largest such window.
    assert window * (layers - 1) + 1 > 0.75 * length


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: window_mask(-1, window=2), ValueError, "length must be at least 0"),
        (lambda: window_mask(4, window=0), ValueError, "window must be at least 1"),
        (lambda: window_mask(4, window=2.0), TypeError, "window must be an int"),
        (lambda: hwfa_layer_plan(1, train_length=64), ValueError, "num_layers must be at least 2"),
        (lambda: hwfa_layer_plan(4, train_length=0), ValueError, "train_length must be at least 1"),
        (lambda: hwfa_layer_plan(4, train_length=64, alpha=0.8), ValueError, r"alpha must be in \(0, 0.75\]"),
        (lambda: hwfa_layer_plan(4, train_length=64, alpha=0.0), ValueError, r"alpha must be in \(0, 0.75\]"),
        (lambda: hwfa_layer_plan(24, train_length=16), ValueError, "train_length=16 is too short for 24 layers"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
