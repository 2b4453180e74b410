"""A byte-level language model on the standard library's source, with softmax or linear attention."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.attention import FavorFeatures, LinearAttention, SoftVQFeatures
from danlu.lab.data import TextCorpus, python_source
from danlu.lab.errors import TrialError
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.positions import RotaryEmbedding

__all__ = ["LinearByteLM"]

_BYTES = 256
_KINDS = ("softmax_rope", "elu1", "elu1_rope", "favor_rope", "softvq_rope")


@dataclass(frozen=True)
class LinearByteLM:
    """Next-byte prediction on Python source by a pre-norm transformer whose layers attend as `kind` says.

    Kinds: "softmax_rope"; "elu1", linear attention without positions; "elu1_rope", its numerator rotated as RoFormer
    has it; "favor_rope", `features` random features of queries and keys that are rotated before, an estimate of
    "softmax_rope"; "softvq_rope", soft assignment of width `sigma` to `features` codes per head, which are trained by
    gradient, its numerator rotated as that of "elu1_rope".

    Training: `batch_size` windows of `context` + 1 bytes at random places. Test: `windows` fixed places of the
    held-out files, the same for every arm and seed.

    Metrics: `bits_per_byte` over all positions of the windows, and `bits_per_byte@last_half` over the second halves,
    where every prediction has at least half of the context.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "byte_lm, linear attention"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "kind": "softmax_rope",
            "features": 64,
            "sigma": 0.5,
            "context": 128,
            "batch_size": 8,
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
        device = training_device(options)
        text = _split("train")
        context, batch_size = int(options["context"]), int(options["batch_size"])
        torch.manual_seed(seed)
        model = _LanguageModel(options).to(device)
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
        fit.model.eval()
        text, context = _split(split), int(options["context"])
        # Places are the same for every seed and arm: differences are then differences of models.
        starts = torch.randint(len(text) - context, (int(options["windows"]), 1), generator=generator("test", context))
        windows = text[starts + torch.arange(context + 1)].long().to(training_device(options))
        losses = torch.cat(
            [
                F.cross_entropy(fit.model(chunk[:, :-1]).transpose(1, 2), chunk[:, 1:], reduction="none")
                for chunk in windows.split(32)
            ]
        ).double() / math.log(2)
        return {
            "bits_per_byte": float(losses.mean()),
            "bits_per_byte@last_half": float(losses[:, context // 2 :].mean()),
        }


@cache
def _corpus() -> TextCorpus:
    return python_source()


@cache
def _split(name: Literal["train", "validation", "test"]) -> Tensor:
    documents = {"train": _corpus().train, "validation": _corpus().validation, "test": _corpus().test}[name]
    return torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8)


class _Attention(nn.Module):
    """From queries, keys and values, not yet rotated, `(batch, heads, length, head_dim)`."""

    def __init__(self, kind: str, heads: int, head_dim: int, features: int, sigma: float) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise TrialError(f"unknown kind {kind!r}; known: {', '.join(_KINDS)}")
        self.rope = RotaryEmbedding(head_dim) if kind in ("softmax_rope", "favor_rope") else None
        self.attend: LinearAttention | None = None
        if kind == "favor_rope":
            self.attend = LinearAttention(FavorFeatures(head_dim, features))
        elif kind == "softvq_rope":
            # Codes spread as the keys of an untrained layer are: a third is their variance.
            codes = nn.Parameter(torch.randn(heads, features, head_dim) / 3**0.5)
            self.attend = LinearAttention(SoftVQFeatures(codes, sigma=sigma), rope_base=10000.0)
        elif kind != "softmax_rope":
            self.attend = LinearAttention("elu1", rope_base=10000.0 if kind == "elu1_rope" else None)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.rope is not None:
            query, key = self.rope(query), self.rope(key)
        if self.attend is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attend(query, key, value)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, kind: str, features: int, sigma: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention = _Attention(kind, heads, width // heads, features, sigma)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        hidden = hidden + self.out(self.attention(query, key, value).transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))


class _LanguageModel(nn.Module):
    """Pre-norm decoder over bytes."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        width, heads = int(options["width"]), int(options["heads"])
        self.embedding = nn.Embedding(_BYTES, width)
        self.blocks = nn.Sequential(
            *(
                _Block(width, heads, str(options["kind"]), int(options["features"]), float(options["sigma"]))
                for _ in range(int(options["layers"]))
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))
