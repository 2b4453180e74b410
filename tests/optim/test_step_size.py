"""Step sizes by exponentiated gradients: oracles, golden numbers, the inner optimizer bit for bit, checkpoints."""

import copy
import io
import math
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eg_oracle import EGSGDOracle, StepSizeOracle
from torch import nn

from danlu import kernels
from danlu.optim import EGSGD, EGStepSize, Lion, parameter_groups

SHAPES = [(5, 7), (3,), ()]
OPTIONS = [
    {},
    {"gain_lr": 0.3},
    {"scale_lr": 0.2},
    {"gain_lr": 0.0},
    {"scale_lr": 0.0},
    {"gain_lr": 0.5, "gain_range": (0.5, 3.0)},
    {"scale_lr": 0.5, "scale_range": (0.9, 1.1)},
    {"gain_lr": 0.2, "gain_range": (0.0, math.inf), "scale_range": (0.0, math.inf)},
    {"normalize_scale": False},
    {"sign_gain": False, "gain_lr": 0.05},
    {"scale_scope": "global", "scale_lr": 0.1},
    {"scale_scope": "global", "scale_lr": 0.1, "normalize_scale": False},
    {"per_coordinate": False},
    {"weight_decay": 0.3},
    {"maximize": True, "weight_decay": 0.3},
    {"maximize": True, "scale_lr": 0.2, "sign_gain": False},
    {"nonfinite": "off"},
    {"nonfinite": "raise"},
    {"lr": torch.tensor(0.02, dtype=torch.float64)},
]
INNER = [
    ("sgdm", {}),
    ("sgdm", {"momentum": 0.0}),
    ("sgdm", {"momentum": 0.5, "momentum_beta": 0.7}),
    ("adam", {}),
    ("adam", {"betas": (0.5, 0.9), "eps": 1e-3}),
]


def plain_options(options):
    return {key: float(value) if key == "lr" else value for key, value in options.items() if key != "nonfinite"}


def compare(make, options, inner, own, rtol=1e-11):
    random = np.random.default_rng(0)
    starts = [np.asarray(random.normal(size=shape)) for shape in SHAPES]
    params = [nn.Parameter(torch.from_numpy(np.array(start))) for start in starts]
    settings = {"lr": 0.01, **own, **options}
    optimizer = make(params, settings)
    oracle = StepSizeOracle(starts, inner, **plain_options(settings))
    for _ in range(50):
        grads = [np.asarray(random.normal(size=shape)) for shape in SHAPES]
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(np.array(grad))
        optimizer.step()
        oracle.step(grads)
    for i, param in enumerate(params):
        np.testing.assert_allclose(param.detach().numpy(), oracle.thetas[i], rtol=rtol, atol=1e-12)
        state = optimizer.state[param]
        if "log_gain" in state:
            np.testing.assert_allclose(state["log_gain"].exp().numpy(), oracle.nu[i], rtol=rtol)
        if "log_scale" in state:
            assert state["log_scale"].exp().item() == pytest.approx(oracle.s[i], rel=rtol)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("inner", "own"), INNER, ids=str)
def test_oracle_over_fifty_steps(options, inner, own):
    for foreach in (None, True, False):
        compare(lambda params, s: EGStepSize(inner, params, foreach=foreach, **s), options, inner, own)  # noqa: B023


# The decay of a wrapped optimizer is part of its displacement.
@pytest.mark.parametrize("options", [o for o in OPTIONS if "weight_decay" not in o] + [{"maximize": True}], ids=str)
def test_around_an_optimizer_equals_the_same_oracle(options):
    """Adam with its state beside the gains, and Adam as any other optimizer, follow one definition."""
    inner_names = ("lr", "maximize")

    def make(params, settings):
        inner = torch.optim.Adam(params, **{key: settings[key] for key in settings if key in inner_names})
        return EGStepSize(inner, **{key: settings[key] for key in settings if key not in inner_names})

    compare(make, options, "adam", {})


