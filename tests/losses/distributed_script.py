"""Run by `torch.distributed.run` with two processes: the chunked head under DDP and FSDP2, against one process.

Prints JSON, check -> what every rank found.
"""

import copy
import json
import os
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from danlu.losses import EMO, EMOLoss, TaiLr, emo_loss, linear_loss, linear_tailr_loss

MESH = init_device_mesh("cpu", (2,))
RANK = MESH.get_local_rank()
CLASSES = 21


class Head(nn.Linear):
    """A head that computes the loss where FSDP2 has its weight whole."""

    def forward(self, hidden: Tensor, target: Tensor, loss) -> Tensor:
        return linear_loss(hidden, self.weight, target, loss, linear_bias=self.bias, chunk_size=3)


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 8)
        self.body = nn.Linear(8, 8)
        self.head = Head(8, CLASSES)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, target: Tensor, loss) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))), target, loss)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, target = (torch.randint(CLASSES, (2, 10), generator=generator) for _ in range(2))
    # Both halves have as many tokens that count, so that the mean of the means is the mean.
    target[:, ::4] = -100
    return tokens, target


def expected(model: Model, loss) -> dict[str, Tensor]:
    alone = copy.deepcopy(model)
    alone(*batch(), loss).backward()
    return {name: parameter.grad for name, parameter in alone.named_parameters()}


def compare(found: dict[str, Tensor], model: Model, loss) -> None:
    for name, grad in expected(model, loss).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)


def build(tied: bool) -> Model:
    torch.manual_seed(0)
    return Model(tied)


def mine() -> tuple[Tensor, Tensor]:
    tokens, target = batch()
    return tokens[RANK : RANK + 1], target[RANK : RANK + 1]


def check_ddp() -> None:
    for tied in (False, True):
        for loss in (TaiLr(0.3), EMO(cost_embedding="head", max_ratio=3.0)):
            model = build(tied)
            wrapped = DistributedDataParallel(copy.deepcopy(model))
            wrapped(*mine(), loss).backward()
            compare({name: p.grad for name, p in wrapped.module.named_parameters()}, model, loss)


def check_fsdp2() -> None:
    for tied in (False, True):
        for loss in (TaiLr(0.3), EMO(cost_embedding="head", max_ratio=3.0)):
            model = build(tied)
            sharded = copy.deepcopy(model)
            # A tied weight belongs to the root, which both of its users run within.
            if not tied:
                fully_shard(sharded.head, mesh=MESH)
            fully_shard(sharded, mesh=MESH)
            sharded(*mine(), loss).backward()
            compare({name: p.grad.full_tensor() for name, p in sharded.named_parameters()}, model, loss)


def check_global_count() -> None:
    """Unequal halves: every process divides by the count of all and multiplies by their number."""
    model = build(False)
    tokens, target = batch()
    target[1, :6] = -100
    count = (target != -100).sum()
    wrapped = DistributedDataParallel(copy.deepcopy(model.body))
    head = model.head.weight.detach().clone().requires_grad_()
    hidden = model.embedding(tokens).detach()
    value = 2 * linear_tailr_loss(wrapped(hidden[RANK]), head, target[RANK], normalizer=count)
    value.backward()
    alone = copy.deepcopy(model.body)
    linear_tailr_loss(alone(hidden), head.detach(), target).backward()
    torch.testing.assert_close(wrapped.module.weight.grad, alone.weight.grad, rtol=1e-5, atol=1e-7)


def check_emo_of_a_sharded_head() -> None:
    """The module copies the whole head, and again after it has changed."""
    head = nn.Linear(8, CLASSES, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(2)))
    expected = head.weight.detach().clone()
    fully_shard(head, mesh=MESH)
    loss = EMOLoss.from_model(head, refresh_every=1, mode="pure")
    logits, target = torch.randn(4, CLASSES), torch.arange(4)
    first = emo_loss(logits, target, cost_embedding=expected, mode="pure")
    torch.testing.assert_close(loss(logits, target), first)
    with torch.no_grad():
        head.weight.abs_()
    second = emo_loss(logits, target, cost_embedding=expected.abs(), mode="pure")
    torch.testing.assert_close(loss(logits, target), second)
    assert abs(second - first) > 0.1


def check_sharded_weight_is_refused() -> None:
    head = nn.Linear(8, CLASSES)
    fully_shard(head, mesh=MESH)
    with pytest.raises(TypeError, match="compute the loss inside the forward"):
        linear_tailr_loss(torch.zeros(2, 8), head.weight, torch.zeros(2, dtype=torch.int64))


def run(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception:
        return traceback.format_exc()[-1500:]
    return "passed"


def main() -> None:
    found = {name[6:]: run(check) for name, check in sorted(globals().items()) if name.startswith("check_")}
    every: list[dict[str, str]] = [{}, {}]
    dist.all_gather_object(every, found)
    if RANK == 0:
        print(json.dumps({name: [part[name] for part in every] for name in found}), flush=True)
    # Nobody leaves while the other still talks; then at once, since threads of gloo may abort an orderly exit.
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
