"""The ways in which one micro-step of Tiger walks over its tensors; the first, `single_tensor`, is the oracle."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.kernels.sign_update import LowPrecision, SignUpdate
from danlu.optim._nonfinite import all_finite, finite_flags, is_finite
from danlu.optim._options import as_float
from danlu.optim._param_groups import DECAYED, Kind
from danlu.optim._rounding import (
    Rounding,
    Writer,
    element_index,
    hashed_normal,
    local_part,
    read,
    resolve_rounding,
    rounding_key,
    write,
)
from danlu.optim._traversal import compute_dtype, decayed_add_, pick, rounded_blocks, scratch, write_back

__all__ = ["TigerStep", "blocked", "columns", "compiled", "multi_tensor", "root_mean_square", "single_tensor"]

# Tells the noise of a shrunk tensor from the noise of its rounding.
_NOISE_SEED = 0x5EED


@dataclass(frozen=True, kw_only=True)
class TigerStep:
    """The numbers of one micro-step for a list of tensors; those that differ by tensor are lists."""

    kinds: Sequence[Kind]
    decays: Sequence[float]
    gain: float
    lr: float | Tensor
    weight_decay: float
    update: bool
    shrink: float
    shrink_noise: float
    center: float
    guard: bool
    rms_floor: float
    vector_scale: float
    decay_vectors: bool
    sign_power: float
    normalize_power: bool
    rounding: Rounding

    @property
    def rate(self) -> float:
        """The learning rate as a number."""
        return as_float(self.lr)

    def pick(self, indices: Sequence[int]) -> dict[str, Any]:
        """What differs by tensor, for the tensors at `indices`."""
        return {
            "kinds": pick(indices, self.kinds),
            "decays": pick(indices, self.decays),
            "rounding": self.rounding.pick(indices),
        }

    def is_row_wise(self, i: int, param: Tensor) -> bool:
        """Whether the step of some rows of `param`, tensor `i`, is what its step does to those rows."""
        one_scale = self.kinds[i] == "matrix" or (self.kinds[i] == "embedding" and param.ndim < 2)
        return not one_scale and not (self.normalize_power and self.sign_power != 1.0)

    def decay_of(self, kind: Kind) -> float:
        """Weight decay of a tensor of this kind."""
        return self.weight_decay if kind in DECAYED or self.decay_vectors else 0.0

    def scale_of(self, theta: Tensor, kind: Kind) -> Tensor | float:
        """The step's scale: a number, a 0-d tensor, or one per row."""
        if kind not in DECAYED:
            return self.vector_scale
        return root_mean_square(theta, kind).clamp(min=self.rms_floor)

    def folded(self, i: int, exp_avg: Tensor, grad: Tensor) -> Tensor:
        """The momentum of tensor `i` with its gradient."""
        if self.decays[i] + self.gain == 1.0:
            return torch.lerp(exp_avg, grad, self.gain)
        return exp_avg * self.decays[i] + grad * self.gain

    def direction(self, exp_avg: Tensor) -> Tensor:
        """The sign of the momentum, or its power."""
        sign = exp_avg.sign()
        if self.sign_power == 1.0:
            return sign
        power = sign.mul_(exp_avg.abs().pow_(1 - self.sign_power))
        if not self.normalize_power:
            return power
        rms = torch.linalg.vector_norm(power) / max(1, power.numel()) ** 0.5
        # A momentum of zeros stays a direction of zeros.
        return torch.where(rms > 0, power / rms, power)

    def shrunk(self, i: int, theta: Tensor) -> Tensor:
        """Tensor `i` after a gradient that is not finite."""
        if self.shrink == 1.0:
            return theta
        moved = self.center + (theta - self.center) * self.shrink
        if self.shrink_noise == 0:
            return moved
        rms = torch.linalg.vector_norm(theta) / max(1, theta.numel()) ** 0.5
        key = rounding_key(self.rounding.seed ^ _NOISE_SEED, self.rounding.number(i), self.rounding.step)
        return moved + _noise(theta, key) * (self.shrink_noise * rms)


