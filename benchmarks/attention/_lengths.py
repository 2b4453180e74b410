"""What the benchmarks of attention over growing lengths share: inputs, floors, fresh processes for peaks, the plot."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from _measure import PeakMemory, in_fresh_process

HEADS, DIM = 8, 64
IMAGES = Path(__file__).parents[2] / "docs" / "images"

Attention = Callable[..., Tensor]


def tensors(length: int) -> list[Tensor]:
    """Queries, keys and values, which are leaves."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM, generator=generator).requires_grad_() for _ in range(3)]


def forward(attention: Attention, inputs: list[Tensor]) -> Callable[[], object]:
    """A call without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return attention(*inputs)

    return run


def both(attention: Attention, inputs: list[Tensor]) -> Callable[[], object]:
    """A call with the gradients of all leaves, also of those that are not inputs."""

    def run() -> None:
        for x in inputs:
            x.grad = None
        attention(*inputs).sum().backward()

    return run


def rates() -> dict[str, float]:
    """Flops and bytes per second of a large matrix product and of a copy, best of several."""
    left, right = torch.randn(2, 1024, 1024)
    source, target = torch.randn(2, 2**24)

    def best(run: Callable[[], object]) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    return {
        "flops": 2 * 1024**3 / best(lambda: left @ right),
        "bytes": 2 * 4 * 2**24 / best(lambda: target.copy_(source)),
    }


def per_1024_tokens(growth: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Constant if the growth is linear."""
    return {name: {f"L={n}": ms * 1024 / int(n) for n, ms in line.items()} for name, line in growth.items()}


def time_per_token(line: Mapping[str, float], *, shortest: int = 1) -> tuple[int, int, float]:
    """Two lengths, and the time per token at the longer over that at the shorter; 1 is linear growth."""
    lengths = sorted(int(n) for n in line if int(n) >= shortest)
    low, high = lengths[0], lengths[-1]
    return low, high, line[str(high)] / high * low / line[str(low)]


def peaks(script: str, lengths: Mapping[str, list[int]]) -> dict[str, dict[str, float]]:
    """What `peak` says in fresh processes."""
    # Blocks from the system and back, or what the allocator keeps for later counts as held.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    return {
        name: {f"L={n}": in_fresh_process(script, "peak", name, str(n))["units"] for n in some}
        for name, some in lengths.items()
    }


def peak(attention: Attention, length: int) -> None:
    """Run in a fresh process: elements held at the peak of forward and backward, in units of L H d."""
    torch.set_num_threads(1)
    inputs = tensors(length)
    both(attention, tensors(600))()
    with PeakMemory() as memory:
        both(attention, inputs)()
    print(json.dumps({"units": memory.extra / (4 * length * HEADS * DIM)}))


def draw(growth: Mapping[str, Mapping[str, float]], name: str, title: str) -> None:
    """Milliseconds over the length, both on logarithmic axes, as a picture of the documentation."""
    # Of the extra `lab`.
    import vl_convert

    rows = [{"what": what, "length": int(n), "ms": ms} for what, line in growth.items() for n, ms in line.items()]
    ends = [min(row["length"] for row in rows), max(row["length"] for row in rows)]
    ticks = {"grid": True, "format": ",d", "values": sorted({row["length"] for row in rows})}
    named = {"field": "what", "type": "nominal", "sort": list(growth)}
    x = {"field": "length", "scale": {"type": "log", "base": 2, "domain": ends}, "title": "tokens"}
    y = {"field": "ms", "scale": {"type": "log"}, "title": title}
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": rows},
        "width": 520,
        "height": 320,
        "background": "#ffffff",
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {**x, "type": "quantitative", "axis": ticks},
            "y": {**y, "type": "quantitative", "axis": {"grid": True, "format": "~s"}},
            "color": {**named, "title": None},
            "strokeDash": {**named, "legend": None},
        },
    }
    (IMAGES / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(spec))
