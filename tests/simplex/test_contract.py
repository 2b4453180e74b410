"""What the signature `R^n -> simplex along dim` promises, for every public function and class of the family."""

import inspect
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import danlu.simplex as family

# Every public map, with the options that it needs; `:` sets off further options of the same one.
CASES = {
    "entmax": family.entmax,
    "entmax:1.25": partial(family.entmax, alpha=1.25),
    "entmax:1.9": partial(family.entmax, alpha=1.9),
    "entmax:3": partial(family.entmax, alpha=3.0),
    "entmax:3:reference": partial(family.entmax, alpha=3.0, impl="reference"),
    "entmax:reference": partial(family.entmax, alpha=1.3, impl="reference"),
    "entmax:tensor": partial(family.entmax, alpha=torch.tensor(1.4, dtype=torch.float64)),
    "entmax15": family.entmax15,
    "entmax15:reference": partial(family.entmax15, impl="reference"),
    "perturb_max": family.perturb_max,
    "perturb_max:logistic": partial(family.perturb_max, noise="logistic"),
    "soft_topk": partial(family.soft_topk, k=1),
    "soft_topk:exp": partial(family.soft_topk, k=1, method="exp"),
    "soft_topk:sigmoid": partial(family.soft_topk, k=1, method="sigmoid"),
    "soft_topk:clip": partial(family.soft_topk, k=1, method="clip"),
    "soft_topk:grad": partial(family.soft_topk, k=1, method="grad"),
    "softmax": family.softmax,
    "sparse_softmax": partial(family.sparse_softmax, p=0.8),
    "sparse_softmax:k": partial(family.sparse_softmax, k=1),
    "sparsemax": family.sparsemax,
    "sparsemax:reference": partial(family.sparsemax, impl="reference"),
    "taylor_softmax": family.taylor_softmax,
    "taylor_softmax:mean": partial(family.taylor_softmax, order=4, shift="mean"),
}
# What a map does not promise: Taylor's polynomial is not monotone, and only its shifted form is shift invariant.
NOT_SHIFT_INVARIANT = {"taylor_softmax"}
NOT_MONOTONE = {"taylor_softmax", "taylor_softmax:mean"}
NOT_SYMMETRIC = {"taylor_softmax", "taylor_softmax:mean"}
# A choice of the largest, or a kink, where all scores are equal.
NOT_SMOOTH_AT_TIES = [
    CASES[name] for name in ("sparse_softmax", "sparse_softmax:k", "soft_topk", "soft_topk:exp", "soft_topk:clip")
]
# Modules with the options that they need.
MODULES = {
    "Entmax": partial(family.Entmax, 1.3),
    "Entmax15": family.Entmax15,
    "PerturbMax": partial(family.PerturbMax, noise="logistic", nodes=32),
    "SoftTopK": partial(family.SoftTopK, 1),
    "Softmax": family.Softmax,
    "SparseSoftmax": partial(family.SparseSoftmax, k=2),
    "Sparsemax": family.Sparsemax,
    "TaylorSoftmax": partial(family.TaylorSoftmax, order=4, shift="mean"),
}
FUNCTION_OF = {
    "Entmax": partial(family.entmax, alpha=1.3),
    "Entmax15": family.entmax15,
    "PerturbMax": partial(family.perturb_max, noise="logistic", nodes=32),
    "SoftTopK": partial(family.soft_topk, k=1),
    "Softmax": family.softmax,
    "SparseSoftmax": partial(family.sparse_softmax, k=2),
    "Sparsemax": family.sparsemax,
    "TaylorSoftmax": partial(family.taylor_softmax, order=4, shift="mean"),
}
# Not maps: a description of noise, and counts of random draws.
NOT_A_MAP = {"Noise", "log_esp", "perturb_argmax_sample"}

functions = pytest.mark.parametrize("function", CASES.values(), ids=CASES.keys())


def only(excluded):
    """The maps but `excluded`."""
    kept = {name: function for name, function in CASES.items() if name not in excluded}
    return pytest.mark.parametrize("function", kept.values(), ids=kept.keys())


