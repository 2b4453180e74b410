"""Amos in NumPy's float64, written from the equations, one tensor at a time."""

import numpy as np


class AmosOracle:
    """One tensor under Amos; `step` is called with a gradient."""

    def __init__(
        self,
        theta,
        *,
        lr,
        scale,
        beta=0.999,
        momentum=0.0,
        clip_value=None,
        extra_l2=0.0,
        c_coef=0.25,
        d_coef=0.25,
        eps=2.0**-125,
        reduce="auto",
        maximize=False,
        nonfinite="skip",
    ):
        self.theta = theta
        self.lr, self.scale, self.beta, self.momentum = lr, scale, beta, momentum
        self.clip_value, self.extra_l2, self.eps = clip_value, extra_l2, eps
        self.c_coef, self.d_coef, self.maximize, self.nonfinite = c_coef, d_coef, maximize, nonfinite
        if reduce == "none":
            self.axes = ()
        elif reduce == "auto" and theta.ndim >= 2:
            self.axes = tuple(range(1, theta.ndim))
        else:
            self.axes = tuple(range(theta.ndim))
        self.v = np.zeros_like(self.mean_square(theta))
        self.b = np.zeros_like(self.v)
        self.mu = np.zeros_like(theta)
        self.t = 0

    def mean_square(self, g):
        return (g**2).mean(axis=self.axes, keepdims=True) if self.axes else g**2

    def step(self, g):
        if self.nonfinite == "skip" and not np.isfinite(g).all():
            return
        if self.clip_value is not None:
            g = np.clip(g, -self.clip_value, self.clip_value)
        m2 = self.mean_square(g)
        g = -g if self.maximize else g
        xi, eta = self.lr, self.scale
        self.t += 1
        self.v = self.beta * self.v + (1 - self.beta) * m2
        r = (1 - self.beta**self.t) / np.maximum(self.v, self.eps)
        c = (1 + self.c_coef * np.sqrt(xi) * self.b) ** -0.5
        d = 1 / (1 + self.d_coef * np.sqrt(xi * eta) * self.b)
        gamma = c * xi**2 * r * m2
        delta = -d * ((gamma / 2 + self.extra_l2) * self.theta + xi * eta * np.sqrt(r) * g)
        self.b = self.b + gamma * (1 + self.b)
        if self.momentum > 0:
            self.mu = self.momentum * self.mu + (1 - self.momentum) * delta
            delta = self.mu
        self.theta = self.theta + delta
