r"""Several optimizers as one: each parameter goes to the optimizer that its kind names.

Source: kexue.fm article 9736 (2023-08-28), which reports the remedy of Lion's authors.

Shape letters: none; parameters of any shape.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from danlu._common.checks import check_choice
from danlu.optim._base import loss_of
from danlu.optim._nonfinite import event_counts
from danlu.optim._padding import check_padding, fixed_padding
from danlu.optim._param_groups import KINDS, parameter_groups
from danlu.optim._sign_optimizer import SignOptimizer

__all__ = ["HybridOptimizer"]

Rules = Mapping[str, tuple[type[Optimizer], Mapping[str, Any]]]


class HybridOptimizer(Optimizer):
    r"""One optimizer per kind of parameter, behind one `step`, one `state_dict` and one list of groups.

    Definition:
        The groups of kind $\kappa$ are updated by the optimizer that `rules` names for $\kappa$, or for `"default"`
        where it names none. Lion's authors train embeddings with AdamW this way and the rest with Lion: the update
        of AdamW fades with the gradient of a rare token, while a sign does not.

    Args:
        params: a model, whose parameters are grouped by [`parameter_groups`][danlu.optim.parameter_groups]; or groups
            that carry `kind`. Options in a group win over those of its rule.
        rules: kind or `"default"` to a class and its keyword options, such as
            `{"embedding": (AdamW, {"lr": 1e-3}), "default": (Tiger, {"lr": 2e-3})}`.

    Returns:
        From `step`: what the closure returned, or None. The closure is called once. `nonfinite_events`, `mark_rows` and
        `check_embeddings` are those of the optimizers that have them.

    Raises:
        TypeError: a rule is not a pair of an optimizer's class and a dictionary.
        ValueError: an unknown kind, a rule without parameters, or a group without a kind or without a rule. From
            `load_state_dict`: the groups or their rules differ.

    Numerics:
        Those of the optimizers. Padding rows (`padding_idx` in a group) never move, whatever the optimizer.

    Cost:
        That of the optimizers; parameters, groups and states are shared, not copied.

    Differences:
        Schedulers see all groups and scale each from its own `lr`; a list of optimizers would need one scheduler each.
        With an optimizer that refuses a step (`nonfinite="raise"`), those before it in `rules` have stepped.

    Source:
        "Lion/Tiger optimizers and their embedding anomaly", kexue.fm article 9736 (2023-08-28); arXiv 2302.06675.

    Example:
        >>> import torch
        >>> from danlu.optim import HybridOptimizer, Tiger
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2))
        >>> rules = {"embedding": (torch.optim.AdamW, {"lr": 1e-3}), "default": (Tiger, {"lr": 2e-3})}
        >>> optimizer = HybridOptimizer(model, rules)
        >>> [(group["kind"], group["rule"], group["lr"]) for group in optimizer.param_groups]
        [('embedding', 'embedding', 0.001), ('vector', 'default', 0.002), ('matrix', 'default', 0.002)]
    """

    def __init__(self, params: nn.Module | Iterable[dict[str, Any]], rules: Rules) -> None:
        for name, rule in rules.items():
            check_choice("rules", name, (*KINDS, "default"))
            if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], type)):
                raise TypeError(f"rules[{name!r}] must be a pair of a class and its options, got {rule!r}")
            if not issubclass(rule[0], Optimizer) or not isinstance(rule[1], Mapping):
                raise TypeError(
                    f"rules[{name!r}] must be a pair of an optimizer's class and a dictionary, got {rule!r}"
                )
        groups = parameter_groups(params) if isinstance(params, nn.Module) else list(params)
        self._rules = tuple(rules)
        wanted: dict[str, list[dict[str, Any]]] = {name: [] for name in rules}
        for group in groups:
            name = self._rule_of(group)
            wanted[name].append({**group, "rule": name})
        idle = [name for name, members in wanted.items() if not members]
        if idle:
            raise ValueError(f"no parameters for rules {', '.join(map(repr, idle))}")
        self._parts = {name: cls(wanted[name], **options) for name, (cls, options) in rules.items()}
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {})
        self._share()

    def _rule_of(self, group: object) -> str:
        if not isinstance(group, dict) or group.get("kind") not in KINDS:
            kind = group.get("kind") if isinstance(group, dict) else type(group).__name__
            raise ValueError(
                f"params must be a model or groups whose kind is one of {', '.join(KINDS)}, got {kind!r}; "
                "danlu.optim.parameter_groups(model) makes them"
            )
        name = group["kind"] if group["kind"] in self._rules else "default"
        if name not in self._rules:
            raise ValueError(f"rules name neither {group['kind']!r} nor 'default'")
        return str(name)

    def _groups_of_parts(self) -> list[dict[str, Any]]:
        """The groups that the optimizers hold, in the order of this one's list."""
        found = {name: iter(part.param_groups) for name, part in self._parts.items()}
        return [next(found[group["rule"]]) for group in self.param_groups]

    def _share(self) -> None:
        """Let every part work on one state; the groups are one already."""
        shared = self.state
        for part in self._parts.values():
            shared.update(part.state)
            part.state = shared

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer of its kind. The dictionary is not modified."""
        groups = chain.from_iterable(part.param_groups for part in self._parts.values())
        part = None
        if not any(param_group is group for group in groups):
            part = self._parts[self._rule_of(param_group)]
            part.add_param_group({**param_group, "rule": self._rule_of(param_group)})
            param_group = part.param_groups[-1]
        known = set(chain.from_iterable(group["params"] for group in self.param_groups))
        # At the end of the list, whatever its rule: schedulers know groups by their place.
        self.param_groups.append(param_group)
        try:
            check_padding(self.param_groups)
            if not known.isdisjoint(param_group["params"]):
                self.param_groups.pop()
                raise ValueError("some parameters appear in more than one parameter group")
        except ValueError:
            if part is not None:
                part.param_groups.pop()
            raise

    @property
    def nonfinite_events(self) -> dict[str, int]:
        """How many gradients were bad so far, by parameter name, for the optimizers that count them."""
        counts: dict[Tensor, Tensor] = {}
        for part in self._parts.values():
            counts |= getattr(part, "_nonfinite_counts", {})
        return event_counts(self.param_groups, counts)

    def mark_rows(self, param: Tensor, token_ids: Tensor) -> None:
        """Say which rows of a lazy parameter the next `step` touches, see [`Lion`][danlu.optim.Lion.mark_rows]."""
        owners = (
            part for part in self._parts.values() for group in part.param_groups for p in group["params"] if p is param
        )
        part = next(owners, None)
        if not isinstance(part, SignOptimizer):
            reason = "not a parameter of this optimizer" if part is None else f"updated by {type(part).__name__}"
            raise ValueError(f"param of shape {tuple(param.shape)} is {reason}, which has no lazy rows")
        part.mark_rows(param, token_ids)

    def check_embeddings(self) -> list[str]:
        """Warn of embeddings whose rows mostly get no gradient, see [`Lion`][danlu.optim.Lion.check_embeddings]."""
        parts = self._parts.values()
        return [name for part in parts if isinstance(part, SignOptimizer) for name in part.check_embeddings()]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_rules": self._rules, "_parts": self._parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; every optimizer loads its own part of it in its own way."""
        saved = state_dict["param_groups"]
        rules = [group["rule"] for group in self.param_groups]
        found = [group.get("rule") for group in saved]
        if found != rules:
            raise ValueError(f"the checkpoint has groups of rules {found}, and this optimizer has {rules}")
        for name, part in self._parts.items():
            groups = [group for group in saved if group["rule"] == name]
            ids = set(chain.from_iterable(group["params"] for group in groups))
            state = {key: value for key, value in state_dict["state"].items() if key in ids}
            part.load_state_dict({**state_dict, "param_groups": groups, "state": state})
        # Loading makes new dictionaries.
        self.param_groups = self._groups_of_parts()
        self.state.clear()
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Let every optimizer update its parameters; `closure` recomputes the loss and returns it."""
        loss = loss_of(closure)
        with ExitStack() as padding:
            for group in self.param_groups:
                padding.enter_context(fixed_padding(group, group["params"]))
            for part in self._parts.values():
                part.step()
        return loss
