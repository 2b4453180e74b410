"""The derived strategies: the numbers of the derivation, the wrapper of any update rule, bad input."""

import copy
import functools
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from danlu.optim import (
    Amos,
    ExponentiatedGradient,
    FoldedAdamW,
    Lion,
    Tiger,
    UpdateNormalized,
    amos_strategy,
)

F64 = torch.float64


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def train(net, optimizer, first, last, scheduler=None):
    for step in range(first, last):
        tokens = torch.randint(11, (9,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(tokens).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def values(net):
    return [p.detach().clone() for p in net.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_numbers_of_the_derivation():
    layer = nn.Linear(768, 768, bias=False)
    optimizer, _ = amos_strategy(layer, Lion, alpha0=1.11e-3, half_life=1000, sigma=768**-0.5)
    group = optimizer.param_groups[0]
    assert group["sigma"] == pytest.approx(0.03608, abs=5e-6)
    assert group["lr"] == pytest.approx(4.005e-5, rel=2e-4)
    assert group["weight_decay"] == pytest.approx(0.01538, rel=3e-4)


@pytest.mark.parametrize("cls", [Lion, Tiger])
@pytest.mark.parametrize("decay", ["inverse_time", "inverse_square"])
def test_sign_optimizers_take_the_derived_step_exactly(cls, decay):
    """theta - lr (sign + lambda theta) with lr = alpha0 sigma D and lambda = alpha0 / (2 q sigma)."""
    net = model().double()
    alpha0, q, sigma, half = 0.01, 0.7, 0.2, 4
    optimizer, scheduler = amos_strategy(net, cls, alpha0=alpha0, half_life=half, decay=decay, q=q, sigma=sigma)
    for step in range(9):
        net.zero_grad()
        before = values(net)
        net(torch.arange(11)).square().mean().backward()
        # Before the first step there is no momentum: its sign is that of the gradient.
        factor = 1 / (1 + step / half) if decay == "inverse_time" else (1 + (2**0.5 - 1) * step / half) ** -2
        optimizer.step()
        scheduler.step()
        for p, theta in zip(net.parameters(), before, strict=True):
            signs = -(p.detach() - theta) / (alpha0 * sigma * factor) - alpha0 / (2 * q * sigma) * theta
            if step == 0:
                torch.testing.assert_close(signs, p.grad.sign(), rtol=0, atol=1e-9)
            torch.testing.assert_close(signs.abs().round(), signs.abs(), rtol=0, atol=1e-9)


def test_sigma_of_a_fresh_model():
    net = nn.ModuleDict({"linear": nn.Linear(300, 200), "norm": nn.LayerNorm(7), "embedding": nn.Embedding(500, 40)})
    optimizer, _ = amos_strategy(net, Lion, alpha0=0.01, half_life=10)
    found = {name: g for g in optimizer.param_groups for name in g["param_names"]}
    assert found["linear.weight"]["sigma"] == pytest.approx(300**-0.5 / 3**0.5, rel=0.02)
    assert found["embedding.weight"]["sigma"] == pytest.approx(1, rel=0.02)
    assert found["linear.bias"]["sigma"] == found["norm.weight"]["sigma"] == found["norm.bias"]["sigma"] == 0.5
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.01 * group["sigma"])
        assert group["weight_decay"] == pytest.approx(0.01 / (2 * group["sigma"]))
    # Layers of one shape differ in the fourth digit and share a group.
    wide = nn.Sequential(*[nn.Linear(512, 512) for _ in range(6)])
    optimizer, _ = amos_strategy(wide, Lion, half_life=10)
    assert len(optimizer.param_groups) <= 3


def test_sigma_of_a_trained_model():
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with torch.no_grad():
        net[0].weight.fill_(0.25)
        net[0].bias.copy_(torch.tensor([3.0, 0.0, -4.0]))
        net[1].weight.fill_(2.0)
    optimizer, _ = amos_strategy(net, Lion, half_life=10, sigma="rms")
    found = {name: g["sigma"] for g in optimizer.param_groups for name in g["param_names"]}
    assert found == {"0.weight": 0.25, "0.bias": 2.89, "1.weight": 2.0, "1.bias": 0.5}


@pytest.mark.parametrize("sigma", ["init", "rms"])
def test_zero_tensors_fall_back_with_a_warning(sigma):
    net = nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 2))
    nn.init.zeros_(net[0].weight)
    with pytest.warns(UserWarning, match=r"zero tensors is taken as 1/sqrt\(fan_in\): 0\.weight$"):
        optimizer, _ = amos_strategy(net, Lion, half_life=10, sigma=sigma)
    assert {n: g["sigma"] for g in optimizer.param_groups for n in g["param_names"]}["0.weight"] == 0.25


