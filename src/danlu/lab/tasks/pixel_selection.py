"""Choosing the pixels of scikit-learn's digits by which they are recognized: learned by smooth top-k, or by filters."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import numpy as np
import torch
from sklearn.feature_selection import f_classif, mutual_info_classif
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.lab.data import digits
from danlu.lab.errors import TrialError
from danlu.lab.tasks.training import GradientFit, generator
from danlu.lab.trial import Fit, Options, Scalar
from danlu.simplex import soft_topk

__all__ = ["PixelSelection", "PixelSelector"]

_FILTERS = ("random", "anova", "mutual_information")
_SMOOTH = ("exp", "laplace", "sigmoid", "clip", "grad")
_LEARNED = (*_SMOOTH, "iter", "straight_through", "scaled_softmax")
# The temperature falls from 1 to this.
_LEAST_TEMPERATURE = 0.03


@dataclass(frozen=True)
class PixelSelection:
    """8x8 digits of which a network 64-64-10 sees `k` pixels.

    For the first `search` of the steps a score of every pixel is learned together with a network whose input is
    multiplied by a smooth mask of the scores; then the network starts anew on the `k` pixels of the highest scores.
    Filters rank the pixels before, and their network trains on them for the whole time.

    Metrics on held-out digits: `accuracy` after the second part; `searched_accuracy` of the network of the first part
    with the hard mask; `chosen_overlap`, the share of the pixels that are also the best by analysis of variance.
    """

    search: float = 0.6

    @property
    def name(self) -> str:
        """Name for tables."""
        return "pixel_selection"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {"method": "laplace", "k": 6, "lr": 0.003, "score_lr": 0.05, "batch_size": 100}
        return own

    @property
    def evaluate_options(self) -> Options:
        """None."""
        return {}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        data = digits(seed=0, train=1000, validation=300)
        return {"name": data.name, "sha256": data.sha256, "license": data.license, "split": data.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        data = digits(seed=seed, train=1000, validation=300)
        images, labels = (torch.from_numpy(a) for a in (data.train_inputs, data.train_targets))
        method, batch_size = str(options["method"]), int(options["batch_size"])
        searched = int(self.search * steps) if method in _LEARNED else 0
        model = PixelSelector(method, int(options["k"]), seed)
        if method in _FILTERS:
            with torch.no_grad():
                model.scores.copy_(_filter(method, seed))
        groups = [
            {"params": [model.scores], "lr": float(options["score_lr"])},
            {"params": list(model.network.parameters()), "lr": float(options["lr"])},
        ]
        optimizer = torch.optim.Adam(groups)

        def loss(step: int) -> Tensor:
            rows = torch.randint(len(images), (batch_size,), generator=generator("batch", seed, step))
            progress = step / max(1, searched - 1)
            mask = model.mask(_LEAST_TEMPERATURE**progress) if step < searched else model.hard_mask()
            return F.cross_entropy(model.network(images[rows] * mask), labels[rows])

        def schedule(step: int) -> None:
            if step == searched and searched:
                model.keep_searched()
                model.start_network(seed + 1)
                optimizer.state.clear()

        return GradientFit(model, optimizer, loss=loss, schedule=schedule)

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        data = digits(seed=seed, train=1000, validation=300)
        arrays = (data.validation_inputs, data.validation_targets) if split == "validation" else None
        inputs, targets = arrays or (data.test_inputs, data.test_targets)
        images, labels = torch.from_numpy(inputs), torch.from_numpy(targets)
        model = cast("PixelSelector", cast("GradientFit", fit).model)
        model.eval()
        mask, k = model.hard_mask(), int(options["k"])
        found = {"chosen_overlap": float(mask[_filter("anova", seed).topk(k).indices].mean())}
        with torch.no_grad():
            for name, network in (("accuracy", model.network), ("searched_accuracy", model.searched)):
                if name == "accuracy" or str(options["method"]) in _LEARNED:
                    found[name] = float((network(images * mask).argmax(1) == labels).double().mean())
        return found


class PixelSelector(nn.Module):
    """Scores of 64 pixels, and a network on the pixels that they choose."""

    def __init__(self, method: str, k: int, seed: int) -> None:
        super().__init__()
        if method not in _FILTERS + _LEARNED:
            raise TrialError(f"unknown method {method!r}; known: {', '.join(_FILTERS + _LEARNED)}")
        self.method, self.k = method, k
        self.scores = nn.Parameter(torch.zeros(64))
        self.network = _network()
        # The network of the search, kept when the second part begins.
        self.searched = _network().requires_grad_(False)
        self.start_network(seed)
        self.keep_searched()

    def start_network(self, seed: int) -> None:
        """Draw the network anew."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network.load_state_dict(_network().state_dict())

    def keep_searched(self) -> None:
        """Keep the network as it is."""
        self.searched.load_state_dict(self.network.state_dict())

    def mask(self, temperature: float) -> Tensor:
        """The smooth mask of the search."""
        x = self.scores / temperature
        if self.method == "scaled_softmax":
            return (self.k * torch.softmax(x, -1)).clamp(max=1)
        if self.method == "straight_through":
            return soft_topk(x, self.k, hard=True)
        if self.method == "iter":
            return _iterated(x, self.k)
        return soft_topk(x, self.k, method=cast("Any", self.method))

    @torch.no_grad()
    def hard_mask(self) -> Tensor:
        """1 for the pixels of the k highest scores, else 0."""
        return torch.zeros_like(self.scores).index_fill_(0, self.scores.topk(self.k).indices, 1.0)


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _iterated(x: Tensor, k: int) -> Tensor:
    """`soft_topk(x, k, method="iter")` without its warning: this arm is there to show what it does."""
    x, p = x - x.min(), torch.zeros_like(x)
    for _ in range(k):
        p = p + torch.softmax((1 - p) * x, -1)
    return p


@cache
def _filter(method: str, seed: int) -> Tensor:
    """A score of every pixel from the training digits alone."""
    data = digits(seed=seed, train=1000, validation=300)
    if method == "random":
        return torch.rand(64, generator=generator("pixels", seed))
    inputs, targets = data.train_inputs, data.train_targets
    if method == "anova":
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            # Of constant pixels, which get the lowest score below.
            warnings.simplefilter("ignore", UserWarning)
            found = f_classif(inputs, targets)[0]
    else:
        found = mutual_info_classif(inputs, targets, random_state=seed)
    # A pixel that is always white says nothing.
    return torch.from_numpy(np.nan_to_num(np.asarray(found), nan=0.0).astype(np.float32))
