"""Position ids to rotations, scales or other ids."""

from danlu.positions._rotary import RotaryEmbedding, apply_rope, rope_frequencies

__all__ = ["RotaryEmbedding", "apply_rope", "rope_frequencies"]
