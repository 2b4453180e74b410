"""Gradient penalties beside a plain step: time on an MLP and on a small transformer, and peak memory.

A step is forward and backward pass into gradients that are None, float32, one thread, without an optimizer. Times are
interleaved in one process; every peak is measured in a fresh process, above model and batch. The floor counts matrix
products: a plain step has 3 per layer (forward, input, weight), and a second derivative doubles those of the first.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from _measure import PeakMemory, in_fresh_process, interleave, run_tests, save, show, summary
from danlu.losses import GradientPenalty

WIDTH, MLP_ROWS, ROUNDS = 1024, 256, 15
VOCABULARY, FEATURES, HEADS, LAYERS, LENGTH, ROWS = 512, 256, 4, 2, 64, 8

# Matrix products of a step over those of a plain one.
FLOORS = {
    "plain": 1.0,
    "input": 2.0,
    "double backward": 3.0,
    "finite difference": 2.0,
    "finite difference, subtract": 2.0,
    "per sample": 2.0,
}
TARGETS = {"input": 2.6, "finite difference": 2.1, "finite difference, subtract": 2.1, "per sample": 2.3}
OPTIONS = {
    "plain": {},
    "input": {"input": 0.1},
    "double backward": {"parameter": 0.1},
    "finite difference": {"parameter": 0.1, "method": "finite_difference"},
    "finite difference, subtract": {"parameter": 0.1, "method": "finite_difference"},
    "per sample": {"parameter": 0.1, "scope": "per_sample"},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)])
        self.project, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.up, self.down = nn.Linear(FEATURES, 4 * FEATURES), nn.Linear(4 * FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], HEADS, FEATURES // HEADS)
        parts = self.project(self.norms[0](x)).split(FEATURES, dim=-1)
        query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, FEATURES), nn.Linear(FEATURES, VOCABULARY)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(FEATURES)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(embedded)))


def mlp_problem() -> tuple[nn.Module, Callable[[bool], tuple[Callable[[], Tensor], Tensor]]]:
    torch.manual_seed(0)
    layers = [module for _ in range(3) for module in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH))
    x, y = torch.randn(MLP_ROWS, WIDTH), torch.randint(WIDTH, (MLP_ROWS,))

    def batch(inputs: bool) -> tuple[Callable[[], Tensor], Tensor]:
        given = x.detach().requires_grad_(inputs)
        return lambda: F.cross_entropy(model(given), y, reduction="none"), given

    return model, batch


def transformer_problem() -> tuple[nn.Module, Callable[[bool], tuple[Callable[[], Tensor], Tensor]]]:
    torch.manual_seed(0)
    model = Transformer()
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
    target = tokens.roll(-1, 1)

    def batch(inputs: bool) -> tuple[Callable[[], Tensor], Tensor]:
        # Embedded once for the input penalty, which needs the very tensor; otherwise in every pass.
        embedded = model.embed(tokens) if inputs else torch.empty(0)

        def loss() -> Tensor:
            logits = model(embedded if inputs else model.embed(tokens))
            return F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)

        return loss, embedded

    return model, batch


PROBLEMS = {"mlp": mlp_problem, "transformer": transformer_problem}


def step(
    model: nn.Module, batch: Callable[[bool], tuple[Callable[[], Tensor], Tensor]], name: str, fused: bool
) -> None:
    model.zero_grad(set_to_none=True)
    options = OPTIONS[name]
    loss, inputs = batch("input" in options)
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if fused else [SDPBackend.MATH]
    with sdpa_kernel(backends):
        if name == "plain":
            loss().mean().backward()
        else:
            restore = "subtract" if name.endswith("subtract") else "copy"
            given = inputs if "input" in options else None
            GradientPenalty(model, **options).backward(loss, given, restore=restore)


def peak(problem: str, name: str, fused: bool) -> None:
    torch.set_num_threads(1)
    model, batch = PROBLEMS[problem]()
    # Threads, allocator and libraries are started before the measurement, on something small.
    small = nn.Linear(8, 8)
    GradientPenalty(small, parameter=0.1, method="finite_difference").backward(lambda: small(torch.ones(4, 8)).sum(1))
    with PeakMemory() as memory:
        step(model, batch, name, fused)
    print(json.dumps({"extra": memory.extra}))


# Large blocks go back to the system at once, so that the resident memory is what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(problem: str, *, fused: bool) -> dict[str, dict[str, float]]:
    model, batch = PROBLEMS[problem]()
    names = [name for name in OPTIONS if not fused or name == "plain" or name.startswith("finite")]
    rows = summary(
        interleave({name: partial(step, model, batch, name, fused) for name in names}, rounds=ROUNDS), "plain"
    )
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for name, row in rows.items():
        row["floor_ratio"] = FLOORS[name]
        row["target"] = TARGETS.get(name, float("nan"))
        os.environ.update(MALLOC)
        peaks = sorted(in_fresh_process(__file__, problem, name, str(int(fused)))["extra"] for _ in range(3))
        row["peak_extra_MiB"] = peaks[1] / 2**20
    for row in rows.values():
        row["peak_over_plain_in_parameters"] = (row["peak_extra_MiB"] - rows["plain"]["peak_extra_MiB"]) * 2**20 / size
    return rows


def main() -> None:
    run_tests("tests/losses/test_gradient_penalty.py", "tests/losses/test_ghost_norms.py")
    torch.set_num_threads(1)
    found = {}
    for problem, fused in (("mlp", False), ("transformer", False), ("transformer", True)):
        title = f"{problem}, {'fused' if fused else 'math'} attention" if problem == "transformer" else problem
        found[title] = measure(problem, fused=fused)
        show(f"{title}: {ROUNDS} rounds, ratios to a plain step", found[title])
    sizes = {
        "mlp": {"width": WIDTH, "layers": 4, "rows": MLP_ROWS},
        "transformer": {"features": FEATURES, "heads": HEADS, "layers": LAYERS, "length": LENGTH, "rows": ROWS},
    }
    path = save("gradient_penalty", {"rounds": ROUNDS, "sizes": sizes, "targets": TARGETS, "candidates": found})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    peak(sys.argv[1], sys.argv[2], bool(int(sys.argv[3]))) if len(sys.argv) > 1 else main()
