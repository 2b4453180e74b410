"""transformers: token losses for its Trainer, and ReRoPE for its RoPE models.

Only public extension points are used: `Trainer(compute_loss_func=...)`, the attention and mask interfaces, and
submodules of one model instance. No class and no module of transformers is changed.
"""

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.attention import rerope_attention

__all__ = ["RopePatch", "patch_rope", "token_loss"]

_NAME = "danlu_rerope"


class TokenLoss(Protocol):
    """A loss of logits `(..., V)` and targets `(...)`, such as `danlu.losses.tailr_loss` or a `partial` of it."""

    def __call__(self, input: Tensor, target: Tensor, *, ignore_index: int, reduction: Any, normalizer: Any) -> Tensor:
        """Return the reduced loss."""
        ...


def token_loss(
    loss: TokenLoss, *, shift: bool = True, ignore_index: int = -100
) -> Callable[[Any, Tensor, Any], Tensor]:
    r"""A token loss as `compute_loss_func` of `transformers.Trainer`.

    Definition:
        $$\frac{1}{N} \sum_{n} L(z_n, y_{n+1})$$
        over the labels that are not ignored, with $N$ the number of such labels in *all* micro-batches of the step, so
        that gradient accumulation gives the gradient of one large batch. With `shift=False` logits and labels are
        paired as they are.

    Args:
        loss: such as `danlu.losses.tailr_loss`, or `functools.partial(tailr_loss, gamma=0.3)`.
        shift: pair the logits of a position with the label of the next, as causal language models need.
        ignore_index: label that counts for nothing.

    Returns:
        A function of (outputs, labels, num_items_in_batch). Without that number it divides by the labels at hand.

    Raises:
        TypeError: `loss` is not callable.

    Numerics:
        As in the loss.

    Differences:
        With a `compute_loss_func` the Trainer does not divide by the number of accumulation steps, so a function that
        returned the mean of its micro-batch would make gradients too large by that number.

    Source:
        transformers' documentation of `Trainer.compute_loss_func`.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from danlu.integrations.transformers import token_loss
        >>> from danlu.losses import tailr_loss
        >>> compute_loss = token_loss(partial(tailr_loss, gamma=1.0))
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]])
        >>> compute_loss({"logits": logits}, labels).item()
        0.75
    """
    if not callable(loss):
        raise TypeError(f"loss must be callable, got {type(loss).__name__}")

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: float | Tensor | None = None) -> Tensor:
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        targets = labels.to(logits.device)
        if shift:
            # The last position predicts nothing; moving the small labels avoids a copy of the logits.
            targets = torch.nn.functional.pad(targets, (0, 1), value=ignore_index)[..., 1:]
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        return loss(logits, targets, ignore_index=ignore_index, reduction="mean", normalizer=num_items_in_batch)

    return compute_loss


@dataclass(eq=False)
class _Settings:
    """What the attention function needs to know; one object per patched model."""

    window: int
    slope: float
    inv_freq: Tensor
    # Slot after the last visible key, by mask object: looking waits for the device, so once per forward.
    last_mask: Callable[[], Tensor | None] = lambda: None
    last_end: int = 0

    def end_of(self, mask: Tensor) -> int:
        """The slot after the newest query, which sees the newest key: static caches are longer than that."""
        if self.last_mask() is not mask:
            seen = mask[:, :, -1].flatten(0, 1).any(dim=0)
            self.last_end = int(seen.nonzero().max().item()) + 1 if bool(seen.any()) else mask.shape[-1]
            self.last_mask = weakref.ref(mask)
        return self.last_end


class _Unrotated(nn.Module):
    """Stands in for a rotary module: the tables of no rotation, so that the cache holds keys as they are."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self._width = 2 * len(_frequencies(original))

    def forward(self, x: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Cosines of 1 (times the original's attention scaling) and sines of 0."""
        scaling = float(getattr(self.original, "attention_scaling", 1.0))
        cos = torch.full((*position_ids.shape, self._width), scaling, dtype=x.dtype, device=x.device)
        return cos, torch.zeros_like(cos)


