"""Rounding into float16 and bfloat16 parameters: nothing is lost on average, and the bits are a pure function."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from danlu.kernels.sign_update import mix
from danlu.optim import FoldedAdamW, Lion, Rounding, Tiger, lion
from danlu.optim._rounding import (
    element_index,
    hashed_bits,
    hashed_normal,
    local_part,
    rounding_key,
    stochastically_rounded,
)

PATHS = [None, True, False]
LOW = [torch.bfloat16, torch.float16]


def neighbors(x, dtype):
    """The largest number of `dtype` that is at most x, and the smallest that is at least x, in float64."""
    nearest = x.to(dtype)
    if nearest.double() == x.double():
        return nearest.double(), nearest.double()
    other = torch.nextafter(nearest, torch.full_like(nearest, math.inf if nearest.double() < x.double() else -math.inf))
    return tuple(sorted((nearest.double(), other.double())))


@pytest.mark.parametrize("dtype", LOW)
@given(value=st.floats(-60000, 60000, width=32, allow_nan=False))
def test_the_result_is_a_neighbor_and_the_mean_is_the_value(dtype, value):
    x = torch.full((4096,), value)
    bits = hashed_bits(rounding_key(1, 0, 0), element_index(x))
    rounded = stochastically_rounded(x, bits, dtype).double()
    low, high = neighbors(x[:1].squeeze(), dtype)
    assert set(rounded.tolist()) <= {float(low), float(high)}
    # Five standard deviations of a mean of Bernoulli variables, and the resolution of 13 random bits.
    width = float(high - low)
    assert abs(rounded.mean().item() - x[0].item()) <= width * (5 * 0.5 / 64 + 2**-12)


@pytest.mark.parametrize("dtype", LOW)
def test_extremes(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, largest, -largest, math.inf, -math.inf, math.nan, 1.0, -2.0])
    bits = torch.full((9,), -1, dtype=torch.int32)  # the largest noise
    rounded = stochastically_rounded(x, bits, dtype)
    assert torch.equal(rounded[:6], x[:6].to(dtype))
    assert rounded[6].isnan()
    assert rounded[7:].tolist() == [1.0, -2.0]
    assert math.copysign(1, rounded[1]) == -1
    # Beyond the largest number: as rounding to nearest does.
    assert stochastically_rounded(torch.tensor([3.3e38 if dtype == torch.float16 else 3.4e38]), bits[:1], dtype).isinf()


def test_float16_subnormal_numbers():
    smallest = 2.0**-24
    x = torch.full((8192,), 0.25 * smallest)
    rounded = stochastically_rounded(x, hashed_bits(rounding_key(0, 0, 0), element_index(x)), torch.float16).double()
    assert set(rounded.tolist()) == {0.0, smallest}
    assert rounded.mean().item() == pytest.approx(0.25 * smallest, rel=0.1)


@pytest.mark.parametrize("cls", [FoldedAdamW, Lion, Tiger])
@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
def test_updates_below_half_a_unit_are_kept(cls, foreach, dtype, rounding):
    """A weight of 1 with steps far below half the spacing: within 1 % of float32, except to nearest."""
    lr = torch.finfo(dtype).eps / 16
    steps = 200

    def run(dtype, **options):
        p = nn.Parameter(torch.ones(512, dtype=dtype))
        groups = [{"params": [p], "kind": "vector"}] if cls is Tiger else [p]
        scale = {"vector_scale": 1.0} if cls is Tiger else {}
        optimizer = cls(groups, lr=lr, weight_decay=0.0, foreach=foreach, **scale, **options)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().double()

    exact = run(torch.float32)
    assert exact[0].item() == pytest.approx(1 - steps * lr, rel=1e-4)
    found = run(dtype, rounding=rounding)
    if rounding == "nearest":
        assert torch.equal(found, torch.ones(512, dtype=torch.float64))
    else:
        assert abs(found.mean() - exact.mean()) < 0.01 * exact.mean()
        moved = abs(found.mean() - exact.mean()) / (1 - exact.mean())
        assert moved < 0.05


def test_defaults():
    assert Rounding().of(0, torch.float32) is None
    assert Rounding().of(0, torch.bfloat16).mode == "stochastic"
    assert Rounding().of(0, torch.float16).mode == "nearest"
    assert Rounding("kahan").of(0, torch.float64) is None


@pytest.mark.parametrize("cls", [FoldedAdamW, Lion, Tiger])
@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_resume_is_exact_and_the_global_state_is_untouched(cls, foreach, rounding, state_dtype, tmp_path):
    def fresh():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).to(torch.bfloat16)
        options = {"rounding": rounding, "state_dtype": state_dtype, "foreach": foreach, "seed": 5}
        if cls is FoldedAdamW:
            # Its moments are float32 in any case.
            del options["state_dtype"]
        params = net if cls is Tiger else net.parameters()
        return net, cls(params, lr=1e-3, weight_decay=0.1, **options)

    def train(net, optimizer, first, last):
        for step in range(first, last):
            for i, p in enumerate(net.parameters()):
                generator = torch.Generator().manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            before = torch.get_rng_state()
            optimizer.step()
            assert torch.equal(before, torch.get_rng_state())

    whole, optimizer = fresh()
    train(whole, optimizer, 0, 10)
    again, optimizer = fresh()
    train(again, optimizer, 0, 10)
    half, optimizer = fresh()
    train(half, optimizer, 0, 5)
    torch.save({"net": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed, optimizer = fresh()
    resumed.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    for state in optimizer.state.values():
        expected = torch.float32 if cls is FoldedAdamW else state_dtype or torch.bfloat16
        assert state["exp_avg"].dtype == expected
        assert ("compensation" in state) == (rounding == "kahan")
    train(resumed, optimizer, 5, 10)
    for a, b, c in zip(whole.parameters(), again.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_bits_depend_on_seed_step_parameter_and_element():
    index = torch.arange(1000, dtype=torch.int32)
    streams = {
        key: hashed_bits(rounding_key(*key), index.clone())
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    }
    for a in streams:
        for b in streams:
            if a < b:
                # The chance of one equal pair among 1000 of 32 bits is 2e-7.
                assert not (streams[a] == streams[b]).any()
    bits = torch.stack([(streams[0, 0, 0] >> i) & 1 for i in range(32)]).double().mean(1)
    assert ((bits - 0.5).abs() < 0.08).all()


def test_the_key_is_the_same_for_a_step_on_the_device():
    host, device = rounding_key(3, 7, 11), rounding_key(3, 7, torch.tensor(11))
    index = torch.arange(64, dtype=torch.int32)
    assert torch.equal(hashed_bits(host, index.clone()), hashed_bits(device, index.clone()))
    assert mix(0) == 0
    assert mix(1) == 0x514E28B7  # published test value of the finalizer
    assert len({mix(i) for i in range(10000)}) == 10000


def test_normal_numbers():
    z = hashed_normal(rounding_key(0, 0, 0), torch.arange(100_000, dtype=torch.int32), torch.float64)
    assert abs(z.mean().item()) < 5 / 100_000**0.5
    assert z.var().item() == pytest.approx(1, abs=0.02)
    assert (z**4).mean().item() == pytest.approx(3, abs=0.15)


def test_elements_are_numbered_by_place_in_memory_without_gaps():
    whole = torch.arange(12).view(3, 4)
    assert torch.equal(element_index(whole), whole.int())
    assert torch.equal(element_index(whole.t()), whole.t().int())
    assert torch.equal(element_index(whole[:, :2]), torch.arange(6).view(3, 2).int())
    assert torch.equal(element_index(whole, 100), whole.int() + 100)
    assert local_part(whole, whole, (1, 2))[2:] == (0, (1, 2))


def test_bad_input():
    with pytest.raises(ValueError, match="rounding must be one of 'nearest', 'stochastic', 'kahan', got 'up'"):
        Rounding("up")
    with pytest.raises(ValueError, match="seed must be at least 0"):
        Rounding(seed=-1)
    with pytest.raises(TypeError, match="step must be an int"):
        Rounding(step=0.5)
    w = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="compensations must hold a tensor for parameter 0"):
        lion([w], [w.clone()], [torch.zeros_like(w)], lr=0.1, rounding=Rounding("kahan"))