def _noise(theta: Tensor, key: tuple[int, int | Tensor]) -> Tensor:
    """Standard normal noise in the shape of `theta`, the same for every sharding by rows."""
    local, _, start, key = local_part(theta, theta, key)
    noise = hashed_normal(key, element_index(local, start), local.dtype)
    if local is theta:
        return noise
    from torch.distributed.tensor import DTensor

    like = theta  # a DTensor
    return DTensor.from_local(
        noise,
        like.device_mesh,  # pyrefly: ignore[missing-attribute]
        like.placements,  # pyrefly: ignore[missing-attribute]
        shape=like.shape,
        stride=like.stride(),
    )


def root_mean_square(theta: Tensor, kind: Kind) -> Tensor:
    """Of the tensor, or of each row (with a last axis of 1) for an embedding."""
    if kind == "embedding" and theta.ndim > 0:
        return torch.linalg.vector_norm(theta, dim=-1, keepdim=True) / max(1, theta.shape[-1]) ** 0.5
    return torch.linalg.vector_norm(theta) / max(1, theta.numel()) ** 0.5


def single_tensor(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    step: TigerStep,
) -> None:
    """The definition with plain operations, without reading a value back: the oracle of the other paths."""
    for i, param in enumerate(params):
        dtype, writer = compute_dtype(param.dtype), step.rounding.of(i, param.dtype)
        theta, exp_avg, kind = read(param, writer), exp_avgs[i].to(dtype), step.kinds[i]
        grad = grads[i]
        finite = None
        if grad is not None:
            grad = grad.to(dtype)
            momentum = step.folded(i, exp_avg, grad)
            if step.guard:
                finite = all_finite(grad)
                momentum = torch.where(finite, momentum, exp_avg)
                if counts is not None:
                    counts[i].add_(~finite)
            exp_avgs[i].copy_(momentum)
            exp_avg = momentum
        moved = theta
        if step.update:
            direction = step.direction(exp_avg) + step.decay_of(kind) * theta
            moved = theta - step.rate * step.scale_of(theta, kind) * direction
        if finite is not None:
            moved = torch.where(finite, moved, step.shrunk(i, theta))
        if moved is not theta:
            _write(param, moved, writer)


def _write(param: Tensor, value: Tensor, writer: Writer | None) -> None:
    if writer is None:
        param.copy_(value)
    else:
        write(param, value, writer)


def blocked(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    step: TigerStep,
) -> None:
    """On the CPU: all passes over a block but the first find it in the cache."""
    memory: dict[torch.dtype, Tensor] = {}
    for i, param in enumerate(params):
        dtype, kind, grad = compute_dtype(param.dtype), step.kinds[i], grads[i]
        if grad is not None and step.guard and not is_finite(grad):
            shrink_bad(params, [i], counts, step)
            continue
        if grad is None and not step.update:
            continue
        writer = step.rounding.of(i, param.dtype)
        scale: Tensor | float = 0.0
        by_row = kind == "embedding" and param.ndim > 0
        if step.update and not by_row:
            scale = step.scale_of(read(param, writer), kind)
            scale = scale if isinstance(scale, float) else float(scale.item())
        sources = (param, exp_avgs[i]) if grad is None else (param, exp_avgs[i], grad)
        for block, part in rounded_blocks(sources, writer, rows=by_row):
            exp_avg = block[1].to(dtype)
            if grad is not None:
                folding = block[2].to(dtype)
                if step.decays[i] + step.gain == 1.0:
                    exp_avg.lerp_(folding, step.gain)
                elif step.decays[i] == 1.0:
                    exp_avg.add_(folding, alpha=step.gain)
                else:
                    exp_avg.mul_(step.decays[i]).add_(folding, alpha=step.gain)
                write_back(block[1], exp_avg)
            if not step.update:
                continue
            theta = read(block[0], part)
            direction = torch.sign(exp_avg, out=scratch(memory, theta))
            if by_row:
                rows = step.scale_of(theta, kind)
                direction.add_(theta, alpha=step.decay_of(kind))
                theta.sub_(direction.mul_(rows).mul_(step.rate))
            else:
                decayed_add_(theta, direction, step.rate * float(scale), step.decay_of(kind))
            write(block[0], theta, part)


