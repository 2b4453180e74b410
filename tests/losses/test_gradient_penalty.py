"""Gradient penalties: double backward, finite differences, schedules, and what the model must not notice."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from danlu.losses import GradientPenalty, input_gradient_penalty, parameter_gradient_penalty


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(dtype: torch.dtype = torch.float64, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 5, generator=generator).to(dtype), torch.randint(3, (rows,), generator=generator)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def flat(tensors) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    return flat(torch.autograd.grad(value, list(model.parameters()), materialize_grads=True))


# ------------------------------------------------------------------------------------------------------- input


def test_input_penalty_equals_a_loop_over_the_samples():
    model, (x, y) = mlp(), batch()
    x.requires_grad_()
    norms = input_gradient_penalty(losses(model, x, y), x, reduction="none")
    alone = []
    for i in range(len(x)):
        one = x[i : i + 1].detach().requires_grad_()
        alone.append(torch.autograd.grad(losses(model, one, y[i : i + 1]).sum(), one)[0].square().sum())
    expected = torch.stack(alone)
    torch.testing.assert_close(norms, expected)
    torch.testing.assert_close(input_gradient_penalty(losses(model, x, y), x), expected.mean())
    torch.testing.assert_close(input_gradient_penalty(losses(model, x, y), x, reduction="sum"), expected.sum())
    # A scalar is the mean of the samples' losses.
    torch.testing.assert_close(input_gradient_penalty(losses(model, x, y).mean(), x), expected.mean())


def test_input_penalty_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    penalty = input_gradient_penalty((x @ w).square() / 2, x, reduction="none")
    # The gradient is (w.x) w.
    assert penalty.tolist() == [11.0**2 * 25, 5.0**2 * 25]


def test_input_penalty_gradcheck_and_gradgradcheck():
    model, (x, y) = mlp(), batch(rows=3)
    weight = model[0].weight.detach().clone().requires_grad_()

    def penalty(x: Tensor, weight: Tensor) -> Tensor:
        x = x * 1.0
        hidden = torch.tanh(F.linear(x, weight, model[0].bias))
        return input_gradient_penalty(losses(model[2:], hidden, y), x)

    inputs = (x.requires_grad_(), weight)
    assert torch.autograd.gradcheck(penalty, inputs)
    assert torch.autograd.gradgradcheck(penalty, inputs)


def test_token_model_takes_the_output_of_the_embedding():
    embedding, head = nn.Embedding(7, 4).double(), nn.Linear(4, 3).double()
    tokens, y = torch.randint(7, (6, 5)), torch.randint(3, (6,))
    hidden = embedding(tokens)
    penalty = input_gradient_penalty(F.cross_entropy(head(hidden.mean(1).tanh()), y, reduction="none"), hidden)
    penalty.backward()
    assert embedding.weight.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="give the output of its embedding"):
        input_gradient_penalty(hidden.sum((1, 2)), tokens)


def test_half_gradients_are_squared_in_float32():
    x = torch.full((2, 8), 1.0, dtype=torch.bfloat16, requires_grad=True)
    penalty = input_gradient_penalty((300 * x).sum(1), x, reduction="none")
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, torch.full((2,), 8 * 300.0**2))


@pytest.mark.parametrize(
    ("loss", "inputs", "options", "error", "match"),
    [
        (torch.ones(2), torch.ones(2, 3), {}, ValueError, r"call inputs\.requires_grad_\(\) before"),
        (torch.ones(2).long(), torch.ones(2, 3), {}, TypeError, "loss must be a floating-point tensor"),
        (torch.ones(2), [1.0], {}, TypeError, r"inputs must be a torch\.Tensor"),
        (torch.ones(2), torch.ones(2, 3), {"reduction": "avg"}, ValueError, "reduction must be one of"),
        (torch.ones(3), torch.ones(2, 3).requires_grad_(), {}, ValueError, r"got loss \(3,\) and inputs \(2, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3).requires_grad_(), {}, ValueError, "one value per sample or be their mean"),
        (torch.ones(2).half(), torch.ones(2, 3).requires_grad_(), {}, ValueError, "float16 is too narrow"),
        (torch.ones(2), torch.ones(2, 3).requires_grad_(), {}, RuntimeError, "the loss has no graph"),
        (torch.ones(2).requires_grad_() * 1, torch.ones(2, 3).requires_grad_(), {}, ValueError, "does not depend on"),
    ],
)
def test_bad_arguments_of_the_input_penalty(loss, inputs, options, error, match):
    with pytest.raises(error, match=match):
        input_gradient_penalty(loss, inputs, **options)


def test_an_empty_batch_has_no_penalties():
    x = torch.zeros(0, 3, requires_grad=True)
    assert input_gradient_penalty(x.square().sum(1), x, reduction="none").shape == (0,)
    assert input_gradient_penalty(x.square().sum(1), x, reduction="sum") == 0


def test_float16_losses_are_refused_for_parameters():
    """A loss that is there already cannot be computed again in float32, as a function is."""
    model, (x, y) = mlp(torch.float32), batch(torch.float32)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16 is too narrow"):
        parameter_gradient_penalty(F.cross_entropy(model(x), y), model)
    with pytest.raises(ValueError, match="float16 is too narrow"):
        parameter_gradient_penalty(F.cross_entropy(model(x), y).half(), model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parameter_gradient_penalty(F.cross_entropy(model(x), y), model)


def test_autocast_to_float16_is_refused_for_inputs():
    x = torch.ones(2, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16 is too narrow"):
        input_gradient_penalty(x.sum(1), x)


def test_operations_in_place_are_explained():
    x = torch.ones(2, 3, requires_grad=True)
    hidden = (x * 1.0).exp()
    loss = hidden.sum(1)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match=r"in-place operation .* make it out of place \(inplace=False\)"):
        input_gradient_penalty(loss, x)
    changed = (x * 1.0).mul_(2)
    kept = changed * 1
    changed.mul_(3)
    with pytest.raises(ValueError, match="without a copy or an in-place change"):
        input_gradient_penalty(kept.sum(1), changed)


# ---------------------------------------------------------------------------------- attention without second derivative


class Attention(nn.Module):
    def __init__(self, backend: SDPBackend | None = None) -> None:
        super().__init__()
        self.project, self.out, self.backend = nn.Linear(8, 24), nn.Linear(8, 2), backend

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.view(*x.shape[:2], 2, 4).transpose(1, 2) for part in self.project(x).split(8, dim=-1))
        if self.backend is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            with sdpa_kernel(self.backend):
                mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


def test_fused_attention_is_refused_with_both_remedies_and_both_work():
    torch.manual_seed(0)
    fused, x, y = Attention().double(), torch.randn(3, 6, 8, dtype=torch.float64), torch.tensor([0, 1, 1])
    x.requires_grad_()
    value = losses(fused, x, y)
    if "ScaledDotProduct" not in repr(_nodes(value)):
        pytest.skip("this build of torch has no fused attention on the CPU")
    remedies = r"sdpa_kernel\(SDPBackend\.MATH\), or use method='finite_difference'"
    with pytest.raises(RuntimeError, match=remedies):
        input_gradient_penalty(value, x)
    for scope in ("batch", "per_sample"):
        with pytest.raises(RuntimeError, match=remedies):
            parameter_gradient_penalty(partial(losses, fused, x, y), fused, scope=scope)
    math_model = Attention(SDPBackend.MATH).double()
    math_model.load_state_dict(fused.state_dict())
    _, exact = parameter_gradient_penalty(partial(losses, math_model, x, y), math_model)
    assert input_gradient_penalty(losses(math_model, x, y), x) > 0
    _, penalty = parameter_gradient_penalty(
        partial(losses, fused, x, y), fused, method="finite_difference", radius=1e-4, central=True
    )
    torch.testing.assert_close(penalty, exact)
    torch.testing.assert_close(gradient(penalty, fused), gradient(exact, math_model), rtol=1e-5, atol=1e-8)


def _nodes(value: Tensor) -> list[str]:
    names, stack = [], [value.grad_fn]
    while stack:
        node = stack.pop()
        names.append(node.name())
        stack += [child for child, _ in node.next_functions if child is not None]
    return names


def test_compiled_models_are_refused_for_double_backward():
    model, (x, y) = mlp(), batch()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"torch\.compile .* method='finite_difference'"):
        parameter_gradient_penalty(partial(losses, compiled, x, y), model)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch\.compile"):
        input_gradient_penalty(losses(compiled, x, y), x)


def compiled_agrees(backend: str) -> None:
    model, (x, y) = nn.Sequential(mlp()[:2], nn.BatchNorm1d(8), mlp()[2:]).double(), batch()
    plain = partial(losses, model, x, y)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    _, exact = parameter_gradient_penalty(plain, model)
    after = {key: value.clone() for key, value in model.state_dict().items()}
    expected = gradient(exact, model)
    model.load_state_dict(state)
    compiled = torch.compile(model, backend=backend)
    _, penalty = parameter_gradient_penalty(
        partial(losses, compiled, x, y), model, method="finite_difference", radius=1e-3, central=True
    )
    torch.testing.assert_close(gradient(penalty, model), expected, rtol=1e-4, atol=1e-6)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, after[key], rtol=1e-12, atol=0, msg=key)


def test_finite_difference_of_a_compiled_model():
    compiled_agrees("aot_eager")


@pytest.mark.slow
def test_finite_difference_of_a_model_compiled_by_inductor():
    compiled_agrees("inductor")


# ------------------------------------------------------------------------------------------------------- batch


def test_double_backward_of_a_batch():
    model, (x, y) = mlp(), batch()
    g = gradient(losses(model, x, y).mean(), model)
    loss, penalty = parameter_gradient_penalty(losses(model, x, y), model)
    torch.testing.assert_close(loss, losses(model, x, y).mean())
    torch.testing.assert_close(penalty, g.square().sum())
    again = parameter_gradient_penalty(partial(losses, model, x, y), model)[1]
    assert torch.equal(penalty, again)
    # The gradient is 2 H g.
    names = [name for name, _ in model.named_parameters()]

    def loss_of(*tensors: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), x), y)

    vector = torch.autograd.grad(losses(model, x, y).mean(), list(model.parameters()))
    product = torch.autograd.functional.vhp(loss_of, tuple(model.parameters()), vector)[1]
    torch.testing.assert_close(gradient(penalty, model), 2 * flat(product))


# Relative errors of the gradient on this network, of order 1 and 2 in the radius. Another small MLP had 4.6e-3, 2.7e-5,
# 4.6e-4 and 2.7e-7.
ERRORS = {(1e-2, False): 7.04e-3, (1e-2, True): 4.72e-5, (1e-3, False): 7.03e-4, (1e-3, True): 4.72e-7}


@pytest.mark.parametrize(("radius", "central"), ERRORS)
def test_finite_difference_approaches_double_backward(radius, central):
    model, (x, y) = mlp(), batch()
    closure = partial(losses, model, x, y)
    exact_loss, exact = parameter_gradient_penalty(closure, model)
    expected = gradient(exact, model)
    loss, penalty = parameter_gradient_penalty(
        closure, model, method="finite_difference", radius=radius, central=central
    )
    torch.testing.assert_close(penalty, exact)
    torch.testing.assert_close(loss, exact_loss)
    error = float((gradient(penalty, model) - expected).norm() / expected.norm())
    assert error == pytest.approx(ERRORS[radius, central], rel=0.05)
    # loss and penalty share one backward pass with any weights.
    total = gradient(0.7 * loss + 0.2 * penalty, model)
    parts = 0.7 * gradient(closure().mean(), model) + 0.2 * expected
    torch.testing.assert_close(total, parts, rtol=0, atol=float(0.3 * error * expected.norm()) + 1e-12)
    with pytest.raises(RuntimeError, match="'finite_difference' has no second derivative"):
        torch.autograd.grad(penalty, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("central", [False, True])
def test_parameters_are_restored_bit_for_bit_also_after_an_error(central):
    model, (x, y) = mlp(torch.float32), batch(torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = losses(model, x, y).mean()
    GradientPenalty(model, parameter=1.0, method="finite_difference", central=central).backward(
        partial(losses, model, x, y)
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    # A graph made before still holds.
    other.backward()
    calls = []

    def fails() -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            assert not torch.equal(model[0].weight, before["0.weight"])
            raise ArithmeticError("stop")
        return losses(model, x, y)

    with pytest.raises(ArithmeticError, match="stop"):
        parameter_gradient_penalty(fails, model, method="finite_difference", central=central)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("central", [False, True])
def test_subtraction_restores_up_to_rounding_and_gives_the_same_gradient(central):
    model, (x, y) = mlp(torch.float32), batch(torch.float32)
    penalty = GradientPenalty(model, parameter=0.1, method="finite_difference", central=central)
    before = flat(model.parameters()).detach().clone()
    found = []
    for restore in ("copy", "subtract"):
        model.zero_grad()
        penalty.backward(partial(losses, model, x, y), restore=restore)
        found.append(flat(p.grad for p in model.parameters()))
    assert torch.equal(*found)
    torch.testing.assert_close(flat(model.parameters()).detach(), before, rtol=2**-22, atol=2e-9)


def test_zero_gradient_gives_a_zero_penalty_with_zero_gradient():
    model = nn.Linear(2, 1).double()
    closure = lambda: (0 * model(torch.ones(3, 2, dtype=torch.float64))).square().sum(1)  # noqa: E731
    for options in ({}, {"method": "finite_difference"}, {"scope": "per_sample"}):
        loss, penalty = parameter_gradient_penalty(closure, model, **options)
        assert penalty == 0
        assert (gradient(loss + penalty, model) == 0).all()
    GradientPenalty(model, parameter=1.0, method="finite_difference").backward(closure)
    assert (model.weight.grad == 0).all()


def test_implicit_regularization_of_gradient_descent():
    """On a quadratic, descent follows the flow to order 1 and the flow of L + h/4 |grad L|^2 to order 2."""
    curvature = torch.tensor([1.0, 10.0], dtype=torch.float64)
    start = torch.ones(2, dtype=torch.float64)
    expected = {0.01: (0.00185, 1.23e-5), 0.02: (0.00371, 4.94e-5), 0.04: (0.00748, 1.98e-4)}

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(start.clone())

        def forward(self) -> Tensor:
            return (curvature * self.theta.square()).sum() / 2

    for h, (plain, modified) in expected.items():
        model = Quadratic()
        for _ in range(round(1 / h)):
            model.theta.data.sub_(h * torch.autograd.grad(model(), model.theta)[0])
        end = model.theta.detach().clone()
        # The modified loss is quadratic, too: its curvature from the gradient at 1.
        model.theta.data.copy_(start)
        loss, penalty = parameter_gradient_penalty(model(), model)
        bent = torch.autograd.grad(loss + h / 4 * penalty, model.theta)[0]
        assert float((end - start * torch.exp(-curvature)).norm()) == pytest.approx(plain, rel=0.01)
        assert float((end - start * torch.exp(-bent)).norm()) == pytest.approx(modified, rel=0.01)


def test_dropout_has_one_mask_and_random_numbers_go_on_as_after_one_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    x, y = batch()
    masks = []
    model[2].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    torch.manual_seed(7)
    losses(model, x, y)
    after_one_pass, mask = torch.rand(1), masks.pop()
    for run in (
        lambda: parameter_gradient_penalty(
            partial(losses, model, x, y), model, method="finite_difference", central=True
        ),
        lambda: GradientPenalty(model, parameter=1.0, method="finite_difference").backward(
            partial(losses, model, x, y)
        ),
    ):
        torch.manual_seed(7)
        run()
        assert torch.equal(torch.rand(1), after_one_pass)
        assert all(torch.equal(one, mask) for one in masks)
        assert len(masks) > 1
        masks.clear()


def test_statistics_of_batch_norm_are_updated_once():
    x, y = batch()

    def made() -> nn.Sequential:
        return nn.Sequential(mlp()[:2], nn.BatchNorm1d(8), mlp()[2:]).double()

    plain = made()
    losses(plain, x, y).mean().backward()
    for run in (
        lambda model: parameter_gradient_penalty(
            partial(losses, model, x, y), model, method="finite_difference", central=True
        ),
        lambda model: GradientPenalty(model, parameter=0.1, method="finite_difference").backward(
            partial(losses, model, x, y)
        ),
    ):
        model = made()
        run(model)
        assert model[1].training
        for (key, value), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(value, expected), key
    # The second pass is in the same mode: with its own batch statistics the gradient is that of double backward.
    model = made()
    closure = partial(losses, model, x, y)
    exact = gradient(parameter_gradient_penalty(closure, model)[1], model)
    found = parameter_gradient_penalty(closure, model, method="finite_difference", radius=1e-4, central=True)[1]
    torch.testing.assert_close(gradient(found, model), exact, rtol=1e-4, atol=1e-7)


def test_autocast_to_float16_is_switched_off_for_the_penalty():
    model, (x, y) = mlp(torch.float32), batch(torch.float32)
    seen = []

    def closure() -> Tensor:
        out = model(x)
        seen.append(out.dtype)
        return F.cross_entropy(out.float(), y, reduction="none")

    expected = [parameter_gradient_penalty(closure, model, **o)[1] for o in ({}, {"method": "finite_difference"})]
    with torch.autocast("cpu", dtype=torch.float16):
        found = [parameter_gradient_penalty(closure, model, **o)[1] for o in ({}, {"method": "finite_difference"})]
        GradientPenalty(model, parameter=1.0, method="finite_difference").backward(closure)
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parameter_gradient_penalty(closure, model)
    assert seen[-1] == torch.bfloat16


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_autocast_around_a_finite_difference_does_not_serve_casts_of_other_weights(central, in_place):
    """The casts of the first pass would make both passes equal and the gradient of the penalty zero."""
    x, y = batch(torch.float32)
    found = []
    for around in (False, True):
        model = mlp(torch.float32)
        options = {"method": "finite_difference", "radius": 0.5, "central": central}

        def closure(model=model, around=around) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=around):
                return F.cross_entropy(model(x).float(), y, reduction="none")

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around, cache_enabled=around):
            if in_place:
                GradientPenalty(model, parameter=1.0, **options).backward(closure)
            else:
                penalty = parameter_gradient_penalty(closure, model, **options)[1]
            after = closure().detach()
        if not in_place:
            penalty.backward()
        assert torch.equal(after, closure())
        found.append([param.grad for param in model.parameters()])
    assert all(one.abs().sum() > 0 for one in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def sharded_linear() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))

    def shard(name: str, module: nn.Module, mesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))

    return distribute_module(nn.Linear(4, 2), mesh, shard)


def test_sharded_parameters_are_refused_for_double_backward(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = sharded_linear()
        closure = lambda: torch.ones(3, requires_grad=True) * 1  # noqa: E731
        for options in ({}, {"scope": "per_sample"}):
            with pytest.raises(ValueError, match=r"DTensor.*use method='finite_difference'"):
                parameter_gradient_penalty(closure, model, **options)
        with pytest.raises(ValueError, match=r"DTensor.*use method='finite_difference'"):
            GradientPenalty(model, parameter=0.1).backward(closure)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "exact"}, ValueError, "method must be one of 'double_backward', 'finite_difference', got 'exact'"),
        ({"scope": "token"}, ValueError, "scope must be one of 'batch', 'per_sample', got 'token'"),
        ({"radius": 0.0}, ValueError, r"radius must be in \(0, inf\), got 0"),
        ({"central": 1}, TypeError, "central must be a bool"),
        ({"central": True}, ValueError, "central=True has no meaning with method='double_backward'"),
        ({"method": "finite_difference", "scope": "per_sample"}, ValueError, "scope must be 'batch'"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"reduction": "sum"}, ValueError, "reduction='sum' has no meaning with scope='batch'"),
        ({"model": nn.ReLU()}, ValueError, "model has no trainable parameters"),
        ({"model": [1]}, TypeError, r"model must be a torch\.nn\.Module"),
        ({"loss": torch.ones(3), "method": "finite_difference"}, TypeError, "loss must be a function"),
        ({"loss": torch.ones(3), "scope": "per_sample"}, TypeError, "loss must be a function"),
        ({"loss": lambda: torch.ones(3)}, RuntimeError, "the loss has no graph"),
        ({"loss": torch.ones(3).requires_grad_() * 1}, ValueError, "loss does not depend on the trainable parameters"),
        (
            {"loss": lambda: torch.ones(3).requires_grad_() * 1, "method": "finite_difference"},
            ValueError,
            "loss does not depend on the trainable parameters",
        ),
        (
            {"model": nn.Linear(2, 1).bfloat16(), "method": "finite_difference"},
            ValueError,
            r"needs float32 or float64 parameters, got torch\.bfloat16",
        ),
        ({"radios": 1.0}, TypeError, "radios"),
    ],
)
def test_bad_arguments_of_the_parameter_penalty(options, error, match):
    model = nn.Linear(2, 1)
    arguments = {"loss": lambda: model(torch.ones(3, 2)).sum(1), "model": model, **options}
    with pytest.raises(error, match=match):
        parameter_gradient_penalty(arguments.pop("loss"), arguments.pop("model"), **arguments)


# --------------------------------------------------------------------------------------------------------- loop


ARMS = {
    "input": {"input": 0.3},
    "double_backward": {"parameter": 0.3},
    "finite_difference": {"parameter": 0.3, "method": "finite_difference", "radius": 1e-4, "central": True},
    "per_sample": {"parameter": 0.3, "scope": "per_sample"},
    "both": {"input": 0.2, "parameter": 0.3},
    "both_finite": {"input": 0.2, "parameter": 0.3, "method": "finite_difference", "radius": 1e-4, "central": True},
}


@pytest.mark.parametrize("arm", ARMS)
def test_backward_equals_the_call_and_the_functions(arm):
    options, model, (x, y) = ARMS[arm], mlp(), batch()
    x.requires_grad_()
    closure = partial(losses, model, x, y)
    expected = gradient(closure().mean(), model)
    if "input" in options:
        expected += options["input"] * gradient(input_gradient_penalty(closure(), x), model)
    if "parameter" in options:
        scope = options.get("scope", "batch")
        expected += options["parameter"] * gradient(parameter_gradient_penalty(closure, model, scope=scope)[1], model)
    penalty = GradientPenalty(model, **options)
    total = penalty(closure, inputs=x)
    torch.testing.assert_close(gradient(total, model), expected, rtol=1e-4, atol=1e-7)
    names = [name for name in ("parameter", "input") if name in options]
    assert list(penalty.values) == names
    value = closure().mean() + sum(options[name] * penalty.values[name] for name in names)
    torch.testing.assert_close(total, value)
    # Into gradients that are None, and on top of those of a micro-batch before.
    for before in (None, 7.0):
        for parameter in model.parameters():
            parameter.grad = None if before is None else torch.full_like(parameter, before)
        loss = penalty.backward(closure, inputs=x)
        torch.testing.assert_close(loss, closure().mean().detach())
        found = flat(parameter.grad for parameter in model.parameters())
        torch.testing.assert_close(found, expected + (before or 0.0), rtol=1e-4, atol=1e-7)


def test_schedule_and_checkpoint():
    model, (x, y) = mlp(), batch()
    penalty = GradientPenalty(model, parameter=0.5, input=0.25, every=2, warmup=4)
    assert [penalty.weights(step) for step in range(7)] == [
        (0.125, 0.25),
        (0.0, 0.0),
        (0.375, 0.75),
        (0.0, 0.0),
        (0.5, 1.0),
        (0.0, 0.0),
        (0.5, 1.0),
    ]
    penalty = GradientPenalty(model, parameter=0.5, every=2, method="finite_difference")
    closure = partial(losses, model, x, y)
    plain = gradient(closure().mean(), model)
    for step in range(4):
        model.zero_grad()
        penalty.backward(closure)
        assert torch.equal(flat(p.grad for p in model.parameters()), plain) == bool(step % 2)
    other = GradientPenalty(model, parameter=0.5)
    other.load_state_dict(penalty.state_dict())
    assert other.step == penalty.step == 4
    # A given step is not counted; `scale` multiplies the penalties.
    value = float((penalty(closure, step=2, scale=3.0) - closure().mean()).detach())
    assert value == pytest.approx(3 * 2 * 0.5 * float(penalty.values["parameter"]))
    assert penalty.step == 4
    assert "parameter=0.5, method='finite_difference'" in repr(penalty)


def test_other_leaves_get_the_plain_gradient_from_backward():
    model, (x, y) = mlp(), batch()
    shift = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(losses(model, x + shift, y).mean(), shift)[0]
    GradientPenalty(model, parameter=1.0, method="finite_difference").backward(lambda: losses(model, x + shift, y))
    torch.testing.assert_close(shift.grad, expected)


def test_gradient_scaler_scales_the_sum():
    model, (x, y) = mlp(torch.float32), batch(torch.float32)
    penalty = GradientPenalty(model, parameter=0.5, method="finite_difference")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(penalty(partial(losses, model, x, y))).backward()
    scaled = flat(p.grad for p in model.parameters()) / 1024
    model.zero_grad()
    penalty.backward(partial(losses, model, x, y))
    torch.testing.assert_close(scaled, flat(p.grad for p in model.parameters()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"input": -1.0}, ValueError, r"input must be in \[0, inf\)"),
        ({"parameter": -1.0}, ValueError, r"parameter must be in \[0, inf\)"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0"),
        ({"central": True}, ValueError, "central=True has no meaning"),
        ({"radius": math.nan}, ValueError, "radius must be in"),
        ({"penalty": 1.0}, TypeError, "penalty"),
    ],
)
def test_bad_options_of_the_loop(options, error, match):
    with pytest.raises(error, match=match):
        GradientPenalty(mlp(), **options)


def test_bad_calls_of_the_loop():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, whose buffers .* got SGD"):
        GradientPenalty(optimizer, parameter=1.0)
    penalty = GradientPenalty(model, input=1.0)
    with pytest.raises(ValueError, match="inputs must be given"):
        penalty.backward(lambda: torch.ones(()))
    with pytest.raises(TypeError, match="loss must be a function"):
        penalty(torch.ones(()))
    both = GradientPenalty(model, input=1.0, parameter=1.0, method="finite_difference")
    hidden = batch()[0].requires_grad_() * 1
    with pytest.raises(ValueError, match="inputs must be a leaf"):
        both(lambda: model(hidden).sum(1), hidden)
    with pytest.raises(ValueError, match="restore must be one of 'copy', 'subtract', got 'none'"):
        both.backward(lambda: model(hidden).sum(1), restore="none")
    with pytest.raises(ValueError, match="no meaning with an input penalty"):
        both.backward(lambda: model(hidden).sum(1), restore="subtract")
    with pytest.raises(ValueError, match="which moves nothing"):
        penalty.backward(lambda: model(hidden).sum(1), restore="subtract")
    assert penalty.step == both.step == 0


SHARDED = """
import sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from danlu.losses import GradientPenalty, input_gradient_penalty

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()

