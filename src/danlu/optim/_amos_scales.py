r"""The scale that a model expects of the entries of each of its tensors, told by the modules that own them.

Source: Tian & Parikh (2022), arXiv 2210.11693, section 3; github google-research/jestimator.

Shape letters: `K` the fan-in of a tensor, `D` the width of an embedding.
"""

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_real
from danlu.optim._param_groups import Kind, center_of, kind_of, matches, pattern_text

__all__ = ["amos_scales", "scale_by_kind", "scaled_groups"]

_LINEAR = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What hands on the size of its input, as far as a factor of order 1 goes.
_PASSING_MODULES = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity,
    nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.PixelShuffle, nn.PixelUnshuffle,
)  # fmt: skip
_PASSING_CALLS = frozenset(
    {
        "dropout",
        "flatten",
        "reshape",
        "view",
        "permute",
        "transpose",
        "contiguous",
        "unsqueeze",
        "squeeze",
        "max_pool2d",
    }
)
_ACTIVATIONS = re.compile("relu|gelu", flags=re.IGNORECASE)


def amos_scales(
    model: nn.Module,
    *,
    overrides: Mapping[str | re.Pattern[str], float] | None = None,
    pixels: Sequence[str | re.Pattern[str]] = (),
) -> dict[str, float]:
    r"""Expected scale $\eta$ of the entries of each parameter, for `scales` of [`Amos`][danlu.optim.Amos].

    Definition:
        The first rule that matches decides.

        - gain of a norm: 1 (0.5 where the model multiplies by $1 + w$);
        - bias, and any other tensor with at most one axis: 0.5;
        - embedding, also a tied one: $\sqrt{2 / D}$;
        - weight of a linear map or convolution: $\sqrt{a / K}$ with `K` inputs per output, where $a = 8$ for inputs
          that are pixels in $[0, 1]$ (`pixels`), $a = 2$ if the input comes out of a ReLU or GELU, else $a = 1$;
        - any other tensor: $\sqrt{1 / K}$ with `K` entries per slice of axis 0.

        With weights of that scale the outputs of a layer are of order 1, if its inputs are.

    Args:
        model: whose parameters are told; nothing of it is changed.
        overrides: qualified name (a glob, or a compiled regular expression that is searched) to $\eta > 0$; later
            matches win.
        pixels: qualified names of layers (globs or expressions) whose inputs are pixels in $[0, 1]$.

    Returns:
        Qualified name to scale, for every parameter, trainable or not; tied ones under their first name.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a scale is not positive, or an entry of `overrides` or `pixels` matches nothing.

    Numerics:
        Norm gains are read once to find whether they start at 0.

    Cost:
        The `forward` of every module with children is traced once by `torch.fx`, on symbols instead of tensors, to see
        which layer follows which activation. What cannot be traced (control flow on values, most whole models; their
        blocks often can) counts as $a = 1$: name it in `overrides`.

    Differences:
        The paper's code writes these rules down per model, by names. $K$ of a transposed convolution counts the inputs
        that reach one output.

    Source:
        Tian & Parikh (2022), arXiv 2210.11693, section 3; github google-research/jestimator, the rules of its models.

    Example:
        >>> import torch
        >>> from danlu.optim import amos_scales
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 2))
        >>> {name: round(scale, 4) for name, scale in amos_scales(model).items()}
        {'0.weight': 0.3536, '0.bias': 0.5, '2.weight': 0.25, '2.bias': 0.5}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for pattern, scale in (overrides or {}).items():
        check_real(f"overrides[{pattern_text(pattern)!r}]", scale, low=0.0, low_open=True)
    unmatched = {*(overrides or {}), *pixels}
    activated = _after_activations(model)
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(param), []).append((path, module, attribute))
    scales: dict[str, float] = {}
    for name, param in model.named_parameters():
        kind = kind_of(param, [(module, attribute) for _, module, attribute in owners[id(param)]])
        gain = 1.0
        for path, _, _ in owners[id(param)]:
            if path in activated:
                gain = 2.0
            for pattern in pixels:
                if matches(pattern, path):
                    unmatched.discard(pattern)
                    gain = 8.0
        fan_in = _fan_in(param, owners[id(param)][0][1])
        scales[name] = scale_by_kind(param, kind, center_of(param, kind), gain=gain, fan_in=fan_in)
        for pattern, scale in (overrides or {}).items():
            if matches(pattern, name):
                unmatched.discard(pattern)
                scales[name] = float(scale)
    if unmatched:
        listed = ", ".join(repr(pattern_text(pattern)) for pattern in unmatched)
        raise ValueError(f"overrides or pixels match nothing in the model: {listed}")
    return scales


def scale_by_kind(
    param: Tensor, kind: Kind, center: float = 1.0, *, gain: float = 1.0, fan_in: float | None = None
) -> float:
    """The scale by the kind of a tensor; `fan_in` None counts the entries of a slice of axis 0."""
    if kind == "norm_scale":
        return 0.5 if center == 0.0 else 1.0
    if kind == "vector":
        return 0.5
    if kind == "embedding":
        return math.sqrt(2.0 / max(1, param.shape[-1]))
    return math.sqrt(gain / max(1.0, fan_in if fan_in is not None else math.prod(param.shape[1:])))


def _fan_in(param: Tensor, owner: nn.Module) -> float | None:
    if isinstance(owner, _TRANSPOSED) and param.ndim > 1:
        return param.shape[0] / owner.groups * math.prod(owner.kernel_size) / math.prod(owner.stride)
    # transformers' Conv1D is a linear map whose weight is (inputs, outputs).
    if type(owner).__name__ == "Conv1D" and param.ndim == 2:
        return float(param.shape[0])
    return None


class _Tracer(fx.Tracer):
    """Looks into containers and no further: a layer is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` is one node."""
        return not isinstance(m, nn.Sequential)


def _after_activations(model: nn.Module) -> set[str]:
    """Paths of the layers whose input comes out of a ReLU or GELU."""
    found: set[str] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            if _is_activation(module.activation):
                found.add(f"{prefix}linear2")
        elif any(True for _ in module.children()) and not type(module).__module__.startswith("torch.nn.modules.trans"):
            found.update(prefix + name for name in _traced(module))
    return found


def _traced(module: nn.Module) -> Iterator[str]:
    """Names below `module` of its layers behind an activation; nothing if its `forward` cannot be traced."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            # Tracing runs `forward`: what it assigns to the module must stay on a copy.
            twin = copy.copy(module)
            for registry in ("_modules", "_parameters", "_buffers"):
                twin.__dict__[registry] = dict(module.__dict__[registry])
            graph = _Tracer().trace(twin)
    except Exception:
        return
    children = dict(twin.named_modules())
    for node in graph.nodes:
        is_layer = node.op == "call_module" and isinstance(children[node.target], (*_LINEAR, *_TRANSPOSED))
        is_layer = is_layer or (node.op == "call_module" and type(children[node.target]).__name__ == "Conv1D")
        if is_layer and node.args and _is_activated(node.args[0], children):
            yield str(node.target)


def _is_activated(value: object, children: Mapping[str, nn.Module]) -> bool:
    """Whether a value of a graph comes out of an activation, perhaps through what hands it on."""
    while isinstance(value, fx.Node):
        if value.op == "call_module":
            module = children[str(value.target)]
            if _is_activation(module):
                return True
            passing = isinstance(module, _PASSING_MODULES)
        else:
            name = value.target if isinstance(value.target, str) else getattr(value.target, "__name__", "")
            if value.op in ("call_function", "call_method") and _ACTIVATIONS.search(name):
                return True
            passing = name in _PASSING_CALLS
        if not passing or not value.args:
            return False
        value = value.args[0]
    return False


def _is_activation(value: object) -> bool:
    name = type(value).__name__ if isinstance(value, nn.Module) else getattr(value, "__name__", "")
    return _ACTIVATIONS.search(name) is not None


def scaled_groups(params: ParamsT, scales: Mapping[str, float] | float) -> list[dict[str, Any]]:
    """The groups, divided so that each holds tensors of one scale."""
    if not isinstance(scales, Mapping):
        check_real("scales", scales, low=0.0, low_open=True)
    entries: list[Any] = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    divided: list[dict[str, Any]] = []
    for group in groups:
        if group.get("scale") is not None:
            divided.append(group)
            continue
        if not isinstance(scales, Mapping):
            divided.append({**group, "scale": float(scales)})
            continue
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = group.get("param_names") or [m[0] if isinstance(m, tuple) else None for m in members]
        parts: dict[float, dict[str, Any]] = {}
        for name, member in zip(names, members, strict=True):
            if name is None:
                raise ValueError("scales by name need named parameters, such as model.named_parameters()")
            if name not in scales:
                raise ValueError(f"scales must hold every parameter, got none for {name!r}")
            scale = check_real(f"scales[{name!r}]", scales[name], low=0.0, low_open=True)
            part = parts.setdefault(scale, {**group, "scale": scale, "params": []})
            part["params"].append(member)
            if "param_names" in group:
                part["param_names"] = [*(part["param_names"] if len(part["params"]) > 1 else []), name]
        divided += parts.values()
    return divided
