"""Smooth top-k beside `torch.topk`, `torch.softmax` and the form that sorts: time of forward and backward.

One thread, all candidates interleaved in one process. The floor of a threshold map is one read and one write of the
scores; `torch.softmax` reads them twice.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from _measure import interleave, run_tests, save, show, summary
from danlu.simplex import soft_topk

ROUNDS = 9
SIZES = [(128, 32000, 64), (4096, 512, 16), (8, 1_000_000, 100)]


def by_sorting(x: Tensor, k: int) -> Tensor:
    """The Laplace map in closed form, from sorted scores and running sums of exponentials."""
    s = x.sort(dim=-1, descending=True).values
    above = torch.logcumsumexp(-s, -1)
    below = torch.logcumsumexp(s.flip(-1), -1).flip(-1)
    index = torch.arange(s.shape[-1])
    none = torch.full_like(s[:, :1], -torch.inf)
    before = torch.cat((none, above[:, :-1]), -1)
    reached = index - 0.5 * (s + before).exp() + 0.5 * (below - s).exp()
    m = (reached < k).sum(-1, keepdim=True)
    log_a = torch.cat((none, above), -1).gather(-1, m)
    log_b = torch.cat((below, none), -1).gather(-1, m)
    open_ = (k - m).to(s.dtype)
    root = (open_.square() + (log_a + log_b).exp()).sqrt()
    few, many = log_b - (root + open_).log(), (root - open_).log() - log_a
    shift = torch.where(open_ > 0, few, torch.where(open_ < 0, many, 0.5 * (log_b - log_a)))
    d = x - shift
    half = 0.5 * (-d.abs()).exp()
    return torch.where(d < 0, half, 1 - half)


def forward(f: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return f(x)

    return run


def backward(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    upstream = torch.randn_like(x)
    return lambda: torch.autograd.grad(out, leaf, upstream, retain_graph=True)


def main() -> None:
    run_tests("tests/simplex/test_soft_topk.py")
    torch.set_num_threads(1)
    content = {}
    for rows, n, k in SIZES:
        x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0))
        assert (by_sorting(x, k) - soft_topk(x, k)).abs().max() < 1e-3
        maps = {
            f"danlu {method}": lambda x, k=k, method=method: soft_topk(x, k, method=method)
            for method in ("laplace", "sigmoid", "exp", "clip")
        }
        softmax = {"torch softmax": lambda x: torch.softmax(x, -1)}
        hard = {"danlu hard": lambda x, k=k: soft_topk(x, k, hard=True)}
        others = {
            "torch topk": lambda x, k=k: torch.topk(x, k),
            **softmax,
            "sort form of laplace": lambda x, k=k: by_sorting(x, k),
        }
        size = f"({rows}, {n}), k={k}"
        runs = {name: forward(f, x) for name, f in {**others, **maps, **hard}.items()}
        # With a gradient to come, the smooth map as well.
        leaf = x.clone().requires_grad_()
        runs["danlu hard, to learn"] = lambda leaf=leaf, k=k: soft_topk(leaf, k, hard=True)
        table = summary(interleave(runs, rounds=ROUNDS), "torch topk")
        show(f"forward {size}, ratio to topk", table)
        back = summary(
            interleave({name: backward(f, x) for name, f in {**softmax, **maps, **hard}.items()}, rounds=ROUNDS),
            "torch softmax",
        )
        show(f"backward {size}, ratio to softmax", back)
        content[size] = {"forward": table, "backward": back}
    path = save("soft_topk", content)
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
