r"""Causal linear attention in chunks: within a chunk by products of features, across chunks by a running sum.

With $u_j = (v_j, 1)$, or $u_j = v_j$ if the result is not normalized, the state $S_j = S_{j-1} + \phi(k_j)^\top u_j$ is
all that later queries need to know: $(n_i, d_i) = \phi(q_i)\,S_i$, and $o_i = n_i / d_i$. A chunk of rows is read as
$$(n, d) = \operatorname{tril}\!\big(\phi(q)\,\phi(k)^\top\big)\,u + \phi(q)\,S$$
with the state $S$ before it. Nothing but the state goes from chunk to chunk, so the memory is linear in the length. The
backward pass goes from the last chunk to the first with the gradient of the state, and computes the products again.

Both are operators of `torch.library`, so that a compiler sees one node each. Outside of compiled code they stand behind
`torch.autograd.Function`, which knows `torch.func`'s transforms.

Shape letters: `B` batch; `H` query heads; `H_kv` key heads; `L` tokens; `F` features; `E` value size; `U` the columns
of $u$, `E + 1` or `E`; `C` rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["causal_sums"]

# Products of features held at a time. On the CPU 128 KB in float32, with what goes with them, stay in a core's cache; a
# device wants to be filled.
_BLOCK, _DEVICE_BLOCK = 2**15, 2**19
_INSTEAD = "use backend='reference'"


def causal_sums(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, *, chunk_size: int, eps: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    r"""The output of causal linear attention after a state, and the state at its end.

    Args:
        query: features, shape `(B, H, L, F)`.
        key: features, shape `(B, H_kv, L, F)`.
        value: shape `(B, H_kv, L, E)`.
        state: sum over what came before, shape `(B, H_kv, F, U)`, in at least float32.
        chunk_size: `C`.
        eps: added to the denominators.
        normalize: whether to divide by them.

    Returns:
        The output, shape `(B, H, L, E)`, dtype of `query`; and the state, shape `(B, H_kv, F, U)`.
    """
    block = _BLOCK if query.device.type == "cpu" else _DEVICE_BLOCK
    count = max(1, block // max(1, query.shape[0] * query.shape[1] * chunk_size**2))
    run = _forward if torch.compiler.is_compiling() else _CausalSums.apply
    out, last, _, _ = run(query, key, value, state, chunk_size, count, eps, normalize)
    return out, last


def reciprocal(total: Tensor, eps: float) -> Tensor:
    """One over a denominator, and 0 for a denominator of 0: such a row has no weight on any key."""
    total = total + eps if eps else total
    empty = total == 0
    return total.masked_fill(empty, 1.0).reciprocal().masked_fill(empty, 0.0)


def _groups(length: int, chunk: int, count: int) -> list[tuple[slice, int]]:
    """Rows and chunk size of every group of `count` chunks; what is left over is a chunk of its own."""
    step, whole = chunk * count, length - length % chunk
    groups = [(slice(low, min(low + step, whole)), chunk) for low in range(0, whole, step)]
    return groups + ([(slice(whole, length), length - whole)] if whole < length else [])


def _chunks(x: Tensor, rows: slice, size: int, shared: int, dtype: torch.dtype) -> Tensor:
    """Rows as chunks, `(B, H_kv, chunks, H / H_kv * C, D)`: heads that share a key stand one below the other."""
    part = x[:, :, rows].to(dtype)
    batch, heads, length, dim = part.shape
    if heads == shared:
        # At once: products of parts that lie apart in memory would copy them each.
        return part.contiguous().view(batch, heads, length // size, size, dim)
    part = part.reshape(batch, shared, heads // shared, length // size, size, dim)
    return part.transpose(2, 3).flatten(3, 4)


def _rows(x: Tensor, heads: int, size: int) -> Tensor:
    """The inverse: `(B, H, L, D)`."""
    batch, shared, count, _, dim = x.shape
    if heads != shared:
        x = x.unflatten(3, (heads // shared, size)).transpose(2, 3)
    return x.reshape(batch, heads, count * size, dim)


def _extended(value: Tensor, normalize: bool) -> Tensor:
    """Values with a column of ones, whose weighted sum is the denominator."""
    return torch.nn.functional.pad(value, (0, 1), value=1.0) if normalize else value


def _tril(weights: Tensor, size: int) -> Tensor:
    """Zero in place what lies ahead, in every head's square."""
    rows = weights.shape[-2]
    (weights if rows == size else weights.unflatten(-2, (rows // size, size))).tril_()
    return weights


def _before(state: Tensor, change: Tensor, *, reverse: bool = False) -> Tensor:
    """The state before every chunk (behind it with `reverse`), from the changes by chunk; `state` moves on in place."""
    found = torch.empty_like(change)
    order: Iterator[int] = iter(range(change.shape[2]))
    for chunk in reversed(range(change.shape[2])) if reverse else order:
        found[:, :, chunk] = state
        state += change[:, :, chunk]
    return found


@torch.library.custom_op("danlu::causal_linear_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, chunk_size: int, count: int, eps: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, last state, denominators' reciprocals, and the state before every group."""
    out, last, inverse, starts = _like_outputs(query, value, state, chunk_size, count, normalize)
    last.copy_(state)
    heads, shared, dtype = query.shape[1], key.shape[1], state.dtype
    # Autocast reaches into operators, and would round the sums to half precision.
    with torch.autocast(device_type=query.device.type, enabled=False):
        for i, (rows, size) in enumerate(_groups(query.shape[2], chunk_size, count)):
            starts[:, :, i] = last
            q, k, v = (_chunks(x, rows, size, shared, dtype) for x in (query, key, value))
            u = _extended(v, normalize)
            before = _before(last, k.mT @ u)
            sums = (_tril(q @ k.mT, size) @ u).add_(q @ before)
            if normalize:
                inverse_here = reciprocal(sums[..., -1:], eps)
                inverse[:, :, rows] = _rows(inverse_here, heads, size)
                sums = sums[..., :-1] * inverse_here
            out[:, :, rows] = _rows(sums, heads, size).to(out.dtype)
    return out, last, inverse, starts


def _like_outputs(
    query: Tensor, value: Tensor, state: Tensor, chunk_size: int, count: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    groups = len(_groups(length, chunk_size, count))
    return (
        query.new_empty(batch, heads, length, value.shape[-1]),
        torch.empty_like(state, memory_format=torch.contiguous_format),
        state.new_empty(batch, heads, length if normalize else 0, 1),
        state.new_empty(*state.shape[:2], groups, *state.shape[2:]),
    )


@torch.library.custom_op("danlu::causal_linear_attention_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    inverse: Tensor,
    starts: Tensor,
    upstream: Tensor,
    upstream_state: Tensor,
    chunk_size: int,
    count: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the first state."""
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    later = upstream_state.clone(memory_format=torch.contiguous_format)
    shared, dtype = key.shape[1], starts.dtype
    groups = _groups(query.shape[2], chunk_size, count)
    with torch.autocast(device_type=query.device.type, enabled=False):
        for i, (rows, size) in reversed(list(enumerate(groups))):
            q, k, v, g = (_chunks(x, rows, size, shared, dtype) for x in (query, key, value, upstream))
            u = _extended(v, normalize)
            if normalize:
                # Of numerator and denominator: do / d and -(do . o) / d.
                share = -(g * _chunks(out, rows, size, shared, dtype)).sum(-1, keepdim=True)
                g = torch.cat((g, share), dim=-1).mul_(_chunks(inverse, rows, size, shared, dtype))
            before = _before(starts[:, :, i].clone(), k.mT @ u)
            behind = _before(later, q.mT @ g, reverse=True)
            weights, slopes = _tril(q @ k.mT, size), _tril(g @ u.mT, size)
            values = value.shape[-1]
            parts = (
                (slopes @ k).add_(g @ before.mT),
                (slopes.mT @ q).add_(u @ behind.mT),
                (weights.mT @ g[..., :values]).add_(k @ behind[..., :values]),
            )
            for grad, part in zip(grads, parts, strict=True):
                grad[:, :, rows] = _rows(part, grad.shape[1], size).to(grad.dtype)
    return grads[0], grads[1], grads[2], later


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, chunk_size: int, count: int, eps: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like_outputs(query, value, state, chunk_size, count, normalize)


@_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    inverse: Tensor,
    starts: Tensor,
    upstream: Tensor,
    upstream_state: Tensor,
    chunk_size: int,
    count: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    contiguous = torch.contiguous_format
    return (
        like(query, memory_format=contiguous),
        like(key, memory_format=contiguous),
        like(value, memory_format=contiguous),
        like(upstream_state, memory_format=contiguous),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, _, inverse, starts = output
    ctx.mark_non_differentiable(inverse, starts)
    ctx.save_for_backward(*inputs[:3], out, inverse, starts)
    ctx.options = (inputs[4], inputs[5], inputs[7])


def _gradients(ctx: Any, grad: Tensor, grad_state: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(*ctx.saved_tensors, grad, grad_state, *ctx.options), None, None, None, None)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(f"chunked linear attention has no second derivative; {_INSTEAD}")


_forward.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_refuse)


def _folded(info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments with the mapped axis as a part of the batch."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        whole = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return whole.flatten(0, 1)

    return [fold(x, dim) for x, dim in zip(arguments, in_dims, strict=True)]


def _unfolded(info: Any, outputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    # The size of the batch is given, since it cannot be inferred for tensors without elements.
    sizes = [(info.batch_size, x.shape[0] // max(1, info.batch_size)) for x in outputs]
    return tuple(x.unflatten(0, size) for x, size in zip(outputs, sizes, strict=True)), (0,) * len(outputs)


class _CausalSums(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: Tensor,
        chunk_size: int,
        count: int,
        eps: float,
        normalize: bool,
    ) -> tuple[Tensor, ...]:
        return _forward(query, key, value, state, chunk_size, count, eps, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Gradients.apply(*ctx.saved_tensors, *grad_outputs[:2], *ctx.options), None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _unfolded(info, _CausalSums.apply(*_folded(info, in_dims, args)))

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, ...]:
        raise RuntimeError(f"chunked linear attention has no forward-mode derivative; {_INSTEAD}")


class _Gradients(torch.autograd.Function):
    """The gradients, as a function whose own gradient raises: with create_graph they would pass for constants."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        inverse: Tensor,
        starts: Tensor,
        upstream: Tensor,
        upstream_state: Tensor,
        chunk_size: int,
        count: int,
        normalize: bool,
    ) -> tuple[Tensor, ...]:
        tensors = (query, key, value, out, inverse, starts, upstream, upstream_state)
        return _backward(*tensors, chunk_size, count, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"chunked linear attention has no second derivative; {_INSTEAD}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _unfolded(info, _Gradients.apply(*_folded(info, in_dims, args)))

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, ...]:
        raise RuntimeError(f"chunked linear attention has no second derivative; {_INSTEAD}")
