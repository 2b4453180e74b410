"""transformers: prefix language models, and attention that looks forward and backward by heads or layers.

Only public extension points are used: `AttentionInterface`, `AttentionMaskInterface`, and caches that `generate` takes.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from danlu._common.checks import check_choice, check_integer
from danlu.attention import attention_mask, split_attention

__all__ = ["PrefixCollator", "SplitName", "prefix_prompt", "register_split_attention"]

SplitName = Literal["danlu_prefix", "danlu_forward_backward", "danlu_alternate"]
SplitKind = Literal["causal", "backward", "prefix", "forward_backward"]

SPLIT_NAMES = ("danlu_prefix", "danlu_forward_backward", "danlu_alternate")
_IGNORED = -100


# ---- attention ------------------------------------------------------------------------------------------------------


def register_split_attention(name: SplitName) -> Callable[..., tuple[Tensor, None]]:
    r"""Register [`split_attention`][danlu.attention.split_attention] for `attn_implementation=name` of every model.

    Definition:
        With the first $P$ slots of a sample as its prefix (`prefix_lengths`, an option of the model's call),

        - "danlu_prefix": the prefix sees itself in both directions, what follows is causal;
        - "danlu_forward_backward": odd heads look ahead, inside of the prefix, and all others are causal;
        - "danlu_alternate": the same of odd layers.

        In encoders, whose attention is not causal, no `prefix_lengths` means that all of the text is the prefix.

    Args:
        name: one of those.

    Returns:
        The function that was registered.

    Raises:
        ValueError: `name` is unknown. When the model runs: a causal model reads a text without a cache and there are
            no `prefix_lengths`; masks of four axes, packed sequences, static caches, cross-attention, windows shorter
            than the text, dropout in training, or scores with softcaps, sinks or biases.

    Numerics:
        As [`split_attention`][danlu.attention.split_attention]. Padding on either side; the slots of a prefix count it.

    Cost:
        The visible pairs; neither a mask of pairs nor scores are held. Samples of one prefix length go together.

    Differences:
        transformers itself has prefixes only as dense masks, which
        [`PrefixCollator`][danlu.integrations.transformers_prefix.PrefixCollator] can make, too.

    Source:
        "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17) and its FAQ (2023-03-20); transformers' documentation of
        the attention interface.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from danlu.integrations.transformers_prefix import register_split_attention
        >>> _ = register_split_attention("danlu_prefix")
        >>> config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=2, attn_implementation="danlu_prefix")
        >>> model = LlamaForCausalLM(config)
        >>> model(torch.arange(8)[None], prefix_lengths=torch.tensor([5])).logits.shape
        torch.Size([1, 8, 16])
    """
    check_choice("name", name, SPLIT_NAMES)
    function = partial(_attend, name)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _padding)
    return function


def _padding(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function: which slots are padding, True = visible, or None."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function) and not _is_causal(
        mask_function, kv_length, device
    ):
        raise ValueError("packed sequences, windows and other masks of the model do not go with a prefix")
    if int(q_offset) + q_length != kv_length or int(kv_offset):
        raise ValueError(
            f"the queries must be the last of the {kv_length} slots, got {q_length} from slot {int(q_offset)} on: "
            "static caches and cross-attention have other slots"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, :kv_length].to(torch.bool)


def _is_causal(mask_function: Callable[..., Tensor], count: int, device: torch.device | str) -> bool:
    """Whether a composed mask is a causal one, as that of a window which the text does not fill is.

    Pieces of packed texts, chunks and windows hide a neighbor or the first slot, and blocks see their next slot.
    """
    slots = torch.arange(count, device=device)
    zero = torch.zeros_like(slots)
    back = mask_function(zero[1:], zero[1:], slots[1:], slots[:-1])
    ahead = mask_function(zero[1:], zero[1:], slots[:-1], slots[1:])
    first = mask_function(zero, zero, slots, zero)
    return bool(back.all() & ~ahead.any() & first.all())


def _attend(
    name: SplitName,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefix_lengths: Tensor | int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function; output `(B, T, H, D)`."""
    _refuse(module, query, key, attention_mask, dropout, kwargs)
    kind, prefix = split_kind(name, module, query.shape[2], key.shape[2], {**kwargs, "prefix_lengths": prefix_lengths})
    out = split_attention(
        query,
        key,
        value,
        kind=kind,
        prefix_lengths=prefix,
        key_padding_mask=attention_mask,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def split_kind(
    name: SplitName, module: nn.Module, rows: int, keys: int, options: Mapping[str, Any]
) -> tuple[SplitKind, Tensor | int | None]:
    """The mask kind of a call of these attention functions, and its prefix."""
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    kind: SplitKind = "prefix"
    if name == "danlu_forward_backward":
        kind = "forward_backward"
    elif name == "danlu_alternate":
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(f"{type(module).__name__} does not know its layer, so layers cannot take turns")
        kind = "backward" if layer % 2 else "causal"
    prefix: Tensor | int | None = options.get("prefix_lengths")
    if prefix is None and not causal:
        prefix = keys if kind == "prefix" else None
    elif prefix is None and (rows < keys or keys == 1):
        # What follows a cache is behind the prefix.
        kind = "causal"
    elif prefix is None:
        raise ValueError(
            f"attention {name!r} needs prefix_lengths=... in the call of a causal model; to generate, see prefix_prompt"
        )
    return kind, None if kind == "causal" else prefix


def _refuse(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, options: Mapping[str, Any]
) -> None:
    if dropout and module.training:
        raise ValueError("split attention has no dropout of its weights; set the model's attention dropout to 0")
    for option in ("softcap", "s_aux", "position_bias"):
        if options.get(option) is not None:
            raise ValueError(f"split attention does not know the option {option!r} of this model's attention")
    window = options.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise ValueError(f"a sliding window of {window} does not reach over the {key.shape[2]} slots of the text")
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask must have shape (B, N), got {tuple(mask.shape)}; take 'sdpa' for others")
    if query.shape[2] > key.shape[2] or getattr(module, "is_cross_attention", False):
        raise ValueError("split attention is for self-attention")


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrefixCollator:
    r"""Texts with a prefix to a batch of a prefix language model: padded, with labels behind the prefix.

    Definition:
        Labels are the tokens behind the prefix, and -100 in it, in padding and at the first token, which nothing
        predicts; the model shifts them. What the model reads says where the prefix is: by `prefix_lengths`, for
        attention of [`register_split_attention`][danlu.integrations.transformers_prefix.register_split_attention], or
        by a mask of four axes, for the attention functions "sdpa" and "eager" of transformers. The Trainer needs
        `remove_unused_columns=False`, or it takes `prefix_length` away.

    Args:
        pad_token_id: $\ge 0$.
        padding_side: "right" or "left".
        pad_to_multiple_of: $\ge 1$; None pads to the longest text.
        form: "lengths" for `prefix_lengths` `(B,)` with an `attention_mask` `(B, L)`, or "mask" for an `attention_mask`
            `(B, 1, L, L)`, additive in `mask_dtype`.
        mask_dtype: dtype of the model, with "mask".

    Returns:
        Called with a list of features, dictionaries of `input_ids` (a list or tensor of integers) and `prefix_length`
        (an int from 0 to their number): a dictionary of `input_ids`, `labels`, `attention_mask`, and `prefix_lengths`
        with "lengths".

    Raises:
        TypeError: an option or a prefix of a wrong type.
        ValueError: an option outside of its range; no features, an empty text, a prefix that is longer than its text,
            or features with other keys, which would be lost.

    Numerics:
        Additive masks are at the lowest finite number of their dtype where hidden, as transformers has them, and all
        slots are visible to a row of padding there, since "eager" would be NaN.

    Cost:
        "mask" has $B L^2$ elements.

    Source:
        "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17); Raffel et al. (2019), arXiv 1910.10683.

    Example:
        >>> from danlu.integrations.transformers_prefix import PrefixCollator
        >>> collate = PrefixCollator(pad_token_id=0)
        >>> texts = ([5, 6, 7, 8], 2), ([9, 4], 1)
        >>> batch = collate([{"input_ids": text, "prefix_length": prefix} for text, prefix in texts])
        >>> batch["labels"].tolist(), batch["prefix_lengths"].tolist()
        ([[-100, -100, 7, 8], [-100, 4, -100, -100]], [2, 1])
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None
    form: Literal["lengths", "mask"] = "lengths"
    mask_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Check the options."""
        check_integer("pad_token_id", self.pad_token_id, low=0)
        check_choice("padding_side", self.padding_side, ("right", "left"))
        check_choice("form", self.form, ("lengths", "mask"))
        if self.pad_to_multiple_of is not None:
            check_integer("pad_to_multiple_of", self.pad_to_multiple_of, low=1)
        if not self.mask_dtype.is_floating_point:
            raise TypeError(f"mask_dtype must be a floating-point dtype, got {self.mask_dtype}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make the batch."""
        texts, prefixes = _read(features)
        count = max(len(text) for text in texts)
        step = self.pad_to_multiple_of or 1
        count = -(-count // step) * step
        tokens = torch.full((len(texts), count), self.pad_token_id)
        labels = torch.full_like(tokens, _IGNORED)
        inside = torch.zeros_like(tokens, dtype=torch.bool)
        starts = [count - len(text) if self.padding_side == "left" else 0 for text in texts]
        for i, (text, prefix, start) in enumerate(zip(texts, prefixes, starts, strict=True)):
            tokens[i, start : start + len(text)] = text
            inside[i, start : start + len(text)] = True
            # Nothing predicts the first token; padding on the left must not.
            told = max(prefix, 1)
            labels[i, start + told : start + len(text)] = text[told:]
        ends = torch.tensor(starts) + torch.tensor(prefixes)
        batch = {"input_ids": tokens, "labels": labels}
        if self.form == "lengths":
            return {**batch, "attention_mask": inside.long(), "prefix_lengths": ends}
        pairs = attention_mask("prefix", count, prefix_lengths=ends).attn_mask
        if pairs is None:
            raise RuntimeError("lengths by sample have a mask")
        hidden = ~(pairs & inside[:, None, None, :]) & inside[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self.mask_dtype)
        return {**batch, "attention_mask": mask.masked_fill_(hidden, torch.finfo(self.mask_dtype).min)}


def _read(features: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], list[int]]:
    if not features:
        raise ValueError("there must be at least one feature")
    texts: list[Tensor] = []
    prefixes: list[int] = []
    for feature in features:
        if feature.keys() != {"input_ids", "prefix_length"}:
            raise ValueError(f"features must have input_ids and prefix_length and no other keys, got {sorted(feature)}")
        text = torch.as_tensor(feature["input_ids"])
        if text.ndim != 1 or len(text) == 0 or text.is_floating_point():
            raise ValueError(f"input_ids must be integers of shape (L,) with L >= 1, got shape {tuple(text.shape)}")
        prefix = check_integer("prefix_length", feature["prefix_length"], low=0)
        if prefix > len(text):
            raise ValueError(f"prefix_length must be at most the {len(text)} tokens of its text, got {prefix}")
        texts.append(text)
        prefixes.append(prefix)
    return texts, prefixes


# ---- generation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def prefix_prompt(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    prefix_length: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    r"""Read a prompt with a prefix, and return what `generate` needs to go on: `generate(**prefix_prompt(...))`.

    Definition:
        Keys and values of the prompt go into a cache, without the last slot's, which `generate` reads again as causal.
        That is right if the slot is behind the prefix, and with "danlu_prefix" also if it is the prefix's last, since
        its query sees all slots then, too.

    Args:
        model: with attention of
            [`register_split_attention`][danlu.integrations.transformers_prefix.register_split_attention].
        input_ids: int64, shape `(B, L)`, $L \ge 2$.
        attention_mask: shape `(B, L)`, 1 = visible; padding must be on the left.
        prefix_length: slots of the prefix, padding counts; None means all, and "danlu_forward_backward" and
            "danlu_alternate" need at most $L - 1$.
        options: of the model's call.

    Returns:
        `input_ids`, `attention_mask` and the cache, by the name that this version of transformers has for it.

    Raises:
        TypeError: `prefix_length` is not an int.
        ValueError: the model has another attention, shapes do not fit, the prefix is too long for the attention, or the
            last slot of a prompt is padding.

    Numerics:
        As a pass over prompt and continuation with `prefix_lengths`, up to rounding.

    Cost:
        One pass over the prompt.

    Differences:
        `generate` refuses options of the model's call that are not in its signature, so it cannot be given
        `prefix_lengths`. Beam search and several sequences per prompt need the prompt repeated before: `generate`
        copies prompts for them, but no cache that it is given.

    Source:
        "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from danlu.integrations.transformers_prefix import prefix_prompt, register_split_attention
        >>> _ = register_split_attention("danlu_prefix")
        >>> config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=2, pad_token_id=0, attn_implementation="danlu_prefix")
        >>> model = LlamaForCausalLM(config).eval()
        >>> model.generate(**prefix_prompt(model, torch.arange(1, 6)[None]), max_new_tokens=3, min_new_tokens=3).shape
        torch.Size([1, 8])
    """
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation not in SPLIT_NAMES:
        raise ValueError(f"model must have attention {' or '.join(map(repr, SPLIT_NAMES))}, got {implementation!r}")
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must have shape (B, L) with L >= 2, got {tuple(input_ids.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must have shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}")
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("prompts must be padded on the left: the last slot of one is padding")
    batch, count = input_ids.shape
    most = count if implementation == "danlu_prefix" else count - 1
    prefix = check_integer("prefix_length", count if prefix_length is None else prefix_length, low=0)
    if prefix > most:
        raise ValueError(f"prefix_length must be at most {most} of {count} slots with {implementation!r}, got {prefix}")
    lengths = torch.full((batch,), prefix, device=input_ids.device)
    # As `generate` has them: real tokens count from 0.
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    given = {"attention_mask": attention_mask, "position_ids": positions, "prefix_lengths": lengths, **options}
    # transformers 5.24 has a new name for it.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model(input_ids, use_cache=True, **{name: cache}, **given)
    cache.crop(-1)
    return {"input_ids": input_ids, "attention_mask": attention_mask, name: cache}
