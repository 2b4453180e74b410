"""The cycle of micro-steps over which gradients are accumulated. Its place is part of the checkpoint, so in a group."""

from collections.abc import Mapping
from typing import Any

__all__ = ["begin_cycle", "check_cycle", "new_cycle", "running_cycle"]


def new_cycle(length: int) -> dict[str, int]:
    """Options of a group that begins with a cycle of so many micro-steps."""
    return {"micro_step": 0, "cycle_start": 0, "cycle_length": length}


def running_cycle(param_groups: list[dict[str, Any]]) -> dict[str, int]:
    """Options of a group that joins others in the cycle that is under way; none if it is the first."""
    return {key: param_groups[0][key] for key in new_cycle(1)} if param_groups else {}


def begin_cycle(group: dict[str, Any]) -> bool:
    """Fix the length of the cycle at its first micro-step; returns whether this is the last."""
    if group["micro_step"] == group["cycle_start"]:
        group["cycle_length"] = group["grad_accum_steps"]
    return bool(group["micro_step"] + 1 == group["cycle_start"] + group["cycle_length"])


def check_cycle(group: Mapping[str, Any]) -> None:
    """Raise `RuntimeError` if the length was changed within a cycle."""
    inside = group["micro_step"] != group["cycle_start"]
    if inside and group["grad_accum_steps"] != group["cycle_length"]:
        raise RuntimeError(
            f"grad_accum_steps changed from {group['cycle_length']} to {group['grad_accum_steps']} within a "
            "cycle; change it after a step that updates"
        )
