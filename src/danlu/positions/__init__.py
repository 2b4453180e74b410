"""Position ids to rotations, scales or other ids."""

from danlu.positions._log_n import logn_scale
from danlu.positions._randomized import even_positions, random_positions
from danlu.positions._rotary import RotaryEmbedding, apply_rope, rope_frequencies

__all__ = [
    "RotaryEmbedding",
    "apply_rope",
    "even_positions",
    "logn_scale",
    "random_positions",
    "rope_frequencies",
]