@pytest.mark.parametrize("foreach", [None, True, False])
def test_golden_values_of_the_article_form(foreach):
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = EGSGD([p], lr=0.05, gamma=0.1, foreach=foreach)
    for _ in range(4):
        p.grad = torch.tensor([2.0, 0.5], dtype=torch.float64) * p.data
        optimizer.step()
    expected = torch.tensor([0.481723296226, -1.778280736415], dtype=torch.float64)
    gains = torch.tensor([2.294127857727, 1.319324524983], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.state[p]["log_gain"].exp(), gains, rtol=0, atol=1e-12)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_golden_values_of_the_authors_form(foreach):
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = EGStepSize("sgdm", [p], lr=0.05, foreach=foreach)
    for _ in range(5):
        p.grad = torch.tensor([2.0, 0.5], dtype=torch.float64) * p.data
        optimizer.step()
    expected = torch.tensor([-0.040569311632, -1.371155585100], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
    gains = torch.full((2,), 1.040810774192, dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[p]["log_gain"].exp(), gains, rtol=0, atol=1e-12)
    assert list(optimizer.scales().values()) == [pytest.approx(1.003855588978, abs=1e-12)]


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.3}, {"gamma": 0.0}, {"weight_decay": 0.2, "maximize": True}, {"gamma": 50.0}], ids=str
)
@pytest.mark.parametrize("foreach", [None, False])
def test_article_form_equals_its_oracle(options, foreach):
    random = np.random.default_rng(1)
    start = random.normal(size=(4, 3))
    p = nn.Parameter(torch.from_numpy(start.copy()))
    settings = {"lr": 1e-3, "gamma": 0.01, **options}
    optimizer, oracle = EGSGD([p], foreach=foreach, **settings), EGSGDOracle(start, **settings)
    for _ in range(50 if settings["gamma"] < 1 else 3):
        grad = random.normal(size=(4, 3))
        p.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        oracle.step(grad)
    np.testing.assert_allclose(p.detach().numpy(), oracle.theta, rtol=1e-11, atol=1e-13)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(9, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


OFF = {"gain_lr": 0.0, "scale_lr": 0.0}
WRAPPED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "lion": lambda p: Lion(p, lr=0.01),
}


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_rates_it_is_the_inner_optimizer_bit_for_bit(foreach, decay):
    pairs = [
        (
            lambda p: EGStepSize("adam", p, lr=0.01, weight_decay=decay, foreach=foreach, **OFF),
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=decay),
        )
    ]
    if decay == 0:
        pairs += [
            (
                lambda p: EGStepSize("sgdm", p, lr=0.05, foreach=foreach, **OFF),
                lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            ),
            (
                lambda p: EGSGD(p, lr=0.05, gamma=0.0, foreach=foreach),
                lambda p: torch.optim.SGD(p, lr=0.05),
            ),
        ]
    for mine, theirs in pairs:
        first, second = net(), net()
        train(first, mine(first.parameters()), 20)
        train(second, theirs(second.parameters()), 20)
        assert equal(first, second)


@pytest.mark.parametrize("name", WRAPPED)
def test_without_rates_a_wrapped_optimizer_is_left_alone(name):
    first, second = net(), net()
    optimizer = EGStepSize(WRAPPED[name](first.parameters()), **OFF)
    train(first, optimizer, 20)
    train(second, WRAPPED[name](second.parameters()), 20)
    assert equal(first, second)
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_state_is_one_state_dict_and_resumes_exactly(name):
    first = net()
    optimizer = EGStepSize(WRAPPED[name](first.parameters()))
    train(first, optimizer, 5)
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert any(key.startswith("inner.") for key in saved["optimizer"]["state"][0])
    second = net()
    second.load_state_dict(saved["model"])
    resumed = EGStepSize(WRAPPED[name](second.parameters()))
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups is resumed.inner.param_groups
    before = copy.deepcopy(saved["optimizer"]["state"])
    train(first, optimizer, 5, start=5)
    train(second, resumed, 5, start=5)
    assert equal(first, second)
    for key, entries in before.items():
        for entry, value in entries.items():
            assert torch.equal(torch.as_tensor(saved["optimizer"]["state"][key][entry]), torch.as_tensor(value)), entry


def test_wrapped_copies_schedulers_and_groups():
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = EGStepSize(inner)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 2)
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.05
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.3, "gain_lr": 0.5})
    assert inner.param_groups[1]["lr"] == 0.3
    assert inner.param_groups[1]["momentum"] == 0
    assert optimizer.param_groups[1]["scale_lr"] == 0.001
    for twin_model, twin in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert twin.param_groups is twin.inner.param_groups
        train(twin_model, twin, 3, start=3)
        reference = copy.deepcopy((model, optimizer))
        train(*reference, 3, start=3)
        assert equal(reference[0], twin_model)


