"""Every optimizer, path, dtype and option against a slow float64 oracle over 50 steps; every bad input by its name."""

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from amos_oracle import AmosOracle
from eg_oracle import EGSGDOracle, StepSizeOracle, eg_oracle
from oracles import TigerOracle, lion_oracle
from torch import nn

import danlu.optim
from danlu.optim import (
    EGSGD,
    Amos,
    EGStepSize,
    ExponentiatedGradient,
    FoldedAdamW,
    Lion,
    Rounding,
    Tiger,
    lion,
    parameter_groups,
    piecewise_linear,
    tiger,
)

STEPS = 50
SHAPES = {"matrix": (5, 7), "embedding": (6, 4), "vector": (3,)}
PATHS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIONS = ["plain", "weight_decay", "maximize", "tensor_lr", "groups"]
# Of 50 steps of float32, and of what Kahan's compensation in bfloat16 keeps.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-4}


class LionOracle:
    """One tensor under Lion."""

    def __init__(self, theta, kind, **options):
        self.theta, self.m, self.options = theta, np.zeros_like(theta), options

    def step(self, g):
        self.theta, self.m = lion_oracle(self.theta, self.m, g, **self.options)


class TigerStepOracle(TigerOracle):
    def step(self, g):
        self.micro_step(g)


class StepSizeOne:
    """One tensor under EGStepSize."""

    def __init__(self, theta, kind, *, inner, **options):
        self.oracle = StepSizeOracle([theta], inner, **options)

    @property
    def theta(self):
        return self.oracle.thetas[0]

    def step(self, g):
        self.oracle.step([g])


class ExponentiatedOne:
    """One tensor under ExponentiatedGradient."""

    def __init__(self, theta, kind, **options):
        self.theta, self.options = theta, options

    def step(self, g):
        self.theta = eg_oracle(self.theta, g, **self.options)


class AdamWOne:
    """AdamW: with one micro-step per cycle the folded one is this."""

    def __init__(self, theta, kind, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False):
        self.theta, self.m, self.v, self.t = theta, np.zeros_like(theta), np.zeros_like(theta), 0
        self.lr, self.betas, self.eps, self.wd, self.sign = lr, betas, eps, weight_decay, -1 if maximize else 1

    def step(self, g):
        self.t += 1
        b1, b2 = self.betas
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        size = np.sqrt(self.v / (1 - b2**self.t)) + self.eps
        self.theta = (1 - self.lr * self.wd) * self.theta - self.sign * self.lr * self.m / (1 - b1**self.t) / size


@dataclass(frozen=True)
class Entry:
    """One optimizer: how it is made from groups, its oracle, and what differs from the others.

    Args:
        make: groups and options -> optimizer.
        oracle: parameter in float64, kind, options -> oracle.
        base: options of all groups.
        second: options of one group in the case "groups".
        low: options for bfloat16 parameters; without Kahan's compensation they are rounded to nearest.
        low_fused: the same for the compiled step, where it cannot do what `low` says; None: `low`.
        decay: name of the option that decays parameters; empty if there is none.
        fused: whether there is a compiled step.
        kinds: whether the groups carry their kind.
    """

    make: Callable[..., torch.optim.Optimizer]
    oracle: Callable[..., Any]
    base: dict[str, Any]
    second: dict[str, Any]
    low: dict[str, Any] = field(default_factory=dict)
    low_fused: dict[str, Any] | None = None
    decay: str = "weight_decay"
    fused: bool = True
    kinds: bool = False


