"""Attention, (query, key, value) to output, in the layout of `torch.nn.functional.scaled_dot_product_attention`.

Masks follow one convention everywhere: **True means visible**.
"""

from danlu.attention._codebook_init import init_codebook_from_keys
from danlu.attention._dynamic_rope import dynamic_rope_attention
from danlu.attention._feature_maps import FavorFeatures, SoftVQFeatures, feature_map
from danlu.attention._global_pointer import EfficientGlobalPointer, GlobalPointer, decode_spans
from danlu.attention._linear_attention import (
    LinearAttention,
    LinearAttentionState,
    linear_attention,
    linear_attention_step,
)
from danlu.attention._mask_kinds import AttentionMask, attention_mask, block_mask
from danlu.attention._rerope import ReRoPE, rerope_attention, rope_attention
from danlu.attention._rerope_backend import BackendChoice, explain_backend
from danlu.attention._rerope_cache import ReRoPECache
from danlu.attention._rerope_decode import rerope_decode
from danlu.attention._split_attention import split_attention
from danlu.attention._vector_quantizer import Quantized, VectorQuantizer
from danlu.attention._vq_attention import vq_attention
from danlu.attention._vq_decode import VQState
from danlu.attention._vq_module import VQAttention
from danlu.attention._windows import LayerPlan, hwfa_layer_plan, window_mask

__all__ = [
    "AttentionMask",
    "BackendChoice",
    "EfficientGlobalPointer",
    "FavorFeatures",
    "GlobalPointer",
    "LayerPlan",
    "LinearAttention",
    "LinearAttentionState",
    "Quantized",
    "ReRoPE",
    "ReRoPECache",
    "SoftVQFeatures",
    "VQAttention",
    "VQState",
    "VectorQuantizer",
    "attention_mask",
    "block_mask",
    "decode_spans",
    "dynamic_rope_attention",
    "explain_backend",
    "feature_map",
    "hwfa_layer_plan",
    "init_codebook_from_keys",
    "linear_attention",
    "linear_attention_step",
    "rerope_attention",
    "rerope_decode",
    "rope_attention",
    "split_attention",
    "vq_attention",
    "window_mask",
]
