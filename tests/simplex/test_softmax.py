"""What is true of softmax alone."""

import pytest
import torch

from danlu.simplex import Softmax, softmax


def test_equals_torch_and_golden_values():
    x = torch.tensor([0.5, 1.0, 1.4, -0.3], dtype=torch.float64)
    golden = torch.tensor([0.17993206, 0.29665781, 0.44256145, 0.08084868], dtype=torch.float64)
    torch.testing.assert_close(softmax(x), golden, rtol=0, atol=5e-9)
    assert torch.equal(softmax(x), torch.softmax(x, 0))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.5])
def test_jacobian(temperature):
    x = torch.randn(6, dtype=torch.float64)
    p = softmax(x, temperature=temperature)
    jacobian = torch.func.jacrev(lambda z: softmax(z, temperature=temperature))(x)
    torch.testing.assert_close(jacobian, (p.diag() - p.outer(p)) / temperature)
    half_norm = 0.5 * (jacobian * temperature).abs().sum()
    torch.testing.assert_close(half_norm, 1 - p.square().sum())
    assert torch.linalg.matrix_norm(jacobian * temperature, 2) <= 0.5 + 1e-12


def test_temperature_limits():
    x = torch.tensor([0.1, 0.3, -2.0], dtype=torch.float64)
    assert torch.equal(softmax(x, temperature=1e-6), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(softmax(x, temperature=1e9), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert "temperature=2.0" in repr(Softmax(temperature=2))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be in"):
        softmax(torch.zeros(3), temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be in"):
        Softmax(temperature=temperature)
