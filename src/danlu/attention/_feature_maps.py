r"""Feature maps of linear attention: nonnegative $\phi$ whose products stand for the exponential of a score.

Sources: Katharopoulos et al. (2020), arXiv 2006.16236 (elu + 1); Choromanski et al. (2020), arXiv 2009.14794 (FAVOR+);
"我在Performer中发现了Transformer-VQ的踪迹" (2023-11-29) (soft assignment to a codebook).

Shape letters: `B` batch; `H` query heads; `H_kv` key heads, dividing `H`; `L` tokens; `D` head size; `F` features; `S`
codes.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu._common.checks import check_floating, check_integer, check_real, is_low_precision
from danlu.attention._masks import check_key_padding_mask, without_padding

__all__ = ["FavorFeatures", "FeatureMap", "SoftVQFeatures", "as_feature_map", "feature_map"]

Kind = Literal["elu1", "relu", "exp", "favor", "softvq"]


@runtime_checkable
class FeatureMap(Protocol):
    """What a feature map is to the attention: features of queries, and of keys with what was divided out of them."""

    def __call__(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of all queries and keys of a sequence."""
        ...

    def query_features(self, query: Tensor) -> Tensor:
        """Features of queries; a factor of a whole row may be missing."""
        ...

    def key_features(self, key: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features of keys divided by the exponential of the second result, `(B, H_kv, 1, 1)`; None means 0."""
        ...


def feature_map(
    kind: Kind | Callable[[Tensor], Tensor],
    *,
    dim: int | None = None,
    num_features: int | None = None,
    codebook: Tensor | None = None,
    sigma: float | None = None,
) -> "ElementwiseFeatures | FavorFeatures | SoftVQFeatures":
    r"""The feature map of a name, or of a function of your own.

    Definition:
        | `kind` | $\phi(q)$ and $\phi(k)$ |
        |---|---|
        | "elu1" | $\operatorname{elu}(x) + 1$, which is $x + 1$ above 0 and $e^x$ below |
        | "relu" | $\max(x, 0)$ |
        | "exp" | $e^x$, channel by channel |
        | "favor" | [`FavorFeatures`][danlu.attention.FavorFeatures] of `dim` and `num_features` |
        | "softvq" | [`SoftVQFeatures`][danlu.attention.SoftVQFeatures] of `codebook` and `sigma` |
        | a function | its values, for queries and keys alike |

    Args:
        kind: a name, or a function of a tensor `(..., D)` that returns `(..., F)`.
        dim: head size `D`, of "favor" alone.
        num_features: `F`, of "favor" alone.
        codebook: codes `(S, D)` or `(H_kv, S, D)`, of "softvq" alone; an `nn.Parameter` is trained.
        sigma: width of the assignment, of "softvq" alone.

    Returns:
        A module; called with query `(B, H, M, D)`, key `(B, H_kv, N, D)` and an optional `key_padding_mask` it returns
        the features of both, in their dtype, as [`linear_attention`][danlu.attention.linear_attention] takes them.

    Raises:
        TypeError: `kind` is neither a name nor callable.
        ValueError: an unknown name, an option that is missing, or one that does not belong to `kind`.

    Numerics:
        Half inputs are computed in float32 and rounded once. Exponentials are divided by their largest ("exp" and
        "favor": a row of queries by its own, all visible keys of a head by one), which cancels when attention
        divides by its denominators. Hidden keys are set to 0 first, so their content changes nothing.

    Source:
        Katharopoulos et al. (2020), arXiv 2006.16236, equation 7, for "elu1".

    Example:
        >>> import torch
        >>> from danlu.attention import feature_map
        >>> query = torch.tensor([[[[-1.0, 2.0]]]])
        >>> feature_map("elu1")(query, query)[0]
        tensor([[[[0.3679, 3.0000]]]])
    """
    given = {"dim": dim, "num_features": num_features, "codebook": codebook, "sigma": sigma}
    wanted: tuple[str, ...] = {"favor": ("dim", "num_features"), "softvq": ("codebook", "sigma")}.get(
        kind if isinstance(kind, str) else "", ()
    )
    for name, option in given.items():
        if (option is None) == (name in wanted):
            rule = "needs" if option is None else "does not take"
            raise ValueError(f"feature_map({kind!r}) {rule} {name}, got {option if option is None else 'one'}")
    if kind == "favor" and dim is not None and num_features is not None:
        return FavorFeatures(dim, num_features)
    if kind == "softvq" and codebook is not None and sigma is not None:
        return SoftVQFeatures(codebook, sigma=sigma)
    return ElementwiseFeatures(kind)


def as_feature_map(features: "str | Callable[[Tensor], Tensor] | FeatureMap") -> FeatureMap:
    """A feature map from its name, from a plain function, or as it is."""
    return features if isinstance(features, FeatureMap) else ElementwiseFeatures(features)


def elu1(input: Tensor) -> Tensor:
    """The function elu + 1, which keeps small values where elu(x) + 1 would round them to 0."""
    if torch.compiler.is_compiling():
        return input.clamp(max=0).exp() + F.relu(input)
    return _Elu1.apply(input)


class _Elu1(torch.autograd.Function):
    """Keeps its values alone: their slope is the lesser of them and 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return input.clamp(max=0).exp_().add_(input.clamp(min=0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return grad_outputs[0] * values.clamp(max=1)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return grad_inputs[0] * values.clamp(max=1)


class ElementwiseFeatures(nn.Module):
    """Queries and keys alike through one function; made by `feature_map`."""

    def __init__(self, kind: str | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not isinstance(kind, str) and not callable(kind):
            raise TypeError(f"kind must be a name or callable, got {type(kind).__name__}")
        named: dict[str, Callable[[Tensor], Tensor]] = {"elu1": elu1, "relu": F.relu, "exp": torch.exp}
        if isinstance(kind, str) and kind not in named:
            listed = ", ".join(repr(name) for name in (*named, "favor", "softvq"))
            raise ValueError(f"kind must be one of {listed} or callable, got {kind!r}")
        self.kind = kind
        self.function = named[kind] if isinstance(kind, str) else kind
        self.stabilize = kind == "exp"

    def query_features(self, query: Tensor) -> Tensor:
        """Features of queries `(B, H, M, D)`."""
        if self.stabilize:
            return exp_of_rows(wide(query).clone()).to(query.dtype)
        return self.function(wide(query)).to(query.dtype)

    def key_features(self, key: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features of keys `(B, H_kv, N, D)`, and the logarithm of what they are divided by."""
        seen = shown(key, key_padding_mask)
        if self.stabilize:
            none = seen.new_zeros(*seen.shape[:-1], 1)
            features, log_scale = exp_of_keys(seen.clone(), none, key_padding_mask, stabilize=True)
            return features.to(key.dtype), log_scale
        return self.function(seen).to(key.dtype), None

    def forward(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of both."""
        return self.query_features(query), self.key_features(key, key_padding_mask)[0]

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return repr(self.kind) if isinstance(self.kind, str) else getattr(self.kind, "__name__", repr(self.kind))


class FavorFeatures(nn.Module):
    r"""FAVOR+, the positive random features of the Performer: an unbiased estimate of softmax attention's weights.

    Definition:
        $$\phi(x) = m^{-1/2} \exp\!\big(\omega x' - \|x'\|^2 / 2\big), \qquad x' = \sqrt{s}\,x, \qquad
        \operatorname{E}\big[\phi(q) \cdot \phi(k)\big] = e^{s\,q \cdot k}$$
        with $m$ = `num_features` and $s$ = `scale`. The rows of $\omega$ are normal; with `orthogonal` those of a
        block of `dim` are orthogonal, with the lengths of independent normal vectors. Up to factors that cancel,
        $\phi(q)_i\,\phi(k)_i$ is $e^{\omega_i \cdot q'} e^{-\|k' - \omega_i\|^2/2} e^{\|\omega_i\|^2/2}$: a soft
        assignment of keys to random codes.

    Args:
        dim: head size `D`.
        num_features: $m \ge 1$.
        orthogonal: whether rows are orthogonal in blocks, which lowers the variance.
        redraw: draw a new projection in every forward call in training mode. Recomputed activations (checkpointing)
            need it to come from the global generator, whose state they restore.
        stabilize: divide by the largest feature, see *Numerics*. Without it the products are unbiased as they stand,
            as attention with `normalize=False` needs them.
        scale: $s > 0$; None means $D^{-1/2}$.
        generator: for the draws; None means the global one.

    Returns:
        From `forward(query, key, key_padding_mask=None)`: features of queries, `(B, H, M, F)`, and of keys,
        `(B, H_kv, N, F)`, in their dtypes.

    Raises:
        TypeError: an option is not of its type.
        ValueError: a count below 1, `scale` not positive, or inputs of another head size.

    Numerics:
        In at least float32, rounded once. With `stabilize` a query's features are divided by their largest, and those
        of the visible keys of a head by the largest of all: factors that cancel in the quotient of the attention.
        The estimate is poor for peaked attention at any practical $m$, see the guide.

    Cost:
        $O(LDm)$ time; features are $m / D$ times as large as the input.

    Differences:
        The orthogonal factor of a QR decomposition is multiplied by the signs of the diagonal of $R$. Without them it
        is not uniformly distributed and the estimate is biased by up to a fifth, depending on the direction of $q$
        and $k$; a widely used implementation leaves them out. Nothing is added to the features, which would bias
        them, too.

    Source:
        Choromanski et al. (2020), arXiv 2009.14794, lemma 1 and section 2.4; Mezzadri (2006), arXiv math-ph/0609050,
        for the signs.

    Example:
        >>> import torch
        >>> from danlu.attention import FavorFeatures, linear_attention
        >>> query, key, value = torch.randn(3, 1, 2, 16, 8)
        >>> linear_attention(*FavorFeatures(8, 32)(query, key), value).shape
        torch.Size([1, 2, 16, 8])
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        orthogonal: bool = True,
        redraw: bool = False,
        stabilize: bool = True,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_integer("dim", dim, low=1)
        self.num_features = check_integer("num_features", num_features, low=1)
        self.orthogonal = orthogonal
        self.redraw = redraw
        self.stabilize = stabilize
        self.scale = dim**-0.5 if scale is None else check_real("scale", scale, low=0.0, low_open=True)
        self._generator = generator if redraw else None
        drawn = random_projection(dim, num_features, orthogonal=orthogonal, generator=generator)
        self.register_buffer("projection", drawn.to(torch.get_default_dtype()))

    def draw(self) -> None:
        """Draw a new projection."""
        old = self.projection
        drawn = random_projection(
            self.dim, self.num_features, orthogonal=self.orthogonal, generator=self._generator, device=old.device
        )
        # Not in place: a graph of an earlier call may still hold the old one.
        self.projection = drawn.to(old.dtype)

    def query_features(self, query: Tensor) -> Tensor:
        """Features of queries `(B, H, M, D)`."""
        x = wide(query)
        logits = self._logits(x)
        # Divided by the largest of a row, a factor of the row is gone.
        features = exp_of_rows(logits) if self.stabilize else logits.sub_(self._norms(x)).exp_()
        return features.to(query.dtype)

    def key_features(self, key: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features of keys `(B, H_kv, N, D)`, and the logarithm of what they are divided by."""
        x = shown(key, key_padding_mask)
        logits = self._logits(x)
        features, log_scale = exp_of_keys(logits, -self._norms(x), key_padding_mask, stabilize=self.stabilize)
        return features.to(key.dtype), log_scale

    def forward(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of both."""
        if self.redraw and self.training:
            self.draw()
        return self.query_features(query), self.key_features(key, key_padding_mask)[0]

    def _logits(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"the head size must be dim = {self.dim}, got {tuple(x.shape)}")
        with torch.autocast(device_type=x.device.type, enabled=False):
            return x @ (self.projection.to(x.dtype) * self.scale**0.5).T

    def _norms(self, x: Tensor) -> Tensor:
        return x.square().sum(-1, keepdim=True) * (self.scale / 2) + math.log(self.num_features) / 2

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return (
            f"dim={self.dim}, num_features={self.num_features}, orthogonal={self.orthogonal}, redraw={self.redraw}, "
            f"stabilize={self.stabilize}, scale={self.scale}"
        )


class SoftVQFeatures(nn.Module):
    r"""Soft vector quantization: keys are spread over the codes of a codebook, and queries score the codes.

    Definition:
        $$\phi(k)_c = \operatorname{softmax}_c\!\Big(-\frac{\|k - C_c\|^2}{2\sigma^2}\Big), \qquad
        \phi(q)_c = e^{s\,q \cdot C_c}$$
        with $C$ = `codebook`, $\sigma$ = `sigma`, $s$ = `scale`. As $\sigma \to 0$ a key counts for its nearest code
        alone: linear attention is then softmax attention over the quantized keys, exactly.

    Args:
        codebook: $C$, shape `(S, D)`, or `(H_kv, S, D)` for codes of every key head; an `nn.Parameter` is trained by
            gradient, another tensor is a buffer.
        sigma: $\sigma > 0$, in the unit of the keys.
        scale: $s > 0$; None means $D^{-1/2}$.

    Returns:
        From `forward(query, key, key_padding_mask=None)`: features of queries, `(B, H, M, S)`, and of keys,
        `(B, H_kv, N, S)`, in their dtypes.

    Raises:
        TypeError: `codebook` is not a floating tensor, or an option is not a number.
        ValueError: `codebook` is not of two or three axes, an option is not positive, or inputs do not fit it.

    Numerics:
        Distances in at least float32. A query's features are divided by their largest, which cancels in the quotient.
        In a narrow dtype features below its smallest number are 0.

    Cost:
        $O(LDS)$ time.

    Source:
        "我在Performer中发现了Transformer-VQ的踪迹" (2023-11-29).

    Example:
        >>> import torch
        >>> from danlu.attention import SoftVQFeatures
        >>> key = torch.tensor([[[[0.9, 0.0]]]])
        >>> SoftVQFeatures(torch.eye(2), sigma=0.5)(key, key)[1]
        tensor([[[[0.9734, 0.0266]]]])
    """

    codebook: Tensor

    # The features of queries are divided by their largest; see `LinearAttention`.
    stabilize = True

    def __init__(self, codebook: Tensor, *, sigma: float, scale: float | None = None) -> None:
        super().__init__()
        check_floating("codebook", codebook)
        if codebook.ndim not in (2, 3):
            raise ValueError(f"codebook must have shape (S, D) or (H_kv, S, D), got {tuple(codebook.shape)}")
        self.sigma = check_real("sigma", sigma, low=0.0, low_open=True)
        dim = codebook.shape[-1]
        self.scale = dim**-0.5 if scale is None else check_real("scale", scale, low=0.0, low_open=True)
        if isinstance(codebook, nn.Parameter):
            self.codebook = codebook
        else:
            self.register_buffer("codebook", codebook)

    def query_features(self, query: Tensor) -> Tensor:
        """Features of queries `(B, H, M, D)`."""
        x = wide(query)
        with torch.autocast(device_type=x.device.type, enabled=False):
            logits = x @ (self._codes(x) * self.scale).mT
        return exp_of_rows(logits).to(query.dtype)

    def key_features(self, key: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features of keys `(B, H_kv, N, D)`; nothing is divided out of them."""
        x = shown(key, key_padding_mask)
        with torch.autocast(device_type=x.device.type, enabled=False):
            codes = self._codes(x)
            # Minus half the squared distance, but for the part of the key alone, which a softmax does not see.
            sharp = codes / self.sigma**2
            nearness = (x @ sharp.mT).sub_((sharp * codes).sum(-1)[..., None, :] / 2)
            return torch.softmax(nearness, dim=-1).to(key.dtype), None

    def forward(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of both."""
        return self.query_features(query), self.key_features(key, key_padding_mask)[0]

    def _codes(self, x: Tensor) -> Tensor:
        """The codes of every head of `x`, `(S, D)` or `(heads, S, D)`."""
        codes = self.codebook.to(x.dtype)
        if x.shape[-1] != codes.shape[-1] or (codes.ndim == 3 and x.shape[1] % codes.shape[0]):
            raise ValueError(f"a codebook {tuple(codes.shape)} does not fit heads of shape {tuple(x.shape)}")
        return codes if codes.ndim == 2 else codes.repeat_interleave(x.shape[1] // codes.shape[0], dim=0)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"codebook={tuple(self.codebook.shape)}, sigma={self.sigma}, scale={self.scale}"


def random_projection(
    dim: int,
    num_features: int,
    *,
    orthogonal: bool,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Normal rows `(num_features, dim)` in float64, orthogonal in blocks of `dim` rows if asked for."""

    def normal(rows: int) -> Tensor:
        home = device if generator is None else generator.device
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64, device=home)

    if not orthogonal:
        return normal(num_features).to(device)
    blocks = -(-num_features // dim)
    q, r = torch.linalg.qr(normal(blocks * dim).view(blocks, dim, dim))
    # LAPACK's signs depend on the matrix: without them the factor is not uniform over the orthogonal matrices.
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    rows = q.flatten(0, 1)[:num_features]
    return (rows * normal(num_features).norm(dim=-1, keepdim=True)).to(device)


def wide(x: Tensor) -> Tensor:
    """In at least float32."""
    check_floating("query or key", x)
    return x.float() if is_low_precision(x.dtype) else x


def shown(key: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Keys in at least float32, with padding taken out."""
    check_key_padding_mask(key_padding_mask, key)
    return without_padding(wide(key), key_padding_mask)


def exp_of_rows(logits: Tensor) -> Tensor:
    """Exponentials, divided by the largest of each row; in place, as every pass over features costs much."""
    return logits.sub_(logits.detach().amax(-1, keepdim=True)).exp_()


def exp_of_keys(
    logits: Tensor, shift: Tensor, key_padding_mask: Tensor | None, *, stabilize: bool
) -> tuple[Tensor, Tensor | None]:
    """Exponentials of `logits + shift`, 0 for hidden keys, divided by the largest of a head; and the logarithm of that.

    In place of the logits; `shift` is a number for each key.
    """
    if key_padding_mask is not None:
        shift = shift.masked_fill(~key_padding_mask[:, None, :, None], -math.inf)
    if not stabilize:
        return logits.add_(shift).exp_(), None
    if logits.numel() == 0:
        return logits.exp(), logits.new_full((*logits.shape[:2], 1, 1), -math.inf)
    log_scale = (logits.detach().amax(-1, keepdim=True) + shift.detach()).amax(-2, keepdim=True)
    return logits.add_(shift - log_scale.masked_fill(log_scale == -math.inf, 0.0)).exp_(), log_scale
