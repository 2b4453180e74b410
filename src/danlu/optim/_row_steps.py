r"""One step of some rows of a table: find them, make up for the decay that they missed, update them, put them back.

Source: kexue.fm articles 9736 (2023-08-28) and 6869, the "lazy" optimizer.

Shape letters: V rows, `...` the other axes of a table (none for a vector).
"""

import math
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor

from danlu._common.checks import is_low_precision
from danlu.kernels.sign_update import dtypes_supported, find_rows
from danlu.optim._nonfinite import is_finite
from danlu.optim._traversal import BLOCK, is_plain

__all__ = ["LazyState", "RowUpdate", "RowsInPlace", "dense", "part_number", "settle", "step_rows"]

LazyState = Literal["decay", "freeze"]
# Entries of a parameter's state that belong to this file. `clock` has one axis: the optimizers load such tensors in the
# dtype in which they were saved.
_OWN_STATE = ("clock", "last_step", "touched")

# (parameter, gradient or None, state tensors by key, whether the momentum was already decayed in this cycle, whether
# to look for gradients that are not finite, number of the block) -> None: the optimizer's own function on the tensors
# that it is given.
RowUpdate = Callable[[Tensor, Tensor | None, Mapping[str, Tensor], bool, bool, int], None]
# (parameter, gradient with its rows or with those of the list, state tensors by key, rows, what the momentum of each
# lacks as a factor, whether the momentum was already decayed in this cycle) -> None: the same by one compiled call.
RowsInPlace = Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor, Tensor, bool], None]


def part_number(number: int, part: int) -> int:
    """A number for the random bits of one block of rows of parameter `number`, whose elements are counted from 0."""
    return number + (part << 20)


def dense(grad: Tensor) -> Tensor:
    """The gradient with all its zeros."""
    return grad.to_dense() if grad.is_sparse else grad


def settle(state: MutableMapping[str, Any], beta: float) -> None:
    """Apply the decay that rows of the momentum still lack, and forget that there was any."""
    if "last_step" in state:
        missed = state.pop("clock") - state.pop("last_step")
        _decay_(state["exp_avg"], beta, missed)


