"""SquarePlus beside torch's activations: forward, and forward with backward, eager and compiled, on one thread.

4.2 M float32 elements. The floor is the traffic of memory: forward reads and writes once, backward reads twice and
writes once; the copy of a tensor shows what the machine does with the former. Candidates take turns.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn import functional as F

from _measure import interleave, run_tests, save, show, summary
from danlu.activations import squareplus

ELEMENTS, ROUNDS = 4_200_000, 61


def naive(x):
    return (x + (x * x + 4.0).sqrt()) / 2


EAGER = {
    "torch relu": F.relu,
    "torch gelu": F.gelu,
    "torch silu": F.silu,
    "torch softplus": F.softplus,
    "naive squareplus": naive,
    "danlu squareplus": squareplus,
    "danlu squareplus, learned b": squareplus,
    "danlu squareplus, no compiler": partial(squareplus, impl="reference"),
}
COMPILED = ("torch relu", "torch gelu", "torch silu", "torch softplus", "naive squareplus", "danlu squareplus")


def forward(function, x, *rest):
    with torch.no_grad():
        function(x, *rest)


def both(function, x, cotangent, *rest):
    x.grad = None
    function(x, *rest).backward(cotangent)


def main() -> None:
    run_tests("tests/activations", "tests/kernels/test_squareplus.py")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ELEMENTS, generator=generator).requires_grad_()
    cotangent = torch.randn(ELEMENTS, generator=generator)
    learned = torch.tensor(4.0, requires_grad=True)
    megabytes = 4 * ELEMENTS / 1e6
    print(f"at least {2 * megabytes:.1f} MB forward and {5 * megabytes:.1f} MB with backward, in and out of memory")

    def measure(functions, reference: str) -> dict[str, dict[str, dict[str, float]]]:
        rest = {name: (learned,) if name.endswith("learned b") else () for name in functions}
        runs = {
            "forward": {n: partial(forward, f, x, *rest[n]) for n, f in functions.items()},
            "forward and backward": {n: partial(both, f, x, cotangent, *rest[n]) for n, f in functions.items()},
        }
        runs["forward"]["floor: copy"] = partial(forward, torch.clone, x)
        return {
            "forward": summary(interleave(runs["forward"], rounds=ROUNDS), "torch relu"),
            "forward and backward": summary(interleave(runs["forward and backward"], rounds=ROUNDS), reference),
        }

    found = {"eager": measure(EAGER, "torch gelu")}
    # One code object serves all of them.
    torch._dynamo.config.recompile_limit = 4 * len(COMPILED)
    compiled = {name: torch.compile(lambda x, f=EAGER[name]: f(x), fullgraph=True) for name in COMPILED}
    found["compiled"] = measure(compiled, "torch gelu")
    # In turns with nothing else, since what the others leave in the cache costs as much as the difference.
    two = {n: partial(forward, compiled[n], x) for n in ("torch relu", "danlu squareplus")}
    found["compiled"]["forward, the two alone"] = summary(interleave(two, rounds=4 * ROUNDS), "torch relu")
    for mode, tables in found.items():
        for what, rows in tables.items():
            against = "gelu" if "backward" in what else "relu"
            show(f"{mode}, {what}, {ELEMENTS} elements, {ROUNDS} rounds; ratio to {against}", rows)
    path = save("squareplus", {"elements": ELEMENTS, "rounds": ROUNDS, **found})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