def test_wrapped_skips_bad_gradients_and_gives_them_back():
    model = net()
    optimizer = EGStepSize(torch.optim.Adam(model.named_parameters(), lr=0.1))
    train(model, optimizer, 2)
    bias = model[3].bias
    before = bias.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"][5])
    model(torch.ones(2, 6)).sum().backward()
    bias.grad[1] = math.nan
    held = bias.grad
    other = model[3].weight.detach().clone()
    optimizer.step()
    assert bias.grad is held
    assert torch.equal(bias, before[0])
    for key, value in optimizer.state_dict()["state"][5].items():
        assert torch.equal(value, before[1][key]), key
    assert not torch.equal(model[3].weight, other)
    assert optimizer.nonfinite_events == {"3.bias": 1}
    strict = EGStepSize(torch.optim.Adam(model.named_parameters(), lr=0.1), nonfinite="raise")
    with pytest.raises(RuntimeError, match=r"nothing was changed.*3\.bias"):
        strict.step()


@pytest.mark.parametrize("inner", ["sgdm", "adam"])
def test_gains_and_scales_stay_in_their_ranges(inner):
    """A constant direction drives both up, an alternating one both down, for longer than the ranges allow."""
    for sign, gain, scale in ((1, 3.0, 2.0), (-1, 0.25, 0.5)):
        p = nn.Parameter(torch.zeros(3))
        optimizer = EGStepSize(
            inner,
            [p],
            lr=1e-3,
            gain_lr=0.2,
            scale_lr=0.2,
            gain_range=(0.25, 3.0),
            scale_range=(0.5, 2.0),
            **({"momentum": 0.0, "momentum_beta": 0.0} if inner == "sgdm" else {"betas": (0.0, 0.9)}),
        )
        for step in range(60):
            p.grad = torch.full((3,), float(sign**step))
            optimizer.step()
            gains = optimizer.state[p]["log_gain"].exp()
            assert ((gains > 0.249999) & (gains < 3.00001)).all()
        torch.testing.assert_close(gains, torch.full((3,), gain))
        assert list(optimizer.scales().values()) == [pytest.approx(scale, rel=1e-6)]


def test_unbounded_gains_stop_before_they_overflow():
    p = nn.Parameter(torch.zeros(2))
    optimizer = EGSGD([p], lr=0.0, gamma=1e6)
    for _ in range(4):
        p.grad = torch.tensor([1e10, -1e10])
        optimizer.step()
    assert torch.equal(optimizer.state[p]["log_gain"], torch.full((2,), 80.0))


def test_inner_products_that_overflow_leave_the_scale_alone():
    for foreach in (None, True, False):
        p = nn.Parameter(torch.ones(3))
        optimizer = EGStepSize("sgdm", [p], lr=0.0, foreach=foreach)
        for _ in range(3):
            p.grad = torch.full((3,), 1e30)
            optimizer.step()
        assert optimizer.scales() == {"param_groups[0]['params'][0]": 1.0}
        assert optimizer.nonfinite_events == {}


def test_global_scale_is_one_number_also_for_late_tensors():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = EGStepSize("sgdm", [("a", a)], lr=0.1, scale_lr=0.1, scale_scope="global")
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": [("b", b)]})
        for p in (a, b):
            p.grad = p.detach().clone()
        optimizer.step()
    scales = optimizer.scales()
    assert scales["a"] == scales["b"] > 1.2


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("hole", [None, math.nan])
def test_global_scale_is_one_number_also_for_tensors_without_a_good_gradient(hole, foreach, wrapped):
    tensors = [
        ("a", nn.Parameter(torch.ones(3))),
        ("b", nn.Parameter(torch.ones(2))),
        ("c", nn.Parameter(torch.ones(2))),
    ]
    options = {"scale_lr": 0.1, "scale_scope": "global"}
    if wrapped:
        optimizer = EGStepSize(torch.optim.SGD(tensors, lr=0.1, foreach=foreach), **options)
    else:
        optimizer = EGStepSize("sgdm", tensors, lr=0.1, foreach=foreach, **options)
    before = 1.0
    for step in range(6):
        for i, (_, p) in enumerate(tensors):
            p.grad = torch.ones_like(p)
            if step % 3 == i:
                p.grad = None if hole is None else p.grad * hole
        optimizer.step()
        scales = optimizer.scales()
        assert len(set(scales.values())) == 1
        assert next(iter(scales.values())) > before or step == 0
        before = next(iter(scales.values()))


