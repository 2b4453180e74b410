"""What every diagnostic promises: it looks and does not touch."""

import dataclasses
import inspect

import pytest
import torch

import danlu.diagnostics as family

X = [1.0, 10.0, 100.0, 1000.0, 10000.0]
RESULTS = [name for name in family.__all__ if dataclasses.is_dataclass(getattr(family, name))]


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_frozen(name):
    assert getattr(family, name).__dataclass_params__.frozen


def test_no_gradient_side_effects():
    x = torch.tensor(X, requires_grad=True)
    y = (1 + 2 * x**-0.5).requires_grad_()
    fit = family.fit_power_law(x, y, bootstrap=5)
    assert not fit.replicates.requires_grad
    assert not fit.predict(x).requires_grad
    assert not family.QuantaModel(1.0).loss(x).requires_grad
    losses = torch.rand(5, 2, requires_grad=True)
    assert not family.learning_times(x, losses).requires_grad
    assert x.grad is None
    model = torch.nn.Linear(8, 1)
    family.MultitaskSparseParity(4, 8, 2, 0.5).evaluate(lambda task, bits: model(bits.float())[:, 0])
    assert all(p.grad is None for p in model.parameters())


def test_functions_take_options_by_keyword():
    for name in family.__all__:
        target = getattr(family, name)
        if inspect.isfunction(target):
            for parameter in inspect.signature(target).parameters.values():
                assert (parameter.default is parameter.empty) != (parameter.kind is parameter.KEYWORD_ONLY), name
