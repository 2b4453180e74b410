"""What frequencies that follow the length cost beside attention to keys that are rotated once.

One thread, interleaved in one process; 8 heads of 64, float32, a training length of an eighth of the text for the whole
text, and 32 query heads on 8 key heads of 128 for one token of a cache of 16384 keys. The floor is causal attention
without any rotation; the peer is what transformers does in a step of decoding, attention to keys as they lie in the
cache, which is wrong for its "dynamic" frequencies.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn import functional as F

from _measure import interleave, run_tests, save, show, summary
from danlu.attention import dynamic_rope_attention, rope_attention

LENGTHS = (2048, 4096, 8192)
ROUNDS = 5


def main() -> None:
    run_tests("tests/attention/test_dynamic_rope.py")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found = {}
    for length in LENGTHS:
        q, k, v = torch.randn(3, 1, 8, length, 64)
        trained = length // 8
        runs = {
            "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "rope_attention": lambda q=q, k=k, v=v: rope_attention(q, k, v),
            "dynamic, step T / 8": lambda q=q, k=k, v=v, t=trained: dynamic_rope_attention(q, k, v, train_length=t),
            "dynamic, step T": lambda q=q, k=k, v=v, t=trained: dynamic_rope_attention(q, k, v, train_length=t, step=t),
        }
        rows = summary(interleave(runs, rounds=ROUNDS, warmup=1), "sdpa")
        flops = 4 * 8 * 64 * length * length / 2
        show(f"{length} tokens, trained on {trained}; at least {flops / 1e9:.1f} Gflop", rows)
        found[f"read_{length}"] = rows
    q, k, v = torch.randn(1, 32, 1, 128), torch.randn(1, 8, 16384, 128), torch.randn(1, 8, 16384, 128)
    runs = {
        "sdpa, rotated keys": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "dynamic": lambda: dynamic_rope_attention(q, k, v, train_length=2048),
    }
    rows = summary(interleave(runs, rounds=ROUNDS, warmup=1), "sdpa, rotated keys")
    show(f"one token after 16384; at least {2 * k.numel() * 4 / 1e6:.0f} MB are read", rows)
    found["token"] = rows
    print(f"written to {save('dynamic_rope', {'times': found})}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    main()