def test_fused_and_a_global_scale_over_two_dtypes():
    tensors = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    for p in tensors:
        p.grad = torch.ones_like(p)
    if kernels.explain("step_size", tensors[0]) is not None:
        pytest.skip("no compiler")
    with pytest.raises(RuntimeError, match="fused=True, but the kernel moves one scale for all tensors only if"):
        EGStepSize("sgdm", tensors, scale_scope="global", fused=True).step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in tensors)
    EGStepSize("sgdm", tensors[:1], scale_scope="global", fused=True).step()


def test_gain_histograms():
    p = nn.Parameter(torch.zeros(10))
    optimizer = EGStepSize("sgdm", [("w", p)], lr=0.01, gain_lr=math.log(10))
    for _ in range(2):
        p.grad = torch.ones(10)
        p.grad[:3] = 0.0
        optimizer.step()
    counts, edges = optimizer.gain_histograms(bins=4)["w"]
    assert counts.tolist() == [3, 0, 0, 7]
    torch.testing.assert_close(edges, torch.linspace(0, 1, 5))
    with pytest.raises(ValueError, match="bins must be at least 1"):
        optimizer.gain_histograms(bins=0)


@pytest.mark.parametrize("inner", ["sgdm", "adam", "wrapped"])
def test_state_of_half_precision_is_float32_and_round_trips(inner):
    def make(p):
        return EGStepSize(torch.optim.SGD([p], lr=0.1, momentum=0.9) if inner == "wrapped" else inner, **(
            {} if inner == "wrapped" else {"params": [p], "lr": 0.1}
        ))  # fmt: skip

    p = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.bfloat16))
    optimizer = make(p)
    for _ in range(3):
        p.grad = p.detach().clone()
        optimizer.step()
    other = nn.Parameter(p.detach().clone())
    resumed = make(other)
    resumed.load_state_dict(optimizer.state_dict())
    for name, value in optimizer.state[p].items():
        assert value.dtype == torch.float32
        assert torch.equal(resumed.state[other][name], value)
    for q, one in ((p, optimizer), (other, resumed)):
        q.grad = torch.ones_like(q)
        one.step()
    assert torch.equal(p, other)


