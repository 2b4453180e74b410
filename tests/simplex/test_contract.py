"""What the signature `R^n -> simplex along dim` promises, for every public function and class of the family."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import danlu.simplex as family

FUNCTIONS = [getattr(family, name) for name in family.__all__ if inspect.isfunction(getattr(family, name))]
CLASSES = [getattr(family, name) for name in family.__all__ if inspect.isclass(getattr(family, name))]

functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def scores(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 3


def test_family_is_covered():
    assert len(FUNCTIONS) + len(CLASSES) == len(family.__all__)
    assert FUNCTIONS
    assert CLASSES


@functions
@pytest.mark.parametrize("shape", [(5,), (1,), (2, 3), (2, 3, 4), (0, 3)])
def test_simplex_along_every_axis(function, shape):
    for dim in range(-len(shape), len(shape)):
        if shape[dim] == 0:
            continue
        out = function(scores(*shape), dim=dim)
        assert out.shape == shape
        assert (out >= 0).all()
        torch.testing.assert_close(out.sum(dim), torch.ones_like(out.sum(dim)), rtol=0, atol=1e-12)


@functions
@given(n=st.integers(1, 12), seed=st.integers(0, 2**16), shift=st.floats(-1e3, 1e3))
def test_permutation_equivariant_and_shift_invariant(function, n, seed, shift):
    x = scores(3, n, seed=seed)
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    out = function(x)
    torch.testing.assert_close(function(x[:, permutation]), out[:, permutation], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function(x + shift), out, rtol=1e-9, atol=1e-9)


@functions
@given(n=st.integers(2, 12), seed=st.integers(0, 2**16))
def test_order_is_preserved(function, n, seed):
    x = scores(n, seed=seed)
    out = function(x)
    assert (out[x.argsort()].diff() >= 0).all()


@functions
def test_masked_entries_get_exactly_zero_and_no_gradient(function):
    x = scores(4, 6)
    x[0, 1] = x[2, 3] = float("-inf")
    x[3] = float("-inf")
    x.requires_grad_()
    out = function(x)
    assert out[0, 1] == 0
    assert out[2, 3] == 0
    assert (out[3] == 0).all()
    (out * scores(4, 6, seed=1)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[0, 1] == 0
    assert (x.grad[3] == 0).all()
    reduced = x.detach()[0][[0, 2, 3, 4, 5]]
    torch.testing.assert_close(out[0][[0, 2, 3, 4, 5]], function(reduced), rtol=1e-12, atol=1e-12)


@functions
def test_extreme_scores(function):
    assert torch.equal(function(torch.tensor([1e4, -1e4, 0.0])), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(function(torch.tensor([float("inf"), 5.0, 0.0])), torch.tensor([1.0, 0.0, 0.0]))
    ties = function(torch.full((7,), 1e4, dtype=torch.float64))
    torch.testing.assert_close(ties, torch.full((7,), 1 / 7, dtype=torch.float64), rtol=1e-14, atol=0)
    nan = function(torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]))
    assert nan[0].isnan().all()
    torch.testing.assert_close(nan[1], torch.tensor([0.5, 0.5]))


@functions
def test_gradients(function):
    x = scores(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    jacobian = torch.func.jacrev(function)(x[0].detach())
    torch.testing.assert_close(jacobian, jacobian.T)
    torch.testing.assert_close(jacobian.sum(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(jacobian).min() >= -1e-12


@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_and_rounded_once(function, dtype):
    x = scores(4, 33).to(dtype)
    out = function(x)
    assert out.dtype == dtype
    exact = function(x.double())
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    # Half precision is computed in float32 and rounded once; float32 itself carries the error of exp, |x| eps.
    ulps = 16 if dtype == torch.float32 else 1.01
    assert ((out.double() - exact).abs() <= ulps * unit).all()


@functions
def test_strided_inputs_vmap_and_compile(function):
    x = scores(4, 6, 5)
    torch.testing.assert_close(function(x.transpose(0, 2), dim=1), function(x.transpose(0, 2).contiguous(), dim=1))
    torch.testing.assert_close(torch.vmap(function)(x), function(x), rtol=1e-14, atol=1e-14)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


@functions
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((torch.zeros(3, dtype=torch.int64),), {}, TypeError, "input must be a floating-point tensor"),
        (([0.0, 1.0],), {}, TypeError, r"input must be a torch\.Tensor"),
        ((torch.zeros(2, 3),), {"dim": 2}, ValueError, "dim=2 is out of range"),
        ((torch.zeros(2, 0),), {}, ValueError, "empty"),
        ((torch.zeros(()),), {}, ValueError, "out of range"),
        ((torch.zeros(2, 3),), {"dim": 1.0}, TypeError, "dim must be an int"),
    ],
)
def test_bad_input(function, args, kwargs, error, match):
    with pytest.raises(error, match=match):
        function(*args, **kwargs)


@functions
def test_misspelt_option(function):
    with pytest.raises(TypeError, match="axis"):
        function(torch.zeros(3), axis=0)


@classes
def test_class_equals_function(cls):
    names = {name.lower().replace("_", ""): name for name in family.__all__}
    function = next(getattr(family, n) for k, n in names.items() if k == cls.__name__.lower() and n != cls.__name__)
    module: nn.Module = cls(dim=1)
    x = scores(3, 4, 5)
    assert torch.equal(module(x), function(x, dim=1))
    assert "dim=1" in repr(module)
    assert module.state_dict() == {}
