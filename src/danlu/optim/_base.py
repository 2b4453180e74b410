"""What the optimizers of this family share: groups that are checked, counts of bad gradients, copies, checkpoints."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from danlu.optim._nonfinite import event_counts
from danlu.optim._padding import check_padding, fixed_padding
from danlu.optim._rounding import Writer
from danlu.optim._shrink import shrinking, toward_center
from danlu.optim._state import restore_state_tensors

__all__ = ["GroupOptimizer", "loss_of"]


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """What the closure of a step returns, computed with gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class GroupOptimizer(Optimizer):
    """An optimizer whose options all live in its groups; a subclass says what a valid group is.

    Args:
        params: as in torch.
        defaults: the options of groups that do not give them.
    """

    # Attributes that a copy takes along, beside those of torch.
    _copied: ClassVar[tuple[str, ...]] = ("_nonfinite_counts",)

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._nonfinite_counts: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise unless the options of a complete group are valid."""
        raise NotImplementedError

    def _later_options(self) -> dict[str, Any]:
        """Options that came later than the class, for groups of before."""
        return {"rounding": None, "seed": 0, "step": 0, "shrink": 0.99}

    @contextlib.contextmanager
    def _around(
        self, group: Mapping[str, Any], params: Sequence[Tensor], writer: Callable[[int], Writer | None]
    ) -> Iterator[None]:
        """Around the step of some parameters of a group: padding rows stay, and bad gradients may shrink their tensors.

        `writer` tells how parameter i is rounded.
        """
        with fixed_padding(group, params), shrinking(group, params, self._nonfinite_counts, writer, self._shrunk):
            yield

    def _shrunk(self, theta: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What a tensor becomes with `nonfinite="shrink"`."""
        return toward_center(theta, group)

    @property
    def nonfinite_events(self) -> dict[str, int]:
        """How many gradients were bad so far (see `nonfinite`), by parameter name; empty when there were none."""
        return event_counts(self.param_groups, self._nonfinite_counts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not give are the optimizer's defaults. The dictionary is not modified."""
        if isinstance(param_group, dict):
            self._check_group(self.defaults | param_group)
            param_group = dict(param_group)
        super().add_param_group(param_group)
        check_padding(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in self._copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A checkpoint of an earlier version lacks the later options; a pickle lacks them among the defaults as well.
        for name, value in self._later_options().items():
            self.defaults.setdefault(name, value)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                # torch adds this one to the defaults alone.
                if name != "differentiable":
                    group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; the optimizer owns copies of its tensors, in the dtypes in which they were saved."""
        super().load_state_dict(state_dict)
        restore_state_tensors(self, state_dict)