def test_memory_of_the_modes():
    def floats(**options):
        p = nn.Parameter(torch.zeros(100))
        optimizer = EGStepSize(options.pop("inner"), [p], **options)
        p.grad = torch.ones(100)
        optimizer.step()
        return sum(value.numel() // 100 for value in optimizer.state[p].values())

    assert floats(inner="sgdm") == 3
    assert floats(inner="sgdm", per_coordinate=False) == 1
    assert floats(inner="adam") == 3
    assert floats(inner="adam", per_coordinate=False) == 2
    assert floats(inner="sgdm", gain_lr=0.0, scale_lr=0.0) == 1


@pytest.mark.parametrize("foreach", [None, True, False])
def test_every_path_is_right_beyond_one_block(foreach):
    start = torch.randn(2**18 + 3, 2).t()
    grads = [torch.randn_like(start) for _ in range(3)]
    found = []
    for dtype in (torch.float32, torch.float64):
        p = nn.Parameter(start.to(dtype, copy=True))
        optimizer = EGStepSize("sgdm", [p], lr=0.1, foreach=foreach)
        for grad in grads:
            p.grad = grad.to(dtype)
            optimizer.step()
        found.append((p.detach().double(), optimizer.scales().popitem()[1]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def wrapped():
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)


BAD = [
    ({"inner": "sgd"}, ValueError, "inner must be one of 'sgdm', 'adam'"),
    ({"lr": -1.0}, ValueError, r"lr must be in \[0, inf\)"),
    ({"gain_lr": -0.1}, ValueError, r"gain_lr must be in \[0, inf\)"),
    ({"gain_lr": "fast"}, TypeError, "gain_lr must be a real number"),
    ({"scale_lr": -0.1}, ValueError, r"scale_lr must be in \[0, inf\)"),
    ({"scale_lr": math.nan}, ValueError, r"scale_lr must be in \[0, inf\)"),
    ({"gain_range": (1.1, 2.0)}, ValueError, r"gain_range\[0\] must be in \[0, 1\]"),
    ({"gain_range": (0.1, 0.9)}, ValueError, r"gain_range\[1\] must be in \[1, inf\)"),
    ({"gain_range": (0.1,)}, ValueError, "gain_range must be a pair of numbers"),
    ({"gain_range": 3.0}, ValueError, "gain_range must be a pair of numbers"),
    ({"scale_range": (-0.1, 2.0)}, ValueError, r"scale_range\[0\] must be in \[0, 1\]"),
    ({"scale_range": (0.1, math.nan)}, ValueError, r"scale_range\[1\] must be in \[1, inf\)"),
    ({"scale_range": "ab"}, ValueError, "scale_range must be a pair of numbers"),
    ({"scale_scope": "group"}, ValueError, "scale_scope must be one of 'tensor', 'global'"),
    ({"normalize_scale": 1}, TypeError, "normalize_scale must be a bool"),
    ({"sign_gain": None}, TypeError, "sign_gain must be a bool"),
    ({"per_coordinate": "no"}, TypeError, "per_coordinate must be a bool"),
    ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
    ({"momentum_beta": -0.1}, ValueError, r"momentum_beta must be in \[0, 1\)"),
    ({"weight_decay": -0.1}, ValueError, r"weight_decay must be in \[0, inf\)"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of"),
    ({"fused": "yes"}, TypeError, "fused must be a bool or None"),
    ({"fused": True, "foreach": True}, ValueError, "foreach and fused cannot both be True"),
    ({"inner": "adam", "fused": True}, ValueError, "fused=True is for inner='sgdm'"),
    ({"inner": wrapped(), "params": None, "fused": True}, ValueError, "fused belongs to the inner optimizer"),
    ({"betas": (0.9, 0.99)}, ValueError, "betas has no meaning with inner='sgdm'"),
    ({"eps": 1e-8}, ValueError, "eps has no meaning with inner='sgdm'"),
    ({"inner": "adam", "betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\)"),
    ({"inner": "adam", "betas": 0.9}, ValueError, "betas must be a pair of numbers"),
    ({"inner": "adam", "eps": -1.0}, ValueError, r"eps must be in \[0, inf\)"),
    ({"inner": "adam", "momentum": 0.9}, ValueError, "momentum has no meaning with inner='adam'"),
    ({"inner": "adam", "momentum_beta": 0.9}, ValueError, "momentum_beta has no meaning with inner='adam'"),
    ({"params": None}, TypeError, "inner='sgdm' needs params"),
    ({"inner": wrapped(), "params": None, "lr": 0.1}, ValueError, "lr belongs to the inner optimizer"),
    ({"inner": wrapped()}, ValueError, "params belongs to the inner optimizer"),
    ({"inner": wrapped(), "params": None, "maximize": True}, ValueError, "maximize belongs to the inner optimizer"),
    ({"inner": wrapped(), "params": None, "gain_lr": -1.0}, ValueError, "gain_lr must be in"),
    (
        {"inner": torch.optim.LBFGS([nn.Parameter(torch.ones(2))]), "params": None},
        ValueError,
        "inner must take a step without a closure",
    ),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        EGStepSize(**{"inner": "sgdm", "params": [nn.Parameter(torch.ones(2))], **options})


@pytest.mark.parametrize(
    "options", [{"gain_lr": -1.0}, {"scale_range": (2.0, 3.0)}, {"momentum": 1.0}, {"sign_gain": 0}, {"lr": -1.0}]
)
def test_bad_options_of_a_group(options):
    optimizer = EGStepSize("sgdm", [nn.Parameter(torch.ones(2))])
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{"gamma": -0.1}, {"lr": -1.0}, {"gamma": math.inf}, {"weight_decay": -1.0}])
def test_bad_options_of_the_article_form(options):
    match = next(iter(options))
    with pytest.raises(ValueError, match=match):
        EGSGD([nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(ValueError, match=match):
        EGSGD([nn.Parameter(torch.ones(2))]).add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})


@pytest.mark.parametrize("make", [EGSGD, lambda p: EGStepSize("adam", p)])
def test_complex_parameters_are_refused(make):
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = make([p])
    p.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="does not support complex parameters"):
        optimizer.step()


def test_sharded_tensors_equal_whole_ones():
    """Two processes: inner products, norms and the look for bad gradients are over all shards."""
    script = Path(__file__).with_name("eg_sharded_script.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "sharded equals whole"


def test_groups_of_parameter_groups_and_names():
    model = net()
    optimizer = EGStepSize("adam", parameter_groups(model, weight_decay=0.1))
    train(model, optimizer, 2)
    assert set(optimizer.scales()) == {name for name, _ in model.named_parameters()}
