"""How a step walks over tensors: one by one, in cache-sized blocks, or in buckets of `torch._foreach_*` calls."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from danlu._common.checks import is_low_precision

__all__ = ["blocks", "compute_dtype", "decayed_add_", "pick", "plan", "scratch", "write_back"]

Path = Literal["loop", "blocks", "bucket"]
Item = TypeVar("Item")

# Elements per thread: four float32 streams of this size stay in the cache of one core while few enough calls are
# made. Measured on one core: 64k elements cost 10 % more, 32k 25 %; tensors beyond the cache, taken whole, 100 %.
BLOCK = 2**18
# Elements per bucket: bounds what the temporaries of a step on an accelerator can take (64 MiB each in float32).
BUCKET = 2**24


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for tensors of `dtype`: float32 for float16 and bfloat16."""
    return torch.float32 if is_low_precision(dtype) else dtype


def plan(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], foreach: bool | None
) -> Iterator[tuple[Path, list[int]]]:
    """Yield how to process which tensors; empty tensors are left out.

    Subclasses (DTensor) always take the loop, whose operations are all plain: neither flat views nor lists that mix
    them with ordinary tensors are valid for them.
    """
    looped: list[int] = []
    blocked: list[int] = []
    bucketed: defaultdict[object, list[int]] = defaultdict(list[int])
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if param.numel() == 0:
            continue
        plain = type(param) in (Tensor, nn.Parameter) and (grad is None or type(grad) is Tensor)
        if foreach is False or not plain:
            looped.append(i)
        elif param.device.type == "cpu":
            blocked.append(i)
        elif param.is_complex():
            looped.append(i)
        else:
            bucketed[param.device, param.dtype, None if grad is None else grad.dtype].append(i)
    if looped:
        yield "loop", looped
    if blocked:
        yield "blocks", blocked
    for indices in bucketed.values():
        for bucket in _buckets(indices, [params[i].numel() for i in indices]):
            yield "bucket", bucket


def _buckets(indices: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    bucket: list[int] = []
    total = 0
    for index, size in zip(indices, sizes, strict=True):
        if bucket and total + size > BUCKET:
            yield bucket
            bucket, total = list[int](), 0
        bucket.append(index)
        total += size
    if bucket:
        yield bucket


def pick(indices: Sequence[int], items: Sequence[Item]) -> list[Item]:
    """The elements of `items` at `indices`."""
    return [items[i] for i in indices]


def blocks(*tensors: Tensor, rows: bool = False) -> Iterable[tuple[Tensor, ...]]:
    """Aligned views that together cover `tensors` (equal shapes) and fit into the cache.

    With `rows` a view never cuts the last axis. Tensors whose layouts differ, or have gaps, come back whole.
    """
    first = tensors[0]
    size = BLOCK * torch.get_num_threads()
    if first.numel() <= size:
        return (tensors,)
    if rows:
        if not all(tensor.is_contiguous() for tensor in tensors):
            return (tensors,)
        flat = [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
        size = max(1, size // first.shape[-1])
    else:
        if not all(tensor.is_contiguous() for tensor in tensors):
            # The order of axes in which a dense tensor is contiguous: channels_last and transposed ones become flat.
            order = sorted(range(first.ndim), key=first.stride, reverse=True)
            tensors = tuple(tensor.permute(order) for tensor in tensors)
            if not all(tensor.is_contiguous() for tensor in tensors):
                return (tensors,)
        flat = [tensor.view(-1) for tensor in tensors]
    return zip(*(tensor.split(size) for tensor in flat), strict=True)


def scratch(memory: dict[torch.dtype, Tensor], block: Tensor) -> Tensor:
    """A tensor to write to in the shape of `block`: where it fits a view of one that stays in the cache."""
    if block.dtype not in memory:
        memory[block.dtype] = torch.empty(BLOCK * torch.get_num_threads(), dtype=block.dtype, device=block.device)
    if not block.is_contiguous() or block.numel() > memory[block.dtype].numel():
        return torch.empty_like(block)
    return memory[block.dtype][: block.numel()].view(block.shape)


def decayed_add_(theta: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    r"""$\theta \leftarrow \theta - \eta (u + \lambda\theta)$ on the CPU; may overwrite `update`."""
    if weight_decay == 0:
        theta.add_(update, alpha=-lr)
    elif theta.is_contiguous() and update.is_contiguous() and theta.is_floating_point():
        # SGD without momentum is this formula, and PyTorch has a kernel for it.
        torch._fused_sgd_(
            [theta],
            [update],
            [],
            weight_decay=weight_decay,
            momentum=0.0,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
    else:
        theta.add_(update.add_(theta, alpha=weight_decay), alpha=-lr)


def write_back(target: Tensor, value: Tensor) -> None:
    """Round `value` into `target` unless the arithmetic was done in place."""
    if value is not target:
        target.copy_(value)
