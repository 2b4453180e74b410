"""The tasks of the further optimizer trials measure what they say."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from danlu.lab.data import python_source
from danlu.lab.errors import TrialError
from danlu.lab.tasks.accumulating_bytes import AccumulatingBytes
from danlu.lab.tasks.byte_mlp import ResidualMLP, bits_per_byte, byte_batch, symbols
from danlu.lab.tasks.byte_sweep import ByteSweep, log2_optimum
from danlu.lab.tasks.step_time import StepTime
from danlu.lab.tasks.stressed_digits import StressedDigits
from danlu.lab.tasks.training import generator
from danlu.lab.trial import find_trial

SWEEP = {"adamw_rates": "0.001 0.002", "lion_rates": "0.0005 0.001", "widths": "8 16", "context": 4, "batch_size": 8}
SMALL = {
    "byte_sweep": SWEEP,
    "accumulating_bytes": {"width": 8, "context": 4, "micro_batches": 2, "batch_size": 4},
    "stressed_digits": {"width": 8, "storage": "bfloat16", "rounding": "kahan", "bad_gradients": 0.2},
}
TASKS = [ByteSweep(), AccumulatingBytes(), StressedDigits()]


def options(task, **changes):
    return {**task.fit_options, **task.evaluate_options, **changes}


def fitted(task, steps, seed=0, **changes):
    chosen = options(task, **changes)
    fit = task.start(seed=seed, steps=steps, options=chosen)
    points = [fit.step(i) for i in range(steps)]
    return fit, chosen, points


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_fit_is_a_function_of_its_seed_and_resumes_bit_for_bit(task):
    whole, chosen, points = fitted(task, 6, **SMALL[task.name])
    half = task.start(seed=0, steps=6, options=chosen)
    for i in range(3):
        assert half.step(i) == points[i]
    rest = task.start(seed=0, steps=6, options=chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for (name, first), second in zip(whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    before, after = (task.evaluate(fit, seed=0, split="test", options=chosen) for fit in (whole, rest))
    assert before == after
    other = task.start(seed=1, steps=6, options=chosen)
    assert other.step(0) != points[0]


@pytest.mark.parametrize("how", ["folded", "in_backward"])
def test_accumulation_inside_tiger_resumes_bit_for_bit(how):
    changes = {**SMALL["accumulating_bytes"], "optimizer": "tiger", "accumulation": how}
    whole, chosen, points = fitted(AccumulatingBytes(), 4, **changes)
    half = AccumulatingBytes().start(seed=0, steps=4, options=chosen)
    first = [half.step(i) for i in range(2)]
    rest = AccumulatingBytes().start(seed=0, steps=4, options=chosen)
    rest.load(half.state())
    assert first + [rest.step(i) for i in range(2, 4)] == points
    for one, two in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, two)


# The data and the network.


def test_symbols():
    assert symbols(b" ~\n\t\xff").tolist() == [0, 94, 95, 96, 96]


def test_a_batch_is_windows_and_what_follows():
    windows, targets = byte_batch("test", 5, 7, generator("x"))
    assert windows.shape == (7, 5)
    text = symbols(b"\n".join(python_source().test))
    whole = torch.cat([windows, targets[:, None]], 1)
    places = torch.randint(len(text) - 5, (7,), generator=generator("x"))
    assert torch.equal(whole, torch.stack([text[p : p + 6].long() for p in places.tolist()]))


def test_bits_per_byte_by_hand():
    class Frequencies(nn.Module):
        """Knows the frequencies of the training text and nothing of the window."""

        def __init__(self):
            super().__init__()
            counts = torch.bincount(symbols(b"\n".join(python_source().train)).long(), minlength=97).double() + 1
            self.log_frequencies = (counts / counts.sum()).log()

        def forward(self, windows):
            return self.log_frequencies.expand(len(windows), -1)

    model = Frequencies()
    found = bits_per_byte(model, "test", 16, 16384)
    counts = torch.bincount(symbols(b"\n".join(python_source().test)).long(), minlength=97).double()
    entropy = -float((counts / counts.sum() * model.log_frequencies).sum()) / math.log(2)
    assert found == pytest.approx(entropy, abs=0.1)


def test_network_shapes():
    model = ResidualMLP(context=4, width=8)
    assert model(torch.randint(97, (3, 4))).shape == (3, 97)


# The sweep.


def test_members_of_one_width_start_alike_and_see_the_same_batches():
    fit, _, _ = fitted(ByteSweep(), 0, **SWEEP)
    names = list(fit.members)
    assert len(names) == 8
    twins = [fit.members[name] for name in names if "width 8" in name]
    assert all(torch.equal(twins[0].head.weight, other.head.weight) for other in twins)
    fit, _, points = fitted(ByteSweep(), 2, **{**SWEEP, "adamw_rates": "0", "lion_rates": "0", "widths": "8"})
    windows, targets = byte_batch("train", 4, 8, generator("batch", 0, 1))
    with torch.no_grad():
        for member in fit.members.values():
            assert float(F.cross_entropy(member(windows), targets)) == points[1]["train_loss"]


def test_a_step_has_several_updates():
    fit, _, _ = fitted(ByteSweep(), 2, **{**SWEEP, "updates": 3})
    state = next(iter(fit.optimizers.values())).state
    assert {float(entry["step"]) for entry in state.values()} == {6.0}


def test_sweep_metrics_by_hand():
    fit, chosen, _ = fitted(ByteSweep(), 1, **SWEEP)
    # What the members score is put in: validation, then test.
    table = {
        "lion width 16 rate 0.0005": (3.0, 3.1),
        "lion width 16 rate 0.001": (2.0, 2.2),
        "lion width 8 rate 0.0005": (4.0, 9.0),
        "lion width 8 rate 0.001": (4.5, 9.0),
        "adamw width 16 rate 0.001": (1.5, 1.9),
        "adamw width 16 rate 0.002": (1.9, 1.0),
        "adamw width 8 rate 0.001": (1.5, 9.0),
        "adamw width 8 rate 0.002": (1.9, 9.0),
    }
    for key, (validation, test) in table.items():
        assert key in fit.members
        fit._known |= {(key, "validation", 8192): validation, (key, "test", 8192): test}
    read = {**chosen, "read": "lion"}
    found = ByteSweep().evaluate(fit, seed=0, split="test", options=read)
    assert found == {
        "bits_per_byte": 2.2,
        "best_rate": 0.001,
        "best_is_interior": 0.0,
        "rate_octaves": 0.0,
        "excess_over_adamw": pytest.approx(0.3),
    }
    found = ByteSweep().evaluate(fit, seed=0, split="test", options={**read, "tuned_at": 8})
    assert found["best_rate"] == 0.0005
    assert found["bits_per_byte"] == 3.1
    assert found["rate_octaves"] == pytest.approx(1.0)
    found = ByteSweep().evaluate(fit, seed=0, split="test", options=chosen)
    assert found["bits_per_byte"] == 1.9
    assert found["excess_over_adamw"] == 0.0


def test_log2_optimum():
    rates = [0.25, 0.5, 1.0, 2.0, 4.0]
    exact = {rate: (math.log2(rate) - 0.3) ** 2 + 5 for rate in rates}
    assert log2_optimum(exact) == pytest.approx(0.3)
    falling = {rate: -rate for rate in rates}
    assert log2_optimum(falling) == 2.0
    diverged = {**exact, 2.0: math.nan}
    assert log2_optimum(diverged) == 0.0
    flat = dict.fromkeys(rates, 1.0)
    assert log2_optimum(flat) == -2.0
    assert log2_optimum({**exact, 0.25: math.inf, 0.5: math.nan}) == 0.0


# Half precision and bad gradients.


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_no_movement_is_lost_in_float32_and_some_is_in_half_precision(storage):
    fit, chosen, _ = fitted(StressedDigits(), 20, width=16, storage=storage, lr=0.001)
    found = StressedDigits().evaluate(fit, seed=0, split="test", options=chosen)
    assert {p.dtype for p in fit.model.parameters()} == {getattr(torch, storage)}
    if storage == "float32":
        assert abs(found["movement_lost"]) < 1e-4
        assert found["unchanged"] < 0.01
    elif storage == "bfloat16":
        assert found["movement_lost"] > 0.5
        assert found["unchanged"] > 0.7
    else:
        assert 0.02 < found["unchanged"] < 0.5


def test_stochastic_rounding_loses_single_updates_and_kahan_none():
    lost = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        changes = {"width": 32, "storage": "bfloat16", "lr": 0.001, "rounding": rounding}
        fit, chosen, _ = fitted(StressedDigits(), 20, **changes)
        lost[rounding] = StressedDigits().evaluate(fit, seed=0, split="test", options=chosen)
    assert lost["stochastic"]["unchanged"] > 0.3
    assert abs(lost["stochastic"]["movement_lost"]) < 0.05
    assert abs(lost["kahan"]["movement_lost"]) < 0.02
    assert lost["kahan"]["unchanged"] < 0.05
    assert lost["nearest"]["movement_lost"] > 0.5


def test_bad_gradients_come_at_their_rate_and_alike_in_all_arms():
    found = {}
    for mode in ("shrink", "skip"):
        fit, chosen, _ = fitted(StressedDigits(), 50, width=8, bad_gradients=0.1, nonfinite=mode)
        found[mode] = StressedDigits().evaluate(fit, seed=0, split="test", options=chosen)["bad_gradient_events"]
    assert found["shrink"] == found["skip"]
    # 300 draws at 10 %: mean 30, standard deviation 5.2.
    assert 12 < found["shrink"] < 48
    fit, chosen, _ = fitted(StressedDigits(), 5, width=8)
    assert StressedDigits().evaluate(fit, seed=0, split="test", options=chosen)["bad_gradient_events"] == 0


def test_off_freezes_a_tensor_that_met_nan():
    fit, _, _ = fitted(StressedDigits(), 3, width=8, bad_gradients=1.0, nonfinite="off")
    before = [p.detach().clone() for p in fit.model.parameters()]
    fit._bad = 0.0
    fit.step(2)
    decay_only = [torch.allclose(a, b, rtol=1e-3) for a, b in zip(before, fit.model.parameters(), strict=True)]
    assert all(decay_only)


# Accumulation.


def bytes_held(optimizer, accumulation, **changes):
    task = AccumulatingBytes()
    fit, chosen, _ = fitted(task, 2, optimizer=optimizer, accumulation=accumulation, width=16, **changes)
    parameters = [p.numel() for p in fit.model.parameters()]
    found = task.evaluate(fit, seed=0, split="test", options=chosen)["training_bytes_per_parameter"]
    return found, max(parameters) / sum(parameters)


@pytest.mark.parametrize(
    ("optimizer", "accumulation", "expected"),
    [
        ("adamw", "buffer", 12),
        ("lion", "buffer", 8),
        ("tiger", "folded", 8),
        ("folded_adamw", "folded", 12),
        ("adamw", "every_kth", 12),
    ],
)
def test_bytes_while_accumulating(optimizer, accumulation, expected):
    assert bytes_held(optimizer, accumulation)[0] == pytest.approx(expected, rel=1e-3)


def test_in_backward_holds_one_gradient_at_a_time_and_changes_nothing():
    found, largest = bytes_held("tiger", "in_backward")
    assert 4 < found <= 4 + 4 * largest + 1e-9
    chosen = {"optimizer": "tiger", "width": 8, "context": 4, "batch_size": 4}
    plain, _, _ = fitted(AccumulatingBytes(), 3, accumulation="folded", **chosen)
    inside, _, _ = fitted(AccumulatingBytes(), 3, accumulation="in_backward", **chosen)
    for (name, first), second in zip(plain.model.named_parameters(), inside.model.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_betas_and_rates_of_every_kth():
    fit, _, _ = fitted(AccumulatingBytes(), 1, accumulation="every_kth", micro_batches=4, width=8)
    assert fit.optimizer.param_groups[0]["betas"] == pytest.approx((1 - 0.1 / 4, 1 - 0.05 / 4))
    same, _, _ = fitted(AccumulatingBytes(), 1, accumulation="every_kth_same_beta", micro_batches=4, width=8)
    assert same.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    start = AccumulatingBytes().start(seed=0, steps=1, options=options(AccumulatingBytes(), width=8))
    moved = [(a - b).abs().max().item() for a, b in zip(start.model.parameters(), same.model.parameters(), strict=True)]
    # One update of at most lr, though the optimizer was called four times.
    assert 0 < max(moved) < 0.0115


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        (ByteSweep(), {**SWEEP, "read": "tiger"}),
        (ByteSweep(), {**SWEEP, "tuned_at": 99}),
        (StressedDigits(), {"storage": "float8"}),
        (AccumulatingBytes(), {"accumulation": "sometimes"}),
        (StepTime(), {"variant": "adam"}),
    ],
)
def test_unknown_choice(task, changes):
    def run():
        fit, chosen, _ = fitted(task, 1, **changes)
        task.evaluate(fit, seed=0, split="test", options=chosen)

    with pytest.raises(TrialError, match="known: "):
        run()


def test_refusals():
    with pytest.raises(TrialError, match="needs widths and the learning rates"):
        fitted(ByteSweep(), 1)
    with pytest.raises(TrialError, match="'lion' does not accumulate as 'folded'"):
        fitted(AccumulatingBytes(), 1, optimizer="lion", accumulation="folded")
    other, chosen, _ = fitted(StressedDigits(), 1, width=8)
    for task in (ByteSweep(), AccumulatingBytes(), StepTime()):
        with pytest.raises(TypeError, match="evaluates its own fits"):
            task.evaluate(other, seed=0, split="test", options=options(task))
    sweep, _, _ = fitted(ByteSweep(), 0, **SWEEP)
    with pytest.raises(TypeError, match="evaluates its own fits"):
        StressedDigits().evaluate(sweep, seed=0, split="test", options=chosen)


# The declarations.


def test_batch_sizes_see_equal_samples_or_take_equal_steps():
    _, trial = find_trial("lion_batch_size")
    for name, arm in trial.arms.items():
        samples = arm.options["updates"] * arm.options["batch_size"]
        if name.endswith("equal_steps"):
            assert arm.options["updates"] == 1
        else:
            assert samples == 256
        assert len(arm.options["adamw_rates"].split()) == len(arm.options["lion_rates"].split())


def test_arms_that_only_read_share_their_fits():
    for name, fits in (("lion_batch_size", 5), ("tiger_lr_transfer", 3)):
        _, trial = find_trial(name)
        distinct = {fit for arm in trial.arms for fit in trial.tuning_fits(arm, "report")}
        assert len(distinct) == fits


# Times.


def test_step_time_takes_medians_without_the_warmup():
    task = StepTime()
    fit, chosen, points = fitted(task, 10, variant="sgd_momentum_fused", width=8, blocks=1)
    assert points[-1]["milliseconds"] > 0
    fit.own, fit.other = [9.0, 9.0, *[0.002] * 7, 5.0], [1.0, 1.0, *[0.004] * 7, 1.0]
    found = task.evaluate(fit, seed=0, split="test", options=chosen)
    assert found == {
        "milliseconds_per_step": pytest.approx(2.0),
        "time_over_fused_adamw": pytest.approx(0.5),
        "optimizer_bytes_per_parameter": 4.0,
    }


@pytest.mark.parametrize("variant", ["adamw_fused", "adamw_foreach", "sgd_momentum_fused", "lion", "tiger"])
def test_step_time_resumes_and_keeps_its_times(variant):
    task = StepTime()
    half, chosen, _ = fitted(task, 3, variant=variant, width=8, blocks=1)
    rest = task.start(seed=0, steps=6, options=chosen)
    rest.load(half.state())
    assert (rest.own, rest.other) == (half.own, half.other)
    for fit in (half, rest):
        for i in range(3, 6):
            fit.step(i)
    assert len(rest.own) == len(rest.other) == 6
    for first, second in zip(half.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(first, second)
