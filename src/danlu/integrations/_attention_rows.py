r"""What a row of softmax attention reads, from queries and keys, without ever holding all weights.

Shape letters: `B` batch, `H` heads, `G` key heads, `R` rows (queries), `N` keys, `D` head size, `K` statistics.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from danlu.diagnostics import sparsity_of_gaussian

__all__ = ["STATISTICS", "RowSample", "Rules", "measure_rows"]

STATISTICS = ("s", "n_eff", "n_eff_rest", "entropy", "sink", "logit_mean", "logit_sd", "gaussian_s")

# Scores of a tile by device; there are two tensors of this size at a time. On the CPU they should stay in the cache,
# but products of few rows are slow; elsewhere small tiles would be many launches.
_TILE_ELEMENTS = {"cpu": 2**20}
_TILE_ELEMENTS_ELSEWHERE = 2**22

# A score that is nothing beside all others, and finite, so that its product with a share of 0 is 0.
_HIDDEN = -1e30

# Rows of a tile, ascending -> visibility (None: all) and additive bias (None: 0), of shapes that broadcast to
# (B, H, R, N).
Rules = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


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
    chosen: Tensor | None = None,
) -> Tensor:
    """The statistics of every row, or of the chosen ones, shape `(K, B, H, R)`; NaN where it sees too few keys.

    Args:
        query: shape `(B, H, R, D)`.
        key: shape `(B, G, N, D)` with `H` a multiple of `G`.
        scale: factor of the scores.
        rules: what is visible to the rows of a tile.
        is_causal: no row sees keys behind its own slot, rows being the last slots; spares the work.
        min_keys: at least 2.
        softcap: bound of the scores by a hyperbolic tangent, before the bias.
        tile: rows at a time; None takes as many as make a good tile.
        chosen: int64, ascending, on the CPU; None means all rows.
    """
    batch, heads, count, _ = query.shape
    rows = count if chosen is None else len(chosen)
    keys = key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = key.to(dtype)
    found = query.new_empty(len(STATISTICS), batch, heads, rows, dtype=dtype)
    elements = _TILE_ELEMENTS.get(query.device.type, _TILE_ELEMENTS_ELSEWHERE)
    step = min(rows, tile or max(1, elements // max(1, batch * heads * keys)))
    # Two tiles for all: fresh memory for each costs more than what is done with it.
    room = query.new_empty(2, batch * heads * step * keys, dtype=dtype)
    for low in range(0, rows, max(1, step)):
        high = min(low + step, rows)
        places = torch.arange(low, high) if chosen is None else chosen[low:high]
        end = keys - count + int(places[-1]) + 1 if is_causal else keys
        places = places.to(query.device)
        visible, bias = rules(places)
        scores = _scores(query[:, :, places].to(dtype) * scale, key[:, :, :end], room[0])
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            scores += bias[..., :end].to(dtype)
        found[..., low:high] = _statistics(scores, None if visible is None else visible[..., :end], min_keys, room[1])
    return found


def _scores(query: Tensor, key: Tensor, room: Tensor) -> Tensor:
    """`(B, H, R, N)` in the first elements of `room`."""
    batch, heads, rows, width = query.shape
    groups, keys = key.shape[1:3]
    place = room[: batch * heads * rows * keys].view(batch * groups, heads // groups * rows, keys)
    torch.bmm(query.reshape(*place.shape[:2], width), key.flatten(0, 1).transpose(-2, -1), out=place)
    return place.view(batch, heads, rows, keys)


def _statistics(scores: Tensor, visible: Tensor | None, min_keys: int, room: Tensor) -> Tensor:
    """Scores `(B, H, R, N)`, which are overwritten, to statistics `(K, B, H, R)`.

    Every pass over the tile counts: there is one softmax, that of the keys but the first, and the first key is joined
    by its share. Masked fills are ten times slower than arithmetic, so they touch no columns that all rows see.
    """
    shape = scores.shape[:3]
    if scores.shape[3] == 0:
        return scores.new_full((len(STATISTICS), *shape), torch.nan)
    hides = visible is not None
    if visible is None:
        count = scores.new_full(shape, scores.shape[3])
        first = torch.zeros((*shape, 1), dtype=torch.int64, device=scores.device)
        behind = shown = scores[..., :0]
    else:
        visible = visible.expand(*visible.shape[:-1], scores.shape[3])
        count = visible.sum(-1).to(scores.dtype).expand(shape)
        first = visible.to(torch.uint8).argmax(-1, keepdim=True).expand(*shape, 1)
        start = _first_hidden(visible)
        # A view: what is done to it is done to the scores.
        behind, visible = scores[..., start:], visible[..., start:]
        shown = visible.to(scores.dtype)
        # Not a product, since hidden keys may be NaN.
        behind.masked_fill_(~visible, 0.0)
    mean = scores.sum(-1) / count
    scores -= mean[..., None]
    if hides:
        behind *= shown
    sd = torch.linalg.vector_norm(scores, dim=-1) / count.sqrt()
    if hides:
        behind += (1 - shown).mul_(_HIDDEN)
    own = scores.gather(-1, first)[..., 0]
    scores.scatter_(-1, first, _HIDDEN)
    top = scores.amax(-1)
    scores -= top[..., None]
    rest = torch.softmax(scores, -1, out=room[: scores.numel()].view(scores.shape))
    # Of the keys but the first: log of the sum of exponentials, sum of squared shares, entropy.
    total = -rest.amax(-1).log()
    squares = torch.linalg.vector_norm(rest, dim=-1).square()
    entropy = total - scores.mul_(rest).sum(-1)
    sink, others = torch.sigmoid(own - top - total), torch.sigmoid(total + top - own)
    n_eff = 1 / (sink.square() + others.square() * squares)
    values = (
        (n_eff / count).sqrt(),
        n_eff,
        (1 / squares).masked_fill(count < 3, torch.nan),
        torch.special.entr(sink) + torch.special.entr(others) + others * entropy,
        sink,
        mean,
        sd,
        sparsity_of_gaussian("exp", 0.0, sd),
    )
    return torch.stack(values).masked_fill(count < min_keys, torch.nan)


def _first_hidden(visible: Tensor) -> int:
    """The first key that some row does not see; 0 on other devices than the CPU, which would wait."""
    if visible.device.type != "cpu":
        return 0
    everywhere = visible.flatten(0, -2).all(0)
    return int(everywhere.to(torch.uint8).argmin()) if not bool(everywhere.all()) else visible.shape[-1]


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