def step_rows(
    param: Tensor,
    grad: Tensor | None,
    state: MutableMapping[str, Any],
    update: RowUpdate,
    *,
    beta: float,
    lazy_state: LazyState = "decay",
    marked: Tensor | None = None,
    padding_idx: int | None = None,
    first: bool = True,
    last: bool = True,
    guard: bool = False,
    bad: Tensor | None = None,
    row_wise: bool = True,
    eager: bool = False,
    compiled: bool = False,
    in_place: RowsInPlace | None = None,
) -> None:
    r"""One micro-step of a lazily updated table, in place.

    Definition:
        Row $i$ is touched if its gradient is not all zero (sparse gradient: if it has an index; with marks: if it is
        marked, and the gradients of the other rows count as zero). `update` is applied to the rows touched since the
        cycle began, if this micro-step is its last; before that it only folds gradients in. For `lazy_state="decay"`
        the momentum of every row decays by $\beta$ per cycle: a row that is touched after $\Delta$ cycles without
        gets the factor $\beta^{\Delta}$ first. For "freeze" it gets none.

    Args:
        param: $(V, \dots)$; floating-point or complex.
        grad: shape of `param`, dense or sparse, or None.
        state: holds `exp_avg` and further tensors of the parameter's shape. Entries of this function: `clock` (decays
            so far) and `last_step` (value of the clock up to which a row's momentum is decayed), int32; within a
            cycle `touched`, bool.
        update: the optimizer's function.
        beta: $\beta$ of the momentum.
        lazy_state: what happens to the momentum of the other rows.
        marked: $(V)$, bool: the touched rows; None looks for them.
        padding_idx: row that is never touched.
        first: whether the momentum has not been decayed in this cycle yet.
        last: whether this micro-step updates.
        guard: whether `update` shall look for gradients that are not finite; a bad one does not advance the clock.
        bad: 0-d integer tensor that `update` increments on a bad gradient.
        row_wise: whether `update` of some rows equals that of the whole table on those rows.
        eager: do it with masks over the whole table and without a deferred decay: the oracle, and the way for tensor
            subclasses.
        compiled: whether the compiled search for rows may be used.
        in_place: a compiled `update` of rows where they lie, for contiguous tables on the CPU; None if there is none.

    Numerics:
        $\beta^{\Delta}$ is computed in float64 and rounded to the dtype of the arithmetic. Rows are gathered in
        blocks that stay in the cache (CPU) or at once (accelerators, where finding the rows of a dense gradient waits
        for the device).
    """
    if param.numel() == 0 or (grad is None and not last):
        return
    plain = is_plain(param, grad)
    if eager or not plain or not row_wise:
        whole = None if grad is None else dense(grad)
        _masked(param, whole, state, update, beta, lazy_state, marked, padding_idx, first, last, guard)
        return
    before = None if bad is None else bad.clone()
    rows, values, guard = _touched_rows(param, grad, marked, padding_idx, guard, compiled)
    advances = grad is not None and first
    if lazy_state == "freeze":
        settle(state, beta)
    elif "last_step" not in state:
        state["clock"] = torch.zeros(1, dtype=torch.int32, device=param.device)
        state["last_step"] = torch.zeros(param.shape[0], dtype=torch.int32, device=param.device)
    seen = None
    if not (first and last):
        seen = state.setdefault("touched", torch.zeros(param.shape[0], dtype=torch.bool, device=param.device))
    missed = None
    if lazy_state == "decay":
        missed = state["clock"] - (state["last_step"] if rows is None else state["last_step"][rows])
    elif seen is not None and not first:
        missed = 1 - (seen if rows is None else seen[rows]).to(torch.int32)
    if seen is not None:
        _fill(seen, rows, True)
        if last:
            rows, values, missed = _with_earlier(seen, rows, values, missed, param)
            del state["touched"]
    aligned = _aligned(param, state)
    if rows is None:
        if missed is not None and (param.device.type != "cpu" or bool(missed.any())):
            _decay_(aligned["exp_avg"], beta, missed)
        update(param, values, aligned, not first, guard, 0)
    elif in_place is not None and values is not None and not guard and _lies_well(param, values, aligned["exp_avg"]):
        if len(rows):
            factors = torch.ones(len(rows), dtype=torch.float64) if missed is None else _powers(beta, missed)
            in_place(param, values, aligned, rows, factors, not first)
    else:
        _gathered(param, rows, values, aligned, missed, beta, not first, guard, update)
    if lazy_state == "decay":
        if advances:
            state["clock"] += 1 if bad is None or before is None else (1 - (bad - before)).to(torch.int32)
        _fill(state["last_step"], rows, state["clock"][0])


def _touched_rows(
    param: Tensor, grad: Tensor | None, marked: Tensor | None, padding_idx: int | None, guard: bool, compiled: bool
) -> tuple[Tensor | None, Tensor | None, bool]:
    """The touched rows, all different (None: all of them), their gradients, and whether to look at those still.

    The gradients of a dense one come back as they are, to be gathered by row.
    """
    on_cpu = param.device.type == "cpu"
    if grad is None:
        return torch.empty(0, dtype=torch.int64, device=param.device), None, False
    if grad.is_sparse and grad.sparse_dim() != 1:
        grad = grad.to_dense()
    if grad.is_sparse:
        if not (on_cpu and _all_differ(grad._indices()[0], len(grad))):
            # On the CPU the copy of all values, most of it page faults, is made only where indices repeat.
            grad = grad.coalesce()
        rows, values = grad._indices()[0], grad._values()
        if marked is not None:
            wanted, kept = marked.nonzero()[:, 0], marked[rows]
            values = _spread(values[kept], torch.searchsorted(wanted, rows[kept]), len(wanted))
            rows = wanted
    elif marked is not None:
        rows = marked.nonzero()[:, 0]
        values = grad.index_select(0, rows)
    else:
        mask, finite = _rows_with_gradient(grad, compiled)
        if padding_idx is not None:
            mask[padding_idx] = False
        every = on_cpu and bool(mask.all())
        return None if every else mask.nonzero()[:, 0], grad, guard and not finite
    if padding_idx is not None:
        kept = rows != padding_idx
        rows, values = rows[kept], values[kept]
    return rows, values, guard and not (on_cpu and is_finite(values))


