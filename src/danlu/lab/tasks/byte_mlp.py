"""The next byte of Python source from the sixteen before it, by a small residual network: cheap enough for sweeps."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.lab.data import TextCorpus, python_source
from danlu.lab.tasks.training import generator

__all__ = ["ResidualMLP", "bits_per_byte", "byte_batch", "byte_data", "symbols"]

# Printable ASCII, newline, and one symbol for all other bytes: what never occurs would cost every fit its first steps.
SYMBOLS = 97
_EMBEDDING = 16

Split = Literal["train", "validation", "test"]


class ResidualMLP(nn.Module):
    """Pre-norm residual network over the concatenated embeddings of a window of bytes.

    Args:
        context: bytes in the window.
        width: of the residual stream.
        layers: number of residual blocks, one matrix each.
    """

    def __init__(self, *, context: int, width: int, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, _EMBEDDING)
        self.input = nn.Linear(context * _EMBEDDING, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, SYMBOLS)
        # With PyTorch's 1 the first matrix learns nothing in the few hundred steps that a sweep can afford.
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, windows: Tensor) -> Tensor:
        """Logits `(batch, 97)` of the byte after each of the windows `(batch, context)`."""
        hidden = self.input(self.embedding(windows).flatten(1))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            hidden = hidden + F.gelu(layer(norm(hidden)))
        return self.head(self.norm(hidden))


@cache
def _corpus() -> TextCorpus:
    return python_source()


@cache
def _text(split: Split) -> Tensor:
    documents = {"train": _corpus().train, "validation": _corpus().validation, "test": _corpus().test}[split]
    return symbols(b"\n".join(documents))


def symbols(text: bytes) -> Tensor:
    """The symbol of every byte: 0 to 94 for printable ASCII, 95 for a newline, 96 for all others."""
    table = torch.full((256,), 96, dtype=torch.uint8)
    table[32:127] = torch.arange(95, dtype=torch.uint8)
    table[10] = 95
    return table[torch.frombuffer(bytearray(text), dtype=torch.uint8).int()]


def byte_data() -> Mapping[str, str]:
    """What the numbers rest on."""
    corpus = _corpus()
    return {"name": corpus.name, "sha256": corpus.sha256, "license": corpus.license, "split": corpus.split_rule}


def byte_batch(split: Split, context: int, batch_size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows `(batch, context)` at places drawn from `source`, and the byte after each, `(batch,)`."""
    text = _text(split)
    places = torch.randint(len(text) - context, (batch_size, 1), generator=source)
    windows = text[places + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, -1]


@torch.no_grad()
def bits_per_byte(model: nn.Module, split: Split, context: int, places: int) -> float:
    """Mean loss in bits at `places` fixed places of a split; a model that diverged has NaN."""
    windows, targets = byte_batch(split, context, places, generator("places", split, context))
    model.eval()
    total = 0.0
    # Parts of a size that stays in the cache.
    for part, wanted in zip(windows.split(2048), targets.split(2048), strict=True):
        total += float(F.cross_entropy(model(part), wanted, reduction="sum"))
    return total / len(windows) / math.log(2)
