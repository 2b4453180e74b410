"""The state tensors of the optimizers: their dtypes, their place in checkpoints, calls prepared on their addresses."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu._common.checks import is_low_precision
from danlu.kernels.sign_update import SignUpdate
from danlu.optim._rounding import Rounding, resolve_rounding

__all__ = [
    "PreparedCalls",
    "add_compensation",
    "device_step",
    "group_rounding",
    "momentum_states",
    "new_state",
    "restore_state_tensors",
]


def new_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Momentum at zero, in the wider of the two dtypes; the compensation where it is wanted."""
    wide = param.dtype if group["state_dtype"] is None else torch.promote_types(param.dtype, group["state_dtype"])
    state = {"exp_avg": torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)}
    add_compensation(state, param, group)
    return state


def momentum_states(
    states: Mapping[Tensor, dict[str, Any]], params: Sequence[Tensor], group: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The states of parameters of a group, with the tensors that they need."""
    found: list[dict[str, Any]] = []
    for param in params:
        state = states[param]
        if "exp_avg" not in state:
            state.update(new_state(param, group))
        add_compensation(state, param, group)
        found.append(state)
    return found


def add_compensation(state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    """Give a low-precision parameter its second tensor if the group's rounding is `"kahan"` and it has none."""
    if group["rounding"] == "kahan" and is_low_precision(param.dtype) and "compensation" not in state:
        state["compensation"] = torch.zeros_like(param, memory_format=torch.preserve_format)


def group_rounding(
    group: Mapping[str, Any], step: int | Tensor, numbers: Sequence[int], states: Sequence[Mapping[str, Any]]
) -> Rounding:
    """The rounding of one step for parameters of a group, given their numbers among all parameters and their states."""
    kahan = group["rounding"] == "kahan"
    compensations = [state.get("compensation") for state in states] if kahan else ()
    return Rounding(group["rounding"], group["seed"], step, numbers, compensations)


def restore_state_tensors(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """After `load_state_dict`: own copies of the state tensors, in the dtypes in which they were saved.

    torch casts them to the dtype of the parameter, which would round the float32 state of a bfloat16 parameter. Cast
    is only what the arithmetic of this optimizer's parameters cannot use, since the model has another dtype.
    """
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for identity, param in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(identity, {}).items():
            if isinstance(value, Tensor):
                dtype = _usable_dtype(name, value.dtype, param.dtype)
                optimizer.state[param][name] = value.detach().to(param.device, dtype, copy=True)


def _usable_dtype(name: str, saved: torch.dtype, param: torch.dtype) -> torch.dtype:
    """The dtype for a state tensor that was saved in another one, perhaps for a parameter of another dtype."""
    if name == "compensation":
        return param if is_low_precision(param) else saved
    # Counts of steps are float32, whatever the parameter.
    if name == "step" or not (saved.is_floating_point and param.is_floating_point):
        return saved
    if (saved == torch.float64) != (param == torch.float64):
        return torch.promote_types(param, torch.float32)
    return saved


def device_step(group: dict[str, Any], key: str, step: int) -> int | Tensor:
    """The number of the step for the random bits; with `capturable` a tensor that a captured graph can count up."""
    if not group["capturable"]:
        return step
    device = group["params"][0].device
    if key not in group:
        group[key] = torch.tensor(step, device=device)
    group[key] = group[key].to(device)
    return group[key]


class PreparedCalls:
    """Compiled calls, one per group, kept while a group's tensors stay where they are.

    Looking at every tensor anew costs ten times the step itself where the tensors are small. Not for copies of an
    optimizer: the addresses are those of the original's tensors.
    """

    def __init__(self) -> None:
        self._calls: dict[int, tuple[SignUpdate, tuple[str, Any]]] = {}

    def find(
        self,
        index: int,
        group: Mapping[str, Any],
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> SignUpdate | None:
        """The call for all parameters of a group, pointed to their gradients; None if there is none for them."""
        if index not in self._calls or group["fused"] is False or group["foreach"] is not None:
            return None
        call, key = self._calls[index]
        params = group["params"]
        if not params or key != _key(group, params[0]):
            return None
        try:
            exp_avgs = [state[param]["exp_avg"] for param in params]
        except KeyError:
            # The state was cleared.
            return None
        compensations = [state[param].get("compensation") for param in params] if key[0] == "kahan" else ()
        if not call.holds(params, exp_avgs, compensations) or not call.take_all(grads):
            return None
        return call

    def keep(
        self,
        index: int,
        group: Mapping[str, Any],
        fused: Sequence[int],
        state: Mapping[Tensor, dict[str, Any]],
        numbers: Sequence[int],
        **columns: Any,
    ) -> None:
        """Keep a call if the kernel took all parameters of the group at once, as `fused` (their indices) says."""
        params = group["params"]
        self._calls.pop(index, None)
        if not params or len(fused) != len(params) or len({(p.device, p.dtype) for p in params}) > 1:
            return
        key = mode, _ = _key(group, params[0])
        call = SignUpdate(
            params,
            [state[param]["exp_avg"] for param in params],
            compensations=[state[param]["compensation"] for param in params] if mode == "kahan" else (),
            numbers=numbers if mode == "stochastic" else (),
            **columns,
        )
        self._calls[index] = (call, key)

    def clear(self) -> None:
        """Forget all calls, for states that were replaced."""
        self._calls.clear()


def _key(group: Mapping[str, Any], param: Tensor) -> tuple[str, Any]:
    """The options that a prepared call has built in."""
    return resolve_rounding(group["rounding"], param.dtype), group.get("kind")
