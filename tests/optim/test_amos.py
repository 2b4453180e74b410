"""Amos alone: the oracle over every option, golden numbers, invariances, reduced shapes, half precision, errors."""

import copy
import io
import math
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from amos_oracle import AmosOracle
from torch import nn

from danlu.optim import Amos, Rounding, amos, amos_scales, parameter_groups
from danlu.optim._amos_step import Numbers, multi_tensor_amos

F64 = torch.float64
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "maximize": True, "extra_l2": 0.01},
    {"beta": 0.98, "clip_value": 0.5},
    {"beta": 0.0},
    {"extra_l2": 0.05},
    {"maximize": True},
    {"c_coef": 0.0, "d_coef": 0.0},
    {"c_coef": 1.0, "d_coef": 2.0, "momentum": 0.5},
    {"eps": 1e-3},
    {"reduce": "scalar", "momentum": 0.9, "clip_value": 1.0},
    {"reduce": "none", "momentum": 0.9},
    {"reduce": "none", "clip_value": 0.5},
    {"nonfinite": "off"},
    {"nonfinite": "raise"},
    {"lr": torch.tensor(0.05, dtype=F64)},
    {"lr": 1.0},
]
SHAPES = [(5, 7), (3,), (), (4, 3, 2, 2), (6, 1)]
SCALES = [0.3, 0.5, 1.0, 0.7, 1.5]


