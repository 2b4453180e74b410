"""Parameter groups by what a tensor is: embedding, gain of a norm, other vector, matrix."""

import fnmatch
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn

from danlu._common.checks import check_choice, check_real

__all__ = ["KINDS", "Kind", "parameter_groups"]

Kind = Literal["embedding", "norm_scale", "vector", "matrix"]
KINDS: tuple[Kind, ...] = ("embedding", "norm_scale", "vector", "matrix")

# Kinds that are decayed; the others are gains and offsets, whose size means something.
DECAYED: frozenset[str] = frozenset({"embedding", "matrix"})


def parameter_groups(
    model: nn.Module,
    *,
    kinds: Mapping[str, Mapping[str, Any]] | None = None,
    overrides: Mapping[str | re.Pattern[str], str | Mapping[str, Any]] | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    r"""Groups of a model's trainable parameters by kind, for any `torch.optim.Optimizer`.

    Definition:
        The first rule that matches decides; a tied tensor appears once.

        - `embedding`: `weight` of `nn.Embedding` or `nn.EmbeddingBag`, also when it is tied to an output layer.
        - `norm_scale`: one-dimensional `weight` of a module whose class name contains "Norm".
        - `vector`: any other tensor with at most one axis.
        - `matrix`: everything else.

        Weight decay is for `embedding` and `matrix`. The groups carry `kind`, `center` (what a parameter is pulled to
        when it is shrunk: a norm's gain at construction, such as 1, or 0 where the model multiplies by $1 + w$; else
        0) and `param_names`; embeddings with a padding row also carry `padding_idx`.

    Args:
        model: whose parameters with `requires_grad` are grouped.
        kinds: options for all groups of a kind, such as `{"embedding": {"lr": 1e-4}}`.
        overrides: qualified name (a glob such as `"*.lora_B.*"`, or a compiled regular expression that is searched) to
            a kind, or to options for the parameters that match. Later matches win over earlier ones.
        weight_decay: $\lambda$ of the decayed kinds; None leaves it to the optimizer. The other kinds always get 0
            unless `kinds` or `overrides` says otherwise.

    Returns:
        Dictionaries for an optimizer's `params`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown kind, an override that matches nothing, a negative `weight_decay`, or a model without
            trainable parameters.

    Numerics:
        Norm gains are read once to find their constant.

    Differences:
        The original Tiger tells kinds by the words "gamma" and "beta" in names, which PyTorch does not use.

    Source:
        Reference code of "Tiger：一个'抠'到极致的优化器" (2023-03-07), github bojone/tiger.

    Example:
        >>> import torch
        >>> from danlu.optim import parameter_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> for group in parameter_groups(model):
        ...     print(group["kind"], group["param_names"])
        embedding ['0.weight']
        norm_scale ['1.weight']
        vector ['1.bias', '2.bias']
        matrix ['2.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if weight_decay is not None:
        check_real("weight_decay", weight_decay, low=0.0)
    for kind in kinds or {}:
        check_choice("kinds", kind, KINDS)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, param in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(param), []).append((module, attribute))

    unmatched = set(overrides or {})
    groups: dict[str, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        kind, options = kind_of(param, owners[id(param)]), dict[str, Any]()
        for pattern, override in (overrides or {}).items():
            if matches(pattern, name):
                unmatched.discard(pattern)
                if isinstance(override, str):
                    check_choice(f"overrides[{pattern_text(pattern)!r}]", override, KINDS)
                    kind = cast("Kind", override)
                else:
                    options |= override
        group: dict[str, Any] = {"kind": kind, "center": center_of(param, kind)}
        padding = [m.padding_idx for m, _ in owners[id(param)] if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        if kind == "embedding" and any(index is not None for index in padding):
            group["padding_idx"] = next(index for index in padding if index is not None)
        if kind not in DECAYED:
            group["weight_decay"] = 0.0
        elif weight_decay is not None:
            group["weight_decay"] = weight_decay
        group |= {**(kinds or {}).get(kind, {}), **options}
        key = repr(sorted(group.items()))
        into = groups.setdefault(key, {**group, "params": [], "param_names": []})
        into["params"].append(param)
        into["param_names"].append(name)
    if unmatched:
        listed = ", ".join(repr(pattern_text(pattern)) for pattern in unmatched)
        raise ValueError(f"overrides match no trainable parameter: {listed}")
    if not groups:
        raise ValueError(f"model {type(model).__name__} has no trainable parameters")
    return sorted(groups.values(), key=lambda group: KINDS.index(group["kind"]))


def kind_by_shape(param: Tensor) -> Kind:
    """The kind of a tensor of which nothing but the shape is known."""
    return "vector" if param.ndim <= 1 else "matrix"


def kind_of(param: Tensor, owners: list[tuple[nn.Module, str]]) -> Kind:
    """The kind of a tensor by the modules that own it, and under which attribute."""
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module, _ in owners):
        return "embedding"
    if param.ndim == 1 and any("Norm" in type(module).__name__ and name == "weight" for module, name in owners):
        return "norm_scale"
    return kind_by_shape(param)


def center_of(param: Tensor, kind: Kind) -> float:
    """What a tensor of this kind is pulled to when it is shrunk."""
    if kind != "norm_scale":
        return 0.0
    if param.is_meta or param.numel() == 0:
        return 1.0
    low, high = param.detach().aminmax()
    return float(low) if float(low) == float(high) else 1.0


def matches(pattern: str | re.Pattern[str], name: str) -> bool:
    """Whether a glob, or an expression that is searched, matches a qualified name."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def pattern_text(pattern: str | re.Pattern[str]) -> str:
    """A pattern for messages."""
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern
