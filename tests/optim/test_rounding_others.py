"""Low-precision parameters of the optimizers whose steps are not signs: no small step is lost, resume is exact."""

from functools import partial

import pytest
import torch
from torch import nn

from danlu.optim import EGSGD, EGStepSize, ExponentiatedGradient, FoldedAdamW, Rounding, folded_adamw

PATHS = [None, True, False]
LOW = [torch.bfloat16, torch.float16]
STEPS = 200


def folded(params, size, **options):
    return FoldedAdamW(params, lr=size, weight_decay=0.0, grad_accum_steps=2, **options)


def step_size(inner, params, size, **options):
    # Momentum 0.9 makes a step of ten gradients; gains and scales that rise without end would hide what is lost.
    rate = size / 10 if inner == "sgdm" else size
    return EGStepSize(inner, params, rate, gain_range=(0.9, 1.1), scale_range=(0.9, 1.1), **options)


# Name -> parameters and the size of the steps that a gradient of 1 makes, at least in the order of magnitude.
MAKERS = {
    "FoldedAdamW": folded,
    "EGStepSize": partial(step_size, "sgdm"),
    "EGStepSize (adam)": partial(step_size, "adam"),
    "ExponentiatedGradient (nonnegative)": partial(ExponentiatedGradient, mode="nonnegative"),
    "ExponentiatedGradient (signed)": partial(ExponentiatedGradient, mode="signed"),
    "EGSGD": lambda params, size, **options: EGSGD(params, size, gamma=1e-4, **options),
}


def run(make, dtype, size, **options):
    param = nn.Parameter(torch.ones(512, dtype=dtype))
    optimizer = make([param], size, **options)
    for _ in range(STEPS):
        param.grad = torch.ones_like(param)
        optimizer.step()
    return param.detach().double()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
def test_updates_below_half_a_spacing_are_kept(name, foreach, dtype, rounding):
    """A weight of 1 with steps far below half the spacing: within 1 % of float32, except to nearest."""
    make, size = MAKERS[name], torch.finfo(dtype).eps / 16
    exact = run(make, torch.float32, size, foreach=foreach).mean()
    assert 1 - exact > 4 * torch.finfo(dtype).eps  # what is lost to nearest is many spacings
    found = run(make, dtype, size, rounding=rounding, foreach=foreach)
    if rounding == "nearest":
        assert torch.equal(found, torch.ones_like(found))
    else:
        assert abs(found.mean() - exact) < 0.01 * exact
        assert abs(found.mean() - exact) < 0.05 * (1 - exact)