def shrink_bad(params: Sequence[Tensor], bad: Sequence[int], counts: Sequence[Tensor] | None, step: TigerStep) -> None:
    """Count and shrink the tensors at the indices `bad`, whose gradients are not finite."""
    for i in bad:
        if counts is not None:
            counts[i].add_(1)
        if step.shrink != 1.0:
            writer = step.rounding.of(i, params[i].dtype)
            _write(params[i], step.shrunk(i, read(params[i], writer)), writer)


def multi_tensor(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    step: TigerStep,
) -> None:
    """On accelerators: one bucket of tensors of one dtype; which gradients are finite stays on the device."""
    dtype = compute_dtype(params[0].dtype)
    writers = [step.rounding.of(i, param.dtype) for i, param in enumerate(params)]
    thetas = [read(param, writer) for param, writer in zip(params, writers, strict=True)]
    momenta = [tensor.to(dtype) for tensor in exp_avgs]
    # A bucket holds tensors with gradients or tensors without, never both.
    gradients = [grad.to(dtype) for grad in grads if grad is not None]
    finite = finite_flags(gradients) if gradients and step.guard else None
    if gradients:
        decays: Iterable[Any] = step.decays
        if finite is not None:
            gradients = [torch.where(f, g, torch.zeros_like(g)) for f, g in zip(finite, gradients, strict=True)]
            if counts is not None:
                torch._foreach_add_(counts, list((~finite).to(torch.int64).unbind()))
            factors = torch.tensor(step.decays, dtype=dtype).to(finite.device)
            decays = torch.where(finite, factors, torch.ones_like(factors)).unbind()
        for momentum, decay in zip(momenta, decays, strict=True):
            momentum.mul_(decay)
        torch._foreach_add_(momenta, gradients, alpha=step.gain)
        if momenta[0] is not exp_avgs[0]:
            torch._foreach_copy_(exp_avgs, momenta)
    moved = thetas
    if step.update:
        directions = [step.direction(momentum) for momentum in momenta]
        for i, direction in enumerate(directions):
            kind = step.kinds[i]
            direction.add_(thetas[i], alpha=step.decay_of(kind)).mul_(step.scale_of(thetas[i], kind))
        moved = list(torch._foreach_add(thetas, directions, alpha=-step.rate))
    if finite is not None and (step.update or step.shrink != 1.0):
        pairs = zip(finite, moved, thetas, strict=True)
        moved = [torch.where(f, m, step.shrunk(i, t)) for i, (f, m, t) in enumerate(pairs)]
    if moved is not thetas:
        for param, value, writer in zip(params, moved, writers, strict=True):
            _write(param, value, writer)


def columns(params: Sequence[Tensor], kinds: Sequence[Kind]) -> dict[str, Any]:
    """What the compiled call must know of every tensor: the length of its rows, and whether its scale is an RMS."""
    rows = [p.shape[-1] if kind == "embedding" and p.ndim > 0 else 0 for p, kind in zip(params, kinds, strict=True)]
    return {"rows": rows, "decayed": [kind in DECAYED for kind in kinds]}


def compiled(call: SignUpdate, counts: Sequence[Tensor] | None, step: TigerStep) -> None:
    """The compiled micro-step."""
    bad = call.tiger(
        decays=step.decays,
        gain=step.gain,
        lr=step.lr,
        weight_decay=step.weight_decay,
        vector_scale=step.vector_scale,
        rms_floor=step.rms_floor,
        shrink=step.shrink,
        center=step.center,
        update=step.update,
        decay_vectors=step.decay_vectors,
        guard=step.guard,
        low=LowPrecision(
            resolve_rounding(step.rounding.mode, call.params[0].dtype), step.rounding.seed, step.rounding.step
        ),
        counts=counts,
    )
    shrink_bad(call.params, bad, None, step)
