"""Losses, and the Fishers as ways to draw output gradients from them."""

from kfaccore.fisher.draws import draw_noise, empirical, forward_only, monte_carlo, type2
from kfaccore.fisher.joint import Joint
from kfaccore.fisher.losses import Bernoulli, Gaussian, SoftmaxCrossEntropy

__all__ = [
    "Bernoulli",
    "Gaussian",
    "Joint",
    "SoftmaxCrossEntropy",
    "draw_noise",
    "empirical",
    "forward_only",
    "monte_carlo",
    "type2",
]
