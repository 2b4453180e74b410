"""A byte-level language model whose attention sees quantized keys, or the same keys as they are, or rotated ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.attention import Quantized, VQAttention, rope_attention
from danlu.lab.data import TextCorpus, python_source
from danlu.lab.errors import TrialError
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar

__all__ = ["QuantizedLM", "QuantizedTransformer"]

_BYTES = 256
_KINDS = ("rope", "bias", "vq")


@dataclass(frozen=True)
class QuantizedLM:
    """Next-byte prediction on Python source by a small transformer.

    `attention` is "rope" (softmax with rotary positions), "vq" (`VQAttention` with `codes` codewords per head and
    blocks of `block_size`), or "bias": softmax over the keys of "vq" before they are quantized, with the same
    normalization and the same learned bias by distance within the block and the one before. "bias" and "vq" have the
    same parameters. With `rerope`, "vq" tells distances up to a block by rotations, too (ReRoPE on quantized keys).
    `reseed_below` 0 never replaces dead codewords.

    Training: `batch_size` windows of `context` + 1 bytes at random places. Test: `windows` fixed places of the held-out
    files, the same for every arm and seed.

    Metrics: `bits_per_byte`; for "vq" also `relative_error` of the quantized keys and `codes_used`, the share of the
    codewords that are nearest to some key of the test windows, both means over layers (and heads).
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "quantized_lm"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "attention": "vq",
            "codes": 32,
            "block_size": 16,
            "rerope": False,
            "reseed_below": 0.0,
            "context": 64,
            "batch_size": 16,
            "width": 64,
            "layers": 2,
            "heads": 4,
            "device": "cpu",
        }
        return {**OPTIMIZER_OPTIONS, **own}

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"windows": 256}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        corpus = _corpus()
        return {"name": corpus.name, "sha256": corpus.sha256, "license": corpus.license, "split": corpus.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device, text = training_device(options), _split("train")
        context, batch_size = int(options["context"]), int(options["batch_size"])
        torch.manual_seed(seed)
        model = QuantizedTransformer(options).to(device)
        optimizer = make_optimizer(model, options)
        offsets = torch.arange(context + 1)

        def loss(step: int) -> Tensor:
            starts = torch.randint(len(text) - context, (batch_size, 1), generator=generator("batch", seed, step))
            window = text[starts + offsets].long().to(device)
            logits, quantized = model(window[:, :-1])
            commitment = sum((found.loss for found in quantized), torch.zeros((), device=device))
            return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()) + commitment

        return GradientFit(
            model,
            optimizer,
            loss=loss,
            schedule=lambda step: set_learning_rate(optimizer, options, step, steps),
        )

    @torch.no_grad()
    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        model = fit.model
        if not isinstance(model, QuantizedTransformer):
            raise TypeError(f"QuantizedLM evaluates a QuantizedTransformer, not {type(model).__name__}")
        model.eval()
        context, text = int(options["context"]), _split(split)
        starts = torch.randint(len(text) - context, (int(options["windows"]), 1), generator=generator("test", context))
        windows = text[starts + torch.arange(context + 1)].long().to(training_device(options))
        logits, quantized = model(windows[:, :-1])
        bits = float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())) / math.log(2)
        if not quantized:
            return {"bits_per_byte": bits}
        return {
            "bits_per_byte": bits,
            "relative_error": float(torch.stack([found.relative_error for found in quantized]).mean()),
            "codes_used": float(torch.stack([found.usage for found in quantized]).mean()),
        }


@cache
def _corpus() -> TextCorpus:
    return python_source()


@cache
def _split(name: Literal["train", "validation", "test"]) -> Tensor:
    documents = {"train": _corpus().train, "validation": _corpus().validation, "test": _corpus().test}[name]
    return torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8)


class _ExactAttention(nn.Module):
    """The arms without a quantizer: `VQAttention` on exact keys, or rotary attention."""

    def __init__(self, kind: str, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.heads, self.block_size = heads, block_size
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * block_size)) if kind == "bias" else None

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        size = width // self.heads
        query, key, value = self.qkv(hidden).view(batch, length, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        if self.bias is None:
            attended = rope_attention(query, key, value)
        else:
            query, key = (F.layer_norm(x, (size,)) * size**-0.25 for x in (query, key))
            scores = query @ key.mT + near_bias(self.bias, length, self.block_size)
            attended = scores.softmax(-1) @ value
        return self.out(attended.transpose(1, 2).reshape(batch, length, width))


def near_bias(bias: Tensor, length: int, block_size: int) -> Tensor:
    """Bias by distance `(heads, length, length)` for causal attention, 0 beyond the block before; -inf ahead."""
    slots = torch.arange(length, device=bias.device)
    distance = slots[:, None] - slots
    near = slots[:, None] // block_size - slots // block_size <= 1
    table = bias[:, distance.clamp(0, bias.shape[1] - 1)] * near
    return table.masked_fill(distance < 0, -math.inf)


class _Block(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        kind, width, heads = str(options["attention"]), int(options["width"]), int(options["heads"])
        block_size = int(options["block_size"])
        if kind not in _KINDS:
            raise TrialError(f"unknown attention {kind!r}; known: {', '.join(_KINDS)}")
        self.attention_norm = nn.LayerNorm(width)
        if kind == "vq":
            self.attention: nn.Module = VQAttention(
                width,
                heads,
                int(options["codes"]),
                block_size=block_size,
                window=block_size if options["rerope"] else None,
                reseed_below=float(options["reseed_below"]) or None,
            )
        else:
            self.attention = _ExactAttention(kind, width, heads, block_size)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Quantized | None]:
        found = self.attention(self.attention_norm(hidden))
        change, quantized = found if isinstance(found, tuple) else (found, None)
        hidden = hidden + change
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden)))), quantized


class QuantizedTransformer(nn.Module):
    """Pre-norm decoder over bytes; the options are those of the task's fit."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        width = int(options["width"])
        self.embedding = nn.Embedding(_BYTES, width)
        self.blocks = nn.ModuleList(_Block(options) for _ in range(int(options["layers"])))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Quantized]]:
        """Logits `(batch, length, 256)` of bytes `(batch, length)`, and what the quantizers say."""
        hidden = self.embedding(tokens)
        quantized: list[Quantized] = []
        for block in self.blocks:
            hidden, found = block(hidden)
            if found is not None:
                quantized.append(found)
        return self.head(self.norm(hidden)), quantized
