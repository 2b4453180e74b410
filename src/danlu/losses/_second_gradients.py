"""What gradient penalties share: gradients that can be differentiated again, and gradients at a shifted point."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from danlu._common.checks import is_low_precision

__all__ = [
    "PreparedGradients",
    "Replay",
    "ShiftedParameters",
    "check_finite_difference",
    "check_not_sharded",
    "differentiable_gradients",
    "full_precision",
    "global_norm",
    "gradients_of_mean",
    "graph_leaves",
    "is_sharded",
]

_SDPA = (
    "attention kernels without a second derivative: compute the loss under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use method='finite_difference'"
)
# Node names in the graph of the loss or of its gradient, and what to do about them.
_OBSTACLES = {
    "CompiledFunctionBackward": (
        "torch.compile gives a model without a second derivative: penalize the uncompiled model, "
        "or use method='finite_difference'"
    ),
    "RegisterPostBackwardFunctionBackward": (
        "fully_shard does not support a second derivative: use method='finite_difference'"
    ),
    "torch::autograd::NotImplemented": (
        "an operation of the model has no second derivative: replace it, or use method='finite_difference'"
    ),
}


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor (of FSDP2 or tensor parallelism); torch.distributed is not imported for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_not_sharded(params: Sequence[Tensor]) -> None:
    """Raise `ValueError` if a parameter is sharded: a second derivative would give wrong gradients or none."""
    for param in params:
        if is_sharded(param):
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a DTensor, and double backward does not support sharded "
                "parameters; use method='finite_difference'"
            )


def check_finite_difference(params: Sequence[Tensor]) -> None:
    """Raise `ValueError` if a parameter is too coarse for a small step."""
    for param in params:
        if is_low_precision(param.dtype):
            raise ValueError(
                f"method='finite_difference' needs float32 or float64 parameters, got {param.dtype}, "
                "which rounds a small step away; keep float32 parameters and use autocast"
            )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast to float16 off: unscaled gradients underflow in it and second derivatives overflow."""
    kind = device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        with torch.autocast(kind, enabled=False):
            yield
    else:
        yield


def _walk(roots: Sequence[Tensor]) -> tuple[set[str], dict[Tensor, int]]:
    """Names of all nodes behind `roots`, and how often each leaf is used there."""
    names: set[str] = set()
    leaves: dict[Tensor, int] = {}
    stack = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        names.add(node.name())
        for child, _ in node.next_functions:
            if child is None:
                continue
            if (leaf := getattr(child, "variable", None)) is not None:
                leaves[leaf] = leaves.get(leaf, 0) + 1
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return names, leaves


def graph_leaves(loss: Tensor) -> dict[Tensor, int]:
    """The leaves that `loss` depends on, with the number of uses of each."""
    return _walk([loss])[1]


def differentiable_gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the sum of `loss` that can be differentiated again; None where the loss does not depend.

    Raises:
        RuntimeError: the graph cannot be differentiated twice; the message says why and what to do.
    """
    if not loss.requires_grad:
        raise RuntimeError("the loss has no graph: compute it with gradients enabled from what is to be differentiated")
    _refuse(_walk([loss])[0])
    try:
        grads = torch.autograd.grad(loss.sum(), tensors, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "inplace operation" in str(error):
            raise RuntimeError(
                "an in-place operation changed a tensor that the gradient needs: make it out of place (inplace=False)"
            ) from error
        raise
    # A missing second derivative would only show up in the backward pass of the caller, without a word on penalties.
    _refuse(_walk([grad for grad in grads if grad is not None])[0])
    return list(grads)


def _refuse(names: set[str]) -> None:
    if "torch::autograd::NotImplemented" in names and any(name.startswith("ScaledDotProduct") for name in names):
        raise RuntimeError(_SDPA)
    for name, remedy in _OBSTACLES.items():
        if name in names:
            raise RuntimeError(remedy)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm over all tensors as one 0-d tensor, at least float32; sharded tensors are summed over their mesh."""
    norms = []
    for tensor in tensors:
        dtype = torch.float32 if is_low_precision(tensor.dtype) else None
        norm = torch.linalg.vector_norm(tensor, dtype=dtype)
        norms.append(norm.full_tensor() if is_sharded(norm) else norm)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))


