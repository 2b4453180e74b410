"""Position ids to rotations, scales or other ids."""

from danlu.positions._alibi import alibi_bias, alibi_slopes
from danlu.positions._log_n import logn_scale
from danlu.positions._position_collator import RandomPositionCollator
from danlu.positions._position_hook import RandomizedPositions, randomize_positions
from danlu.positions._randomized import even_positions, random_positions
from danlu.positions._rotary import RotaryEmbedding, apply_rope, rope_frequencies
from danlu.positions._scaling import dynamic_factor, scale_frequencies

__all__ = [
    "RandomPositionCollator",
    "RandomizedPositions",
    "RotaryEmbedding",
    "alibi_bias",
    "alibi_slopes",
    "apply_rope",
    "dynamic_factor",
    "even_positions",
    "logn_scale",
    "random_positions",
    "randomize_positions",
    "rope_frequencies",
    "scale_frequencies",
]
