"""The inequality between input and parameter gradients: for every network, sample and layer, and its numbers."""

import math
import statistics

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.diagnostics import gradient_penalty_bound

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "identity": nn.Identity}
SLACK = 1 + 1e-12


def mlp(depth: int, width: int, activation: type[nn.Module] = nn.Tanh, *, outputs: int = 5, bias: bool = True):
    sizes = [6] + [width] * (depth - 1) + [outputs]
    layers: list[nn.Module] = []
    for t in range(depth):
        layers += [nn.Linear(sizes[t], sizes[t + 1], bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def functional(name: str, outputs: int, samples: int):
    if name == "linear":
        direction = torch.randn(outputs, dtype=torch.float64)
        return lambda z: z @ direction
    target = torch.randint(outputs, (samples,))
    return lambda z: F.cross_entropy(z, target, reduction="none")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_inequality_holds_per_sample_and_per_layer(depth, activation):
    for width in (3, 16, 64):
        for kind in ("linear", "cross_entropy"):
            for seed in range(10):
                torch.manual_seed(seed)
                net, x = mlp(depth, width, ACTIVATIONS[activation]), torch.randn(4, 6, dtype=torch.float64)
                bound = gradient_penalty_bound(net, x, functional(kind, 5, 4))
                assert bound.tight is not None
                assert bound.tight_terms is not None
                assert (bound.lhs_terms <= bound.tight_terms * SLACK).all()
                assert (bound.tight_terms <= bound.rhs_terms * SLACK).all()
                assert (bound.ratio <= bound.tight_ratio * SLACK).all()
                assert (bound.tight_ratio <= SLACK).all()
                assert not bound.ratio.isnan().any()


def test_both_sides_by_autograd():
    """The left side from full Jacobians, the right side from gradients of every parameter, sample by sample."""
    net, x = mlp(3, 7), torch.randn(3, 6, dtype=torch.float64)
    f = functional("cross_entropy", 5, 3)
    bound = gradient_penalty_bound(net, x, f)
    linears = [net[0], net[2], net[4]]
    for i in range(3):
        given = x[i : i + 1].clone().requires_grad_()
        stacked = torch.zeros(3, 5, dtype=torch.float64)
        rows = torch.arange(3)[:, None] == i
        loss = f(torch.where(rows, net(given), stacked))[i]
        d_x, *grads = torch.autograd.grad(loss, [given, *net.parameters()])
        torch.testing.assert_close(bound.input_gradient[i], d_x.square().sum())
        for t, linear in enumerate(linears):
            rhs = grads[2 * t].square().sum() + grads[2 * t + 1].square().sum()
            torch.testing.assert_close(bound.rhs_terms[t, i], rhs)
            jacobian = torch.autograd.functional.jacobian(net[: 2 * t], x[i])
            size = d_x.square().sum() * (1 + net[: 2 * t](x[i]).square().sum())
            weight = linear.weight.detach()
            apart = torch.linalg.matrix_norm(weight, 2) * torch.linalg.matrix_norm(jacobian, 2)
            torch.testing.assert_close(bound.lhs_terms[t, i], (size / apart**2).detach())
            together = torch.linalg.matrix_norm(weight @ jacobian, 2)
            torch.testing.assert_close(bound.tight_terms[t, i], (size / together**2).detach())


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_with_one_output_is_an_equality(bias):
    net, x = nn.Linear(6, 1, bias=bias).double(), torch.randn(5, 6, dtype=torch.float64)
    bound = gradient_penalty_bound(net, x, lambda z: z[:, 0])
    torch.testing.assert_close(bound.ratio, torch.ones(5, dtype=torch.float64), rtol=1e-14, atol=0)
    # |w|^2 (1 + |x|^2) / |w|^2, where the 1 stands for the bias.
    torch.testing.assert_close(bound.rhs, bias + x.square().sum(1))


def typical_ratios(depth: int, width: int, activation: type[nn.Module]) -> tuple[float, float]:
    ratios, tights = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        net, x = mlp(depth, width, activation), torch.randn(8, 6, dtype=torch.float64)
        bound = gradient_penalty_bound(net, x, functional("cross_entropy", 5, 8))
        ratios += bound.ratio.tolist()
        tights += bound.tight_ratio.tolist()
    return statistics.median(ratios), statistics.median(tights)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_typical_ratios(activation):
    ratio, tight = typical_ratios(2, 16, activation)
    assert 0.08 < ratio < 0.2
    assert 0.18 < tight < 0.4
    # Products of norms get looser with depth and width, the tight form much less.
    deep, deep_tight = typical_ratios(4, 64, activation)
    assert deep < 0.03
    assert deep_tight > 0.15


def test_dead_network_is_degenerate_and_free_of_nan():
    net, x = mlp(3, 8, nn.ReLU), torch.randn(4, 6, dtype=torch.float64)
    net[0].bias.data.fill_(-100.0)
    bound = gradient_penalty_bound(net, x, functional("linear", 5, 4))
    assert bound.degenerate.all()
    assert (bound.ratio == 0).all()
    assert (bound.tight_ratio == 0).all()
    assert (bound.rhs > 0).all()
    zero = gradient_penalty_bound(mlp(2, 8), x, lambda z: 0 * z.sum(1))
    assert (zero.ratio == 0).all()
    assert zero.degenerate.all()
    constant = gradient_penalty_bound(mlp(2, 8), x, lambda z: torch.ones(len(z)))
    assert (constant.ratio == 0).all()
    assert constant.degenerate.all()
    assert not gradient_penalty_bound(mlp(2, 8), x, functional("linear", 5, 4)).degenerate.any()


def test_batch_gradient_does_not_bound_the_input_gradients():
    """Two samples that pull in opposite directions: the mean's gradient is 0, the samples' are not."""
    net = nn.Linear(2, 1, bias=False).double()
    x = torch.ones(2, 2, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    mean_gradient = torch.autograd.grad((signs * net(x)[:, 0]).mean(), net.weight)[0]
    bound = gradient_penalty_bound(net, x, lambda z: signs * z[:, 0])
    assert (mean_gradient == 0).all()
    assert (bound.input_gradient > 0).all()
    torch.testing.assert_close(bound.lhs, bound.rhs)


def test_power_iteration_approaches_the_exact_norms():
    net, x = mlp(3, 32), torch.randn(3, 6, dtype=torch.float64)
    f = functional("linear", 5, 3)
    exact = gradient_penalty_bound(net, x, f)
    torch.testing.assert_close(gradient_penalty_bound(net, x, f, power_iters=500).tight, exact.tight)
    rough = gradient_penalty_bound(net, x, f, power_iters=500)
    torch.testing.assert_close(rough.lhs_terms, exact.lhs_terms)
    # Norms from below make the left side too large, never too small.
    few = gradient_penalty_bound(net, x, f, power_iters=1)
    assert (few.lhs_terms >= exact.lhs_terms * (1 - 1e-12)).all()
    assert (few.lhs_terms > exact.lhs_terms * 1.001).any()


def test_flatten_dropout_nesting_and_activations_in_place():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    nested = nn.Sequential(
        nn.Flatten(), nn.Sequential(plain[0], nn.ReLU(inplace=True), nn.Dropout(0.5)), plain[2], nn.Identity()
    ).eval()
    x, f = torch.randn(4, 6, dtype=torch.float64), functional("linear", 5, 4)
    first, second = gradient_penalty_bound(plain, x, f), gradient_penalty_bound(nested, x.view(4, 2, 3), f)
    torch.testing.assert_close(first.lhs_terms, second.lhs_terms)
    torch.testing.assert_close(first.rhs_terms, second.rhs_terms)


def test_no_tight_form_unless_asked_for():
    bound = gradient_penalty_bound(nn.Linear(2, 1), torch.ones(1, 2), lambda z: z[:, 0], tight=False)
    assert bound.tight is None
    assert bound.tight_terms is None
    assert bound.tight_ratio is None


def rows(z: Tensor) -> Tensor:
    return z.sum(1)


@pytest.mark.parametrize(
    ("net", "x", "f", "error", "match"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.ones(1, 2), rows, TypeError, r"mlp\.1 \(BatchNorm1d"),
        (nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)), torch.ones(1, 2), rows, TypeError, r"mlp\.1 \(Softmax\)"),
        (nn.Conv2d(1, 1, 1), torch.ones(1, 2), rows, TypeError, "Conv2d"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout()), torch.ones(1, 2), rows, ValueError, r"mlp\.1 \(Dropout\)"),
        (nn.Sequential(nn.Tanh()), torch.ones(1, 2), rows, ValueError, "mlp has no Linear layer"),
        (nn.Sequential(nn.Tanh(), nn.Linear(2, 1)), torch.ones(1, 2), rows, ValueError, "apply it to x"),
        (nn.Linear(2, 1), torch.ones(1, 3), rows, ValueError, r"needs an input of shape \(B, 2\), got \(1, 3\)"),
        (nn.Linear(2, 1), torch.ones(4, 1, 2), rows, ValueError, r"put nn\.Flatten\(\) before it"),
        (nn.Linear(2, 1), torch.ones(2), rows, ValueError, "samples as first axis"),
        (nn.Linear(2, 1), torch.ones(1, 2).long(), rows, TypeError, "x must be a floating-point tensor"),
        (nn.Linear(2, 1).half(), torch.ones(1, 2).half(), rows, TypeError, "x must be float32 or float64"),
        (nn.Linear(2, 1), torch.ones(1, 2), torch.sum, ValueError, r"shape \(1,\), got \(\)"),
        (nn.Linear(2, 1), torch.ones(1, 2), 3, TypeError, "f must be callable"),
    ],
)
def test_bad_input(net, x, f, error, match):
    with pytest.raises(error, match=match):
        gradient_penalty_bound(net, x, f)


def test_bad_number_of_iterations():
    with pytest.raises(ValueError, match="power_iters must be at least 1"):
        gradient_penalty_bound(nn.Linear(2, 1), torch.ones(1, 2), rows, power_iters=0)


def test_value_pin():
    """By hand: f = 2 tanh(x), x = 0.5, all weights 1 and 2, no bias."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    net[0].weight.data.fill_(1.0)
    net[2].weight.data.fill_(2.0)
    bound = gradient_penalty_bound(net, torch.tensor([[0.5]], dtype=torch.float64), lambda z: z[:, 0])
    slope = 1 - math.tanh(0.5) ** 2
    assert float(bound.input_gradient) == pytest.approx((2 * slope) ** 2)
    # Scalars make every term an equality: (2 g')^2 x^2, and tanh(x)^2.
    assert bound.rhs_terms[:, 0].tolist() == pytest.approx([(2 * slope * 0.5) ** 2, math.tanh(0.5) ** 2])
    torch.testing.assert_close(bound.lhs_terms, bound.rhs_terms)
