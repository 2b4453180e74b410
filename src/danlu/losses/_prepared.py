"""What chunked losses share: gradients computed in the forward call, refusals of transforms, and compilers."""

import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["Grads", "Prepared", "compiles", "outside", "refusal"]

Grads = tuple[Tensor | None, ...]


def refusal(message: str) -> Any:
    """A static method of an `autograd.Function` that raises `RuntimeError`: for what it does not support."""

    def refuse(*args: Any) -> Any:
        raise RuntimeError(message)

    return staticmethod(refuse)


def compiles() -> bool:
    """Whether a compiler is to take operators. Those of torch do not work within transforms of `torch.func`."""
    return torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def outside(function: Any, reason: str) -> Any:
    """A function that no compiler traces: its own derivative of chunks that are written in place would be wrong."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=reason)
    # It looks also into what is called where it gave up another function.
    return torch.compiler.disable(function, reason=reason) if "torch._dynamo" in sys.modules else function


class Prepared:
    """Gradients on their way from the forward to the first backward.

    They are neither outputs nor saved tensors, so that nothing else refers to the buffers when they are handed over,
    and `.grad` takes them without a copy.
    """

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs = needs
        self.grads: Grads | None = None

    def take(self, needs: tuple[bool, ...], upstream: Tensor) -> Grads | None:
        """Return the gradients once, times `upstream`, if they are all that is needed."""
        grads, self.grads = self.grads, None
        if grads is None or not all(have or not need for have, need in zip(self.needs, needs, strict=True)):
            return None
        # Looking at the number is free on the CPU only.
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        return grads
