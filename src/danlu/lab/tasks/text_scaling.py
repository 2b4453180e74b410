"""Byte-level language models of several sizes on the same number of tokens: a scaling law in the parameters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.diagnostics import PowerLawFit, fit_power_law
from danlu.lab.data import TextCorpus, python_source
from danlu.lab.errors import TrialError
from danlu.lab.tasks.byte_lm import ByteTransformer
from danlu.lab.tasks.family import FamilyFit, Member
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import generator, training_device
from danlu.lab.trial import Fit, Options, Scalar

__all__ = ["TextScaling"]

# Width at which the learning rate is `lr`; it goes with 1 / width.
_REFERENCE_WIDTH = 64
_LAWS = ("measured", "power_law", "power_law_with_floor")


@dataclass(frozen=True)
class TextScaling:
    r"""Next-byte prediction on Python source by transformers of `widths`, all on the same batches.

    `law` says how the test losses over the numbers of parameters are read: "power_law" $A N^{-\alpha}$,
    "power_law_with_floor" $E + A N^{-\alpha}$, or "measured", which claims nothing and errs by 0.

    Metrics: `exponent` and `floor` of the law over all sizes; `exponent_half_width` of its 95 % interval, relative;
    `extrapolation_error`, the distance in log of the largest model's loss to the law fitted to the smaller ones;
    `bits_per_byte@w` of every size, `test_loss` their mean.
    """

    widths: tuple[int, ...] = (8, 16, 24, 32, 48, 64, 96)

    @property
    def name(self) -> str:
        """Name for tables."""
        return "text_scaling"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {"context": 64, "batch_size": 16, "layers": 2, "heads": 2, "device": "cpu"}
        return {**OPTIMIZER_OPTIONS, **own, "lr": 4e-3, "sizes": len(self.widths)}

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"law": "measured", "windows": 512}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        corpus = _corpus()
        return {"name": corpus.name, "sha256": corpus.sha256, "license": corpus.license, "split": corpus.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        torch.manual_seed(seed)
        return FamilyFit(
            [_member(width, seed, steps, options) for width in self.widths[: int(options["sizes"])]],
            records=(),
            record=lambda model, index: torch.empty(0),
        )

    @torch.no_grad()
    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        if not isinstance(fit, FamilyFit):
            raise TypeError(f"TextScaling evaluates a FamilyFit, not {type(fit).__name__}")
        law = str(options["law"])
        if law not in _LAWS:
            raise TrialError(f"unknown law {law!r}; known: {', '.join(_LAWS)}")
        params = [float(sum(p.numel() for p in member.model.parameters())) for member in fit.members]
        losses = [_bits(member.model, split, options) for member in fit.members]
        metrics = {f"bits_per_byte@width_{width}": loss for width, loss in zip(self.widths, losses, strict=False)} | {
            "test_loss": sum(losses) / len(losses)
        }
        if law == "measured":
            return metrics | {"exponent_half_width": 0.0, "extrapolation_error": 0.0}
        floor = law == "power_law_with_floor"
        whole = fit_power_law(params, losses, irreducible=floor, seed=seed)
        part = fit_power_law(params[:-1], losses[:-1], irreducible=floor, bootstrap=0)
        return metrics | {
            "exponent": whole.alpha,
            "floor": whole.E,
            "exponent_half_width": _half_width(whole),
            "extrapolation_error": abs(math.log(float(part.predict(params[-1])) / losses[-1])),
        }


def _member(width: int, seed: int, steps: int, options: Options) -> Member:
    device = training_device(options)
    context, batch_size = int(options["context"]), int(options["batch_size"])
    text = _split("train")
    model = ByteTransformer(width=width, layers=int(options["layers"]), heads=int(options["heads"])).to(device)
    own = {**options, "lr": float(options["lr"]) * _REFERENCE_WIDTH / width}
    optimizer = make_optimizer(model, own)
    offsets = torch.arange(context + 1)

    def loss(step: int) -> Tensor:
        # The same batches for every size.
        starts = torch.randint(len(text) - context, (batch_size, 1), generator=generator("batch", seed, step))
        window = text[starts + offsets].long().to(device)
        return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    return Member(model, optimizer, loss, lambda step: set_learning_rate(optimizer, own, step, steps))


def _bits(model: nn.Module, split: Literal["validation", "test"], options: Options) -> float:
    """Mean loss in bits over fixed windows of the split, the same for every seed and size."""
    model.eval()
    text, context, count = _split(split), int(options["context"]), int(options["windows"])
    starts = torch.randint(len(text) - context, (count, 1), generator=generator("test", context))
    windows = text[starts + torch.arange(context + 1)].long().to(training_device(options))
    total = 0.0
    for chunk in windows.split(64):
        loss = F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum")
        total += float(loss)
    return total / (count * context) / math.log(2)


def _half_width(fit: PowerLawFit) -> float:
    low, high = fit.intervals["alpha"]
    return (high - low) / 2 / abs(fit.alpha)


@cache
def _corpus() -> TextCorpus:
    return python_source()


@cache
def _split(name: Literal["train", "validation", "test"]) -> Tensor:
    documents = {"train": _corpus().train, "validation": _corpus().validation, "test": _corpus().test}[name]
    return torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8)
