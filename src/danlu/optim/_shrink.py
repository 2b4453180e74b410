r"""Shrinking a tensor whose gradient is not finite: Tiger's rescue, around the step of any optimizer.

Source: "Tiger：一个“抠”到极致的优化器" (2023-03-07).

Shape letters: `...` any shape of a parameter.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danlu.optim._rounding import Writer, read

__all__ = ["shrinking", "toward_center"]


def toward_center(theta: Tensor, group: Mapping[str, Any]) -> Tensor:
    r"""$c + (\theta - c)\,r$ with $c$ the group's `center` and $r$ its `shrink`."""
    center = group.get("center", 0.0)
    return center + (theta - center) * group["shrink"]


@contextlib.contextmanager
def shrinking(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    counts: Mapping[Tensor, Tensor],
    writer: Callable[[int], Writer | None],
    shrunk: Callable[[Tensor, Mapping[str, Any]], Tensor] = toward_center,
) -> Iterator[None]:
    """Around a step that skips and counts bad gradients: shrink the tensors that it counted, if the group says so.

    Args:
        group: its `nonfinite` and `shrink` decide.
        params: the tensors of the step.
        counts: the counter of each, if it has one yet; on accelerators it is not waited for.
        writer: how parameter `i` is rounded.
        shrunk: what a tensor becomes, in the dtype of the arithmetic.
    """
    if group["nonfinite"] != "shrink":
        yield
        return
    before = [counts[param].clone() if param in counts else 0 for param in params]
    yield
    for i, (param, earlier) in enumerate(zip(params, before, strict=True)):
        if param.numel() == 0 or param not in counts:
            continue
        bad = counts[param] != earlier
        if bad.device.type == "cpu" and not bad:
            continue
        rule = writer(i)
        theta = read(param, rule)
        moved = torch.where(bad, shrunk(theta, group), theta)
        if rule is None:
            param.copy_(moved)
        else:
            rule.write(param, moved)
