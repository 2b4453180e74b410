"""transformers: which models ReRoPE can be put into, and why not the others."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from danlu.positions import apply_rope

__all__ = [
    "attention_modules",
    "frequencies",
    "is_local",
    "kind_prefix",
    "refuse_what_cannot_work",
    "rope_parameters",
    "rotary_modules",
    "unrotated_modules",
]

_FULL, _LOCAL = "full_attention", "sliding_attention"
_PROBE = "danlu_rerope_probe"


def rotary_modules(model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of every rotary embedding."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "rope_type")
    ]


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of every layer."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]


def kind_prefix(rotary: nn.Module) -> str:
    """Of the attributes of a rotary module that has frequencies by kind of layer; else empty."""
    return f"{_FULL}_" if isinstance(getattr(rotary, "rope_type", None), dict) else ""


def frequencies(rotary: nn.Module) -> Tensor:
    """Those of layers with full attention."""
    found = getattr(rotary, f"{kind_prefix(rotary)}inv_freq", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"{type(rotary).__name__} has no frequencies")
    return found.detach()


def rope_parameters(config: Any) -> dict[str, Any]:
    """Those of layers with full attention."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get(_FULL) or parameters


def is_local(module: nn.Module, config: Any) -> bool:
    """Whether the layer has a sliding window."""
    return _kind(module, config) == _LOCAL


def _kind(module: nn.Module, config: Any) -> str:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return str(types[int(str(module.layer_idx))])
    slides = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    return _FULL if slides is None else _LOCAL


def refuse_what_cannot_work(
    model: PreTrainedModel,
    rotary: list[tuple[nn.Module, str, nn.Module]],
    full_attention_only: bool,
    *,
    patched: str,
) -> None:
    """Raise `ValueError` with the reason; `patched` is the attribute that marks attention modules."""
    config, attention = model.config, attention_modules(model)
    if any(hasattr(module, patched) for module in attention):
        raise _refusal(model, "it is patched already; remove the first patch")
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(model, "it has cross attention")
    if getattr(config, "sub_configs", None):
        raise _refusal(model, "it has parts with configurations of their own; patch its language model instead")
    if not rotary:
        raise _refusal(model, "it has no rotary position embedding")
    if not getattr(model, "_supports_attention_backend", False) or not attention:
        raise _refusal(model, "its attention does not go through transformers' AttentionInterface")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise _refusal(model, "latent attention rotates a part of the keys after caching")
    if any(getattr(module, "attn_logit_softcapping", None) is not None for module in attention):
        raise _refusal(model, "its scores are soft-capped")
    if any(hasattr(module, "sinks") for module in attention):
        raise _refusal(model, "it has attention sinks")
    kinds = {_kind(module, config) for module in attention}
    if not kinds <= {_FULL, _LOCAL}:
        raise _refusal(model, f"it has layers of other kinds: {', '.join(sorted(kinds - {_FULL, _LOCAL}))}")
    if _LOCAL in kinds and not full_attention_only:
        raise _refusal(
            model,
            "it has layers with a sliding window, which is within the trained positions already; "
            "full_attention_only=True leaves them alone",
        )
    if _FULL not in kinds:
        raise _refusal(model, "all of its layers have a sliding window")
    if len(rotary) > 1 or any(isinstance(value, dict) for value in rope_parameters(config).values()):
        raise _refusal(model, "its layers have different rotary embeddings")
    kind = getattr(rotary[0][2], "rope_type", "default")
    kind = kind.get(_FULL) if isinstance(kind, dict) else kind
    if kind in ("dynamic", "longrope"):
        raise _refusal(model, f"rope_type {kind!r} changes its frequencies with the length")
    if "mrope_section" in rope_parameters(config):
        raise _refusal(model, "its positions have several kinds")


def _refusal(model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be patched: {reason}")


@torch.no_grad()
def unrotated_modules(model: PreTrainedModel, rotary: nn.Module) -> set[nn.Module]:
    """The attention modules that do not rotate; raise `ValueError` if one rotates in another way than by halves.

    Each module is run on a few random vectors, and the queries and keys that reach the attention function are compared.
    """
    seen: list[Tensor] = []

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        seen.extend((query, key))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(_PROBE, record)
    before, found = str(model.config._attn_implementation), set()
    positions = torch.arange(1, 5, device=model.device)
    hidden = torch.randn(1, 4, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device=model.device, dtype=model.dtype)
    model.set_attn_implementation(_PROBE)
    try:
        for module in attention_modules(model):
            kinds = (_kind(module, model.config),) if kind_prefix(rotary) else ()
            if _LOCAL in kinds:
                # Its rotary tables are left as they are.
                continue
            cos, sin = rotary(hidden, positions[None], *kinds)
            level = float(getattr(rotary, f"{kind_prefix(rotary)}attention_scaling", 1.0))
            seen.clear()
            for tables in ((cos, sin), (torch.full_like(cos, level), torch.zeros_like(sin))):
                _run(module, hidden, tables, positions[None])
            rotated, plain = torch.cat(seen[:2], 1).double(), torch.cat(seen[2:], 1).double()
            expected = apply_rope(plain, positions, frequencies(rotary))
            # Half precision is off by a hundredth, another way to rotate by about one.
            if (rotated - expected).norm() <= 0.05 * plain.norm():
                continue
            if not torch.equal(rotated, plain):
                raise _refusal(model, "it does not rotate channels in halves")
            found.add(module)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise _refusal(model, f"its attention could not be tried out ({error})") from error
    finally:
        model.set_attn_implementation(before)
    return found


def _run(module: nn.Module, hidden: Tensor, tables: tuple[Tensor, Tensor], positions: Tensor) -> None:
    options = {"position_embeddings": tables, "attention_mask": None, "position_ids": positions}
    taken = inspect.signature(module.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        names = {parameter.name for parameter in taken}
        options = {name: value for name, value in options.items() if name in names}
    module(hidden, **options)
