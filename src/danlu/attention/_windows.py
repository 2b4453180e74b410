r"""Windows: the mask of local attention, and a plan of layers that are local but for the last.

Source: "Transformer升级之路:7、长度外推性与局部注意力" (2023-01-12) and 9 (2023-05-12).

Shape letters: `L` tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._common.checks import check_integer, check_real

__all__ = ["LayerPlan", "hwfa_layer_plan", "window_mask"]


def window_mask(
    length: int, *, window: int, is_causal: bool = True, device: torch.device | str | None = None
) -> Tensor:
    r"""Mask of local attention: every token sees its `window` nearest tokens, itself among them.

    Definition:
        Causal: token $i$ sees $j$ with $i - w < j \le i$. On both sides: the $w$ nearest tokens,
        $$a_i \le j < a_i + w, \qquad a_i = \min\!\big(\max(i - \lfloor w / 2 \rfloor,\, 0),\, L - w\big)$$
        which at an end of the text are all on one side; all tokens where $w \ge L$. With $w$ = `window`.

    Args:
        length: $L \ge 0$ (tokens).
        window: $w \ge 1$ (tokens). At inference the training length is the baseline to beat.
        is_causal: see the past only.
        device: of the mask.

    Returns:
        Bool, shape `(L, L)`, True = visible: an `attn_mask` of `scaled_dot_product_attention` and of this family.

    Raises:
        TypeError: `length` or `window` is not an int.
        ValueError: `length` < 0 or `window` < 1.

    Numerics:
        Exact. Relative positions stay below the window, so those of a model that was trained at this length are all
        trained.

    Cost:
        $O(L^2)$ bools: for the baseline, and for text that fits.

    Source:
        Article 7 of the series (2023-01-12), where it is the baseline that many methods do not beat.

    Example:
        >>> from danlu.attention import window_mask
        >>> window_mask(4, window=2).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
        >>> window_mask(4, window=3, is_causal=False).int()
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 1, 1, 1]], dtype=torch.int32)
    """
    check_integer("length", length, low=0)
    check_integer("window", window, low=1)
    slots = torch.arange(length, device=device)
    if is_causal:
        distance = slots[:, None] - slots
        return (distance >= 0) & (distance < window)
    first = (slots - window // 2).clamp(min=0).clamp(max=max(0, length - window))
    return (slots >= first[:, None]) & (slots < first[:, None] + window)


@dataclass(frozen=True)
class LayerPlan:
    r"""What one layer does in a plan of [`hwfa_layer_plan`][danlu.attention.hwfa_layer_plan].

    Definition:
        Attention over the last `window` tokens, or over all of them where it is None; rotary positions if `rope`; the
        log-n scale of [`logn_scale`][danlu.positions.logn_scale] if `logn`.

    Args:
        window: number of visible tokens, or None.
        rope: whether queries and keys are rotated.
        logn: whether queries are scaled.

    Numerics:
        None: a record.

    Source:
        As in the function.

    Example:
        >>> from danlu.attention import LayerPlan
        >>> LayerPlan(window=None, rope=False, logn=True)
        LayerPlan(window=None, rope=False, logn=True)
    """

    window: int | None
    rope: bool
    logn: bool


def hwfa_layer_plan(num_layers: int, *, train_length: int, alpha: float = 0.75) -> tuple[LayerPlan, ...]:
    r"""Layers of HWFA: windows with rotary positions in all layers but the last, which sees all and has no positions.

    Definition:
        The largest $w$ with
        $$(w - 1)(K - 1) + 1 \le \alpha T$$
        where $K$ = `num_layers` and $T$ = `train_length`. The left side is how far $K - 1$ windows of $w$ reach
        together: no token of the last layer has met a relative position, or a number of keys, that was not trained.

    Args:
        num_layers: $K \ge 2$.
        train_length: $T \ge 1$ (tokens).
        alpha: $0 < \alpha \le 3/4$, share of the training length that the windows reach; beyond 3/4 the article sees no
            extrapolation.

    Returns:
        One [`LayerPlan`][danlu.attention.LayerPlan] per layer.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: `num_layers` < 2, `alpha` is out of its range, or the windows would be below 2 tokens.

    Numerics:
        Python integers and floats.

    Differences:
        It is a plan for a model that is *trained* this way; it does not stretch a trained one.

    Source:
        "Transformer升级之路:9、一种全局长度外推的新思路" (2023-05-12).

    Example:
        >>> from danlu.attention import hwfa_layer_plan
        >>> [layer.window for layer in hwfa_layer_plan(4, train_length=64)]
        [16, 16, 16, None]
    """
    check_integer("num_layers", num_layers, low=2)
    check_integer("train_length", train_length, low=1)
    check_real("alpha", alpha, low=0.0, high=0.75, low_open=True)
    window = int((alpha * train_length - 1) // (num_layers - 1)) + 1
    if window < 2:
        raise ValueError(
            f"train_length={train_length} is too short for {num_layers} layers: their windows would be below 2 tokens"
        )
    local = LayerPlan(window=window, rope=True, logn=False)
    return (*(local for _ in range(num_layers - 1)), LayerPlan(window=None, rope=False, logn=True))
