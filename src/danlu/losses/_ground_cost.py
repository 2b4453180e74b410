r"""The cost of moving probability from class $v$ to the target $t$: from an embedding, a table, or the head itself.

Shape letters: `V` classes; `E` width of the embedding; `N` rows; `U` different targets of a chunk.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_floating, is_low_precision

__all__ = ["CostRows", "GroundCost", "cosine_costs", "inverse_norms"]

# A table of 50 000 x 50 000 in bfloat16 is 5 GB.
_LARGEST_TABLE = 50_000
_HEAD = "head"


def inverse_norms(embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the norm of every row, 0 for a row of zeros: its cosines are then 0."""
    norms = torch.linalg.vector_norm(embedding, dim=1, dtype=dtype)
    return torch.where(norms > torch.finfo(dtype).tiny, 1 / norms, torch.zeros_like(norms))


def cosine_costs(embedding: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Costs `(N, V)` of the rows `target`: one minus the cosine, and exactly 0 at the target."""
    table = embedding.to(dtype)
    scale = inverse_norms(table, dtype)
    costs = (1 - (table[target] * scale[target, None]) @ table.t() * scale).clamp(0, 2)
    return costs.scatter(1, target[:, None], 0.0)


@dataclass(frozen=True, eq=False)
class GroundCost:
    r"""Costs $c_{tv} \ge 0$ of target $t$ and class $v$, without gradients.

    Args:
        embedding: shape `(V, E)`, for $c_{tv} = 1 - \cos(e_t, e_v)$; "head" takes the weight of the linear head.
        matrix: shape `(V, V)`, row $t$, column $v$.
        cache: keep the table of all cosine costs in bfloat16.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: both or neither are given, a shape does not fit, costs are negative (checked on the CPU), or the
            table to be cached is too large.
    """

    embedding: Tensor | Literal["head"] | None = None
    matrix: Tensor | None = None
    cache: bool = False
    _table: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options and leave the graph."""
        if (self.embedding is None) == (self.matrix is None):
            raise ValueError("exactly one of cost_embedding and cost_matrix must be given")
        if isinstance(self.embedding, str):
            if self.embedding != _HEAD:
                raise ValueError(f"cost_embedding must be a tensor or 'head', got {self.embedding!r}")
            if self.cache:
                raise ValueError("cost_cache keeps the table of a frozen embedding; the head changes with every step")
        elif self.embedding is not None:
            check_floating("cost_embedding", self.embedding)
            if self.embedding.ndim != 2:
                raise ValueError(f"cost_embedding must have shape (V, E), got {tuple(self.embedding.shape)}")
            object.__setattr__(self, "embedding", self.embedding.detach())
        if self.matrix is not None:
            check_floating("cost_matrix", self.matrix)
            if self.cache:
                raise ValueError("cost_cache makes a table of a cost_embedding; a cost_matrix is one already")
            if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
                raise ValueError(f"cost_matrix must have shape (V, V), got {tuple(self.matrix.shape)}")
            on_cpu = self.matrix.device.type == "cpu"
            if on_cpu and not torch.compiler.is_compiling() and not bool((self.matrix >= 0).all()):
                raise ValueError("cost_matrix must hold costs >= 0, got a negative or NaN entry")
            object.__setattr__(self, "matrix", self.matrix.detach())
        if self.cache and isinstance(self.embedding, Tensor) and self.embedding.shape[0] > _LARGEST_TABLE:
            raise ValueError(
                f"cost_cache makes a table of V x V, for V up to {_LARGEST_TABLE}; got V = {self.embedding.shape[0]}"
            )

    @classmethod
    def of(cls, source: str, tensor: Tensor | None, table: Tensor | None) -> "GroundCost":
        """Costs that have been checked, of an "embedding", perhaps with its table, or of a "matrix"."""
        cost = cls(embedding=_HEAD)
        object.__setattr__(cost, "embedding", tensor if source == "embedding" else None)
        object.__setattr__(cost, "matrix", tensor if source == "matrix" else None)
        if source == "embedding" and table is not None:
            object.__setattr__(cost, "cache", True)
            cost._table.append(table)
        return cost

    def parts(self) -> tuple[str, Tensor | None, Tensor | None]:
        """What `of` takes; for the head itself "head", and no tensor."""
        if self.matrix is not None:
            return "matrix", self.matrix, None
        return (
            ("embedding", self.embedding, self.table()) if isinstance(self.embedding, Tensor) else ("head", None, None)
        )

    @property
    def is_head(self) -> bool:
        """Whether the head is the cost embedding."""
        return isinstance(self.embedding, str)

    def largest(self) -> float | Tensor:
        """A bound on the costs of other classes than the target; infinite if targets cost something themselves."""
        if self.matrix is None:
            return 2.0
        known = self.matrix.diagonal().eq(0).all()
        return torch.where(known, self.matrix.amax(), torch.inf)

    def check(self, classes: int, device: torch.device) -> None:
        """Raise `ValueError` unless the costs are those of `classes` classes on `device`."""
        for name, tensor in (("cost_embedding", self.embedding), ("cost_matrix", self.matrix)):
            if isinstance(tensor, Tensor):
                if tensor.shape[0] != classes:
                    raise ValueError(f"{name} must have {classes} rows, one per class, got {tuple(tensor.shape)}")
                if tensor.device != device:
                    raise ValueError(f"all tensors must be on one device, got {name} on {tensor.device} and {device}")

    def dense(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """Costs `(N, V)` of the rows `target` `(N,)`."""
        if self.matrix is not None:
            return self.matrix[target].to(dtype)
        if not isinstance(self.embedding, Tensor):
            raise ValueError("cost_embedding='head' has a meaning for a linear head only; pass the head's weight")
        with torch.autocast(device_type=target.device.type, enabled=False):
            return cosine_costs(self.embedding, target, dtype)

    def table(self) -> Tensor | None:
        """What costs are gathered from instead of computed, if there is such a thing."""
        if self.matrix is not None:
            return self.matrix
        if not self.cache or not isinstance(self.embedding, Tensor):
            return None
        if not self._table:
            dtype = torch.float32 if is_low_precision(self.embedding.dtype) else self.embedding.dtype
            rows = torch.arange(self.embedding.shape[0], device=self.embedding.device)
            parts = [cosine_costs(self.embedding, part, dtype).bfloat16() for part in rows.split(1024)]
            self._table.append(torch.cat(parts))
        return self._table[0]


class CostRows:
    """The costs of one chunk of rows after the other, for the engine of the linear losses.

    With a table they are gathered. Else one product gives the cosines: of the head and the targets' embeddings in one
    with the logits if the head is the embedding, so that the weight is read once. On the CPU repeated targets of a
    chunk share a row; on an accelerator, counting them would wait for the device.
    """

    def __init__(self, ground_cost: GroundCost, head: Tensor, chunk_size: int, row_dtype: torch.dtype) -> None:
        self.is_head = ground_cost.is_head
        self.table = ground_cost.table()
        self._dtype = row_dtype
        self._target: Tensor | None = None
        self._cosines: Tensor | None = None
        self._place: Tensor | None = None
        self._scale: Tensor | None = None
        if self.table is None:
            embedding = head if not isinstance(ground_cost.embedding, Tensor) else ground_cost.embedding.to(head.dtype)
            self.embedding = embedding
            self._scale = inverse_norms(embedding, row_dtype)
        self.extra_rows = 0 if self.table is not None else chunk_size

    def queries(self, target: Tensor) -> Tensor:
        """Unit embeddings `(U, E)` of the targets of a chunk, for the product."""
        if self._scale is None:
            raise ValueError("a table needs no product")
        self._target = target
        if target.device.type == "cpu":
            chosen, self._place = torch.unique(target, return_inverse=True)
        else:
            chosen = target
        unit = self.embedding[chosen].to(self._dtype) * self._scale[chosen, None]
        return unit.to(self.embedding.dtype)

    def start(self, target: Tensor, cosines: Tensor | None) -> None:
        """Take the products `(U, V)` of `queries` with the embedding, or with a table the targets alone."""
        self._target, self._cosines = target, cosines

    def rows(self, block: slice) -> Tensor:
        """Costs of some rows of the chunk; may be overwritten."""
        if self._target is None:
            raise ValueError("no chunk has been started")
        target = self._target[block]
        if self.table is not None:
            return self.table.index_select(0, target).to(self._dtype)
        if self._cosines is None or self._scale is None:
            raise ValueError("no chunk has been started")
        found = self._cosines[block] if self._place is None else self._cosines.index_select(0, self._place[block])
        # 1 - cosine in one pass.
        torch.addcmul(found.new_ones(()), found, self._scale, value=-1, out=found)
        # A rounded cosine may exceed 1, and the way to the target itself costs nothing, exactly.
        return found.clamp_(0, 2).scatter_(1, target[:, None], 0.0)
