"""What every diagnostic promises: it only looks. Nothing has a graph, and no gradient or parameter changes."""

import copy
import dataclasses
import inspect

import pytest
import torch
from torch import Tensor, nn

import danlu.diagnostics as family
from danlu.diagnostics import gradient_penalty_bound

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


def test_embedding_health_has_no_side_effects():
    weight = torch.randn(5, 3, requires_grad=True)
    before, random = weight.detach().clone(), torch.get_rng_state()
    first, again = (family.embedding_health(weight, 0.01, counts=torch.arange(5)) for _ in range(2))
    assert first == again
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert torch.equal(random, torch.get_rng_state())


def test_concentration_has_no_graph():
    weights = torch.rand(3, 5, requires_grad=True)
    assert not family.attention_sparsity(weights).requires_grad
    assert not family.linear_attention_sparsity_bound(weights).requires_grad
    assert not family.sparsity_of_gaussian("exp", weights, weights).requires_grad
    assert weights.grad is None


def test_functions_take_options_by_keyword():
    for name in family.__all__:
        target = getattr(family, name)
        if inspect.isfunction(target):
            for parameter in inspect.signature(target).parameters.values():
                assert (parameter.default is parameter.empty) != (parameter.kind is parameter.KEYWORD_ONLY), name


def bound(model: nn.Module) -> list[Tensor]:
    found = gradient_penalty_bound(model, torch.ones(2, 3), lambda z: z.square().sum(1))
    return [value for value in vars(found).values() if isinstance(value, Tensor)]


# Every public function that looks at a model: model -> the tensors that it reports.
ON_MODELS = {"gradient_penalty_bound": bound}


@pytest.mark.parametrize("name", ON_MODELS)
def test_looking_changes_nothing(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        values = ON_MODELS[name](model)
    again = ON_MODELS[name](model)
    for first, second in zip(values, again, strict=True):
        assert not first.requires_grad
        assert torch.equal(first, second)
    for (key, old), new in zip(before.items(), model.state_dict().values(), strict=True):
        assert torch.equal(old, new), key
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert (parameter.grad == 7.0).all()
    assert torch.equal(random, torch.get_rng_state())
