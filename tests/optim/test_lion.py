"""Lion alone: the oracle over every option, golden numbers, invariances, resume at every step."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from oracles import lion_oracle
from torch import nn

from danlu.optim import Lion, lion

OPTIONS = [
    {},
    {"betas": (0.95, 0.98)},
    {"betas": (0.0, 0.0)},
    {"weight_decay": 0.3},
    {"maximize": True},
    {"maximize": True, "weight_decay": 0.3},
    {"nonfinite": "off"},
    {"nonfinite": "raise"},
    {"lr": torch.tensor(0.01)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_oracle_over_fifty_steps(options, foreach):
    random = np.random.default_rng(0)
    starts = [random.normal(size=shape) for shape in [(5, 7), (3,), ()]]
    params = [nn.Parameter(torch.from_numpy(np.array(start))) for start in starts]
    settings = {"lr": 0.01, **options}
    optimizer = Lion(params, **settings, foreach=foreach)
    oracle = {key: float(value) if key == "lr" else value for key, value in settings.items()}
    thetas, momenta = starts, [np.zeros_like(start) for start in starts]
    for _ in range(50):
        grads = [random.normal(size=start.shape) for start in starts]
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(np.array(grad))
        optimizer.step()
        pairs = [lion_oracle(t, m, g, **oracle) for t, m, g in zip(thetas, momenta, grads, strict=True)]
        thetas, momenta = [t for t, _ in pairs], [m for _, m in pairs]
    for param, theta, momentum in zip(params, thetas, momenta, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(optimizer.state[param]["exp_avg"].numpy(), momentum, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_golden_values(foreach):
    p = nn.Parameter(torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, weight_decay=0.1, foreach=foreach)
    expected = [(0.395, -0.89, 0.0), (0.49105, -0.7811, 0.0), (0.5861395, -0.673289, -0.1)]
    for grad, values in zip([(1.0, -2.0, 0.0), (-3.0, 0.1, 0.0), (-30.0, 0.1, 5.0)], expected, strict=True):
        p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-12)
    momentum = torch.tensor([-0.319899, -0.017612, 0.05], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], momentum, rtol=0, atol=1e-12)


def run(start, grads, **options):
    p = nn.Parameter(start.clone())
    optimizer = Lion([p], **{"lr": 0.01, "weight_decay": 0.1, **options})
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("factor", [2.0**20, 2.0**-20])
def test_scaled_gradients_change_nothing(factor):
    start, grads = torch.randn(40, dtype=torch.float64), torch.randn(20, 40, dtype=torch.float64)
    assert torch.equal(run(start, grads), run(start, grads * factor))


def test_mirror_symmetry():
    start, grads = torch.randn(40, dtype=torch.float64), torch.randn(20, 40, dtype=torch.float64)
    assert torch.equal(run(start, grads), -run(-start, -grads))


def test_step_is_bounded_and_closed_form():
    p = nn.Parameter(torch.tensor([0.02], dtype=torch.float64))
    optimizer = Lion([p], lr=1e-2, weight_decay=0.1, foreach=False)
    for _ in range(2000):
        before = p.detach().clone()
        p.grad = -torch.ones(1, dtype=torch.float64)
        optimizer.step()
        assert (p.detach() - (1 - 1e-3) * before).abs() <= 1e-2 * (1 + 1e-12)
    expected = 10 + (0.02 - 10) * (1 - 1e-3) ** 2000
    assert p.item() == pytest.approx(expected, rel=1e-10)


def test_equals_the_reference_package():
    peer = pytest.importorskip("lion_pytorch").Lion
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.ones(6, 5, dtype=torch.float64)) for _ in range(2))
    optimizers = Lion([mine], lr=0.01, weight_decay=0.2), peer([theirs], lr=0.01, weight_decay=0.2)
    for _ in range(50):
        grad = torch.randn(6, 5, dtype=torch.float64)
        for p, optimizer in zip((mine, theirs), optimizers, strict=True):
            p.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_complex_parameters(foreach):
    p = nn.Parameter(torch.tensor([3 + 4j, 0j], dtype=torch.complex128))
    optimizer = Lion([p], lr=1.0, foreach=foreach)
    p.grad = torch.tensor([0.6 + 0.8j, 0j], dtype=torch.complex128)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([2.4 + 3.2j, 0j], dtype=torch.complex128))


def test_from_adamw_keeps_the_decay_per_step():
    optimizer = Lion.from_adamw([nn.Parameter(torch.ones(1))], 1e-3, 0.1, ratio=5.0)
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(2e-4)
    assert group["weight_decay"] == pytest.approx(0.5)
    for bad in ({"adamw_lr": -1.0, "adamw_weight_decay": 0.1}, {"adamw_lr": 1.0, "adamw_weight_decay": -0.1}):
        with pytest.raises(ValueError, match="adamw"):
            Lion.from_adamw([nn.Parameter(torch.ones(1))], **bad)
    with pytest.raises(ValueError, match="ratio"):
        Lion.from_adamw([nn.Parameter(torch.ones(1))], 1e-3, 0.1, ratio=0.0)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1), (0.9,), 0.9, (0.9, "a")])
def test_bad_betas(betas):
    with pytest.raises((ValueError, TypeError), match="betas"):
        Lion([nn.Parameter(torch.ones(1))], betas=betas)


def test_function_checks_its_lists():
    with pytest.raises(ValueError, match="the lists must have one length"):
        lion([torch.ones(1)], [], [torch.ones(1)], lr=0.1)


RESUME = textwrap.dedent(
    """
    import sys, torch
    from torch import nn
    import danlu.optim as optim

    # Sums of the backward pass depend on the number of threads.
    torch.set_num_threads(1)

    def build(name, options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5))
        return net, getattr(optim, name)(optim.parameter_groups(net), lr=0.01, **options)

    def advance(net, optimizer, first, last):
        for step in range(first, last):
            tokens = torch.randint(7, (6,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(tokens).square().mean().backward()
            optimizer.step()

    if __name__ == "__main__":
        name, options, folder = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
        for step in range(31):
            saved = torch.load(f"{folder}/{step}.pt", weights_only=True)
            net, optimizer = build(name, options)
            net.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            advance(net, optimizer, step, 30)
            for key, value in torch.load(f"{folder}/30.pt", weights_only=True)["model"].items():
                assert torch.equal(net.state_dict()[key], value), (step, key)
        print("all 31 equal")
    """
)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Lion", {"weight_decay": 0.1}),
        ("Tiger", {"weight_decay": 0.1}),
        ("Tiger", {"grad_accum_steps": 4}),
        ("Tiger", {"grad_accum_steps": 4, "foreach": False}),
        ("Amos", {"momentum": 0.9}),
        ("Amos", {"clip_value": 0.1, "reduce": "scalar"}),
    ],
)
def test_resume_at_every_step_in_a_fresh_process(tmp_path, name, options):
    script = tmp_path / "resume.py"
    script.write_text(RESUME)
    namespace: dict[str, object] = {"__name__": "resume"}
    exec(compile(RESUME, str(script), "exec"), namespace)
    torch.set_num_threads(1)
    net, optimizer = namespace["build"](name, options)
    for step in range(31):
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / f"{step}.pt")
        if step < 30:
            namespace["advance"](net, optimizer, step, step + 1)
    done = subprocess.run(
        [sys.executable, str(script), name, repr(options), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all 31 equal\n"
