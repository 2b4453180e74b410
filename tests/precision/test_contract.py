"""What every member of the family promises: float32 parameters stay so, inputs are not changed, options are kept."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import danlu.precision as family
from danlu.precision import TrainStep, audit_precision, precision_report

RECORDS = {"CompileReport", "Finding", "ModeReport", "PrecisionReport", "StepRecord"}


def test_family_is_covered():
    assert set(family.__all__) == RECORDS | {"TrainStep", "audit_precision", "mask_value", "precision_report"}
    for name in RECORDS:
        assert dataclasses.is_dataclass(getattr(family, name))


@pytest.mark.parametrize("name", ["TrainStep", "audit_precision", "precision_report"])
def test_options_are_keyword_only_and_none_is_swallowed(name):
    parameters = inspect.signature(getattr(family, name)).parameters.values()
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters)
    assert sum(one.kind is inspect.Parameter.KEYWORD_ONLY for one in parameters) >= 2


def loss(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "auto"])
def test_parameters_and_state_stay_float32_and_the_batch_is_not_changed(precision):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(3, 4)
    before = x.clone()
    step = TrainStep(model, loss, optimizer, precision=precision)
    result, record = step(x)
    while record.skipped:
        # The scale of float16 starts too large here.
        result, record = step(x)
    assert torch.equal(x, before)
    assert result.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {value.dtype for entry in optimizer.state.values() for value in entry.values()} == {torch.float32}
    assert record.grad_norm.dtype == torch.float32


def test_nothing_global_is_left_behind():
    def settings():
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_grad_enabled(),
        )

    before = settings()

    def make_step(precision, compile):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        return TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), precision=precision)

    precision_report(make_step, [torch.ones(2, 4)], modes=("fp32", "bf16", "fp16"), steps=4)
    audit_precision(nn.Linear(4, 4), torch.ones(2, 4))
    assert settings() == before
