"""Linear attention beside `scaled_dot_product_attention` and performer-pytorch: time, memory, growth to 65536 tokens.

8 heads of 64 channels, float32, one thread, interleaved in one process. Ours start from queries and keys, so the
feature maps are part of the time. The floor of the time is the larger of two: the flops of the products that no order
of summation avoids, at the rate of a large matrix product on this machine, and the bytes of inputs, output and
gradients, at the rate of a copy. A token of linear attention adds its key's features times its value to the state and
reads the state; backward, it does so for three gradients; random features and codes are products with a matrix. SDPA
scores half of the pairs. `over_floor` is the time over the floor.

performer-pytorch is measured if it can be imported (`pip install performer-pytorch==1.1.4`). Its causal attention wants
CUDA code of another package, and without it falls back to a form that holds the state of every token: `L F E` numbers
a head, 2 GB in all at 4096 tokens, and more of them backward. So it is measured up to 2048 tokens, and to both sides,
where it needs no such code, beside ours to both sides.

The target is: forward and backward of elu + 1 faster than SDPA from 1024 tokens on, and linear growth to 65536. Times
over lengths are drawn for the guide with vl-convert of the extra `lab`. Peaks of the memory are of fresh processes.

With the argument "quick", few rounds and lengths, and nothing is saved.
"""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from functools import partial

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
from danlu.attention import FavorFeatures, LinearAttention, SoftVQFeatures

FEATURES = 256
SDPA, ELU, ROTATED = "torch SDPA, causal", "danlu elu + 1", "danlu elu + 1, rotated"
FAVOR, SOFT, PEER = "danlu FAVOR+, m = 256", "danlu soft VQ, 256 codes", "performer-pytorch, m = 256"
BOTH_SIDES = ("torch SDPA, both sides", "danlu FAVOR+, both sides", "performer-pytorch, both sides")
LENGTHS = [1024, 2048, 4096, 8192, 16384]
# Here SDPA is too slow to wait for, or to compare with.
ONLY_LINEAR = [32768, 65536]
PEER_UP_TO = 2048
LENGTHS_OF_BOTH_SIDES = [1024, 4096]
MEMORY_UP_TO = {SDPA: 16384, PEER: PEER_UP_TO}


def peer(*, causal: bool) -> Attention | None:
    """The attention of performer-pytorch, if that is there."""
    if importlib.util.find_spec("performer_pytorch") is None:
        return None
    from performer_pytorch import FastAttention

    return FastAttention(DIM, FEATURES, causal=causal)


def candidates() -> dict[str, Attention]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.nn.Parameter(torch.randn(HEADS, FEATURES, DIM, generator=generator))
    found: dict[str, Attention | None] = {
        SDPA: partial(F.scaled_dot_product_attention, is_causal=True),
        ELU: LinearAttention("elu1"),
        ROTATED: LinearAttention("elu1", rope_base=10000.0),
        FAVOR: LinearAttention(FavorFeatures(DIM, FEATURES, generator=generator)),
        SOFT: LinearAttention(SoftVQFeatures(codes, sigma=4.0)),
        PEER: peer(causal=True),
    }
    return {name: attention for name, attention in found.items() if attention is not None}


def both_sides() -> dict[str, Attention]:
    favor = FavorFeatures(DIM, FEATURES, generator=torch.Generator().manual_seed(0))
    found: list[Attention | None] = [
        F.scaled_dot_product_attention,
        LinearAttention(favor, is_causal=False),
        peer(causal=False),
    ]
    return {name: one for name, one in zip(BOTH_SIDES, found, strict=True) if one is not None}


def flops(name: str, length: int, backward: bool) -> float:
    """Of the products that the definition needs."""
    if "SDPA" in name:
        pairs = length**2 / (2 if name == SDPA else 1)
        # Backward: the scores again, and four products.
        return 4 * DIM * HEADS * pairs * (3.5 if backward else 1.0)
    features = DIM if name in (ELU, ROTATED) else FEATURES
    projected = 0 if name in (ELU, ROTATED) else 4 * DIM * features
    # A projection that is not trained has one product backward, codes have two.
    share = 1.0 if not backward else 3.0 if name == SOFT else 2.0
    return length * HEADS * (4 * features * (DIM + 1) * (3 if backward else 1) + projected * share)


def traffic(length: int, backward: bool) -> float:
    """Bytes: queries, keys, values and output; backward, all of them again, with the gradients of all of them."""
    return 4 * length * HEADS * DIM * (4 + (8 if backward else 0))


