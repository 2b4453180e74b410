"""The tasks measure what they say, and every trial runs at its smallest size."""

import math

import pytest
import torch
from torch.nn import functional as F

from danlu.lab.errors import TrialError
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.byte_lm import ByteLM
from danlu.lab.tasks.digits import Digits, calibration_error
from danlu.lab.tasks.optimizers import make_optimizer, set_learning_rate
from danlu.lab.tasks.training import generator, training_device
from danlu.lab.trial import trial_names

SMALL = {"context": 16, "batch_size": 4, "width": 16, "layers": 1, "heads": 2}


def options(task, **changes):
    return {**task.fit_options, **task.evaluate_options, **changes}


def fitted(task, steps=3, **changes):
    chosen = options(task, **changes)
    fit = task.start(seed=0, steps=steps, options=chosen)
    points = [fit.step(i) for i in range(steps)]
    return fit, chosen, points


def test_generator_is_a_function_of_its_name():
    first, again, other = (torch.rand(3, generator=generator("a", 1, n)) for n in (2, 2, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("task", [ByteLM(), Digits()], ids=lambda task: task.name)
def test_fit_is_a_function_of_its_seed_and_resumes_bit_for_bit(task):
    changes = SMALL if isinstance(task, ByteLM) else {"width": 16, "batch_size": 450}
    whole, chosen, points = fitted(task, 6, **changes)
    half = task.start(seed=0, steps=6, options=chosen)
    for i in range(3):
        assert half.step(i) == points[i]
    # Restored into a fit of another seed's initial weights: nothing may be left of those.
    rest = task.start(seed=0, steps=6, options=chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for (name, first), second in zip(whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    other = task.start(seed=1, steps=6, options=chosen)
    assert other.step(0) != points[0]


def test_untrained_byte_model_knows_nothing_and_modes_agree_within_the_training_length():
    task = ByteLM()
    fit, chosen, _ = fitted(task, 1, **SMALL)
    found = {}
    for mode in ("rope", "rerope", "window"):
        changed = {**chosen, "attention": mode, "window": 1.0, "reach": 4, "windows": 8}
        found[mode] = task.evaluate(fit, seed=0, split="test", options=changed)
    assert list(found["rope"]) == [
        "bits_per_byte",
        "bits_per_byte@1x",
        "bits_per_byte@2x",
        "bits_per_byte@4x",
        "optimizer_bytes_per_parameter",
    ]
    assert 7.5 < found["rope"]["bits_per_byte"] < 9.0
    for mode in ("rerope", "window"):
        assert found[mode]["bits_per_byte@1x"] == pytest.approx(found["rope"]["bits_per_byte@1x"], abs=1e-5)
        assert found[mode]["bits_per_byte@4x"] != pytest.approx(found["rope"]["bits_per_byte@4x"], abs=1e-4)
    assert found["rope"]["optimizer_bytes_per_parameter"] == 8.0


def test_bits_per_byte_by_hand():
    task = ByteLM()
    fit, chosen, _ = fitted(task, 1, **SMALL)
    value = task.evaluate(fit, seed=0, split="test", options={**chosen, "windows": 3})["bits_per_byte"]
    text = torch.frombuffer(
        bytearray(b"\n".join(__import__("danlu.lab.data", fromlist=["x"]).python_source().test)), dtype=torch.uint8
    )
    starts = torch.randint(len(text) - 16, (3, 1), generator=generator("test", 16))
    windows = text[starts + torch.arange(17)].long()
    with torch.no_grad():
        loss = F.cross_entropy(fit.model(windows[:, :-1]).transpose(1, 2), windows[:, 1:])
    assert value == pytest.approx(float(loss) / math.log(2), rel=1e-6)


def test_digits_metrics_by_hand():
    confidence = torch.tensor([0.9, 0.95, 0.5, 0.52], dtype=torch.float64)
    correct = torch.tensor([True, False, True, False])
    # 0.9 is in bin 13 of 15, 0.95 in bin 14, 0.5 and 0.52 share bin 7.
    expected = (abs(1 - 0.9) + abs(0 - 0.95) + abs(1 - 1.02)) / 4
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    fit, chosen, _ = fitted(Digits(), 9, width=16)
    metrics = Digits().evaluate(fit, seed=0, split="test", options=chosen)
    assert len(metrics) == 6
    assert 0 <= metrics["accuracy@last_step"] <= 1
    assert metrics["negative_log_likelihood@last_step"] > 0


def test_early_stopping_keeps_the_best_validation_epoch():
    fit, _, points = fitted(Digits(), 45, width=16, lr=0.02, label_noise=0.4)
    best = max(point["validation_accuracy"] for point in points if "validation_accuracy" in point)
    assert fit.memory["accuracy"] == best


def test_schedule():
    model = torch.nn.Linear(2, 2)
    chosen = {"optimizer": "tiger", "lr": 2.0, "weight_decay": 0.01, "warmup": 0.1}
    optimizer = make_optimizer(model, chosen)
    rates = []
    for step in range(100):
        set_learning_rate(optimizer, chosen, step, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0)
    assert rates[9] == max(rates)
    assert 0 < rates[-1] < 0.05


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        (ByteLM(), {**SMALL, "optimizer": "adam"}),
        (Digits(), {"loss": "hinge"}),
    ],
)
def test_unknown_choice(task, changes):
    with pytest.raises(TrialError, match="known: "):
        fitted(task, 1, **changes)


def test_no_cuda_device_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(TrialError, match="CUDA device"):
        training_device({"device": "cuda"})


@pytest.mark.trial
@pytest.mark.parametrize("name", trial_names())
def test_every_trial_runs_at_ci_size(tmp_path, name):
    with Store(tmp_path) as store:
        outcome = run_trial(name, size="ci", store=store)
    assert len(outcome.seeds) >= 3
    for arm in outcome.arms:
        for metric, values in arm.metrics.items():
            assert all(math.isfinite(value) for value in values.values()), (arm.name, metric)
    if name == "attention/rerope":
        wanted = {f"bits_per_byte@{multiple}x" for multiple in (1, 2, 4, 8)}
        assert all(wanted <= arm.metrics.keys() for arm in outcome.arms)
        assert all(cost.shared for arm in outcome.arms for cost in arm.costs.values())
