r"""Sums over subsets of size k: their logarithm, and the probability that an entry belongs to a random subset.

Entries are shifted by $\lambda$ with $\sum_i \sigma(x_i - \lambda) = k$; the number of entries that independent coins
with probabilities $q_i = \sigma(x_i - \lambda)$ choose is then $k$ in the mean, and the sums are read off its
characteristic function by a short sum over the unit circle. Nothing is subtracted from anything of its size.

Shape letters: `R` rows; `N` entries; `L` nodes on the circle.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from danlu._common.vmap import batch_first
from danlu.simplex._topk_rows import threshold_rows

__all__ = ["inclusion", "log_subset_sum"]

# Complex numbers that one piece of the rows may take, 64 MiB.
_PIECE = 1 << 22


def inclusion(x: Tensor, k: Tensor) -> Tensor:
    """Inclusion probabilities of rows of finite float64 scores, shape `(R, N)`, for whole `k`, shape `(R, 1)`."""
    return _Inclusion.apply(x, k)


def log_subset_sum(x: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the sum over subsets of size `k` of the exponentials of their sums, shape `(R, 1)`."""
    return _LogSubsetSum.apply(x, k)


def _nodes(x: Tensor, variance: Tensor) -> Tensor:
    """Angles of half of an odd number of nodes; beyond these many, aliases are below e^-30."""
    n = x.shape[-1]
    try:
        most = float(variance.max()) if variance.numel() else 0.0
    except RuntimeError:
        # Within vmap there are no values to look at; no variance is larger.
        most = n / 4
    count = min(n + 1, 12 + math.ceil(math.sqrt(100 + 60 * most)))
    count += 1 - count % 2
    return torch.arange((count + 1) // 2, dtype=torch.float64, device=x.device) * (2 * math.pi / count)


def _factors(d: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    r"""$a_{il}$ of shape `(R, L, N)` and $\log G_l$ of shape `(R, L)`."""
    # log(1 - q + q w) = log(1 + e^(d + i theta)) - log(1 + e^d), by the smaller r of the two exponentials; 1/w is the
    # conjugate of w. In real numbers, which take half the time.
    r = (-d.abs()).exp()
    up = d > 0
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    near, far = r[:, None] * cos, r[:, None] * sin
    square = r.square()[:, None]
    rise = 2 * near + square
    whole = 1 + rise
    a = torch.complex(torch.where(up[:, None], 1 + near, near + square) / whole, far / whole)
    turns = torch.where(up, -1.0, 1.0)[:, None] * torch.atan2(far, 1 + near)
    turned = turns.sum(-1) + angles * up.sum(-1, keepdim=True)
    return a, torch.complex(0.5 * torch.log1p(rise).sum(-1) - torch.log1p(r).sum(-1, keepdim=True), turned)


def _circle(
    x: Tensor, k: Tensor, v: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Iterator[Any]]:
    r"""The shift, the weights $\omega_l$, $\log P(K = k)$, $\sum_j a_{jl} v_j$, and blocks of $a_{il}$.

    The weights, of shape `(R, L)` in all, are in the blocks of the nodes.
    """
    shift = threshold_rows(x.detach(), k, "sigmoid")[1]
    d = x - shift
    q = d.detach().sigmoid()
    angles = _nodes(x, (q * (1 - q)).sum(-1))
    # The factors of few nodes at a time, a second time for the values, so that they fit into memory.
    blocks = angles.split(max(1, _PIECE // max(1, x.numel())))
    logs: list[Tensor] = []
    pulls: list[Tensor] = []
    kept: list[Tensor] = []
    for block in blocks:
        a, log_g = _factors(d, block)
        logs.append(log_g)
        if v is not None:
            pulls.append((a * v[:, None]).sum(-1))
        if len(blocks) == 1:
            kept.append(a)
    terms = (torch.cat(logs, -1) - 1j * angles * k).exp()
    # Conjugate nodes count twice, the one at 0 once.
    terms = terms * torch.cat((torch.ones_like(angles[:1]), torch.full_like(angles[1:], 2.0)))
    total = terms.real.sum(-1, keepdim=True)
    count = 2 * len(angles) - 1
    weights = list((terms / total).split(len(blocks[0]), -1))
    again = iter(kept) if kept else (_factors(d, block)[0] for block in blocks)
    return shift, weights, (total / count).log(), torch.cat(pulls, -1) if pulls else terms, again


def _pieces(x: Tensor, k: Tensor, work: Any, *more: Tensor) -> Tensor:
    """`work` on groups of rows whose circles fit into memory."""
    most = 12 + math.sqrt(100 + 60 * min(float(k.max()) if k.numel() else 0.0, x.shape[-1] / 4))
    rows = max(1, int(_PIECE / (x.shape[-1] * most)))
    return torch.cat([work(*parts) for parts in zip(*(t.split(rows) for t in (x, k, *more)), strict=True)])


def _mean(weights: Tensor, a: Tensor) -> Tensor:
    """The weighted sum over a block of nodes; its real part is what counts."""
    return (weights[:, None] @ a).real[:, 0]


def _probabilities(x: Tensor, k: Tensor) -> Tensor:
    _, weights, _, _, blocks = _circle(x, k)
    p = torch.zeros_like(x)
    for w, a in zip(weights, blocks, strict=True):
        p = p + _mean(w, a)
    return p.clamp(0, 1)


def _hessian_vector(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _, weights, _, pulls, blocks = _circle(x, k, v)
    mean = (torch.cat(weights, -1) * pulls).real.sum(-1, keepdim=True)
    product = torch.zeros_like(x)
    for w, a, pull in zip(weights, blocks, pulls.split(weights[0].shape[-1], -1), strict=True):
        product = product + _mean(w, a * ((1 - a) * v[:, None] + (pull - mean)[..., None]))
    return product


@torch.library.custom_op("danlu::inclusion", mutates_args=())
def _inclusion(x: Tensor, k: Tensor) -> Tensor:
    return _pieces(x, k, _probabilities) if x.numel() else torch.empty_like(x)


@torch.library.custom_op("danlu::inclusion_vjp", mutates_args=())
def _inclusion_vjp(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _pieces(x, k, _hessian_vector, v) if x.numel() else torch.empty_like(x)


@torch.library.custom_op("danlu::log_subset_sum", mutates_args=())
def _log_subset_sum(x: Tensor, k: Tensor) -> Tensor:
    def work(x: Tensor, k: Tensor) -> Tensor:
        shift, _, log_p, _, _ = _circle(x, k)
        return k * shift + torch.nn.functional.softplus(x - shift, threshold=50).sum(-1, keepdim=True) + log_p

    return _pieces(x, k, work) if x.numel() else torch.empty_like(k)


def _like_scores(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _like_sizes(_: Tensor, k: Tensor) -> Tensor:
    return torch.empty_like(k)


_inclusion.register_fake(_like_scores)
_inclusion_vjp.register_fake(_like_scores)
_log_subset_sum.register_fake(_like_sizes)


class _Inclusion(torch.autograd.Function):
    """The probabilities; their Jacobian is the Hessian of the logarithm, and differentiable again."""

    @staticmethod
    def forward(x: Tensor, k: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return _inclusion(x, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, k = ctx.saved_tensors
        if torch.is_grad_enabled() and x.numel():
            # To be differentiated again, or transformed.
            return _hessian_vector(x, k, grads[0]), None
        return _inclusion_vjp(x, k, grads[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        x, k = batch_first(info, args, in_dims)
        flat = _Inclusion.apply(x.flatten(0, -2), k.flatten(0, -2))
        return flat.view(x.shape), 0


class _LogSubsetSum(torch.autograd.Function):
    """The logarithm, whose gradient are the probabilities."""

    @staticmethod
    def forward(x: Tensor, k: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return _log_subset_sum(x, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, k = ctx.saved_tensors
        return grads[0] * _Inclusion.apply(x, k), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        x, k = batch_first(info, args, in_dims)
        flat = _LogSubsetSum.apply(x.flatten(0, -2), k.flatten(0, -2))
        return flat.view(*x.shape[:-1], 1), 0
