"""Run by test_distributed.py in two processes over gloo; prints one JSON object: check -> passed, or the error."""

import json
import os
import traceback
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from danlu.optim import Amos, EGStepSize, HybridOptimizer, Lion, Tiger, parameter_groups

warnings.simplefilter("ignore")


def model(dtype=torch.float64):
    torch.manual_seed(0)
    # 13 and 5 rows do not divide by two processes.
    layers = [nn.Embedding(13, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 5)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(net, step, rank):
    tokens = torch.randint(13, (6,), generator=torch.Generator().manual_seed(10 * step + rank))
    return net(tokens).square().mean()


def alone(make, dtype=torch.float64, steps=6, bad=None):
    """One process that sees both halves of every batch."""
    net = model(dtype)
    optimizer = make(net)
    for step in range(steps):
        grads = []
        for rank in range(2):
            net.zero_grad()
            loss_of(net, step, rank).backward()
            grads.append([p.grad.clone() for p in net.parameters()])
        for p, first, second in zip(net.parameters(), *grads, strict=True):
            p.grad = (first + second) / 2
        if step == bad:
            net[1].weight.grad[0, 0] = float("nan")
        optimizer.step()
        net.zero_grad()
    return net, optimizer


def together(net, optimizer, first=0, last=6, bad=None):
    for step in range(first, last):
        loss_of(net, step, dist.get_rank()).backward()
        if step == bad:
            spoil(net)
        optimizer.step()
        optimizer.zero_grad()


def spoil(net):
    grad = net[1].weight.grad
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    if dist.get_rank() == 0:
        local[0, 0] = float("nan")


def sharded(dtype=torch.float64):
    net = model(dtype)
    for layer in (net[1], net[4], net):
        fully_shard(layer)
    return net


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def distance(net, other):
    return max(
        (full(a) - b.detach()).abs().max().item() for a, b in zip(net.parameters(), other.parameters(), strict=True)
    )


def lion(net):
    return Lion(parameter_groups(net), lr=0.01, weight_decay=0.1)


def tiger(net, **options):
    options = {"lr": 0.02, "grad_accum_steps": 2, **options}
    inner = net.module if isinstance(net, DistributedDataParallel) and not options.get("in_backward") else net
    return Tiger(inner, **options)


def tiger_in_backward(net):
    return tiger(net, in_backward=True)


def check_data_parallel():
    for make in (lion, tiger, tiger_in_backward):
        net = DistributedDataParallel(model())
        together(net, make(net))
        reference, _ = alone(lion if make is lion else tiger)
        assert distance(net, reference) == 0.0, make.__name__


def check_no_sync_is_refused():
    for inside in (False, True):
        net = DistributedDataParallel(model())
        optimizer = Tiger(net, grad_accum_steps=2, in_backward=inside)
        try:
            with net.no_sync():
                loss_of(net, 0, dist.get_rank()).backward()
            optimizer.step()
            found = ""
        except RuntimeError as error:
            found = str(error)
        assert "not averaged over the processes (no_sync)" in found


def check_fully_sharded():
    for make in (lion, tiger, tiger_in_backward):
        net = sharded()
        optimizer = make(net)
        together(net, optimizer)
        reference, _ = alone(lion if make is lion else tiger)
        assert distance(net, reference) < 1e-15, (make.__name__, distance(net, reference))
        assert all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values())
        if make is tiger_in_backward:
            assert all(p.grad is None for p in net.parameters())


def check_a_bad_gradient_on_one_process_counts_on_all():
    for make in (lion, tiger):
        net = sharded()
        optimizer = make(net)
        together(net, optimizer, bad=3)
        reference, expected = alone(make, bad=3)
        assert distance(net, reference) < 1e-15
        assert optimizer.nonfinite_events == expected.nonfinite_events == {"1.weight": 1}


