"""Exponentiated gradients and step sizes in NumPy's float64, written from the equations, one tensor at a time."""

import math

import numpy as np


def eg_oracle(theta, g, *, lr, mode="nonnegative", dim=-1, beta=1.0, floor=0.0, maximize=False):
    """New parameter after one step of exponentiated gradient descent."""
    x = lr * g if maximize else -lr * g
    if mode == "nonnegative":
        return np.maximum(theta * np.exp(np.clip(x, -50, 50)), floor)
    if mode == "signed":
        return beta * np.sinh(np.arcsinh(theta / beta) + np.clip(x, -50, 50))
    weights = theta * np.exp(np.maximum(x - x.max(axis=dim, keepdims=True), -50))
    weights = weights / weights.sum(axis=dim, keepdims=True)
    if floor > 0:
        excess = np.maximum(weights - floor, 0)
        weights = floor + excess * (1 - floor * theta.shape[dim]) / excess.sum(axis=dim, keepdims=True)
    return weights


class EGSGDOracle:
    """The article's form: the gain is the exponential of the summed products of successive gradients."""

    def __init__(self, theta, *, lr, gamma, weight_decay=0.0, maximize=False):
        self.theta, self.lr, self.gamma, self.wd, self.maximize = theta, lr, gamma, weight_decay, maximize
        self.total, self.previous = np.zeros_like(theta), np.zeros_like(theta)

    def step(self, g):
        self.total = np.clip(self.total + self.gamma * self.previous * g, -80, 80)
        sign = -1 if self.maximize else 1
        self.theta = (1 - self.lr * self.wd) * self.theta - sign * self.lr * np.exp(self.total) * g
        self.previous = g


class StepSizeOracle:
    """Several tensors under EGStepSize, with `sgdm` as in the authors' code but for the place of the learning rate."""

    def __init__(
        self,
        thetas,
        inner,
        *,
        lr,
        momentum=0.9,
        momentum_beta=0.9,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        gain_lr=0.01,
        scale_lr=0.001,
        gain_range=(1e-2, 1e2),
        scale_range=(0.1, 10.0),
        normalize_scale=True,
        sign_gain=True,
        scale_scope="tensor",
        per_coordinate=True,
        maximize=False,
    ):
        self.__dict__.update({key: value for key, value in locals().items() if key != "self"})
        n = len(thetas)
        self.nu = [np.ones_like(theta) for theta in thetas]
        self.s = [1.0] * n
        self.m, self.v, self.g_bar, self.last = ([np.zeros_like(theta) for theta in thetas] for _ in range(4))
        self.t = 0

    def step(self, grads):
        self.t += 1
        directions = [self.direction(i) for i in range(len(grads))]
        for i, s in enumerate(self.s):
            pairs = list(zip(grads, directions, strict=True))
            pairs = pairs if self.scale_scope == "global" else pairs[i : i + 1]
            a = sum((g * d).sum() for g, d in pairs)
            if self.normalize_scale:
                norms = [math.sqrt(sum((pair[j] ** 2).sum() for pair in pairs)) + 1e-10 for j in (0, 1)]
                a = a / (norms[0] * norms[1])
            self.s[i] = np.clip(s * np.exp(self.scale_lr * a), *self.scale_range)
        for i, g in enumerate(grads):
            self.move(i, g)

    def direction(self, i):
        """What the last step subtracted, but for the scale."""
        return self.lr * self.m[i] if self.inner == "sgdm" else self.nu[i] * self.last[i]

    def move(self, i, g):
        bar = self.g_bar[i] / (1 - self.momentum_beta ** max(self.t - 1, 1)) if self.inner == "sgdm" else self.last[i]
        e = np.sign(g) * np.sign(bar) if self.sign_gain else g * bar
        if self.per_coordinate:
            self.nu[i] = np.clip(self.nu[i] * np.exp(self.gain_lr * e), *self.gain_range)
        sign = -1 if self.maximize else 1
        theta = (1 - self.lr * self.weight_decay) * self.thetas[i]
        if self.inner == "sgdm":
            self.m[i] = self.momentum * self.m[i] + self.nu[i] * g
            self.g_bar[i] = self.momentum_beta * self.g_bar[i] + (1 - self.momentum_beta) * g
            self.thetas[i] = theta - sign * self.s[i] * self.lr * self.m[i]
        else:
            b1, b2 = self.betas
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g**2
            size = np.sqrt(self.v[i] / (1 - b2**self.t)) + self.eps
            self.last[i] = self.lr * self.m[i] / (1 - b1**self.t) / size
            self.thetas[i] = theta - sign * self.s[i] * self.nu[i] * self.last[i]
