r"""Keys and values of past tokens, unrotated, for generation with ReRoPE.

Source: "Transformer升级之路:12、无限外推的ReRoPE?" (2023-08-07).

Shape letters: as in `danlu.attention._rerope_decode`; `M` new tokens.
"""

import torch
from torch import Tensor, nn

from danlu._common.checks import check_integer, check_real
from danlu.attention._log_n import LogN, check_log_n
from danlu.attention._masks import check_attention, check_key_padding_mask, resolve_frequencies
from danlu.attention._rerope import rerope_attention
from danlu.attention._rerope_decode import rerope_decode
from danlu.positions import apply_rope

__all__ = ["ReRoPECache"]

# Slots of a growing cache at first; it doubles when it is full, so a token is copied about once in all.
_FIRST = 64


class ReRoPECache:
    r"""The cache of one attention layer: `step` takes new tokens and returns their attention over all so far.

    Definition:
        `step(query, key, value)` returns the rows of the new tokens of
        `rerope_attention` over all tokens given so far. Keys are kept without rotation, in as much memory as plain
        RoPE needs. One new token is [`rerope_decode`][danlu.attention.rerope_decode]. A slot is a position; padding at
        the end of a sample's tokens takes no slot, so the sample goes on where its own tokens end.

    Args:
        window: $w \ge 1$ (tokens).
        slope: $\rho \ge 0$.
        inv_freq: frequencies (radians per position); None means `rope_frequencies(D)`.
        scale: factor of the scores; None means $D^{-1/2}$.
        interleaved: rotate neighboring channels instead of halves.
        logn: "train" or "post", as in `rerope_attention`.
        train_length: $T$ of `logn` (tokens).
        capacity: slots of a static cache, allocated once; None means a cache that grows.
        cache_leaky: with `slope` > 0 keep $\mathcal R_{j\rho}\,k_j$ as well. That is half as much memory again, and
            saves the rotation of all far keys in every step.

    Returns:
        From `step`: the attention of the new tokens, shape `(B, H, M, E)`.

    Raises:
        TypeError: an option is not of its type; in `step`, tensors as in `rerope_attention`.
        ValueError: an option is out of its range, `cache_leaky` without `slope`; in `step`, more tokens than
            `capacity`, or a batch of another size.

    Numerics:
        As in [`rerope_decode`][danlu.attention.rerope_decode]. For inference: the cache keeps no graph.

    Cost:
        $O(1)$ amortized copies per token. A `key_padding_mask` is looked at, which waits for a GPU; steps without one
        do not.

    Differences:
        The author's code caches unrotated keys, too, and rotates all of them in every step.

    Source:
        "Transformer升级之路:12、无限外推的ReRoPE?" (2023-08-07).

    Example:
        >>> import torch
        >>> from danlu.attention import ReRoPECache, rerope_attention
        >>> query, key, value = torch.randn(3, 1, 2, 12, 8)
        >>> cache = ReRoPECache(4)
        >>> prompt = cache.step(query[:, :, :11], key[:, :, :11], value[:, :, :11])
        >>> token = cache.step(query[:, :, 11:], key[:, :, 11:], value[:, :, 11:])
        >>> full = rerope_attention(query, key, value, window=4)
        >>> torch.allclose(torch.cat((prompt, token), 2), full, atol=1e-6)
        True
    """

    def __init__(
        self,
        window: int,
        *,
        slope: float = 0.0,
        inv_freq: Tensor | None = None,
        scale: float | None = None,
        interleaved: bool = False,
        logn: LogN | None = None,
        train_length: int | None = None,
        capacity: int | None = None,
        cache_leaky: bool = False,
    ) -> None:
        self.window = check_integer("window", window, low=1)
        self.slope = check_real("slope", slope, low=0.0)
        check_log_n(logn, train_length)
        if cache_leaky and not slope:
            raise ValueError("cache_leaky is of use with slope > 0 only")
        self.inv_freq, self.scale, self.interleaved = inv_freq, scale, interleaved
        self.logn, self.train_length = logn, train_length
        self.capacity = None if capacity is None else check_integer("capacity", capacity, low=1)
        self.cache_leaky = cache_leaky
        # Key, value and, with cache_leaky, the rotated key: (B, H_kv, slots, channels).
        self._tensors: list[Tensor] = []
        # (B, slots), once something was hidden.
        self._visible: Tensor | None = None
        # One number, or (B,) once samples differ.
        self._lengths: int | Tensor = 0
        self._longest = 0

    @property
    def lengths(self) -> int | Tensor:
        """Filled slots: one number, or integers of shape `(B,)` once samples differ."""
        return self._lengths

    @torch.no_grad()
    def step(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Take `M` new tokens, `(B, H, M, D)` and `(B, H_kv, M, D or E)`, and return their attention `(B, H, M, E)`.

        `key_padding_mask`, `(B, M)` with True = visible, is of the new tokens. Those that are hidden get 0; hidden ones
        behind a sample's last visible one are dropped.
        """
        check_attention(query, key, value, self.scale)
        check_key_padding_mask(key_padding_mask, key)
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"every new token has a query and a key, got {tuple(query.shape)}, {tuple(key.shape)}")
        resolve_frequencies(self.inv_freq, query)
        if key.shape[2] == 0:
            return query.new_zeros(*query.shape[:3], value.shape[-1])
        before, new = self._lengths, key.shape[2]
        self._append(key, value, key_padding_mask)
        if new == 1:
            out = self._decode(query, before)
        elif isinstance(before, int):
            out = self._prefill(query, slice(None), before + new)
        else:
            parts = enumerate(before.tolist())
            out = torch.cat([self._prefill(query[i : i + 1], slice(i, i + 1), low + new) for i, low in parts])
        self._advance(before, new, key_padding_mask)
        return out

    def _decode(self, query: Tensor, before: int | Tensor) -> Tensor:
        key, value, *leaky = (x[:, :, : self._longest] for x in self._tensors)
        return rerope_decode(
            query,
            key,
            value,
            window=self.window,
            length=before + 1,
            slope=self.slope,
            inv_freq=self.inv_freq,
            scale=self.scale,
            key_padding_mask=None if self._visible is None else self._visible[:, : self._longest],
            leaky_key=leaky[0] if leaky else None,
            logn=self.logn,
            train_length=self.train_length,
            interleaved=self.interleaved,
        )

    def _prefill(self, query: Tensor, samples: slice, end: int) -> Tensor:
        return rerope_attention(
            query,
            self._tensors[0][samples, :, :end],
            self._tensors[1][samples, :, :end],
            window=self.window,
            slope=self.slope,
            inv_freq=self.inv_freq,
            scale=self.scale,
            key_padding_mask=None if self._visible is None else self._visible[samples, :end],
            logn=self.logn,
            train_length=self.train_length,
            interleaved=self.interleaved,
        )

    def _append(self, key: Tensor, value: Tensor, visible: Tensor | None) -> None:
        """Write behind the tokens of every sample."""
        if self._tensors and key.shape[0] != self._tensors[0].shape[0]:
            raise ValueError(f"the cache holds {self._tensors[0].shape[0]} samples, got {key.shape[0]}")
        new, before = key.shape[2], self._lengths
        self._grow(self._longest + new, key, value)
        slots = torch.arange(new, device=key.device)
        slots = before[:, None] + slots if isinstance(before, Tensor) else slots + before
        if visible is not None:
            # Zeros, so that nothing hidden can leak later.
            key, value = (x.masked_fill(~visible[:, None, :, None], 0.0) for x in (key, value))
        written = [key, value]
        if self.cache_leaky:
            positions = slots.to(torch.float64) * self.slope
            positions = positions[:, None] if positions.ndim == 2 else positions
            frequencies = resolve_frequencies(self.inv_freq, key)
            written.append(apply_rope(key, positions, frequencies, interleaved=self.interleaved))
        for buffer, content in zip(self._tensors, written, strict=True):
            if slots.ndim == 1:
                buffer[:, :, before : before + new] = content
            else:
                buffer.scatter_(2, slots[:, None, :, None].expand_as(content), content)
        if visible is not None and self._visible is None:
            self._visible = torch.ones(key.shape[0], self._tensors[0].shape[2], dtype=torch.bool, device=key.device)
        if self._visible is not None:
            shown = visible if visible is not None else torch.ones_like(self._visible[:, :new])
            self._visible.scatter_(1, slots.expand(key.shape[0], -1), shown)
        self._longest += new

    def _advance(self, before: int | Tensor, new: int, visible: Tensor | None) -> None:
        """Count the tokens up to the last visible one of each sample."""
        if visible is None:
            self._lengths = before + new
            return
        ends = torch.where(visible, torch.arange(1, new + 1, device=visible.device), 0).amax(1)
        lengths = ends + before
        found = lengths.tolist()
        self._lengths = found[0] if found and min(found) == max(found) else lengths
        self._longest = max(found, default=0)

    def _grow(self, slots: int, key: Tensor, value: Tensor) -> None:
        if self.capacity is not None and slots > self.capacity:
            raise ValueError(f"the cache has a capacity of {self.capacity} tokens, got {slots}")
        held = self._tensors[0].shape[2] if self._tensors else 0
        if slots <= held:
            return
        size = self.capacity if self.capacity is not None else max(slots, 2 * held, _FIRST)
        if not self._tensors:
            examples = [key, value, key] if self.cache_leaky else [key, value]
            self._tensors = [x.new_zeros(*x.shape[:2], size, x.shape[3]) for x in examples]
            return
        self._tensors = [nn.functional.pad(x, (0, 0, 0, size - held)) for x in self._tensors]
        if self._visible is not None:
            self._visible = nn.functional.pad(self._visible, (0, size - held), value=True)

    def reorder(self, order: Tensor) -> None:
        """Take the samples in the given order, with repetitions, as beam search needs."""
        self._tensors = [x.index_select(0, order) for x in self._tensors]
        if self._visible is not None:
            self._visible = self._visible.index_select(0, order)
        if isinstance(self._lengths, Tensor):
            self._lengths = self._lengths.index_select(0, order)

    def crop(self, length: int) -> None:
        """Forget all tokens from slot `length` on."""
        check_integer("length", length, low=0)
        if isinstance(self._lengths, Tensor):
            self._lengths = self._lengths.clamp(max=length)
        else:
            self._lengths = min(self._lengths, length)
        self._longest = min(self._longest, length)
        if self._visible is not None:
            self._visible[:, length:] = True

    def __repr__(self) -> str:
        """Options and state."""
        return (
            f"ReRoPECache(window={self.window}, slope={self.slope}, capacity={self.capacity}, lengths={self.lengths})"
        )