@pytest.mark.parametrize("name", MAKERS)
def test_defaults_are_stochastic_for_bfloat16_and_nearest_for_float16(name):
    for dtype, mode in ((torch.bfloat16, "stochastic"), (torch.float16, "nearest")):
        size = torch.finfo(dtype).eps / 4
        assert torch.equal(run(MAKERS[name], dtype, size), run(MAKERS[name], dtype, size, rounding=mode))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_resume_and_repeat_are_exact_and_the_global_state_is_untouched(name, foreach, rounding, tmp_path):
    def fresh(seed=5):
        generator = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.rand(shape, generator=generator).to(torch.bfloat16)) for shape in ((16, 8), (4,), (3, 5))
        ]
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        return params, MAKERS[name](groups, 1e-3, rounding=rounding, foreach=foreach, seed=seed)

    def train(params, optimizer, first, last):
        for step in range(first, last):
            for i, p in enumerate(params):
                generator = torch.Generator().manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            before = torch.get_rng_state()
            optimizer.step()
            assert torch.equal(before, torch.get_rng_state())
        return params

    whole, again = train(*fresh(), 0, 10), train(*fresh(), 0, 10)
    params, optimizer = fresh()
    # In the middle of an accumulation cycle.
    train(params, optimizer, 0, 5)
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed, optimizer = fresh()
    with torch.no_grad():
        for p, value in zip(resumed, saved["params"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    for p in resumed:
        assert ("compensation" in optimizer.state[p]) == (rounding == "kahan")
    train(resumed, optimizer, 5, 10)
    for a, b, c in zip(whole, again, resumed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    other = train(*fresh(seed=6), 0, 10)
    same = all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    assert same == (rounding == "kahan")


@pytest.mark.parametrize("name", MAKERS)
def test_only_the_wanted_modes_need_a_compensation(name):
    for dtype, rounding, needed in ((torch.bfloat16, "kahan", True), (torch.float32, "kahan", False)):
        param = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = MAKERS[name]([param], 1e-3, rounding=rounding)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert ("compensation" in optimizer.state[param]) == needed


@pytest.mark.parametrize("dtype", LOW)
def test_the_compiled_step_of_gains_rounds_to_nearest_only(dtype):
    def step(**options):
        param = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = EGStepSize("sgdm", [param], 0.1, **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        return param.detach()

    for mode in ("stochastic", "kahan"):
        with pytest.raises(RuntimeError, match=f"to nearest only, not by .'{mode}'"):
            step(fused=True, rounding=mode)
    assert torch.equal(step(rounding="nearest"), step(rounding="nearest", foreach=False))


@pytest.mark.parametrize("option", [{"rounding": "kahan"}, {"seed": 1}])
def test_around_an_optimizer_the_rounding_is_its_own(option):
    inner = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=f"{next(iter(option))} belongs to the inner optimizer"):
        EGStepSize(inner, **option)


@pytest.mark.parametrize("rounding", [None, "nearest"])
def test_distributions_are_rounded_to_nearest(rounding):
    param = nn.Parameter(torch.full((4, 8), 0.125, dtype=torch.bfloat16))
    exact = nn.Parameter(param.detach().float())
    for p, options in ((param, {"rounding": rounding}), (exact, {})):
        optimizer = ExponentiatedGradient([p], lr=0.3, mode="simplex", **options)
        p.grad = torch.linspace(-1, 1, 32).to(torch.bfloat16).view(4, 8).to(p.dtype)
        optimizer.step()
        assert not optimizer.state
    assert torch.equal(param.detach(), exact.detach().to(torch.bfloat16))


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_nonnegative_parameters_stay_nonnegative(foreach, rounding):
    values = torch.cat([torch.zeros(8), torch.logspace(-38, 2, 248)]).to(torch.bfloat16)
    param = nn.Parameter(values)
    optimizer = ExponentiatedGradient([param], lr=1.0, rounding=rounding, foreach=foreach)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        param.grad = torch.randn(256, generator=generator).to(torch.bfloat16)
        optimizer.step()
    assert (param >= 0).all()
    assert (param[:8] == 0).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_the_path_of_accelerators_rounds_as_the_loop_does(rounding):
    """Run on the CPU, with the writers of one step after the other."""
    ones, twos = ([nn.Parameter(torch.linspace(0.1, 2, 64).to(torch.bfloat16))] for _ in range(2))
    first = ExponentiatedGradient(ones, lr=0.01, rounding=rounding, foreach=False)
    second = ExponentiatedGradient(twos, lr=0.01, rounding=rounding)
    for counts in (second._nonfinite_counts, second._clamp_counts):
        counts[twos[0]] = torch.zeros((), dtype=torch.int64)
    for step in range(4):
        gradient = torch.randn(64, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        ones[0].grad, twos[0].grad = gradient, gradient.clone()
        group = second.param_groups[0]
        with torch.no_grad():
            second._bucket(twos, group, 0.01, True, second._writers(group, 0))
        group["step"] += 1
        first.step()
        assert torch.equal(ones[0], twos[0])


def test_the_function_wants_a_compensation_for_kahan():
    w, m, v, n = torch.ones(2, dtype=torch.bfloat16), torch.zeros(2), torch.zeros(2), torch.zeros(())
    with pytest.raises(ValueError, match="compensations must hold a tensor for parameter 0"):
        folded_adamw([w], [w.clone()], [m], [v], [n], lr=0.1, rounding=Rounding("kahan"))
