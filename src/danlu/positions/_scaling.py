r"""Frequencies of rotary positions, and static rules that stretch them so that longer text has trained angles.

A rotation by $n\theta_m$ with $\theta_m = \beta^{-(m-1)}$ reads the digits of $n$ in base $\beta = b^{2/R}$. Longer
text has larger numbers; a rule divides them (interpolation), takes a larger base (NTK), or does both by digit (mixed,
by-parts).

Source: "Transformer升级之路:10、RoPE是一种β进制编码" (2023-07-06) and 11 (2023-07-31); Chen et al. (2023), arXiv
2306.15595; Peng et al. (2023), arXiv 2309.00071.

Shape letters: `R` rotated channels, even.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_floating, check_integer, check_real

__all__ = ["RopeMethod", "dynamic_factor", "scale_frequencies"]

RopeMethod = Literal["default", "linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed", "by-parts"]


def scale_frequencies(
    inv_freq: Tensor,
    *,
    method: RopeMethod,
    factor: float,
    mixed_power: float = 0.625,
    train_length: int | None = None,
    turns: tuple[float, float] = (1.0, 32.0),
) -> Tensor:
    r"""Stretch given frequencies, so that a model trained at one length has trained angles at a longer one.

    Definition:
        With $\kappa$ = `factor`, $R/2$ frequencies $\theta_m$ and $m$ from 1:

        | `method` | $\theta'_m / \theta_m$ | in words |
        |---|---|---|
        | "default" | 1 | |
        | "linear" | $\kappa^{-1}$ | position interpolation: positions over $\kappa$ |
        | "ntk-old" | $\kappa^{-2(m-1)/R}$ | base $b\kappa$ |
        | "ntk-aware" | $\kappa^{-2(m-1)/(R-2)}$ | base $b\kappa^{R/(R-2)}$: the last as with "linear" |
        | "ntk-fixed" | $\kappa^{-2m/R}$ | the modulus of a digit grows with its base |
        | "ntk-mixed" | $e^{-a m^p}$, $a (R/2)^p = \ln \kappa$ | $p$ = `mixed_power`; 0 is "linear", 1 "ntk-fixed" |
        | "by-parts" | $\gamma_m + (1 - \gamma_m) / \kappa$ | kept where a frequency turns often in training |

        $$\gamma_m = \min\!\Big(1, \max\!\Big(0, \frac{T\theta_m / 2\pi - \tau_1}{\tau_2 - \tau_1}\Big)\Big)$$
        with $T$ = `train_length` and $(\tau_1, \tau_2)$ = `turns`.

    Args:
        inv_freq: frequencies (radians per position) of the model, shape `(R / 2,)`, in the order of its channels.
        method: one of the table. Without further training "ntk-mixed" is the article's choice.
        factor: $\kappa > 0$, length of the text over the training length; 1 with "default".
        mixed_power: $p \ge 0$ of "ntk-mixed"; 0.625 in the article, 0.75 in its author's code.
        train_length: $T \ge 1$ (tokens), for "by-parts" only, which needs it.
        turns: $0 \le \tau_1 < \tau_2$ (turns within $T$) of "by-parts", by default those of YaRN for Llama.

    Returns:
        Frequencies (radians per position), shape `(R / 2,)`, float64, on the device of `inv_freq`.

    Raises:
        TypeError: `inv_freq` is not floating, or an option has a wrong type.
        ValueError: `inv_freq` is not one-dimensional or empty; an option is out of its range; a `factor` without a
            method; `train_length` without "by-parts" or the other way round; "ntk-aware" with a single frequency.

    Numerics:
        float64. The ratios do not depend on the base (but for "by-parts"), so they also stretch the frequencies of a
        model whose checkpoint is stretched already; factors then multiply.

    Differences:
        "by-parts" ramps over turns, as the paper's equation does; the code published with YaRN ramps over the index of
        the channel. With turns (1, 4) it is the rule of Llama 3.1. YaRN's factor of the scores is not in here.

    Source:
        "linear": Chen et al. (2023), arXiv 2306.15595. "ntk-old": article 10 of the series (2023-07-06). "ntk-aware":
        bloc97 (2023). "ntk-fixed", "ntk-mixed": article 11 (2023-07-31). "by-parts": Peng et al. (2023), arXiv
        2309.00071, section 3.2.

    Example:
        >>> from danlu.positions import rope_frequencies, scale_frequencies
        >>> scale_frequencies(rope_frequencies(8), method="ntk-fixed", factor=8)[-1].item()
        0.000125
    """
    check_floating("inv_freq", inv_freq)
    if inv_freq.ndim != 1 or inv_freq.shape[0] == 0:
        raise ValueError(f"inv_freq must have shape (R / 2,), got {tuple(inv_freq.shape)}")
    _check_rule(method, factor, mixed_power, train_length, turns)
    count = inv_freq.shape[0]
    plain = inv_freq.detach().to(torch.float64)
    m = torch.arange(1, count + 1, dtype=torch.float64, device=plain.device)
    if method == "default":
        return plain.clone()
    if method == "by-parts":
        low, high = turns
        kept = ((plain * (train_length or 1) / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
        return plain * (kept + (1.0 - kept) / factor)
    if method == "linear":
        # Exactly a division, as positions over the factor are.
        return plain / factor
    if method == "ntk-aware" and count == 1:
        raise ValueError("method='ntk-aware' needs a dim of at least 4: it keeps the first frequency, got 2")
    exponent = {
        "ntk-old": lambda: (m - 1) / count,
        "ntk-aware": lambda: (m - 1) / (count - 1),
        "ntk-fixed": lambda: m / count,
        "ntk-mixed": lambda: (m / count) ** mixed_power,
    }[method]()
    return plain * torch.pow(factor, -exponent)


def dynamic_factor(length: int, *, train_length: int, factor: float = 1.0) -> float:
    r"""Factor of [`scale_frequencies`][danlu.positions.scale_frequencies] that fits the length of the text.

    Definition:
        $$\kappa(L) = \max\!\Big(1,\; f\,\frac{L}{T} - (f - 1)\Big)$$
        with $L$ = `length`, $T$ = `train_length`, $f$ = `factor`. With "ntk-aware" the base is then
        $b\,\kappa^{R/(R-2)}$, which is "dynamic NTK".

    Args:
        length: $L \ge 0$ (tokens).
        train_length: $T \ge 1$ (tokens).
        factor: $f \ge 1$; with 1, $\kappa$ is the length over the training length.

    Returns:
        $\kappa \ge 1$.

    Raises:
        TypeError: a length is not an int, or `factor` not a number.
        ValueError: `length` < 0, `train_length` < 1 or `factor` < 1.

    Numerics:
        A Python float, rounded a few times.

    Differences:
        A key that was rotated for one length does not fit queries of another; see
        [`dynamic_rope_attention`][danlu.attention.dynamic_rope_attention], which rotates keys anew.

    Source:
        bloc97 and emozilla (2023); transformers' rope_type "dynamic".

    Example:
        >>> from danlu.positions import dynamic_factor
        >>> [dynamic_factor(length, train_length=2048, factor=2.0) for length in (1000, 2048, 4096, 8192)]
        [1.0, 1.0, 3.0, 7.0]
    """
    check_integer("length", length, low=0)
    check_integer("train_length", train_length, low=1)
    check_real("factor", factor, low=1.0)
    return max(1.0, factor * length / train_length - (factor - 1.0))


def _check_rule(
    method: RopeMethod, factor: float, mixed_power: float, train_length: int | None, turns: tuple[float, float]
) -> None:
    """Raise unless the options fit the method."""
    check_choice("method", method, get_args(RopeMethod))
    check_real("factor", factor, low=0.0, low_open=True)
    check_real("mixed_power", mixed_power, low=0.0)
    check_real("turns[1]", turns[1], low=check_real("turns[0]", turns[0], low=0.0), low_open=True)
    if method == "default" and factor != 1:
        raise ValueError(f"factor must be 1 with method='default', got {factor!r}")
    if train_length is None:
        if method == "by-parts":
            raise ValueError("method='by-parts' needs train_length, the length that the model was trained with")
        return
    if method != "by-parts":
        raise ValueError(f"train_length is an option of method='by-parts', got it with {method!r}")
    check_integer("train_length", train_length, low=1)
