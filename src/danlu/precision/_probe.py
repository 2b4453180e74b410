"""What one batch shows about a precision: the gradients that autocast leaves, activations, and memory."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["MemoryPeak", "largest_activations", "parameter_gradients", "unchanged", "underflow"]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give the model its buffers and the generators their states back afterwards: a look must not change a run."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"]
    with torch.random.fork_rng(list({device.index or 0 for device in devices})):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def parameter_gradients(model: nn.Module, loss: Callable[[], Tensor], scale: float) -> dict[str, Tensor]:
    """Gradients of `scale * loss()` by parameter name, as they arrive; `p.grad` is not touched."""
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(loss() * scale, params, allow_unused=True)
    return {name: grad.detach() for name, grad in zip(names, grads, strict=True) if grad is not None}


def underflow(exact: Mapping[str, Tensor], scaled: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    r"""Fraction of each gradient that is zero or subnormal in a mode although it is an ordinary number in float32.

    Args:
        exact: gradients of the float32 mode.
        scaled: gradients of the mode, still multiplied by the scale.
        dtype: in which the mode multiplies. An element counts as subnormal in it if the whole tensor consists of
            numbers of `dtype`: only then has it been one of them.
    """
    found: dict[str, float] = {}
    for name, reference in exact.items():
        if name not in scaled or reference.numel() == 0:
            continue
        ordinary = reference.abs() >= torch.finfo(reference.dtype).tiny
        gradient = scaled[name]
        lost = gradient == 0
        if dtype != gradient.dtype and bool((gradient.to(dtype).to(gradient.dtype) == gradient).all()):
            lost |= gradient.abs() < torch.finfo(dtype).tiny
        found[name] = float((lost & ordinary).sum() / reference.numel())
    return found


@contextmanager
def largest_activations(model: nn.Module) -> Iterator[dict[str, float]]:
    """Within the context, the largest finite or infinite magnitude in the output of every module, by its path."""
    found: dict[str, float] = {}
    handles: list[Any] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in tree_iter(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                    largest = float(tensor.detach().abs().max())
                    # NaN compares false, and must win.
                    if not largest <= found.get(path, 0.0):
                        found[path] = largest

        return hook

    for path, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(path or "(model)")))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class MemoryPeak(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once in the context, beyond those that lived before it.

    It sees what operations return, not what a kernel takes for itself while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages that it made."""
        given = {self._key(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            # A view, or the result of an operation in place, has the storage of an argument.
            if isinstance(tensor, Tensor) and self._key(tensor) not in given:
                self._count(tensor.untyped_storage())
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            if self._known.pop(key, None) is not None:
                self._now -= size

        self._known[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)
