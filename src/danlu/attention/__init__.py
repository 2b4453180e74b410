"""Attention, (query, key, value) to output, in the layout of `torch.nn.functional.scaled_dot_product_attention`.

Masks follow one convention everywhere: **True means visible**.
"""

from danlu.attention._global_pointer import EfficientGlobalPointer, GlobalPointer, decode_spans
from danlu.attention._rerope import ReRoPE, rerope_attention, rope_attention
from danlu.attention._rerope_backend import BackendChoice, explain_backend
from danlu.attention._rerope_cache import ReRoPECache
from danlu.attention._rerope_decode import rerope_decode

__all__ = [
    "BackendChoice",
    "EfficientGlobalPointer",
    "GlobalPointer",
    "ReRoPE",
    "ReRoPECache",
    "decode_spans",
    "explain_backend",
    "rerope_attention",
    "rerope_decode",
    "rope_attention",
]
