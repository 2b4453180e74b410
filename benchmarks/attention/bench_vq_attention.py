"""Attention to quantized keys in blocks beside causal `scaled_dot_product_attention`: time, memory, growth to 65536.

8 heads of 64 channels, 256 codewords, blocks of 256, one thread, interleaved in one process. There is no other PyTorch
implementation of Transformer-VQ to compare with. The floor of the time is the larger of two: the flops of the products
that the definitions need, at the rate of a large matrix product on this machine, and the bytes that must be read and
written once, at the rate of a copy. Causal SDPA scores L / 2 keys per query; ours scores half a block and the
codewords, and finds the nearest code of every key; backward, one and a half blocks. Tables of the states are bytes of
ours alone. `floor_ratio` is the ratio of the floors.

The targets are: forward and backward faster than SDPA from 4096 tokens on, and at least three times as fast at 16384;
linear growth to 65536 (a plot for the guide, drawn with vl-convert of the extra `lab`); peak memory, each in a fresh
process, linear in the length.

With the argument "quick", few rounds and lengths, and nothing is saved.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from _lengths import (
    DIM,
    HEADS,
    Attention,
    both,
    draw,
    forward,
    peak,
    peaks,
    per_1024_tokens,
    rates,
    tensors,
    time_per_token,
)
from torch.nn import functional as F

from _measure import interleave, run_tests, save, show, summary
from danlu.attention import vq_attention

CODES, BLOCK = 256, 256
SDPA, VQ, BIASED = "torch SDPA, causal", "danlu VQ", "danlu VQ, learned bias"
REROPE = "danlu VQ, ReRoPE"
LENGTHS = [1024, 2048, 4096, 8192, 16384]
# Here SDPA is too slow to wait for, or to compare with.
ONLY_VQ = [32768, 65536]
GROWTH = [*LENGTHS, *ONLY_VQ]
LONGEST_MEMORY_OF_OTHERS = 16384


def candidates() -> dict[str, Attention]:
    generator = torch.Generator().manual_seed(1)
    codebook = torch.randn(HEADS, CODES, DIM, generator=generator)
    bias = torch.randn(HEADS, 2 * BLOCK, generator=generator).requires_grad_()
    return {
        SDPA: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        VQ: lambda q, k, v: vq_attention(q, k, v, codebook, block_size=BLOCK),
        REROPE: lambda q, k, v: vq_attention(q, k, v, codebook, block_size=BLOCK, window=BLOCK),
        BIASED: lambda q, k, v: vq_attention(q, k, v, codebook, block_size=BLOCK, bias=bias),
    }


def flops(name: str, length: int, backward: bool) -> float:
    """Of the products that the definition needs."""
    pair = 2 * 2 * DIM * length * HEADS
    if name == SDPA:
        return pair * length / 2 * (3.5 if backward else 1.0)
    near = 0.5 * BLOCK if name == VQ else 1.5 * BLOCK
    total = pair * (near + CODES) + 2 * DIM * length * CODES * HEADS
    # Backward: scores again, and four products; codewords get no gradient.
    return total + (pair * (2.5 * 1.5 * BLOCK + 2.0 * CODES) if backward else 0.0)


def traffic(name: str, length: int, backward: bool) -> float:
    """Bytes that must be read and written: inputs, output, statistics, gradients; of ours the states of the blocks."""
    rows = 4 * HEADS * length * (4 * DIM + 1 + (8 * DIM + 1 if backward else 0))
    if name == SDPA:
        return rows
    state = 4 * HEADS * -(-length // BLOCK) * CODES * (DIM + 1)
    # Written and read; backward read again, and their gradients written and read.
    return rows + 8 * HEADS * length + state * (5 if backward else 2)


def targets(content: dict[str, dict[str, dict[str, float]]], growth: dict[str, dict[str, float]]) -> dict[str, object]:
    """What was to be reached, and what was."""
    found: dict[str, object] = {}
    for length in (n for n in LENGTHS if n >= 4096):
        rows = content.get(f"forward and backward {length}")
        if rows is not None:
            limit = 1 / 3 if length == 16384 else 1.0
            ratio = rows[VQ]["ratio"]
            found[f"forward and backward {length}"] = {"ratio": ratio, "limit": limit, "met": ratio <= limit}
    for title, line in growth.items():
        if not title.startswith("VQ"):
            continue
        # From the shortest length that fills several blocks.
        low, high, per_token = time_per_token(line, shortest=4096)
        found[f"{title}: time per token at {high} over {low}"] = {"ratio": per_token}
    return found


def main(quick: bool) -> None:
    if not quick:
        run_tests("tests/attention/test_vq_attention.py", "tests/attention/test_vq_layout.py")
    torch.set_num_threads(1)
    lengths = [1024, 4096] if quick else LENGTHS
    attentions = candidates()
    rate = rates()
    print(f"{rate['flops'] / 1e9:.0f} GFLOP/s of a matrix product, {rate['bytes'] / 1e9:.1f} GB/s of a copy")
    content: dict[str, dict[str, dict[str, float]]] = {}
    names = {VQ: "VQ", SDPA: "SDPA"}
    growth: dict[str, dict[str, float]] = {
        f"{short}, {title}": {} for short in names.values() for title in ("forward", "forward and backward")
    }
    for length in lengths:
        for title, make in (("forward", forward), ("forward and backward", both)):
            backward = make is both
            rounds = 2 if quick else 3 if backward and length > 8192 else 7
            inputs = tensors(length)
            runs = {name: make(attention, inputs) for name, attention in attentions.items()}
            rows = summary(interleave(runs, rounds=rounds, warmup=1), SDPA)
            floors = {
                name: max(
                    flops(name, length, backward) / rate["flops"], traffic(name, length, backward) / rate["bytes"]
                )
                for name in rows
            }
            for name, row in rows.items():
                row["floor_ratio"] = floors[name] / floors[SDPA]
                row["floor_ms"] = 1e3 * floors[name]
                row["gflop"] = flops(name, length, backward) / 1e9
                row["mbyte"] = traffic(name, length, backward) / 1e6
                if name in names:
                    growth[f"{names[name]}, {title}"][str(length)] = row["median_ms"]
            show(f"{title}, {length} tokens, ratio to SDPA", rows)
            content[f"{title} {length}"] = rows
    for length in [] if quick else ONLY_VQ:
        for title, make in (("forward", forward), ("forward and backward", both)):
            times = interleave({VQ: make(attentions[VQ], tensors(length))}, rounds=3, warmup=1)[VQ]
            growth[f"VQ, {title}"][str(length)] = 1e3 * sorted(times)[1]
    show(
        "growth, ms per 1024 tokens",
        per_1024_tokens(growth),
    )
    some = [1024, 4096] if quick else GROWTH
    limits = {VQ: GROWTH[-1]}
    memory = peaks(
        __file__, {name: [n for n in some if n <= limits.get(name, LONGEST_MEMORY_OF_OTHERS)] for name in attentions}
    )
    show("peak of forward and backward, elements over L H d (the three inputs are 3)", memory)
    reached = targets(content, growth)
    for what, figures in reached.items():
        print(f"{what}: {figures}")
    if quick:
        return
    draw(growth, "vq-attention-growth", "milliseconds, one CPU thread")
    saved = save(
        "vq_attention",
        {"rates": rate, "times": content, "growth_ms": growth, "memory": memory, "targets": reached},
    )
    print(f"written to {saved}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(candidates()[sys.argv[2]], int(sys.argv[3]))
    else:
        main(quick=sys.argv[1:2] == ["quick"])
