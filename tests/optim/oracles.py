"""Lion and Tiger in NumPy's float64, written from the equations, one tensor at a time."""

import numpy as np


def lion_oracle(theta, m, g, *, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False, nonfinite="skip"):
    """New parameter and momentum. The momentum averages the gradients as they come, also under `maximize`."""
    if nonfinite == "skip" and not np.isfinite(g).all():
        return theta, m
    u = np.sign(betas[0] * m + (1 - betas[0]) * g)
    u = -u if maximize else u
    return theta - lr * (u + weight_decay * theta), betas[1] * m + (1 - betas[1]) * g


def tiger_scale(theta, kind, *, vector_scale=0.5, rms_floor=1e-3):
    if kind in ("vector", "norm_scale"):
        return vector_scale
    if kind == "embedding":
        return np.maximum(np.sqrt((theta**2).mean(-1, keepdims=True)), rms_floor)
    return max(np.sqrt((theta**2).mean()), rms_floor)


class TigerOracle:
    """One tensor under Tiger; `micro_step` is called with a gradient, or None."""

    def __init__(
        self,
        theta,
        kind,
        *,
        lr,
        beta=0.965,
        weight_decay=0.01,
        k=1,
        average=True,
        shrink=0.99,
        center=0.0,
        nonfinite="shrink",
        rms_floor=1e-3,
        vector_scale=0.5,
        maximize=False,
    ):
        self.theta, self.m, self.kind = theta, np.zeros_like(theta), kind
        self.lr, self.beta, self.k, self.average = lr, beta, k, average
        self.weight_decay = weight_decay if kind in ("matrix", "embedding") else 0.0
        self.shrink, self.center, self.nonfinite = shrink, center, nonfinite
        self.rms_floor, self.vector_scale, self.maximize = rms_floor, vector_scale, maximize
        self.t, self.seen = 0, False

    def micro_step(self, g, weight=None):
        first = not self.seen
        last = (self.t + 1) % self.k == 0
        bad = g is not None and self.nonfinite in ("shrink", "skip") and not np.isfinite(g).all()
        if g is not None:
            self.seen = True
        share = (1 / self.k if self.average else 1.0) if weight is None else weight
        if g is not None and not bad:
            self.m = (self.beta if first else 1.0) * self.m + (1 - self.beta) * share * g
        if bad and self.nonfinite == "shrink":
            self.theta = self.center + (self.theta - self.center) * self.shrink
        elif not bad and last and self.seen:
            s = tiger_scale(self.theta, self.kind, vector_scale=self.vector_scale, rms_floor=self.rms_floor)
            u = np.sign(self.m) * (-1 if self.maximize else 1)
            self.theta = self.theta - self.lr * s * (u + self.weight_decay * self.theta)
        self.t += 1
        if last:
            self.seen = False
