"""Class targets: checks, ignored rows, and the negative log-likelihood of every row."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from danlu._common.checks import check_floating, check_same_device, is_low_precision

__all__ = ["check_range", "check_row_values", "check_targets", "negative_log_likelihood", "scores_of_kept_rows"]


def check_targets(name: str, input: Tensor, target: Tensor) -> None:
    """Raise unless `target` holds one int64 class for every row of `input`, whose last axis is not a batch axis."""
    check_floating(name, input)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got dtype {target.dtype}")
    if input.ndim < 1 or target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have the shape of {name} without its last axis, got {name} {tuple(input.shape)} "
            f"and target {tuple(target.shape)}"
        )
    check_same_device(**{name: input, "target": target})


def check_row_values(name: str, values: Tensor, target: Tensor) -> None:
    """Raise unless `values` is a floating constant for every row."""
    check_floating(name, values)
    if values.shape != target.shape:
        raise ValueError(f"{name} must have the shape of target {tuple(target.shape)}, got {tuple(values.shape)}")
    check_same_device(**{name: values, "target": target})
    if values.requires_grad:
        raise ValueError(f"{name} is not differentiated, but it requires a gradient; detach it")


def check_range(target: Tensor, num_classes: int, ignore_index: int, *, check: bool = False) -> Tensor:
    """Return which rows are kept; on the CPU raise `ValueError` if a kept target is not a class.

    On an accelerator that waits for the device and is done with `check` only; under `torch.compile` and `vmap` there
    are no values.
    """
    keep = target != ignore_index
    if num_classes < 1:
        raise ValueError(f"there must be at least one class, got {num_classes}")
    if (check or target.device.type == "cpu") and not torch.compiler.is_compiling():
        wrong = keep & ((target < 0) | (target >= num_classes))
        if _any(wrong):
            first = int(target[wrong][0])
            raise ValueError(f"target must be in [0, {num_classes}) or ignore_index={ignore_index}, got {first}")
    return keep


def _any(mask: Tensor) -> bool:
    try:
        return bool(mask.any())
    except RuntimeError:
        # The only way to learn of vmap without private names; indexing itself still refuses a wrong class.
        return False


class _KeepRows(torch.autograd.Function):
    """The identity, whose gradient is exactly 0 in rows that are not kept, even where they hold NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, keep: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return input.view_as(input)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors  # pyrefly: ignore[missing-attribute]
        return grad_outputs[0].masked_fill(~keep[..., None], 0.0), None

    @staticmethod
    def jvp(ctx: FunctionCtx, *grad_inputs: Tensor) -> Tensor:
        (keep,) = ctx.saved_tensors  # pyrefly: ignore[missing-attribute]
        return grad_inputs[0].masked_fill(~keep[..., None], 0.0)


def scores_of_kept_rows(input: Tensor, keep: Tensor) -> Tensor:
    """Logits, in float32 if they are half; rows that are not kept get a gradient of exactly 0."""
    scores = input.float() if is_low_precision(input.dtype) else input
    if torch.compiler.is_compiling():
        # A compiler does not trace functions with a forward-mode derivative, and makes no copy of this.
        return torch.where(keep[..., None], scores, scores.detach())
    return _KeepRows.apply(scores, keep)


def negative_log_likelihood(
    input: Tensor, target: Tensor, keep: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor | None]:
    r"""$-\log p_t$ of every row, and $-\tfrac1V\sum_v \log p_v$ if there is label smoothing; 0 in ignored rows.

    Half inputs are computed in float32.
    """
    scores = scores_of_kept_rows(input, keep)
    # Autocast would leave this in float32 as well; the classes are the last axis here.
    rows, classes = scores.reshape(-1, scores.shape[-1]), target.masked_fill(~keep, 0).flatten()
    if not label_smoothing:
        nll = F.cross_entropy(rows, classes, reduction="none")
        return nll.view(target.shape).masked_fill(~keep, 0.0), None
    log_p = rows.log_softmax(-1)
    nll = -log_p.gather(-1, classes[:, None])[:, 0]
    uniform = -log_p.mean(-1)
    return nll.view(target.shape).masked_fill(~keep, 0.0), uniform.view(target.shape).masked_fill(~keep, 0.0)
