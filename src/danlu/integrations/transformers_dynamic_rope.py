"""transformers: attention on keys that are cached without rotation, whose frequencies follow the length; and log-n.

Only public extension points are used: the attention and mask interfaces, and submodules of one model instance. No class
and no module of transformers is changed.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from danlu._common.checks import check_integer, check_real
from danlu.attention import dynamic_rope_attention, rerope_decode, rope_attention
from danlu.integrations.transformers_rerope import _SETTINGS, _mask, _read, _Unrotated, _Visibility
from danlu.integrations.transformers_rerope_models import (
    attention_modules,
    is_local,
    refuse_what_cannot_work,
    rotary_modules,
    unrotated_modules,
)
from danlu.positions import dynamic_factor

__all__ = ["AttentionPatch", "DynamicRopeExtension", "FrequencyRule"]

_NAME = "danlu_rope"


@dataclass(frozen=True)
class FrequencyRule:
    """Options of [`dynamic_rope_attention`][danlu.attention.dynamic_rope_attention], checked."""

    inv_freq: Tensor
    train_length: int
    factor: float
    method: Literal["linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed", "by-parts"]
    mixed_power: float
    step: int | None

    def __post_init__(self) -> None:
        """Raise as the function would."""
        dynamic_factor(0, train_length=self.train_length, factor=self.factor)
        check_real("mixed_power", self.mixed_power, low=0.0)
        if self.step is not None:
            check_integer("step", self.step, low=1)

    def options(self, device: torch.device) -> dict[str, Any]:
        """As arguments of the function."""
        return {
            "inv_freq": self.inv_freq.to(device),
            "train_length": self.train_length,
            "factor": self.factor,
            "method": self.method,
            "mixed_power": self.mixed_power,
            "step": self.step,
        }


@dataclass(frozen=True)
class _Settings:
    """What the attention function needs to know. Without a rule queries and keys arrive rotated, if the layer does."""

    rule: FrequencyRule | None
    logn: Literal["post"] | None
    train_length: int
    seen: list[tuple[Callable[[], Tensor | None], _Visibility]] = field(default_factory=list)

    def visibility(self, mask: Tensor, queries: int) -> _Visibility:
        """What a mask says, by mask object: looking waits for the device, so once per forward."""
        for reference, found in self.seen:
            if reference() is mask:
                return found
        found = _read(mask, queries)
        if found.by_mask:
            # Generation with a static cache copies the mask, without what was noted on it.
            found = _as_padding(mask, queries, found.end) or found
        self.seen[:] = [*self.seen[-1:], (weakref.ref(mask), found)]
        return found


def _as_padding(mask: Tensor, queries: int, end: int) -> _Visibility | None:
    """What a mask says if it is nothing but a causal one with padding."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    padding = seen[:, 0, -1, :end]
    slots = torch.arange(end, device=mask.device)
    causal = slots <= slots[end - queries :, None]
    if seen.shape[1] != 1 or not torch.equal(seen[:, 0, :, :end], causal & padding[:, None]):
        return None
    return _Visibility(end, True, None if bool(padding.all()) else padding)


class AttentionPatch:
    """Puts the attention function into a model; `remove()` takes it out."""

    def __init__(
        self,
        model: PreTrainedModel,
        rule: FrequencyRule | None,
        logn: Literal["post"] | None,
        train_length: int,
    ) -> None:
        self._model = model
        rotary = rotary_modules(model)
        self._modules = attention_modules(model)
        if any(is_local(module, model.config) for module in self._modules):
            raise ValueError(
                f"{type(model).__name__} cannot be extended: it has layers with a sliding window, which is within the "
                "trained positions; a static factor without logn leaves those with frequencies of their own alone"
            )
        refuse_what_cannot_work(model, rotary, False, patched=_SETTINGS)
        # Layers that do not rotate have no positions.
        still = set() if rule is None else unrotated_modules(model, rotary[0][2])
        self._rotary = None if rule is None else rotary[0]
        self._implementation = str(model.config._attn_implementation)
        # Both, or padding would be ignored: without a mask function the attention gets no mask.
        AttentionInterface.register(_NAME, _forward)
        AttentionMaskInterface.register(_NAME, _mask)
        settings = _Settings(rule, logn, train_length)
        plain = _Settings(None, logn, train_length)
        for module in self._modules:
            # An attribute and not a submodule or buffer, so that the state dict is as it was.
            object.__setattr__(module, _SETTINGS, plain if module in still else settings)
        if self._rotary is not None:
            parent, name, original = self._rotary
            setattr(parent, name, _Unrotated(original))
        model.set_attn_implementation(_NAME)

    def remove(self) -> None:
        """Restore the rotary module and the attention."""
        if self._rotary is not None:
            parent, name, original = self._rotary
            setattr(parent, name, original)
        for module in self._modules:
            object.__delattr__(module, _SETTINGS)
        self._model.set_attn_implementation(self._implementation)


class DynamicRopeExtension:
    """A model whose frequencies follow the length; `remove()`, or the end of a `with` block, restores it exactly.

    Args:
        model: the model, changed in place.
        rule: how the frequencies follow.
        logn: None, or "post".
    """

    def __init__(self, model: PreTrainedModel, rule: FrequencyRule, logn: Literal["post"] | None) -> None:
        self.model = model
        self.rule = rule
        self._patch: AttentionPatch | None = AttentionPatch(model, rule, logn, rule.train_length)

    def remove(self) -> None:
        """Restore the model; a second call does nothing."""
        if self._patch is not None:
            self._patch.remove()
        self._patch = None

    def __enter__(self) -> "DynamicRopeExtension":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


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
    """The attention function: positions are slots of the cache, of which padding is taken out."""
    settings = getattr(module, _SETTINGS, None)
    if not isinstance(settings, _Settings):
        raise TypeError("this attention module is not extended")
    if dropout and module.training:
        raise ValueError("extended attention is for inference, or for training without attention dropout")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"extended attention does not know the option {name!r} of this model's attention")
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
    options: dict[str, Any] = {"scale": scaling, "key_padding_mask": seen.key_padding_mask}
    if settings.logn is not None:
        options |= {"logn": settings.logn, "train_length": settings.train_length}
    if settings.rule is not None:
        if seen.by_mask:
            raise ValueError("packed texts and masks of one's own have no length that frequencies could follow")
        options |= {"is_causal": seen.is_causal, **settings.rule.options(query.device)}
        out = dynamic_rope_attention(query, key[:, :, :end], value[:, :, :end], **options)
    else:
        # Rotated already, or never: frequencies of 0 rotate by nothing.
        options["inv_freq"] = torch.zeros(1, dtype=torch.float64, device=query.device)
        if queries == 1 and not seen.by_mask:
            out = rerope_decode(query, key[:, :, :end], value[:, :, :end], window=end, **options)
        else:
            mask = attention_mask[..., :end] if attention_mask is not None and seen.by_mask else None
            options |= {"is_causal": seen.is_causal, "attn_mask": mask}
            out = rope_attention(query, key[:, :, :end], value[:, :, :end], **options)
    return out.transpose(1, 2).contiguous(), None