def test_sigma_as_a_function_of_name_and_tensor():
    seen = []

    def sigma(name, param):
        seen.append((name, tuple(param.shape)))
        return 0.123456

    optimizer, _ = amos_strategy(nn.Linear(4, 3), Lion, half_life=10, sigma=sigma)
    assert sorted(seen) == [("bias", (3,)), ("weight", (3, 4))]
    assert {g["sigma"] for g in optimizer.param_groups} == {0.123456}


@pytest.mark.parametrize(
    "inner",
    [
        torch.optim.SGD,
        functools.partial(torch.optim.SGD, momentum=0.9),
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        functools.partial(torch.optim.Adam, foreach=True),
    ],
)
def test_any_update_rule_gets_the_derived_size(inner):
    net = model().double()
    optimizer, scheduler = amos_strategy(net, inner, alpha0=0.05, half_life=3, sigma=0.2, q=2.0)
    assert isinstance(optimizer, UpdateNormalized)
    for step in range(5):
        before = values(net)
        train(net, optimizer, step, step + 1, scheduler)
        factor = 1 / (1 + step / 3)
        for p, theta in zip(net.parameters(), before, strict=True):
            change = (p.detach() - theta) / (0.05 * 0.2 * factor) + 0.05 / (2 * 2.0 * 0.2) * theta
            assert change.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-9)


def test_direction_is_that_of_the_inner_optimizer():
    p, twin = (nn.Parameter(torch.linspace(-1, 2, 12, dtype=F64).view(3, 4)) for _ in range(2))
    optimizer = UpdateNormalized(torch.optim.Adam([p], lr=0.3), 0.01, 1.0)
    plain = torch.optim.Adam([twin], lr=0.3)
    for step in range(4):
        p.grad = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(step))
        twin.grad = p.grad.clone()
        before, start = p.detach().clone(), twin.detach().clone()
        optimizer.step()
        plain.step()
        u = start - twin.detach()
        expected = before - 0.01 * (u / u.square().mean().sqrt() + 0.01 / 2 * before)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)


def test_wrapped_lion_is_lion():
    net, twin = model(), model()
    wrapped = UpdateNormalized(Lion(net.named_parameters(), lr=1.0), 0.01, 0.5)
    plain = Lion(twin.named_parameters(), lr=0.01 * 0.5, weight_decay=0.01 / (2 * 0.5))
    # A token that does not occur has the sign 0, which the RMS counts.
    for step in range(4):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        wrapped.step()
        plain.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
def test_size_of_the_proposal_is_of_no_account(factor):
    moved = []
    for scale in (1.0, factor):
        p = nn.Parameter(torch.ones(50))
        p.grad = torch.linspace(-1, 1, 50) * scale
        UpdateNormalized(torch.optim.SGD([p], lr=1.0), 0.1, 1.0).step()
        moved.append(p.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-6)


def test_low_precision_parameters_move_although_the_proposal_is_tiny():
    for dtype in (torch.bfloat16, torch.float16):
        p = nn.Parameter(torch.ones(4, 4).to(dtype))
        p.grad = torch.full((4, 4), 1e-3).to(dtype)
        UpdateNormalized(torch.optim.SGD([p], lr=1.0), 0.1, 1.0).step()
        torch.testing.assert_close(p.detach().float(), torch.full((4, 4), 0.895), rtol=0.01, atol=0)


def test_tensors_without_a_proposal_stay():
    a, b, c, d = (nn.Parameter(torch.ones(3)) for _ in range(4))
    empty = nn.Parameter(torch.ones(0))
    optimizer = UpdateNormalized(torch.optim.SGD([a, b, c, d, empty], lr=1.0), 0.1, 1.0)
    a.grad, b.grad, empty.grad = torch.ones(3), torch.zeros(3), torch.ones(0)
    d.grad = torch.tensor([1.0, math.nan, 1.0])
    kept = d.grad
    optimizer.step()
    assert not torch.equal(a, torch.ones(3))
    assert all(torch.equal(p, torch.ones(3)) for p in (b, c, d))
    assert d.grad is kept


