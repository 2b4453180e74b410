"""Every optimizer, path, dtype and option against a slow float64 oracle over 50 steps; every bad input by its name."""

import math
import warnings

import numpy as np
import pytest
import torch
from oracles import TigerOracle, lion_oracle
from torch import nn

from danlu.optim import Lion, Rounding, Tiger, lion, parameter_groups, piecewise_linear, tiger

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


OPTIMIZERS = {
    "Lion": (Lion, LionOracle, {"lr": 0.01}, {"lr": 0.003, "betas": (0.8, 0.95)}),
    "Tiger": (Tiger, TigerStepOracle, {"lr": 0.01}, {"lr": 0.003, "beta": 0.9}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_fifty_steps_equal_the_oracle(name, path, dtype, option):
    cls, oracle_cls, base, second = OPTIMIZERS[name]
    dtype = DTYPES[dtype]
    options = {**base, "weight_decay": 0.0}
    if option == "weight_decay":
        options["weight_decay"] = 0.3
    if option == "maximize":
        options |= {"maximize": True, "weight_decay": 0.1}
    per_kind = {kind: dict(options) for kind in SHAPES}
    if option == "groups":
        per_kind["vector"] |= second
    if name == "Tiger":
        # By default there is no decay for vectors, and that is what the oracle does.
        del per_kind["vector"]["weight_decay"]
    generator = torch.Generator().manual_seed(0)
    params = {kind: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for kind, shape in SHAPES.items()}
    oracles = {
        kind: oracle_cls(p.detach().double().numpy().copy(), kind, **per_kind[kind]) for kind, p in params.items()
    }
    groups = [{"params": [(kind, p)], "kind": kind, **per_kind[kind]} for kind, p in params.items()]
    if name != "Tiger":
        groups = [{key: value for key, value in group.items() if key != "kind"} for group in groups]
    if option == "tensor_lr":
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    low = {"rounding": "kahan", "state_dtype": torch.float32} if dtype == torch.bfloat16 else {}
    optimizer = cls(groups, **PATHS[path], **low)
    for _ in range(STEPS):
        for kind, p in params.items():
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            oracles[kind].step(p.grad.double().numpy())
        optimizer.step()
    for kind, p in params.items():
        found = p.detach().double()
        if dtype == torch.bfloat16:
            found += optimizer.state[p]["compensation"].double()
        expected = torch.from_numpy(oracles[kind].theta)
        torch.testing.assert_close(
            found, expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        )
        assert not torch.equal(expected, torch.zeros_like(expected))


def test_there_are_enough_configurations():
    assert len(OPTIMIZERS) * len(PATHS) * len(DTYPES) * len(OPTIONS) >= 60


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
        {"nonfinite": "shrink"},
    ]
    for case in of(Lion, "betas" if "betas" in options else "nonfinite", **options)
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