class Replay:
    """A second pass like the first: the same random numbers, and buffers end as the first pass left them."""

    def __init__(self, model: nn.Module, params: Sequence[Tensor]) -> None:
        self._model = model
        self._devices: dict[str, set[int]] = {}
        for param in params:
            if param.device.type not in ("cpu", "meta"):
                self._devices.setdefault(param.device.type, set()).add(param.device.index or 0)
        self._cpu = torch.get_rng_state()
        self._states = {
            (kind, index): torch.get_device_module(kind).get_rng_state(index)
            for kind, indices in self._devices.items()
            for index in indices
        }
        self._versions = {key: (buffer, buffer._version) for key, buffer in self._buffers()}
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def _buffers(self) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                yield (module, name), buffer

    def first_pass_is_over(self) -> None:
        """Keep a copy of the buffers that the first pass changed, such as the statistics of BatchNorm."""
        for key, buffer in self._buffers():
            before, version = self._versions.get(key, (None, 0))
            # Batch normalization writes its statistics without counting a version.
            quiet = isinstance(key[0], nn.modules.batchnorm._NormBase)
            if quiet or buffer is not before or buffer._version != version:
                self._kept.append((*key, buffer, buffer.detach().clone()))

    @contextmanager
    def again(self) -> Iterator[None]:
        """One more pass; afterwards generators and buffers are as they were before it."""
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for kind, indices in self._devices.items():
                stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
            torch.set_rng_state(self._cpu)
            for (kind, index), state in self._states.items():
                torch.get_device_module(kind).set_rng_state(state, index)
            try:
                yield
            finally:
                for module, name, buffer, value in self._kept:
                    buffer.data.copy_(value)
                    setattr(module, name, buffer)


class ShiftedParameters:
    """Parameters moved along a direction for a while, and restored, bit for bit if `exact`.

    They are changed in place, since sharded and compiled models hold on to the memory of their parameters, and through
    `data`, since graphs that saved them find them unchanged in the end. Autocast remembers its casts of parameters by
    their identity, not their values, so that it must forget them after every change.
    """

    def __init__(self, params: Sequence[Tensor], *, exact: bool = True) -> None:
        self._params = params
        self._values = [param.detach().clone() for param in params] if exact else None

    def _add(self, direction: Sequence[Tensor], length: Tensor) -> None:
        for param, step in zip(self._params, direction, strict=True):
            if is_sharded(param):
                param.data.add_(step * length)
            else:
                param.data.addcmul_(step, length.to(param))
        torch.clear_autocast_cache()

    @contextmanager
    def moved(self, direction: Sequence[Tensor], length: Tensor) -> Iterator[None]:
        """Parameters plus `length * direction`."""
        try:
            self._add(direction, length)
            yield
        finally:
            if self._values is None:
                self._add(direction, -length)
            else:
                for param, value in zip(self._params, self._values, strict=True):
                    param.data.copy_(value)
                torch.clear_autocast_cache()


class PreparedGradients(torch.autograd.Function):
    """Two values whose gradients with respect to the parameters are known already."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(
        ctx: FunctionCtx,
        first: Tensor,
        second: Tensor,
        first_grads: Sequence[Tensor],
        second_grads: Sequence[Tensor],
        *params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Pass the values through and keep the gradients."""
        ctx.grads = (first_grads, second_grads)  # pyrefly: ignore[missing-attribute]
        return first.clone(), second.clone()

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: FunctionCtx, d_first: Tensor, d_second: Tensor) -> tuple[Tensor | None, ...]:
        """The chain rule."""
        if torch.is_grad_enabled():
            raise RuntimeError("method='finite_difference' has no second derivative (create_graph=True)")
        first_grads, second_grads = ctx.grads  # pyrefly: ignore[missing-attribute]
        pairs = zip(first_grads, second_grads, strict=True)
        grads = [a * d_first.to(a.dtype) + b * d_second.to(b.dtype) for a, b in pairs]
        return None, None, None, None, *grads


def gradients_of_mean(
    losses: Tensor, params: Sequence[Tensor], *, keep_graph: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Value of the mean of `losses` and its gradients; `grad` of the parameters is as before."""
    value = losses.mean()
    if not any(is_sharded(param) for param in params):
        return value.detach(), list(torch.autograd.grad(value, params, retain_graph=keep_graph, allow_unused=True))
    # A sharded model delivers its gradients into `grad` and nowhere else.
    kept = [param.grad for param in params]
    try:
        for param in params:
            param.grad = None
        value.backward(retain_graph=keep_graph)
        return value.detach(), [param.grad for param in params]
    finally:
        for param, grad in zip(params, kept, strict=True):
            param.grad = grad
