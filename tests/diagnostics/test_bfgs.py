"""The batched minimizer alone."""

import torch

from danlu.diagnostics._bfgs import minimize


def test_quadratics_of_many_condition_numbers():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 4, 4, generator=generator, dtype=torch.float64)).Q
    scales = 10 ** (4 * torch.rand(12, 4, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag_embed(scales) @ basis.mT
    center = torch.randn(12, 4, generator=generator, dtype=torch.float64)

    def value(x):
        offset = x - center
        return 1.0 + 0.5 * (offset * (matrix @ offset[..., None])[..., 0]).sum(-1)

    def gradient(x):
        return (matrix @ (x - center)[..., None])[..., 0]

    found, level = minimize(value, gradient, torch.zeros(12, 4, dtype=torch.float64), iterations=200, tolerance=0.0)
    torch.testing.assert_close(found, center, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(level, torch.ones(12, dtype=torch.float64))


def test_rosenbrock_and_values_never_rise():
    def value(x):
        return (1 - x[..., 0]).square() + 100 * (x[..., 1] - x[..., 0].square()).square()

    def gradient(x):
        inner = x[..., 1] - x[..., 0].square()
        return torch.stack([-2 * (1 - x[..., 0]) - 400 * x[..., 0] * inner, 200 * inner], dim=-1)

    start = torch.tensor([[-1.2, 1.0], [2.0, -3.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    levels = [value(start)]
    for iterations in (1, 5, 20, 300):
        point, level = minimize(value, gradient, start, iterations=iterations)
        torch.testing.assert_close(level, value(point))
        assert (level <= levels[-1]).all()
        levels.append(level)
    torch.testing.assert_close(point, torch.ones(4, 2, dtype=torch.float64), rtol=0.0, atol=1e-6)
    # A problem does not depend on its neighbors.
    alone, _ = minimize(value, gradient, start[:1], iterations=20)
    among, _ = minimize(value, gradient, start, iterations=20)
    torch.testing.assert_close(alone, among[:1], rtol=0.0, atol=1e-12)


def test_steps_into_undefined_values_are_not_taken():
    def value(x):
        return (x - x.log())[..., 0]

    def gradient(x):
        return 1 - 1 / x

    found, _ = minimize(value, gradient, torch.tensor([[1e-3], [5.0]], dtype=torch.float64), iterations=100)
    torch.testing.assert_close(found, torch.ones(2, 1, dtype=torch.float64), rtol=0.0, atol=1e-6)
