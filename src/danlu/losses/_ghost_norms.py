r"""Norms of per-sample parameter gradients from inputs and output gradients of layers, without those gradients.

Source: Goodfellow (2015), "Efficient Per-Example Gradient Computations", arXiv 1510.01799; for sequences Li et al.
(2021), "Large Language Models Can Be Strong Differentially Private Learners", arXiv 2110.05679. Here as a
differentiable quantity.

Shape letters: `B` samples, `T` positions of a sample (all axes between the first and the last), `D` inputs and `O`
outputs of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.losses._second_gradients import differentiable_gradients, graph_leaves

__all__ = ["check_per_sample", "per_sample_squared_norms"]

_SUPPORTED = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its input and output, and what they were when they were seen."""

    input: Tensor
    output: Tensor
    version: int
    node: object


def check_per_sample(model: nn.Module) -> dict[nn.Module, str]:
    """Layers with trainable parameters of their own and their names; raise `ValueError` if one is not supported."""
    layers: dict[nn.Module, str] = {}
    owners: dict[Tensor, str] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(f"scope='per_sample' is undefined with {name!r} ({kind}), which mixes samples in training")
        own = {key: param for key, param in module.named_parameters(recurse=False) if param.requires_grad}
        if not own:
            continue
        if not any(type(module).forward is known.forward for known in _SUPPORTED):
            raise ValueError(
                f"scope='per_sample' does not support {name!r} ({kind}), which has trainable parameters; freeze it, or "
                "give an nn.ModuleList of the Linear, Embedding, LayerNorm and RMSNorm layers to penalize"
            )
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            raise ValueError(f"scope='per_sample' does not support max_norm or scale_grad_by_freq, found in {name!r}")
        for key, param in own.items():
            full = f"{name}.{key}" if name else key
            if param in owners:
                raise ValueError(
                    f"scope='per_sample' does not support tied parameters: {full!r} is {owners[param]!r}; untie them, "
                    "or give an nn.ModuleList without one of the layers"
                )
            owners[param] = full
        layers[module] = name
    if not layers:
        raise ValueError("model has no trainable parameters")
    return layers


def per_sample_squared_norms(loss: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
    r"""The loss and $\|\nabla_\theta \ell_i\|^2$ of every sample, both with a graph.

    `loss` returns one value per sample, shape `(B,)`, or their mean; $\theta$ are the trainable parameters of `model`.
    """
    layers = check_per_sample(model)
    calls: dict[nn.Module, list[_Call]] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = args[0] if args else kwargs["input"]
        calls.setdefault(module, []).append(_Call(given, output, given._version, output.grad_fn))

    handles = [module.register_forward_hook(remember, with_kwargs=True) for module in layers]
    try:
        losses = loss()
    finally:
        for handle in handles:
            handle.remove()
    _check_calls(losses, layers, calls)
    found = [(module, call) for module, several in calls.items() for call in several]
    samples = found[0][1].input.shape[0]
    if losses.ndim > 1 or (losses.ndim == 1 and losses.shape[0] != samples):
        raise ValueError(f"loss must have shape ({samples},) or be the mean, got shape {tuple(losses.shape)}")
    grads = differentiable_gradients(losses, [call.output for _, call in found])
    # The gradient of a mean is that of a sample over their number.
    scale = 1 if losses.ndim else samples
    pairs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for (module, call), grad in zip(found, grads, strict=True):
        if grad is not None:
            pairs.setdefault(module, []).append((call.input, grad * scale))
    total = losses.new_zeros(samples, dtype=torch.promote_types(losses.dtype, torch.float32))
    for module, several in pairs.items():
        total = total + _squared_norms(module, several).to(total.dtype)
    return losses, total


def _check_calls(losses: Tensor, layers: dict[nn.Module, str], calls: dict[nn.Module, list[_Call]]) -> None:
    """Raise if a gradient would be missed or be wrong."""
    uses = graph_leaves(losses)
    for module, name in layers.items():
        seen = calls.get(module, [])
        for param in module.parameters(recurse=False):
            if param.requires_grad and uses.get(param, 0) > len(seen):
                raise RuntimeError(
                    f"scope='per_sample': parameters of {name!r} are used outside of calls of that module "
                    "(compiled, bypassed or functional), so its gradient is not known"
                )
        for call in seen:
            if call.output.grad_fn is not call.node or call.input._version != call.version:
                raise RuntimeError(
                    f"scope='per_sample': an in-place operation changed the input or output of {name!r}; make it out "
                    "of place (inplace=False)"
                )
    sizes = {call.input.shape[:1] for several in calls.values() for call in several}
    if len(sizes) != 1 or not all(call.output.ndim > 1 for several in calls.values() for call in several):
        raise RuntimeError(
            "scope='per_sample': every layer must be called with the samples as first axis, "
            f"got first axes {sorted(tuple(size) for size in sizes)}"
        )


def _squared_norms(module: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    if isinstance(module, nn.Linear):
        return _linear(module, pairs)
    if isinstance(module, nn.Embedding):
        return _embedding(module, pairs)
    return _norm(module, pairs)


def _positions(tensors: list[Tensor], width: int) -> Tensor:
    """Shape `(B, T, width)`; several calls of one layer are further positions."""
    shaped = [tensor.reshape(tensor.shape[0], -1, width) for tensor in tensors]
    return shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=1)


def _linear(module: nn.Linear, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    delta = _positions([grad for _, grad in pairs], module.out_features)
    hidden = _positions([given for given, _ in pairs], module.in_features).to(delta.dtype)
    length = delta.shape[1]
    total = delta.new_zeros(delta.shape[0])
    if module.weight.requires_grad:
        if length == 1:
            total = total + delta.square().sum((1, 2)) * hidden.square().sum((1, 2))
        elif length * length < module.in_features * module.out_features:
            total = total + ((delta @ delta.mT) * (hidden @ hidden.mT)).sum((1, 2))
        else:
            total = total + (delta.mT @ hidden).square().sum((1, 2))
    if module.bias is not None and module.bias.requires_grad:
        total = total + delta.sum(1).square().sum(1)
    return total


def _embedding(module: nn.Embedding, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    delta = _positions([grad for _, grad in pairs], module.embedding_dim)
    index = torch.cat([given.reshape(given.shape[0], -1) for given, _ in pairs], dim=1)
    same = index[:, :, None] == index[:, None, :]
    if module.padding_idx is not None:
        same = same & (index != module.padding_idx)[:, :, None]
    return ((delta @ delta.mT) * same).sum((1, 2))


def _norm(module: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        raise TypeError(f"{type(module).__name__} is not a norm")
    shape, width = list(module.normalized_shape), 1
    for size in shape:
        width *= size
    delta = _positions([grad for _, grad in pairs], width)
    total = delta.new_zeros(delta.shape[0])
    if module.weight.requires_grad:
        if isinstance(module, nn.LayerNorm):
            normal = [F.layer_norm(given, shape, None, None, module.eps) for given, _ in pairs]
        else:
            normal = [F.rms_norm(given, shape, None, module.eps) for given, _ in pairs]
        total = total + (delta * _positions(normal, width)).sum(1).square().sum(1)
    bias = getattr(module, "bias", None)
    if bias is not None and bias.requires_grad:
        total = total + delta.sum(1).square().sum(1)
    return total
