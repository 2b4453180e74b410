"""Tiger inside the backward pass equals plain accumulation, and holds at most one gradient at a time."""

import copy
import gc
import math

import pytest
import torch
from torch import nn

from danlu.optim import Tiger


def model(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 13))
    return net.to(dtype)


def batch(step):
    return torch.randint(13, (6,), generator=torch.Generator().manual_seed(step))


def train(net, optimizer, first, last, bad=None):
    for step in range(first, last):
        loss = nn.functional.cross_entropy(net(batch(step)), batch(step + 1000))
        if step == bad:
            loss = loss * math.nan
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


OPTIONS = [
    {},
    {"average": False, "beta": 0.9},
    {"nonfinite": "skip"},
    {"tensor_clip_norm": 0.1},
    {"foreach": True},
    {"foreach": False, "sign_power": 0.5},
    {"lr_schedule": {4: 1.0, 20: 0.1}},
]


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bad", [None, 5])
def test_equal_to_plain_accumulation_to_the_last_bit(k, options, bad):
    plain, inside = model(), model()
    first = Tiger(plain, lr=0.02, grad_accum_steps=k, **options)
    second = Tiger(inside, lr=0.02, grad_accum_steps=k, in_backward=True, **options)
    for optimizer, net in ((first, plain), (second, inside)):
        train(net, optimizer, 0, 20, bad)  # a ragged last cycle for k = 3 and 8
    assert equal(plain, inside)
    assert first.nonfinite_events == second.nonfinite_events
    for a, b in zip(plain.parameters(), inside.parameters(), strict=True):
        assert torch.equal(first.state[a]["exp_avg"], second.state[b]["exp_avg"])
        assert b.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_in_low_precision_too(dtype):
    plain, inside = model(dtype), model(dtype)
    train(plain, Tiger(plain, grad_accum_steps=2), 0, 12)
    train(inside, Tiger(inside, grad_accum_steps=2, in_backward=True), 0, 12)
    assert equal(plain, inside)