def check_stochastic_rounding_of_shards():
    """Sharding by rows does not change which elements are rounded up."""
    for make in (Lion, Tiger):
        net, reference = sharded(torch.bfloat16), model(torch.bfloat16)
        optimizers = [make(parameter_groups(n), lr=1e-3, seed=3) for n in (net, reference)]
        for step in range(5):
            for n in (net, reference):
                for i, p in enumerate(n.parameters()):
                    generator = torch.Generator().manual_seed(100 * step + i)
                    whole = torch.randn(p.shape, generator=generator).to(torch.bfloat16)
                    if isinstance(p, DTensor):
                        rows = whole.chunk(dist.get_world_size())
                        mine = rows[dist.get_rank()] if dist.get_rank() < len(rows) else whole[:0]
                        p.grad = DTensor.from_local(mine, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                    else:
                        p.grad = whole
            optimizers[0].step()
            optimizers[1].step()
        # The root mean square of a shard adds up in another order, which may turn a tie; Lion has none.
        same = [
            (full(a) == b).double().mean().item() for a, b in zip(net.parameters(), reference.parameters(), strict=True)
        ]
        assert min(same) == 1.0 if make is Lion else min(same) > 0.98, same


def check_noise_of_shards():
    net, reference = sharded(), model()
    for n in (net, reference):
        optimizer = Tiger(n, shrink=0.5, shrink_noise=0.1, seed=1)
        for p in n.parameters():
            p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
    assert distance(net, reference) < 1e-15


def check_padding_rows_of_shards():
    """Rows of the first and of the second process, with decay and momentum that would move them."""

    def hybrid(groups):
        return HybridOptimizer(groups, {"default": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5})})

    makers = (
        lambda groups: Lion(groups, lr=0.1, weight_decay=0.5),
        lambda groups: Lion(groups, lr=0.1, weight_decay=0.5, lazy=("embedding",)),
        lambda groups: Tiger(groups, lr=0.1, weight_decay=0.5),
        lambda groups: Amos(groups, lr=0.1, scales=0.1, extra_l2=0.5),
        lambda groups: EGStepSize("adam", groups, lr=0.1, weight_decay=0.5),
        hybrid,
    )
    for make in makers:
        for row in (0, 6, 7, 12):
            net = sharded()
            net[0].padding_idx = row
            before = full(net[0].weight).clone()
            together(net, make(parameter_groups(net)))
            after = full(net[0].weight)
            assert torch.equal(before[row], after[row]), row
            assert not torch.equal(before, after)


def check_shrinking_of_shards():
    for make in (
        lambda net: Lion(parameter_groups(net), lr=0.01, nonfinite="shrink", shrink=0.5),
        lambda net: EGStepSize("sgdm", parameter_groups(net), lr=0.1, nonfinite="shrink", shrink=0.5),
    ):
        net = sharded()
        optimizer = make(net)
        together(net, optimizer, bad=3)
        reference, expected = alone(make, bad=3)
        assert distance(net, reference) < 1e-14
        assert optimizer.nonfinite_events == expected.nonfinite_events == {"1.weight": 1}


def check_full_state_dict_round_trip():
    options = StateDictOptions(full_state_dict=True)
    for make in (lion, tiger):
        net = sharded()
        optimizer = make(net)
        together(net, optimizer, 0, 3)  # in the middle of a cycle of Tiger
        saved = get_optimizer_state_dict(net, optimizer, options=options)
        weights = [full(p).clone() for p in net.parameters()]
        other = sharded()
        for p, w in zip(other.parameters(), weights, strict=True):
            rows = w.chunk(dist.get_world_size())
            if p.to_local().numel():
                p.to_local().detach().copy_(rows[dist.get_rank()])
        resumed = make(other)
        set_optimizer_state_dict(other, resumed, saved, options=options)
        together(net, optimizer, 3, 6)
        together(other, resumed, 3, 6)
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(full(a), full(b)), make.__name__


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def main():
    dist.init_process_group("gloo")
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()[-1500:]
    gathered = [None, None]
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        print(json.dumps({name: [one[name] for one in gathered] for name in CHECKS}), flush=True)
    # Nobody leaves while the other still talks; then at once, since threads of gloo may abort an orderly exit.
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
