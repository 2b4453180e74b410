"""Every public operation, loss and optimizer of the package in half precision, after an overflow, and compiled.

The rows are the families' `__all__`, whatever they hold: a new name without an entry in `matrix_entries.py` fails.
Tested of optimizers: an overflow step of a `GradScaler` leaves parameters and state bit for bit as they were, training
goes on after it, and gradients of a compiled model serve them. A compiled `step` gives the numbers of the eager one; it
is one graph for those of `WHOLE_STEPS`, and tested not to be for the others.
"""

import importlib
import inspect
import math
from pathlib import Path

import pytest
import torch
from matrix_entries import EXEMPT, OPERATIONS, OPTIMIZERS, WHOLE_STEPS, model
from torch import Tensor, nn
from torch.nn import functional as F

import danlu

SOURCE = Path(danlu.__file__).parent
# Not families: private helpers, kernels behind the operations, the wiring into frameworks, and the laboratory.
OTHER = {"_common", "kernels", "integrations", "lab"}
FAMILIES = sorted(
    path.stem
    for path in SOURCE.iterdir()
    if path.stem not in OTHER
    and not path.stem.startswith("__")
    and (path.suffix == ".py" or (path / "__init__.py").exists())
)
PUBLIC = {
    f"{family}.{name}": getattr(importlib.import_module(f"danlu.{family}"), name)
    for family in FAMILIES
    for name in importlib.import_module(f"danlu.{family}").__all__
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
operations = pytest.mark.parametrize("name", sorted(OPERATIONS))
optimizers = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


def test_every_public_name_has_exactly_one_entry():
    kinds = [{name.partition(":")[0] for name in entries} for entries in (OPERATIONS, OPTIMIZERS, EXEMPT)]
    entries = [name for kind in kinds for name in kind]
    assert len(entries) == len(set(entries))
    missing = sorted(set(PUBLIC) - set(entries))
    assert not missing, f"add to tests/precision/matrix_entries.py: {', '.join(missing)}"
    assert not (stale := sorted(set(entries) - set(PUBLIC))), f"no longer public: {', '.join(stale)}"


def test_optimizers_are_optimizers_and_exemptions_have_reasons():
    classes = {name for name, one in PUBLIC.items() if inspect.isclass(one) and issubclass(one, torch.optim.Optimizer)}
    assert classes == {name.partition(":")[0] for name in OPTIMIZERS}
    assert {"simplex", "losses", "attention", "positions", "optim", "precision"} <= set(FAMILIES)
    for name, reason in EXEMPT.items():
        assert len(reason) >= len("a record"), name
        # A module has a forward, and what has a forward is an operation.
        assert not (inspect.isclass(PUBLIC[name]) and issubclass(PUBLIC[name], nn.Module)), name


def leaves_of(name: str) -> list[Tensor]:
    operation = OPERATIONS[name]
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator) for shape in operation.leaves]
    if operation.positive:
        tensors = [tensor.softmax(-1) for tensor in tensors]
    return [tensor.requires_grad_() for tensor in tensors]


def value_and_gradients(call, leaves: list[Tensor]) -> list[Tensor]:
    """The result, and gradients under a fixed cotangent, which backward gets outside of autocast as it should."""
    result = call(*leaves)
    weights = torch.linspace(-1, 1.5, result.numel()).view(result.shape)
    (result.float() * weights).sum().backward()
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    for leaf in leaves:
        leaf.grad = None
    return [result.detach().float(), *grads]


@operations
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("inputs", ["float32", "half"])
def test_under_autocast_equals_float32(name, precision, inputs):
    """With float32 inputs, and with half ones as they come out of a linear layer."""
    operation, dtype, leaves = OPERATIONS[name], DTYPES[precision], leaves_of(name)
    exact = value_and_gradients(operation.call, leaves)

    def call(*tensors):
        with torch.autocast("cpu", dtype=dtype):
            given = [tensor.to(dtype) for tensor in tensors] if inputs == "half" else tensors
            return operation.call(*given)

    found = value_and_gradients(call, leaves)
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.isfinite().all()
        bound = operation.tolerance * torch.finfo(dtype).eps * theirs.abs().max()
        assert (mine - theirs).abs().max() <= bound