KAHAN = {"rounding": "kahan", "state_dtype": torch.float32}
OPTIMIZERS = {
    "Lion": Entry(Lion, LionOracle, {"lr": 0.01}, {"lr": 0.003, "betas": (0.8, 0.95)}, KAHAN),
    "Tiger": Entry(Tiger, TigerStepOracle, {"lr": 0.01}, {"lr": 0.003, "beta": 0.9}, KAHAN, kinds=True),
    "Amos": Entry(
        Amos,
        lambda theta, kind, **options: AmosOracle(theta, **options),
        {"lr": 0.05, "scale": 0.3, "momentum": 0.9},
        {"lr": 0.02, "scale": 0.5, "beta": 0.98},
        {"rounding": "kahan"},
        decay="extra_l2",
    ),
    "EGStepSize": Entry(
        lambda groups, **options: EGStepSize("sgdm", groups, **options),
        partial(StepSizeOne, inner="sgdm"),
        {"lr": 0.01},
        {"lr": 0.003, "momentum": 0.8},
        {"rounding": "kahan"},
        low_fused={"rounding": "nearest"},
    ),
    "EGStepSize (adam)": Entry(
        lambda groups, **options: EGStepSize("adam", groups, **options),
        partial(StepSizeOne, inner="adam"),
        {"lr": 0.05},
        {"lr": 0.03, "betas": (0.8, 0.99)},
        {"rounding": "kahan"},
        fused=False,
    ),
    "EGSGD": Entry(
        EGSGD,
        lambda theta, kind, **options: EGSGDOracle(theta, **options),
        {"lr": 0.01, "gamma": 0.02},
        {"lr": 0.003, "gamma": 0.05},
        {"rounding": "kahan"},
        fused=False,
    ),
    "ExponentiatedGradient": Entry(
        partial(ExponentiatedGradient, mode="signed"),
        partial(ExponentiatedOne, mode="signed"),
        {"lr": 0.01, "beta": 0.5},
        {"lr": 0.003, "beta": 2.0},
        {"rounding": "kahan"},
        decay="",
        fused=False,
    ),
    "FoldedAdamW": Entry(
        FoldedAdamW,
        AdamWOne,
        {"lr": 0.05},
        {"lr": 0.03, "betas": (0.8, 0.99)},
        {"rounding": "kahan"},
        fused=False,
    ),
}
CONFIGURATIONS = [
    (name, path, dtype, option)
    for name, entry in OPTIMIZERS.items()
    for path in PATHS
    for dtype in DTYPES
    for option in OPTIONS
    if (entry.fused or path != "fused") and (entry.decay or option != "weight_decay")
]


@pytest.mark.parametrize(("name", "path", "dtype", "option"), CONFIGURATIONS)
def test_fifty_steps_equal_the_oracle(name, path, dtype, option):
    entry, dtype = OPTIMIZERS[name], DTYPES[dtype]
    decay = {entry.decay: 0.0} if entry.decay else {}
    if entry.decay and option in ("weight_decay", "maximize"):
        decay = {entry.decay: {"weight_decay": 0.3, "maximize": 0.1}[option]}
    options = {**entry.base, **decay, **({"maximize": True} if option == "maximize" else {})}
    per_kind = {kind: dict(options) for kind in SHAPES}
    if option == "groups":
        per_kind["vector"] |= entry.second
    if name == "Tiger":
        # By default there is no decay for vectors, and that is what the oracle does.
        del per_kind["vector"]["weight_decay"]
    generator = torch.Generator().manual_seed(0)
    params = {kind: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for kind, shape in SHAPES.items()}
    oracles = {
        kind: entry.oracle(p.detach().double().numpy().copy(), kind, **per_kind[kind]) for kind, p in params.items()
    }
    groups = [{"params": [(kind, p)], "kind": kind, **per_kind[kind]} for kind, p in params.items()]
    if not entry.kinds:
        groups = [{key: value for key, value in group.items() if key != "kind"} for group in groups]
    if option == "tensor_lr":
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    low = entry.low_fused if path == "fused" and entry.low_fused is not None else entry.low
    low = low if dtype == torch.bfloat16 else {}
    optimizer = entry.make(groups, **PATHS[path], **low)
    start = {kind: p.detach().double().clone() for kind, p in params.items()}
    for _ in range(STEPS):
        for kind, p in params.items():
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            oracles[kind].step(p.grad.double().numpy())
        optimizer.step()
    for kind, p in params.items():
        found, expected = p.detach().double(), torch.from_numpy(oracles[kind].theta)
        tolerance = TOLERANCE[dtype]
        if low.get("rounding") == "kahan":
            found += optimizer.state[p]["compensation"].double()
        elif dtype == torch.bfloat16:
            # To nearest at every step: 50 errors of up to half the spacing, of both signs.
            tolerance = 4 * STEPS**0.5 * 2**-9
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)
        assert (expected - start[kind]).abs().max() > 5e-3


