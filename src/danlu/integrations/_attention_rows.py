r"""What a row of softmax attention reads, from queries and keys, without ever holding all weights.

Shape letters: `B` batch, `H` heads, `G` key heads, `R` rows (queries), `N` keys, `D` head size, `K` statistics.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from danlu.diagnostics import sparsity_of_gaussian

__all__ = ["STATISTICS", "RowSample", "Rules", "measure_rows"]

STATISTICS = ("s", "n_eff", "n_eff_rest", "entropy", "sink", "logit_mean", "logit_sd", "gaussian_s")

# Scores of a tile by device; there are about five tensors of this size at a time. On the CPU they stay in the cache,
# which is twice as fast as tiles of 16 MiB; elsewhere small tiles would be many launches.
_TILE_ELEMENTS = {"cpu": 2**18}
_TILE_ELEMENTS_ELSEWHERE = 2**22

# First row of a tile and the one behind it -> visibility (None: all) and additive bias (None: 0), of shapes that
# broadcast to (B, H, R, N).
Rules = Callable[[int, int], tuple[Tensor | None, Tensor | None]]


def measure_rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    rules: Rules,
    is_causal: bool,
    min_keys: int,
    softcap: float | None = None,
    tile: int | None = None,
) -> Tensor:
    """The statistics of every row, shape `(K, B, H, R)`; NaN for rows that see fewer than `min_keys` keys.

    Args:
        query: shape `(B, H, R, D)`.
        key: shape `(B, G, N, D)` with `H` a multiple of `G`.
        scale: factor of the scores.
        rules: what is visible to the rows of a tile.
        is_causal: no row sees keys behind its own slot, rows being the last slots; spares the work.
        min_keys: at least 2.
        softcap: bound of the scores by a hyperbolic tangent, before the bias.
        tile: rows at a time; None takes as many as make a good tile.
    """
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = key.to(dtype)
    found = query.new_empty(len(STATISTICS), batch, heads, rows, dtype=dtype)
    elements = _TILE_ELEMENTS.get(query.device.type, _TILE_ELEMENTS_ELSEWHERE)
    step = tile or max(1, elements // max(1, batch * heads * keys))
    for low in range(0, rows, step):
        high = min(low + step, rows)
        end = keys - rows + high if is_causal else keys
        visible, bias = rules(low, high)
        scores = _scores(query[:, :, low:high].to(dtype) * scale, key[:, :, :end])
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            scores += bias[..., :end].to(dtype)
        found[..., low:high] = _statistics(scores, None if visible is None else visible[..., :end], min_keys)
    return found


def _scores(query: Tensor, key: Tensor) -> Tensor:
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups * rows, width)
    return (grouped @ key.transpose(-2, -1)).view(batch, heads, rows, key.shape[2])


def _statistics(scores: Tensor, visible: Tensor | None, min_keys: int) -> Tensor:
    """Scores `(B, H, R, N)`, which are overwritten, to statistics `(K, B, H, R)`."""
    shape = scores.shape[:3]
    if scores.shape[3] == 0:
        return scores.new_full((len(STATISTICS), *shape), torch.nan)
    if visible is None:
        count = scores.new_full(shape, scores.shape[3])
        first = torch.zeros((*shape, 1), dtype=torch.int64, device=scores.device)
        hidden = None
    else:
        visible = visible.expand(*visible.shape[:-1], scores.shape[3])
        count = visible.sum(-1).to(scores.dtype).expand(shape)
        first = visible.to(torch.uint8).argmax(-1, keepdim=True).expand(*shape, 1)
        hidden = ~visible
        scores.masked_fill_(hidden, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    scores -= top
    if hidden is not None:
        scores.masked_fill_(hidden, 0.0)
    mean = scores.sum(-1) / count
    deviation = scores - mean[..., None]
    if hidden is not None:
        deviation.masked_fill_(hidden, 0.0)
    sd = (deviation.square_().sum(-1) / count).sqrt()
    del deviation
    weights = scores.exp()
    if hidden is not None:
        weights.masked_fill_(hidden, 0.0)
    total = weights.sum(-1)
    n_eff = total.square() / weights.square().sum(-1)
    sink = weights.gather(-1, first)[..., 0] / total
    entropy = total.log() - weights.mul_(scores).sum(-1) / total
    del weights
    # Again without the first key: subtracting its share would cancel where it has nearly everything.
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    scores.scatter_(-1, first, -torch.inf)
    rest = (scores - scores.amax(-1, keepdim=True)).exp_()
    n_rest = (rest.sum(-1).square() / rest.square().sum(-1)).masked_fill(count < 3, torch.nan)
    values = (
        (n_eff / count).sqrt(),
        n_eff,
        n_rest,
        entropy,
        sink,
        mean + top[..., 0],
        sd,
        sparsity_of_gaussian("exp", 0.0, sd),
    )
    return torch.stack(values).masked_fill(count < min_keys, torch.nan)


class RowSample:
    """Rows of one layer: all of them while there are few, then a uniform sample of all that were seen.

    Args:
        size: rows to keep.
        heads: number of heads; a row is kept with all of them.
    """

    def __init__(self, size: int, heads: int) -> None:
        self.size = size
        self.values = torch.empty(0, len(STATISTICS), heads)
        # Exact, whatever the sample: rows by head that entered, and rows that saw too few keys.
        self.rows = torch.zeros(heads, dtype=torch.int64)
        self.skipped = torch.zeros(heads, dtype=torch.int64)
        self._priority = torch.empty(0, dtype=torch.float64)
        # Of its own, so that looking changes no random number of the model.
        self._generator = torch.Generator().manual_seed(0)

    def add(self, found: Tensor) -> None:
        """Take in what `measure_rows` returned."""
        rows = found.permute(1, 3, 0, 2).flatten(0, 1).float().cpu()
        # The mean of the scores is a number for every row that sees enough.
        entered = ~rows[:, STATISTICS.index("entropy")].isnan()
        self.rows += entered.sum(0)
        self.skipped += (~entered).sum(0)
        rows = rows[entered.any(1)]
        priority = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        self.values = torch.cat((self.values, rows))
        self._priority = torch.cat((self._priority, priority))
        if len(self.values) > self.size:
            # The rows with the largest of independent uniform numbers are a uniform sample, at any time.
            self._priority, kept = self._priority.topk(self.size)
            self.values = self.values[kept]
