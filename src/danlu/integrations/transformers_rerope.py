"""transformers: ReRoPE for the RoPE models of transformers, without training.

Only public extension points are used: the attention and mask interfaces, and submodules of one model instance. No class
and no module of transformers is changed.
"""

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.attention import rerope_attention, rerope_decode

__all__ = ["RopePatch", "patch_rope"]

_NAME = "danlu_rerope"
# Where attributes of ours are kept on attention modules and on masks.
_SETTINGS, _SLOTS = "danlu_rerope", "danlu_slots"
_FULL, _LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class _Settings:
    """What the attention function needs to know; one object per patched kind of layer.

    A local layer keeps plain RoPE. `rotated`: its queries and keys arrive rotated, from a rotary module of its own.
    """

    window: int
    slope: float
    inv_freq: Tensor
    logn: Literal["post"] | None
    train_length: int
    local: bool = False
    rotated: bool = False
    seen: list[tuple[Callable[[], Tensor | None], "_Visibility"]] = field(default_factory=list)

    def visibility(self, mask: Tensor, queries: int) -> "_Visibility":
        """What a mask says, by mask object: looking waits for the device, so once per forward."""
        for reference, found in self.seen:
            if reference() is mask:
                return found
        found = _read(mask, queries)
        self.seen[:] = [*self.seen[-1:], (weakref.ref(mask), found)]
        return found


@dataclass(frozen=True)
class _Visibility:
    """The slot behind the newest query, and what hides slots before it; static caches have slots beyond it.

    `by_mask`: the mask itself hides what there is to hide. Its slices are not kept here, since they hold its memory.
    """

    end: int
    is_causal: bool
    key_padding_mask: Tensor | None = None
    by_mask: bool = False


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function: that of SDPA, with a note of the queries' first slot and of the padding."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or "q_offset" not in kwargs or torch.compiler.is_compiling():
        return mask
    kv_offset = int(kwargs.get("kv_offset", 0))
    # Other functions: packed sequences, windows, blocks that see each other.
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    setattr(mask, _SLOTS, (int(kwargs["q_offset"]) - kv_offset, plain, kwargs.get("attention_mask"), kv_offset))
    return mask


def _read(mask: Tensor, queries: int) -> _Visibility:
    noted = getattr(mask, _SLOTS, None)
    if noted is None:
        # Of someone else's making; the newest query sees itself, and it may see more than the past.
        last = mask[:, :, -1].flatten(0, 1)
        visible = (last > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else last).any(dim=0)
        end = int(visible.nonzero().amax().item()) + 1 if bool(visible.any()) else mask.shape[-1]
        end = max(end, queries)
        return _Visibility(end, is_causal=False, by_mask=True)
    offset, plain, padding, kv_offset = noted
    end = offset + queries
    if not plain:
        return _Visibility(end, is_causal=False, by_mask=True)
    if padding is None:
        return _Visibility(end, is_causal=True)
    padding = padding[:, kv_offset : kv_offset + end].to(device=mask.device, dtype=torch.bool)
    padding = nn.functional.pad(padding, (0, end - padding.shape[1]))
    return _Visibility(end, True, None if bool(padding.all()) else padding)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function: positions are slots of the cache, which is all that relative positions need."""
    settings = getattr(module, _SETTINGS, None)
    if not isinstance(settings, _Settings):
        raise TypeError("this attention module is not patched")
    if settings.rotated:
        options = {**kwargs, "scaling": scaling, "dropout": dropout}
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
    if dropout and module.training:
        raise ValueError("ReRoPE is for inference, or for training without attention dropout")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"ReRoPE does not know the option {name!r} of this model's attention")
    queries = query.shape[2]
    if attention_mask is not None:
        seen = settings.visibility(attention_mask, queries)
    else:
        positions = kwargs.get("position_ids")
        # Without a mask there is no padding, so the first query's position is its slot.
        end = key.shape[2]
        if isinstance(positions, Tensor) and end > queries:
            end = min(end, int(positions[0, 0].item()) + queries)
        seen = _Visibility(end, bool(getattr(module, "is_causal", True)))
    end = min(seen.end, key.shape[2])
    mask = attention_mask[..., :end] if attention_mask is not None and seen.by_mask else None
    out = _attend(settings, seen, query, key[:, :, :end], value[:, :, :end], mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def _attend(
    settings: _Settings,
    seen: _Visibility,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    options: dict[str, Any] = {
        # Local layers keep plain RoPE: their window is within the trained positions.
        "window": key.shape[2] if settings.local else settings.window,
        "slope": settings.slope,
        "inv_freq": settings.inv_freq.to(query.device),
        "scale": scaling,
    }
    if settings.logn is not None and not settings.local:
        options |= {"logn": settings.logn, "train_length": settings.train_length}
    padding = seen.key_padding_mask
    if query.shape[2] == 1 and (mask is None or (mask.shape[1] == 1 and mask.dtype == torch.bool)):
        if mask is not None:
            padding = mask[:, 0, 0]
        return rerope_decode(query, key, value, key_padding_mask=padding, **options)
    options |= {"is_causal": seen.is_causal, "key_padding_mask": padding, "attn_mask": mask}
    return rerope_attention(query, key, value, **options)


class _Unrotated(nn.Module):
    """Stands in for a rotary module: the tables of no rotation, so that the cache holds keys as they are."""

    def __init__(self, original: nn.Module, prefix: str) -> None:
        super().__init__()
        self.original = original
        self._width = 2 * len(_frequencies(original, prefix))
        self._scaling = float(getattr(original, f"{prefix}attention_scaling", 1.0))

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cosines of 1 (times the original's attention scaling) and sines of 0."""
        if _LOCAL in (*args, *kwargs.values()):
            return self.original(x, position_ids, *args, **kwargs)
        if position_ids.ndim > 2:
            raise ValueError(f"positions of {position_ids.shape[0]} kinds have no slots")
        cos = torch.full((*position_ids.shape, self._width), self._scaling, dtype=x.dtype, device=x.device)
        return cos, torch.zeros_like(cos)


