"""Bucket sort by a small encoder: a task that is not local, learned on short strings and tested on long ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu.lab.errors import TrialError
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.position_encoder import PositionEncoder
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.positions import even_positions, random_positions

__all__ = ["BucketSort", "SortEncoder", "draw_strings"]


@dataclass(frozen=True)
class BucketSort:
    """Write a string of `symbols` symbols in sorted order: n symbols, then n blanks, where the answer is read.

    Training: each step draws one n from 1 to `longest` and `batch_size` strings. Test: `strings` strings for each n of
    `lengths`, the same for every arm and seed.

    Metrics: `accuracy@n`, the share of symbols of the answer that are right (the score of the Chomsky hierarchy
    benchmark).

    `encoding` is "rope" or "alibi". `trained_on` says which position ids the training has: "plain", "sorted" (a random
    subset of `max_position`) or "equal_mean" (plain ones times a random number of mean 1). `read_with` says which the
    test has: "plain", "even" (evenly spaced over `max_position`) or "random" (a new subset per string). `logn` scales
    queries by the log-n factor for encoders, in training and test. With `local` a token sees, at test, at most as many
    nearest tokens as the longest training input has.
    """

    symbols: int = 5
    lengths: tuple[int, ...] = (10, 20, 30, 40, 60, 100)

    @property
    def name(self) -> str:
        """Name for tables."""
        return "bucket sort"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "encoding": "rope",
            "trained_on": "plain",
            "logn": False,
            "longest": 20,
            "max_position": 256,
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
        return {"read_with": "plain", "local": False, "strings": 64}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        return {
            "name": f"strings of {self.symbols} symbols, drawn at random",
            "sha256": "none: drawn from the seed",
            "license": "none: made here",
            "split": "validation and test strings are drawn from seeds of their own",
        }

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device = training_device(options)
        longest, limit, batch_size = (int(options[name]) for name in ("longest", "max_position", "batch_size"))
        mode = str(options["trained_on"])
        if mode not in ("plain", "sorted", "equal_mean"):
            raise TrialError(f"unknown positions {mode!r}; known: plain, sorted, equal_mean")
        torch.manual_seed(seed)
        model = SortEncoder(
            self.symbols,
            width=int(options["width"]),
            layers=int(options["layers"]),
            heads=int(options["heads"]),
            encoding=str(options["encoding"]),
            logn=2 * longest if options["logn"] else None,
        ).to(device)
        optimizer = make_optimizer(model, options)

        def loss(step: int) -> Tensor:
            source = generator("batch", seed, step)
            n = int(torch.randint(1, longest + 1, (), generator=source))
            strings = draw_strings(batch_size, n, self.symbols, source)
            lengths = torch.full((batch_size,), 2 * n)
            positions = torch.arange(2 * n)
            if mode == "sorted":
                positions = random_positions(lengths, limit, generator=source)
            elif mode == "equal_mean":
                positions = random_positions(lengths, mode="equal_mean", generator=source)
            logits = model(strings.to(device), positions.to(device))
            return F.cross_entropy(logits.flatten(0, 1), strings.sort(1).values.flatten().to(device))

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
        if not isinstance(model, SortEncoder):
            raise TypeError(f"BucketSort evaluates a SortEncoder, not {type(model).__name__}")
        model.eval()
        device, limit, how = training_device(options), int(options["max_position"]), str(options["read_with"])
        count = int(options["strings"])
        metrics: dict[str, float] = {}
        for n in self.lengths:
            source = generator("strings", split, n)
            strings = draw_strings(count, n, self.symbols, source)
            lengths = torch.full((count,), 2 * n)
            if how == "plain":
                positions = torch.arange(2 * n)
            elif how == "even":
                positions = even_positions(lengths, limit)
            elif how == "random":
                positions = random_positions(lengths, limit, generator=source)
            else:
                raise TrialError(f"unknown positions {how!r}; known: plain, even, random")
            window = 2 * int(options["longest"]) if options["local"] else None
            right = 0
            # A few at a time keep the scores of long strings small.
            for rows in range(0, count, 16):
                part = strings[rows : rows + 16]
                chunk = positions if positions.ndim == 1 else positions[rows : rows + 16]
                guess = model(part.to(device), chunk.to(device), window).argmax(-1).cpu()
                right += int((guess == part.sort(1).values).sum())
            metrics[f"accuracy@{n}"] = right / (count * n)
        return metrics


def draw_strings(count: int, length: int, symbols: int, source: torch.Generator) -> Tensor:
    """Strings `(count, length)` of independent symbols."""
    return torch.randint(symbols, (count, length), generator=source)


class SortEncoder(PositionEncoder):
    """Encoder that reads a string and as many blanks, and answers in the blanks.

    Args:
        symbols: number of symbols; one more token is the blank.
        width: as in the encoder, like all others.
        layers: number of layers.
        heads: attention heads.
        encoding: "rope" or "alibi".
        logn: training length of the log-n scale; None means no scale.
    """

    def __init__(self, symbols: int, *, width: int, layers: int, heads: int, encoding: str, logn: int | None) -> None:
        super().__init__(symbols + 1, symbols, width=width, layers=layers, heads=heads, encoding=encoding, logn=logn)
        self.blank = symbols

    def forward(self, tokens: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
        """Logits `(batch, n, symbols)` of strings `(batch, n)` at positions `(2n,)` or `(batch, 2n)`."""
        blanks = torch.full_like(tokens, self.blank)
        return super().forward(torch.cat((tokens, blanks), dim=1), positions, window)[:, tokens.shape[1] :]
