"""Bytes under attention masks of several kinds: the second half of a text, or bytes that are masked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu.attention import split_attention
from danlu.diagnostics import attention_rank_report, attention_sparsity, attention_weights
from danlu.lab.errors import TrialError
from danlu.lab.tasks.byte_attention import MASK, Attend, ByteAttention, byte_split, corpus, windows
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.positions import apply_rope, rope_frequencies

__all__ = ["MaskKindBytes", "attention_matrices", "layer_kinds"]

_OBJECTIVES = ("continuation", "masked")
_KINDS = ("causal", "prefix", "bidirectional", "forward_backward", "alternate")
# Windows whose attention matrices are looked at; their singular values cost more than the rest of the evaluation.
_WATCHED = 4

MaskKindName = Literal["causal", "backward", "bidirectional", "prefix", "forward_backward"]


@dataclass(frozen=True)
class MaskKindBytes:
    """Python source, by a transformer with RoPE whose heads see what `kind` says; its parameters are always the same.

    Objectives: "continuation": of `context` bytes the second half is predicted from left to right, and the first is
    the input, which `kind` may let see itself; "masked": a share `mask_rate` of the bytes is replaced by a mask token
    and guessed.

    Kinds: "causal"; "bidirectional" (masked only); "forward_backward": even heads look back, odd heads ahead; with
    "alternate" layers take turns instead; "prefix": the input sees itself in both directions (continuation only). In
    a continuation only the input looks ahead, and no further than its own end.

    Training: `batch_size` windows at random places. Test: `windows` fixed places of the held-out files with fixed
    masked bytes, the same for every arm and seed.

    Metrics: `bits_per_byte` of the bytes that are predicted; `effective_rank` and `n_eff`, the medians over layers,
    heads and four windows of the effective rank of the attention matrix, and of the number of keys that a row reads.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "bytes under masks"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "objective": "continuation",
            "kind": "causal",
            "context": 128,
            "mask_rate": 0.15,
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
        return {"windows": 512}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        found = corpus()
        return {"name": found.name, "sha256": found.sha256, "license": found.license, "split": found.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device = training_device(options)
        width, heads = int(options["width"]), int(options["heads"])
        attends = [_attend(kind, border, width // heads) for kind, border in layer_kinds(options)]
        torch.manual_seed(seed)
        model = ByteAttention(width=width, heads=heads, attends=attends).to(device)
        optimizer = make_optimizer(model, options)
        text = byte_split("train")

        def loss(step: int) -> Tensor:
            draw = generator("batch", seed, step)
            bytes_ = windows(text, int(options["batch_size"]), int(options["context"]), draw)
            tokens, targets = (x.to(device) for x in _questions(bytes_, options, draw))
            asked = targets >= 0
            return F.cross_entropy(model(tokens)[asked], targets[asked])

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
        if not isinstance(model, ByteAttention):
            raise TypeError(f"the fit is not one of this task: {type(model).__name__}")
        model.eval()
        device, context = training_device(options), int(options["context"])
        # Places and masked bytes are the same for every seed and arm: differences are then differences of models.
        draw = generator("test", context)
        bytes_ = windows(byte_split(split), int(options["windows"]), context, draw)
        tokens, targets = (x.to(device) for x in _questions(bytes_, options, draw))
        total = torch.zeros((), dtype=torch.float64, device=device)
        for some, wanted in zip(tokens.split(64), targets.split(64), strict=True):
            total += F.cross_entropy(model(some).transpose(1, 2), wanted, reduction="sum", ignore_index=-1)
        ranks: list[Tensor] = []
        reads: list[Tensor] = []
        for weights, visible in attention_matrices(model, tokens[:_WATCHED], options):
            ranks.append(attention_rank_report(weights).effective_rank)
            reads.append(attention_sparsity(weights, mask=visible, kind="n_eff").flatten())
        return {
            "bits_per_byte": float(total) / int((targets >= 0).sum()) / math.log(2),
            "effective_rank": float(torch.stack(ranks).median()),
            "n_eff": float(torch.cat(reads).nanmedian()),
        }


def layer_kinds(options: Options) -> list[tuple[MaskKindName, int | None]]:
    """The mask kind of every layer, and the length of the input that it is confined to, if it is.

    Raises:
        TrialError: an unknown objective or kind, or two that do not fit.
    """
    objective, kind = str(options["objective"]), str(options["kind"])
    if objective not in _OBJECTIVES:
        raise TrialError(f"unknown objective {objective!r}; known: {', '.join(_OBJECTIVES)}")
    if kind not in _KINDS:
        raise TrialError(f"unknown kind {kind!r}; known: {', '.join(_KINDS)}")
    if kind == ("bidirectional" if objective == "continuation" else "prefix"):
        raise TrialError(f"kind {kind!r} has no meaning for the objective {objective!r}")
    layers = int(options["layers"])
    names = [("causal", "backward")[i % 2] for i in range(layers)] if kind == "alternate" else [kind] * layers
    border = int(options["context"]) // 2 if objective == "continuation" else None
    return [(cast("MaskKindName", name), None if name in ("causal", "bidirectional") else border) for name in names]


def attention_matrices(model: ByteAttention, tokens: Tensor, options: Options) -> list[tuple[Tensor, Tensor]]:
    """The attention weights `(batch, heads, n, n)` of every layer, and which of them are visible."""
    kinds = layer_kinds(options)
    found: list[tuple[Tensor, Tensor]] = []

    def watch(layer: int, query: Tensor, key: Tensor) -> None:
        kind, border = kinds[layer]
        query, key = _rotated(query.double(), key.double())
        weights = attention_weights(query, key, kind=kind, prefix_lengths=border)
        # Weights of float64 scores of this size are 0 where hidden, and only there.
        found.append((weights, weights > 0))

    model(tokens, watch)
    return found


def _attend(kind: MaskKindName, border: int | None, head_dim: int) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = _rotated(query, key)
        return split_attention(query, key, value, kind=kind, prefix_lengths=border)

    return attend


def _rotated(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    inv_freq = rope_frequencies(query.shape[-1]).to(query.device)
    positions = torch.arange(query.shape[2], device=query.device)
    return apply_rope(query, positions, inv_freq), apply_rope(key, positions, inv_freq)


def _questions(bytes_: Tensor, options: Options, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens that the model reads, and the bytes that it is asked for; -1 where it is not asked."""
    if options["objective"] == "continuation":
        targets = bytes_[:, 1:].clone()
        targets[:, : int(options["context"]) // 2 - 1] = -1
        return bytes_[:, :-1], targets
    hidden = torch.rand(bytes_.shape, generator=draw) < float(options["mask_rate"])
    return bytes_.masked_fill(hidden, MASK), bytes_.masked_fill(~hidden, -1)
