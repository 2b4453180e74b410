"""The ways in which a step of Lion walks over its tensors; the first, `single_tensor`, is the oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor

from danlu.kernels.sign_update import LowPrecision, SignUpdate
from danlu.optim._nonfinite import all_finite, finite_flags, is_finite
from danlu.optim._rounding import Rounding, Writer, read, resolve_rounding, write
from danlu.optim._traversal import compute_dtype, decayed_add_, rounded_blocks, scratch, write_back

__all__ = ["blocked", "compiled", "multi_tensor", "single_tensor"]


def single_tensor(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    writers: list[Writer | None],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
) -> None:
    """The definition with plain operations, without reading a value back: the oracle of the other paths."""
    for i, param in enumerate(params):
        dtype = compute_dtype(param.dtype)
        theta, grad, exp_avg = read(param, writers[i]), grads[i].to(dtype), exp_avgs[i].to(dtype)
        finite = all_finite(grad) if guard else None
        if finite is not None:
            # lerp(m, m, w) is m, bit for bit.
            grad = torch.where(finite, grad, exp_avg)
            if counts is not None:
                counts[i].add_(~finite)
        update = torch.lerp(exp_avg, grad, 1 - betas[0]).sgn_()
        if weight_decay != 0:
            update.add_(theta, alpha=weight_decay)
        if finite is not None:
            update = torch.where(finite, update, torch.zeros_like(update))
        write(param, theta.add_(update, alpha=-lr), writers[i])
        write_back(exp_avgs[i], exp_avg.lerp_(grad, 1 - betas[1]))


def blocked(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    writers: list[Writer | None],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
) -> None:
    """On the CPU: all passes over a block but the first find it in the cache."""
    memory: dict[torch.dtype, Tensor] = {}
    for i, param in enumerate(params):
        if guard and not is_finite(grads[i]):
            if counts is not None:
                counts[i].add_(1)
            continue
        dtype = compute_dtype(param.dtype)
        for (param_block, grad_block, exp_avg_block), writer in rounded_blocks(
            (param, grads[i], exp_avgs[i]), writers[i]
        ):
            theta, grad, exp_avg = read(param_block, writer), grad_block.to(dtype), exp_avg_block.to(dtype)
            update = torch.lerp(exp_avg, grad, 1 - betas[0], out=scratch(memory, theta)).sgn_()
            write_back(exp_avg_block, exp_avg.lerp_(grad, 1 - betas[1]))
            decayed_add_(theta, update, lr, weight_decay)
            write(param_block, theta, writer)


def multi_tensor(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    writers: list[Writer | None],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
) -> None:
    """On accelerators: one bucket of tensors of one dtype; which gradients are finite stays on the device."""
    dtype = compute_dtype(params[0].dtype)
    thetas = [read(param, writer) for param, writer in zip(params, writers, strict=True)]
    gradients, momenta = ([tensor.to(dtype) for tensor in tensors] for tensors in (grads, exp_avgs))
    finite = finite_flags(gradients) if guard else None
    if finite is not None:
        gradients = [torch.where(f, g, m) for f, g, m in zip(finite, gradients, momenta, strict=True)]
        if counts is not None:
            torch._foreach_add_(counts, list((~finite).to(torch.int64).unbind()))
    updates = torch._foreach_lerp(momenta, gradients, 1 - betas[0])
    torch._foreach_sign_(updates)
    if weight_decay != 0:
        torch._foreach_add_(updates, thetas, alpha=weight_decay)
    if finite is not None:
        torch._foreach_mul_(updates, list(finite.to(dtype).unbind()))
    torch._foreach_add_(thetas, updates, alpha=-lr)
    torch._foreach_lerp_(momenta, gradients, 1 - betas[1])
    for param, theta, writer in zip(params, thetas, writers, strict=True):
        write(param, theta, writer)
    if momenta[0] is not exp_avgs[0]:
        torch._foreach_copy_(exp_avgs, momenta)


def compiled(
    call: SignUpdate,
    counts: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
    maximize: bool,
    rounding: Rounding,
) -> None:
    """The compiled step."""
    call.lion(
        lr=-lr if maximize else lr,
        betas=betas,
        weight_decay=-weight_decay if maximize else weight_decay,
        guard=guard,
        low=LowPrecision(resolve_rounding(rounding.mode, call.params[0].dtype), rounding.seed, rounding.step),
        counts=counts,
    )
