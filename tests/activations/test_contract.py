"""What every activation of the family promises: limits, derivative, monotonicity, extreme inputs, half precision."""

import inspect

import pytest
import torch
from torch import Tensor

import danlu.activations as family

FUNCTIONS = [getattr(family, name) for name in family.__all__ if inspect.isfunction(getattr(family, name))]
CLASSES = [getattr(family, name) for name in family.__all__ if inspect.isclass(getattr(family, name))]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def values(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).to(dtype)


def test_family_is_covered():
    assert len(FUNCTIONS) + len(CLASSES) == len(family.__all__)
    assert FUNCTIONS
    assert CLASSES


@functions
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0, 3), (2, 3, 4), (3, 2, 5, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_dtype_and_strides(function, shape, dtype):
    x = values(*shape, dtype=dtype)
    out = function(x)
    assert out.shape == x.shape
    assert out.dtype == dtype
    if x.ndim > 1:
        swapped = x.transpose(0, 1)
        assert function(swapped).stride() == swapped.stride()
        assert torch.equal(function(swapped), out.transpose(0, 1))


@functions
def test_elementwise_whatever_the_layout(function):
    x = values(6, 8)
    whole = function(x)
    assert torch.equal(function(x[::2, 1::3]), whole[::2, 1::3])
    assert torch.equal(function(x[:, :1].expand(6, 4)), whole[:, :1].expand(6, 4))
    images = values(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert function(images).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(function(images), function(images.contiguous()))


@functions
@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_and_extreme_inputs(function, dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([float("-inf"), -largest, -1e4, 1e4, largest, float("inf"), float("nan")], dtype=dtype)
    x.requires_grad_()
    out = function(x)
    out[:-1].sum().backward()
    assert out[:-1].isfinite().tolist() == [True] * 5 + [False]
    assert (out[[0]] == 0).all()
    assert out[-1].isnan()
    torch.testing.assert_close(out[3:6], x[3:6], rtol=2e-8, atol=0)
    assert x.grad[:2].tolist() == [0, 0]
    assert x.grad[4:6].tolist() == [1, 1]


@functions
def test_monotone_and_convex_on_a_grid(function):
    out = function(torch.linspace(-50, 50, 20_001, dtype=torch.float64))
    assert (out.diff() > 0).all()
    assert (out.diff().diff() > -1e-14).all()


@functions
def test_derivatives(function):
    x = values(12).requires_grad_()
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


@functions
def test_transforms(function):
    x = values(4, 5)
    torch.testing.assert_close(torch.func.vmap(function)(x), function(x), rtol=1e-14, atol=0)
    slope = torch.func.vmap(torch.func.vmap(torch.func.grad(lambda one: function(one))))(x)
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-14, atol=0)


@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_one_rounding_away(function, dtype):
    """All values of the dtype: the neighbor of the exact result at the farthest."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    out, exact = function(x), function(x.double())
    spacing = torch.nextafter(out.abs(), torch.full_like(out, float("inf"))).double() - out.abs().double()
    finite = out.isfinite() & spacing.isfinite()
    assert finite.sum() > 60_000
    assert ((out.double() - exact).abs() <= spacing)[finite].all()
    grad = torch.ones_like(x)
    leaf, leaf64 = x.clone().requires_grad_(), x.double().requires_grad_()
    function(leaf).backward(grad)
    function(leaf64).backward(grad.double())
    # The slope is computed from the rounded output.
    error = (leaf.grad.double() - leaf64.grad).abs()
    assert (error <= 1.5 * torch.finfo(dtype).eps * leaf64.grad + 1e-7).all()


@functions
@pytest.mark.parametrize("bad", [[1.0], 1.0, torch.arange(3), torch.ones(2, dtype=torch.complex64)])
def test_bad_input(function, bad):
    with pytest.raises(TypeError, match="input must be a"):
        function(bad)


@functions
def test_unknown_options_are_refused(function):
    with pytest.raises(TypeError, match="unknown_option"):
        function(values(3), unknown_option=1)


@classes
def test_module_equals_function(cls):
    function = getattr(family, cls.__name__.lower())
    module = cls()
    assert torch.equal(module(values(5)), function(values(5)))
    assert module.state_dict() == {}
    assert repr(module).startswith(f"{cls.__name__}(")
