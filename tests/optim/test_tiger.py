"""Tiger alone: the oracle over every option, golden numbers, accumulation, the rescue, the floor, the Trainer."""

import math
import warnings

import numpy as np
import pytest
import torch
from oracles import TigerOracle
from torch import nn

from danlu.optim import Rounding, Tiger, parameter_groups, piecewise_linear, tiger
from danlu.optim._tiger_paths import TigerStep, multi_tensor, single_tensor

TENSORS = {"matrix": (5, 7), "embedding": (6, 4), "vector": (3,), "norm_scale": (4,)}

OPTIONS = [
    {},
    {"beta": 0.9},
    {"beta": 0.0},
    {"weight_decay": 0.3},
    {"k": 4},
    {"k": 3, "average": False},
    {"shrink": 0.5},
    {"nonfinite": "skip"},
    {"nonfinite": "off"},
    {"rms_floor": 0.0},
    {"rms_floor": 5.0},
    {"vector_scale": 0.2},
    {"maximize": True},
    {"maximize": True, "weight_decay": 0.3, "k": 2},
]


def groups_of(params: dict[str, nn.Parameter]) -> list[dict]:
    return [
        {"params": [(kind, p)], "kind": kind, "center": 1.0 if kind == "norm_scale" else 0.0}
        for kind, p in params.items()
    ]


