"""The expected scales: every rule, what follows an activation, ties, overrides, errors."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from danlu.optim import amos_scales


def gain(scales, name, fan_in):
    return scales[name] ** 2 * fan_in


def test_rules_by_module():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(11, 8),
            "bag": nn.EmbeddingBag(5, 18),
            "linear": nn.Linear(16, 3),
            "conv": nn.Conv2d(6, 4, 3, groups=2),
            "up": nn.ConvTranspose2d(6, 4, 4, stride=2, groups=2),
            "bilinear": nn.Bilinear(3, 5, 2),
            "norm": nn.LayerNorm(8),
            "rms": nn.RMSNorm(8),
            "group": nn.GroupNorm(2, 8),
            "rnn": nn.LSTM(7, 5),
            "attention": nn.MultiheadAttention(12, 3),
        }
    )
    scales = amos_scales(model)
    assert set(scales) == {name for name, _ in model.named_parameters()}
    expected = {
        "embedding.weight": math.sqrt(2 / 8),
        "bag.weight": math.sqrt(2 / 18),
        "linear.weight": math.sqrt(1 / 16),
        "linear.bias": 0.5,
        "conv.weight": math.sqrt(1 / 27),
        "up.weight": math.sqrt(1 / (3 * 16 / 4)),
        "bilinear.weight": math.sqrt(1 / 15),
        "norm.weight": 1.0,
        "norm.bias": 0.5,
        "rms.weight": 1.0,
        "group.weight": 1.0,
        "rnn.weight_ih_l0": math.sqrt(1 / 7),
        "rnn.weight_hh_l0": math.sqrt(1 / 5),
        "rnn.bias_ih_l0": 0.5,
        "attention.in_proj_weight": math.sqrt(1 / 12),
        "attention.out_proj.weight": math.sqrt(1 / 12),
    }
    for name, value in expected.items():
        assert scales[name] == pytest.approx(value), name


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.ReLU6(), nn.LeakyReLU()])
def test_gain_behind_activations_in_a_sequence(activation):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        activation,
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3),
        activation,
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, 6),
        activation,
        nn.BatchNorm1d(6),
        nn.Linear(6, 2),
    )
    scales = amos_scales(model)
    fan_ins = {"0": 9, "3": 36, "7": 8, "9": 6, "11": 6, "14": 6}
    gains = {name: gain(scales, f"{name}.weight", fan_in) for name, fan_in in fan_ins.items()}
    assert gains == pytest.approx({"0": 1, "3": 2, "7": 2, "9": 1, "11": 1, "14": 1})


class Block(nn.Module):
    """Activations called as functions and as methods, shapes read, a state written."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.gate, self.out = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 3)))
        self.calls = 0
        self.last = None

    def forward(self, x):
        batch, _ = x.shape
        self.calls += 1
        self.last = x
        x = x + self.down(F.dropout(self.up(self.norm(x)).relu().view(batch, 8), 0.1))
        x = x + self.out(F.gelu(self.up(x)) * self.gate(x))
        return self.head(x)


def test_gain_in_modules_with_code_of_their_own():
    block = Block()
    scales = amos_scales(nn.ModuleList([block]))
    gains = {name: gain(scales, f"0.{name}.weight", fan_in) for name, fan_in in {"up": 6, "down": 8, "gate": 6}.items()}
    assert gains == pytest.approx({"up": 1, "down": 2, "gate": 1})
    # A product with another branch does not come out of the activation.
    assert gain(scales, "0.out.weight", 8) == pytest.approx(1)
    assert gain(scales, "0.head.1.1.weight", 6) == pytest.approx(2)
    assert block.calls == 0
    assert block.last is None


def test_code_that_cannot_be_traced_counts_as_gain_one():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x):
            if x.sum() > 0:
                return self.second(self.first(x))
            return self.first(x)

    model = Branching()
    state = torch.get_rng_state()
    scales = amos_scales(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert gain(scales, "first.weight", 3) == pytest.approx(1)
    # The sequence inside is traced by itself.
    assert gain(scales, "second.1.weight", 4) == pytest.approx(2)


@pytest.mark.parametrize("activation", ["relu", "gelu", F.gelu, nn.ReLU(), torch.tanh])
def test_gain_in_torch_transformer_layers(activation):
    layers = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoderLayer(8, 2, 16, activation=activation),
            "decoder": nn.TransformerDecoderLayer(8, 2, 16, activation=activation),
        }
    )
    scales = amos_scales(layers)
    for name in layers:
        assert gain(scales, f"{name}.linear1.weight", 8) == pytest.approx(1)
        assert gain(scales, f"{name}.linear2.weight", 16) == pytest.approx(1 if activation is torch.tanh else 2)


def test_tied_frozen_and_zero_centered_tensors():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 9, bias=False)
            self.embedding = nn.Embedding(9, 4)
            self.embedding.weight = self.head.weight
            self.norm = nn.LayerNorm(4)

    model = Tied()
    nn.init.zeros_(model.norm.weight)
    model.norm.bias.requires_grad_(False)
    assert amos_scales(model) == {"head.weight": math.sqrt(0.5), "norm.weight": 0.5, "norm.bias": 0.5}
    assert not model.norm.bias.requires_grad


def test_transformers_blocks():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=6)
    scales = amos_scales(transformers.GPT2LMHeadModel(config))
    assert scales["transformer.wte.weight"] == pytest.approx(math.sqrt(2 / 8))
    assert gain(scales, "transformer.h.0.attn.c_attn.weight", 8) == pytest.approx(1)
    assert gain(scales, "transformer.h.0.mlp.c_fc.weight", 8) == pytest.approx(1)
    assert gain(scales, "transformer.h.0.mlp.c_proj.weight", 32) == pytest.approx(2)


def test_pixels_and_overrides():
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    scales = amos_scales(model, pixels=["0"], overrides={"*.bias": 0.25, re.compile(r"^3\.w"): 2.0, "3.bias": 0.125})
    assert scales == {"0.weight": math.sqrt(8 / 75), "0.bias": 0.25, "3.weight": 2.0, "3.bias": 0.125}


def test_parameters_of_no_known_module():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(4, 5, 2))
            self.empty = nn.Parameter(torch.ones(3, 0))
            self.gate = nn.Parameter(torch.ones(()))

    assert amos_scales(Odd()) == {"matrix": math.sqrt(1 / 10), "empty": 1.0, "gate": 0.5}
    assert amos_scales(nn.Identity()) == {}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"overrides": {"0.weight": 0.0}}, ValueError, r"overrides\['0.weight'\] must be in \(0, inf\)"),
        ({"overrides": {"0.weight": -1.0}}, ValueError, "must be in"),
        ({"overrides": {"0.weight": math.inf}}, ValueError, "must be in"),
        ({"overrides": {"0.weight": "1"}}, TypeError, "must be a real number"),
        ({"overrides": {"weight": 1.0}}, ValueError, "match nothing in the model: 'weight'"),
        ({"pixels": ["conv"]}, ValueError, "match nothing in the model: 'conv'"),
    ],
)
def test_errors(options, error, match):
    with pytest.raises(error, match=match):
        amos_scales(nn.Sequential(nn.Linear(2, 2)), **options)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        amos_scales([])