def scores(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 3


def test_family_is_covered():
    assert {name.partition(":")[0] for name in CASES} | MODULES.keys() | NOT_A_MAP == set(family.__all__)
    assert MODULES.keys() == FUNCTION_OF.keys()
    assert all(inspect.isclass(getattr(family, name)) for name in MODULES)


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
@given(n=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_permutation_equivariant(function, n, seed):
    x = scores(3, n, seed=seed)
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(function(x[:, permutation]), function(x)[:, permutation], rtol=1e-12, atol=1e-12)


@only(NOT_SHIFT_INVARIANT)
@given(n=st.integers(1, 12), seed=st.integers(0, 2**16), shift=st.floats(-1e3, 1e3))
def test_shift_invariant(function, n, seed, shift):
    x = scores(3, n, seed=seed)
    torch.testing.assert_close(function(x + shift), function(x), rtol=1e-9, atol=1e-9)


@only(NOT_MONOTONE)
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


@only(NOT_SHIFT_INVARIANT | NOT_MONOTONE)
def test_extreme_scores(function):
    assert torch.equal(function(torch.tensor([1e4, -1e4, 0.0])), torch.tensor([1.0, 0.0, 0.0]))


@only({"taylor_softmax:mean"})
def test_one_infinite_score_takes_all(function):
    assert torch.equal(function(torch.tensor([float("inf"), 5.0, 0.0])), torch.tensor([1.0, 0.0, 0.0]))


@functions
def test_ties_share_and_nan_stays_in_its_slice(function):
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


@only(NOT_SYMMETRIC)
def test_jacobian_is_symmetric_and_positive_semidefinite(function):
    jacobian = torch.func.jacrev(function)(scores(2, 5)[0])
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
    # Half precision is computed in float32 and rounded once; float32 itself carries the error of exp, |x| eps, of
    # a difference of squares of scores in perturb_max, and of a power of a difference at the edge of the support.
    wide = [CASES[name] for name in ("perturb_max", "perturb_max:logistic", "entmax:reference")]
    ulps = (256 if function in wide else 16) if dtype == torch.float32 else 1.01
    assert ((out.double() - exact).abs() <= ulps * unit).all()


@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
def test_halves_are_within_two_ulps_of_float64(function, dtype, scale):
    """Relative to each probability, however small: also in long rows and next to the edge of a support."""
    info = torch.finfo(dtype)
    for n in (1, 2, 17, 600):
        x = (scale / 3 * scores(20, n, seed=n)).to(dtype)
        x[3] = x[3, 0]
        x[4, ::2] = x[4, -1]
        exact = function(x.double())
        spacing = info.eps * torch.exp2(exact.clamp(min=info.smallest_normal).log2().floor())
        assert ((function(x).double() - exact).abs() <= 2 * spacing).all()


@functions
def test_long_rows_in_single_precision_sum_to_one(function):
    n = 32_000
    for scale in (1.0, 1e-3, 0.0):
        p = function(scale * scores(n).float())
        assert abs(float(p.double().sum()) - 1) <= 2e-6
        assert (p >= 0).all()


@functions
def test_rows_of_one_score(function):
    infinity = float("inf")
    p = function(torch.tensor([[3.0], [-1e30], [infinity], [-infinity], [float("nan")]]))
    assert p[:4, 0].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert p[4].isnan()


@functions
def test_derivatives_of_all_orders_at_masks_and_ties(function):
    """Finite everywhere, zero where masked, and those of the row without its masked scores."""
    x = scores(5, 6, seed=3)
    x[0, 1] = x[0, 4] = float("-inf")
    x[1] = float("-inf")
    x[2] = 0.75
    x[3, 1:] = float("-inf")
    v, u = scores(5, 6, seed=4), scores(5, 6, seed=5)

    def derivatives(x, v, u):
        x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
        (first,) = torch.autograd.grad((function(x) * v).sum(), x, create_graph=True)
        # The derivative of a map that is linear in pieces does not depend on the scores.
        second = torch.autograd.grad((first * u).sum(), (x, v), allow_unused=True, materialize_grads=True)
        return first.detach(), *second

    found = derivatives(x, v, u)
    for one in found:
        assert one.isfinite().all()
        assert (one[x == float("-inf")] == 0).all()
    kept = [0, 2, 3, 5]
    for one, other in zip(found, derivatives(x[0, kept], v[0, kept], u[0, kept]), strict=True):
        torch.testing.assert_close(one[0, kept], other, rtol=1e-9, atol=1e-11)
    row = x[2].clone().requires_grad_()
    if function not in NOT_SMOOTH_AT_TIES:
        assert torch.autograd.gradgradcheck(function, row)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_as_many_as_there_are(n):
    x = scores(3, n)
    x[1] = 2.0
    torch.testing.assert_close(family.sparse_softmax(x, k=n), family.softmax(x), rtol=1e-14, atol=0)
    x[2, 0] = float("-inf")
    torch.testing.assert_close(family.sparse_softmax(x, k=n), family.softmax(x), rtol=1e-14, atol=0)
    for method in ("exp", "laplace", "sigmoid", "clip", "grad"):
        full = family.soft_topk(x, n, method=method)
        torch.testing.assert_close(full, (x > float("-inf")).double(), rtol=1e-12, atol=1e-12)


@functions
def test_strided_inputs_vmap_and_compile(function):
    x = scores(4, 6, 5)
    torch.testing.assert_close(function(x.transpose(0, 2), dim=1), function(x.transpose(0, 2).contiguous(), dim=1))
    torch.testing.assert_close(torch.vmap(function)(x), function(x), rtol=1e-14, atol=1e-14)
    torch._dynamo.reset()
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


@pytest.mark.parametrize("name", MODULES)
def test_class_equals_function(name):
    module: nn.Module = MODULES[name](dim=1)
    x = scores(3, 4, 5)
    assert torch.equal(module(x), FUNCTION_OF[name](x, dim=1))
    assert "dim=1" in repr(module)
    assert module.state_dict() == {}