def bare(params, **options):
    """On parameters without scales; the warning about that has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Amos(params, **options)


def named(params):
    return [(f"p{i}", param) for i, param in enumerate(params)], {f"p{i}": s for i, s in enumerate(SCALES)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "loop"])
def test_oracle_over_fifty_steps(options, path):
    random = np.random.default_rng(0)
    starts = [random.normal(size=shape) for shape in SHAPES]
    params = [nn.Parameter(torch.from_numpy(np.array(start))) for start in starts]
    # A layout whose slices of axis 0 are not in one piece, and one whose are, in another order.
    params[0] = nn.Parameter(params[0].detach().t().contiguous().t())
    params[3] = nn.Parameter(params[3].detach().to(memory_format=torch.channels_last))
    settings = {"lr": 0.1, **options}
    pairs, scales = named(params)
    optimizer = Amos(pairs, scales=scales, **path, **settings)
    settings["lr"] = float(settings["lr"])
    oracles = [AmosOracle(start, scale=scale, **settings) for start, scale in zip(starts, SCALES, strict=True)]
    for _ in range(50):
        for param, oracle in zip(params, oracles, strict=True):
            grad = random.normal(size=param.shape)
            param.grad = torch.empty_like(param).copy_(torch.from_numpy(np.array(grad)))
            oracle.step(grad)
        optimizer.step()
    for param, oracle in zip(params, oracles, strict=True):
        state = optimizer.state[param]
        np.testing.assert_allclose(param.detach().numpy(), oracle.theta, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(state["exp_avg_sq"].numpy().ravel(), oracle.v.ravel(), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(state["decay"].numpy().ravel(), oracle.b.ravel(), rtol=1e-11, atol=1e-14)
        if options.get("momentum"):
            np.testing.assert_allclose(state["exp_avg"].numpy(), oracle.mu, rtol=1e-11, atol=1e-13)
        assert state["step"].item() == 50


@pytest.mark.parametrize("foreach", [None, True, False])
def test_golden_values(foreach):
    p = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, -0.3]], dtype=F64))
    optimizer = Amos([p], lr=0.1, scales=math.sqrt(1 / 3), foreach=foreach)
    for t in (1, 2, 3):
        p.grad = t * torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 0.25]], dtype=F64)
        optimizer.step()
    theta = [[0.340977262684, -1.273170437433, 2.102928940818], [-0.226066043253, 0.195512496280, -0.455179890117]]
    torch.testing.assert_close(p.detach(), torch.tensor(theta, dtype=F64), rtol=0, atol=1e-12)
    state = optimizer.state[p]
    v, b = torch.tensor([[0.027988002], [0.0014577084375]], dtype=F64), torch.full((2, 1), 0.04590706062289, dtype=F64)
    torch.testing.assert_close(state["exp_avg_sq"], v, rtol=0, atol=1e-15)
    torch.testing.assert_close(state["decay"], b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_parabola_is_solved(foreach):
    p = nn.Parameter(torch.tensor([-1.0, 10.0, 1.0], dtype=F64))
    target = torch.tensor([1.0, -1.0, 1.0], dtype=F64)
    optimizer = Amos([p], lr=1.0, scales=1.0, foreach=foreach)
    for _ in range(3000 if foreach is False else 10_000):
        p.grad = 2 * (p.detach() - target)
        optimizer.step()
    assert (p.detach() - target).abs().max() < 1e-12


def displacement(factor, *, steps=20, dtype=F64, **options):
    torch.manual_seed(1)
    p = nn.Parameter(torch.randn(6, 5, dtype=dtype))
    start = p.detach().clone()
    optimizer = Amos([p], lr=0.1, scales=0.5, **options)
    for _ in range(steps):
        p.grad = torch.randn(6, 5, dtype=dtype) * factor
        optimizer.step()
    return p.detach() - start


@pytest.mark.parametrize("factor", [1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_scaled_gradients_change_nothing(factor, foreach):
    torch.testing.assert_close(displacement(factor, foreach=foreach), displacement(1.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [2.0**20, 2.0**-30])
def test_scaled_gradients_change_nothing_in_float32(factor):
    moved = displacement(factor, dtype=torch.float32)
    torch.testing.assert_close(moved, displacement(1.0, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_mirror_symmetry():
    def run(sign):
        torch.manual_seed(2)
        p = nn.Parameter(sign * torch.randn(4, 3, dtype=F64))
        optimizer = Amos([p], lr=0.2, scales=0.3, momentum=0.9, extra_l2=0.1)
        for _ in range(20):
            p.grad = sign * torch.randn(4, 3, dtype=F64)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(1.0), -run(-1.0))


@pytest.mark.parametrize("foreach", [None, True, False])
def test_extra_l2_shrinks(foreach):
    norms = []
    for extra in (0.0, 0.01):
        torch.manual_seed(3)
        p = nn.Parameter(torch.randn(4, 4, dtype=F64))
        optimizer = Amos([p], lr=1e-3, scales=0.5, extra_l2=extra, foreach=foreach)
        for _ in range(50):
            p.grad = torch.randn(4, 4, dtype=F64)
            optimizer.step()
        norms.append(p.norm().item())
    # 50 decays by 1 %, next to steps of 1e-3.
    assert norms[1] / norms[0] == pytest.approx(0.99**50, rel=0.02)


def test_equals_the_peer_where_it_is_right():
    """pytorch_optimizer agrees for scalar statistics, its own scales and no extra_l2, whose sign it has wrong."""
    peer = pytest.importorskip("pytorch_optimizer").Amos
    for momentum in (0.0, 0.9):
        torch.manual_seed(0)
        mine, theirs = (nn.Parameter(torch.ones(6, 5, dtype=F64)) for _ in range(2))
        first = Amos([mine], lr=0.1, scales=math.sqrt(2 / 5), reduce="scalar", momentum=momentum)
        second = peer([theirs], lr=0.1, momentum=momentum, foreach=False)
        for _ in range(50):
            grad = torch.randn(6, 5, dtype=F64)
            for p, optimizer in ((mine, first), (theirs, second)):
                p.grad = grad.clone()
                optimizer.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_state_is_reduced():
    layer = nn.Linear(768, 3072)
    optimizer = Amos(layer, lr=1e-2)
    layer(torch.ones(1, 768)).sum().backward()
    optimizer.step()

    def held(param):
        state = optimizer.state[param]
        return sum(value.numel() * value.element_size() for value in state.values() if value.ndim > 0)

    assert held(layer.weight) == 2 * 3072 * 4
    assert held(layer.bias) == 0
    shapes = {}
    for shape in [(4, 3, 5, 5), (7, 2), (3,), ()]:
        p = nn.Parameter(torch.ones(shape))
        p.grad = torch.ones(shape)
        for reduce in ("auto", "scalar", "none"):
            single = bare([p], lr=0.1, reduce=reduce)
            single.step()
            shapes[shape, reduce] = tuple(single.state[p]["exp_avg_sq"].shape)
    assert shapes[(4, 3, 5, 5), "auto"] == (4, 1, 1, 1)
    assert shapes[(7, 2), "auto"] == (7, 1)
    assert shapes[(3,), "auto"] == shapes[(), "auto"] == shapes[(7, 2), "scalar"] == ()
    assert shapes[(7, 2), "none"] == (7, 2)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_rows_without_gradient_do_not_move(foreach):
    embedding = nn.Embedding(10, 4)
    optimizer = Amos(embedding, lr=0.1, foreach=foreach)
    start = embedding.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.tensor([2, 5])).square().sum().backward()
        optimizer.step()
    moved = (embedding.weight.detach() != start).any(1)
    assert moved.tolist() == [i in (2, 5) for i in range(10)]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("eps", [2.0**-125, 0.0])
def test_zero_gradients_move_nothing(foreach, dtype, eps):
    p = nn.Parameter(torch.ones(3, 2).to(dtype))
    optimizer = Amos([p], lr=0.1, scales=0.5, momentum=0.9, eps=eps, foreach=foreach)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, torch.ones(3, 2).to(dtype))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.isfinite().all()
    assert (p < 1).all()


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_state_through_a_checkpoint(foreach, rounding, dtype):
    def build():
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5, 4).to(dtype))
        return p, Amos([("p", p)], lr=0.3, scales={"p": 0.5}, momentum=0.9, rounding=rounding, foreach=foreach)

    def go(p, optimizer, first, last):
        for step in range(first, last):
            p.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.step()

    p, optimizer = build()
    go(p, optimizer, 0, 5)
    buffer = io.BytesIO()
    torch.save((p.detach(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    values, saved = torch.load(buffer, weights_only=True)
    dtypes = {name: value.dtype for name, value in optimizer.state[p].items()}
    lacking = {"compensation": dtype} if rounding == "kahan" else {}
    assert dtypes == dict.fromkeys(("step", "exp_avg_sq", "decay", "exp_avg"), torch.float32) | lacking
    q, resumed = build()
    q.data.copy_(values)
    resumed.load_state_dict(saved)
    for name, value in optimizer.state[p].items():
        assert resumed.state[q][name].dtype == value.dtype
        assert torch.equal(resumed.state[q][name], value)
        assert resumed.state[q][name].data_ptr() != saved["state"][0][name].data_ptr()
    go(p, optimizer, 5, 10)
    go(q, resumed, 5, 10)
    assert torch.equal(p, q)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("clip_value", [None, 1.0])
@pytest.mark.parametrize("reduce", ["auto", "scalar", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_bad_gradients_are_skipped_bit_for_bit(foreach, clip_value, reduce, bad):
    """1e30 is finite, but its square is not; where it is clipped there is nothing to skip."""
    p = nn.Parameter(torch.randn(4, 3))
    pairs = [("p", p)]
    optimizer = Amos(
        pairs, lr=0.1, scales={"p": 0.5}, momentum=0.9, clip_value=clip_value, reduce=reduce, foreach=foreach
    )
    for _ in range(2):
        p.grad = torch.randn(4, 3)
        optimizer.step()
    before = copy.deepcopy((p.detach(), optimizer.state[p]))
    p.grad[1, 2] = bad
    optimizer.step()
    skipped = clip_value is None or not math.isfinite(bad)
    assert optimizer.nonfinite_events == ({"p": 1} if skipped else {})
    assert torch.equal(p, before[0]) == skipped
    for name, value in optimizer.state[p].items():
        assert torch.equal(value, before[1][name]) == skipped, name
    p.grad = torch.randn(4, 3)
    optimizer.step()
    assert p.isfinite().all()
    assert not torch.equal(p, before[0])


def test_raise_names_the_parameter_and_skips_overflow():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = Amos([("layer.weight", p)], lr=0.1, scales={"layer.weight": 1.0}, nonfinite="raise")
    p.grad = torch.tensor([[math.inf, 0.0], [0.0, 0.0]])
    with pytest.raises(RuntimeError, match=r"layer\.weight"):
        optimizer.step()
    p.grad = torch.full((2, 2), 1e30)
    optimizer.step()
    assert torch.equal(p, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"params\[0\]"):
        amos(
            [p], [torch.full((2, 2), math.nan)], [torch.zeros(())], [torch.zeros(())], [torch.zeros(())],
            scales=[1.0], lr=0.1, nonfinite="raise",
        )  # fmt: skip


def test_tensors_count_their_own_steps():
    """A tensor that joins late starts its correction of the bias when it joins."""
    torch.manual_seed(0)
    late, alone, always = (nn.Parameter(torch.ones(3, 2, dtype=F64)) for _ in range(3))
    both = Amos([late, always], lr=0.1, scales=0.5)
    for _ in range(5):
        always.grad = torch.randn(3, 2, dtype=F64)
        both.step()
    assert late not in both.state
    single = Amos([alone], lr=0.1, scales=0.5)
    late.grad = alone.grad = torch.randn(3, 2, dtype=F64)
    both.step()
    single.step()
    assert torch.equal(late, alone)


def test_rate_zero_moves_nothing_and_schedules_are_read_each_step():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = Amos([p], lr=0.0, scales=0.5, extra_l2=0.1, momentum=0.9)
    p.grad = torch.ones(3, 2)
    optimizer.step()
    assert torch.equal(p, torch.ones(3, 2))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert (p < 1).all()


def test_momentum_can_be_switched_on_later():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = Amos([p], lr=0.1, scales=0.5)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert "exp_avg" not in optimizer.state[p]
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (2, 2)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"clip_value": 0.3}, {"momentum": 0.9, "extra_l2": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_bucket_path_equals_the_loop(options, dtype):
    """What accelerators run, on tensors of this device."""
    torch.manual_seed(0)
    shapes = [(5, 7), (3,), (), (4, 3, 2, 2)]
    runs = []
    for path in ("loop", "bucket"):
        torch.manual_seed(1)
        params = [torch.randn(shape).to(dtype) for shape in shapes]
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        reduced = [(5, 1), (), (), (4, 1, 1, 1)]
        v, b = ([torch.zeros(shape, dtype=wide) for shape in reduced] for _ in range(2))
        t = [torch.zeros(()) for _ in shapes]
        mu = [torch.zeros(shape, dtype=wide) for shape in shapes] if options.get("momentum") else None
        counts = [torch.zeros((), dtype=torch.int64) for _ in shapes]
        lacking = [torch.zeros_like(p) for p in params]
        for step in range(6):
            grads = [torch.randn(shape).to(dtype) for shape in shapes]
            how = Rounding("kahan", step=step, compensations=lacking)
            if step == 3:
                grads[0][1, 1] = math.nan
            if path == "loop":
                amos(
                    params, grads, v, b, t, mu,
                    scales=SCALES[:4], lr=0.1, nonfinite_counts=counts, rounding=how, foreach=False, **options,
                )  # fmt: skip
            else:
                numbers = Numbers(
                    **{"lr": 0.1, "beta": 0.999, "momentum": 0.0, "clip_value": None, "extra_l2": 0.0, "c_coef": 0.25}
                    | {"d_coef": 0.25, "eps": 2.0**-125, "sign": 1.0, "guard": True}
                    | options
                )
                writers = [how.of(i, dtype) for i in range(4)]
                multi_tensor_amos(params, grads, v, b, t, mu, counts, writers, SCALES[:4], numbers)
        runs.append([*params, *v, *b, *t, *(mu or []), *counts, *lacking])
    for slow, fast in zip(*runs, strict=True):
        # A bfloat16 result may round the other way where float32 ties; its compensation then is of the other sign.
        rtol = {F64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.int64: 0}[slow.dtype]
        torch.testing.assert_close(fast, slow, rtol=rtol, atol=rtol * 0.1 if rtol < 1e-3 else rtol)


@pytest.mark.filterwarnings("ignore:Amos got parameters")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_a_parameter_that_changes_its_layout_keeps_its_compensation(foreach, momentum):
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).bfloat16())
        optimizer = Amos([p], lr=0.05, momentum=momentum, rounding="kahan", foreach=foreach)
        for step in range(10):
            if step == 5:
                p.data = p.data.contiguous(memory_format=layout)
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p)
            if step >= 5:
                p.grad = p.grad.contiguous(memory_format=layout)
            optimizer.step()
        found.append(p.detach().float() + optimizer.state[p]["compensation"].float())
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


def test_large_tensors_go_in_blocks():
    """More than one block of rows, and of a vector, with momentum."""
    starts = [torch.randn(700, 1000), torch.randn(600_000), torch.randn(3, 400_000)]
    found = []
    for path in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        params = [nn.Parameter(start.clone()) for start in starts]
        optimizer = Amos(params, lr=0.1, scales=0.1, momentum=0.9, **path)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        found.append([p.detach() for p in params])
    for fused, fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(fused, slow, rtol=1e-6, atol=1e-7)


def test_ways_to_give_scales():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2), nn.LayerNorm(2))
    scales = amos_scales(model)
    by_model = Amos(model, lr=0.1)
    by_name = Amos(model.named_parameters(), lr=0.1, scales=scales)
    by_group = Amos(parameter_groups(model), lr=0.1, scales=scales)
    for optimizer in (by_model, by_name, by_group):
        found = {
            name: group["scale"]
            for group in optimizer.param_groups
            for name in group["param_names"]
        }  # fmt: skip
        assert found == scales
    assert Amos(model.parameters(), scales=0.3).param_groups[0]["scale"] == 0.3
    given = Amos([{"params": [nn.Parameter(torch.ones(1))], "scale": 2.0}], scales=0.3)
    assert given.param_groups[0]["scale"] == 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kinds = Amos(parameter_groups(model), lr=0.1)
    assert [group["scale"] for group in kinds.param_groups] == [None] * 4
    with pytest.warns(UserWarning, match=r"amos_scales\(model\)"):
        Amos(model.parameters())


def test_kinds_and_shapes_give_scales():
    """The same displacement as with the scale said: the first step is lr * scale in root mean square."""
    for kind, center, shape, scale in [
        ("norm_scale", 1.0, (4,), 1.0),
        ("norm_scale", 0.0, (4,), 0.5),
        ("vector", 0.0, (4,), 0.5),
        ("embedding", 0.0, (3, 8), math.sqrt(2 / 8)),
        ("matrix", 0.0, (3, 5, 2), math.sqrt(1 / 10)),
    ]:
        p = nn.Parameter(torch.zeros(shape, dtype=F64))
        p.grad = torch.full(shape, 7.0, dtype=F64)
        Amos([{"params": [p], "kind": kind, "center": center}], lr=0.1).step()
        assert p.square().mean().sqrt().item() == pytest.approx(0.1 * scale)


def test_scales_are_part_of_a_checkpoint():
    p = nn.Parameter(torch.ones(2))
    saved = Amos([p], lr=0.1, scales=0.25).state_dict()
    resumed = Amos([p], lr=0.1, scales=0.5)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["scale"] == 0.25


ONE = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"beta": 1.0}, ValueError, r"beta must be in \[0, 1\)"),
        ({"beta": -0.1}, ValueError, "beta must be in"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
        ({"momentum": -0.5}, ValueError, "momentum must be in"),
        ({"clip_value": 0.0}, ValueError, r"clip_value must be in \(0, inf\)"),
        ({"clip_value": -1.0}, ValueError, "clip_value must be in"),
        ({"clip_value": math.nan}, ValueError, "clip_value must be in"),
        ({"extra_l2": -0.1}, ValueError, "extra_l2 must be in"),
        ({"c_coef": -1.0}, ValueError, "c_coef must be in"),
        ({"d_coef": -1.0}, ValueError, "d_coef must be in"),
        ({"eps": -1e-8}, ValueError, "eps must be in"),
        ({"eps": math.inf}, ValueError, "eps must be in"),
        ({"lr": -0.1}, ValueError, "lr must be in"),
        ({"lr": math.nan}, ValueError, "lr must be in"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor with one element"),
        ({"rounding": "up"}, ValueError, "rounding must be one of"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"foreach": True, "fused": True}, ValueError, "foreach and fused cannot both be True"),
        ({"reduce": "rows"}, ValueError, "reduce must be one of 'auto', 'scalar', 'none'"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of"),
        ({"scales": 0.0}, ValueError, "scales must be in"),
        ({"scales": -1.0}, ValueError, "scales must be in"),
        ({"scales": {"w": 1.0}}, ValueError, "need named parameters"),
        ({"beta": "0.9"}, TypeError, "beta must be a real number"),
        ({"foreach": 1}, TypeError, "foreach must be a bool or None"),
        ({"scales": "big"}, TypeError, "scales must be a real number"),
        ({"weight_decay": 0.1}, TypeError, "weight_decay"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        Amos([ONE], **options)


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ({"scale": 0.0}, "scale must be in"),
        ({"scale": -1.0}, "scale must be in"),
        ({"kind": "tensor"}, "kind must be one of"),
        ({"weight_decay": 0.1}, "weight_decay must be 0 in a group of Amos"),
        ({"momentum": 2.0}, "momentum must be in"),
        ({"reduce": "all"}, "reduce must be one of"),
    ],
)
def test_bad_groups(group, match):
    with pytest.raises(ValueError, match=match):
        bare([{"params": [ONE], **group}])


def test_bad_scales_by_name():
    with pytest.raises(ValueError, match="got none for 'w'"):
        Amos([("w", ONE)], scales={"v": 1.0})
    with pytest.raises(ValueError, match=r"scales\['w'\] must be in"):
        Amos([("w", ONE)], scales={"w": 0.0})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"grads": []}, ValueError, "the lists must have one length"),
        ({"scales": []}, ValueError, "the lists must have one length"),
        ({"scales": [0.0]}, ValueError, r"scales\[0\] must be in"),
        ({"momentum": 0.9}, ValueError, "exp_avgs must be given if and only if momentum > 0"),
        ({"exp_avgs": [torch.zeros(2, 3)]}, ValueError, "exp_avgs must be given if and only if momentum > 0"),
        ({"exp_avg_sqs": [torch.zeros(3, 1)]}, ValueError, r"exp_avg_sqs\[0\] and decays\[0\] must have one shape"),
        ({"decays": [torch.zeros(())]}, ValueError, r"exp_avg_sqs\[0\] and decays\[0\] must have one shape"),
        ({"lr": -1.0}, ValueError, "lr must be in"),
        ({"beta": 2.0}, ValueError, "beta must be in"),
        ({"nonfinite": "shrink"}, ValueError, "nonfinite must be one of"),
        ({"nonfinite_counts": []}, ValueError, "the lists must have one length"),
    ],
)
def test_function_checks_its_arguments(change, error, match):
    arguments = {
        "params": [torch.ones(2, 3)],
        "grads": [torch.ones(2, 3)],
        "exp_avg_sqs": [torch.zeros(2, 1)],
        "decays": [torch.zeros(2, 1)],
        "steps": [torch.zeros(())],
        "scales": [1.0],
        "lr": 0.1,
    }
    amos(**arguments)
    with pytest.raises(error, match=match):
        amos(**arguments | change)


def test_complex_and_sparse_are_refused():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="Amos does not support complex parameters"):
        bare([p]).step()


SHARDED = textwrap.dedent(
    """
    import os, warnings
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from danlu.optim import Amos, amos_scales

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3))

    def advance(net, optimizer, first, last):
        for step in range(first, last):
            tokens = torch.randint(7, (6,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(tokens).square().mean().backward()
            if step == 2 and net[1].bias.grad is not None:
                net[1].bias.grad.mul_(float("nan"))
            optimizer.step()

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = build()
    scales = amos_scales(whole)
    options = dict(lr=0.1, scales=scales, momentum=0.9, extra_l2=0.01, clip_value=0.1)
    single = Amos(whole.named_parameters(), **options)
    sharded = build()
    fully_shard(sharded, mesh=mesh)
    multiple = Amos(sharded.named_parameters(), **options)
    advance(whole, single, 0, 4)
    advance(sharded, multiple, 0, 4)
    full = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(sharded, multiple, options=full)
    resumed = build()
    fully_shard(resumed, mesh=mesh)
    other = Amos(resumed.named_parameters(), **options)
    resumed.load_state_dict({k: v for k, v in sharded.state_dict().items()})
    if dist.get_rank() == 0:
        assert saved["state"]["1.weight"]["exp_avg_sq"].shape == (6, 1)
    dist.broadcast_object_list(holder := [saved], src=0)
    set_optimizer_state_dict(resumed, other, holder[0], options=full)
    advance(whole, single, 4, 8)
    advance(sharded, multiple, 4, 8)
    advance(resumed, other, 4, 8)
    for net in (sharded, resumed):
        for (name, a), b in zip(net.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b, rtol=1e-6, atol=1e-7, msg=name)
    assert multiple.nonfinite_events == {"1.bias": 1}, multiple.nonfinite_events
    print("equal", flush=True)
    # Nobody leaves while the other still talks; then at once, since threads of gloo may abort an orderly exit.
    dist.barrier()
    os._exit(0)
    """
)


def test_sharded_parameters_equal_one_process(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("equal") == 2
