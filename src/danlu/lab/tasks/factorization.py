"""Nonnegative factorization of digit images, with a part of the pixels held out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from danlu.lab.data import digits
from danlu.lab.errors import TrialError
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options
from danlu.optim import ExponentiatedGradient

__all__ = ["Factorization", "Factors"]

# A factor's element below this part of its largest one counts as 0.
_ZERO = 1e-3


class Factors(nn.Module):
    r"""Nonnegative $W$ `(rows, rank)` and $H$ `(rank, columns)` with the product $WH$.

    With `softplus` the parameters are the inverse of the softplus of the factors, else the factors themselves.
    """

    def __init__(self, left: Tensor, right: Tensor, *, softplus: bool) -> None:
        super().__init__()
        self.softplus = softplus
        self.left = nn.Parameter(left.expm1().log() if softplus else left)
        self.right = nn.Parameter(right.expm1().log() if softplus else right)

    def factors(self) -> tuple[Tensor, Tensor]:
        """W and H."""
        return (F.softplus(self.left), F.softplus(self.right)) if self.softplus else (self.left, self.right)

    def forward(self) -> Tensor:
        """WH."""
        left, right = self.factors()
        return left @ right


@dataclass(frozen=True)
class Factorization:
    r"""$X \approx WH$ for 64 pixels of digit images: half of the squared error, per image, over the pixels shown.

    Methods: `egu` (`ExponentiatedGradient`), `projected` (gradient descent, then negative elements to 0), `softplus`
    (gradient descent on the inverse softplus of the factors). All start from the same positive factors, with one
    learning rate for W times the number of images (its gradient is that much smaller) and one for H, and take full
    batches. The images, what is held out, and the start are drawn anew for every seed.

    Metrics: `relative_error@shown`, the root of the squared error over that of predicting 0, on the pixels that were
    learned from, which is the objective; `relative_error@held_out` on validation or test pixels; `zeros`, the part of
    both factors that is below a thousandth of the largest element of its factor.
    """

    images: int = 600

    @property
    def name(self) -> str:
        """Name for tables."""
        return "nonnegative factorization of digits"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {"method": "egu", "lr": 0.1, "rank": 16, "device": "cpu"}

    @property
    def evaluate_options(self) -> Options:
        """None."""
        return {}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        data = digits(seed=0, train=self.images)
        split = f"{self.images} images by seed; of their pixels 80 % shown, 10 % validation, 10 % test"
        return {"name": data.name, "sha256": data.sha256, "license": data.license, "split": split}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device, rank = training_device(options), int(options["rank"])
        images, part = (one.to(device) for one in self._pixels(seed))
        shown = part == 0
        # The product has the mean of the images.
        size = float(images[shown].mean() / rank) ** 0.5
        random = generator("factors", seed)
        left, right = (
            size * (0.5 + torch.rand(shape, generator=random)).to(device) for shape in ((len(images), rank), (rank, 64))
        )
        model = Factors(left, right, softplus=options["method"] == "softplus")
        rate = float(options["lr"])
        groups: list[dict[str, Any]] = [
            {"params": [model.left], "lr": rate * len(images)},
            {"params": [model.right], "lr": rate},
        ]

        def loss(_: int) -> Tensor:
            return (shown * (images - model())).square().sum() / (2 * len(images))

        optimizer = _optimizer(str(options["method"]), groups)
        fit = GradientFit(model, optimizer, loss=loss, schedule=lambda _: None)
        if options["method"] == "projected":
            fit.observe = lambda _: _project(model)
        return fit

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Errors on the shown pixels and on one split of the others, and zeros of the factors."""
        images, part = (one.to(training_device(options)) for one in self._pixels(seed))
        model = fit.model
        assert isinstance(model, Factors)
        with torch.no_grad():
            residual = (images - model()).double()
            factors = model.factors()
        held_out = part == (1 if split == "validation" else 2)
        zeros = sum(int((factor < _ZERO * factor.max()).sum()) for factor in factors)
        return {
            "relative_error@shown": _relative(residual, images, part == 0),
            "relative_error@held_out": _relative(residual, images, held_out),
            "zeros": zeros / sum(factor.numel() for factor in factors),
        }

    def _pixels(self, seed: int) -> tuple[Tensor, Tensor]:
        """Images `(images, 64)` and what every pixel is for: 0 shown, 1 validation, 2 test."""
        images = torch.from_numpy(digits(seed=seed, train=self.images).train_inputs)
        chance = torch.rand(images.shape, generator=generator("held out", seed))
        return images, (chance >= 0.8).long() + (chance >= 0.9).long()


def _relative(residual: Tensor, images: Tensor, where: Tensor) -> float:
    return float(residual[where].square().sum().sqrt() / images[where].double().square().sum().sqrt())


@torch.no_grad()
def _project(model: Factors) -> dict[str, float]:
    for factor in (model.left, model.right):
        factor.clamp_(min=0.0)
    return {}


def _optimizer(method: str, groups: list[dict[str, Any]]) -> Optimizer:
    if method == "egu":
        return ExponentiatedGradient(groups)
    if method in ("projected", "softplus"):
        return SGD(groups)
    raise TrialError(f"unknown method {method!r}; known: egu, projected, softplus")
