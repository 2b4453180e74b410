r"""What can be done about a momentum that no gradient feeds, where rows are not updated lazily: a dead zone, a warning.

Source: kexue.fm article 9736 (2023-08-28).

Shape letters: V rows, `...` the other axes.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danlu._common.checks import check_real
from danlu.optim._lazy_rows import is_lazy
from danlu.optim._nonfinite import gradient_values, parameter_name

__all__ = ["EmbeddingWatch", "apply_deadzone", "check_deadzone"]

# A group of embeddings is reported when more than this share of its rows had an all-zero gradient in each of this many
# steps in a row. Both are the plan's; a tied table, whose rows all get gradients from the softmax, never reaches them.
ZERO_ROWS = 0.2
PATIENCE = 100


def check_deadzone(value: object) -> None:
    r"""Raise unless the dead zone is in $[0, 1)$."""
    check_real("sign_deadzone", value, low=0.0, high=1.0, high_open=True)


def apply_deadzone(exp_avg: Tensor, deadzone: float) -> None:
    r"""Set the elements of a momentum with $|m| < \tau\,\mathrm{RMS}(m)$ to 0, in place.

    The RMS is taken in float64, so that small momenta do not underflow in it; where it is not finite nothing happens.
    """
    if deadzone == 0 or exp_avg.numel() == 0:
        return
    size = exp_avg.abs()
    wide = torch.float32 if exp_avg.device.type == "mps" else torch.float64
    rms = torch.linalg.vector_norm(size, dtype=wide) / exp_avg.numel() ** 0.5
    threshold = torch.where(torch.isfinite(rms), deadzone * rms, torch.zeros_like(rms))
    exp_avg.masked_fill_(size < threshold, 0.0)


class EmbeddingWatch:
    """Counts the steps in a row in which many rows of a table had no gradient."""

    def __init__(self) -> None:
        self._runs: dict[Tensor, Tensor] = {}
        self._calls = 0
        self._reported = set[Tensor]()

    def check(self, param_groups: Sequence[Mapping[str, Any]]) -> list[str]:
        """Look at the gradients of one step; warn of the tables found, once each, and return their names.

        On accelerators the counts stay on the device and are read at every hundredth call.
        """
        groups = [(g, group) for g, group in enumerate(param_groups) if group.get("kind") == "embedding"]
        if not groups:
            raise RuntimeError(
                "no parameter group is of kind 'embedding', so there is nothing to check; build the groups with "
                "danlu.optim.parameter_groups(model)"
            )
        self._calls += 1
        found: list[str] = []
        for g, group in groups:
            for i, param in enumerate(group["params"]):
                if is_lazy(group) or param.grad is None or param.numel() == 0 or param in self._reported:
                    continue
                run = self._runs.get(param, torch.zeros((), dtype=torch.int32, device=param.device))
                self._runs[param] = torch.where(_share_of_zero_rows(param.grad) > ZERO_ROWS, run + 1, 0)
                read = param.device.type == "cpu" or self._calls % PATIENCE == 0
                if read and int(self._runs[param].item()) >= PATIENCE:
                    found.append(parameter_name(param_groups, g, i))
                    self._reported.add(param)
        if found:
            warnings.warn(
                f"more than {ZERO_ROWS:.0%} of the rows of these embeddings had no gradient in each of the last "
                f"{PATIENCE} steps: {', '.join(found)}. The sign of their momentum keeps moving such rows for ever; "
                "use lazy=('embedding',), tie_embeddings, or HybridOptimizer with AdamW for embeddings",
                stacklevel=3,
            )
        return found


def _share_of_zero_rows(grad: Tensor) -> Tensor:
    values = gradient_values(grad)
    nonzero = (values != 0).flatten(1).any(1).sum() if values.ndim > 1 else (values != 0).sum()
    return 1 - nonzero / grad.shape[0]
