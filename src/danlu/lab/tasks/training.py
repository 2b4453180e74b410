"""What the fits of all tasks share: randomness by name, and one model trained by one optimizer."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu.lab.errors import TrialError
from danlu.lab.trial import Scalar

__all__ = ["GradientFit", "generator", "training_device"]


def generator(*identity: int | str) -> torch.Generator:
    """A generator seeded by `identity`, such as ("batch", seed, step): any step is drawn without those before it."""
    text = "/".join(map(str, identity)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)


def training_device(options: Mapping[str, Scalar]) -> torch.device:
    """The device that the option `device` names; raise `TrialError` if it is a GPU and there is none."""
    device = torch.device(str(options["device"]))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrialError("this size trains on a CUDA device, and there is none here; take another --size")
    return device


class GradientFit:
    """One model trained by one optimizer on a loss that is a function of the step.

    Args:
        model: what is trained.
        optimizer: of its parameters.
        loss: step -> loss of that step's batch; its randomness must come from the step alone.
        schedule: called with the step before each update, to set learning rates.
        observe: called with the number of finished steps after each update; returns further points of the learning
            curves. What it must remember goes into `memory`, which is part of the state.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss: Callable[[int], Tensor],
        schedule: Callable[[int], None],
        observe: Callable[[int], Mapping[str, float]] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.memory: dict[str, object] = {}
        self._loss = loss
        self._schedule = schedule
        self.observe = observe

    def step(self, index: int) -> dict[str, float]:
        """One update."""
        self.model.train()
        self._schedule(index)
        loss = self._loss(index)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        point = {"train_loss": float(loss.detach())}
        return point | dict(self.observe(index + 1)) if self.observe is not None else point

    def state(self) -> dict[str, object]:
        """Model, optimizer and memory."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "memory": self.memory,
        }

    def load(self, state: dict[str, object]) -> None:
        """Restore what `state` returned."""
        self.model.load_state_dict(cast("Mapping[str, Tensor]", state["model"]))
        self.optimizer.load_state_dict(cast("dict[str, object]", state["optimizer"]))
        self.memory = cast("dict[str, object]", state["memory"])

    def optimizer_state(self) -> Iterator[Tensor]:
        """Tensors that the optimizer keeps; step counters are left out."""
        for entries in self.optimizer.state.values():
            for value in cast("dict[str, object]", entries).values():
                if isinstance(value, Tensor) and value.ndim > 0:
                    yield value