@pytest.mark.parametrize("inner", [torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_gradient_does_no_lasting_harm(inner, bad):
    net = model()
    optimizer, _ = amos_strategy(net, inner, alpha0=0.01, half_life=100)
    train(net, optimizer, 0, 3)
    net(torch.arange(11)).square().mean().backward()
    net[1].weight.grad[0, 0] = bad
    before = net[1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[1].weight, before)
    assert optimizer.nonfinite_events == {"1.weight": 1}
    train(net, optimizer, 3, 5)
    assert all(p.isfinite().all() for p in net.parameters())
    assert not torch.equal(net[1].weight, before)
    strict = UpdateNormalized(inner(net.named_parameters(), lr=1.0), nonfinite="raise")
    net[1].bias.grad[0] = bad
    before = values(net)
    with pytest.raises(RuntimeError, match=r"nothing was changed.*1\.bias"):
        strict.step()
    assert same(values(net), before)


@pytest.mark.parametrize(
    "inner", [torch.optim.Adam, Lion, functools.partial(FoldedAdamW, weight_decay=0.0, grad_accum_steps=3)]
)
def test_resume_copies_and_schedule(inner):
    def build():
        net = model()
        return net, UpdateNormalized(inner(net.named_parameters(), lr=1.0), 0.01)

    net, optimizer = build()
    train(net, optimizer, 0, 5)
    buffer = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other, resumed = build()
    train(other, resumed, 0, 1)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    others = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer))), (other, resumed)]
    train(net, optimizer, 5, 10)
    for twin, twin_optimizer in others:
        train(twin, twin_optimizer, 5, 10)
        assert same(values(net), values(twin))
        assert twin_optimizer.inner.state is twin_optimizer.state


