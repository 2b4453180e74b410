"""One matrix for input and output: values, gradients of all rows, the permuted variant, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from danlu.optim import parameter_groups, tie_embeddings


def model(v=9, d=4, bias=True) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(v, d), nn.Tanh(), nn.Linear(d, v, bias=bias))


@pytest.mark.parametrize("permute_halves", [False, True])
def test_definition_and_gradients(permute_halves):
    net = model().double()
    embedding = net[0].weight.detach().clone()
    tied = tie_embeddings(net, permute_halves=permute_halves)
    assert tied is net
    tokens = torch.tensor([1, 3, 3])
    matrix = embedding.clone().requires_grad_()
    out = torch.cat([matrix[:, 2:], matrix[:, :2]], dim=1) if permute_halves else matrix
    expected = torch.tanh(matrix[tokens]) @ out.T + net[2].bias
    torch.testing.assert_close(net(tokens), expected, rtol=1e-14, atol=1e-14)
    nn.functional.cross_entropy(net(tokens), tokens).backward()
    nn.functional.cross_entropy(expected, tokens).backward()
    torch.testing.assert_close(net[0].weight.grad, matrix.grad, rtol=1e-12, atol=1e-14)
    assert (net[0].weight.grad != 0).any(-1).all()
    # What reads the weight of the layer sees the matrix that is meant.
    torch.testing.assert_close(net[2].weight.detach(), out.detach())


@pytest.mark.parametrize("permute_halves", [False, True])
def test_one_parameter_of_kind_embedding(permute_halves):
    net = tie_embeddings(model(), permute_halves=permute_halves)
    groups = {group["kind"]: group["param_names"] for group in parameter_groups(net)}
    assert groups == {"embedding": ["0.weight"], "vector": ["2.bias"]}
    again = tie_embeddings(model(), permute_halves=permute_halves)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(torch.arange(9)), net(torch.arange(9)))
    twin = copy.deepcopy(net)
    assert torch.equal(twin(torch.arange(9)), net(torch.arange(9)))
    assert len(list(twin.parameters())) == 2


def test_tying_twice_and_permuting_a_tied_model():
    net = tie_embeddings(tie_embeddings(model()))
    assert net[2].weight is net[0].weight
    tie_embeddings(net, permute_halves=True)
    assert torch.equal(net[2].weight, torch.roll(net[0].weight, 2, dims=1))
    with pytest.raises(ValueError, match="the weight of head is parametrized already"):
        tie_embeddings(net)


def test_accessors_and_configuration_of_transformers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.tokens, self.out = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 9)
            self.config = SimpleNamespace(tie_word_embeddings=None)

        def get_input_embeddings(self):
            return self.tokens

        def get_output_embeddings(self):
            return self.out

    net = tie_embeddings(Model())
    assert net.out.weight is net.tokens.weight
    assert net.config.tie_word_embeddings is True
    assert tie_embeddings(net, permute_halves=True).config.tie_word_embeddings is False


def test_layers_by_name():
    net = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Embedding(7, 4), "c": nn.Linear(4, 9), "d": nn.Linear(4, 9)})
    with pytest.raises(ValueError, match=r"found 2 Embedding layers: a, b; name one as embedding="):
        tie_embeddings(net)
    with pytest.raises(
        ValueError, match=r"found 2 Linear layers with a weight of shape \(9, 4\): c, d; name one as head="
    ):
        tie_embeddings(net, embedding="a")
    tie_embeddings(net, embedding="a", head="d")
    assert net["d"].weight is net["a"].weight
    with pytest.raises(ValueError, match=r"must have weights of one shape, got torch.Size\(\[7, 4\]\)"):
        tie_embeddings(net, embedding="b", head="c")
    with pytest.raises(ValueError, match="head='e' is not a module of ModuleDict"):
        tie_embeddings(net, embedding="a", head="e")
    with pytest.raises(TypeError, match="head='b' must be a Linear, got Embedding"):
        tie_embeddings(net, embedding="a", head="b")


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        tie_embeddings([])
    with pytest.raises(ValueError, match="permute_halves needs an even number of channels, got 3"):
        tie_embeddings(model(d=3), permute_halves=True)
    net = model()
    net[2].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"weights of one dtype, got torch.float32 and torch.bfloat16"):
        tie_embeddings(net)
    with pytest.raises(ValueError, match="found 0 Embedding layers"):
        tie_embeddings(nn.Sequential(nn.Linear(2, 2)))
