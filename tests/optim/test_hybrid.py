"""Several optimizers as one: routing, one state, schedules, exact resume, closures, loss scaling."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from danlu.optim import HybridOptimizer, Lion, Tiger, parameter_groups, piecewise_linear

RULES = {
    "embedding": (AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "default": (Tiger, {"lr": 2e-2, "lazy": (), "grad_accum_steps": 1}),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=3), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def train(net, optimizers, steps, start=0, scheduler=None):
    for step in range(start, start + steps):
        tokens = torch.randint(11, (9,), generator=torch.Generator().manual_seed(step))
        net.zero_grad()
        net(tokens).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_equals_its_optimizers_by_hand():
    first, second = model(), model()
    hybrid = HybridOptimizer(first, RULES)
    groups = parameter_groups(second)
    by_hand = [
        AdamW([g for g in groups if g["kind"] == "embedding"], lr=1e-2, weight_decay=0.1),
        Tiger([g for g in groups if g["kind"] != "embedding"], lr=2e-2),
    ]
    train(first, [hybrid], 6)
    train(second, by_hand, 6)
    assert same(first, second)
    assert set(hybrid.state) == set(first.parameters())
    assert set(hybrid.state[first[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_one_checkpoint_resumes_exactly():
    first = model()
    optimizer = HybridOptimizer(first, RULES | {"default": (Tiger, {"lr": 2e-2, "grad_accum_steps": 3})})
    train(first, [optimizer], 5)
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = model()
    second.load_state_dict(saved["model"])
    resumed = HybridOptimizer(second, {"embedding": (AdamW, {"lr": 9.0}), "default": (Tiger, {"lr": 9.0})})
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.state is resumed._parts["default"].state
    assert all(a is b for a, b in zip(resumed.param_groups, resumed._groups_of_parts(), strict=True))
    train(first, [optimizer], 6, start=5)
    train(second, [resumed], 6, start=5)
    assert same(first, second)
    assert [group["lr"] for group in resumed.param_groups] == [1e-2, 2e-2, 2e-2, 2e-2]


def test_copies_go_on_alike():
    net = model()
    optimizer = HybridOptimizer(net, RULES)
    train(net, [optimizer], 3)
    twin = copy.deepcopy((net, optimizer))
    pickled = pickle.loads(pickle.dumps((net, optimizer)))
    train(net, [optimizer], 3, start=3)
    for other_net, other in (twin, pickled):
        train(other_net, [other], 3, start=3)
        assert same(net, other_net)


def test_schedulers_scale_every_group_from_its_own_rate():
    net = model()
    optimizer = HybridOptimizer(net, RULES)
    scheduler = piecewise_linear(optimizer, {0: 1.0, 4: 0.5})
    train(net, [optimizer], 4, scheduler=scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5e-2, 1e-2, 1e-2, 1e-2]
    before = [p.detach().clone() for p in net.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(net, [optimizer], 1, start=9)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_a_new_group_goes_to_its_rule_and_to_the_end():
    net = model()
    optimizer = HybridOptimizer(net, RULES)
    extra, table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))
    group = {"params": [("extra", extra)], "kind": "vector", "lr": 0.5}
    optimizer.add_param_group(group)
    optimizer.add_param_group({"params": [("table", table)], "kind": "embedding"})
    assert group == {"params": [("extra", extra)], "kind": "vector", "lr": 0.5}
    assert [g["rule"] for g in optimizer.param_groups] == ["embedding", *["default"] * 4, "embedding"]
    extra.grad, table.grad = torch.ones(3), torch.ones(4, 2)
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), 0.75))  # 0.5 of the rate, as Tiger moves a vector
    assert "exp_avg_sq" in optimizer.state[table]
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert [g["rule"] for g in optimizer.param_groups] == ["embedding", *["default"] * 4, "embedding"]
    assert optimizer.param_groups[4]["params"] == [extra]


def test_closure_is_called_once_with_gradients():
    net, calls = model(), []
    optimizer = HybridOptimizer(net, RULES)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.arange(5)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [True]


def test_grad_scaler():
    first, second = model(), model()
    train(first, [HybridOptimizer(first, RULES)], 6)
    optimizer = HybridOptimizer(second, RULES)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for step in range(7):
        tokens = torch.randint(11, (9,), generator=torch.Generator().manual_seed(step % 6))
        optimizer.zero_grad()
        loss = scaler.scale(second(tokens).square().mean())
        loss.backward()
        if step == 6:  # an overflow that the scaler finds is a pure skip of all parts
            second[1].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_padding_rows_never_move():
    net = model()
    with torch.no_grad():
        net[0].weight[3] = 2.0
    optimizer = HybridOptimizer(net, RULES)  # AdamW's decay would shrink the row
    train(net, [optimizer], 5)
    assert torch.equal(net[0].weight[3], torch.full((6,), 2.0))


def test_options_of_a_group_win():
    net = model()
    groups = parameter_groups(net, kinds={"matrix": {"lr": 0.7}})
    rules = {"matrix": (Lion, {"lr": 0.1}), "default": (SGD, {"lr": 0.2})}
    optimizer = HybridOptimizer(groups, rules)
    assert {g["kind"]: g["lr"] for g in optimizer.param_groups} == {
        "matrix": 0.7,
        "embedding": 0.2,
        "norm_scale": 0.2,
        "vector": 0.2,
    }


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ({"embeddings": (AdamW, {}), "default": (Lion, {})}, ValueError, "rules must be one of .*got 'embeddings'"),
        ({"embedding": AdamW, "default": (Lion, {})}, TypeError, r"rules\['embedding'\] must be a pair of a class"),
        ({"embedding": (nn.Linear, {}), "default": (Lion, {})}, TypeError, "must be a pair of an optimizer's class"),
        ({"embedding": (AdamW, 1e-3), "default": (Lion, {})}, TypeError, "must be a pair of an optimizer's class"),
        ({"embedding": (AdamW, {})}, ValueError, "rules name neither 'norm_scale' nor 'default'"),
        (
            {kind: (Lion, {}) for kind in ("embedding", "norm_scale", "vector", "matrix", "default")},
            ValueError,
            "no parameters for rules 'default'",
        ),
    ],
)
def test_bad_rules(rules, error, match):
    with pytest.raises(error, match=match):
        HybridOptimizer(model(), rules)


def test_bad_groups_and_checkpoints():
    with pytest.raises(ValueError, match="params must be a model or groups whose kind is one of"):
        HybridOptimizer([{"params": [nn.Parameter(torch.ones(2))]}], RULES)
    with pytest.raises(ValueError, match="got 'Parameter'"):
        HybridOptimizer(model().parameters(), RULES)
    optimizer = HybridOptimizer(model(), RULES)
    other = HybridOptimizer(model(), {"matrix": (AdamW, {}), "default": (Lion, {})})
    with pytest.raises(ValueError, match="the checkpoint has groups of rules"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="padding_idx=9 is not a row"):
        optimizer.add_param_group(
            {"params": [("t", nn.Parameter(torch.ones(2, 2)))], "kind": "matrix", "padding_idx": 9}
        )


def test_a_parameter_belongs_to_one_rule():
    p = nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [p], "kind": "embedding"}, {"params": [p], "kind": "matrix"}]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        HybridOptimizer(groups, {"embedding": (AdamW, {}), "matrix": (Lion, {})})


@pytest.mark.parametrize("what", ["padding", "twice"])
def test_a_refused_group_leaves_no_trace(what):
    p, q, r = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    groups = [{"params": [p], "kind": "embedding"}, {"params": [q], "kind": "matrix"}]
    optimizer = HybridOptimizer(groups, {"embedding": (AdamW, {"lr": 0.1}), "matrix": (torch.optim.SGD, {"lr": 0.1})})
    extra = {"params": [r], "padding_idx": 9} if what == "padding" else {"params": [p, r]}
    with pytest.raises(ValueError, match="is not a row" if what == "padding" else "more than one parameter group"):
        optimizer.add_param_group({**extra, "kind": "matrix"})
    for param in (p, q, r):
        param.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(r, torch.ones(2, 2))
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 0.9), rtol=0, atol=2e-3)
    optimizer.load_state_dict(optimizer.state_dict())


def test_bad_gradients_are_counted_by_name():
    net = model()
    optimizer = HybridOptimizer(net, {"embedding": (Lion, {"lr": 1e-3}), "default": (Tiger, {"lr": 1e-3})})
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    net[0].weight.grad[0, 0] = float("nan")
    net[3].bias.grad[1] = float("inf")
    assert optimizer.nonfinite_events == {}
    optimizer.step()
    assert optimizer.nonfinite_events == {"0.weight": 1, "3.bias": 1}
    with_adam = HybridOptimizer(net, RULES)
    assert with_adam.nonfinite_events == {}


def test_rows_are_marked_in_the_optimizer_that_has_them():
    net = model()
    rules = {"embedding": (Lion, {"lr": 1e-3, "lazy": True}), "default": (torch.optim.AdamW, {"lr": 1e-3})}
    optimizer = HybridOptimizer(net, rules)
    before = net[0].weight.detach().clone()
    net[0].weight.grad = torch.ones_like(before)
    optimizer.mark_rows(net[0].weight, torch.tensor([2, 5]))
    optimizer.step()
    assert (net[0].weight != before).any(1).nonzero()[:, 0].tolist() == [2, 5]
    with pytest.raises(ValueError, match="updated by AdamW, which has no lazy rows"):
        optimizer.mark_rows(net[1].weight, torch.tensor([0]))
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        optimizer.mark_rows(nn.Parameter(torch.ones(3, 2)), torch.tensor([0]))


def test_embeddings_are_watched_in_the_optimizer_that_watches():
    net = model()
    optimizer = HybridOptimizer(net, {"embedding": (Lion, {"lr": 1e-3}), "default": (torch.optim.AdamW, {"lr": 1e-3})})
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    with pytest.warns(UserWarning, match="lazy"):
        found = [optimizer.check_embeddings() for _ in range(101)]
    assert [names for names in found if names] == [["0.weight"]]
