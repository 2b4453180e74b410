"""Masked bytes of Python source, learned in short windows and guessed in long ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu.lab.errors import TrialError
from danlu.lab.tasks.byte_mlp import SYMBOLS, byte_batch, byte_data
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.position_encoder import PositionEncoder
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.positions import even_positions, random_positions

__all__ = ["MaskedBytes", "hide"]

_SHARE = 0.15


@dataclass(frozen=True)
class MaskedBytes:
    """Guess the 15 % of bytes that are replaced by a mask token, by an encoder.

    Printable ASCII and the newline have symbols of their own, all other bytes share one.

    Training: windows of `context` bytes at random places. Test: `windows` fixed places of the held-out files, the same
    for every arm and seed. The bytes that count are the hidden ones among the middle `context` of every window, the
    same ones whatever the length of the text around them.

    Metrics: `accuracy@rx`, their share that is guessed right, and `bits@rx`, the mean loss, given r = 1, 2, 4, ...
    `reach` times the training length of text.

    `encoding`, `trained_on`, `read_with`, `logn` and `local` are those of the bucket sort; `logn` is one of evaluation
    here, since all texts of the training have the length for which the factor is 1.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "masked bytes"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "encoding": "rope",
            "trained_on": "plain",
            "context": 64,
            "max_position": 1024,
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
        return {"read_with": "plain", "logn": False, "local": False, "reach": 8, "windows": 128}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        return byte_data()

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device = training_device(options)
        context, limit, batch_size = (int(options[name]) for name in ("context", "max_position", "batch_size"))
        mode = str(options["trained_on"])
        if mode not in ("plain", "sorted", "equal_mean"):
            raise TrialError(f"unknown positions {mode!r}; known: plain, sorted, equal_mean")
        torch.manual_seed(seed)
        model = PositionEncoder(
            SYMBOLS + 1,
            SYMBOLS,
            width=int(options["width"]),
            layers=int(options["layers"]),
            heads=int(options["heads"]),
            encoding=str(options["encoding"]),
            logn=None,
        ).to(device)
        optimizer = make_optimizer(model, options)
        lengths = torch.full((batch_size,), context)

        def loss(step: int) -> Tensor:
            source = generator("batch", seed, step)
            text = byte_batch("train", context, batch_size, source)[0]
            tokens, hidden = hide(text, source)
            positions = torch.arange(context)
            if mode == "sorted":
                positions = random_positions(lengths, limit, generator=source)
            elif mode == "equal_mean":
                positions = random_positions(lengths, mode="equal_mean", generator=source)
            logits = model(tokens.to(device), positions.to(device))
            return F.cross_entropy(logits[hidden.to(device)], text[hidden].to(device))

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
        if not isinstance(model, PositionEncoder):
            raise TypeError(f"MaskedBytes evaluates a PositionEncoder, not {type(model).__name__}")
        model.eval()
        device, how = training_device(options), str(options["read_with"])
        context, reach, limit = int(options["context"]), int(options["reach"]), int(options["max_position"])
        if how not in ("plain", "even", "random"):
            raise TrialError(f"unknown positions {how!r}; known: plain, even, random")
        source = generator("windows", split, context, reach)
        text = byte_batch(split, context * reach, int(options["windows"]), source)[0]
        tokens, hidden = hide(text, source)
        window = context if options["local"] else None
        model.logn = context if options["logn"] else None
        metrics: dict[str, float] = {}
        multiple = 1
        while multiple <= reach:
            length = context * multiple
            first = (context * reach - length) // 2
            middle = slice((length - context) // 2, (length + context) // 2)
            right, total, count = 0, 0.0, 0
            # A few at a time keep the scores of long windows small.
            for rows in torch.arange(len(text)).split(16):
                part, shown, masked = (x[rows, first : first + length] for x in (text, tokens, hidden))
                lengths = torch.full((len(rows),), length)
                positions = torch.arange(length)
                if how == "even":
                    positions = even_positions(lengths, limit)
                elif how == "random":
                    positions = random_positions(lengths, limit, generator=source)
                logits = model(shown.to(device), positions.to(device), window)[:, middle].cpu()[masked[:, middle]]
                target = part[:, middle][masked[:, middle]]
                right += int((logits.argmax(-1) == target).sum())
                total += float(F.cross_entropy(logits, target, reduction="sum"))
                count += len(target)
            metrics[f"accuracy@{multiple}x"] = right / count
            metrics[f"bits@{multiple}x"] = total / count / math.log(2)
            multiple *= 2
        return metrics


def hide(text: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens with 15 % of the bytes replaced by the mask token 97, and which ones, at least one of every row."""
    scores = torch.rand(text.shape, generator=source)
    # The lowest is hidden whatever it is, so that no batch is without a target.
    hidden = (scores < _SHARE) | (scores == scores.amin(1, keepdim=True))
    return text.masked_fill(hidden, SYMBOLS), hidden
