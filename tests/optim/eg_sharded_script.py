"""Run by two processes: the optimizers by exponentiated gradients on sharded tensors equal those on whole ones."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from danlu.optim import EGSGD, EGStepSize, ExponentiatedGradient

MAKERS = [
    lambda p: EGStepSize("sgdm", p, lr=0.1, scale_lr=0.3, gain_lr=0.1),
    lambda p: EGStepSize("sgdm", p, lr=0.1, scale_lr=0.3, scale_scope="global"),
    lambda p: EGStepSize("adam", p, lr=0.1, scale_lr=0.3, sign_gain=False),
    lambda p: EGStepSize(torch.optim.SGD(p, lr=0.1, momentum=0.5), scale_lr=0.3),
    lambda p: EGSGD(p, lr=0.1, gamma=0.2),
    lambda p: ExponentiatedGradient(p, lr=0.1),
    lambda p: ExponentiatedGradient(p, lr=0.1, mode="signed"),
    lambda p: ExponentiatedGradient(p, lr=0.1, mode="simplex"),
    lambda p: ExponentiatedGradient(p, lr=0.1, mode="simplex", dim=0, floor=0.01),
]


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for index, make in enumerate(MAKERS):
        torch.manual_seed(index)
        start = torch.rand(6, 5, dtype=torch.float64) + 0.1
        start = start / start.sum(0 if index == 8 else -1, keepdim=True)
        whole = nn.Parameter(start.clone())
        sharded = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
        optimizers = make([whole]), make([sharded])
        for step in range(6):
            grad = torch.randn(6, 5, dtype=torch.float64)
            if step == 3:
                grad[5, 0] = float("nan")  # in the shard of the last process only
            whole.grad, sharded.grad = grad.clone(), distribute_tensor(grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(sharded.full_tensor(), whole.detach(), rtol=1e-12, atol=1e-13)
        assert [o.nonfinite_events for o in optimizers] == [{"param_groups[0]['params'][0]": 1}] * 2, index
        if index < 4:
            first, second = (list(o.scales().values()) for o in optimizers)
            assert abs(first[0] - second[0]) < 1e-12, index
            assert first[0] != 1.0, index
    if dist.get_rank() == 0:
        print("sharded equals whole", flush=True)
    # Nobody leaves while the other still talks; then at once, since threads of gloo may abort an orderly exit.
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
