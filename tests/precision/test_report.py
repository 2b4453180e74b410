"""The report measures what it says: times, memory, losses, underflow and activations of known size."""

import json
import math

import pytest
import torch
from torch import nn

import danlu.precision._report as report_module
from danlu.precision import ModeReport, PrecisionReport, TrainStep, precision_report
from danlu.precision._probe import MemoryPeak, largest_activations, parameter_gradients, underflow


def square_loss(model, x):
    return model(x).float().square().mean()


def maker(build, loss=square_loss, lr=0.01, **options):
    def make_step(precision, compile):
        torch.manual_seed(0)
        model = build()
        backend = {"backend": "aot_eager"} if compile else False
        return TrainStep(
            model, loss, torch.optim.SGD(model.parameters(), lr=lr), precision=precision, compile=backend, **options
        )

    return make_step


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


BATCHES = [torch.randn(6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_table_and_dictionary():
    modes = ("fp32", "tf32", "bf16", "fp16", "bf16+compile")
    report = precision_report(maker(mlp), BATCHES, modes=modes, steps=6)
    # No TF32 on a CPU.
    expected = [mode for mode in modes if mode != "tf32" or torch.cuda.is_available()]
    assert list(report.modes) == expected
    base = report.modes["fp32"]
    assert (base.speed_up, base.break_even, base.loss_difference, base.skipped, base.scale) == (1.0, 0.0, 0.0, 0, 1.0)
    assert base.underflow == dict.fromkeys(["0.weight", "0.bias", "2.weight", "2.bias"], 0.0)
    for mode in expected[1:]:
        one = report.modes[mode]
        assert 0 < one.loss_difference < 0.02
        assert len(one.losses) == 6
        assert one.scale == (65536.0 if mode == "fp16" else 1.0)
        assert one.speed_up == pytest.approx(base.step_seconds / one.step_seconds)
    assert report.modes["bf16+compile"].peak_memory is None
    assert base.peak_memory > 0
    text = str(report)
    rows = text.splitlines()
    assert rows[0].startswith("6 steps on ")
    for mode, row in zip(expected, rows[2:], strict=False):
        assert row.startswith(mode)
    for word in ("speed-up", "break-even", "memory", "loss diff.", "underflow", "first step", "skipped", "scale"):
        assert word in rows[1]
    plain = report.to_dict()
    assert json.loads(json.dumps(plain))["modes"]["fp16"]["losses"] == list(report.modes["fp16"].losses)


def test_losses_are_those_of_a_plain_loop_and_probes_leave_no_trace():
    def build():
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 4))

    report = precision_report(maker(build), BATCHES, modes=("fp32",), steps=5)
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    expected = []
    for index in range(5):
        optimizer.zero_grad()
        loss = square_loss(model, BATCHES[index % 3])
        loss.backward()
        optimizer.step()
        expected.append(float(loss))
    assert report.modes["fp32"].losses == tuple(expected)


class Clock:
    """Stands for the module `time`; models let it go on."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_speed_up_and_break_even_of_known_times(monkeypatch):
    """6 seconds in float32; under autocast 2 after a first call of 30, or 8 where it is slower."""
    clock = Clock()
    monkeypatch.setattr(report_module, "time", clock)

    def build(half_seconds, first_seconds):
        class Timed(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(8, 4)
                self.calls = 0

            def forward(self, x):
                # The probe of the first step is the first call.
                self.calls += 1
                half = torch.is_autocast_enabled("cpu")
                clock.now += (first_seconds if self.calls == 2 else half_seconds) if half else 6.0
                return self.linear(x)

        return Timed

    fast = precision_report(maker(build(2.0, 30.0)), BATCHES, modes=("bf16",), steps=6).modes["bf16"]
    assert (fast.step_seconds, fast.speed_up, fast.first_step_seconds) == (2.0, 3.0, 30.0)
    # 24 seconds more at first, 4 less in every step.
    assert fast.break_even == 6.0
    slow = precision_report(maker(build(8.0, 8.0)), BATCHES, modes=("bf16",), steps=4)
    assert slow.modes["bf16"].speed_up == 0.75
    assert slow.modes["bf16"].break_even == math.inf
    assert "never" in str(slow)


def test_underflow_is_counted_per_parameter():
    """The second layer's gradients are a factor 1e-3 below float16's range, the first one's are not."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.large = nn.Linear(8, 4)
            self.small = nn.Linear(8, 4)

        def forward(self, x):
            return torch.cat((self.large(x).float(), self.small(x).float() * 1e-9), -1)

    report = precision_report(
        maker(Two, loss=lambda model, x: model(x).sum(), loss_scale=None),
        BATCHES,
        modes=("fp16", "bf16"),
        steps=4,
    )
    found = report.modes["fp16"].underflow
    assert found["small.weight"] == 1.0
    assert found["small.bias"] == 1.0
    assert found["large.weight"] < 0.1
    assert report.modes["bf16"].underflow["small.weight"] == 0.0
    assert "fp16: most underflow in small." in str(report)
    scaled = precision_report(
        maker(Two, loss=lambda model, x: model(x).sum(), loss_scale=1e6), BATCHES, modes=("fp16",), steps=4
    )
    assert scaled.modes["fp16"].underflow["small.weight"] < 0.1