def test_resume_in_the_middle_of_a_cycle(tmp_path):
    def fresh():
        net = model()
        return net, Tiger(net, lr=0.02, grad_accum_steps=4, in_backward=True)

    whole, optimizer = fresh()
    train(whole, optimizer, 0, 18)
    half, optimizer = fresh()
    train(half, optimizer, 0, 7)
    torch.save({"net": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed, optimizer = fresh()
    resumed.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 7, 18)
    assert equal(whole, resumed)


class Tied(nn.Module):
    """One matrix is the embedding, the output layer, and a map in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(13, 13)
        self.head = nn.Linear(13, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.head(self.embedding(tokens))))


def test_tied_weights_are_folded_once():
    plain, inside = Tied().double(), Tied().double()
    train(plain, Tiger(plain, lr=0.02, grad_accum_steps=3), 0, 9)
    optimizer = Tiger(inside, lr=0.02, grad_accum_steps=3, in_backward=True)
    calls = []
    receive = optimizer._micro_step
    optimizer._micro_step = lambda *a: calls.append(1) or receive(*a)
    train(inside, optimizer, 0, 9)
    assert len(calls) == 9
    assert equal(plain, inside)


class Branches(nn.Module):
    """Two experts, of which a batch uses one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.unused = nn.Linear(4, 4)

    def forward(self, expert):
        return self.experts[expert](torch.ones(4)).square().sum()


@pytest.mark.parametrize("pattern", [[0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
def test_gradients_on_some_micro_steps_only(pattern):
    nets = Branches(), Branches()
    optimizers = [
        Tiger(nets[0], lr=0.05, grad_accum_steps=4),
        Tiger(nets[1], lr=0.05, grad_accum_steps=4, in_backward=True),
    ]
    unused = nets[1].unused.weight.detach().clone()
    for _ in range(2):
        for expert in pattern:
            for net, optimizer in zip(nets, optimizers, strict=True):
                net(expert).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert equal(*nets)
    assert torch.equal(nets[1].unused.weight, unused)


def test_memory_is_weights_and_momentum_and_one_gradient():
    """Live bytes of gradients, seen at every hand-over, and of everything else, counted."""
    layers, width, k = 8, 64, 4
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    optimizer = Tiger(net, grad_accum_steps=k, in_backward=True)
    one = width * width * 4
    live = []
    micro_step = optimizer._micro_step

    def watched(g, chosen, grads):
        held = sum(p.grad.numel() * 4 for p in net.parameters() if p.grad is not None)
        live.append(held + sum(grad.numel() * 4 for grad in grads))
        return micro_step(g, chosen, grads)

    optimizer._micro_step = watched
    for _ in range(2 * k):
        net(torch.randn(2, width)).square().mean().backward()
        optimizer.step()
    assert len(live) == 2 * k * layers
    assert max(live) == one
    weights = sum(p.numel() * 4 for p in net.parameters())
    state = sum(
        v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if hasattr(v, "numel")
    )
    assert weights + state + max(live) <= 8 * weights / 4 + one
    assert all(p.grad is None for p in net.parameters())


def test_a_second_gradient_before_step_is_refused():
    net = model()
    optimizer = Tiger(net, in_backward=True)
    net(batch(0)).sum().backward()
    with pytest.raises(RuntimeError, match=r"4\.bias got a second gradient before step\(\) was called"):
        net(batch(1)).sum().backward()
    optimizer.step()
    net(batch(1)).sum().backward()


def test_gradients_given_by_hand_are_taken_at_the_step():
    p = nn.Parameter(torch.ones(3))
    optimizer = Tiger([{"params": [p], "kind": "vector"}], lr=1.0, in_backward=True)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 0.5))


def test_loss_scaling():
    plain, scaled = model(), model()
    train(plain, Tiger(plain, lr=0.02, grad_accum_steps=2), 0, 8)
    optimizer = Tiger(scaled, lr=0.02, grad_accum_steps=2, in_backward=True)
    for step in range(8):
        optimizer.grad_scale = 2.0 ** (step % 5)
        loss = nn.functional.cross_entropy(scaled(batch(step)), batch(step + 1000))
        (loss * optimizer.grad_scale).backward()
        optimizer.step()
    assert equal(plain, scaled)


def test_schedulers_closures_and_unequal_micro_batches():
    nets = model(), model()
    optimizers = (
        Tiger(nets[0], lr=0.1, grad_accum_steps=2),
        Tiger(nets[1], lr=0.1, grad_accum_steps=2, in_backward=True),
    )
    for net, optimizer in zip(nets, optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(6):
            optimizer.micro_weight = 0.25 if step % 2 else 0.75

            def closure(net=net, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = net(batch(step)).square().mean()
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0
            scheduler.step()
    assert equal(*nets)


def test_groups_added_later_and_hooks_removed():
    net, extra = model(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = Tiger(net, lr=0.1, in_backward=True)
    optimizer.add_param_group({"params": [("extra", extra)], "kind": "vector"})
    (net(batch(0)).sum() + extra.sum()).backward()
    assert extra.grad is None
    assert not torch.equal(extra, torch.ones(2, dtype=torch.float64))
    optimizer.step()
    optimizer.remove_backward_hooks()
    (net(batch(0)).sum() + extra.sum()).backward()
    assert extra.grad is not None
    optimizer.step()
    assert optimizer.micro_step == 2


def test_copies_have_hooks_of_their_own():
    net = model()
    optimizer = Tiger(net, lr=0.02, grad_accum_steps=2, in_backward=True)
    train(net, optimizer, 0, 3)
    other, copied = copy.deepcopy((net, optimizer))
    train(net, optimizer, 3, 7)
    train(other, copied, 3, 7)
    assert equal(net, other)


def test_hooks_do_not_keep_the_optimizer_alive():
    net = model()
    optimizer = Tiger(net, in_backward=True)
    del optimizer
    gc.collect()
    before = [p.detach().clone() for p in net.parameters()]
    net(batch(0)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_bad_use():
    net = model()
    with pytest.raises(ValueError, match="nonfinite='raise' cannot leave all tensors unchanged"):
        Tiger(net, in_backward=True, nonfinite="raise")
    with pytest.raises(TypeError, match="in_backward must be a bool"):
        Tiger(net, in_backward=1)
    optimizer = Tiger(net, grad_accum_steps=3, in_backward=True)
    train(net, optimizer, 0, 1)
    optimizer.param_groups[0]["grad_accum_steps"] = 2
    with pytest.raises(RuntimeError, match="grad_accum_steps changed from 3 to 2 within a cycle"):
        train(net, optimizer, 1, 2)


@pytest.mark.parametrize("lazy", [(), ("embedding",)])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_embeddings_lazily_and_with_sparse_gradients(lazy, sparse, clip):
    found = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 4, sparse=sparse, padding_idx=0)
        options = {"lazy": lazy, "tensor_clip_norm": clip, "grad_accum_steps": 2, "in_backward": in_backward}
        optimizer = Tiger(embedding, lr=0.05, **options)
        for step in range(7):
            optimizer.zero_grad()
            if lazy and step == 3:
                optimizer.mark_rows(embedding.weight, torch.tensor([1, 2]))
            tokens = torch.randint(9, (4,), generator=torch.Generator().manual_seed(step))
            embedding(tokens).square().sum().backward()
            optimizer.step()
        found.append((embedding.weight.detach(), optimizer.state[embedding.weight]["exp_avg"]))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:Tiger got parameters")
def test_a_frozen_parameter_is_handed_over_once_it_is_thawed():
    frozen, other = nn.Parameter(torch.ones(2, 2), requires_grad=False), nn.Parameter(torch.ones(2, 2))
    optimizer = Tiger([frozen, other], in_backward=True)
    assert not frozen.requires_grad
    (frozen * other).sum().backward()
    optimizer.step()
    assert torch.equal(frozen.detach(), torch.ones(2, 2))
    frozen.requires_grad_(True)
    (frozen * other).sum().backward()
    assert frozen.grad is None
    optimizer.step()
    assert (frozen < 1).all()


@pytest.mark.filterwarnings("ignore:Tiger got parameters")
def test_a_checkpoint_can_be_loaded_after_a_backward_pass_that_was_given_up():
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = Tiger([param], in_backward=True)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    param.sum().backward()
    optimizer.load_state_dict(checkpoint)
    param.sum().backward()
    optimizer.step()
    assert optimizer.micro_step == 1
