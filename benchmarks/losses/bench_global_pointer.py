"""The fused span loss beside the dense one and the usual sparse one: time and peak memory, forward and backward.

B = 8 samples, 9 types, n = 512 tokens, D = 64, float32, one thread, 25 spans per sample. Every peak is measured in a
fresh process, above the inputs; times are interleaved in one process. The floor of the time is the three matrix
products of the scores and their gradients; the floor of the memory is the gradients of queries and keys.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from _measure import PeakMemory, in_fresh_process, interleave, run_tests, save, show, summary
from danlu.losses import global_pointer_loss, multilabel_cross_entropy

SAMPLES, TYPES, TOKENS, CHANNELS, SPANS, ROUNDS = 8, 9, 512, 64, 200, 7
SHARED = "danlu, shared queries"


def problem(samples=SAMPLES, tokens=TOKENS, shared=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (samples, tokens, CHANNELS) if shared else (samples, TYPES, tokens, CHANNELS)
    query, key = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    start = torch.randint(tokens - 12, (SPANS,), generator=generator)
    spans = torch.stack(
        (
            torch.randint(samples, (SPANS,), generator=generator),
            torch.randint(TYPES, (SPANS,), generator=generator),
            start,
            start + torch.randint(12, (SPANS,), generator=generator),
        ),
        1,
    )
    mask = torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (samples, 1), generator=generator)
    spans = spans[mask[spans[:, 0], spans[:, 3]]].unique(dim=0)
    return query.requires_grad_(), key.requires_grad_(), spans, mask


def scores_of(query, key, mask):
    scores = query @ key.transpose(-1, -2) / math.sqrt(CHANNELS)
    visible = (mask[:, :, None] & mask[:, None, :]).triu()[:, None]
    return scores.masked_fill(~visible, float("-inf"))


def fused(query, key, spans, mask):
    global_pointer_loss(query, key, spans, mask=mask).backward()


def fused_shared(query, key, spans, mask):
    biases = torch.zeros(2, query.shape[0], TYPES, query.shape[1], requires_grad=True)
    global_pointer_loss(query, key, spans, mask=mask, start_bias=biases[0], end_bias=biases[1]).backward()


def dense(query, key, spans, mask):
    scores = scores_of(query, key, mask)
    target = torch.zeros(scores.shape, dtype=torch.bool)
    target[tuple(spans.T)] = True
    loss = multilabel_cross_entropy(scores.flatten(-2), target.flatten(-2), normalizer=query.shape[0])
    loss.backward()


def usual(query, key, spans, mask):
    """The customary dense code: scores with -1e12 where masked, two log-sum-exps over concatenated zeros."""
    scores = scores_of(query, key, mask).clamp(min=-1e12).flatten(-2)
    target = torch.zeros(*scores.shape[:2], TOKENS, TOKENS)
    target[tuple(spans.T)] = 1.0
    target = target.flatten(-2)
    signed = (1 - 2 * target) * scores
    negative, positive = signed - target * 1e12, signed - (1 - target) * 1e12
    zero = torch.zeros_like(scores[..., :1])
    total = torch.cat((negative, zero), -1).logsumexp(-1) + torch.cat((positive, zero), -1).logsumexp(-1)
    total.sum(1).mean().backward()


def products(query, key, spans, mask):
    """The floor: the three matrix products, sample by sample, and nothing else."""
    with torch.no_grad():
        buffer = torch.empty(TOKENS, TOKENS)
        d_query, d_key = torch.empty_like(query), torch.empty_like(key)
        for b in range(SAMPLES):
            for t in range(TYPES):
                torch.mm(query[b, t], key[b, t].t(), out=buffer)
                torch.mm(buffer, key[b, t], out=d_query[b, t])
                torch.mm(buffer.t(), query[b, t], out=d_key[b, t])


CANDIDATES = {
    "danlu global_pointer_loss": fused,
    SHARED: fused_shared,
    "dense multilabel_cross_entropy": dense,
    "dense, the usual code": usual,
    "floor: three products": products,
}


def peak(name: str) -> None:
    torch.set_num_threads(1)
    inputs = problem(shared=name == SHARED)
    # Threads, allocator and libraries are started before the measurement.
    fused(*problem(samples=1, tokens=32))
    with PeakMemory() as memory:
        CANDIDATES[name](*inputs)
    print(json.dumps({"extra": memory.extra}))


def exactness() -> dict[str, float]:
    """Largest differences from the dense loss in float64, relative to the largest value."""
    found = {}
    for name, run in (("fused", fused), ("dense", dense)):
        query, key, spans, mask = problem(samples=2, tokens=64, dtype=torch.float64)
        run(query, key, spans, mask)
        found[name] = query.grad, key.grad
    pairs = zip(("d_query", "d_key"), found["fused"], found["dense"], strict=True)
    return {name: float((a - b).abs().max() / b.abs().max()) for name, a, b in pairs}


def main() -> None:
    run_tests("tests/losses/test_global_pointer.py", "tests/losses/test_multilabel.py")
    torch.set_num_threads(1)
    flops = 6 * SAMPLES * TYPES * TOKENS**2 * CHANNELS
    floor_bytes = 2 * 4 * SAMPLES * TYPES * TOKENS * CHANNELS + 4 * TOKENS**2
    print(f"{flops / 1e9:.1f} GFLOP; at least {floor_bytes / 2**20:.0f} MiB beside the inputs (gradients, one block)")
    whole, shared = problem(), problem(shared=True)

    def run(name):
        inputs = shared if name == SHARED else whole
        inputs[0].grad = inputs[1].grad = None
        CANDIDATES[name](*inputs)

    reference = "dense multilabel_cross_entropy"
    rows = summary(interleave({n: partial(run, n) for n in CANDIDATES}, rounds=ROUNDS, warmup=1), reference)
    for name, row in rows.items():
        row["peak_extra_MiB"] = in_fresh_process(__file__, name)["extra"] / 2**20
    for row in rows.values():
        row["peak_ratio"] = row["peak_extra_MiB"] / rows[reference]["peak_extra_MiB"]
    show(f"B = {SAMPLES}, {TYPES} types, n = {TOKENS}, D = {CHANNELS}, {ROUNDS} rounds", rows)
    errors = exactness()
    print("relative differences from the dense float64 computation:", errors)
    shape = {"samples": SAMPLES, "types": TYPES, "tokens": TOKENS, "channels": CHANNELS, "rounds": ROUNDS}
    path = save(
        "global_pointer",
        {**shape, "flops": flops, "floor_bytes": floor_bytes, "candidates": rows, "float64_errors": errors},
    )
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    peak(sys.argv[1]) if len(sys.argv) > 1 else main()
