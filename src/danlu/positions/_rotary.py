r"""Rotary position embedding (RoPE): pairs of channels are rotated by an angle proportional to the position.

Source: Su et al. (2021), "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.

Shape letters: `L` tokens; `D` channels of a head; `R` rotated channels, even and at most `D`; `...` any other axes.
"""

import torch
from torch import Tensor, nn

from danlu._common.checks import broadcasts_to, check_floating, check_integer, check_real, is_low_precision
from danlu.positions._scaling import RopeMethod, scale_frequencies

__all__ = ["RotaryEmbedding", "apply_rope", "rope_frequencies"]


def rope_frequencies(
    dim: int,
    *,
    base: float = 10000.0,
    method: RopeMethod = "default",
    factor: float = 1.0,
    mixed_power: float = 0.625,
    train_length: int | None = None,
    turns: tuple[float, float] = (1.0, 32.0),
) -> Tensor:
    r"""Angular frequencies of RoPE, also for text $\kappa$ times as long as in training.

    Definition:
        $$\theta_m = b^{-2(m-1)/R}, \qquad m = 1, \dots, R/2$$
        with $R$ = `dim` and $b$ = `base`. By `method`, with $\kappa$ = `factor`:

        - "default": $\theta_m$;
        - "linear", position interpolation: $\theta_m/\kappa$;
        - "ntk-old": the base is $b\kappa$;
        - "ntk-aware": the base is $b\,\kappa^{R/(R-2)}$, so that the first frequency stays and the last is that of
          "linear";
        - "ntk-fixed": $\theta_m\,\kappa^{-2m/R}$, where the modulus of the digits grows with their base;
        - "ntk-mixed": $\theta_m\,e^{-a m^{c}}$ with $a (R/2)^{c} = \ln\kappa$ and $c$ = `mixed_power`, where 1 is
          "ntk-fixed" and 0 is "linear";
        - "by-parts": $\theta_m$ where it turns often within the training length, $\theta_m/\kappa$ where it does not,
          see [`scale_frequencies`][danlu.positions.scale_frequencies], which also scales frequencies of other kinds.

    Args:
        dim: number of rotated channels, even and at least 2.
        base: $b > 0$; 10000 in the paper, $10^5$ to $10^6$ in models for long text.
        method: as above.
        factor: $\kappa > 0$.
        mixed_power: $c \ge 0$; 0.625 in the article, 0.75 in its author's code.
        train_length: of "by-parts", which needs it (tokens).
        turns: of "by-parts", as there.

    Returns:
        Frequencies (radians per position), shape `(dim / 2,)`, float64, on the CPU, falling.

    Raises:
        TypeError: `dim` is not an int or another option not a number.
        ValueError: `dim` is odd or below 2 (below 4 for "ntk-aware"), another number is out of its range, `method` is
            unknown, or there is a `factor` without a method.

    Numerics:
        float64: an angle is a frequency times a position, and at position $10^6$ a float32 frequency is off by
        0.03 radians.

    Source:
        Su et al. (2021), arXiv 2104.09864, section 3.2.2; Chen et al. (2023), arXiv 2306.15595, for "linear";
        "Transformer升级之路:10、RoPE是一种β进制编码" (2023-07-06) and "11、将β进制位置进行到底" (2023-07-31) for the
        others.

    Example:
        >>> from danlu.positions import rope_frequencies
        >>> rope_frequencies(8)
        tensor([1.0000, 0.1000, 0.0100, 0.0010], dtype=torch.float64)
    """
    check_integer("dim", dim, low=2)
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    check_real("base", base, low=0.0, low_open=True)
    return scale_frequencies(
        torch.pow(base, -torch.arange(0, dim, 2, dtype=torch.float64) / dim),
        method=method,
        factor=factor,
        mixed_power=mixed_power,
        train_length=train_length,
        turns=turns,
    )


