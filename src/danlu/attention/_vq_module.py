r"""The attention layer of Transformer-VQ: projections, quantizer, bias by distance, and decoding.

Source: Lingle (2023), "Transformer-VQ: Linear-Time Transformers via Vector Quantization", arXiv 2309.16354.

Shape letters: as in `danlu.attention._vq_attention`; `C` = `width`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu._common.checks import check_choice, check_floating, check_integer, check_real
from danlu.attention._masks import check_cu_seqlens
from danlu.attention._vector_quantizer import Quantized, VectorQuantizer, nearest_codes
from danlu.attention._vq_attention import Backend, attend_to_codes, check_window
from danlu.attention._vq_decode import VQState, decode_step, state_after
from danlu.positions import rope_frequencies

__all__ = ["VQAttention"]


class VQAttention(nn.Module):
    r"""Multi-head self-attention with quantized keys: linear in the length, with a decoding state of constant size.

    Definition:
        $$q = D^{-1/4}\operatorname{LN}(W_q x), \quad k = D^{-1/4}\operatorname{LN}(W_k x), \quad v = W_v x, \qquad
        y = W_o\, \operatorname{VQ}(q, k, v, C;\ s = 1, B, w)$$
        per head of size $D = C / H$, with LN the normalization of a head without scale and shift, $C$ the codebook of a
        [`VectorQuantizer`][danlu.attention.VectorQuantizer], and $B$ a learned bias by distance within near blocks.
        Beside $B$, only the rotations by distances up to $w$ know of positions, if there is a $w$.

    Args:
        width: $C$, a multiple of `num_heads`.
        num_heads: query heads $H$.
        num_codes: codewords $S$ of each key head.
        num_key_heads: $G$, dividing $H$; None means $H$.
        block_size: $\ell$ (tokens).
        relative_bias: whether there is a $B$, 0 at the start.
        window: $w$ of `vq_attention`, at most `block_size` + 1 (tokens); None rotates nothing.
        rope_base: base of the rotations' frequencies.
        is_causal: whether a token sees only itself and earlier ones.
        decay: of the codebook's averages.
        commitment: weight of the quantizer's loss.
        reseed_below: when the quantizer replaces dead codewords, see there; None never does.
        backend: as in [`vq_attention`][danlu.attention.vq_attention].

    Returns:
        From `forward(hidden, key_padding_mask=None, *, cu_seqlens=None)` with `hidden` `(B, N, C)`: the output
        `(B, N, C)`, and the quantizer's [`Quantized`][danlu.attention.Quantized], whose `loss` belongs into the
        training loss. Padding gets the output 0. `cu_seqlens` are the borders of packed sequences, as in
        `vq_attention`; the quantizer learns from all of them.

        `prefill(hidden, key_padding_mask=None)` returns the output and the [`VQState`][danlu.attention.VQState] behind
        it; `step(hidden, state, visible=None)` with `hidden` `(B, 1, C)` the output of one more token and the new
        state. `visible` is bool `(B,)`; where it is False the state stays and the output is 0. Neither changes the
        codebook.

    Raises:
        TypeError: options of a wrong type, or `hidden` that is not floating.
        ValueError: sizes below 1 or that do not divide, shapes that do not fit, or decoding without `is_causal`.

    Numerics:
        As in `vq_attention`; the normalization is in float32 for half inputs. RoPE does not fit, since a key would
        depend on its absolute position; with a `window` it is the ReRoPE of unrotated keys.

    Cost:
        That of `vq_attention` and $2C^2(2 + 2G/H)$ flops per token. A step of decoding costs $O(2\ell + S)$ per head
        and channel, however long the text is; the state has $G(2\ell + S)(E + 1)$ numbers per sample.

    Differences:
        The original is a gated unit with a bias from sinusoids through a learned map; here heads are those of a
        transformer and the bias is a table, which at the same block is as expressive.

    Source:
        Lingle (2023), arXiv 2309.16354, sections 3.2 to 3.4.

    Example:
        >>> import torch
        >>> from danlu.attention import VQAttention
        >>> layer = VQAttention(32, num_heads=4, num_codes=16, block_size=8)
        >>> out, quantized = layer(torch.randn(2, 50, 32))
        >>> out.shape, quantized.loss.shape
        (torch.Size([2, 50, 32]), torch.Size([]))
        >>> _, state = layer.eval().prefill(torch.randn(2, 50, 32))
        >>> out, state = layer.step(torch.randn(2, 1, 32), state)
        >>> out.shape
        torch.Size([2, 1, 32])
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_codes: int,
        *,
        num_key_heads: int | None = None,
        block_size: int = 512,
        relative_bias: bool = True,
        window: int | None = None,
        rope_base: float = 10000.0,
        is_causal: bool = True,
        decay: float = 0.99,
        commitment: float = 1e-4,
        reseed_below: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_choice("backend", backend, ("auto", "blocks", "reference"))
        self.num_heads = check_integer("num_heads", num_heads, low=1)
        self.num_key_heads = (
            num_heads if num_key_heads is None else check_integer("num_key_heads", num_key_heads, low=1)
        )
        if check_integer("width", width, low=1) % num_heads:
            raise ValueError(f"width must be a multiple of num_heads = {num_heads}, got {width}")
        if num_heads % self.num_key_heads:
            raise ValueError(f"num_heads must be a multiple of num_key_heads = {num_key_heads}, got {num_heads}")
        self.block_size = check_integer("block_size", block_size, low=1)
        check_window(window, block_size, is_causal)
        self.window = window
        self.rope_base = check_real("rope_base", rope_base, low=0.0, low_open=True)
        self.is_causal = is_causal
        self.backend: Backend = backend
        self.head_dim = width // num_heads
        if window is not None and self.head_dim % 2:
            raise ValueError(f"window needs an even head size, got {width} / {num_heads} = {self.head_dim}")
        small = self.num_key_heads * self.head_dim
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, small, bias=False)
        self.value = nn.Linear(width, small, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        distances = 2 * block_size if is_causal else 4 * block_size - 1
        self.relative_bias = nn.Parameter(torch.zeros(num_heads, distances)) if relative_bias else None
        self.quantizer = VectorQuantizer(
            num_codes,
            self.head_dim,
            self.num_key_heads,
            decay=decay,
            commitment=commitment,
            reseed_below=reseed_below,
        )

    def forward(
        self, hidden: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Quantized]:
        """Return the output and what the quantizer says."""
        query, key, value = self._project(hidden)
        check_cu_seqlens(cu_seqlens, query, key, key_padding_mask, None)
        quantized = self.quantizer(key, key_padding_mask)
        return self._attend(query, key, value, quantized.codes, key_padding_mask, cu_seqlens), quantized

    @torch.no_grad()
    def prefill(self, hidden: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, VQState]:
        """Return the output and the state behind it."""
        self._check_decoding()
        query, key, value = self._project(hidden)
        self.quantizer.check_keys(key, key_padding_mask)
        if key_padding_mask is not None:
            key = key.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        codes = nearest_codes(key, self.quantizer.codebook)
        out = self._attend(query, key, value, codes, key_padding_mask)
        num_codes = self.quantizer.num_codes
        return out, state_after(codes, value, key_padding_mask, num_codes=num_codes, block_size=self.block_size)

    @torch.no_grad()
    def step(self, hidden: Tensor, state: VQState, visible: Tensor | None = None) -> tuple[Tensor, VQState]:
        """Return the output of one more token and the new state."""
        self._check_decoding()
        query, key, value = self._project(hidden)
        if hidden.shape[1] != 1 or hidden.shape[0] != len(state.length):
            raise ValueError(f"hidden must have shape ({len(state.length)}, 1, C), got {tuple(hidden.shape)}")
        if visible is not None:
            if visible.dtype != torch.bool or visible.shape != state.length.shape:
                raise ValueError(f"visible must be bool of shape (B,), got {visible.dtype} {tuple(visible.shape)}")
            hidden_rows = ~visible[:, None, None, None]
            query, key, value = (x.masked_fill(hidden_rows, 0.0) for x in (query, key, value))
        codebook = self.quantizer.codebook
        out, state = decode_step(
            query,
            nearest_codes(key, codebook),
            value,
            state,
            codebook,
            bias=self.relative_bias,
            window=self.window,
            inv_freq=self._frequencies(hidden),
            scale=1.0,
            visible=visible,
        )
        return self._joined(out, query.dtype), state

    def _frequencies(self, like: Tensor) -> Tensor | None:
        # Not a buffer, which `module.half()` would round.
        if self.window is None:
            return None
        return rope_frequencies(self.head_dim, base=self.rope_base).to(like.device)

    def _check_decoding(self) -> None:
        if not self.is_causal:
            raise ValueError("decoding needs is_causal=True")

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_floating("hidden", hidden)
        if hidden.ndim != 3 or hidden.shape[-1] != self.query.in_features:
            raise ValueError(f"hidden must have shape (B, N, {self.query.in_features}), got {tuple(hidden.shape)}")
        query, key, value = (
            layer(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self._normalized(query), self._normalized(key), value

    def _normalized(self, x: Tensor) -> Tensor:
        wide = F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), (self.head_dim,))
        return (wide * self.head_dim**-0.25).to(x.dtype)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        codes: Tensor,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        out = attend_to_codes(
            query,
            key,
            value,
            self.quantizer.codebook,
            codes,
            block_size=self.block_size,
            is_causal=self.is_causal,
            bias=self.relative_bias,
            window=self.window,
            inv_freq=self._frequencies(query),
            scale=1.0,
            grad_through_cache=True,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return self._joined(out, query.dtype)

    def _joined(self, heads: Tensor, dtype: torch.dtype) -> Tensor:
        return self.out(heads.to(dtype).transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return (
            f"num_heads={self.num_heads}, num_key_heads={self.num_key_heads}, block_size={self.block_size}, "
            f"window={self.window}, is_causal={self.is_causal}, backend={self.backend!r}"
        )