def test_every_optimizer_has_an_entry():
    classes = {c for c in vars(danlu.optim).values() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    # They step by another optimizer, which is tested here; their own arithmetic is tested in their files.
    composed = {"UpdateNormalized", "HybridOptimizer"}
    assert {c.__name__ for c in classes} - composed == {name.split(" ")[0] for name in OPTIMIZERS}


def test_there_are_enough_configurations():
    assert len(CONFIGURATIONS) >= 60


def parameters():
    return [nn.Parameter(torch.ones(2, 3))]


def of(cls, *names, **options):
    """A call of the class on one parameter, once in the constructor and once in a group."""
    return [(cls.__name__, lambda: cls(parameters(), **options), name) for name in names]


def functional(call, name):
    return [(name, call, name)]


def one(value=1.0):
    return [torch.full((2, 3), value)]


NAN, INF = math.nan, math.inf
CASES = [
    case
    for cls in (Lion, Tiger)
    for options in [
        *({"lr": value} for value in (-1.0, NAN, INF, -INF, torch.ones(2))),
        *({"weight_decay": value} for value in (-1e-9, NAN, INF)),
        *({"nonfinite": value} for value in ("ignore", "", None)),
        *({"rounding": value} for value in ("up", "", 3)),
        {"seed": -1},
        *({"state_dtype": value} for value in (torch.float16, torch.bfloat16, torch.float64, "float32")),
        {"foreach": True, "fused": True},
    ]
    for case in of(cls, next(iter(options)), **options)
]
CASES += [
    case
    for options in [
        *(
            {"betas": value}
            for value in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN), (0.9,), (0.1, 0.2, 0.3), 0.9)
        ),
        *({"shrink": value} for value in (0.0, 1.01, -1.0, NAN)),
    ]
    for case in of(Lion, next(iter(options)), **options)
]
CASES += [
    case
    for options in [
        *({"beta": value} for value in (1.0, -0.1, NAN)),
        *({"grad_accum_steps": value} for value in (0, -1)),
        *({"shrink": value} for value in (0.0, 1.01, -1.0, NAN)),
        *({"shrink_noise": value} for value in (-1.0, NAN)),
        *({"rms_floor": value} for value in (-1.0, NAN)),
        *({"vector_scale": value} for value in (0.0, -1.0, INF)),
        *({"sign_power": value} for value in (-0.1, 1.1, NAN)),
        *({"tensor_clip_norm": value} for value in (0.0, -1.0)),
        {"capturable": True, "grad_accum_steps": 2},
        {"capturable": True, "in_backward": True},
        {"nonfinite": "raise", "in_backward": True},
    ]
    for case in of(Tiger, next(iter(options)), **options)
]
MAKERS = {
    "Amos": lambda p, **options: Amos(p, scales=options.pop("scales", 0.1), **options),
    "EGStepSize": lambda p, **options: EGStepSize("sgdm", p, **options),
    "EGSGD": EGSGD,
    "ExponentiatedGradient": ExponentiatedGradient,
    "FoldedAdamW": FoldedAdamW,
}
CASES += [
    (name, lambda make=make, options=options: make(parameters(), **options), next(iter(options)))
    for name, make in MAKERS.items()
    for options in [
        *({"lr": value} for value in (-1.0, NAN, INF, torch.ones(2))),
        {"nonfinite": "ignore"},
        *({"shrink": value} for value in (0.0, 1.01)),
        *(
            {
                "Amos": [
                    *({"beta": value} for value in (1.0, -0.1, NAN)),
                    *({"momentum": value} for value in (1.0, -0.1)),
                    *({"clip_value": value} for value in (0.0, -1.0)),
                    *({name: -1.0} for name in ("extra_l2", "c_coef", "d_coef", "eps")),
                    {"reduce": "rows"},
                    {"rounding": "up"},
                    {"seed": -1},
                ],
                "EGStepSize": [
                    *({name: -1.0} for name in ("gain_lr", "scale_lr", "momentum", "momentum_beta", "weight_decay")),
                    *({"gain_range": value} for value in ((2.0, 1.0), (-1.0, 2.0), (1.0,))),
                    {"scale_range": (2.0, 3.0)},
                    {"scale_scope": "layer"},
                    {"rounding": "up"},
                    {"seed": -1},
                ],
                "EGSGD": [{"gamma": -1.0}, {"weight_decay": -1.0}, {"rounding": "up"}, {"seed": -1}],
                "ExponentiatedGradient": [
                    *({"mode": "softmax"}, {"floor": -1.0}, {"beta": 0.0, "mode": "signed"}),
                    *({"rounding": "up"}, {"rounding": "kahan", "mode": "simplex"}, {"seed": -1}),
                ],
                "FoldedAdamW": [
                    *({"betas": value} for value in ((1.0, 0.9), (0.9, 1.0), (0.9,))),
                    *({name: -1.0} for name in ("eps", "weight_decay")),
                    {"grad_accum_steps": 0},
                ],
            }[name]
        ),
    ]
]
CASES += [
    ("Tiger", lambda: Tiger([{"params": parameters(), "kind": "norm"}]), "kind"),
    ("Tiger", lambda: Tiger([{"params": parameters(), "kind": "matrix", "center": NAN}]), "center"),
    ("Tiger", lambda: Tiger(parameters(), lr_schedule={}), "points"),
    ("Tiger", lambda: Tiger(parameters(), lr_schedule={-1: 1.0}), "points"),
    ("Tiger", lambda: Tiger(parameters(), lr_schedule={3: -1.0}), "points"),
    ("from_adamw", lambda: Lion.from_adamw(parameters(), -1.0, 0.1), "adamw_lr"),
    ("from_adamw", lambda: Lion.from_adamw(parameters(), 1.0, -0.1), "adamw_weight_decay"),
    ("from_adamw", lambda: Lion.from_adamw(parameters(), 1.0, 0.1, ratio=0.0), "ratio"),
    ("parameter_groups", lambda: parameter_groups(nn.Linear(2, 2), weight_decay=-1.0), "weight_decay"),
    ("parameter_groups", lambda: parameter_groups(nn.Linear(2, 2), kinds={"head": {}}), "kinds"),
    ("parameter_groups", lambda: parameter_groups(nn.Linear(2, 2), overrides={"x": "matrix"}), "overrides"),
    ("parameter_groups", lambda: parameter_groups(nn.Linear(2, 2), overrides={"bias": "head"}), "overrides"),
    ("parameter_groups", lambda: parameter_groups(nn.ReLU()), "model"),
    ("piecewise_linear", lambda: piecewise_linear(Lion(parameters()), {}), "points"),
    ("piecewise_linear", lambda: piecewise_linear(Lion(parameters()), {-2: 1.0}), "points"),
    ("piecewise_linear", lambda: piecewise_linear(Lion(parameters()), {2: NAN}), "points"),
    ("lion", lambda: lion(one(), one(), [], lr=0.1), "exp_avgs"),
    ("lion", lambda: lion(one(), one(), one(), lr=-0.1), "lr"),
    ("lion", lambda: lion(one(), one(), one(), lr=0.1, betas=(2, 2)), "betas"),
    ("lion", lambda: lion(one(), one(), one(), lr=0.1, nonfinite_counts=[]), "nonfinite_counts"),
    ("tiger", lambda: tiger(one(), one(), one(), kinds=[], lr=0.1), "kinds"),
    ("tiger", lambda: tiger(one(), one(), one(), kinds=["norm"], lr=0.1), "kinds"),
    ("tiger", lambda: tiger(one(), one(), one(), kinds=["matrix"], lr=0.1, share=-1.0), "share"),
    ("tiger", lambda: tiger(one(), one(), one(), kinds=["matrix"], lr=0.1, folded=[]), "folded"),
    ("tiger", lambda: tiger(one(), one(), one(), kinds=["matrix"], lr=0.1, shrink=0.0), "shrink"),
    ("tiger", lambda: tiger(one(), one(), one(), kinds=["matrix"], lr=0.1, sign_power=2.0), "sign_power"),
    ("Rounding", lambda: Rounding("down"), "rounding"),
    ("Rounding", lambda: Rounding(seed=-1), "seed"),
    ("Rounding", lambda: Rounding(step=-1), "step"),
]


@pytest.mark.parametrize(
    ("what", "call", "argument"), CASES, ids=[f"{what}-{name}-{i}" for i, (what, _, name) in enumerate(CASES)]
)
def test_bad_input_raises_a_value_error_that_names_the_argument(what, call, argument):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=argument):
            call()


def test_there_are_enough_error_inputs():
    assert len(CASES) >= 60
