"""FoldedAdamW and equivalent_beta: where they are exact, and how far off they are elsewhere."""

import io
import math

import pytest
import torch
from torch import nn

from danlu.optim import FoldedAdamW, Lion, Tiger, equivalent_beta, folded_adamw

DOUBLE = torch.float64


def noise(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(shape=(5, 3), dtype=DOUBLE):
    start = noise(*shape, seed=99, dtype=dtype)
    return nn.Parameter(start.clone()), nn.Parameter(start.clone())


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_one_micro_batch_is_adamw(foreach, maximize):
    ours, theirs = pair()
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2, "maximize": maximize}
    first, second = FoldedAdamW([ours], foreach=foreach, **options), torch.optim.AdamW([theirs], **options)
    for step in range(20):
        ours.grad = theirs.grad = noise(5, 3, seed=step)
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_equal_micro_gradients_are_exact(k):
    """The square of the mean is the mean of the squares when there is nothing to average."""
    ours, theirs = pair()
    first = FoldedAdamW([ours], lr=0.03, weight_decay=0.1, grad_accum_steps=k)
    second = torch.optim.AdamW([theirs], lr=0.03, weight_decay=0.1)
    for cycle in range(10):
        theirs.grad = noise(5, 3, seed=cycle)
        second.step()
        for _ in range(k):
            ours.grad = theirs.grad.clone()
            first.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_first_moment_is_exact_and_second_is_the_mean_of_squares(k):
    ours, theirs = pair()
    first = FoldedAdamW([ours], betas=(0.9, 0.99), grad_accum_steps=k)
    second = torch.optim.AdamW([theirs], betas=(0.9, 0.99))
    squares = torch.zeros(5, 3, dtype=DOUBLE)
    for cycle in range(6):
        micro = noise(k, 5, 3, seed=cycle)
        theirs.grad = micro.mean(0)
        second.step()
        squares = 0.99 * squares + 0.01 * micro.square().mean(0)
        for place, gradient in enumerate(micro):
            before = ours.detach().clone()
            ours.grad = gradient
            first.step()
            assert torch.equal(before, ours) == (place < k - 1)
    torch.testing.assert_close(first.state[ours]["exp_avg"], second.state[theirs]["exp_avg"], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(first.state[ours]["exp_avg_sq"], squares, rtol=1e-13, atol=1e-15)


def test_steps_on_noise_are_shorter_by_the_root_of_k():
    """For independent gradients of mean 0 the mean of squares is k times the square of the mean."""
    k, n = 16, 20000
    ours, theirs = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))
    options = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    first, second = FoldedAdamW([ours], grad_accum_steps=k, **options), torch.optim.AdamW([theirs], **options)
    for cycle in range(40):
        micro = noise(k, n, seed=cycle, dtype=torch.float32)
        theirs.grad = micro.mean(0)
        before = ours.detach().clone(), theirs.detach().clone()
        second.step()
        for gradient in micro:
            ours.grad = gradient
            first.step()
    lengths = [(now - old).norm().item() for now, old in zip((ours, theirs), before, strict=True)]
    assert lengths[1] / lengths[0] == pytest.approx(math.sqrt(k), rel=0.05)


def test_example_by_hand():
    w = nn.Parameter(torch.tensor([1.0], dtype=DOUBLE))
    optimizer = FoldedAdamW([w], lr=0.1, weight_decay=0.5, eps=0.0, grad_accum_steps=2)
    for gradient in (1.0, 3.0):
        w.grad = torch.tensor([gradient], dtype=DOUBLE)
        optimizer.step()
    assert w.item() == pytest.approx(1 - 0.1 * (2 / math.sqrt(5) + 0.5), rel=1e-14)


@pytest.mark.parametrize("k", [1, 3])
def test_foreach_equals_the_loop_within_cycles_and_with_holes(k):
    found = {}
    for foreach in (True, False):
        params = [nn.Parameter(noise(*shape, seed=7)) for shape in ((), (7,), (4, 3), (0,))]
        optimizer = FoldedAdamW(params, lr=0.02, grad_accum_steps=k, foreach=foreach)
        for step in range(10):
            for i, param in enumerate(params):
                # Gradients that are missing, or not finite, on some micro-steps.
                param.grad = None if (step + i) % 4 == 1 else noise(*param.shape, seed=step)
                if step == 4 and i == 2:
                    param.grad[0, 0] = math.inf
            optimizer.step()
        found[foreach] = [param.detach().clone() for param in params]
        assert list(optimizer.nonfinite_events.values()) == [1]
    for fast, slow in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_a_missing_micro_gradient_counts_as_zero():
    ours, theirs = pair()
    for param, absent in ((ours, None), (theirs, torch.zeros(5, 3, dtype=DOUBLE))):
        optimizer = FoldedAdamW([param], grad_accum_steps=3)
        for gradient in (noise(5, 3), absent, absent):
            param.grad = gradient
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_micro_gradient_leaves_the_moments_alone(bad):
    p, _ = pair()
    optimizer = FoldedAdamW([p], lr=0.1, grad_accum_steps=3, weight_decay=0.0)
    for step in range(3):
        p.grad = noise(5, 3, seed=step)
        before = p.detach().clone()
        if step == bad:
            p.grad[2, 1] = math.nan
        optimizer.step()
    assert p.isfinite().all()
    assert optimizer.state[p]["exp_avg"].isfinite().all()
    kept = [noise(5, 3, seed=step) for step in range(3) if step != bad]
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 / 3 * (kept[0] + kept[1]))
    # On the last micro-step the tensor's update of the cycle is lost.
    assert torch.equal(p, before) == (bad == 2)


