r"""Which keys a query may see, by kind: causal, bidirectional, bidirectional on a prefix, forward and backward heads.

Source: "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17) and its FAQ (2023-03-20).

Shape letters: `B` batch; `H` heads; `L` slots; `M` queries, the last `M` of `N` slots.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_integer, check_same_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["KINDS", "AttentionMask", "MaskKind", "attention_mask", "block_mask", "check_kind", "is_causal", "pairs"]

MaskKind = Literal["causal", "backward", "bidirectional", "prefix", "forward_backward"]
KINDS = ("causal", "backward", "bidirectional", "prefix", "forward_backward")


class AttentionMask(NamedTuple):
    """What [`attention_mask`][danlu.attention.attention_mask] returns: two options of torch's attention.

    Definition:
        The pair (`attn_mask`, `is_causal`), named as in `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        attn_mask: bool, True = visible, or None where the flag suffices.
        is_causal: the flag.

    Numerics:
        None.

    Source:
        Our own.

    Example:
        >>> from danlu.attention import attention_mask
        >>> attention_mask("causal", 4)._asdict()
        {'attn_mask': None, 'is_causal': True}
    """

    attn_mask: Tensor | None
    is_causal: bool


def attention_mask(
    kind: MaskKind,
    length: int,
    *,
    prefix_lengths: Tensor | int | None = None,
    num_heads: int | None = None,
    lengths: Tensor | None = None,
    device: torch.device | str | None = None,
) -> AttentionMask:
    r"""The mask of a kind, or the flag of the kernel that says the same.

    Definition:
        Query $i$ sees key $j$, with the first $P$ slots of a sample as its prefix,

        - causal: if $j \le i$;
        - backward: if $j \ge i$;
        - bidirectional: always;
        - prefix: if $j \le i$, or $i < P$ and $j < P$;
        - forward_backward: in heads 0, 2, ... if $j \le i$, in the others if $j \ge i$.

        If the backward kinds are given a prefix, they are backward inside of it ($i \le j < P$) and causal after it.
        $P \le 1$ is causal for all of these kinds. To let layers take turns instead of heads, use "causal" in the
        layers 0, 2, ... and "backward" in the others.

    Args:
        kind: one of those.
        length: $L \ge 0$.
        prefix_lengths: $0 \le P \le L$ (slots), an int for all samples or an integer tensor `(B,)`. Needed for
            "prefix", possible for the backward kinds, where None means the whole text.
        num_heads: $H \ge 1$, for "forward_backward" and for nothing else.
        lengths: integer tensor `(B,)`: slots from there on are padding, neither seen nor seeing; None means none are.
        device: of the mask; None takes that of the tensors.

    Returns:
        [`AttentionMask`][danlu.attention.AttentionMask]. The mask is None where a flag suffices, and otherwise has
        shape `(B or 1, H or 1, L, L)`.

    Raises:
        TypeError: lengths that are no integers.
        ValueError: an unknown `kind`, an option that the kind needs or does not have, a prefix outside of $[0, L]$, or
            shapes or devices that do not fit.

    Numerics:
        Booleans. Rows that are padding see nothing; give them to functions that define what comes then, as those here.

    Cost:
        $B H L^2$ bytes where there is a mask; waits for the device if lengths are tensors.
        [`split_attention`][danlu.attention.split_attention] needs no mask.

    Source:
        "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17) and its FAQ; Raffel et al. (2019), arXiv 1910.10683.

    Example:
        >>> from danlu.attention import attention_mask
        >>> attention_mask("prefix", 4, prefix_lengths=2).attn_mask[0, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    check_integer("length", length, low=0)
    check_kind(kind, prefix_lengths, length)
    _check_heads(kind, num_heads)
    _check_lengths("lengths", lengths, length)
    prefix = prefix_lengths
    if isinstance(prefix, Tensor) and lengths is not None:
        check_same_device(prefix_lengths=prefix, lengths=lengths)
        if prefix.shape != lengths.shape:
            raise ValueError(
                f"prefix_lengths and lengths must be of one batch, got {tuple(prefix.shape)}, {tuple(lengths.shape)}"
            )
    place = next((x.device for x in (prefix, lengths) if isinstance(x, Tensor)), None) if device is None else device
    if lengths is None and is_causal(kind, prefix):
        return AttentionMask(None, True)
    whole = kind == "prefix" and isinstance(prefix, int) and prefix == length
    if lengths is None and (kind == "bidirectional" or whole):
        return AttentionMask(None, False)
    slots = torch.arange(length, device=place)
    visible = pairs(kind, slots, length, prefix, num_heads or 1)
    if lengths is not None:
        inside = slots < lengths.to(slots.device)[:, None]
        visible = visible & inside[:, None, :, None] & inside[:, None, None, :]
    return AttentionMask(visible, False)


def block_mask(
    kind: MaskKind,
    length: int,
    *,
    prefix_lengths: Tensor | int | None = None,
    num_heads: int | None = None,
    device: torch.device | str | None = None,
    block_size: int = 128,
) -> "BlockMask":
    r"""The mask of a kind for `torch.nn.attention.flex_attention`.

    Definition:
        As in [`attention_mask`][danlu.attention.attention_mask].

    Args:
        kind: as there.
        length: $L \ge 1$.
        prefix_lengths: as there.
        num_heads: as there.
        device: of the mask; None takes that of `prefix_lengths`, or the CPU.
        block_size: $\ge 1$, slots of a block.

    Returns:
        A `BlockMask` for `B` samples (1 without a tensor of prefixes) and `num_heads` heads (1 where all are alike).

    Raises:
        TypeError: as there.
        ValueError: as there.

    Numerics:
        None.

    Cost:
        Made without compiling, it holds the mask for a moment: $B H L^2$ bytes.

    Source:
        PyTorch's documentation of flex attention.

    Example:
        >>> from danlu.attention import block_mask
        >>> block_mask("prefix", 256, prefix_lengths=128).sparsity()
        25.0
    """
    check_integer("length", length, low=1)
    check_integer("block_size", block_size, low=1)
    check_kind(kind, prefix_lengths, length)
    _check_heads(kind, num_heads)
    prefix = prefix_lengths
    place = torch.device(device or (prefix.device if isinstance(prefix, Tensor) else "cpu"))
    borders = torch.as_tensor(length if prefix is None else prefix, device=place).reshape(-1)
    # Importing it brings the compiler.
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _rule(kind, i, j, borders[b] if len(borders) > 1 else borders[0], h % 2 == 1)

    batch = len(borders) if len(borders) > 1 else None
    return create_block_mask(visible, batch, num_heads, length, length, device=place, BLOCK_SIZE=block_size)


def pairs(kind: MaskKind, rows: Tensor, keys: int, prefix: Tensor | int | None, heads: int) -> Tensor:
    """Visibility `(B or 1, H or 1, M, N)` of `keys` slots to the slots `rows`, whatever its cost."""
    border = torch.as_tensor(keys if prefix is None else prefix, device=rows.device).reshape(-1, 1, 1, 1)
    count = heads if kind == "forward_backward" else 1
    backward = (torch.arange(count, device=rows.device) % 2 == 1).view(1, -1, 1, 1)
    visible = _rule(kind, rows[:, None], torch.arange(keys, device=rows.device), border, backward)
    return visible if visible.ndim == 4 else visible[None, None]


def is_causal(kind: MaskKind, prefix: Tensor | int | None) -> bool:
    """Whether the kind is causal everywhere, as far as that can be known without looking at a tensor."""
    return kind == "causal" or (isinstance(prefix, int) and prefix <= 1)


def _rule(kind: MaskKind, i: Tensor, j: Tensor, prefix: Tensor, backward_head: Tensor) -> Tensor:
    """Elementwise, so that flex attention can call it, too."""
    if kind == "bidirectional":
        return (j <= i) | (j > i)
    forward = j <= i
    if kind == "causal":
        return forward
    inside = (i < prefix) & (j < prefix)
    if kind == "prefix":
        return forward | inside
    backward = torch.where(i < prefix, inside & (j >= i), forward)
    return backward if kind == "backward" else torch.where(backward_head, backward, forward)


def check_kind(kind: str, prefix: Tensor | int | None, length: int) -> None:
    """Raise unless the kind is known and the prefix is one of its options, inside of the text."""
    check_choice("kind", kind, KINDS)
    if prefix is None:
        if kind == "prefix":
            raise ValueError("kind='prefix' needs prefix_lengths")
        return
    if kind in ("causal", "bidirectional"):
        raise ValueError(f"kind={kind!r} has no prefix: prefix_lengths must be None")
    if isinstance(prefix, Tensor):
        _check_lengths("prefix_lengths", prefix, length)
    elif check_integer("prefix_lengths", prefix, low=0) > length:
        raise ValueError(f"prefix_lengths must be at most the length {length}, got {prefix}")


def _check_lengths(name: str, lengths: Any, length: int) -> None:
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {kind}")
    if lengths.ndim != 1 or len(lengths) == 0:
        raise ValueError(f"{name} must have shape (B,), got {tuple(lengths.shape)}")
    if torch.compiler.is_compiling():
        return
    low, high = (int(x) for x in lengths.aminmax())
    if low < 0 or high > length:
        raise ValueError(f"{name} must be in [0, {length}], the length, got values from {low} to {high}")


def _check_heads(kind: str, num_heads: int | None) -> None:
    if kind == "forward_backward":
        if num_heads is None:
            raise ValueError("kind='forward_backward' needs num_heads")
        check_integer("num_heads", num_heads, low=1)
    elif num_heads is not None:
        raise ValueError(f"all heads of kind={kind!r} are alike: num_heads must be None")
