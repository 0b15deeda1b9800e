"""Layer kinds in arrays: inputs to `a`, output gradients to `g`, parameters to the matrix of the equation and back."""

from kfaccore.layers.conv import Conv
from kfaccore.layers.embedding import Embedding
from kfaccore.layers.linear import Linear
from kfaccore.layers.scale import Bias, Gain

__all__ = ["Bias", "Conv", "Embedding", "Gain", "Linear"]
