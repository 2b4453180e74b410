"""ReRoPE in bands beside causal `scaled_dot_product_attention` and the published form with two score matrices.

8 heads of 64 channels, one thread, interleaved in one process. `scaled_dot_product_attention` gets queries and keys
that are rotated already; ours rotates them, too. The floor is the work of one causal attention: every visible pair is
scored once, in 4 d operations forward and 10 d backward, and the table has the rate at which that is done. The
published form holds some 10 GiB of scores at 4096 positions, and is left out beyond. Attention to both sides, and under
a mask with gaps, is beside SDPA for the same. Limits at a window of an eighth: ReRoPE 1.3 times SDPA forward and 1.4
times forward and backward, Leaky ReRoPE 1.5 times.

Then the peak of the memory above the inputs', forward and backward, each in a fresh process, in units of L H d
elements. The limit is 6 units above SDPA, and the same number at every length, which is memory linear in the length.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from _measure import PeakMemory, in_fresh_process, interleave, run_tests, save, show, summary
from danlu.attention import rerope_attention, rope_attention

HEADS, DIM, ROUNDS = 8, 64, 5
LENGTHS = [4096, 8192]
MEMORY_LENGTHS = [2048, 4096, 8192, 16384]
# SDPA first.
MEASURED = ["torch SDPA, causal", "danlu RoPE", "danlu ReRoPE", "danlu Leaky ReRoPE"]


def tensors(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM, generator=generator).requires_grad_() for _ in range(3)]


def candidates(length: int) -> dict[str, Callable[..., Tensor]]:
    window = length // 8
    # Every tenth key is hidden, so no span of visible keys is long.
    visible = torch.arange(length)[None] % 10 != 5
    causal = torch.ones(length, length, dtype=torch.bool).tril_() & visible
    return {
        "torch SDPA, causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "danlu RoPE": rope_attention,
        "danlu ReRoPE": lambda q, k, v: rerope_attention(q, k, v, window=window),
        "danlu Leaky ReRoPE": lambda q, k, v: rerope_attention(q, k, v, window=window, slope=0.25),
        "torch SDPA, both sides": F.scaled_dot_product_attention,
        "danlu ReRoPE, both sides": lambda q, k, v: rerope_attention(q, k, v, window=window, is_causal=False),
        "torch SDPA, causal with gaps": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=causal),
        "danlu ReRoPE, causal with gaps": lambda q, k, v: rerope_attention(q, k, v, window=window, attn_mask=visible),
        "two score matrices (reference)": lambda q, k, v: rerope_attention(q, k, v, window=window, backend="reference"),
    }


def forward(attention: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return attention(*inputs)

    return run


def both(attention: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(attention(*inputs).sum(), inputs)

    return run


def peak(name: str, length: int) -> None:
    """Run in a fresh process: elements held at the peak of forward and backward, in units of L H d."""
    torch.set_num_threads(1)
    attention, inputs = candidates(length)[name], tensors(length)
    small = tensors(600)
    torch.autograd.grad(candidates(600)[name](*small).sum(), small)
    with PeakMemory() as memory:
        torch.autograd.grad(attention(*inputs).sum(), inputs)
    print(json.dumps({"units": memory.extra / (4 * length * HEADS * DIM)}))


def memory() -> dict[str, dict[str, float]]:
    """Peaks by candidate and length, and the distance to SDPA's where it is largest."""
    # Blocks from the system and back, or what the allocator keeps for later counts as held. Read when a process starts.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    found = {
        name: {f"L={n}": in_fresh_process(__file__, "peak", name, str(n))["units"] for n in MEMORY_LENGTHS}
        for name in MEASURED
    }
    for row in found.values():
        above = [row[f"L={n}"] - found[MEASURED[0]][f"L={n}"] for n in MEMORY_LENGTHS]
        row |= {"most above SDPA": max(above), "last over first": row[f"L={MEMORY_LENGTHS[-1]}"] / row["L=2048"]}
    return found


def main() -> None:
    run_tests("tests/attention/test_bands.py", "tests/attention/test_rerope.py", "-m", "not slow")
    torch.set_num_threads(1)
    content = {}
    for length in LENGTHS:
        for title, make in (("forward", forward), ("forward and backward", both)):
            inputs = tensors(length)
            found = {
                name: f for name, f in candidates(length).items() if length <= LENGTHS[0] or "matrices" not in name
            }
            runs = {name: make(attention, inputs) for name, attention in found.items()}
            rows = summary(interleave(runs, rounds=ROUNDS, warmup=1), "torch SDPA, causal")
            work = (4 if make is forward else 14) * DIM * HEADS * length * (length + 1) / 2
            for row in rows.values():
                row["floor_GFLOP_per_s"] = work / row["median_ms"] / 1e6
            show(f"{title}, {length} positions, window {length // 8}, ratio to SDPA", rows)
            content[f"{title} {length}"] = rows
    peaks = memory()
    show("peak above the inputs, forward and backward, elements over L H d", peaks)
    print(f"written to {save('rerope', {'times': content, 'memory': peaks})}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], int(sys.argv[3]))
    else:
        main()
