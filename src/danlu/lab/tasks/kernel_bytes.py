"""A byte-level language model whose attention weights come from one of several kernels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu.diagnostics import attention_sparsity
from danlu.lab.tasks.associative_recall import check_kernel, recall_weights
from danlu.lab.tasks.byte_attention import Attend, ByteAttention, byte_split, corpus, windows
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar

__all__ = ["KernelBytes", "causal_weights"]


@dataclass(frozen=True)
class KernelBytes:
    """Next-byte prediction on Python source by a transformer whose causal weights come from `kernel`.

    Kernels: "softmax", "elu1" (linear attention with elu + 1) and "relu2" (the square of relu), each with rows that
    sum to 1. Positions are learned vectors that are added to the bytes, so all kernels are told them alike.

    Training: `batch_size` windows of `context` + 1 bytes at random places. Test: `windows` fixed places of the
    held-out files, the same for every arm and seed.

    Metrics: `bits_per_byte`; over the rows of all layers and heads that see at least half of the context: `n_eff`, the
    median number of keys that a row reads, `n_eff@5%` and `n_eff@95%`, the quantiles, and `s`, the median of S.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "byte_lm, kernels of attention"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "kernel": "softmax",
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
        found = corpus()
        return {"name": found.name, "sha256": found.sha256, "license": found.license, "split": found.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device, context = training_device(options), int(options["context"])
        torch.manual_seed(seed)
        model = ByteAttention(
            width=int(options["width"]),
            heads=int(options["heads"]),
            attends=[_attend(str(options["kernel"]))] * int(options["layers"]),
            positions=context,
        )
        model.to(device)
        optimizer = make_optimizer(model, options)
        text = byte_split("train")

        def loss(step: int) -> Tensor:
            draw = generator("batch", seed, step)
            some = windows(text, int(options["batch_size"]), context + 1, draw).to(device)
            return F.cross_entropy(model(some[:, :-1]).flatten(0, 1), some[:, 1:].flatten())

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
        context, kernel = int(options["context"]), str(options["kernel"])
        # Places are the same for every seed and arm: differences are then differences of models.
        draw = generator("test", context)
        held_out = windows(byte_split(split), int(options["windows"]), context + 1, draw).to(training_device(options))
        total = torch.zeros((), dtype=torch.float64, device=held_out.device)
        for some in held_out.split(32):
            total += F.cross_entropy(model(some[:, :-1]).transpose(1, 2), some[:, 1:], reduction="sum")
        reads: list[Tensor] = []
        sharpness: list[Tensor] = []

        def watch(layer: int, query: Tensor, key: Tensor) -> None:
            weights, visible = causal_weights(kernel, query, key)
            weights, visible = (x[..., context // 2 :, :] for x in (weights, visible))
            reads.append(attention_sparsity(weights, mask=visible, kind="n_eff").flatten())
            sharpness.append(attention_sparsity(weights, mask=visible).flatten())

        model(held_out[:8, :-1], watch)
        low, middle, high = (
            torch.cat(reads).nanquantile(torch.tensor([0.05, 0.5, 0.95], device=held_out.device)).tolist()
        )
        return {
            "bits_per_byte": float(total) / held_out[:, 1:].numel() / math.log(2),
            "n_eff": middle,
            "n_eff@5%": low,
            "n_eff@95%": high,
            "s": float(torch.cat(sharpness).nanmedian()),
        }


def causal_weights(kernel: str, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `(..., n, n)` in which a row reads nothing behind itself, and the mask that says so."""
    count = query.shape[-2]
    visible = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()
    return recall_weights(kernel, query, key, visible), visible


def _attend(kernel: str) -> Attend:
    check_kernel(kernel)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_weights(kernel, query, key)[0] @ value

    return attend
