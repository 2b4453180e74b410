"""Attention by mask kind in parts beside `scaled_dot_product_attention` with the dense mask.

8 heads of 64 channels, one thread, interleaved in one process. The floor counts the visible pairs, in units of
those that a kernel looks at under a dense mask: all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from _measure import interleave, run_tests, save, show, summary
from danlu.attention import attention_mask, split_attention

HEADS, DIM, ROUNDS = 8, 64, 5
LENGTHS = [1024, 4096]
DENSE = "torch SDPA, dense mask"


def floor(kind: str, length: int, prefix: int | None) -> float:
    """Visible pairs over all pairs."""
    mask = attention_mask(kind, length, prefix_lengths=prefix, num_heads=2 if kind == "forward_backward" else None)
    return float(mask.attn_mask.double().mean())


def tensors(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM, generator=generator).requires_grad_() for _ in range(3)]


def candidates(kind: str, length: int, prefix: int | None) -> dict[str, Callable[..., Tensor]]:
    heads = HEADS if kind == "forward_backward" else None
    mask = attention_mask(kind, length, prefix_lengths=prefix, num_heads=heads).attn_mask
    return {
        DENSE: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "danlu split_attention": lambda q, k, v: split_attention(q, k, v, kind=kind, prefix_lengths=prefix),
        "torch SDPA, no mask (all pairs)": F.scaled_dot_product_attention,
        "torch SDPA, causal (another mask)": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }


def forward(attention: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return attention(*inputs)

    return run


def both(attention: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(attention(*inputs).sum(), inputs)

    return run


def main() -> None:
    run_tests("tests/attention/test_split_attention.py")
    torch.set_num_threads(1)
    content = {}
    for length in LENGTHS:
        inputs = tensors(length)
        for kind, prefix in (("prefix", length // 2), ("forward_backward", None)):
            for title, make in (("forward", forward), ("forward and backward", both)):
                runs = {name: make(f, inputs) for name, f in candidates(kind, length, prefix).items()}
                rows = summary(interleave(runs, rounds=ROUNDS, warmup=1), DENSE)
                for row in rows.values():
                    row["floor_ratio"] = floor(kind, length, prefix)
                name = f"{kind}, {title}, {length} positions"
                show(f"{name}, ratio to {DENSE}", rows)
                content[name] = rows
    print(f"written to {save('split_attention', content)}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    main()
