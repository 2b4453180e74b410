"""Norms of per-sample gradients without those gradients, against a loop over the samples."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.losses import parameter_gradient_penalty


class Encoder(nn.Module):
    """All supported layers: embeddings, norms, linear layers on sequences, one of them called twice."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.first = nn.Linear(6, 7)
        self.twice = nn.Linear(7, 7, bias=False)
        self.layer_norm = nn.LayerNorm((length, 7))
        self.rms_norm = nn.RMSNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.embed(tokens)))
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        return self.head(self.rms_norm(self.layer_norm(hidden)).mean(1))


def problem(length: int, samples: int = 5):
    torch.manual_seed(length)
    model = Encoder(length).double()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randint(11, (samples, length))
    tokens[0, 0], tokens[1] = 0, 3
    return model, tokens, torch.randint(3, (samples,))


def loop(model: nn.Module, tokens: Tensor, target: Tensor, *, graph: bool = False) -> Tensor:
    params = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(len(tokens)):
        loss = F.cross_entropy(model(tokens[i : i + 1]), target[i : i + 1])
        grads = torch.autograd.grad(loss, params, create_graph=graph)
        norms.append(torch.stack([grad.square().sum() for grad in grads]).sum())
    return torch.stack(norms)


# T^2 below and above D_in D_out = 42 and 49: the Gram form and the explicit one.
@pytest.mark.parametrize("length", [2, 5, 9])
def test_norms_and_their_gradients_equal_a_loop_over_the_samples(length):
    model, tokens, target = problem(length)
    loss, norms = parameter_gradient_penalty(
        lambda: F.cross_entropy(model(tokens), target, reduction="none"), model, scope="per_sample", reduction="none"
    )
    expected = loop(model, tokens, target, graph=True)
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss, F.cross_entropy(model(tokens), target))
    weights = torch.rand(5, dtype=torch.float64)
    ours = torch.autograd.grad(norms @ weights, list(model.parameters()))
    theirs = torch.autograd.grad(expected @ weights, list(model.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_mean_loss_and_reductions():
    model, tokens, target = problem(4)
    expected = loop(model, tokens, target)
    for reduction in ("none", "mean", "sum"):
        value = expected if reduction == "none" else getattr(expected, reduction)()
        for inner in ("none", "mean"):
            _, penalty = parameter_gradient_penalty(
                lambda inner=inner: F.cross_entropy(model(tokens), target, reduction=inner),
                model,
                scope="per_sample",
                reduction=reduction,
            )
            torch.testing.assert_close(penalty, value)


def test_frozen_parameters_and_parts_of_a_model():
    model, tokens, target = problem(4)
    model.first.weight.requires_grad_(False)
    model.layer_norm.bias.requires_grad_(False)
    model.embed.weight.requires_grad_(False)

    def run(part: nn.Module) -> Tensor:
        closure = lambda: F.cross_entropy(model(tokens), target, reduction="none")  # noqa: E731
        return parameter_gradient_penalty(closure, part, scope="per_sample", reduction="none")[1]

    torch.testing.assert_close(run(model), loop(model, tokens, target))
    parts = [nn.ModuleList([model.first, model.twice]), nn.ModuleList([model.layer_norm, model.rms_norm]), model.head]
    torch.testing.assert_close(sum(run(part) for part in parts), run(model))


def test_hooks_are_removed_also_after_an_error():
    model, tokens, _ = problem(3)

    def fails() -> Tensor:
        model(tokens)
        raise ArithmeticError("stop")

    with pytest.raises(ArithmeticError, match="stop"):
        parameter_gradient_penalty(fails, model, scope="per_sample")
    assert not any(module._forward_hooks for module in model.modules())


def test_unused_layers_count_for_nothing():
    model, tokens, target = problem(3)
    model.spare = nn.Linear(4, 4).double()
    closure = lambda: F.cross_entropy(model(tokens), target, reduction="none")  # noqa: E731
    _, norms = parameter_gradient_penalty(closure, model, scope="per_sample", reduction="none")
    del model.spare
    torch.testing.assert_close(norms, loop(model, tokens, target))


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 3), nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight


class Bypassed(nn.Module):
    """The weight of a layer used by hand, beside a proper call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(x, self.linear.weight)


REFUSED = {
    r"'1' \(BatchNorm1d\), which mixes samples": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    r"does not support '1' \(PReLU\), which has trainable parameters": nn.Sequential(nn.Linear(3, 3), nn.PReLU()),
    r"does not support '' \(MultiheadAttention\)": nn.MultiheadAttention(3, 1),
    r"tied parameters: 'head\.weight' is 'embed\.weight'": Tied(),
    "max_norm or scale_grad_by_freq, found in '0'": nn.Sequential(nn.Embedding(3, 3, max_norm=1.0)),
    "model has no trainable parameters": nn.Sequential(nn.ReLU()),
}


@pytest.mark.parametrize("match", REFUSED)
def test_layers_that_cannot_be_counted_are_named(match):
    model = REFUSED[match]
    with pytest.raises(ValueError, match=match):
        parameter_gradient_penalty(lambda: model(X).sum(1), model, scope="per_sample")


def test_wrong_gradients_are_refused():
    def run(model: nn.Module, loss=None) -> None:
        parameter_gradient_penalty(loss or (lambda: model(X).sum(1)), model, scope="per_sample")

    with pytest.raises(RuntimeError, match="parameters of 'linear' are used outside of calls"):
        run(Bypassed())
    with pytest.raises(RuntimeError, match=r"in-place operation changed the input or output of '0'"):
        run(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)))
    model = nn.Linear(3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"torch\.compile gives a model without a second derivative"):
        run(model, lambda: compiled(X).sum(1))
    with pytest.raises(RuntimeError, match="samples as first axis"):
        run(model, lambda: model(X[0])[None])
    with pytest.raises(ValueError, match=r"loss must have shape \(4,\) or be the mean, got shape \(4, 3\)"):
        run(model, lambda: model(X))
