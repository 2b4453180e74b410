"""Checkpoints and copies of earlier versions, whose groups know fewer options."""

import copy
import pickle

import pytest
import torch
from torch import nn

from danlu import optim
from danlu.optim import EGSGD, Amos, EGStepSize, ExponentiatedGradient, FoldedAdamW, Lion, Tiger

LATER = ("rounding", "seed", "step", "shrink")
MAKERS = {
    "amos": lambda params: Amos(params, lr=0.05, scales=0.5),
    "eg": lambda params: ExponentiatedGradient(params, lr=0.05, mode="signed"),
    "eg_sgd": lambda params: EGSGD(params, lr=0.05),
    "folded_adamw": lambda params: FoldedAdamW(params, lr=0.05, grad_accum_steps=2),
    "lion": lambda params: Lion(params, lr=0.05),
    "step_size_adam": lambda params: EGStepSize("adam", params, lr=0.05),
    "step_size_sgdm": lambda params: EGStepSize("sgdm", params, lr=0.05),
    "step_size_wrapped": lambda params: EGStepSize(torch.optim.AdamW(params, lr=0.05)),
    "tiger": lambda params: Tiger([{"params": params, "kind": "matrix"}], lr=0.05),
}
every = pytest.mark.parametrize("name", MAKERS)


def start(dtype):
    return nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).to(dtype))


def train(optimizer, steps, first=0):
    (param,) = optimizer.param_groups[0]["params"]
    for step in range(first, first + steps):
        param.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)).to(param.dtype)
        optimizer.step()
    return param.detach().clone()


def without_later(name, groups):
    later = (*LATER, "fused") if name.startswith("step_size") else LATER
    if name == "tiger":
        later = tuple(key for key in later if key != "shrink")
    return [{key: value for key, value in group.items() if key not in later} for group in groups]


@every
@pytest.mark.parametrize(("dtype", "done"), [(torch.float32, 3), (torch.bfloat16, 0)])
def test_a_checkpoint_without_later_options_loads(name, dtype, done):
    """In bfloat16 the random bits of the rounding are those of a fresh start, whose count of steps is 0 as well."""
    first = MAKERS[name]([start(dtype)])
    found = train(first, done)
    saved = copy.deepcopy(first.state_dict())
    saved["param_groups"] = without_later(name, saved["param_groups"])
    param = start(dtype)
    second = MAKERS[name]([param])
    second.load_state_dict(saved)
    with torch.no_grad():
        param.copy_(found)
    assert second.param_groups[0].keys() == first.param_groups[0].keys()
    assert torch.equal(train(first, 4, done), train(second, 4, done))


@every
@pytest.mark.parametrize(("dtype", "done"), [(torch.float32, 3), (torch.bfloat16, 0)])
def test_a_pickle_without_later_options_goes_on(name, dtype, done):
    if name == "step_size_wrapped":
        pytest.skip("its groups are those of the inner optimizer")
    first = MAKERS[name]([start(dtype)])
    train(first, done)
    state = copy.deepcopy(first.__getstate__())
    state["param_groups"] = without_later(name, state["param_groups"])
    (state["defaults"],) = without_later(name, [state["defaults"]])
    second = type(first).__new__(type(first))
    second.__setstate__(state)
    assert second.param_groups[0].keys() == first.param_groups[0].keys()
    assert torch.equal(train(first, 4, done), train(second, 4, done))


def test_a_pickle_finds_its_class_where_it_was():
    for path in ("_step_size:EGSGD", "_step_size:EGStepSize", "_exponentiated_gradient:ExponentiatedGradient"):
        module, _, name = path.partition(":")
        # A pickle names the module and the class.
        text = f"cdanlu.optim.{module}\n{name}\n."
        assert pickle.loads(text.encode()) is getattr(optim, name)


@every
def test_a_round_trip_leaves_the_groups_as_they_were(name):
    optimizer = MAKERS[name]([start(torch.float32)])
    train(optimizer, 2)
    for _ in range(2):
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        assert str(optimizer.state_dict()) == str(saved)
    twin = copy.deepcopy(optimizer)
    assert [group.keys() for group in twin.param_groups] == [group.keys() for group in optimizer.param_groups]


def test_groups_of_a_wrapped_optimizer_get_no_options_of_rounding():
    optimizer = MAKERS["step_size_wrapped"]([start(torch.float32)])
    optimizer.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    for group in (optimizer.param_groups[0], twin.param_groups[0], twin.inner.param_groups[0]):
        assert not set(LATER) & group.keys()
