"""Networks of kfaccore_numpy as JAX functions of the same matrices, so layer names and sizes agree."""

from __future__ import annotations

import kfaccore_numpy as kn
from jax_needed import jax, jnp, lax

_SIMPLE = {
    kn.Tanh: jnp.tanh,
    kn.ReLU: jax.nn.relu,
    kn.Sigmoid: jax.nn.sigmoid,
    kn.Flatten: lambda x: x.reshape(x.shape[0], -1),
}


def twin(net: kn.Sequential):
    """apply(params, x) for params {name: matrix with the bias a last column}."""

    def layers(params, stack, x, path):
        for i, layer in enumerate(stack):
            name = f"{path}{type(layer).__name__.lower()}{i}"
            if isinstance(layer, kn.Residual):
                x = x + layers(params, layer.layers, x, name + ".")
            elif isinstance(layer, kn.Dense):
                x = x @ params[name][:, :-1].T + params[name][:, -1]
            elif isinstance(layer, kn.Conv2d):
                w, window = params[name], layer.window
                kernel = w[:, :-1].T.reshape(*window.kernel, x.shape[-1], layer.channels)
                x = w[:, -1] + lax.conv_general_dilated(
                    x,
                    kernel,
                    window.stride,
                    window.padding,
                    rhs_dilation=window.dilation,
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            elif isinstance(layer, kn.MaxPool):
                size = (1, layer.size, layer.size, 1)
                x = lax.reduce_window(x, -jnp.inf, lax.max, size, size, "VALID")
            else:
                x = _SIMPLE[type(layer)](x)
        return x

    return lambda params, x: layers(params, net.layers, x, "")
