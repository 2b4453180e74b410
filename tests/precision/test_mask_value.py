"""The finite mask value, and the facts about half precision that the guide states."""

import math

import pytest
import torch
from torch.nn import functional as F

from danlu.precision import mask_value
from danlu.simplex import softmax

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def half(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).to(torch.float16).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_is_exact_finite_and_the_lowest(dtype):
    value = mask_value(dtype)
    held = torch.tensor(value, dtype=dtype)
    assert held.item() == value
    assert held.isfinite()
    assert torch.nextafter(held.double() if dtype in DTYPES[:2] else held, torch.tensor(-math.inf).to(held)) < held
    assert mask_value(torch.float16) == -65504.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_scores_get_exactly_zero_and_finite_gradients(dtype):
    scores = torch.linspace(-8, 8, 12, dtype=dtype).view(3, 4).requires_grad_()
    hidden = torch.zeros(3, 4, dtype=torch.bool)
    hidden[:, 2:] = True
    hidden[2] = True
    probabilities = torch.softmax(scores.masked_fill(hidden, mask_value(dtype)), dim=-1)
    assert torch.equal(probabilities[:2, 2:], torch.zeros(2, 2, dtype=dtype))
    # An empty row is uniform, as documented, and the family's own softmax knows it.
    assert torch.equal(probabilities[2], torch.full((4,), 0.25, dtype=dtype))
    assert torch.equal(softmax(scores.detach().masked_fill(hidden, -math.inf), dim=-1)[2], torch.zeros(4, dtype=dtype))
    probabilities.square().sum().backward()
    assert scores.grad.isfinite().all()
    assert torch.softmax(torch.full((4,), -math.inf, dtype=dtype), dim=-1).isnan().all()


def test_two_of_them_are_minus_infinity():
    for dtype in DTYPES:
        value = torch.tensor(mask_value(dtype), dtype=dtype)
        assert (value + value).item() == -math.inf


def test_compiles_as_a_constant():
    def masked(scores, hidden):
        return torch.softmax(scores.masked_fill(hidden, mask_value(scores.dtype)), dim=-1)

    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    for dtype in DTYPES:
        scores, hidden = torch.randn(3, 5).to(dtype), torch.rand(3, 5) > 0.5
        assert torch.equal(compiled(scores, hidden), masked(scores, hidden))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, "float16", None])
def test_bad_dtype(dtype):
    with pytest.raises(TypeError, match=r"dtype must be a real floating-point torch.dtype, got"):
        mask_value(dtype)


def test_numbers_of_half_precision():
    info = torch.finfo(torch.float16)
    assert info.max == 65504.0
    assert info.smallest_normal == pytest.approx(6.10e-5, rel=1e-3)
    assert half(5.97e-8) == pytest.approx(5.96e-8, rel=1e-3)
    assert half(2.9e-8) == 0.0
    assert info.eps == pytest.approx(9.77e-4, rel=1e-3)
    assert torch.finfo(torch.bfloat16).eps == pytest.approx(7.8e-3, rel=2e-2)
    assert torch.finfo(torch.bfloat16).max == pytest.approx(torch.finfo(torch.float32).max, rel=4e-3)
    assert half(1e12) == math.inf
    assert half(1e-12) == 0.0
    assert half(1e-7) == pytest.approx(1.19e-7, rel=2e-3)


def test_multiplied_mask_is_nan_where_nothing_is_masked():
    """As a half tensor. A Python number stays float32 inside torch's kernel, and only the masked entries are ruined."""
    scores, mask = torch.zeros(2, dtype=torch.float16), torch.tensor([1.0, 0.0], dtype=torch.float16)
    infinite = torch.tensor(1e12).half()
    assert (scores - (1 - mask) * infinite).isnan().tolist() == [True, False]
    assert (scores - (1 - mask) * 1e12).tolist() == [0.0, -math.inf]
    assert F.softmax(scores.masked_fill(mask == 0, mask_value(torch.float16)), dim=-1).tolist() == [1.0, 0.0]
