"""F of each layer from the network function alone: no record, no layer kind but the way from parameters to the matrix.

The GGN is J^T H J of the training loss as it is called, J a row of autograd for every number of the prediction, so it
knows nothing of examples. The empirical Fisher takes the gradient of each example's own loss.
"""

from __future__ import annotations

import numpy as np
import torch


def rows(scalars, layer):
    """The gradient of each scalar as vec of the layer's matrix, (scalars, blocks, d_out d_in)."""
    found = []
    for scalar in scalars:
        grads = torch.autograd.grad(scalar, list(layer.parameters.values()), retain_graph=True, allow_unused=True)
        pairs = zip(layer.parameters.items(), grads, strict=True)
        named = {role: (torch.zeros_like(p) if g is None else g).numpy() for (role, p), g in pairs}
        matrix = np.asarray(layer.matrix(named))
        matrix = matrix if matrix.ndim == 3 else matrix[None]
        found.append(matrix.reshape(matrix.shape[0], -1))
    return np.stack(found)


def ggn(model, value, inputs, layer):
    """J^T H J of the loss value(f), (blocks, D, D)."""
    f = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    H = torch.autograd.functional.hessian(value, f.detach()).reshape(f.numel(), f.numel()).numpy()
    J = rows(f.reshape(-1), layer)
    return np.einsum("ika,ij,jkb->kab", J, H, J)


def empirical(losses, n, layer):
    """(1/n) sum of the outer products of each example's own gradient."""
    J = rows(losses, layer)
    return np.einsum("ika,ikb->kab", J, J) / n


def close(found, wanted, tolerance=1e-10):
    """Largest error over the largest entry."""
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=tolerance * (scale if scale else 1.0))
