"""Terms of an energy: values, gradients against autograd of the whole energy, sums, errors."""

import pytest
import torch

from danlu.flows import KL, Entropy, Interaction, Potential, WassersteinFlow, _energies

F64 = torch.float64


def particles(n=7, d=3):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(0))


def weights(n=7):
    w = torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(1)) + 0.1
    return w / w.sum()


def lopsided(z):
    """Neither even nor odd."""
    return (z.square().sum(-1) + 1).sqrt() + torch.sin(z).sum(-1)


TERMS = {
    "potential": Potential(lambda x: x.pow(4).sum(-1)),
    "kl": KL(lambda x: -x.square().sum(-1)),
    "interaction": Interaction(lopsided),
    "entropy": Entropy(2.0),
    "sum": Potential(lambda x: x.sin().sum(-1)) + Interaction(lopsided) + Entropy(),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradient_of_the_first_variation_is_that_of_the_energy_per_weight(name):
    term, x, w = TERMS[name], particles().requires_grad_(), weights()
    energy = w @ term.value(x, w)
    (whole,) = torch.autograd.grad(energy + 0 * x.sum(), x)
    value, slope = term.value_and_gradient(x.detach(), w)
    torch.testing.assert_close(slope, whole / w.unsqueeze(-1))
    torch.testing.assert_close(w @ value, energy.detach())


def test_interaction_by_brute_force_and_in_chunks(monkeypatch):
    x, w = particles(), weights()
    term = Interaction(lopsided)
    expected = sum(
        w[i] * w[j] * lopsided((x[i] - x[j]).unsqueeze(0))[0] / 2 for i in range(7) for j in range(7) if i != j
    )
    torch.testing.assert_close(w @ term.value_and_gradient(x, w)[0], expected)
    whole = term.value_and_gradient(x, w)
    seen = []
    monkeypatch.setattr(_energies, "_CHUNK_ELEMENTS", 50)
    chunked = Interaction(lambda z: seen.append(len(z)) or lopsided(z)).value_and_gradient(x, w)
    assert max(seen) == 2 * 7
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other)


def test_interaction_may_be_singular_at_zero():
    x, w = particles(), weights()
    value, slope = Interaction(lambda z: -z.square().sum(-1).log()).value_and_gradient(x, w)
    assert value.isfinite().all()
    i = 2
    others = [j for j in range(7) if j != i]
    z = x[i] - x[others]
    torch.testing.assert_close(slope[i], -(w[others, None] * 2 * z / z.square().sum(-1, keepdim=True)).sum(0))


def test_scores_may_be_given():
    x, w = particles(), weights()
    both = Potential(lambda x: x.square().sum(-1), lambda x: 2 * x)
    torch.testing.assert_close(both.value_and_gradient(x, w)[1], 2 * x)
    only = Potential(gradient=lambda x: 2 * x) + KL(lambda x: -x.square().sum(-1))
    assert not only.has_value
    value, slope = only.value_and_gradient(x, w)
    assert value is None
    torch.testing.assert_close(slope, 4 * x)
    with pytest.raises(ValueError, match="the function of Potential is not known"):
        only.value(x, w)
    constant = Potential(lambda x: torch.ones(len(x)))
    assert (constant.value_and_gradient(x, w)[1] == 0).all()


def test_sums():
    total = Potential(torch.sum) + Entropy(0.5) + KL(torch.sum)
    assert [type(term).__name__ for term in total.terms()] == ["Potential", "Entropy", "KL"]
    assert total.temperature == 1.5
    assert total.dissipates
    assert Potential(torch.sum).temperature == 0.0
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = Potential(torch.sum) + 1.0


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Potential(), ValueError, "function or gradient must be given"),
        (lambda: KL(), ValueError, "log_prob or score must be given"),
        (lambda: Potential(3.0), TypeError, "function must be callable, got float"),
        (lambda: KL(torch.sum, 3.0), TypeError, "score must be callable"),
        (lambda: Interaction("square"), TypeError, "function must be callable, got str"),
        (lambda: Entropy(0.0), ValueError, "scale must be in"),
        (lambda: Entropy("hot"), TypeError, "scale must be a real number"),
    ],
)
def test_bad_terms(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("energy", "match"),
    [
        (
            Potential(lambda x: x),
            r"the function of Potential must return one number per row, shape \(7,\), got \(7, 3\)",
        ),
        (Potential(lambda x: 1.0), "got float"),
        (Interaction(lambda z: z.sum()), r"the function of Interaction must return one number per row"),
        (Potential(gradient=lambda x: x[:1]), r"the gradient of Potential must have the particles' shape \(7, 3\)"),
        (Potential(gradient=lambda x: 1.0), "got float"),
    ],
)
def test_functions_of_the_wrong_shape(energy, match):
    with pytest.raises(ValueError, match=match):
        WassersteinFlow(energy).velocity(particles())