@pytest.mark.parametrize(("before", "after"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_checkpoint_of_another_dtype_goes_on(before, after):
    found = []
    for dtypes in ((before, after), (after, after)):
        p = nn.Parameter(torch.linspace(1, 2, 8, dtype=after).to(dtypes[0]))
        state = None
        for dtype in dtypes:
            p = nn.Parameter(p.detach().to(dtype))
            optimizer = UpdateNormalized(torch.optim.Adam([p], lr=1.0), 0.01, 1.0)
            if state is not None:
                optimizer.load_state_dict(state)
                held = optimizer.state[p]["exp_avg"]
                saved = state["state"][0]["exp_avg"]
                assert held.data_ptr() != saved.data_ptr()
            p.grad = torch.linspace(1, 3, 8).to(dtype)
            optimizer.step()
            state = optimizer.state_dict()
        found.append(p.detach().double())
    torch.testing.assert_close(*found, rtol=0, atol=4 * torch.finfo(after).eps)


def test_closure_groups_and_scaler():
    net = model()
    optimizer = UpdateNormalized(torch.optim.Adam(net.named_parameters(), lr=1.0), 0.01, 0.5)
    extra = nn.Parameter(torch.ones(3))
    given = {"params": [("extra", extra)]}
    optimizer.add_param_group(given)
    assert list(given) == ["params"]
    assert optimizer.param_groups[-1]["param_names"] == ["extra"]
    calls = []

    def closure():
        calls.append([torch.is_grad_enabled(), float(extra[0].detach())])
        optimizer.zero_grad()
        loss = net(torch.arange(5)).square().mean() + extra.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [[True, 1.0]]
    torch.testing.assert_close(extra.detach(), torch.full((3,), 1 - 0.005 * (1 + 0.01)))
    first, second = model(), model()
    train(first, UpdateNormalized(torch.optim.Adam(first.parameters(), lr=1.0), 0.01), 0, 4)
    scaled = UpdateNormalized(torch.optim.Adam(second.parameters(), lr=1.0), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for step in range(4):
        tokens = torch.randint(11, (9,), generator=torch.Generator().manual_seed(step))
        scaled.zero_grad()
        scaler.scale(second(tokens).square().mean()).backward()
        scaler.step(scaled)
        scaler.update()
    assert same(values(first), values(second))


@pytest.mark.parametrize("rate", [-0.1, torch.tensor(-0.1), torch.tensor(math.nan)])
def test_a_bad_rate_of_a_schedule_is_refused(rate):
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = UpdateNormalized(torch.optim.SGD([{"params": [p]}, {"params": [q], "momentum": 0.5}], lr=1.0))
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    optimizer.param_groups[-1]["lr"] = rate
    with pytest.raises(ValueError, match=r"lr must be in"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))
    assert torch.equal(q, torch.ones(2))


def test_parameters_are_restored_when_the_inner_step_fails():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("no more")

    net = model()
    optimizer = UpdateNormalized(Failing(net.parameters(), lr=1.0), 0.01)
    net(torch.arange(5)).sum().backward()
    before = values(net)
    with pytest.raises(RuntimeError, match="no more"):
        optimizer.step()
    assert same(values(net), before)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alpha0": 0.0}, ValueError, r"alpha0 must be in \(0, inf\)"),
        ({"alpha0": -1e-3}, ValueError, "alpha0 must be in"),
        ({"q": 0.0}, ValueError, "q must be in"),
        ({"half_life": 0}, ValueError, "half_life must be in"),
        ({"half_life": math.inf}, ValueError, "half_life must be in"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0"),
        ({"decay": "cosine"}, ValueError, "decay must be one of 'inverse_time', 'inverse_square'"),
        ({"sigma": "std"}, ValueError, "sigma must be one of 'init', 'rms'"),
        ({"sigma": 0.0}, ValueError, "sigma must be in"),
        ({"sigma": lambda name, param: 0.0}, ValueError, "sigma of weight must be in"),
        ({"sigma": lambda name, param: math.nan}, ValueError, "sigma of weight must be in"),
        ({"optimizer_cls": Amos}, ValueError, "optimizer_cls must not be Amos"),
        ({"optimizer_cls": "lion"}, TypeError, "optimizer_cls must be a class"),
        ({"sigma": None}, TypeError, "sigma must be a real number"),
        ({"alpha0": "1e-3"}, TypeError, "alpha0 must be a real number"),
        ({"model": [1]}, TypeError, r"model must be a torch\.nn\.Module"),
    ],
)
def test_bad_strategy(options, error, match):
    arguments = {"model": nn.Linear(3, 2, bias=False), "optimizer_cls": Lion, "half_life": 10} | options
    with pytest.raises(error, match=match):
        amos_strategy(arguments.pop("model"), arguments.pop("optimizer_cls"), **arguments)


def test_values_that_cannot_be_measured():
    layer = nn.Linear(3, 2)
    layer.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="sigma of weight cannot be measured"):
        amos_strategy(layer, Lion, half_life=10)


P = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("inner", "options", "error", "match"),
    [
        (torch.optim.AdamW([P]), {}, ValueError, "weight_decay of inner must be 0"),
        (torch.optim.SGD([P], lr=0.0), {}, ValueError, "lr of inner must not be 0"),
        (torch.optim.LBFGS([P]), {}, ValueError, "LBFGS calls the closure itself"),
        (torch.optim.SGD([P], lr=1.0), {"nonfinite": "ignore"}, ValueError, "nonfinite must be one of"),
        (torch.optim.SGD([P], lr=1.0), {"alpha0": -1.0}, ValueError, "alpha0 must be in"),
        (torch.optim.SGD([P], lr=1.0), {"q": -1.0}, ValueError, "q must be in"),
        ([P], {}, TypeError, r"inner must be a torch\.optim\.Optimizer, got list"),
    ],
)
def test_bad_wrapping(inner, options, error, match):
    with pytest.raises(error, match=match):
        UpdateNormalized(inner, **options)


@pytest.mark.parametrize("cls", [Amos, ExponentiatedGradient, Tiger])
def test_optimizers_that_read_the_parameters_are_refused(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = cls([P], lr=1.0)
    with pytest.raises(ValueError, match=f"{cls.__name__} reads the parameters"):
        UpdateNormalized(inner)
    optimizer = UpdateNormalized(torch.optim.SGD([P], lr=1.0))
    with pytest.raises(ValueError, match="weight_decay of inner must be 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.1})


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        UpdateNormalized(torch.optim.SGD(embedding.parameters(), lr=1.0)).step()
