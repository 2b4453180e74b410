"""How many rows of a linear head a chunk has: what the user says, what fits, or a balance."""

import math

import torch

from danlu._common.checks import check_integer, is_low_precision
from danlu.losses._linear_engine import TokenLoss
from danlu.losses._row_loss import is_row_loss, is_transport_loss

__all__ = ["bytes_of_logit", "check_chunk", "default_chunk", "rows_per_chunk"]


def check_chunk(chunk_size: int | None, memory_budget: int | None) -> None:
    """Raise unless at most one of the two is given, and usable."""
    if chunk_size is not None and memory_budget is not None:
        raise ValueError("chunk_size and memory_budget exclude each other")
    if memory_budget is not None:
        check_integer("memory_budget", memory_budget, low=1)
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, low=1)


def rows_per_chunk(
    chunk_size: int | None, memory_budget: int | None, count: int, features: int, classes: int, per_logit: int
) -> int:
    """Rows of a chunk, as the user wants them."""
    if memory_budget is not None:
        rows = max(1, memory_budget // (per_logit * classes))
        size = 1 << (rows.bit_length() - 1)
    elif chunk_size is None:
        size = default_chunk(count, features, classes)
    else:
        size = chunk_size
    return min(size, max(1, count))


def bytes_of_logit(loss: TokenLoss, dtype: torch.dtype) -> int:
    """What a chunk holds for every one of its logits."""
    low = is_low_precision(dtype)
    row_bytes = 4 if low else dtype.itemsize
    buffers = 1
    if is_transport_loss(loss):
        # Products that give the costs, unless there is a table of them.
        buffers += loss.ground_cost.matrix is None and not loss.ground_cost.cache
    elif not is_row_loss(loss):
        # The gradient that autograd makes.
        buffers += 1
    # Half products need the gradient in half precision.
    return buffers * row_bytes + (dtype.itemsize if low else 0)


def default_chunk(count: int, features: int, classes: int) -> int:
    """Rows of a chunk that balance it against the weight's gradient."""
    wanted = max(features / 2, count * features / max(1, classes))
    return max(1, min(count, 2 ** math.ceil(math.log2(max(1.0, wanted)))))
