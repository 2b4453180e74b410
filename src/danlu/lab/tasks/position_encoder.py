"""A small encoder whose positions are given from outside: rotary or ALiBi, with a window and the log-n scale."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.attention import window_mask
from danlu.lab.errors import TrialError
from danlu.positions import alibi_bias, alibi_slopes, apply_rope, logn_scale, rope_frequencies

__all__ = ["PositionEncoder"]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self,
        hidden: Tensor,
        inv_freq: Tensor | None,
        positions: Tensor,
        scale: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if inv_freq is not None:
            # Both at once, since the table of angles takes its time.
            query, key = apply_rope(torch.stack((query, key)), positions, inv_freq)
        if scale is not None:
            query = query * scale
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))


class PositionEncoder(nn.Module):
    """Pre-norm encoder of tokens without padding.

    Args:
        tokens: number of kinds of tokens.
        outputs: number of logits of a token.
        width: of the residual stream.
        layers: number of layers.
        heads: attention heads; `width / heads` must be even.
        encoding: "rope" or "alibi".
        logn: training length of the log-n scale; None means no scale. It may be set later.
    """

    def __init__(
        self, tokens: int, outputs: int, *, width: int, layers: int, heads: int, encoding: str, logn: int | None
    ) -> None:
        super().__init__()
        if encoding not in ("rope", "alibi"):
            raise TrialError(f"unknown encoding {encoding!r}; known: rope, alibi")
        self.logn = logn
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        # Plain attributes: constants that stay as they are whatever the model is cast to.
        self.inv_freq = rope_frequencies(width // heads) if encoding == "rope" else None
        self.slopes = alibi_slopes(heads).float() if encoding == "alibi" else None

    def forward(self, tokens: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
        """Logits `(batch, length, outputs)` of tokens `(batch, length)` at positions `(length,)` or `(batch, length)`.

        With `window` a token sees so many nearest ones.
        """
        hidden = self.embedding(tokens)
        length = hidden.shape[1]
        mask: Tensor | None = None
        if self.slopes is not None:
            mask = alibi_bias(self.slopes.to(hidden.device), positions, positions)
        if window is not None:
            visible = window_mask(length, window=window, is_causal=False, device=hidden.device)
            mask = visible if mask is None else mask.masked_fill(~visible, float("-inf"))
        scale: Tensor | None = None
        if self.logn is not None:
            scale = logn_scale(length, self.logn, "train").to(device=hidden.device, dtype=hidden.dtype)
        inv_freq = None if self.inv_freq is None else self.inv_freq.to(hidden.device)
        per_head = positions if positions.ndim == 1 else positions[:, None]
        for layer in self.layers:
            hidden = layer(hidden, inv_freq, per_head, scale, mask)
        return self.head(self.norm(hidden))
