"""Causal linear attention beside causal `scaled_dot_product_attention`: time and memory against the length.

8 heads of 64 channels, one thread, interleaved in one process. Ours start from queries and keys, so the feature maps
are part of the time. The floor is the work that no order of summation avoids: every token adds its key's features times
its value to the state and reads the state once, 4 F (E + 1) flops per head forward and three times that with the
backward pass, at the rate of a large matrix product on this machine. performer-pytorch is measured beside ours if it is
installed (`pip install performer-pytorch==1.1.4`), up to 4096 tokens: without its CUDA extension it holds all states of
a chunk. Then lengths that only linear attention reaches, and the peak of the memory, each in a fresh process. Times
over lengths are drawn to `results/linear_attention.svg`.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from _measure import RESULTS, PeakMemory, in_fresh_process, interleave, run_tests, save, show, summary
from danlu.attention import FavorFeatures, LinearAttention

HEADS, DIM, FEATURES = 8, 64, 256
LENGTHS = [1024, 2048, 4096, 8192, 16384]
ONLY_LINEAR = [16384, 32768, 65536]
MEMORY_LENGTHS = [2048, 8192, 32768]
SDPA = "torch SDPA, causal"
PEER = "performer-pytorch, m = 256"
PEER_UP_TO = 4096

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM, generator=generator).requires_grad_() for _ in range(3)]


def candidates() -> dict[str, Attention]:
    favor = FavorFeatures(DIM, FEATURES, generator=torch.Generator().manual_seed(0))
    found: dict[str, Attention] = {
        SDPA: partial(F.scaled_dot_product_attention, is_causal=True),
        "danlu elu + 1": LinearAttention("elu1"),
        "danlu elu + 1, rotated": LinearAttention("elu1", rope_base=10000.0),
        "danlu FAVOR+, m = 256": LinearAttention(favor),
    }
    if importlib.util.find_spec("performer_pytorch") is None:
        print("performer-pytorch is not installed and left out; pip install performer-pytorch==1.1.4")
    else:
        from performer_pytorch import FastAttention

        found[PEER] = FastAttention(DIM, FEATURES, causal=True)
    return found


def forward(attention: Attention, inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return attention(*inputs)

    return run


def both(attention: Attention, inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(attention(*inputs).sum(), inputs)

    return run


def flops_per_second() -> float:
    """Of a matrix product of 1024 rows and columns."""
    x = torch.randn(1024, 1024)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def floor_seconds(name: str, length: int, passes: int, rate: float) -> float:
    """Of the state's sums; of the products of causal softmax attention for SDPA."""
    if name == SDPA:
        # Backward: five products where forward has two.
        return (1.0 if passes == 1 else 3.5) * 2 * length**2 * HEADS * DIM / rate
    features = FEATURES if "256" in name else DIM
    return passes * 4 * length * HEADS * features * (DIM + 1) / rate


def peak(name: str, length: int) -> None:
    """Run in a fresh process: elements held at the peak of forward and backward, in units of L H d."""
    torch.set_num_threads(1)
    attention, inputs, small = candidates()[name], tensors(length), tensors(300)
    torch.autograd.grad(attention(*small).sum(), small)
    with PeakMemory() as memory:
        torch.autograd.grad(attention(*inputs).sum(), inputs)
    print(json.dumps({"units": memory.extra / (4 * length * HEADS * DIM)}))


def draw(points: list[dict[str, object]]) -> None:
    """Time of forward and backward over the length, both on logarithmic axes."""
    if importlib.util.find_spec("vl_convert") is None:
        print("vl-convert-python is not installed: no plot")
        return
    import vl_convert

    axis = {"type": "quantitative", "scale": {"type": "log"}}
    spec = {
        "width": 620,
        "height": 340,
        "padding": 12,
        "background": "white",
        "data": {"values": points},
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {**axis, "field": "length", "title": "tokens", "axis": {"values": LENGTHS + ONLY_LINEAR[1:]}},
            "y": {**axis, "field": "ms", "title": "forward and backward, ms (one thread)"},
            "color": {"field": "attention", "type": "nominal", "title": None, "sort": None},
            "shape": {"field": "attention", "type": "nominal", "title": None, "sort": None},
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "linear_attention.svg").write_text(vl_convert.vegalite_to_svg(spec))


def main() -> None:
    run_tests("tests/attention/test_linear_chunks.py", "tests/attention/test_linear_attention.py")
    torch.set_num_threads(1)
    found, rate = candidates(), flops_per_second()
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s")
    content: dict[str, object] = {"flops_per_second": rate}
    points: list[dict[str, object]] = []
    for length in LENGTHS:
        inputs = tensors(length)
        some = {name: one for name, one in found.items() if name != PEER or length <= PEER_UP_TO}
        for title, make, passes in (("forward", forward, 1), ("forward and backward", both, 3)):
            runs = {name: make(attention, inputs) for name, attention in some.items()}
            rows = summary(interleave(runs, rounds=7 if length <= 4096 else 3, warmup=1), SDPA)
            for name, row in rows.items():
                row["over_floor"] = row["median_ms"] / (1e3 * floor_seconds(name, length, passes, rate))
            show(f"{title}, {length} tokens, ratio to SDPA", rows)
            content[f"{title} {length}"] = rows
        points += [{"attention": name, "length": length, "ms": row["median_ms"]} for name, row in rows.items()]
    linear = {name: one for name, one in found.items() if name not in (SDPA, PEER)}
    growth: dict[str, dict[str, float]] = {name: {} for name in linear}
    for length in ONLY_LINEAR:
        inputs = tensors(length)
        runs = {name: both(attention, inputs) for name, attention in linear.items()}
        for name, row in summary(interleave(runs, rounds=3, warmup=1), "danlu elu + 1").items():
            growth[name][f"us per token, L={length}"] = 1e3 * row["median_ms"] / length
            if length > LENGTHS[-1]:
                points.append({"attention": name, "length": length, "ms": row["median_ms"]})
    show("forward and backward per token: constant if the growth is linear", growth)
    memory = {
        name: {f"L={n}": in_fresh_process(__file__, "peak", name, str(n))["units"] for n in MEMORY_LENGTHS}
        for name in found
        if name != PEER
    }
    show("peak of forward and backward, elements over L H d (the three inputs are 3)", memory)
    draw(points)
    written = save("linear_attention", {"times": content, "growth": growth, "memory": memory})
    print(f"written to {written}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], int(sys.argv[3]))
    else:
        main()
