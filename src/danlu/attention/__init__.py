"""Attention, (query, key, value) to output, in the layout of `torch.nn.functional.scaled_dot_product_attention`.

Masks follow one convention everywhere: **True means visible**.
"""

from danlu.attention._global_pointer import EfficientGlobalPointer, GlobalPointer, decode_spans
from danlu.attention._rerope import ReRoPE, rerope_attention, rope_attention

__all__ = [
    "EfficientGlobalPointer",
    "GlobalPointer",
    "ReRoPE",
    "decode_spans",
    "rerope_attention",
    "rope_attention",
]
