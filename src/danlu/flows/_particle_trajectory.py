r"""What a run of particles leaves behind.

Source: "梯度流：探索通向最小值之路" (2023-06-16).

Shape letters: `N` particles; `D` their dimension; `T` number of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["RECORDS", "Observer", "ParticleTrajectory", "Record"]

Record = Literal["mean", "cov", "energy", "particles"]
RECORDS: tuple[Record, ...] = ("mean", "cov", "energy", "particles")


@dataclass(frozen=True, eq=False)
class ParticleTrajectory:
    r"""What [`WassersteinFlow.run`][danlu.flows.WassersteinFlow] returns.

    Definition:
        Particles $x_i$ at the end, and what was recorded at the times $0 = t_0 < \dots < t_T$.

    Args:
        times: shape `(T + 1,)`, float64 on the CPU.
        x: particles at the last time, shape `(N, D)`.
        mean: weighted mean, shape `(T + 1, D)`; None if not recorded.
        cov: weighted covariance, divided by 1 and not by $1 - 1/N$, shape `(T + 1, D, D)`; None if not recorded.
        energy: shape `(T + 1,)`; None if not recorded.
        particles: shape `(T + 1, N, D)`; None if not recorded.

    Numerics:
        In the dtype of the particles.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16).

    Example:
        >>> import torch
        >>> from danlu.flows import Potential, WassersteinFlow
        >>> flow = WassersteinFlow(Potential(lambda x: (x**2).sum(-1) / 2))
        >>> flow.run(torch.ones(3, 1), 1.0, 0.5, record=("mean",)).mean.flatten()
        tensor([1.0000, 0.5000, 0.2500])
    """

    times: Tensor
    x: Tensor = field(repr=False)
    mean: Tensor | None = field(default=None, repr=False)
    cov: Tensor | None = field(default=None, repr=False)
    energy: Tensor | None = field(default=None, repr=False)
    particles: Tensor | None = field(default=None, repr=False)


class Observer:
    """Collects what is recorded."""

    def __init__(self, weights: Tensor, record: Sequence[Record]) -> None:
        self.weights = weights
        self.x = weights
        self.times: list[float] = []
        self.kept: dict[str, list[Tensor]] = {name: [] for name in record}

    def add(self, time: float, x: Tensor, energy: Tensor | None) -> None:
        self.times.append(time)
        self.x = x
        if "particles" in self.kept:
            self.kept["particles"].append(x)
        if energy is not None and "energy" in self.kept:
            self.kept["energy"].append(energy)
        if "mean" in self.kept or "cov" in self.kept:
            mean = self.weights @ x
            if "mean" in self.kept:
                self.kept["mean"].append(mean)
            if "cov" in self.kept:
                centered = x - mean
                self.kept["cov"].append(centered.mT @ (centered * self.weights.unsqueeze(-1)))

    def trajectory(self) -> ParticleTrajectory:
        kept = {name: torch.stack(tensors) for name, tensors in self.kept.items()}
        return ParticleTrajectory(torch.tensor(self.times, dtype=torch.float64), self.x, **kept)