torch.manual_seed(1)
x = torch.randn(6, 4, dtype=torch.float64)
options = dict(parameter=0.3, method="finite_difference")
whole = made()
GradientPenalty(whole, **options).backward(lambda: whole(x).square().sum(1))
mesh = init_device_mesh("cpu", (2,))
model = made()
fully_shard(model[0], mesh=mesh)
fully_shard(model[2], mesh=mesh)
fully_shard(model, mesh=mesh)
mine = x[3 * rank : 3 * rank + 3].clone()
before = [p.full_tensor().detach().clone() for p in model.parameters()]
penalty = GradientPenalty(model, **options)
penalty.backward(lambda: model(mine).square().sum(1))
for p, q, old in zip(model.parameters(), whole.parameters(), before, strict=True):
    torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    assert torch.equal(p.full_tensor(), old)
model.zero_grad()
penalty(lambda: model(mine).square().sum(1)).backward()
for p, q in zip(model.parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(p.grad.full_tensor(), q.grad)
mine.requires_grad_()
try:
    input_gradient_penalty(model(mine).square().sum(1), mine)
except RuntimeError as error:
    assert "fully_shard does not support" in str(error), error
else:
    raise AssertionError("no error")
dist.destroy_process_group()
print("fine")
"""


def test_finite_difference_under_fully_shard_is_that_of_the_global_batch(tmp_path):
    """Two processes, half of the batch each, against one process with all of it."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert out.strip().endswith("fine"), error
