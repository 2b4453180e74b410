"""What every optimizer promises, as a `torch.optim.Optimizer` and as a citizen of a training loop."""

import copy
import inspect
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import danlu.optim as family
from danlu.optim import Amos, EGStepSize, ExponentiatedGradient, Lion, Tiger, parameter_groups

MEMBERS = {name: getattr(family, name) for name in family.__all__}
# Built on other optimizers and not on parameters; test_amos_strategy.py and test_hybrid.py put them through the same.
WRAPPERS = {"HybridOptimizer", "UpdateNormalized"}
CLASSES = {
    name: c
    for name, c in MEMBERS.items()
    if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer) and name not in WRAPPERS
}
# The name of the option that decays the parameters.
DECAY = {Amos: "extra_l2"}
torch.manual_seed(0)
optimizers = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES.keys())
SHAPES = {
    "scalar": torch.randn(()),
    "empty": torch.randn(0),
    "one": torch.randn(1),
    "seven": torch.randn(7),
    "odd": torch.randn(1023),
    "large": torch.randn(4096),
    "matrix": torch.randn(33, 65),
    "transposed": torch.randn(65, 33).t(),
    "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "gaps": torch.randn(6, 10)[:, ::2],
}


def make(cls, params, **options):
    """An optimizer on bare parameters; warnings about guesses are tested elsewhere."""
    if cls is EGStepSize:
        # One that has its own parameters; optimizers that are wrapped have tests of their own.
        return cls("sgdm", params, **options)
    if cls is ExponentiatedGradient:
        # The mode that takes parameters of any sign. It has no weight decay.
        options.pop("weight_decay", None)
        params = [{k: v for k, v in p.items() if k != "weight_decay"} if isinstance(p, dict) else p for p in params]
        return cls(params, mode="signed", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(params, **own(cls, options))


def own(cls, options):
    """Options under the names that the class has for them."""
    return {DECAY.get(cls, key) if key == "weight_decay" else key: value for key, value in options.items()}


def tensors(optimizer):
    """The state tensors of all parameters, single numbers included."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def train(net, optimizer, steps, start=0, scale=1.0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(11, (9,), generator=generator)
        optimizer.zero_grad()
        (net(tokens).square().mean() * scale).backward()
        optimizer.step()


def values(net) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_family_is_covered():
    assert {"Lion", "Tiger"} <= set(CLASSES)


@optimizers
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}])
def test_all_paths_equal_the_loop(cls, shape, dtype, options):
    """`foreach=None` takes the compiled step where it can."""
    start = SHAPES[shape].to(dtype)
    found = {}
    for foreach in (None, True, False):
        p = nn.Parameter(start.clone(memory_format=torch.preserve_format))
        optimizer = make(cls, [p], lr=0.01, foreach=foreach, **options)
        for step in range(5):
            p.grad = torch.randn(p.shape, dtype=dtype, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        found[foreach] = (p.detach(), *tensors(optimizer))
    for path in (None, True):
        for fast, slow in zip(found[path], found[False], strict=True):
            # Two units in the last place of the update's arithmetic.
            rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (3e-7, 1e-8)
            if cls is EGStepSize and dtype == torch.float32:
                # Its buffer sums what five steps rounded (decision 11).
                rtol, atol = 1.5e-6, 1.5e-6
            torch.testing.assert_close(fast, slow, rtol=rtol, atol=atol)


@optimizers
@pytest.mark.parametrize("foreach", [None, True, False])
def test_state_dict_round_trip_is_exact_and_not_aliased(cls, foreach):
    first = model()
    optimizer = make(cls, parameter_groups(first), lr=0.01, foreach=foreach)
    train(first, optimizer, 5)
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = model()
    second.load_state_dict(saved["model"])
    resumed = make(cls, parameter_groups(second), lr=0.5, foreach=foreach)
    resumed.load_state_dict(saved["optimizer"])
    held = tensors(resumed)
    kept = [v for state in saved["optimizer"]["state"].values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(held, kept, strict=True))
    train(first, optimizer, 5, start=5)
    train(second, resumed, 5, start=5)
    assert same(values(first), values(second))
    assert resumed.param_groups[0]["lr"] == 0.01


@optimizers
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_a_checkpoint_of_another_dtype_goes_on(cls, foreach, before, after):
    """The run goes on as one that was in the new dtype from the start, to the precision of the coarser of the two."""

    def trained(dtype, steps, start, net, saved=None):
        optimizer = make(cls, parameter_groups(net), lr=1e-3, foreach=foreach, rounding="kahan")
        if saved is not None:
            optimizer.load_state_dict(saved)
        for step in range(start, start + steps):
            for i, p in enumerate(net.parameters()):
                generator = torch.Generator().manual_seed(100 * step + i)
                # Far from 0, where the signs of a sum could differ.
                p.grad = (torch.rand(p.shape, generator=generator, dtype=torch.float64) + 1).to(dtype)
            optimizer.step()
        return optimizer

    moved = model().to(before)
    saved = trained(before, 3, 0, moved).state_dict()
    resumed = trained(after, 3, 3, moved.to(after), copy.deepcopy(saved))
    if after == torch.bfloat16:
        assert all(s["compensation"].dtype == after for s in resumed.state.values() if "compensation" in s)
    straight = model().to(after)
    trained(after, 6, 0, straight)
    tolerance = max(torch.finfo(dtype).eps for dtype in (before, after))
    for p, q in zip(moved.parameters(), straight.parameters(), strict=True):
        assert p.dtype == after
        torch.testing.assert_close(p.double(), q.double(), rtol=2 * tolerance, atol=2 * tolerance)


@optimizers
def test_missing_gradients_are_skipped(cls):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = make(cls, [a, b], lr=0.1, weight_decay=0.5)
    a.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(b, torch.ones(3))
    assert b not in optimizer.state
    assert not torch.equal(a, torch.ones(3))


@optimizers
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_gradients_are_not_modified(cls, maximize, foreach):
    net = model()
    optimizer = make(cls, parameter_groups(net), lr=0.1, weight_decay=0.1, maximize=maximize, foreach=foreach)
    for bad in (False, True):
        net(torch.arange(5)).sum().backward()
        if bad:
            net[1].weight.grad[0, 0] = math.nan
        before = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        assert all(
            torch.equal(p.grad, b) or p.grad.isnan().any() for p, b in zip(net.parameters(), before, strict=True)
        )
        assert all(
            torch.equal(p.grad.nan_to_num(), b.nan_to_num()) for p, b in zip(net.parameters(), before, strict=True)
        )


@optimizers
def test_closure_groups_scheduler_and_lr_tensor(cls):
    net = model()
    optimizer = make(cls, parameter_groups(net), lr=1.0)
    extra = nn.Parameter(torch.ones(2))
    group = {"params": [("extra", extra)], "lr": 0.0}
    optimizer.add_param_group(group | {"kind": "vector"} if cls is Tiger else group)
    assert group == {"params": [("extra", extra)], "lr": 0.0}
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.arange(5)).square().mean() + extra.sum()
        loss.backward()
        return loss

    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loss = optimizer.step(closure)
    scheduler.step()
    assert calls == [True]
    assert loss.item() > 0
    assert torch.equal(extra, torch.ones(2))
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.0}
    first, second = model(), model()
    train(first, make(cls, parameter_groups(first), lr=0.05), 3)
    train(second, make(cls, parameter_groups(second), lr=torch.tensor(0.05, dtype=torch.float64)), 3)
    assert same(values(first), values(second))


@optimizers
def test_copies_go_on_alike(cls):
    net = model()
    optimizer = make(cls, parameter_groups(net), lr=0.02)
    train(net, optimizer, 3)
    twin = copy.deepcopy((net, optimizer))
    pickled = pickle.loads(pickle.dumps((net, optimizer)))
    train(net, optimizer, 3, start=3)
    for other_net, other_optimizer in (twin, pickled):
        train(other_net, other_optimizer, 3, start=3)
        assert same(values(net), values(other_net))


@optimizers
def test_grad_scaler_changes_nothing(cls):
    first, second = model(), model()
    train(first, make(cls, parameter_groups(first), lr=0.01), 6)
    optimizer = make(cls, parameter_groups(second), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for step in range(6):
        tokens = torch.randint(11, (9,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scaler.scale(second(tokens).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert same(values(first), values(second))


@optimizers
def test_low_precision_parameters_are_computed_in_float32(cls):
    for dtype in (torch.bfloat16, torch.float16):
        for foreach in (None, True, False):
            p = nn.Parameter(torch.linspace(-1, 1, 64).to(dtype))
            exact = nn.Parameter(p.detach().float())
            for param in (p, exact):
                param.grad = torch.linspace(1, -2, 64).to(dtype).to(param.dtype)
            make(cls, [p], lr=0.1, weight_decay=0.1, foreach=foreach).step()
            make(cls, [exact], lr=0.1, weight_decay=0.1, foreach=False).step()
            assert p.dtype == dtype
            torch.testing.assert_close(p.detach(), exact.detach().to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


POSITIONS = {"one": (0, 0), "all": slice(None)}


@optimizers
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [0, 15, 29])
@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_one_bad_gradient_does_no_lasting_harm(cls, bad, when, where, foreach):
    net = model()
    optimizer = make(cls, parameter_groups(net), lr=0.003, foreach=foreach)
    weight = net[1].weight
    for step in range(30):
        tokens = torch.randint(11, (9,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(tokens).square().mean().backward()
        if step == when:
            weight.grad[POSITIONS[where]] = bad
        optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(value.isfinite().all() for value in tensors(optimizer))
    assert optimizer.nonfinite_events == {"1.weight": 1}
    # The coordinate moves on.
    before = weight.detach().clone()
    train(net, optimizer, 1, start=40)
    assert (weight[0, 0] != before[0, 0]).item()
    clean = model()
    train(clean, make(cls, parameter_groups(clean), lr=0.003, foreach=foreach), 31)
    distance = max((a - b).abs().max().item() for a, b in zip(values(net), values(clean), strict=True))
    assert distance < 0.06


@optimizers
@pytest.mark.parametrize("foreach", [None, True, False])
def test_skip_raise_and_off(cls, foreach):
    def stepped(mode):
        net = model()
        optimizer = make(cls, parameter_groups(net), lr=0.1, nonfinite=mode, foreach=foreach)
        train(net, optimizer, 2)
        before = values(net), [{k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for p in net.parameters()]
        net.zero_grad()
        net(torch.arange(5)).sum().backward()
        net[1].bias.grad[1] = math.inf
        return net, optimizer, before

    net, optimizer, (params, momenta) = stepped("skip")
    optimizer.step()
    names = [name for name, _ in net.named_parameters()]
    changed = [not torch.equal(a, b) for a, b in zip(values(net), params, strict=True)]
    assert changed == [name != "1.bias" for name in names]
    index = names.index("1.bias")
    kept = optimizer.state[list(net.parameters())[index]]
    assert all(
        torch.equal(kept[key], value) for key, value in momenta[index].items() if isinstance(value, torch.Tensor)
    )
    assert torch.equal(list(net.parameters())[index], params[index])

    net, optimizer, (params, _) = stepped("raise")
    with pytest.raises(RuntimeError, match=r"nothing was changed.*parameters: 1\.bias"):
        optimizer.step()
    assert same(values(net), params)

    net, optimizer, _ = stepped("off")
    optimizer.step()
    assert optimizer.nonfinite_events == {}


@optimizers
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be in \[0, inf\), got -1.0"),
        ({"lr": "fast"}, TypeError, "lr must be a real number"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor with one element"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be in"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of"),
        ({"foreach": "yes"}, TypeError, "foreach must be a bool or None"),
        ({"maximize": 1}, TypeError, "maximize must be a bool"),
        ({"weigth_decay": 0.1}, TypeError, "weigth_decay"),
    ],
)
def test_bad_options(cls, options, error, match):
    if cls is ExponentiatedGradient and "weight_decay" in options:
        pytest.skip("it has no weight decay")
    match = match.replace("weight_decay", DECAY.get(cls, "weight_decay"))
    with pytest.raises(error, match=match):
        make(cls, [nn.Parameter(torch.ones(2))], **options)
    if "weigth_decay" not in options:
        optimizer = make(cls, [nn.Parameter(torch.ones(2))])
        with pytest.raises(error, match=match):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **own(cls, options)})


@optimizers
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("rate", [-0.1, math.nan])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_bad_rate_of_a_schedule_is_refused(cls, foreach, rate, kind):
    p = nn.Parameter(torch.ones(3))
    optimizer = make(cls, [p], lr=0.1, foreach=foreach)
    optimizer.param_groups[0]["lr"] = kind(rate)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"lr must be in \[0, inf\), got (-0\.1|nan)"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


@optimizers
def test_a_bad_rate_of_the_last_group_moves_none(cls):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = make(cls, [{"params": [p]}, {"params": [q]}], lr=0.1)
    for _ in range(2):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[-1]["lr"] = -0.1
    with pytest.raises(ValueError, match=r"lr must be in \[0, inf\), got -0\.1"):
        optimizer.step()
    assert torch.equal(p, before)


@optimizers
def test_legal_extremes_and_sparse(cls):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    make(cls, [p], lr=0).step()
    assert torch.equal(p, torch.ones(3))
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    if cls in (Lion, Tiger):  # their equality to the dense gradient is in test_lazy_rows.py
        make(cls, embedding.parameters()).step()
        return
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        make(cls, embedding.parameters()).step()


@optimizers
def test_unnamed_groups_of_a_trainer(cls):
    """Two groups without names and kinds, as transformers.Trainer makes them."""
    net = model()
    decay = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    if cls is Amos:
        with pytest.raises(ValueError, match=r"weight_decay must be 0 .* got 0\.1"):
            make(cls, groups)
        groups[0]["weight_decay"] = 0.0
    if cls in (Amos, Tiger):
        with pytest.warns(UserWarning, match="parameter_groups|amos_scales"):
            optimizer = cls(groups, lr=0.01)
    else:
        optimizer = make(cls, groups, lr=0.01)
    before = values(net)
    train(net, optimizer, 2)
    assert list(optimizer.state) == ([] if cls is ExponentiatedGradient else [*decay, *rest])
    assert not any(torch.equal(a, b) for a, b in zip(values(net), before, strict=True))
