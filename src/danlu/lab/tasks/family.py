"""A family of trainings as one fit: several models side by side, of which only their comparison says something."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["FamilyFit", "Member", "record_steps"]


@dataclass(frozen=True, eq=False)
class Member:
    """One training of a family.

    Args:
        model: what is trained.
        optimizer: of its parameters.
        loss: step -> loss of that step's batch; its randomness must come from the step alone.
        schedule: called with the step before each update, to set learning rates.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[int], Tensor]
    schedule: Callable[[int], None] = lambda step: None


class FamilyFit:
    """Several trainings that take their steps together.

    Args:
        members: the trainings.
        records: the numbers of finished steps at which `record` is called.
        record: a model and its index to the numbers that are kept of it; all records are part of the state.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        records: Sequence[int],
        record: Callable[[nn.Module, int], Tensor],
    ) -> None:
        self.members = tuple(members)
        self.model: nn.Module = nn.ModuleList(member.model for member in members)
        self.records = tuple(records)
        self._record = record
        self._kept: list[list[Tensor]] = []

    def step(self, index: int) -> dict[str, float]:
        """One update of every member; the training loss is their mean."""
        total = 0.0
        for member in self.members:
            member.model.train()
            member.schedule(index)
            loss = member.loss(index)
            member.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            member.optimizer.step()
            total += float(loss.detach())
        if index + 1 in self.records:
            self._kept.append([self._record_of(i) for i in range(len(self.members))])
        return {"train_loss": total / len(self.members)}

    @torch.no_grad()
    def _record_of(self, index: int) -> Tensor:
        model = self.members[index].model
        model.eval()
        return self._record(model, index)

    def recorded(self, index: int) -> Tensor:
        """The records of one member, a row for each step of `records` that is done."""
        return torch.stack([row[index] for row in self._kept])

    def state(self) -> dict[str, object]:
        """Models, optimizers and records."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizers": [member.optimizer.state_dict() for member in self.members],
            "records": [list(row) for row in self._kept],
        }

    def load(self, state: dict[str, object]) -> None:
        """Restore what `state` returned."""
        self.model.load_state_dict(cast("Mapping[str, Tensor]", state["model"]))
        saved = cast("list[dict[str, object]]", state["optimizers"])
        for member, optimizer in zip(self.members, saved, strict=True):
            member.optimizer.load_state_dict(optimizer)
        self._kept = [list(row) for row in cast("list[list[Tensor]]", state["records"])]

    def optimizer_state(self) -> Iterator[Tensor]:
        """Tensors that the optimizers keep; step counters are left out."""
        for member in self.members:
            for entries in member.optimizer.state.values():
                for value in cast("dict[str, object]", entries).values():
                    if isinstance(value, Tensor) and value.ndim > 0:
                        yield value


def record_steps(steps: int, count: int, *, first: int = 1) -> list[int]:
    """About `count` numbers of steps from `first` to `steps`, evenly spaced in their logarithm."""
    ratio = steps / first
    return sorted({round(first * ratio ** (i / max(1, count - 1))) for i in range(count)} | {steps})
