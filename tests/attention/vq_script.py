"""Run by two processes: a quantizer that sees half of the batch in each equals one that sees it whole."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from danlu.attention import VectorQuantizer, VQAttention


class Net(nn.Module):
    def __init__(self, saved: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.saved = saved
        self.layers = nn.ModuleList(
            VQAttention(8, num_heads=2, num_codes=5, block_size=3, decay=0.7, commitment=0.1) for _ in range(2)
        )

    def forward(self, hidden):
        loss = 0.0
        for layer in self.layers:
            change, quantized = checkpoint(layer, hidden, use_reentrant=False) if self.saved else layer(hidden)
            hidden, loss = hidden + change, loss + quantized.loss
        return hidden, loss


def train(net, batches):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in batches:
        hidden, loss = net(batch)
        (hidden.square().mean() + loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(3, 4, 2, 9, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 9, generator=generator) > 0.3
    torch.manual_seed(0)
    module = VectorQuantizer(6, 4, 2, decay=0.8).double()
    sums, counts = module.ema_sums.clone(), module.ema_counts.clone()
    for batch in key:
        # By hand, on the whole batch.
        words = sums / counts.clamp_min(0.01)[..., None]
        codes = (batch[:, :, :, None] - words[:, None]).square().sum(-1).argmin(-1)
        hits = nn.functional.one_hot(codes, 6).double() * mask[:, None, :, None]
        counts = 0.8 * counts + 0.2 * hits.sum((0, 2))
        sums = 0.8 * sums + 0.2 * torch.einsum("bhns,bhnd->hsd", hits, batch)
        module(batch[2 * rank : 2 * rank + 2], mask[2 * rank : 2 * rank + 2])
    module.update()
    torch.testing.assert_close(module.ema_counts, counts, rtol=1e-12, atol=0)
    torch.testing.assert_close(module.ema_sums, sums, rtol=1e-12, atol=1e-14)

    dead = VectorQuantizer(6, 4, 2, decay=0.1, reseed_below=0.9).double()
    dead.set_codebook(torch.full((2, 6, 4), 50.0))
    for batch in key:
        dead(batch[2 * rank : 2 * rank + 2])
    held = [torch.empty_like(dead.codebook) for _ in range(2)]
    dist.all_gather(held, dead.codebook)
    assert torch.equal(held[0], held[1])
    assert float((held[0] - 50).abs().amax(-1).min()) > 1, "every codeword was replaced by a key"

    hidden = torch.randn(4, 4, 11, 8, generator=generator)
    for saved in (False, True):
        whole, shared = Net(saved), DistributedDataParallel(Net(saved))
        train(shared, hidden[:, 2 * rank : 2 * rank + 2])
        # One process that knows of no other: the default group is what the statistics are summed over.
        dist.barrier()
        with single():
            train(whole, hidden)
        for (name, mine), theirs in zip(shared.module.state_dict().items(), whole.state_dict().values(), strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    if rank == 0:
        print("two processes equal one", flush=True)
    # Nobody leaves while the other still talks; then at once, since threads of gloo may abort an orderly exit.
    dist.barrier()
    os._exit(0)


class single:  # noqa: N801
    """Within it the quantizer believes that there is one process."""

    def __enter__(self):
        self.size, dist.get_world_size = dist.get_world_size, lambda *_: 1

    def __exit__(self, *_):
        dist.get_world_size = self.size


if __name__ == "__main__":
    main()
