"""Attention to quantized keys in blocks beside causal `scaled_dot_product_attention`: time, memory, growth to 65536.

8 heads of 64 channels, 256 codewords, blocks of 256, one thread, interleaved in one process. There is no other PyTorch
implementation of Transformer-VQ to compare with. `floor_ratio` is the ratio of the flops that the definitions need:
causal SDPA scores L / 2 keys per query; ours scores half a block and the codewords, and finds the nearest code of every
key; backward, one and a half blocks. Then the growth of time and peak memory with the length, drawn as a plot beside
the JSON (with vl-convert, of the extra `lab`).

With the argument "quick", few rounds and lengths, and nothing is saved.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from _measure import RESULTS, PeakMemory, in_fresh_process, interleave, run_tests, save, show, summary
from danlu.attention import vq_attention

HEADS, DIM, CODES, BLOCK = 8, 64, 256, 256
SDPA, VQ, BIASED = "torch SDPA, causal", "danlu VQ", "danlu VQ, learned bias"
LENGTHS = [1024, 2048, 4096, 8192, 16384]
# Backward of SDPA at 16384 takes half a minute of a core.
LONGEST_BACKWARD = 8192
GROWTH = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
LONGEST_SDPA = 16384


def tensors(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM, generator=generator).requires_grad_() for _ in range(3)]


def candidates() -> dict[str, Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(1)
    codebook = torch.randn(HEADS, CODES, DIM, generator=generator)
    bias = torch.randn(HEADS, 2 * BLOCK, generator=generator).requires_grad_()
    return {
        SDPA: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        VQ: lambda q, k, v: vq_attention(q, k, v, codebook, block_size=BLOCK),
        BIASED: lambda q, k, v: vq_attention(q, k, v, codebook, block_size=BLOCK, bias=bias),
    }


def flops(name: str, length: int, backward: bool) -> float:
    """Of the products that the definition needs, per head."""
    pair = 2 * 2 * DIM * length
    if name == SDPA:
        return pair * length / 2 * (3.5 if backward else 1.0)
    near = 1.5 * BLOCK if name == BIASED else 0.5 * BLOCK
    total = pair * (near + CODES) + 2 * DIM * length * CODES
    # Backward: scores again, and four products; codewords get no gradient.
    return total + (pair * (2.5 * 1.5 * BLOCK + 2.0 * CODES) if backward else 0.0)


def forward(attention: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return attention(*inputs)

    return run


def both(attention: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> None:
        # Of all leaves, also the bias.
        attention(*inputs).sum().backward()

    return run


def peak(name: str, length: int) -> None:
    """Run in a fresh process: elements held at the peak of forward and backward, in units of L H d."""
    torch.set_num_threads(1)
    attention, inputs = candidates()[name], tensors(length)
    both(attention, tensors(600))()
    with PeakMemory() as memory:
        both(attention, inputs)()
    print(json.dumps({"units": memory.extra / (4 * length * HEADS * DIM)}))


def plot(growth: dict[str, dict[str, float]], path: Path) -> None:
    """Milliseconds of forward and backward over the length, both logarithmic."""
    import vl_convert

    rows = [
        {"what": what, "length": int(length), "ms": ms} for what, line in growth.items() for length, ms in line.items()
    ]
    axis = {"grid": True, "format": "~s"}
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": rows},
        "width": 520,
        "height": 320,
        "background": "#ffffff",
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {
                "field": "length",
                "type": "quantitative",
                "scale": {"type": "log", "base": 2, "domain": [GROWTH[0], GROWTH[-1]]},
                "axis": axis,
                "title": "tokens",
            },
            "y": {
                "field": "ms",
                "type": "quantitative",
                "scale": {"type": "log"},
                "axis": axis,
                "title": "milliseconds, one CPU thread",
            },
            "color": {"field": "what", "type": "nominal", "title": None, "sort": list(growth)},
            "strokeDash": {"field": "what", "type": "nominal", "legend": None, "sort": list(growth)},
        },
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(vl_convert.vegalite_to_svg(spec))


def main(quick: bool) -> None:
    if not quick:
        run_tests("tests/attention/test_vq_attention.py")
    torch.set_num_threads(1)
    lengths, rounds = ([1024, 4096], 2) if quick else (LENGTHS, 5)
    attentions = candidates()
    content: dict[str, object] = {}
    for length in lengths:
        for title, make in (("forward", forward), ("forward and backward", both)):
            if make is both and length > LONGEST_BACKWARD:
                continue
            inputs = tensors(length)
            runs = {name: make(attention, inputs) for name, attention in attentions.items()}
            rows = summary(interleave(runs, rounds=rounds, warmup=1), SDPA)
            for name, row in rows.items():
                backward = make is both
                row["floor_ratio"] = flops(name, length, backward) / flops(SDPA, length, backward)
                row["gflops_per_s"] = HEADS * flops(name, length, backward) / row["median_ms"] / 1e6
            show(f"{title}, {length} tokens, ratio to SDPA", rows)
            content[f"{title} {length}"] = rows
    growth: dict[str, dict[str, float]] = {}
    for name, title, make in (
        (SDPA, "SDPA, forward", forward),
        (SDPA, "SDPA, forward and backward", both),
        (VQ, "VQ, forward", forward),
        (VQ, "VQ, forward and backward", both),
    ):
        line = {}
        for length in [1024, 4096] if quick else GROWTH:
            if name == VQ or length <= (LONGEST_SDPA if make is forward else LONGEST_BACKWARD):
                run = {name: make(attentions[name], tensors(length))}
                times = interleave(run, rounds=3, warmup=1)[name]
                line[str(length)] = 1e3 * sorted(times)[1]
        growth[title] = line
    show(
        "growth, ms per 1024 tokens",
        {title: {f"L={n}": ms * 1024 / int(n) for n, ms in line.items()} for title, line in growth.items()},
    )
    memory = {}
    for name in attentions:
        counted = [1024, 4096] if quick else [n for n in GROWTH if name == VQ or n <= LONGEST_BACKWARD]
        found = {f"L={n}": in_fresh_process(__file__, "peak", name, str(n))["units"] for n in counted}
        memory[name] = found
    show("peak of forward and backward, elements over L H d (the three inputs are 3)", memory)
    if quick:
        return
    plot(growth, RESULTS / "vq_attention.svg")
    saved = save("vq_attention", {"times": content, "growth_ms": growth, "memory": memory})
    print(f"written to {saved}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], int(sys.argv[3]))
    else:
        main(quick=sys.argv[1:2] == ["quick"])
