"""What Lion and Tiger share: lazy rows, the watch over embeddings, calls prepared on the addresses of the tensors."""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from danlu.optim._base import GroupOptimizer
from danlu.optim._lazy_rows import LazyRows, check_rows
from danlu.optim._stale_momentum import EmbeddingWatch
from danlu.optim._state import PreparedCalls

__all__ = ["SignOptimizer"]


class SignOptimizer(GroupOptimizer):
    """An optimizer that moves every element by the sign of its momentum.

    Args:
        params: as in torch.
        defaults: the options of groups that do not give them.
    """

    _copied: ClassVar[tuple[str, ...]] = (*GroupOptimizer._copied, "_rows", "_watch")

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._calls = PreparedCalls()
        self._rows, self._watch = LazyRows(), EmbeddingWatch()
        super().__init__(params, defaults)

    def mark_rows(self, param: Tensor, token_ids: Tensor) -> None:
        """Say which rows of a lazy parameter the next `step` touches, instead of looking for them in its gradient.

        Calls before one step add up; with `in_backward` they come before the backward pass. Gradients of other rows are
        not used. `token_ids` are integers of any shape.
        """
        self._rows.mark(self.param_groups, param, token_ids)

    def check_embeddings(self) -> list[str]:
        """Call between `backward` and `step`: warns of embeddings whose rows mostly get no gradient.

        A parameter of a group of kind `embedding` that is not lazy is reported, once, after 100 calls in a row in which
        more than 20 % of its rows had an all-zero gradient. Returns the names that this call reports. With
        `in_backward` there are no gradients left to look at.
        """
        return self._watch.check(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not give are the optimizer's defaults. The dictionary is not modified."""
        super().add_param_group(param_group)
        check_rows(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The addresses were those of other tensors.
        self._calls = PreparedCalls()
