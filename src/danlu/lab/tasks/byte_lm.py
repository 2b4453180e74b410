"""A byte-level language model on the standard library's source: a small pre-norm transformer with RoPE."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.attention import rerope_attention
from danlu.lab.data import TextCorpus, python_source
from danlu.lab.errors import TrialError
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.positions import apply_rope, rope_frequencies

__all__ = ["ByteLM", "ByteTransformer"]

_BYTES = 256


@dataclass(frozen=True)
class ByteLM:
    """Next-byte prediction on Python source.

    Training: `batch_size` windows of `context` + 1 bytes at random places. Test: `windows` fixed places of the
    held-out files, the same for every arm and seed.

    Metrics: `bits_per_byte` over all positions of windows of the training length; for `reach` r > 1 also
    `bits_per_byte@1x`, `@2x`, ... `@rx`: the loss on the *same* last context / 2 bytes of every window, given 1, 2, 4,
    ... r times the training length of text before their end; `optimizer_bytes_per_parameter`.

    `attention` says how the model attends at evaluation: "rope" as trained, "rerope" (relative positions clipped at
    `window` times the training length, with the log-n factor for models that were trained without it if `logn`),
    "window" (only the last `context` keys).
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "byte_lm"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "context": 64,
            "batch_size": 32,
            "width": 64,
            "layers": 2,
            "heads": 4,
            "device": "cpu",
        }
        return {**OPTIMIZER_OPTIONS, **own}

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"attention": "rope", "window": 0.5, "logn": False, "reach": 1, "windows": 128}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        corpus = _corpus()
        return {"name": corpus.name, "sha256": corpus.sha256, "license": corpus.license, "split": corpus.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device = training_device(options)
        text = _split("train")
        context, batch_size = int(options["context"]), int(options["batch_size"])
        torch.manual_seed(seed)
        model = ByteTransformer(width=int(options["width"]), layers=int(options["layers"]), heads=int(options["heads"]))
        model.to(device)
        optimizer = make_optimizer(model, options)
        offsets = torch.arange(context + 1)

        def loss(step: int) -> Tensor:
            starts = torch.randint(len(text) - context, (batch_size, 1), generator=generator("batch", seed, step))
            window = text[starts + offsets].long().to(device)
            return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

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
        if not isinstance(model, ByteTransformer):
            raise TypeError(f"ByteLM evaluates a ByteTransformer, not {type(model).__name__}")
        model.eval()
        context, reach = int(options["context"]), int(options["reach"])
        text = _split(split)
        longest = context * reach
        # Places are the same for every seed and arm: differences are then differences of models.
        starts = torch.randint(len(text) - longest, (int(options["windows"]), 1), generator=generator("test", longest))
        windows = text[starts + torch.arange(longest + 1)].long().to(training_device(options))
        mode = _Attention(str(options["attention"]), context, float(options["window"]), bool(options["logn"]))
        metrics = {"bits_per_byte": _bits(model, windows[:, -context - 1 :], mode, context)}
        multiple = 1
        while reach > 1 and multiple <= reach:
            length = context * multiple
            metrics[f"bits_per_byte@{multiple}x"] = _bits(model, windows[:, -length - 1 :], mode, context // 2)
            multiple *= 2
        parameters = sum(p.numel() for p in model.parameters())
        held = sum(tensor.numel() * tensor.element_size() for tensor in fit.optimizer_state())
        metrics["optimizer_bytes_per_parameter"] = held / parameters
        return metrics


@cache
def _corpus() -> TextCorpus:
    return python_source()


@cache
def _split(name: Literal["train", "validation", "test"]) -> Tensor:
    documents = {"train": _corpus().train, "validation": _corpus().validation, "test": _corpus().test}[name]
    return torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8)


def _bits(model: "ByteTransformer", windows: Tensor, mode: "_Attention", last: int) -> float:
    """Mean loss in bits on the `last` bytes of every window."""
    total = 0.0
    # Eight windows at a time keep the score matrices of long contexts small.
    for chunk in windows.split(8):
        logits = model(chunk[:, :-1], mode)[:, -last:]
        total += float(F.cross_entropy(logits.flatten(0, 1), chunk[:, -last:].flatten(), reduction="sum"))
    return total / (len(windows) * last) / math.log(2)


@dataclass(frozen=True)
class _Attention:
    """How to attend: "rope", "rerope" or "window", for a model trained at length `context`."""

    kind: str = "rope"
    context: int = 0
    window: float = 0.5
    logn: bool = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, inv_freq: Tensor) -> Tensor:
        """Attend; all shapes are (batch, heads, length, head_dim), queries and keys not yet rotated."""
        if self.kind == "rerope":
            window = max(1, round(self.window * self.context))
            return rerope_attention(
                query,
                key,
                value,
                window=window,
                inv_freq=inv_freq,
                logn="post" if self.logn else None,
                train_length=self.context if self.logn else None,
            )
        positions = torch.arange(query.shape[-2], device=query.device)
        query, key = (apply_rope(x, positions, inv_freq) for x in (query, key))
        if self.kind == "rope":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if self.kind == "window":
            distance = positions[:, None] - positions
            visible = (distance >= 0) & (distance < self.context)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        raise TrialError(f"unknown attention {self.kind!r}; known: rope, rerope, window")


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

    def forward(self, hidden: Tensor, mode: _Attention, inv_freq: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = mode(query, key, value, inv_freq).transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + self.out(attended)
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))


class ByteTransformer(nn.Module):
    """Pre-norm decoder over bytes; no position but RoPE.

    Args:
        width: of the residual stream.
        layers: number of blocks.
        heads: attention heads; `width / heads` must be even.
    """

    def __init__(self, *, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_BYTES, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        # A plain attribute: it is a constant, and stays float64 whatever the model is cast to.
        self.inv_freq = rope_frequencies(width // heads)

    def forward(self, tokens: Tensor, mode: _Attention | None = None) -> Tensor:
        """Logits `(batch, length, 256)` of bytes `(batch, length)`."""
        hidden = self.embedding(tokens)
        inv_freq = self.inv_freq.to(tokens.device)
        for block in self.blocks:
            hidden = block(hidden, mode or _Attention(), inv_freq)
        return self.head(self.norm(hidden))
