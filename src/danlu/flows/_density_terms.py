r"""What particles know of their own density: scores and logarithms of estimates, pairwise in chunks.

Shape letters: `N` particles; `D` their dimension.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Pairs",
    "gaussian_entropy_and_score",
    "kernel_score",
    "log_density",
    "median_bandwidth",
    "stein_velocity",
]

# Numbers that are held at once: 2**18 of float32 are 1 MiB, which stays in a core's cache.
_CHUNK_NUMBERS = 2**18
# The median is of the distances of at most so many particles, evenly spaced in their order: 130 816 pairs.
_MEDIAN_PARTICLES = 512


def median_bandwidth(x: Tensor) -> Tensor:
    r"""$h = \mathrm{med}\,\lVert x_i - x_j\rVert / \sqrt{2\log(N + 1)}$, floored where particles coincide.

    With this $h$ the kernel $e^{-\lVert z\rVert^2/2h^2}$ at the median distance is $1/(N + 1)$ (Liu and Wang 2016).
    """
    some = x[:: math.ceil(len(x) / _MEDIAN_PARTICLES)]
    # Any positive floor keeps the formulas finite; this one keeps rounding of the differences below h.
    floor = math.sqrt(torch.finfo(x.dtype).eps) * (1 + (x.abs().amax() if x.numel() else x.new_zeros(())))
    if len(some) < 2:
        return floor
    return torch.maximum(F.pdist(some).median() / math.sqrt(2 * math.log(len(x) + 1)), floor)


class Pairs:
    r"""The kernel $w_j e^{-\lVert x_i - x_j\rVert^2/2h^2} / \max_k w_k$ between particles, in chunks of rows.

    The exponent is formed whole before it is exponentiated. No sum over a row can vanish, since the pair of a particle
    with itself has $w_i / \max_k w_k$: far particles cost no division by 0.

    Args:
        x: particles, shape `(N, D)`.
        weights: $w$, shape `(N,)`, positive.
        bandwidth: $h$, a scalar tensor.
        expand: whether distances come from $\lVert x_i\rVert^2 + \lVert x_j\rVert^2 - 2 x_i\cdot x_j$, one matrix
            product, or from differences; None decides by accuracy.
    """

    def __init__(self, x: Tensor, weights: Tensor, bandwidth: Tensor, *, expand: bool | None = None) -> None:
        # Differences do not change, and products lose less to rounding; differences themselves would lose by it.
        centered = x - x.mean(0)
        self.weights, self.bandwidth = weights, bandwidth
        self.log_largest = weights.amax().log()
        self.expands = _is_accurate(centered, bandwidth) if expand is None else expand
        self.x = centered if self.expands else x
        self._bias = (weights.log() - self.log_largest).unsqueeze(-1)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and the kernel of shape (rows, N), which the next chunk overwrites."""
        if not self.expands:
            yield from ((rows, kernel) for rows, kernel, _ in self.chunks_of_differences())
            return
        n, scaled = len(self.x), self.x / (math.sqrt(2.0) * self.bandwidth)
        size = min(n, max(1, _CHUNK_NUMBERS // n))
        squares, one = scaled.square().sum(-1, keepdim=True), scaled.new_ones(n, 1)
        # The whole exponent in one product: 2 x_i x_j - |x_i|^2 - |x_j|^2 + log w_j.
        left = torch.cat([2 * scaled, -squares, one], -1)
        right = torch.cat([scaled, one, self._bias - squares], -1).mT
        buffer = self.x.new_empty(size, n)
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            out = buffer[: rows.stop - start]
            torch.mm(left[rows], right, out=out)
            yield rows, out.exp_()

    def chunks_of_differences(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, the kernel of shape (rows, N), and x_j - x_i of shape (rows, N, D)."""
        size = max(1, _CHUNK_NUMBERS // max(1, self.x.numel()))
        for start in range(0, len(self.x), size):
            rows = slice(start, min(start + size, len(self.x)))
            difference = self.x - self.x[rows].unsqueeze(1)
            distance = (difference / (math.sqrt(2.0) * self.bandwidth)).square().sum(-1)
            yield rows, (self._bias.mT - distance).exp(), difference

    @property
    def normalizer(self) -> Tensor:
        """Logarithm of what a row must be multiplied by to be a density."""
        return self.log_largest - self.x.shape[-1] * (self.bandwidth.log() + 0.5 * math.log(2 * math.pi))


def _is_accurate(centered: Tensor, bandwidth: Tensor) -> bool:
    r"""Whether the rounding error of the expansion of the squared distances is small.

    In units of $h^2$ it is about $\varepsilon\lVert x\rVert^2/h^2$; up to $4\sqrt\varepsilon$ is accepted. This reads
    from the device, as does the search for gradients that are not finite.
    """
    if not centered.numel():
        return False
    largest = centered.square().sum(-1).amax()
    return bool(largest * math.sqrt(torch.finfo(centered.dtype).eps) <= 4 * bandwidth**2)


def log_density(pairs: Pairs) -> Tensor:
    r"""$\log (K * q)(x_i)$ with the normalized kernel."""
    total = torch.cat([kernel.sum(-1) for _, kernel in pairs.chunks()])
    return total.log() + pairs.normalizer


def kernel_score(pairs: Pairs, *, blob: bool) -> tuple[Tensor, Tensor]:
    r"""$\log (K * q)(x_i)$, and the score by kernel estimate or of the mollified entropy.

    With $P_{ij} = w_j K_{ij} / (K*q)(x_i)$ the score of the estimate is $\sum_j P_{ij}(x_j - x_i)/h^2$. The blob method
    adds $\sum_j w_j K_{ij}(x_j - x_i) / h^2(K*q)(x_j)$, which is $\sum_j P_{ji}\,w_j(x_j - x_i)/h^2 w_i$ as $K$ is
    even: the same matrix serves both.
    """
    total, shifted = _expanded_shift(pairs, blob) if pairs.expands else _shift_of_differences(pairs, blob)
    return total.log() + pairs.normalizer, shifted / pairs.bandwidth**2


def _expanded_shift(pairs: Pairs, blob: bool) -> tuple[Tensor, Tensor]:
    x, weights = pairs.x, pairs.weights.unsqueeze(-1)
    # The last column counts.
    points = torch.cat([x, x.new_ones(len(x), 1)], -1)
    sums = torch.empty_like(points)
    returned = torch.zeros_like(points)
    for rows, kernel in pairs.chunks():
        summed = torch.mm(kernel, points, out=sums[rows])
        if blob:
            returned.addmm_(kernel.mT, points[rows] * (weights[rows] / summed[:, -1:]))
    total = sums[:, -1:]
    shifted = sums[:, :-1] / total - x
    if blob:
        shifted = shifted + (returned[:, :-1] - returned[:, -1:] * x) / weights
    return total.squeeze(-1), shifted


def _shift_of_differences(pairs: Pairs, blob: bool) -> tuple[Tensor, Tensor]:
    """The same from differences: the definition, and what is left where a product would round too much."""
    weights = pairs.weights.unsqueeze(-1)
    totals, shifts = list[Tensor](), list[Tensor]()
    returned = torch.zeros_like(pairs.x)
    for rows, kernel, difference in pairs.chunks_of_differences():
        total = kernel.sum(-1, keepdim=True)
        share = kernel / total
        totals.append(total.squeeze(-1))
        shifts.append(torch.einsum("ij,ijd->id", share, difference))
        if blob:
            returned -= torch.einsum("ij,ijd->jd", share * weights[rows], difference)
    shifted = torch.cat(shifts)
    return torch.cat(totals), shifted + returned / weights if blob else shifted


def stein_velocity(pairs: Pairs, drift: Tensor, temperature: float) -> Tensor:
    r"""$\sum_j w_j [K_{ij}\,b(x_j) + T\,\nabla_{x_j} K_{ij}]$ with drift $b$ and temperature $T$."""
    x, rate = pairs.x, temperature / pairs.bandwidth**2
    velocity = torch.empty_like(x)
    if pairs.expands:
        # The gradient is K_ij (x_i - x_j) / h^2: one product for the part of j, and a count for the part of i.
        sources = torch.cat([drift - rate * x, x.new_ones(len(x), 1)], -1)
        for rows, kernel in pairs.chunks():
            summed = kernel @ sources
            velocity[rows] = summed[:, :-1] + summed[:, -1:] * (rate * x[rows])
    else:
        for rows, kernel, difference in pairs.chunks_of_differences():
            velocity[rows] = kernel @ drift - rate * torch.einsum("ij,ijd->id", kernel, difference)
    return velocity * pairs.log_largest.exp()


def gaussian_entropy_and_score(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\int q\log q$ and $\nabla\log q(x_i)$ of the Gaussian with the moments of the particles.

    Within the span of the particles if they do not fill the space: directions without variance have score 0 and no
    part in the entropy.
    """
    mean = weights @ x
    centered = x - mean
    cov = centered.mT @ (centered * weights.unsqueeze(-1))
    values, vectors = torch.linalg.eigh(cov)
    size = torch.finfo(x.dtype).eps * max(1, x.shape[-1])
    # Relative to the largest variance, and to what rounding leaves of the mean where all particles coincide.
    rounding = (torch.finfo(x.dtype).eps * mean.abs().amax()) ** 2 if x.numel() else 0.0
    floor = values[-1:].clamp(min=0.0) * size + 16 * rounding
    kept = values > floor
    safe = torch.where(kept, values, torch.ones_like(values))
    score = -((centered @ vectors) * (kept / safe)) @ vectors.mT
    rank = kept.sum().to(x.dtype)
    negentropy = -(safe.log().sum() + rank * (1 + math.log(2 * math.pi))) / 2
    return negentropy, score
