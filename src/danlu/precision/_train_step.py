r"""One training step in a chosen precision: autocast, loss scaling, accumulation, clipping, skipping, compilation.

Source: "在bert4keras中使用混合精度和XLA加速训练" (2022-04-28); Micikevicius et al. (2017), "Mixed Precision Training",
arXiv 1710.03740.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from danlu._common.checks import check_choice, check_integer, check_real, is_low_precision
from danlu.precision._compile import Compiler, CompileReport, check_compile
from danlu.precision._modes import PRECISIONS, Precision, autocast_dtype, matmul_precision, resolve_precision

__all__ = ["StepRecord", "TrainStep"]

LossFunction = Callable[[Callable[..., Any], Any], Tensor]


@dataclass(frozen=True)
class StepRecord:
    r"""What one call of a [`TrainStep`][danlu.precision.TrainStep] did.

    Definition:
        `updated` = the cycle of `grad_accum` micro-batches ended and the optimizer stepped; `skipped` = it ended and
        the optimizer did not, because a gradient was not finite.

    Args:
        scale: factor of the loss in this call, 1 without scaling.
        updated: whether the parameters were updated.
        skipped: whether an update was left out.
        grad_norm: Euclidean norm of the unscaled gradients of the cycle before clipping, a 0-d tensor; None within a
            cycle.

    Numerics:
        The norm is float32 also for half gradients.

    Source:
        As in [`TrainStep`][danlu.precision.TrainStep].

    Example:
        >>> from danlu.precision import StepRecord
        >>> StepRecord(scale=1.0, updated=False, skipped=False, grad_norm=None).updated
        False
    """

    scale: float
    updated: bool
    skipped: bool
    grad_norm: Tensor | None


class TrainStep:
    r"""A training step: call it with a batch, and it does forward, backward and, at the end of a cycle, the update.

    Definition:
        With the loss $L$, micro-batches $b_1, \dots, b_k$ of a cycle, $k$ = `grad_accum`, the scale $s$ and the bound
        $c$ = `clip_norm`,
        $$G = \frac1s \sum_{i=1}^{k} \nabla_\theta \Big[\frac{s}{k} L(\theta, b_i)\Big], \qquad
        \theta \leftarrow \operatorname{optimizer}\!\Big(\theta,\; G \min\big(1, c / \lVert G \rVert\big)\Big)$$
        where $L$ runs under autocast for "bf16" and "fp16". If $\lVert G \rVert$ is not finite there is no update: the
        optimizer, the scheduler and the parameters stay as they are. With `loss_scale="dynamic"` $s$ is halved then,
        and doubled after 2000 updates without that.

    Args:
        model: parameters in float32 (they, and the optimizer's state, are never half here).
        loss_fn: `(model, batch) -> loss`, a scalar; the model that it is given may be the compiled one.
        optimizer: of the model's parameters.
        precision: "fp32": exact float32 products. "tf32": products of float32 may be rounded to TF32 (CUDA). "bf16",
            "fp16": autocast. "auto": "bf16" where the hardware multiplies it, else "fp16" on CUDA, else "fp32".
        loss_scale: "auto" is "dynamic" for "fp16" and None otherwise; "dynamic" a `torch.amp.GradScaler`; a number
            $s > 0$ a constant scale; None no scaling, which in float16 loses gradients below $3\cdot10^{-8}$.
        compile: False, True, a dictionary of options for `torch.compile`, or "auto": time both, and keep the compiled
            model if the calls that remain are at least the break-even count. If compilation fails, a warning says so
            and the model runs without. See `compile_report`.
        grad_accum: $k \ge 1$ calls per update, each of which counts $1/k$.
        clip_norm: $c > 0$, for the unscaled gradients; None does not clip.
        on_nonfinite: "skip" or "raise", which names the parameters; nothing is updated. A dynamic scale above 1 skips
            in either case, since that is how it finds its size.
        scheduler: stepped after every update, and only then; None if there is none, or it steps by epochs elsewhere.
        total_steps: calls that are planned, for `compile="auto"`.

    Returns:
        From a call: the loss of the micro-batch (detached, unscaled) and a [`StepRecord`][danlu.precision.StepRecord].
        After an update `p.grad` holds what the optimizer saw; the next cycle clears it.

    Raises:
        TypeError: an argument is not of its type, or the loss is not a floating scalar.
        ValueError: an option is out of its range, the model has no trainable parameters, `compile="auto"` without
            `total_steps`, or scaled losses with half parameters, whose gradients cannot be unscaled safely.
        RuntimeError: from a call with `on_nonfinite="raise"`; from `state_dict` within a cycle.

    Numerics:
        Backward, unscaling, the norm, clipping and the update run outside of autocast; the loss is at least float32
        before it is scaled. An outer autocast context has no effect in here. The settings of float32 products are
        restored on exit. Multiplying the loss by $s$ equals dividing Adam's `eps` by $s$ wherever nothing underflows,
        and changes nothing for sign optimizers.

    Cost:
        One wait for the device per update, for the question whether the norm is finite.

    Differences:
        `GradScaler` alone leaves it to the loop that the scheduler is not stepped on a skip.

    Source:
        "在bert4keras中使用混合精度和XLA加速训练" (2022-04-28); Micikevicius et al. (2017), arXiv 1710.03740.

    Example:
        >>> import torch
        >>> from danlu.precision import TrainStep
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = TrainStep(model, lambda model, x: model(x).square().mean(), optimizer, precision="bf16")
        >>> loss, record = step(torch.ones(4, 2))
        >>> record.updated, record.skipped, record.scale
        (True, False, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: Optimizer,
        *,
        precision: Precision = "fp32",
        loss_scale: Literal["auto", "dynamic"] | float | None = "auto",
        compile: bool | Literal["auto"] | Mapping[str, Any] = False,
        grad_accum: int = 1,
        clip_norm: float | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        scheduler: LRScheduler | None = None,
        total_steps: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a callable (model, batch) -> loss, got {type(loss_fn).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        check_choice("precision", precision, PRECISIONS)
        if isinstance(loss_scale, str):
            check_choice("loss_scale", loss_scale, ("auto", "dynamic"))
        elif loss_scale is not None:
            check_real("loss_scale", loss_scale, low=0.0, low_open=True)
        if total_steps is not None:
            check_integer("total_steps", total_steps, low=1)
        check_compile(compile, total_steps)
        self.grad_accum = check_integer("grad_accum", grad_accum, low=1)
        self.clip_norm = None if clip_norm is None else check_real("clip_norm", clip_norm, low=0.0, low_open=True)
        check_choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        if not trained:
            raise ValueError(f"model {type(model).__name__} has no trainable parameters")
        self.device = trained[0][1].device
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.precision = resolve_precision(precision, self.device)
        self.on_nonfinite = on_nonfinite
        self._loss_fn = loss_fn
        if loss_scale == "auto":
            loss_scale = "dynamic" if self.precision == "fp16" else None
        if loss_scale is not None:
            half = [name for name, param in trained if is_low_precision(param.dtype)]
            if half:
                listed = ", ".join(half[:5]) + (f" and {len(half) - 5} more" if len(half) > 5 else "")
                raise ValueError(f"parameters must be float32 where the loss is scaled, got half ones: {listed}")
        self._scaler = torch.amp.GradScaler(self.device.type) if loss_scale == "dynamic" else None
        self._scale = 1.0 if loss_scale is None else float(loss_scale) if self._scaler is None else 2.0**16
        self._micro = 0
        self._compiler = Compiler(model, compile, total_steps, self.device)

    @property
    def scale(self) -> float:
        """The factor that the next loss is multiplied by; 1 without scaling."""
        return self._scale

    @property
    def compile_report(self) -> CompileReport:
        """What compiling cost and gained so far, with the graph breaks and the decision."""
        return self._compiler.report

    def __call__(self, batch: Any) -> tuple[Tensor, StepRecord]:
        """Forward and backward on `batch`, and the update if this ends a cycle."""
        with self._environment():
            first = self._micro == 0
            if first:
                self._clear()
            try:
                loss = self._compiler(lambda model: self._backward(model, batch), self._clear, first)
                self._micro += 1
                if self._micro < self.grad_accum:
                    return loss, StepRecord(self._scale, updated=False, skipped=False, grad_norm=None)
                return loss, self._update()
            except BaseException:
                # Half a cycle is of no use; the next call starts a new one.
                self._micro = 0
                raise

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss scale; model, optimizer and scheduler have their own."""
        if self._micro:
            raise RuntimeError(
                f"state_dict within a cycle would lose {self._micro} of {self.grad_accum} micro-batches; save after an "
                "update"
            )
        return {"scale": self._scale, "scaler": None if self._scaler is None else self._scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, for a step with the same `loss_scale`."""
        scaler = state_dict["scaler"]
        if (scaler is None) != (self._scaler is None):
            raise ValueError("the saved state and this step must both have a dynamic loss scale, or neither")
        if self._scaler is not None:
            self._scaler.load_state_dict(scaler)
        self._scale = float(state_dict["scale"])
        self._micro = 0

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """What holds in the whole step: no autocast of the caller's, and the precision of float32 products."""
        with matmul_precision(self.precision), torch.autocast(self.device.type, enabled=False):
            yield

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, model: Callable[..., Any], batch: Any) -> Tensor:
        dtype = autocast_dtype(self.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            loss = self._loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            found = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return a floating scalar tensor, got {found}")
        # 2^16 times any half loss is infinite.
        return loss.float() if is_low_precision(loss.dtype) else loss

    def _backward(self, model: Callable[..., Any], batch: Any) -> Tensor:
        loss = self._loss(model, batch)
        # The scaler makes its scale with the first loss that it sees.
        factor = self._scaler.scale(loss.new_ones(())) if self._scaler is not None else self._scale
        (loss * factor / self.grad_accum).backward()
        return loss.detach()

    def _update(self) -> StepRecord:
        self._micro = 0
        scale = self._scale
        grads = self._unscaled_gradients()
        try:
            norm, finite = self._advance(grads, scale)
        except BaseException:
            if self._scaler is not None:
                # It must forget that it has unscaled these gradients; the scale stays.
                self._scaler.update(scale)
            raise
        if self._scaler is not None:
            self._scaler.update()
            self._scale = self._scaler.get_scale()
        return StepRecord(scale, updated=finite, skipped=not finite, grad_norm=norm)

    def _advance(self, grads: list[Tensor], scale: float) -> tuple[Tensor, bool]:
        """The norm of the unscaled gradients, and whether it is finite and the update was made."""
        values = [_values(grad) for grad in grads]
        norm = torch.nn.utils.get_total_norm([g.float() if is_low_precision(g.dtype) else g for g in values])
        finite = bool(torch.isfinite(norm))
        if not finite and self.on_nonfinite == "raise" and (self._scaler is None or scale <= 1):
            raise RuntimeError(self._complaint())
        if finite:
            if self.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._params(), self.clip_norm, norm)
            if self._scaler is not None:
                self._scaler.step(self.optimizer)
            else:
                self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            # Under an outer autocast context the casts of the old weights would live on.
            torch.clear_autocast_cache()
        return norm, finite

    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"] if param.grad is not None]

    def _unscaled_gradients(self) -> list[Tensor]:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        for param in self._params():
            if param.grad is not None and param.grad.is_sparse:
                # Before anything is summed up: a row may occur several times.
                param.grad = param.grad.coalesce()
        grads = [param.grad for param in self._params() if param.grad is not None]
        if self._scaler is None and self._scale != 1.0:
            for grad in grads:
                grad.mul_(1.0 / self._scale)
        return grads

    def _complaint(self) -> str:
        bad = [
            name
            for name, param in self.model.named_parameters()
            if param.grad is not None and not bool(torch.isfinite(_values(param.grad)).all())
        ]
        shown = ", ".join(bad[:10]) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        return (
            f"the gradient is not finite, nothing was updated (on_nonfinite='raise', precision={self.precision!r}, "
            f"scale {self._scale:g}); parameters: {shown or 'none, only their norm'}"
        )


def _values(grad: Tensor) -> Tensor:
    """The numbers of a gradient; those that a sparse one holds."""
    return grad.coalesce().values() if grad.is_sparse else grad