def _rerope_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: positions are slots of the cache, which is all that relative positions need."""
    settings = module.danlu_rerope
    if not isinstance(settings, _Settings):
        raise TypeError("this attention module is not patched")
    if dropout and module.training:
        raise ValueError("ReRoPE is for inference, or for training without attention dropout")
    queries = query.shape[2]
    if attention_mask is not None:
        # With right padding the newest query sees nothing behind itself, but its slot is there.
        end = max(settings.end_of(attention_mask), queries)
        attention_mask = attention_mask[..., :end]
    else:
        positions = kwargs.get("position_ids")
        # Without a mask there is no padding, so the first query's position is its slot.
        end = key.shape[2]
        if isinstance(positions, Tensor) and key.shape[2] > queries:
            end = min(end, int(positions[0, 0].item()) + queries)
    out = rerope_attention(
        query,
        key[:, :, :end],
        value[:, :, :end],
        window=settings.window,
        slope=settings.slope,
        inv_freq=settings.inv_freq.to(query.device),
        scale=scaling,
        attn_mask=attention_mask,
    )
    return out.transpose(1, 2).contiguous(), None


class RopePatch:
    """A patched model; `remove()`, or the end of a `with` block, restores it exactly."""

    def __init__(
        self, model: PreTrainedModel, rotary: list[tuple[nn.Module, str, nn.Module]], settings: _Settings
    ) -> None:
        self.model = model
        self.window = settings.window
        self._rotary = rotary
        self._attention = _attention_modules(model)
        self._implementation = str(model.config._attn_implementation)
        self._active = True
        for parent, name, original in rotary:
            setattr(parent, name, _Unrotated(original))
        for module in self._attention:
            # An attribute and not a submodule or buffer, so that the state dict is as it was.
            object.__setattr__(module, "danlu_rerope", settings)
        model.set_attn_implementation(_NAME)

    def remove(self) -> None:
        """Restore rotary modules and attention; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        for parent, name, original in self._rotary:
            setattr(parent, name, original)
        for module in self._attention:
            object.__delattr__(module, "danlu_rerope")
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
) -> RopePatch:
    r"""Let a RoPE model read text beyond its training length, without training.

    Definition:
        Every attention of the model becomes [`rerope_attention`][danlu.attention.rerope_attention]. Keys are cached
        without rotation and positions are slots of the cache, so left padding, packed batches, dynamic and static
        caches, greedy and beam search work as before.

    Args:
        model: a causal model of transformers with RoPE in halves (Llama, Qwen, Mistral, Phi-3 and relatives). It is
            changed in place.
        method: "rerope".
        window: $w \ge 1$ (tokens); None means half of `max_position_embeddings`. Tune it first.
        slope: $\rho \ge 0$; above 0 is Leaky ReRoPE.

    Returns:
        A handle: `handle.remove()`, or leaving a `with` block, restores the model bit for bit.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: an option is out of its range, or the model cannot be patched: it has no RoPE, rotates neighboring
            channels, has sliding-window layers, latent attention, frequencies that change with the length or with the
            layer, bypasses the attention interface, or is patched already. The message has the reason.

    Numerics:
        As in [`rerope_attention`][danlu.attention.rerope_attention]; with a window beyond the text the model's output
        is that of the unpatched one up to the rounding of its float32 angles.

    Cost:
        The dense definition: time and memory are $O(L^2)$ per layer.

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
    rotary = _rotary_modules(model)
    _refuse_what_cannot_work(model, rotary)
    if window is None:
        window = max(1, int(model.config.max_position_embeddings) // 2)
    # Both, or padding would be ignored: without a mask function the attention gets no mask.
    AttentionInterface.register(_NAME, _rerope_forward)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    return RopePatch(model, rotary, _Settings(window, slope, _frequencies(rotary[0][2]).to(torch.float64)))


def _frequencies(rotary: nn.Module) -> Tensor:
    frequencies = getattr(rotary, "inv_freq", None)
    if not isinstance(frequencies, Tensor):
        raise ValueError(f"{type(rotary).__name__} has no frequencies")
    return frequencies.detach()


def _rotary_modules(model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of every rotary embedding."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "inv_freq") and hasattr(child, "rope_type") and not isinstance(parent, _Unrotated)
    ]


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]


def _refuse_what_cannot_work(model: PreTrainedModel, rotary: list[tuple[nn.Module, str, nn.Module]]) -> None:
    name, config = type(model).__name__, model.config

    def refuse(reason: str) -> None:
        raise ValueError(f"{name} cannot be patched: {reason}")

    attention = _attention_modules(model)
    if any(hasattr(module, "danlu_rerope") for module in attention):
        refuse("it is patched already; remove the first patch")
    if not rotary:
        refuse("it has no rotary position embedding")
    if not getattr(model, "_supports_attention_backend", False) or not attention:
        refuse("its attention does not go through transformers' AttentionInterface")
    if getattr(config, "kv_lora_rank", None) is not None:
        refuse("latent attention rotates a part of the keys after caching")
    parameters = getattr(config, "rope_parameters", None) or {}
    if len(rotary) > 1 or any(isinstance(value, dict) for value in parameters.values()):
        refuse("its layers have different rotary embeddings")
    kind = getattr(rotary[0][2], "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        refuse(f"rope_type {kind!r} changes its frequencies with the length")
    layers = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) is not None if layers is None else "sliding_attention" in layers
    if slides or any(getattr(module, "sliding_window", None) is not None for module in attention):
        refuse("it has layers with a sliding window, which is within the trained positions already")
    rotate_half = getattr(sys.modules[type(attention[0]).__module__], "rotate_half", None)
    if rotate_half is None or rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        refuse("it does not rotate channels in halves")
