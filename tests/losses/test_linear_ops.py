"""The linear losses in compiled code: one graph, the numbers of eager code, and no logits of all rows."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as F

from danlu.losses import (
    EMO,
    CrossEntropy,
    GeneralizedCE,
    MixCE,
    RowFunction,
    TaiLr,
    _linear_ops,
    linear_emo_loss,
    linear_loss,
    linear_margin_softmax_loss,
    linear_tailr_loss,
    tailr_loss,
)

ROWS, FEATURES, CLASSES = 23, 5, 11
MEANING = torch.linspace(-1, 2, 3 * CLASSES, dtype=torch.float64).sin().view(CLASSES, 3)
COSTS = MEANING.abs() @ MEANING.abs().T
WEIGHTS = torch.linspace(0, 2, ROWS, dtype=torch.float64)
compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")


@dataclasses.dataclass(frozen=True)
class Squared:
    """A row loss of the user's: the coefficient is not the derivative."""

    label_smoothing: float = 0.0

    def value_and_derivative(self, nll: Tensor) -> tuple[Tensor, Tensor]:
        return nll.square(), nll


class Halved(EMO):
    """Not to be taken for what it inherits from."""

    def value_and_derivatives(self, nll: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 0.5 * (nll + cost), 0.5 * torch.ones_like(nll), 0.5 * torch.ones_like(nll)


def problem(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    target = torch.randint(CLASSES, (rows,), generator=generator)
    target[::5] = -100
    return leaves, target


def results(call, leaves: list[Tensor]) -> list[Tensor]:
    """Value and gradients for an upstream that is not 1."""
    value = call(*leaves)
    upstream = torch.linspace(-1, 3, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


# The loss, and what goes with it.
CASES = {
    "cross_entropy": (CrossEntropy(0.2), {"normalizer": torch.tensor(3.0)}),
    "tailr": (TaiLr(0.7, min_weight=0.4), {"logit_scale": 2.5, "softcap": 3.0, "target_shift": 0.2 * WEIGHTS}),
    "tailr_tensor": (TaiLr(torch.tensor(0.4), value="weighted"), {"reduction": "none", "target_shift": 0.7}),
    "generalized": (GeneralizedCE(0.6), {"reduction": "sum", "token_weight": WEIGHTS}),
    "mixce": (MixCE(0.3), {"reduction": "none", "label_smoothing": 0.1, "memory_budget": 1000}),
    "emo": (EMO(cost_embedding=MEANING, max_ratio=3.0), {"token_weight": WEIGHTS}),
    "emo_head": (EMO(cost_embedding="head", mode="fixed", ce_weight=0.3), {"reduction": "none", "softcap": 3.0}),
    "emo_matrix": (EMO(cost_matrix=COSTS - COSTS.diag().diag(), mode="emo_anchored"), {"label_smoothing": 0.1}),
    "emo_shifted": (EMO(cost_embedding="head", mode="emo_anchored", shift_target=True, min_nll=0.1), {}),
    "emo_cache": (EMO(cost_embedding=MEANING, mode="pure", cost_cache=True), {}),
    "function": (RowFunction(lambda nll: 1 - torch.exp(-nll), label_smoothing=0.1), {"token_weight": WEIGHTS}),
    "coefficients": (RowFunction(lambda nll: (nll.sqrt(), nll.exp())), {"reduction": "none"}),
    "own": (Squared(), {"reduction": "sum"}),
    "inherited": (Halved(cost_embedding=MEANING), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_with_the_numbers_of_eager_code(name):
    loss, options = CASES[name]
    leaves, target = problem()

    def call(hidden, weight, bias):
        rows, labels = hidden.view(1, ROWS, FEATURES), target[None]
        shaped = {k: v[None] if isinstance(v, Tensor) and v.ndim else v for k, v in options.items()}
        sizes = {} if "memory_budget" in options else {"chunk_size": 4}
        return linear_loss(rows, weight, labels, loss, linear_bias=bias, return_stats=True, **sizes, **shaped)

    run = compiled(call)
    (value, stats), (_, expected) = run(*leaves), call(*leaves)
    for mine, theirs in zip(stats, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert not mine.requires_grad
            assert torch.equal(mine, theirs)
    exact = dataclasses.is_dataclass(loss) and type(loss) in (CrossEntropy, TaiLr, GeneralizedCE, MixCE, EMO)
    for mine, theirs in zip(
        results(lambda *x: run(*x)[0], leaves), results(lambda *x: call(*x)[0], leaves), strict=True
    ):
        assert torch.equal(mine, theirs) if exact else torch.allclose(mine, theirs, rtol=1e-13, atol=1e-15)
    if name == "emo":
        with torch.no_grad():
            assert torch.equal(run(*leaves)[0], value.detach())


def test_a_training_step_in_half_precision():
    """Two losses in one graph, a tied head, autocast around, and micro-batches that add up; twice, with new weights."""
    (states, weight, bias), target = problem(dtype=torch.float32)
    tokens = torch.arange(ROWS) % CLASSES

    def step(hidden, weight, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = F.linear(hidden + F.embedding(tokens, weight), torch.eye(FEATURES)).relu()
            first = linear_tailr_loss(mixed, weight, target, linear_bias=bias, normalizer=40, chunk_size=8)
            second = linear_emo_loss(mixed, weight, target.roll(1), cost_embedding=weight, normalizer=40, chunk_size=8)
        return first + 0.3 * second

    found = []
    run = compiled(step)
    for function in (step, run):
        leaves = [x.detach().clone().requires_grad_() for x in (states, weight, bias)]
        for _ in range(2):
            for micro in (1.0, 0.5):
                function(micro * leaves[0], *leaves[1:]).backward()
            with torch.no_grad():
                for leaf in leaves:
                    leaf.sub_(0.1 * leaf.grad)
        found.append([*leaves, *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    half = [x.detach().bfloat16().requires_grad_() for x in (states, weight)]
    mine, theirs = (
        results(partial(function, target=target, chunk_size=8), half)
        for function in (compiled(linear_tailr_loss), linear_tailr_loss)
    )
    assert [x.dtype for x in mine] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for here, there in zip(mine, theirs, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)


def watching(look):
    """A backend that shows its graphs, of the forward and of the backward, and runs them as they are."""

    def compiler(graph, inputs):
        look(graph)
        return make_boxed_func(graph)

    return aot_autograd(fw_compiler=compiler)


@pytest.mark.parametrize("trained", [(0,), (1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_tensors_get_nothing_and_ignored_rows_zeros(trained, reduction):
    leaves, target = problem()
    leaves = [x.requires_grad_(i in trained) for i, x in enumerate(x.detach() for x in leaves)]
    leaves[0].data[0] = torch.nan  # an ignored row
    products = []

    def watch(graph):
        products.extend(node.args for node in graph.graph.nodes if "danlu" in str(node.target))

    run = torch.compile(linear_tailr_loss, fullgraph=True, backend=watching(watch))
    call = partial(run, *leaves[:2], linear_bias=leaves[2], chunk_size=4, reduction=reduction)
    value = call(target=target).sum()
    wanted = [x for x in leaves if x.requires_grad]
    expected = linear_tailr_loss(*leaves[:2], target, linear_bias=leaves[2], chunk_size=4, reduction=reduction).sum()
    for mine, theirs in zip(torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert torch.equal(mine, theirs)
    # No product of a frozen tensor is made.
    needs = [i in trained for i in range(3)]
    assert any(args[-1] == needs for args in products)
    value = call(target=torch.full_like(target, -100)).sum()
    assert value == 0
    assert all(not grad.any() for grad in torch.autograd.grad(value, wanted))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_logits_of_all_rows_in_the_graphs(reduction):
    """Forward and backward hold what eager code holds, and as many products are made, not more."""
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    target = torch.randint(100, (64,), generator=torch.Generator().manual_seed(0))
    sizes, names = [], []

    def watch(graph):
        for node in graph.graph.nodes:
            made = node.meta.get("val")
            sizes.extend(x.numel() for x in (made if isinstance(made, tuple | list) else (made,)) if x is not None)
            names.append(str(node.target))

    loss = EMO(cost_embedding="head", max_ratio=3.0)
    call = partial(linear_loss, target=target, loss=loss, chunk_size=8, reduction=reduction)
    run = torch.compile(call, fullgraph=True, backend=watching(watch))
    run(hidden, weight).sum().backward()
    assert max(sizes) <= 100 * 4
    # Scalars have their gradients made in the forward; only single rows are computed once more.
    ops = {"mean": ["linear_loss", "linear_loss_upstream"], "none": ["linear_losses", "linear_loss_vjp"]}[reduction]
    assert [name.split(".")[1] for name in names if name.startswith("danlu")] == ops


def test_numbers_of_rows_are_symbols():
    count = CompileCounterWithBackend("aot_eager")
    call = partial(linear_emo_loss, cost_embedding="head", memory_budget=2000)
    run = torch.compile(call, fullgraph=True, backend=count, dynamic=True)
    first = None
    for rows in (23, 14, 40, 0):
        leaves, target = problem(rows)
        mine, theirs = (results(partial(function, target=target), leaves[:2]) for function in (run, call))
        for here, there in zip(mine, theirs, strict=True):
            assert torch.equal(here, there)
        # Compilers take 0 for special.
        first = count.frame_count if rows == 23 else first
        assert count.frame_count == first or rows == 0


def test_operators_are_what_their_fakes_and_schemas_say():
    leaves, target = problem()
    keep, weights = target != -100, WEIGHTS
    rows = (target.clamp(min=0), keep, weights)
    for stats, bias in ((True, leaves[2]), (False, None)):
        options = ("tailr/potential", [0.0, 0.3], None, 1000, torch.float64, 0.1, 1.5, 2.0, stats)
        tensors = (*leaves[:2], bias, *rows, None, None, None)
        only = ("test_schema", "test_faketensor")
        needs = [True, False, bias is not None]
        torch.library.opcheck(_linear_ops._total, (*tensors, *options, needs), test_utils=only)
        torch.library.opcheck(_linear_ops._losses, (*tensors, *options), test_utils=only)
        torch.library.opcheck(_linear_ops._vjp, (*tensors, *options, weights, needs), test_utils=only)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("loss", "reduction"), [(CrossEntropy(), "mean"), (TaiLr(), "none")])
def test_second_derivative_is_refused(backend, loss, reduction):
    """Also in company: a penalty on the gradient must not pass for a constant."""
    leaves, target = problem()
    run = torch.compile(partial(linear_loss, target=target, loss=loss, reduction=reduction), backend=backend)
    value = run(*leaves[:2]).sum()
    (grad,) = torch.autograd.grad(value, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative" if backend == "eager" else "double backward"):
        (value + grad.square().sum()).backward()


def test_callables_and_function_transforms_break_the_graph():
    """With a reason, and the numbers of eager code."""
    leaves, target = problem()
    call = partial(linear_loss, target=target, loss=partial(tailr_loss, gamma=0.2, reduction="none"), chunk_size=8)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="linear_loss runs callables of logits"):
        compiled(call)(*leaves[:2])
    broken = partial(torch.compile, backend="aot_eager")
    for mine, theirs in zip(results(broken(call), leaves[:2]), results(call, leaves[:2]), strict=True):
        assert torch.equal(mine, theirs)
    gradient = torch.func.grad(partial(linear_tailr_loss, target=target, chunk_size=8), (0, 1))
    primals = [x.detach() for x in leaves[:2]]
    for mine, theirs in zip(broken(gradient)(*primals), gradient(*primals), strict=True):
        assert torch.equal(mine, theirs)


def test_export():
    class Head(torch.nn.Linear):
        def forward(self, hidden, target):
            return linear_loss(hidden, self.weight, target, CrossEntropy(), linear_bias=self.bias, return_stats=True)

    (hidden, _, _), target = problem(dtype=torch.float32)
    head = Head(FEATURES, CLASSES)
    rows = {0: torch.export.Dim("rows")}
    exported = torch.export.export(head, (hidden.detach(), target), dynamic_shapes=(rows, rows)).module()
    mine, theirs = exported(hidden[:9], target[:9]), head(hidden[:9], target[:9])
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1].nll, theirs[1].nll)


@pytest.mark.slow
def test_inductor():
    leaves, target = problem(dtype=torch.float32)

    def call(hidden, weight, bias):
        mixed = F.gelu(hidden)
        rows = linear_emo_loss(mixed, weight, target, cost_matrix=COSTS.float(), linear_bias=bias, reduction="none")
        return 0.5 * linear_margin_softmax_loss(mixed, weight, target, temperature=0.5) + rows.sum()

    for mine, theirs in zip(results(torch.compile(call, fullgraph=True), leaves), results(call, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