class RopePatch:
    """A patched model; `remove()`, or the end of a `with` block, restores it exactly."""

    def __init__(
        self, model: PreTrainedModel, rotary: list[tuple[nn.Module, str, nn.Module]], settings: _Settings
    ) -> None:
        self.model = model
        self.window = settings.window
        self.train_length = settings.train_length
        self._rotary = rotary
        self._attention = _attention_modules(model)
        self._implementation = str(model.config._attn_implementation)
        self._active = True
        prefix = _prefix(rotary[0][2])
        for parent, name, original in rotary:
            setattr(parent, name, _Unrotated(original, prefix))
        local = _Settings(
            settings.window, settings.slope, settings.inv_freq, None, settings.train_length, True, bool(prefix)
        )
        for module in self._attention:
            # An attribute and not a submodule or buffer, so that the state dict is as it was.
            object.__setattr__(module, _SETTINGS, local if _is_local(module, model.config) else settings)
        model.set_attn_implementation(_NAME)

    def remove(self) -> None:
        """Restore rotary modules and attention; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        for parent, name, original in self._rotary:
            setattr(parent, name, original)
        for module in self._attention:
            object.__delattr__(module, _SETTINGS)
        self.model.set_attn_implementation(self._implementation)

    def __enter__(self) -> "RopePatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def patch_rope(
    model: PreTrainedModel,
    *,
    method: Literal["rerope"] = "rerope",
    window: int | None = None,
    slope: float = 0.0,
    logn: Literal["post"] | None = None,
    train_length: int | None = None,
    full_attention_only: bool = False,
) -> RopePatch:
    r"""Let a RoPE model read text beyond its training length, without training.

    Definition:
        Every attention of the model becomes [`rerope_attention`][danlu.attention.rerope_attention]. Keys are cached
        without rotation and positions are slots of the cache, so left padding, packed batches, dynamic and static
        caches, greedy and beam search work as before.

    Args:
        model: a model of transformers with RoPE in halves (Llama, Qwen, Mistral, Phi-3 and relatives). It is changed in
            place.
        method: "rerope".
        window: $w \ge 1$ (tokens); None means half of `max_position_embeddings`. Tune it first.
        slope: $\rho \ge 0$; above 0 is Leaky ReRoPE.
        logn: "post" sharpens the attention of queries that see more keys than in training, by
            $\max(1, \log n / \log T)$ with the number $n$ of visible keys.
        train_length: $T$ of `logn` (tokens); None means `max_position_embeddings`, or
            `original_max_position_embeddings` of a model whose positions are scaled already.
        full_attention_only: whether a model that also has layers with a sliding window may be patched; those keep plain
            RoPE, since their window is within the trained positions.

    Returns:
        A handle: `handle.remove()`, or leaving a `with` block, restores the model bit for bit.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: an option is out of its range, or the model cannot be patched: it has no RoPE, rotates neighboring
            channels, has layers with a sliding window (without `full_attention_only`) or of other kinds, latent
            attention, soft-capped scores, attention sinks, cross attention or other modalities, frequencies that change
            with the length or with the layer, bypasses the attention interface, or is patched already. The message has
            the reason.

    Numerics:
        As in [`rerope_attention`][danlu.attention.rerope_attention]; with a window beyond the text the model's output
        is that of the unpatched one up to the rounding of its float32 angles. Positions that are padding give 0.

    Cost:
        As in [`rerope_attention`][danlu.attention.rerope_attention] and, for one token,
        [`rerope_decode`][danlu.attention.rerope_decode]; transformers itself holds a mask of all pairs, in bool, if
        there is padding.

    Source:
        "Transformer升级之路:12、无限外推的ReRoPE?" (2023-08-07).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from danlu.integrations.transformers import patch_rope
        >>> config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=2, max_position_embeddings=8)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with patch_rope(model) as handle:
        ...     print(handle.window, model(torch.arange(16)[None]).logits.shape)
        4 torch.Size([1, 16, 16])
    """
    check_choice("method", method, ("rerope",))
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if window is not None:
        check_integer("window", window, low=1)
    check_real("slope", slope, low=0.0)
    if logn is not None:
        check_choice("logn", logn, ("post",))
    elif train_length is not None:
        raise ValueError(f"train_length is of use with logn only, got {train_length} without it")
    if train_length is not None:
        check_integer("train_length", train_length, low=2)
    rotary = _rotary_modules(model)
    _refuse_what_cannot_work(model, rotary, full_attention_only)
    trained = int(model.config.max_position_embeddings)
    if window is None:
        window = max(1, trained // 2)
    if train_length is None:
        train_length = max(2, int(_rope_parameters(model.config).get("original_max_position_embeddings", trained)))
    # Both, or padding would be ignored: without a mask function the attention gets no mask.
    AttentionInterface.register(_NAME, _forward)
    AttentionMaskInterface.register(_NAME, _mask)
    frequencies = _frequencies(rotary[0][2], _prefix(rotary[0][2])).to(torch.float64)
    return RopePatch(model, rotary, _Settings(window, slope, frequencies, logn, train_length))


def _prefix(rotary: nn.Module) -> str:
    """Of the attributes of a rotary module that has frequencies by kind of layer."""
    return f"{_FULL}_" if isinstance(getattr(rotary, "rope_type", None), dict) else ""


def _frequencies(rotary: nn.Module, prefix: str) -> Tensor:
    frequencies = getattr(rotary, f"{prefix}inv_freq", None)
    if not isinstance(frequencies, Tensor):
        raise ValueError(f"{type(rotary).__name__} has no frequencies")
    return frequencies.detach()


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Those of the layers with full attention."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get(_FULL) or parameters


def _rotary_modules(model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of every rotary embedding."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "rope_type") and not isinstance(parent, _Unrotated)
    ]


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]


def _layer_type(module: nn.Module, config: Any) -> str:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return str(types[int(str(module.layer_idx))])
    slides = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    return _FULL if slides is None else _LOCAL


def _is_local(module: nn.Module, config: Any) -> bool:
    return _layer_type(module, config) == _LOCAL


def _refuse_what_cannot_work(
    model: PreTrainedModel, rotary: list[tuple[nn.Module, str, nn.Module]], full_attention_only: bool
) -> None:
    name, config = type(model).__name__, model.config

    def refuse(reason: str) -> None:
        raise ValueError(f"{name} cannot be patched: {reason}")

    attention = _attention_modules(model)
    if any(hasattr(module, _SETTINGS) for module in attention):
        refuse("it is patched already; remove the first patch")
    if getattr(config, "is_encoder_decoder", False):
        refuse("it has cross attention")
    if getattr(config, "sub_configs", None):
        refuse("it has parts with configurations of their own; patch its language model instead")
    if not rotary:
        refuse("it has no rotary position embedding")
    if not getattr(model, "_supports_attention_backend", False) or not attention:
        refuse("its attention does not go through transformers' AttentionInterface")
    if getattr(config, "kv_lora_rank", None) is not None:
        refuse("latent attention rotates a part of the keys after caching")
    if any(getattr(module, "attn_logit_softcapping", None) is not None for module in attention):
        refuse("its scores are soft-capped")
    if any(hasattr(module, "sinks") for module in attention):
        refuse("it has attention sinks")
    kinds = {_layer_type(module, config) for module in attention}
    if not kinds <= {_FULL, _LOCAL}:
        refuse(f"it has layers of other kinds: {', '.join(sorted(kinds - {_FULL, _LOCAL}))}")
    if _LOCAL in kinds and not full_attention_only:
        refuse(
            "it has layers with a sliding window, which is within the trained positions already; "
            "full_attention_only=True leaves them alone"
        )
    if _FULL not in kinds:
        refuse("all of its layers have a sliding window")
    parameters = _rope_parameters(config)
    if len(rotary) > 1 or any(isinstance(value, dict) for value in parameters.values()):
        refuse("its layers have different rotary embeddings")
    kind = getattr(rotary[0][2], "rope_type", "default")
    kind = kind.get(_FULL) if isinstance(kind, dict) else kind
    if kind in ("dynamic", "longrope"):
        refuse(f"rope_type {kind!r} changes its frequencies with the length")
    rotate_half = getattr(sys.modules[type(attention[0]).__module__], "rotate_half", None)
    if rotate_half is None or rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        refuse("it does not rotate channels in halves")