def apply_rope(input: Tensor, positions: Tensor, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
    r"""Rotate queries or keys by their positions.

    Definition:
        For a token at position $p$ the channel pair $m$ becomes
        $$\begin{pmatrix} y_m \\ y'_m \end{pmatrix} = \begin{pmatrix} \cos p\theta_m & -\sin p\theta_m \\
        \sin p\theta_m & \cos p\theta_m \end{pmatrix} \begin{pmatrix} x_m \\ x'_m \end{pmatrix}$$
        written $y = \mathcal R_p x$, with $\theta$ = `inv_freq`. The pair is $(m, m + R/2)$, or $(2m, 2m+1)$ with
        `interleaved`; channels from $R$ on stay as they are. $\mathcal R_a^\top \mathcal R_b = \mathcal R_{b-a}$, so a
        product of rotated query and key depends on the difference of positions only; $\mathcal R_{-p}$ undoes
        $\mathcal R_p$.

    Args:
        input: shape `(..., L, D)`.
        positions: shape `(L,)`, or broadcastable to `input.shape[:-1]`; integers or float32/float64, any real number.
        inv_freq: frequencies (radians per position), shape `(R / 2,)` with $R \le D$, float64 recommended.
        interleaved: pairs are neighbors (GPT-J, RoFormer, GLM) instead of halves (Llama and most others). Both are
            the same map up to a fixed permutation of the channels.

    Returns:
        Shape and dtype of `input`.

    Raises:
        TypeError: `input` or `inv_freq` is not floating; `positions` is bool, float16 or bfloat16, which cannot hold
            positions.
        ValueError: $R > D$, `inv_freq` is not one-dimensional, or `positions` does not broadcast.

    Numerics:
        Angles, sines and cosines are computed in float64 and cast at the end: at position $10^6$ float32 angles are
        wrong by 0.016 in the cosine. Half inputs are rotated in float32. Autocast does not touch the table.

    Source:
        Su et al. (2021), arXiv 2104.09864, equation 34.

    Example:
        >>> import torch
        >>> from danlu.positions import apply_rope, rope_frequencies
        >>> query = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> apply_rope(query, torch.tensor([0, 1]), rope_frequencies(2))
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])
    """
    check_floating("input", input)
    check_floating("inv_freq", inv_freq)
    if input.ndim < 2:
        raise ValueError(f"input must have shape (..., L, D), got {tuple(input.shape)}")
    if inv_freq.ndim != 1 or 2 * inv_freq.shape[0] > input.shape[-1]:
        raise ValueError(
            f"inv_freq must have shape (R / 2,) with R at most {input.shape[-1]}, got {tuple(inv_freq.shape)}"
        )
    check_positions("positions", positions, input.shape[:-1])
    rotated = 2 * inv_freq.shape[0]
    dtype = torch.float32 if is_low_precision(input.dtype) else input.dtype
    cos, sin = _tables(positions, inv_freq, dtype)
    with torch.autocast(device_type=input.device.type, enabled=False):
        body = input[..., :rotated].to(dtype)
        if interleaved:
            first, second = body[..., 0::2], body[..., 1::2]
        else:
            first, second = body[..., : rotated // 2], body[..., rotated // 2 :]
        turned = (first * cos - second * sin, second * cos + first * sin)
        out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
        out = out.to(input.dtype)
        return out if rotated == input.shape[-1] else torch.cat((out, input[..., rotated:]), dim=-1)


def check_positions(name: str, positions: Tensor, shape: torch.Size) -> None:
    """Raise unless `positions` can number the tokens of a tensor whose shape without channels is `shape`."""
    if not isinstance(positions, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(positions).__name__}")
    if positions.dtype == torch.bool or positions.is_complex() or is_low_precision(positions.dtype):
        raise TypeError(f"{name} must be integers, float32 or float64, got dtype {positions.dtype}")
    given = tuple(positions.shape)
    if not broadcasts_to(given, shape):
        raise ValueError(f"{name} of shape {given} does not broadcast to the tokens' shape {tuple(shape)}")


def _tables(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, computed in float64."""
    with torch.autocast(device_type=positions.device.type, enabled=False):
        angles = positions.to(torch.float64)[..., None] * inv_freq.to(torch.float64)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class RotaryEmbedding(nn.Module):
    r"""Module form of [`apply_rope`][danlu.positions.apply_rope] with held frequencies.

    Definition:
        `forward(input, positions) = apply_rope(input, positions, rope_frequencies(dim, base=base, ...))`.

    Args:
        dim: number of rotated channels, even and at least 2.
        base: base of the frequencies.
        method: how they are scaled, as in [`rope_frequencies`][danlu.positions.rope_frequencies].
        factor: as there.
        mixed_power: as there.
        train_length: as there.
        interleaved: pairs are neighbors instead of halves.

    Returns:
        From `forward`: the rotated input; `positions` None means 0, 1, ..., L - 1.

    Raises:
        ValueError: as in the functions.

    Numerics:
        The frequencies are not part of the state dict and stay float64 whatever the module is cast to; only their
        device follows the input.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.positions import RotaryEmbedding
        >>> RotaryEmbedding(4)(torch.ones(1, 2, 4))[0, 0]
        tensor([1., 1., 1., 1.])
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        method: RopeMethod = "default",
        factor: float = 1.0,
        mixed_power: float = 0.625,
        train_length: int | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = base
        self.method: RopeMethod = method
        self.factor = factor
        self.interleaved = interleaved
        # A plain attribute and not a buffer, since `module.half()` casts buffers.
        self.inv_freq = rope_frequencies(
            dim, base=base, method=method, factor=factor, mixed_power=mixed_power, train_length=train_length
        )

    def forward(self, input: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the rotated input."""
        if positions is None:
            positions = torch.arange(input.shape[-2], device=input.device)
        return apply_rope(input, positions, self.inv_freq.to(input.device), interleaved=self.interleaved)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        scaled = "" if self.method == "default" else f"method={self.method!r}, factor={self.factor}, "
        return f"dim={self.dim}, base={self.base}, {scaled}interleaved={self.interleaved}"
