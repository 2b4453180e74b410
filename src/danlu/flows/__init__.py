"""Flows, energy to trajectory: gradient flows of functions, and of functionals of a distribution by particles."""

from danlu.flows._energies import KL, Entropy, Interaction, Potential
from danlu.flows._f_divergence import FDivergence
from danlu.flows._gradient_flow import GradientTrajectory, gradient_flow
from danlu.flows._jko import jko_step
from danlu.flows._ornstein_uhlenbeck import GaussianFlow, ornstein_uhlenbeck
from danlu.flows._particle_trajectory import ParticleTrajectory
from danlu.flows._steepest_direction import steepest_direction
from danlu.flows._wasserstein_flow import WassersteinFlow

__all__ = [
    "KL",
    "Entropy",
    "FDivergence",
    "GaussianFlow",
    "GradientTrajectory",
    "Interaction",
    "ParticleTrajectory",
    "Potential",
    "WassersteinFlow",
    "gradient_flow",
    "jko_step",
    "ornstein_uhlenbeck",
    "steepest_direction",
]