def test_resume_within_a_cycle_is_exact():
    def run(stop):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(noise(*param.shape, seed=3, dtype=torch.float32))
        optimizer = FoldedAdamW(model.named_parameters(), lr=0.05, grad_accum_steps=3)
        for step in range(11):
            if step == stop:
                buffer = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), buffer)
                buffer.seek(0)
                weights, saved = torch.load(buffer, weights_only=True)
                model = nn.Linear(3, 2)
                model.load_state_dict(weights)
                optimizer = FoldedAdamW(model.named_parameters(), lr=0.9, grad_accum_steps=3)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            model(noise(4, 3, seed=step, dtype=torch.float32)).square().mean().backward()
            optimizer.step()
        return list(model.parameters())

    for first, second in zip(run(None), run(7), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_low_precision_parameters_are_float32_and_stay_so(dtype):
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = FoldedAdamW([p], lr=0.01)
    p.grad = torch.full((4,), 1e-4, dtype=dtype)
    optimizer.step()
    square = optimizer.state[p]["exp_avg_sq"]
    assert square.dtype == torch.float32
    assert (square > 0).all(), "1e-11 is below the range of float16"
    other = FoldedAdamW([nn.Parameter(torch.ones(4, dtype=dtype))])
    other.load_state_dict(optimizer.state_dict())
    (state,) = other.state.values()
    assert torch.equal(state["exp_avg_sq"], square)
    assert state["exp_avg_sq"].data_ptr() != square.data_ptr()


def test_the_cycle_may_change_between_cycles_only():
    p, _ = pair()
    optimizer = FoldedAdamW([p], grad_accum_steps=2)
    p.grad = noise(5, 3)
    optimizer.step()
    optimizer.param_groups[0]["grad_accum_steps"] = 3
    with pytest.raises(RuntimeError, match="grad_accum_steps changed from 2 to 3 within a cycle"):
        optimizer.step()
    optimizer.param_groups[0]["grad_accum_steps"] = 2
    optimizer.step()
    optimizer.param_groups[0]["grad_accum_steps"] = 3
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"betas": 0.9}, ValueError, "betas must be a pair of numbers"),
        ({"eps": -1e-8}, ValueError, "eps must be in"),
        ({"grad_accum_steps": 0}, ValueError, "grad_accum_steps must be at least 1, got 0"),
        ({"grad_accum_steps": 1.0}, TypeError, "grad_accum_steps must be an int"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of 'skip', 'shrink', 'raise', 'off'"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        FoldedAdamW([nn.Parameter(torch.ones(2))], **options)


def test_bad_calls():
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    w.grad = torch.ones_like(w)
    with pytest.raises(RuntimeError, match="does not support complex"):
        FoldedAdamW([w]).step()
    one = torch.ones(2)
    with pytest.raises(ValueError, match="the lists must have one length"):
        folded_adamw([one], [], [one], [one], [torch.zeros(())], lr=0.1)
    with pytest.raises(ValueError, match="share must be in"):
        folded_adamw([one], [one], [one], [one], [torch.zeros(())], lr=0.1, share=-1.0)
    with pytest.raises(ValueError, match="nonfinite must be one of 'skip', 'off'"):
        folded_adamw([one], [one], [one], [one], [torch.zeros(())], lr=0.1, nonfinite="raise")


@pytest.mark.parametrize(("beta", "k", "effective"), [(0.965, 4, 0.96546), (0.965, 16, 0.96557), (0.9, 4, 0.90369)])
def test_equivalent_beta_decays_a_cycle_as_beta_does_a_step(beta, k, effective):
    """The numbers are those of the beta to the power of k, which should be `beta`."""
    assert equivalent_beta(beta, k) ** k == pytest.approx(effective, abs=5e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.965, 0.999])
def test_equivalent_beta_is_at_the_limit_and_below_the_stated_bound(beta):
    assert equivalent_beta(beta, 1) == pytest.approx(beta, abs=1e-15)
    for k in (2, 8, 1000):
        assert 0 <= equivalent_beta(beta, k) ** k - beta < math.exp(beta - 1) - beta


def test_equivalent_beta_approximates_the_exact_fold():
    """Every eighth step of a signum with the equivalent beta, against Tiger, whose fold is exact."""
    k, n = 8, 4000
    exact, near = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))
    beta = equivalent_beta(0.965, k)
    # Vectors without decay: both take steps of one size along the sign of their momentum.
    group = {"params": [exact], "kind": "vector"}
    first = Tiger([group], lr=0.01, weight_decay=0.0, vector_scale=1.0, grad_accum_steps=k)
    second = Lion([near], lr=0.01, betas=(beta, beta))
    agreement = []
    for micro in range(30 * k):
        exact.grad = near.grad = noise(n, seed=micro, dtype=torch.float32) + 0.05
        last = (micro + 1) % k == 0
        second.param_groups[0]["lr"] = 0.01 if last else 0.0
        before = exact.detach().clone(), near.detach().clone()
        first.step()
        second.step()
        if last:
            signs = [(now.detach() - old).sign() for now, old in zip((exact, near), before, strict=True)]
            agreement.append((signs[0] == signs[1]).float().mean().item())
    assert 0.9 < sum(agreement) / len(agreement) < 1.0


@pytest.mark.parametrize(("beta", "k", "error"), [(1.0, 2, ValueError), (0.9, 0, ValueError), (0.9, 2.0, TypeError)])
def test_equivalent_beta_bad_arguments(beta, k, error):
    with pytest.raises(error, match=r"beta must be|grad_accum_steps must be"):
        equivalent_beta(beta, k)