def _all_differ(rows: Tensor, length: int) -> bool:
    """Whether no row comes twice. Gradients of all rows are not among these: they must be in the order of the table."""
    if len(rows) >= length:
        return False
    ordered = rows.sort().values
    return not bool((ordered[1:] == ordered[:-1]).any())


def _rows_with_gradient(grad: Tensor, compiled: bool) -> tuple[Tensor, bool]:
    """Which rows hold an element other than 0, and whether all elements are known to be finite (CPU only)."""
    if compiled and grad.device.type == "cpu" and grad.is_contiguous() and dtypes_supported(grad.dtype, grad.dtype):
        return find_rows(grad)
    if grad.is_complex():
        grad = torch.view_as_real(grad)
    if grad.device.type != "cpu":
        return (grad != 0).flatten(1).any(1) if grad.ndim > 1 else grad != 0, False
    if grad.ndim == 1:
        return grad != 0, is_finite(grad)
    found = [_block_rows(block) for block in grad.flatten(1).split(max(1, BLOCK * len(grad) // grad.numel()))]
    return torch.cat([mask for mask, _ in found]), all(finite for _, finite in found)


def _block_rows(block: Tensor) -> tuple[Tensor, bool]:
    # One fast read decides if every row has a gradient whose square neither vanishes nor overflows.
    norms = torch.linalg.vector_norm(block, dim=1, dtype=torch.float32 if is_low_precision(block.dtype) else None)
    mask = norms > 0
    if bool((mask & torch.isfinite(norms)).all()):
        return mask, True
    # The block is still in the cache.
    high, low = block.amax(1), block.amin(1)
    return (high != 0) | (low != 0), bool((torch.isfinite(high) & torch.isfinite(low)).all())


def _with_earlier(
    seen: Tensor, rows: Tensor | None, values: Tensor | None, missed: Tensor | None, param: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Join the rows of earlier micro-steps of the cycle, whose gradient is now zero and whose momentum is current."""
    if rows is None:
        return rows, values, missed
    every = seen.nonzero()[:, 0]
    places = torch.searchsorted(every, rows)
    if missed is not None:
        missed = _spread(missed, places, len(every))
    if values is not None and values.shape != param.shape:
        values = _spread(values, places, len(every))
    return every, values, missed


def _spread(rows: Tensor, places: Tensor, length: int) -> Tensor:
    """A table of `length` rows with `rows` at `places` and zeros elsewhere."""
    return rows.new_zeros(length, *rows.shape[1:]).index_copy_(0, places, rows)


def _gathered(
    param: Tensor,
    rows: Tensor,
    values: Tensor | None,
    aligned: Mapping[str, Tensor],
    missed: Tensor | None,
    beta: float,
    folded: bool,
    guard: bool,
    update: RowUpdate,
) -> None:
    """Update some rows. `values` are the gradients of those rows, or the whole gradient."""
    if len(rows) == 0:
        return
    size = len(rows)
    if param.device.type == "cpu" and not guard:
        # A guard must see all rows at once.
        size = max(1, BLOCK * torch.get_num_threads() * len(param) // param.numel())
    by_row = values is not None and len(values) == len(rows)
    sources = {"": param.detach(), **aligned}
    if values is not None and not by_row:
        sources["grad"] = values
    # Memory that is used again stays in the cache, and costs no page faults.
    buffers = {key: one.new_empty(min(size, len(rows)), *one.shape[1:]) for key, one in sources.items()}
    for part, block in enumerate(rows.split(size)):
        here = slice(part * size, part * size + len(block))
        taken = {key: torch.index_select(one, 0, block, out=buffers[key][: len(block)]) for key, one in sources.items()}
        theta, grad = taken.pop(""), taken.pop("grad", None)
        if missed is not None:
            _decay_(taken["exp_avg"], beta, missed[here])
        update(theta, values[here] if values is not None and by_row else grad, taken, folded, guard, part)
        param.index_copy_(0, block, theta)
        for key, one in taken.items():
            aligned[key].index_copy_(0, block, one)


def _lies_well(param: Tensor, values: Tensor, exp_avg: Tensor) -> bool:
    """Whether the compiled call can find the rows of these tensors."""
    return (
        param.device.type == "cpu"
        and values.dtype == param.dtype
        and dtypes_supported(param.dtype, exp_avg.dtype)
        and param.is_contiguous()
        and values.is_contiguous()
        and exp_avg.is_contiguous()
    )


def _masked(
    param: Tensor,
    grad: Tensor | None,
    state: MutableMapping[str, Any],
    update: RowUpdate,
    beta: float,
    lazy_state: LazyState,
    marked: Tensor | None,
    padding_idx: int | None,
    first: bool,
    last: bool,
    guard: bool,
) -> None:
    """The definition with plain operations on whole tensors: update everything, put back what shall not have moved."""
    settle(state, beta)
    earlier = state.pop("touched", None)
    now = None
    if grad is not None:
        now = (grad != 0).flatten(1).any(1) if grad.ndim > 1 else grad != 0
        if marked is not None:
            now = marked
        if padding_idx is not None:
            # Positions made from the mask itself, so that they are sharded as it is.
            now = now & (torch.ones_like(now, dtype=torch.int64).cumsum(0) != padding_idx + 1)
        if marked is not None or padding_idx is not None:
            grad = torch.where(_over_rows(now, param), grad, torch.zeros_like(grad))
    touched = now if earlier is None else earlier if now is None else earlier | now
    if touched is None:
        return
    aligned = _aligned(param, state)
    held = {key: one.clone() for key, one in aligned.items() if lazy_state == "freeze"}
    start = param.detach().clone()
    if lazy_state == "freeze" and not first and now is not None:
        fresh = now if earlier is None else now & ~earlier
        _decay_(aligned["exp_avg"], beta, fresh.to(torch.int32))
    update(param, grad, aligned, not first, guard, 0)
    # Before the last micro-step only a bad gradient moves rows: its own.
    moved = touched if last or now is None else now
    param.copy_(torch.where(_over_rows(moved, param), param, start))
    mask = _over_rows(touched, param)
    for key, one in held.items():
        aligned[key].copy_(torch.where(mask, aligned[key], one))
    if not last:
        state["touched"] = touched


def _aligned(param: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state tensors that have a row for every row of the parameter, but for the entries of this file."""
    return {
        key: one
        for key, one in state.items()
        if isinstance(one, Tensor) and one.shape == param.shape and key not in _OWN_STATE
    }


def _decay_(exp_avg: Tensor, beta: float, missed: Tensor) -> None:
    """Multiply every row by beta to the power of its entry in `missed`."""
    dtype = torch.float32 if is_low_precision(exp_avg.dtype) else exp_avg.real.dtype
    exp_avg.mul_(_over_rows(_powers(beta, missed).to(dtype), exp_avg))


def _powers(beta: float, missed: Tensor) -> Tensor:
    wide = torch.float32 if missed.device.type == "mps" else torch.float64
    return missed.to(wide).mul_(math.log(beta)).exp_() if beta > 0 else (missed == 0).to(wide)


def _over_rows(per_row: Tensor, table: Tensor) -> Tensor:
    return per_row.reshape(-1, *[1] * (table.ndim - 1))


def _fill(target: Tensor, rows: Tensor | None, value: Tensor | bool) -> None:
    if rows is None:
        target.fill_(value)
    else:
        target.index_fill_(0, rows, value)
