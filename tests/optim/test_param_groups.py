"""Kinds, centers, overrides and errors of parameter groups."""

import re

import pytest
import torch
from torch import nn

from danlu.optim import Lion, parameter_groups


class RMSNorm(nn.Module):
    def __init__(self, size, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), value))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 4, padding_idx=2)
        self.places = nn.EmbeddingBag(5, 4)
        self.norm = nn.LayerNorm(4)
        self.gemma_norm = RMSNorm(4, 0.0)
        self.trained_norm = RMSNorm(4, 1.0)
        self.trained_norm.weight.data[0] = 2.0
        self.proj = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.tokens.weight
        self.gain = nn.Parameter(torch.tensor(3.0))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def by_name(groups):
    return {name: group for group in groups for name in group["param_names"]}


def test_kinds_centers_and_padding():
    found = by_name(parameter_groups(Net()))
    kinds = {name: group["kind"] for name, group in found.items()}
    assert kinds == {
        "tokens.weight": "embedding",
        "places.weight": "embedding",
        "norm.weight": "norm_scale",
        "norm.bias": "vector",
        "gemma_norm.weight": "norm_scale",
        "trained_norm.weight": "norm_scale",
        "proj.weight": "matrix",
        "proj.bias": "vector",
        "gain": "vector",
    }
    assert found["norm.weight"]["center"] == 1.0
    assert found["gemma_norm.weight"]["center"] == 0.0
    assert found["trained_norm.weight"]["center"] == 1.0
    assert found["proj.weight"]["center"] == 0.0
    assert found["tokens.weight"]["padding_idx"] == 2
    assert "padding_idx" not in found["places.weight"]


def test_every_trainable_parameter_once():
    net = Net()
    groups = parameter_groups(net)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in net.parameters() if p.requires_grad}
    assert all(len(group["params"]) == len(group["param_names"]) for group in groups)


@pytest.mark.parametrize("weight_decay", [None, 0.3])
def test_weight_decay(weight_decay):
    for group in parameter_groups(Net(), weight_decay=weight_decay):
        if group["kind"] in ("vector", "norm_scale"):
            assert group["weight_decay"] == 0.0
        else:
            assert group.get("weight_decay") == weight_decay


def test_options_by_kind_and_by_name():
    groups = parameter_groups(
        Net(),
        kinds={"embedding": {"lr": 0.5}},
        overrides={"*.bias": {"weight_decay": 0.1}, re.compile(r"^proj\.w"): "embedding", "gain": {"lr": 7.0}},
    )
    found = by_name(groups)
    assert found["tokens.weight"]["lr"] == 0.5
    assert found["norm.bias"]["weight_decay"] == found["proj.bias"]["weight_decay"] == 0.1
    assert found["proj.weight"]["kind"] == "embedding"
    assert found["proj.weight"]["lr"] == 0.5
    assert found["gain"]["lr"] == 7.0
    optimizer = Lion(groups, lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups if "gain" in group["param_names"]] == [7.0]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kinds": {"bias": {}}}, ValueError, "kinds must be one of"),
        ({"overrides": {"*.bias": "offset"}}, ValueError, "overrides.*must be one of"),
        ({"overrides": {"*.biass": {}}}, ValueError, r"match no trainable parameter: '\*\.biass'"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be in"),
        ({"model": nn.ReLU()}, ValueError, "ReLU has no trainable parameters"),
        ({"model": [nn.Linear(1, 1)]}, TypeError, r"model must be a torch\.nn\.Module, got list"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        parameter_groups(**{"model": Net(), **options})