@operations
def test_scaler_skips_the_overflow_and_goes_on(name):
    """fp16 with a `GradScaler`: the first step overflows and changes nothing; the next ones train."""
    operation = OPERATIONS[name]
    params = [nn.Parameter(leaf.detach()) for leaf in leaves_of(name)]
    optimizer = torch.optim.SGD(params, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = [p.detach().clone() for p in params]
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.float16):
            result = operation.call(*params)
            weights = torch.linspace(-1, 1.5, result.numel()).view(result.shape)
            loss = (result.float() * weights).sum()
        optimizer.zero_grad()
        (scaler.scale(loss) * (math.inf if step == 0 else 2.0**-10)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
            assert scaler.get_scale() == 2.0**15
    assert scaler.get_scale() == 2.0**15
    assert all(p.isfinite().all() for p in params)
    assert not all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def compilations() -> list:
    """Every operation in float32 and bf16; what is traced in parts takes long, and what is refused is so in any."""
    found = []
    for name, operation in sorted(OPERATIONS.items()):
        marks = [pytest.mark.slow] if ":" in name else []
        found.append(pytest.param(name, "fp32", id=f"fp32-{name}", marks=marks))
        if not operation.refusal:
            marks = [pytest.mark.slow] if operation.whole_graph else []
            found.append(pytest.param(name, "bf16", id=f"bf16-{name}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "precision"), compilations())
def test_compiles_as_one_graph_to_the_same_numbers(name, precision):
    """Forward and backward traced by dynamo and AOT autograd, in float32 and under autocast."""
    operation, leaves = OPERATIONS[name], leaves_of(name)
    dtype = DTYPES.get(precision, torch.bfloat16)

    def call(*tensors):
        with torch.autocast("cpu", dtype=dtype, enabled=precision in DTYPES):
            return operation.call(*tensors)

    exact = value_and_gradients(call, leaves)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    if operation.whole_graph:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(*leaves)
        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager")
    if operation.refusal:
        with pytest.raises(RuntimeError, match=operation.refusal):
            compiled(*leaves)
        return
    for mine, theirs in zip(value_and_gradients(compiled, leaves), exact, strict=True):
        eps = torch.finfo(dtype).eps if precision in DTYPES else 1e-6
        assert (mine - theirs).abs().max() <= 4 * eps * max(1.0, float(theirs.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in OPERATIONS if not OPERATIONS[name].refusal))
def test_inductor_gives_the_same_numbers(name):
    inductor(name)


@pytest.mark.parametrize("name", ["simplex.softmax", "losses.tailr_loss"])
def test_inductor_on_some(name):
    inductor(name)


def inductor(name: str) -> None:
    operation, leaves = OPERATIONS[name], leaves_of(name)
    exact = value_and_gradients(operation.call, leaves)
    torch._dynamo.reset()
    compiled = torch.compile(operation.call, fullgraph=not operation.whole_graph)
    for mine, theirs in zip(value_and_gradients(compiled, leaves), exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- optimizers


def tokens(step: int) -> Tensor:
    return torch.randint(11, (9,), generator=torch.Generator().manual_seed(step))


def token_loss(net, step: int, dtype=None) -> Tensor:
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        return F.mse_loss(net(tokens(step)).float(), torch.ones(9, 3))


def contents(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors of the state, also of an inner optimizer's, and the numbers of state and groups as one."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    values += [value for group in optimizer.param_groups for value in group.values()]
    held = [value.clone() for value in values if isinstance(value, Tensor)]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    inner = getattr(optimizer, "inner", None)
    return [*held, torch.tensor(numbers, dtype=torch.float64), *([] if inner is None else contents(inner))]


@optimizers
@pytest.mark.parametrize("precision", DTYPES)
def test_optimizer_trains_under_autocast(name, precision):
    net = model()
    optimizer = OPTIMIZERS[name](net)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = token_loss(net, 0, DTYPES[precision])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def paths() -> list:
    """Every implementation of every optimizer, as far as its class has the option."""
    found = []
    for name in sorted(OPTIMIZERS):
        for options in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}):
            if name.endswith(":wrapped") and options:
                continue  # They belong to the inner optimizer.
            if name.endswith(":adam") and "fused" in options:
                continue  # There is no compiled step for it, which it says.
            if options.keys() <= inspect.signature(PUBLIC[name.partition(":")[0]]).parameters.keys():
                label = "-".join([name, *(f"{key}={value}" for key, value in options.items())])
                # Built by the C++ compiler at its first use.
                marks = [pytest.mark.slow] if "fused" in options else []
                found.append(pytest.param(name, options, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("name", "options"), paths())
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_optimizer_is_left_alone_by_an_overflow_step(name, options, bad):
    net = model()
    optimizer = OPTIMIZERS[name](net, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(token_loss(net, step, torch.float16)).backward()
        before = [p.detach().clone() for p in net.parameters()], contents(optimizer)
        if step == 3:
            net[1].weight.grad[0, 0] = bad
        scaler.step(optimizer)
        scaler.update()
        after = [p.detach().clone() for p in net.parameters()], contents(optimizer)
        if step > 0:
            unchanged = all(
                torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)
            )
            assert unchanged == (step == 3)
    assert scaler.get_scale() == 2.0**9
    assert all(p.isfinite().all() for p in net.parameters())


@optimizers
def test_optimizer_takes_gradients_of_a_compiled_model(name):
    found = []
    for compiled in (False, True):
        net = model()
        optimizer = OPTIMIZERS[name](net)
        torch._dynamo.reset()
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        for step in range(4):
            optimizer.zero_grad()
            token_loss(run, step).backward()
            optimizer.step()
        found.append([p.detach().clone() for p in net.parameters()])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def compiled_steps(name: str, **options) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and state after some eager steps, and after the same ones compiled."""
    found = []
    for compiled in (False, True):
        net = model()
        optimizer = OPTIMIZERS[name](net)
        torch._dynamo.reset()

        def update(optimizer=optimizer) -> None:
            optimizer.step()

        step = torch.compile(update, backend="aot_eager", **options) if compiled else update
        for index in range(3):
            optimizer.zero_grad()
            token_loss(net, index).backward()
            step()
        held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        found.append([tensor.detach().clone() for tensor in (*net.parameters(), *held)])
    return found[0], found[1]


@optimizers
def test_step_as_one_graph(name):
    if name not in WHOLE_STEPS:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled_steps(name, fullgraph=True)
        return
    torch.testing.assert_close(*compiled_steps(name, fullgraph=True), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@optimizers
def test_compiled_step_gives_the_same_numbers(name):
    torch.testing.assert_close(*compiled_steps(name), rtol=1e-5, atol=1e-6)