def tiger_options(options: dict) -> dict:
    return {{"k": "grad_accum_steps"}.get(key, key): value for key, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_oracle_over_fifty_steps(options, foreach):
    random = np.random.default_rng(0)
    starts = {kind: random.normal(size=shape) for kind, shape in TENSORS.items()}
    params = {kind: nn.Parameter(torch.from_numpy(start.copy())) for kind, start in starts.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the floor of 5 is above every RMS, on purpose
        optimizer = Tiger(groups_of(params), lr=0.02, foreach=foreach, **tiger_options(options))
        oracles = {
            kind: TigerOracle(start, kind, lr=0.02, center=1.0 if kind == "norm_scale" else 0.0, **options)
            for kind, start in starts.items()
        }
        for step in range(50):
            for kind, p in params.items():
                grad = random.normal(size=p.shape)
                if options.get("nonfinite") != "off" and step in (7, 20, 31) and kind != "vector":
                    grad.flat[step % grad.size] = (math.nan, math.inf, -math.inf)[step % 3]
                p.grad = torch.from_numpy(grad)
                oracles[kind].micro_step(grad)
            optimizer.step()
    for kind, p in params.items():
        np.testing.assert_allclose(p.detach().numpy(), oracles[kind].theta, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[p]["exp_avg"].numpy(), oracles[kind].m, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bucket_path_equals_the_loop(options):
    """The path of accelerators, on the CPU."""
    random = torch.Generator().manual_seed(0)
    kinds = list(TENSORS)

    def draw():
        return [torch.randn(TENSORS[kind], generator=random, dtype=torch.float64) for kind in kinds]

    fast, momenta = draw(), draw()
    slow, slow_momenta = [x.clone() for x in fast], [x.clone() for x in momenta]
    nonfinite = options.get("nonfinite", "shrink")
    for update in (False, True):
        for beta in (0.9, 1.0):
            grads = draw()
            if nonfinite != "off":
                grads[0][0, 0] = math.nan
            step = TigerStep(
                kinds=kinds,
                decays=[beta] * 4,
                gain=0.1,
                lr=-0.02 if options.get("maximize") else 0.02,
                weight_decay=options.get("weight_decay", 0.01),
                update=update,
                shrink=0.9 if nonfinite == "shrink" else 1.0,
                center=0.5,
                guard=nonfinite != "off",
                rms_floor=options.get("rms_floor", 1e-3),
                vector_scale=options.get("vector_scale", 0.5),
                decay_vectors=False,
                shrink_noise=0.0,
                sign_power=1.0,
                normalize_power=False,
                rounding=Rounding(),
            )
            counts = [[torch.zeros((), dtype=torch.int64) for _ in kinds] for _ in range(2)]
            multi_tensor(fast, grads, momenta, counts[0], step)
            single_tensor(slow, grads, slow_momenta, counts[1], step)
            assert counts[0] == counts[1]
            for a, b in zip(fast + momenta, slow + slow_momenta, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def golden():
    def parameter(values):
        return nn.Parameter(torch.tensor(values, dtype=torch.float64))

    params = {
        "matrix": parameter([[0.5, -1.0], [2.0, 0.25]]),
        "vector": parameter([0.1, -0.2]),
        "norm_scale": parameter([1.0, 1.5]),
        "embedding": parameter([[1.0, -1.0], [0.0, 2.0]]),
    }
    grads = {
        "matrix": [[1.0, -2.0], [0.0, 3.0]],
        "vector": [1.0, -1.0],
        "norm_scale": [-1.0, 2.0],
        "embedding": [[0.5, 0.0], [0.0, 0.0]],
    }
    return params, {kind: torch.tensor(values, dtype=torch.float64) for kind, values in grads.items()}


@pytest.mark.parametrize("foreach", [None, True, False])
def test_golden_values(foreach):
    params, grads = golden()
    optimizer = Tiger(groups_of(params), lr=1e-2, foreach=foreach)

    def step(factor, bad=False):
        for kind, p in params.items():
            p.grad = factor * grads[kind]
        if bad:
            params["matrix"].grad[0, 0] = math.nan
            params["norm_scale"].grad[1] = math.nan
        optimizer.step()

    def check(kind, expected):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(params[kind].detach(), expected, rtol=0, atol=1e-14)

    step(1.0)
    check("matrix", [[0.488417947275526, -0.988360325122668], [1.999769511388568, 0.238446758351955]])
    check("vector", [0.095, -0.195])
    check("norm_scale", [1.005, 1.495])
    check("embedding", [[0.9899, -0.9999], [0.0, 1.999717157287525]])
    step(-2.0)
    assert params["matrix"][0, 0].item() == pytest.approx(0.499841581280785, abs=1e-14)
    check("embedding", [[0.999750639245265, -0.999800518692726], [0.0, 1.999434394569394]])
    momentum = optimizer.state[params["matrix"]]["exp_avg"].clone()
    expected = torch.tensor([[-0.036225, 0.07245], [0.0, -0.108675]], dtype=torch.float64)
    torch.testing.assert_close(momentum, expected, rtol=0, atol=1e-15)
    step(1.0, bad=True)
    assert params["matrix"][0, 0].item() == pytest.approx(0.494843165467977, abs=1e-14)
    check("norm_scale", [1.0, 1.495])
    check("vector", [0.095, -0.195])
    assert torch.equal(optimizer.state[params["matrix"]]["exp_avg"], momentum)
    assert optimizer.nonfinite_events == {"matrix": 1, "norm_scale": 1}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def batch(step: int) -> torch.Tensor:
    return torch.randint(11, (4,), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("average", [True, False])
def test_accumulation_equals_averaging(k, foreach, average):
    inside, outside = model(), model()
    tigers = (
        Tiger(inside, lr=0.01, grad_accum_steps=k, average=average, foreach=foreach),
        Tiger(outside, lr=0.01, foreach=foreach),
    )
    for cycle in range(6):
        tigers[1].zero_grad()
        for micro in range(k):
            tokens = batch(cycle * k + micro)
            tigers[0].zero_grad()
            loss = inside(tokens).square().mean()
            (loss if average else loss / k).backward()
            tigers[0].step()
            (outside(tokens).square().mean() / k).backward()
        tigers[1].step()
        for a, b in zip(inside.parameters(), outside.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-15)
            torch.testing.assert_close(tigers[0].state[a]["exp_avg"], tigers[1].state[b]["exp_avg"], rtol=0, atol=3e-17)
    assert tigers[0].micro_step == 6 * k


def test_unequal_micro_batches_by_weight():
    inside, outside = model(), model()
    tigers = Tiger(inside, lr=0.01, grad_accum_steps=3), Tiger(outside, lr=0.01)
    shares = (0.5, 0.3, 0.2)
    for cycle in range(3):
        tigers[1].zero_grad()
        for micro, share in enumerate(shares):
            tokens = batch(cycle * 3 + micro)
            tigers[0].zero_grad()
            inside(tokens).square().mean().backward()
            tigers[0].micro_weight = share
            tigers[0].step()
            (outside(tokens).square().mean() * share).backward()
        tigers[1].step()
    for a, b in zip(inside.parameters(), outside.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    tigers[0].micro_weight = -1.0
    with pytest.raises(ValueError, match="micro_weight must be in"):
        tigers[0].step()


@pytest.mark.parametrize("foreach", [None, True, False])
def test_gradients_on_some_micro_steps_only(foreach):
    """A tensor without a gradient on some micro-steps is as one with zeros; without any it is left alone."""
    random = np.random.default_rng(0)
    start = random.normal(size=(3, 4))
    p, idle = (nn.Parameter(torch.from_numpy(start.copy())) for _ in range(2))
    optimizer = Tiger([{"params": [p, idle], "kind": "matrix"}], lr=0.1, grad_accum_steps=3, foreach=foreach)
    oracle = TigerOracle(start, "matrix", lr=0.1, k=3)
    for step in range(18):
        grad = random.normal(size=(3, 4)) if step in (1, 6, 7, 11, 12, 15) else None
        p.grad = None if grad is None else torch.from_numpy(grad)
        oracle.micro_step(grad)
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), oracle.theta, rtol=1e-12, atol=1e-13)
    assert torch.equal(idle, torch.from_numpy(start))
    assert idle not in optimizer.state


def test_cycle_length_changes_between_cycles_only():
    net = model()
    optimizer = Tiger(net, lr=0.01, grad_accum_steps=2)

    def step():
        optimizer.zero_grad()
        net(batch(0)).sum().backward()
        optimizer.step()

    step()
    for group in optimizer.param_groups:
        group["grad_accum_steps"] = 3
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="grad_accum_steps changed from 2 to 3 within a cycle"):
        step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    for group in optimizer.param_groups:
        group["grad_accum_steps"] = 2
    step()
    for group in optimizer.param_groups:
        group["grad_accum_steps"] = 3
    for _ in range(2):
        before = [p.detach().clone() for p in net.parameters()]
        step()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    step()
    assert not torch.equal(net[1].weight, before[2])


def test_no_buffer_beside_the_momentum():
    """Bytes of state per parameter while accumulating: the momentum, and nothing else."""
    net = model().float()
    optimizer = Tiger(net, lr=0.01, grad_accum_steps=4)
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        net(batch(step)).sum().backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    count = sum(p.numel() for p in net.parameters())
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(v.numel() * v.element_size() for v in held) == 4 * count
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("factor", [2.0**12, 2.0**-12])
def test_scaled_gradients_change_nothing(factor):
    first, second = model(), model()
    for net, scale in ((first, 1.0), (second, factor)):
        optimizer = Tiger(net, lr=0.01)
        for step in range(10):
            optimizer.zero_grad()
            (scale * net(batch(step)).square().mean()).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["matrix", "embedding"])
def test_scale_equivariance_and_relative_step(kind):
    random = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=random, dtype=torch.float64)
    grads = torch.randn(20, 6, 5, generator=random, dtype=torch.float64)
    ends = []
    for factor in (1.0, 8.0):
        p = nn.Parameter(factor * start)
        optimizer = Tiger([{"params": [p], "kind": kind}], lr=0.03, weight_decay=0.0)
        for grad in grads:
            p.grad, before = grad, p.detach().clone()
            optimizer.step()
            step = (p.detach() - before).square().mean().sqrt()
            rms = before.square().mean().sqrt()
            assert step == pytest.approx(0.03 * rms.item(), rel=1e-9)
        ends.append(p.detach())
    torch.testing.assert_close(ends[1], 8 * ends[0], rtol=1e-12, atol=1e-12)


def test_tied_weight_is_updated_once_and_convolutions_are_matrices():
    torch.manual_seed(0)
    embedding, head, conv = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Conv1d(2, 3, 3)
    head.weight = embedding.weight
    groups = parameter_groups(nn.ModuleList([embedding, head, conv]))
    assert [(g["kind"], g["param_names"]) for g in groups] == [
        ("embedding", ["0.weight"]),
        ("vector", ["2.bias"]),
        ("matrix", ["2.weight"]),
    ]
    optimizer = Tiger(groups, lr=0.1, weight_decay=0.0)
    before = conv.weight.detach().clone()
    rows = embedding.weight.detach().clone()
    (head(embedding(torch.arange(7))).sum() + conv(torch.ones(1, 2, 5)).sum()).backward()
    optimizer.step()
    rms = before.square().mean().sqrt()
    assert (conv.weight - before).abs().max().item() == pytest.approx(0.1 * rms.item(), rel=1e-5)
    moved = (embedding.weight - rows).abs()
    torch.testing.assert_close(moved.amax(-1), 0.1 * rows.square().mean(-1).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_zero_tensors_move_with_the_floor_and_never_without(foreach):
    def stepped(**options):
        p = nn.Parameter(torch.zeros(3, 4))
        optimizer = Tiger([{"params": [("lora_B", p)], "kind": "matrix"}], lr=1.0, foreach=foreach, **options)
        for _ in range(3):
            p.grad = torch.ones(3, 4)
            optimizer.step()
        return p.detach()

    with pytest.warns(UserWarning, match=r"below rms_floor.*: lora_B$") as caught:
        moved = stepped()
    assert len(caught) == 1
    assert (moved < 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(stepped(rms_floor=0.0), torch.zeros(3, 4))


def test_rare_bad_gradients_do_not_hurt_training():
    """A NaN once in 300 steps: the final loss stays within 5 % of the clean run."""
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets)
    final = {}
    for bad in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = Tiger(net, lr=0.01)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
        for step in range(300):
            rows = torch.randint(len(inputs), (64,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[rows]), targets[rows]).backward()
            if bad and step == 150:
                net[0].weight.grad[3, 3] = math.nan
            optimizer.step()
            scheduler.step()
        final[bad] = nn.functional.cross_entropy(net(inputs), targets).item()
    assert final[False] < 0.7  # it learns: chance is 2.3
    assert final[True] == pytest.approx(final[False], rel=0.05)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"beta": 1.0}, ValueError, r"beta must be in \[0, 1\), got 1.0"),
        ({"grad_accum_steps": 0}, ValueError, "grad_accum_steps must be at least 1, got 0"),
        ({"grad_accum_steps": 2.0}, TypeError, "grad_accum_steps must be an int"),
        ({"shrink": 0.0}, ValueError, r"shrink must be in \(0, 1\]"),
        ({"shrink": 1.5}, ValueError, "shrink must be in"),
        ({"rms_floor": -1.0}, ValueError, "rms_floor must be in"),
        ({"vector_scale": 0.0}, ValueError, "vector_scale must be in"),
        ({"average": 1}, TypeError, "average must be a bool"),
        ({"kind": "bias"}, ValueError, "kind must be one of 'embedding', 'norm_scale', 'vector', 'matrix', got 'bias'"),
    ],
)
def test_bad_options(options, error, match):
    p = nn.Parameter(torch.ones(2))
    group = {"params": [p], "kind": "vector"}
    if "kind" not in options:
        with pytest.raises(error, match=match):
            Tiger([group], **options)
    with pytest.raises(error, match=match):
        Tiger([{**group, **options}])


