"""One decoding step of ReRoPE beside RoPE's and beside the style that rotates all cached keys in every step.

16384 tokens in the cache, window 1024, 32 query heads, 8 key heads of 128 channels, one thread, interleaved in one
process. RoPE's cache holds rotated keys, and its step is two products and a softmax over the heads that share a key
head; in bfloat16 it rounds its scores and weights to that, which ours and the flash kernel do not. The floor is reading
keys and values once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from _measure import interleave, run_tests, save, show, summary
from danlu.attention import ReRoPECache, rerope_attention, rerope_decode
from danlu.positions import apply_rope, rope_frequencies

LENGTH, WINDOW, HEADS, KEY_HEADS, DIM, ROUNDS = 16384, 1024, 32, 8, 128, 15
FREQUENCIES = rope_frequencies(DIM)
LAST = torch.tensor([LENGTH - 1])


def shared_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two products and a softmax, in which a key head is read once for all its query heads."""
    grouped = query.view(1, KEY_HEADS, HEADS // KEY_HEADS, DIM) * DIM**-0.5
    return (torch.softmax(grouped @ key.transpose(-2, -1), -1) @ value).view(1, HEADS, 1, DIM)


def all_rotated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The published style: unrotated keys in the cache, all of them rotated in every step."""
    slots = torch.arange(LENGTH)
    grouped = (1, KEY_HEADS, HEADS // KEY_HEADS, DIM)
    near = apply_rope(query, LAST, FREQUENCIES).view(grouped) @ apply_rope(key, slots, FREQUENCIES).transpose(-2, -1)
    far = apply_rope(query, torch.tensor([WINDOW]), FREQUENCIES).view(grouped) @ key.transpose(-2, -1)
    scores = torch.where(LENGTH - 1 - slots < WINDOW, near, far) * DIM**-0.5
    return (torch.softmax(scores, -1) @ value).view(1, HEADS, 1, DIM)


def candidates(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, 1, DIM, generator=generator).to(dtype)
    key, value = (torch.randn(1, KEY_HEADS, LENGTH, DIM, generator=generator).to(dtype) for _ in range(2))
    rotated = apply_rope(key, torch.arange(LENGTH), FREQUENCIES)
    slope = 1 / 16
    leaky_key = apply_rope(key, torch.arange(LENGTH) * slope, FREQUENCIES)
    expected = rerope_attention(query, key, value, window=WINDOW, backend="reference")
    for found in (rerope_decode(query, key, value, window=WINDOW), all_rotated(query, key, value)):
        print(f"{dtype}: off by {(found.double() - expected.double()).abs().max():.1e}")
    lengths = torch.tensor([LENGTH])
    padding = torch.arange(LENGTH)[None] >= 100
    options = {"window": WINDOW, "slope": slope}
    cache = ReRoPECache(WINDOW, capacity=LENGTH + 1)
    cache.step(query.expand(-1, -1, LENGTH, -1)[:, :, :1], key[:, :, :1], value[:, :, :1])
    cache._tensors = [F.pad(x, (0, 0, 0, 1)) for x in (key, value)]

    def with_cache() -> Tensor:
        cache._lengths = cache._longest = LENGTH - 1
        return cache.step(query, key[:, :, -1:], value[:, :, -1:])

    def flash(query: Tensor) -> Tensor:
        grouped = query.view(1, KEY_HEADS, HEADS // KEY_HEADS, DIM)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(grouped, rotated, value, 0.0, False, scale=DIM**-0.5)[0]

    return {
        "RoPE, rotated cache": lambda: shared_heads(apply_rope(query, LAST, FREQUENCIES), rotated, value),
        "RoPE, torch SDPA with enable_gqa": lambda: F.scaled_dot_product_attention(
            apply_rope(query, LAST, FREQUENCIES), rotated, value, enable_gqa=True
        ),
        "RoPE, flash kernel on shared heads": lambda: flash(apply_rope(query, LAST, FREQUENCIES)),
        "danlu ReRoPE": lambda: rerope_decode(query, key, value, window=WINDOW),
        "danlu ReRoPECache.step": with_cache,
        "danlu ReRoPE, padding on the left": lambda: rerope_decode(
            query, key, value, window=WINDOW, key_padding_mask=padding
        ),
        "danlu ReRoPE, lengths in a tensor": lambda: rerope_decode(query, key, value, window=WINDOW, length=lengths),
        "danlu Leaky ReRoPE, second cache": lambda: rerope_decode(query, key, value, leaky_key=leaky_key, **options),
        "danlu Leaky ReRoPE": lambda: rerope_decode(query, key, value, **options),
        "all keys rotated in the step": lambda: all_rotated(query, key, value),
    }


def main() -> None:
    run_tests("tests/attention/test_rerope_decode.py", "tests/attention/test_rerope_cache.py")
    torch.set_num_threads(1)
    content = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            rows = summary(interleave(candidates(dtype), rounds=ROUNDS), "RoPE, rotated cache")
            size = 2 * LENGTH * KEY_HEADS * DIM * dtype.itemsize
            for row in rows.values():
                row["GB_per_s"] = size / row["median_ms"] / 1e6
            show(f"{dtype}, {size / 2**20:.0f} MiB of keys and values, ratio to RoPE", rows)
            content[str(dtype)] = rows
    print(f"written to {save('rerope_decode', {'times': content})}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    main()
