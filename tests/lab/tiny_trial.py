"""A trial that takes milliseconds, for tests of the laboratory itself: noisy linear regression."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from danlu.lab.tasks.training import GradientFit, generator
from danlu.lab.trial import Arm, Budget, Comparison, Trial


@dataclass(frozen=True)
class Regression:
    size: int = 32
    slow: float = 0.0

    @property
    def name(self) -> str:
        return "regression"

    @property
    def fit_options(self):
        return {"lr": 0.1, "replica": 0, "broken": False}

    @property
    def evaluate_options(self):
        return {"bias": 0.0}

    def data(self) -> Mapping[str, str]:
        return {"name": "made", "sha256": "0" * 64, "license": "none", "split": "fresh noise"}

    def start(self, *, seed, steps, options):
        import time

        if options["broken"]:
            raise RuntimeError("this arm is broken on purpose")
        torch.manual_seed(seed)
        model = torch.nn.Linear(4, 1)
        # Adam, so that resuming needs more than the weights.
        optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"])
        target = torch.tensor([1.0, -2.0, 0.5, 0.0])

        def loss(step):
            time.sleep(self.slow)
            inputs = torch.randn(self.size, 4, generator=generator("batch", seed, options["replica"], step))
            noise = torch.randn(self.size, generator=generator("noise", seed, options["replica"], step))
            return (model(inputs)[:, 0] - inputs @ target - noise).square().mean()

        return GradientFit(model, optimizer, loss=loss, schedule=lambda step: None)

    @torch.no_grad()
    def evaluate(self, fit, *, seed, split, options):
        inputs = torch.randn(256, 4, generator=generator("eval", split, seed))
        target = torch.tensor([1.0, -2.0, 0.5, 0.0])
        error = (fit.model(inputs)[:, 0] + options["bias"] - inputs @ target).square().mean()
        return {"error": float(error), "error@twice": 2 * float(error)}


TRIAL = Trial(
    claim="A larger step size is better here.",
    source="a test",
    task=Regression(),
    arms={
        "slow": Arm(options={"lr": 0.001}, grid=({"lr": 0.0005}, {"lr": 0.001})),
        "fast": Arm(grid=({"lr": 0.05}, {"lr": 0.1}), method="danlu.simplex.softmax"),
        "fast_biased": Arm(options={"bias": 0.5}, grid=({"lr": 0.05}, {"lr": 0.1})),
    },
    decides=(Comparison(candidate="fast", baseline="slow", metric="error", better="lower"),),
    selects=("error", "lower"),
    sizes={
        "ci": Budget(steps=40, seeds=3, checkpoint_every=5),
        "demo": Budget(steps=60, seeds=6, tuning_seeds=2, checkpoint_every=5),
    },
)
