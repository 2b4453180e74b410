"""What chunked losses share: gradients computed in the forward call, and refusals of transforms."""

from typing import Any

from torch import Tensor

__all__ = ["Grads", "Prepared", "refusal"]

Grads = tuple[Tensor | None, ...]


def refusal(message: str) -> Any:
    """A static method of an `autograd.Function` that raises `RuntimeError`: for what it does not support."""

    def refuse(*args: Any) -> Any:
        raise RuntimeError(message)

    return staticmethod(refuse)


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
