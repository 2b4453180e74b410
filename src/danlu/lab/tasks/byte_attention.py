"""A small pre-norm transformer over bytes whose layers attend as they are told, for tasks that compare ways to."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.lab.data import TextCorpus, python_source

__all__ = ["MASK", "Attend", "ByteAttention", "byte_split", "corpus", "windows"]

_BYTES = 256
# A token of its own, for bytes that are to be guessed.
MASK = 256

# Queries, keys and values `(batch, heads, length, head_dim)` -> output of that shape.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, attend: Attend) -> Tensor:
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        hidden = hidden + self.out(attend(query, key, value).transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))


class ByteAttention(nn.Module):
    """Bytes, and the token `MASK`, to logits of bytes.

    Args:
        width: of the residual stream.
        heads: attention heads, dividing `width`.
        attends: how every layer attends; no parameters are in them, so models of one shape have the same parameters.
        positions: learned position vectors, for ways to attend that know no order; 0 for those that do.
    """

    def __init__(self, *, width: int, heads: int, attends: Sequence[Attend], positions: int = 0) -> None:
        super().__init__()
        self.attends = tuple(attends)
        self.embedding = nn.Embedding(_BYTES + 1, width)
        self.positions = nn.Embedding(positions, width) if positions else None
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in self.attends)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor, watch: Callable[[int, Tensor, Tensor], object] | None = None) -> Tensor:
        """Logits `(batch, length, 256)`; `watch` is shown the layer, its queries and its keys."""
        hidden = self.embedding(tokens)
        if self.positions is not None:
            hidden = hidden + self.positions.weight[: tokens.shape[1]]
        for layer, (block, attend) in enumerate(zip(self.blocks, self.attends, strict=True)):
            hidden = block(hidden, attend if watch is None else _watched(attend, watch, layer))
        return self.head(self.norm(hidden))


def _watched(attend: Attend, watch: Callable[[int, Tensor, Tensor], object], layer: int) -> Attend:
    def both(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        watch(layer, query, key)
        return attend(query, key, value)

    return both


@cache
def corpus() -> TextCorpus:
    """The standard library's source."""
    return python_source()


@cache
def byte_split(name: Literal["train", "validation", "test"]) -> Tensor:
    """One split as bytes, documents joined by newlines."""
    documents = {"train": corpus().train, "validation": corpus().validation, "test": corpus().test}[name]
    return torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8)


def windows(text: Tensor, count: int, length: int, draw: torch.Generator) -> Tensor:
    """`count` windows of `length` bytes at random places, int64."""
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=draw)
    return text[starts + torch.arange(length)].long()
