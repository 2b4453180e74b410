"""How a step walks over tensors: by a compiled kernel, one by one, in cache-sized blocks, or in foreach calls."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from danlu import kernels
from danlu._common.checks import is_low_precision
from danlu.kernels.sign_update import SignUpdate
from danlu.optim._rounding import Rounding, Writer, resolve_rounding

__all__ = [
    "blocks",
    "compute_dtype",
    "decayed_add_",
    "is_plain",
    "kernel_test",
    "pick",
    "plan",
    "prepare_call",
    "rounded_blocks",
    "scratch",
    "write_back",
]

Path = Literal["fused", "loop", "blocks", "bucket"]
Item = TypeVar("Item")

# Elements per thread: four float32 streams of this size stay in the cache of one core while few enough calls are
# made. Measured on one core: 64k elements cost 10 % more, 32k 25 %; tensors beyond the cache, taken whole, 100 %.
BLOCK = 2**18
# Elements per bucket: bounds what the temporaries of a step on an accelerator can take (64 MiB each in float32).
BUCKET = 2**24


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for tensors of `dtype`: float32 for float16 and bfloat16."""
    return torch.float32 if is_low_precision(dtype) else dtype


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary tensors, and not subclasses such as DTensor."""
    return all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def kernel_test(
    name: kernels.Kernel,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    states: Sequence[Tensor],
    *,
    fused: bool | None,
    foreach: bool | None,
    supported: Callable[[torch.dtype, torch.dtype], bool],
) -> Callable[[int], bool] | None:
    """What tells by its index whether the kernel `name` takes a tensor; None if no kernel is wanted.

    With `fused=None` it is wanted unless `foreach` is given, and where it cannot run, that is said once per process.

    Raises:
        RuntimeError: `fused` is True, and the kernel cannot run on one of the tensors.
    """
    if fused is False or (fused is None and foreach is not None):
        return None
    reasons: dict[tuple[torch.device, torch.dtype], str | None] = {}

    def why_not(i: int) -> str | None:
        param, grad, state = params[i], grads[i], states[i]
        if not is_plain(param, grad, state):
            return f"{type(param).__name__} is not an ordinary tensor"
        key = (param.device, param.dtype)
        if key not in reasons:
            reasons[key] = kernels.explain(name, param)
            if reasons[key] is not None and fused is None and param.device.type == "cpu" and not param.is_complex():
                _say_once(name, str(reasons[key]))
        if reasons[key] is not None:
            return reasons[key]
        if not supported(param.dtype, state.dtype) or (grad is not None and grad.dtype != param.dtype):
            return f"dtypes {param.dtype} with state {state.dtype} are not supported"
        if state.stride() != param.stride() or (grad is not None and grad.stride() != param.stride()):
            return "parameter, gradient and state have different strides"
        if state.shape != param.shape or (grad is not None and grad.shape != param.shape):
            return "parameter, gradient and state have different shapes"
        if param.is_neg() or state.is_neg() or (grad is not None and grad.is_neg()):
            return "a tensor is negated lazily"
        return None if _is_dense(param) else f"a parameter of strides {param.stride()} has gaps"

    def takes(i: int) -> bool:
        reason = why_not(i)
        if reason is not None and fused:
            raise RuntimeError(
                f"fused=True, but the kernel cannot run on a tensor of shape {tuple(params[i].shape)}: {reason}"
            )
        return reason is None

    return takes


_SAID: set[str] = set()


def _say_once(name: str, reason: str) -> None:
    if reason not in _SAID:
        _SAID.add(reason)
        warnings.warn(
            f"the compiled step {name!r} is not available, a slower one is used (fused=False silences this): {reason}",
            stacklevel=2,
        )


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def plan(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    foreach: bool | None,
    kernel: Callable[[int], bool] | None = None,
) -> Iterator[tuple[Path, list[int]]]:
    """Yield how to process which tensors; empty tensors are left out.

    `kernel` tells which tensors a compiled kernel takes, one call for each device and dtype. Subclasses (DTensor)
    always take the loop, whose operations are all plain: neither flat views nor lists that mix them with ordinary
    tensors are valid for them.
    """
    fused: defaultdict[object, list[int]] = defaultdict(list[int])
    looped: list[int] = []
    blocked: list[int] = []
    bucketed: defaultdict[object, list[int]] = defaultdict(list[int])
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if param.numel() == 0:
            continue
        if kernel is not None and kernel(i):
            fused[param.device, param.dtype].append(i)
        elif foreach is False or not is_plain(param, grad):
            looped.append(i)
        elif param.device.type == "cpu":
            blocked.append(i)
        elif param.is_complex():
            looped.append(i)
        else:
            bucketed[param.device, param.dtype, None if grad is None else grad.dtype].append(i)
    for indices in fused.values():
        yield "fused", indices
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


def rounded_blocks(
    tensors: tuple[Tensor, ...], writer: Writer | None, rows: bool = False
) -> Iterator[tuple[tuple[Tensor, ...], Writer | None]]:
    """`blocks` of tensors, the first of which is a parameter, each with the writer of its part of it."""
    if writer is None:
        for block in blocks(*tensors, rows=rows):
            yield block, None
        return
    compensation = writer.compensation
    start = 0
    for block in blocks(*tensors, *(() if compensation is None else (compensation,)), rows=rows):
        part = block[: len(tensors)]
        yield part, writer.view(None if compensation is None else block[-1], start)
        start += part[0].numel()


def prepare_call(
    lists: tuple[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor]], rounding: Rounding, **columns: Any
) -> SignUpdate:
    """A compiled call on these parameters, gradients and momenta, which are of one device and dtype."""
    params, grads, exp_avgs = lists
    mode = resolve_rounding(rounding.mode, params[0].dtype)
    everything = range(len(params))
    call = SignUpdate(
        params,
        exp_avgs,
        compensations=[rounding.compensation(i) for i in everything] if mode == "kahan" else (),
        numbers=[rounding.number(i) for i in everything] if mode == "stochastic" else (),
        **columns,
    )
    if not call.take(grads):
        raise AssertionError("the kernel's test and its call disagree about the layout of a gradient")
    return call


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
    elif theta.is_contiguous() and update.is_contiguous() and theta.is_floating_point() and not theta.is_neg():
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