def test_complex_parameters_are_refused():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = Tiger([{"params": [p], "kind": "vector"}])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex"):
        optimizer.step()


def test_guessed_kinds_do_not_decay_vectors():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="without their kinds"):
        optimizer = Tiger([matrix, vector], lr=0.1, weight_decay=1.0)
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(vector, torch.ones(2))
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.9))


def test_function_checks_its_lists():
    with pytest.raises(ValueError, match="the lists must have one length"):
        tiger([torch.ones(1)], [None], [], kinds=["vector"], lr=0.1)


def test_in_the_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config)
    rows = [{"input_ids": torch.arange(8) % 7, "labels": torch.arange(8) % 7} for _ in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    groups = parameter_groups(net)
    trainer = transformers.Trainer(
        net, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(Tiger, {"params": groups, "lr": 1e-2})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trainer.train()
    kinds = {group["kind"] for group in trainer.optimizer.param_groups}
    assert kinds == {"embedding", "norm_scale", "matrix"}
    assert trainer.state.global_step == 3
    # Without "params" the Trainer passes two groups without kinds, and Tiger says so.
    plain = transformers.Trainer(net, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(Tiger, {"lr": 1e-2}))
    with pytest.warns(UserWarning, match="parameter_groups"):
        plain.create_optimizer()


def run_quadratic(steps=12, grads=None, **options):
    """One float64 matrix under given or random gradients."""
    p = nn.Parameter(torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4))
    optimizer = Tiger([{"params": [("w", p)], "kind": "matrix"}], lr=0.05, weight_decay=0.1, **options)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        p.grad = grads[step] if grads else torch.randn(3, 4, dtype=torch.float64, generator=generator)
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("foreach", [None, True, False])
def test_the_power_goes_from_the_sign_to_the_momentum(foreach):
    assert torch.equal(run_quadratic(sign_power=1.0, foreach=foreach)[0], run_quadratic(foreach=foreach)[0])
    found, optimizer = run_quadratic(sign_power=0.0, foreach=foreach)
    theta, m = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    for step in range(12):
        g = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        m = 0.965 * m + 0.035 * g
        theta = theta - 0.05 * theta.square().mean().sqrt() * (m + 0.1 * theta)
    torch.testing.assert_close(found, theta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(next(iter(optimizer.state.values()))["exp_avg"], m, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("power", [0.0, 0.3, 0.7])
def test_a_normalized_power_moves_as_far_as_the_sign(power):
    p = nn.Parameter(torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4))
    before = p.detach().clone()
    groups = [{"params": [("w", p)], "kind": "matrix"}]
    optimizer = Tiger(groups, lr=0.05, weight_decay=0.0, sign_power=power, normalize_power=True)
    p.grad = torch.randn(3, 4, dtype=torch.float64)
    optimizer.step()
    moved = (p.detach() - before).square().mean().sqrt()
    torch.testing.assert_close(moved, 0.05 * before.square().mean().sqrt(), rtol=1e-12, atol=0)
    zero = nn.Parameter(torch.ones(2))
    zero.grad = torch.zeros(2)
    groups = [{"params": [("z", zero)], "kind": "vector"}]
    Tiger(groups, sign_power=power, normalize_power=True).step()
    assert torch.equal(zero, torch.ones(2))


def test_a_power_that_follows_the_learning_rate():
    seen = []

    def power(ratio):
        seen.append(round(ratio, 6))
        return math.sqrt(ratio)

    p = nn.Parameter(torch.ones(2))
    optimizer = Tiger([{"params": [("w", p)], "kind": "vector"}], lr=0.1, sign_power=power)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert seen == [1.0, 0.5, 0.25]
    bad = Tiger([{"params": [("w", p)], "kind": "vector"}], sign_power=lambda ratio: 2.0)
    with pytest.raises(ValueError, match="the value of sign_power must be in"):
        bad.step()


@pytest.mark.parametrize("foreach", [None, True, False])
def test_noise_when_a_tensor_shrinks(foreach):
    def shrunk(noise, seed=0):
        p = nn.Parameter(torch.full((4000,), 2.0))
        groups = [{"params": [("w", p)], "kind": "matrix", "center": 0.5}]
        optimizer = Tiger(groups, shrink=0.9, shrink_noise=noise, seed=seed, foreach=foreach)
        p.grad = torch.full((4000,), math.nan)
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(before, torch.get_rng_state())
        return p.detach().double()

    torch.testing.assert_close(shrunk(0.0), torch.full((4000,), 1.85).double(), rtol=1e-6, atol=0)
    noisy = shrunk(0.1)
    assert noisy.mean().item() == pytest.approx(1.85, abs=5 * 0.2 / 4000**0.5)
    assert noisy.std().item() == pytest.approx(0.2, rel=0.06)
    assert torch.equal(noisy, shrunk(0.1))
    assert not torch.equal(noisy, shrunk(0.1, seed=1))


def test_the_norm_of_each_gradient_is_limited():
    large = [torch.full((3, 4), 10.0, dtype=torch.float64)] * 3
    limited = [torch.full((3, 4), 1 / 12**0.5, dtype=torch.float64)] * 3
    for foreach in (None, True, False):
        _, first = run_quadratic(3, large, tensor_clip_norm=1.0, foreach=foreach)
        _, second = run_quadratic(3, limited, foreach=foreach)
        for a, b in zip(first.state.values(), second.state.values(), strict=True):
            torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-12, atol=0)
    p, optimizer = run_quadratic(1, [torch.full((3, 4), math.inf, dtype=torch.float64)], tensor_clip_norm=1.0)
    assert p.isfinite().all()
    assert optimizer.nonfinite_events == {"w": 1}


def test_a_schedule_of_its_own_equals_the_scheduler():
    points = {4: 1.0, 8: 0.25}
    own, _ = run_quadratic(lr_schedule=points)
    p = nn.Parameter(torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4))
    optimizer = Tiger([{"params": [("w", p)], "kind": "matrix"}], lr=0.05, weight_decay=0.1)
    scheduler = piecewise_linear(optimizer, points)
    for step in range(12):
        p.grad = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(p.detach(), own, rtol=1e-14, atol=0)
