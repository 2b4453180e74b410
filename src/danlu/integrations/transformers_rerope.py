"""transformers: ReRoPE for the RoPE models of transformers, without training.

Only public extension points are used: the attention and mask interfaces, and submodules of one model instance. No class
and no module of transformers is changed.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.attention import rerope_attention, rerope_decode
from danlu.integrations.transformers_rerope_models import (
    attention_modules,
    frequencies,
    is_local,
    kind_prefix,
    refuse_what_cannot_work,
    rope_parameters,
    rotary_modules,
    unrotated_modules,
)

__all__ = ["RopePatch", "patch_rope"]

_NAME = "danlu_rerope"
# Where attributes of ours are kept on attention modules and on masks.
_SETTINGS, _SLOTS = "danlu_rerope", "danlu_slots"


@dataclass(frozen=True)
class _Settings:
    """What the attention function needs to know; one object per patched kind of layer.

    Without a window a layer keeps plain RoPE. `rotated`: queries and keys arrive rotated, from a rotary module of their
    own.
    """

    window: int | None
    slope: float
    inv_freq: Tensor
    logn: Literal["post"] | None
    train_length: int
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
    dropout = dropout if module.training else 0.0
    out = _attend(settings, seen, query, key[:, :, :end], value[:, :, :end], mask, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


def _attend(
    settings: _Settings,
    seen: _Visibility,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    options: dict[str, Any] = {
        "window": key.shape[2] if settings.window is None else settings.window,
        "slope": settings.slope,
        "inv_freq": settings.inv_freq.to(query.device),
        "scale": scaling,
    }
    if settings.logn is not None:
        options |= {"logn": settings.logn, "train_length": settings.train_length}
    padding = seen.key_padding_mask
    if query.shape[2] == 1 and not dropout and (mask is None or (mask.shape[1] == 1 and mask.dtype == torch.bool)):
        if mask is not None:
            padding = mask[:, 0, 0]
        return rerope_decode(query, key, value, key_padding_mask=padding, **options)
    options |= {"is_causal": seen.is_causal, "key_padding_mask": padding, "attn_mask": mask, "dropout_p": dropout}
    return rerope_attention(query, key, value, **options)


class _Unrotated(nn.Module):
    """Stands in for a rotary module: the tables of no rotation, so that the cache holds keys as they are."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self._width = 2 * len(frequencies(original))
        self._scaling = float(getattr(original, f"{kind_prefix(original)}attention_scaling", 1.0))

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cosines of 1 (times the original's attention scaling) and sines of 0."""
        if "sliding_attention" in (*args, *kwargs.values()):
            return self.original(x, position_ids, *args, **kwargs)
        if position_ids.ndim > 2:
            raise ValueError(f"positions of {position_ids.shape[0]} kinds have no slots")
        cos = torch.full((*position_ids.shape, self._width), self._scaling, dtype=x.dtype, device=x.device)
        return cos, torch.zeros_like(cos)


class RopePatch:
    """A patched model; `remove()`, or the end of a `with` block, restores it exactly."""

    def __init__(
        self, model: PreTrainedModel, rotary: tuple[nn.Module, str, nn.Module], settings: _Settings, window: int
    ) -> None:
        self.model = model
        self.window = window
        self.train_length = settings.train_length
        self._parent, self._name, self._original = rotary
        self._attention = attention_modules(model)
        self._implementation = str(model.config._attn_implementation)
        self._active = True
        # The window of local layers is within the trained positions, so they keep plain RoPE.
        local = replace(settings, window=None, logn=None, rotated=bool(kind_prefix(self._original)))
        # Layers that do not rotate have no positions; frequencies of 0 rotate by nothing.
        still = replace(settings, window=None, inv_freq=torch.zeros(1, dtype=torch.float64))
        unrotated = unrotated_modules(model, self._original)
        for module in self._attention:
            kind = local if is_local(module, model.config) else still if module in unrotated else settings
            # An attribute and not a submodule or buffer, so that the state dict is as it was.
            object.__setattr__(module, _SETTINGS, kind)
        setattr(self._parent, self._name, _Unrotated(self._original))
        model.set_attn_implementation(_NAME)

    def remove(self) -> None:
        """Restore rotary modules and attention; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        setattr(self._parent, self._name, self._original)
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
            place. Every layer is tried on a few random vectors first, to see that it rotates as it should; layers that
            do not rotate at all, such as some of SmolLM3's, have no positions and stay as they are.
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
    rotary = rotary_modules(model)
    refuse_what_cannot_work(model, rotary, full_attention_only, patched=_SETTINGS)
    trained = int(model.config.max_position_embeddings)
    if window is None:
        window = max(1, trained // 2)
    if train_length is None:
        train_length = max(2, int(rope_parameters(model.config).get("original_max_position_embeddings", trained)))
    # Both, or padding would be ignored: without a mask function the attention gets no mask.
    AttentionInterface.register(_NAME, _forward)
    AttentionMaskInterface.register(_NAME, _mask)
    inv_freq = frequencies(rotary[0][2]).to(torch.float64)
    return RopePatch(model, rotary[0], _Settings(window, slope, inv_freq, logn, train_length), window)