def measured(
    attentions: dict[str, Attention], length: int, backward: bool, reference: str, rate: dict[str, float], rounds: int
) -> dict[str, dict[str, float]]:
    """A row for every attention."""
    make, inputs = both if backward else forward, tensors(length)
    runs = {name: make(attention, inputs) for name, attention in attentions.items()}
    rows = summary(interleave(runs, rounds=rounds, warmup=1), reference)
    for name, row in rows.items():
        row["gflop"] = flops(name, length, backward) / 1e9
        row["mbyte"] = traffic(length, backward) / 1e6
        row["floor_ms"] = max(row["gflop"] * 1e12 / rate["flops"], row["mbyte"] * 1e9 / rate["bytes"])
        row["over_floor"] = row["median_ms"] / row["floor_ms"]
    return rows


def targets(times: dict[str, dict[str, dict[str, float]]], growth: dict[str, dict[str, float]]) -> dict[str, object]:
    """What was to be reached, and what was."""
    found: dict[str, object] = {}
    for title, rows in times.items():
        if title.startswith("forward and backward"):
            found[f"{ELU}, {title}"] = {"ratio": rows[ELU]["ratio"], "limit": 1.0, "met": rows[ELU]["ratio"] < 1}
    for name in (ELU, ROTATED, FAVOR, SOFT):
        low, high, per_token = time_per_token(growth[name])
        found[f"{name}: time per token at {high} over {low}"] = {"ratio": per_token}
    return found


def main(quick: bool) -> None:
    if not quick:
        run_tests("tests/attention/test_linear_chunks.py", "tests/attention/test_linear_attention.py")
    torch.set_num_threads(1)
    attentions, sides, rate = candidates(), both_sides(), rates()
    if PEER not in attentions:
        print("performer-pytorch is not installed and left out; pip install performer-pytorch==1.1.4")
    print(f"{rate['flops'] / 1e9:.0f} GFLOP/s of a matrix product, {rate['bytes'] / 1e9:.1f} GB/s of a copy")
    times: dict[str, dict[str, dict[str, float]]] = {}
    growth: dict[str, dict[str, float]] = {name: {} for name in attentions}
    for length in [1024, 4096] if quick else LENGTHS:
        some = {name: one for name, one in attentions.items() if name != PEER or length <= PEER_UP_TO}
        for title, backward in (("forward", False), ("forward and backward", True)):
            rounds = 2 if quick else 3 if backward and length > 8192 else 7
            rows = measured(some, length, backward, SDPA, rate, rounds)
            show(f"{title}, {length} tokens, ratio to SDPA", rows)
            times[f"{title} {length}"] = rows
        for name, row in rows.items():
            growth[name][str(length)] = row["median_ms"]
    linear = {name: one for name, one in attentions.items() if name not in (SDPA, PEER)}
    for length in [] if quick else ONLY_LINEAR:
        rows = measured(linear, length, True, ELU, rate, 3)
        show(f"forward and backward, {length} tokens, ratio to elu + 1", rows)
        times[f"without SDPA {length}"] = rows
        for name, row in rows.items():
            growth[name][str(length)] = row["median_ms"]
    for length in LENGTHS_OF_BOTH_SIDES[:1] if quick else LENGTHS_OF_BOTH_SIDES:
        for title, backward in (("forward", False), ("forward and backward", True)):
            rows = measured(sides, length, backward, next(iter(sides)), rate, 2 if quick else 7)
            show(f"to both sides, {title}, {length} tokens, ratio to SDPA", rows)
            times[f"both sides, {title} {length}"] = rows
    show(
        "forward and backward, ms per 1024 tokens: constant if the growth is linear",
        per_1024_tokens(growth),
    )
    some = [2048, 4096] if quick else [*LENGTHS[1:], *ONLY_LINEAR]
    memory = peaks(__file__, {name: [n for n in some if n <= MEMORY_UP_TO.get(name, n)] for name in attentions})
    show("peak of forward and backward, elements over L H d (the three inputs are 3)", memory)
    reached = targets(times, growth)
    for what, figures in reached.items():
        print(f"{what}: {figures}")
    if quick:
        return
    draw(growth, "linear-attention-growth", "forward and backward, milliseconds, one CPU thread")
    saved = save(
        "linear_attention",
        {"rates": rate, "times": times, "growth_ms": growth, "memory": memory, "targets": reached},
    )
    print(f"written to {saved}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(candidates()[sys.argv[2]], int(sys.argv[3]))
    else:
        main(quick=sys.argv[1:2] == ["quick"])