def test_underflow_by_hand():
    exact = {"w": torch.tensor([1e-3, 1e-6, 1e-9, 0.0, 1e-39])}
    half = {"w": exact["w"].half().float()}
    # 1e-6 is subnormal and 1e-9 is zero; 0 and 1e-39 are nothing that the mode has lost.
    assert underflow(exact, half, torch.float16) == {"w": pytest.approx(0.4)}
    # Not all are numbers of float16, so the gradient has not been through it, and only zeros count.
    assert underflow(exact, {"w": torch.tensor([1.1e-3, 1e-6, 0.0, 0.0, 0.0])}, torch.float16) == {
        "w": pytest.approx(0.2)
    }
    assert underflow(exact, exact, torch.float32) == {"w": 0.0}
    assert underflow({"empty": torch.zeros(0)}, {"empty": torch.zeros(0)}, torch.float16) == {}


def test_activations_are_relative_to_the_range_of_the_mode():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 1, bias=False)
            nn.init.constant_(self.linear.weight, 5000.0)

        def forward(self, x):
            return self.linear(x) * 1e-4

    report = precision_report(maker(Large, lr=0.0), [torch.ones(2, 8)], modes=("fp16", "bf16"), steps=4)
    assert report.modes["fp16"].activations["linear"] == pytest.approx(40000 / 65504, rel=1e-3)
    assert report.modes["bf16"].activations["linear"] < 1e-30
    assert report.modes["fp32"].activations["(model)"] == pytest.approx(4 / torch.finfo(torch.float32).max, rel=1e-3)
    assert "fp16: linear reaches 61% of the largest number" in str(report)


def test_skipped_steps_and_final_scale():
    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            return self.linear(x) * 100

    report = precision_report(maker(Overflows, lr=1e-5), BATCHES, modes=("fp16",), steps=6)
    one = report.modes["fp16"]
    assert one.skipped > 0
    assert one.scale == 65536.0 / 2**one.skipped


def test_memory_by_hand():
    x = torch.randn(1000)
    with MemoryPeak() as memory:
        a = x + 1
        b = a + 1
        del a
        c = b * 2
        c.add_(1)
        view = c[:10]
        del b
        d = x + 3
    assert memory.peak == 8000
    assert view is not None
    assert d is not None
    with MemoryPeak() as memory:
        kept = [x + i for i in range(5)]
    assert memory.peak == 20000
    assert len(kept) == 5


def test_half_activations_take_less_memory():
    def build():
        return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))

    report = precision_report(maker(build), [torch.randn(512, 64)], modes=("bf16",), steps=4)
    assert report.modes["bf16"].peak_memory < 0.8 * report.modes["fp32"].peak_memory


def test_probe_helpers():
    model = mlp()
    grads = parameter_gradients(model, lambda: square_loss(model, BATCHES[0]), 4.0)
    square_loss(model, BATCHES[0]).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(grads[name], 4 * param.grad)
    with largest_activations(model) as found:
        model(BATCHES[0])
        model(BATCHES[0] * math.nan)
    assert math.isnan(found["0"])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"modes": ("fp8",)}, ValueError, "a mode without '\\+compile' must be one of 'fp32', 'tf32', .* got 'fp8'"),
        ({"modes": ("bf16+compiled",)}, ValueError, "got 'bf16\\+compiled'"),
        ({"batches": []}, ValueError, "batches must have at least one batch"),
        ({"steps": 3}, ValueError, "steps must be at least 4, got 3"),
        ({"make_step": lambda precision, compile: None}, TypeError, "must return a TrainStep, got NoneType"),
    ],
)
def test_bad_arguments(changes, error, match):
    arguments = {"make_step": maker(mlp), "batches": BATCHES, "modes": ("fp32",), "steps": 4} | changes
    with pytest.raises(error, match=match):
        precision_report(arguments.pop("make_step"), arguments.pop("batches"), **arguments)


def test_models_must_start_alike():
    def make_step(precision, compile):
        model = mlp()
        return TrainStep(model, square_loss, torch.optim.SGD(model.parameters(), lr=0.1), precision=precision)

    with pytest.raises(ValueError, match="the models of modes 'fp32' and 'bf16' do not start alike"):
        precision_report(make_step, BATCHES, modes=("bf16",))


def test_plain_data():
    one = ModeReport("fp32", 1.0, 1.0, 1.0, 0.0, None, (2.0,), 0.0, {}, {}, 0, 1.0)
    assert PrecisionReport({"fp32": one}, "cpu", 4).to_dict()["modes"]["fp32"]["mode"] == "fp32"
