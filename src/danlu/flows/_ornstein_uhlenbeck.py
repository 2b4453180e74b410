r"""The Wasserstein gradient flow of the KL divergence between Gaussians, in closed form.

Source: "梯度流：探索通向最小值之路" (2023-06-16).

Shape letters: `D` dimension; `...` shape of the time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._common.checks import check_floating, check_real, check_same_device

__all__ = ["GaussianFlow", "ornstein_uhlenbeck"]


@dataclass(frozen=True, eq=False)
class GaussianFlow:
    r"""A Gaussian on its way to another, from [`ornstein_uhlenbeck`][danlu.flows.ornstein_uhlenbeck].

    Definition:
        $q_t = \mathcal N(m_t, S_t)$ with $m_t$ = `mean`, $S_t$ = `cov`; `kl` is $KL(q_t\,\|\,p)$ and `dissipation`
        the relative Fisher information $E_{q_t}\lVert\nabla\log(q_t/p)\rVert^2 = -\frac{d}{dt} KL$.

    Args:
        mean: shape `(..., D)`.
        cov: shape `(..., D, D)`.
        kl: nats, shape `(...)`.
        dissipation: nats per unit of time, shape `(...)`.

    Numerics:
        `kl` and `dissipation` are infinite where `cov` is singular.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.flows import ornstein_uhlenbeck
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> ornstein_uhlenbeck(one.diag(), 0 * one, one, one.diag(), 0.0).kl
        tensor(0.5000, dtype=torch.float64)
    """

    mean: Tensor
    cov: Tensor
    kl: Tensor
    dissipation: Tensor


def ornstein_uhlenbeck(A: Tensor, mu: Tensor, m0: Tensor, S0: Tensor, t: float | Tensor) -> GaussianFlow:
    r"""The law at time `t` of $dx = -A(x - \mu)\,dt + \sqrt 2\,dW$ from a Gaussian start.

    Definition:
        The target is $p = \mathcal N(\mu, A^{-1})$, and
        $$m_t = \mu + e^{-At}(m_0 - \mu), \qquad S_t = A^{-1} + e^{-At}(S_0 - A^{-1})\,e^{-At}$$
        $$KL(q_t\|p) = \tfrac12\left[\operatorname{tr}(A S_t) - D - \log\det(A S_t)
        + (m_t-\mu)^\top A\,(m_t-\mu)\right], \qquad
        -\tfrac{d}{dt}KL = \operatorname{tr}(A S_t A - 2A + S_t^{-1}) + \lVert A(m_t - \mu)\rVert^2$$

    Args:
        A: precision of the target, symmetric positive definite, shape `(D, D)`, float32 or float64.
        mu: mean of the target, shape `(D,)`.
        m0: mean of the start, shape `(D,)`.
        S0: covariance of the start, symmetric positive semidefinite, shape `(D, D)`.
        t: times, $\ge 0$, a number or a tensor of shape `(...)`.

    Returns:
        A [`GaussianFlow`][danlu.flows.GaussianFlow] with one Gaussian per time, in the dtype of `A`.

    Raises:
        TypeError: a tensor is not floating, or `t` is not a number.
        ValueError: shapes or devices do not fit, `A` is not symmetric positive definite, `S0` not symmetric positive
            semidefinite, or a time is negative.

    Numerics:
        Through the eigenvalues of `A`, so large times do not overflow. The values of the matrices are read to check
        them: this is for tests and teaching, not for inner loops.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16); Jordan, Kinderlehrer and Otto (1998).

    Example:
        >>> import torch
        >>> from danlu.flows import ornstein_uhlenbeck
        >>> A = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
        >>> mu, m0 = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([-2.0, 2.0], dtype=torch.float64)
        >>> S0 = torch.tensor([[0.3, 0.1], [0.1, 0.5]], dtype=torch.float64)
        >>> ornstein_uhlenbeck(A, mu, m0, S0, torch.tensor([0.0, 1.0])).kl
        tensor([8.4457, 1.3914], dtype=torch.float64)
    """
    for name, tensor, ndim in (("A", A, 2), ("mu", mu, 1), ("m0", m0, 1), ("S0", S0, 2)):
        check_floating(name, tensor)
        if tensor.shape != (A.shape[0],) * ndim:
            raise ValueError(f"{name} must have shape {(A.shape[0],) * ndim}, got {tuple(tensor.shape)}")
    check_same_device(A=A, mu=mu, m0=m0, S0=S0)
    if isinstance(t, Tensor):
        times = t.to(device=A.device, dtype=A.dtype)
        if bool((~(times >= 0)).any()):
            raise ValueError("t must be at least 0 everywhere")
    else:
        times = A.new_tensor(check_real("t", t, low=0.0))
    rates, basis = _spectrum("A", A, positive=True)
    _spectrum("S0", S0, positive=False)
    decay = torch.exp(-rates * times.unsqueeze(-1))
    # In the eigenbasis of A.
    offset = decay * ((m0 - mu) @ basis)
    start = basis.mT @ S0 @ basis - (1 / rates).diag_embed()
    inner = (1 / rates).diag_embed() + decay.unsqueeze(-1) * start * decay.unsqueeze(-2)
    inner = (inner + inner.mT) / 2
    spread = torch.linalg.eigvalsh(inner).clamp(min=0.0)
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    kl = ((rates * diagonal - 1).sum(-1) - rates.log().sum() - spread.log().sum(-1)) / 2
    kl = kl + (rates * offset.square()).sum(-1) / 2
    dissipation = (rates.square() * diagonal - 2 * rates).sum(-1) + (1 / spread).sum(-1)
    dissipation = dissipation + (rates * offset).square().sum(-1)
    return GaussianFlow(mu + offset @ basis.mT, basis @ inner @ basis.mT, kl, dissipation)


def _spectrum(name: str, matrix: Tensor, *, positive: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a matrix that must be symmetric and positive (semi)definite."""
    tolerance = torch.finfo(matrix.dtype).eps * max(1, matrix.shape[0]) * 8
    largest = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
    if not bool(((matrix - matrix.mT).abs() <= tolerance * largest).all()):
        raise ValueError(f"{name} must be symmetric and finite")
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    if bool((values <= 0).any() if positive else (values < -tolerance * largest).any()):
        kind = "definite" if positive else "semidefinite"
        raise ValueError(f"{name} must be positive {kind}, its smallest eigenvalue is {float(values.min()):.3g}")
    return values, vectors
