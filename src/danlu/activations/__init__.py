"""Activations, elementwise maps of real numbers."""

from danlu.activations._squareplus import SquarePlus, squareplus

__all__ = ["SquarePlus", "squareplus"]
