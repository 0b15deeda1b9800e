"""The convolution layer against direct convolution sums: inputs, gradients, parameters, padding modes, groups."""

import numpy as np
import pytest

from forwards import Convolution
from kfaccore import Block, Record, Window, dense
from kfaccore.layers.conv import Conv

MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def convolve(layer, parameters, x):
    """Output (batch, *outputs, C_out) of channels-last x and a (*kernel, C_in / groups, C_out) weight, by loops."""
    w = layer.window
    return Convolution(w.padding, w.stride, w.dilation, layer.groups, MODES[layer.padding_mode])(x, **parameters)


def sample(layer, spatial, batch=3):
    rng = np.random.default_rng(3)
    c_in, c_out = layer.channels
    parameters = {"weight": rng.standard_normal((*layer.window.kernel, c_in // layer.groups, c_out))}
    if layer.bias:
        parameters["bias"] = rng.standard_normal(c_out)
    return parameters, rng.standard_normal((batch, *spatial, c_in))


def channels_first(x, lead=1):
    return np.moveaxis(x, -1, lead)


LAYERS = [
    (Conv(Window((3,), padding=1), (2, 3)), (7,)),
    (Conv(Window((3, 2), padding="same"), (2, 3)), (5, 6)),
    (Conv(Window((3, 3), stride=2, padding=((1, 0), (0, 2))), (4, 6), groups=2), (7, 6)),
    (Conv(Window((3, 3), padding=2, dilation=2), (4, 4), groups=4, bias=False), (6, 5)),
    (Conv(Window((2, 2, 3), padding=(0, 1, 1)), (2, 3)), (3, 4, 3)),
    *(
        (Conv(Window((3, 3), stride=s, padding=((1, 2), (2, 1))), (4, 6), 2, True, mode), (5, 6))
        for mode in MODES
        for s in (1, 2)
    ),
]


@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
@pytest.mark.parametrize(("layer", "spatial"), LAYERS, ids=str)
def test_matrix_times_patches_is_the_convolution(layer, spatial, first):
    parameters, x = sample(layer, spatial)
    y = convolve(layer, parameters, x)
    if first:
        layer = Conv(layer.window, layer.channels, layer.groups, layer.bias, layer.padding_mode, True)
        axes = len(layer.window.kernel)
        weight = parameters["weight"].transpose(axes + 1, axes, *range(axes))
        parameters, x, y = {**parameters, "weight": weight}, channels_first(x), channels_first(y)
    a = layer.activations(x).unfold()
    matrix = layer.matrix(parameters)
    assert layer.block() == Block(matrix.shape[1], a.shape[-1], layer.groups)
    found = a @ matrix[:, None].mT
    found = found if layer.groups > 1 else found[0]
    np.testing.assert_allclose(found, layer.gradients(y), rtol=0, atol=1e-12 * np.abs(y).max())
    again = layer.parameters(matrix)
    assert again.keys() == parameters.keys()
    for name, value in parameters.items():
        np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize(("layer", "spatial"), LAYERS, ids=str)
def test_gradients_of_draws_keep_blocks_after_draws(layer, spatial):
    outputs = layer.window.outputs(spatial)
    gy = np.random.default_rng(4).standard_normal((5, 3, *outputs, layer.channels[1]))
    g = layer.gradients(gy, draws=True)
    width = layer.channels[1] // layer.groups
    lead = (layer.groups,) if layer.groups > 1 else ()
    assert g.shape == (5, *lead, 3, int(np.prod(outputs)), width)
    for draw in range(5):
        np.testing.assert_array_equal(g[draw], layer.gradients(gy[draw]))


def test_fisher_of_a_record_is_that_of_finite_differences():
    """Row-major F of sum(gy * conv(x)) from directional differences of the loops: no Patches, no Record."""
    layer = Conv(Window((2, 2), stride=1, padding=1), (2, 4), groups=2)
    parameters, x = sample(layer, (3, 2))
    gy = np.random.default_rng(5).standard_normal((3, 4, 3, 4))
    record = Record(layer.activations(x), layer.gradients(gy), 3.0)
    F = dense(record)
    matrix = layer.matrix(parameters)
    jacobian = np.zeros((3, *matrix.shape))
    base = convolve(layer, parameters, x)
    for index in np.ndindex(matrix.shape):
        moved = matrix.copy()
        moved[index] += 1.0
        step = convolve(layer, layer.parameters(moved), x) - base
        jacobian[(slice(None), *index)] = (gy * step).sum(axis=(1, 2, 3))
    for group in range(2):
        J = jacobian[:, group].reshape(3, -1)
        np.testing.assert_allclose(F[group], J.T @ J / 3.0, rtol=0, atol=1e-12 * np.abs(F).max())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_in_every_namespace(xp, mode):
    layer = Conv(Window((3, 3), padding=1), (2, 3), padding_mode=mode)
    _, x = sample(layer, (4, 5))
    found = xp.get(layer.activations(xp.put(x)).gram())
    np.testing.assert_allclose(found, layer.activations(x).gram(), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Conv(Window((3,)), (3, 4), groups=2), r"channels \(3, 4\) do not divide into 2 groups"),
        (lambda: Conv(Window((3,)), (3, 4), groups=0), "do not divide into 0 groups"),
        (lambda: Conv(Window((3,)), (3, 4), padding_mode="mirror"), "padding_mode is 'mirror'"),
        (lambda: Conv(Window((3,)), (3, 4)).activations(np.ones((2, 3, 5))), "x has shape .* need batch and 3 chan"),
        (lambda: Conv(Window((3,)), (3, 4), channels_first=True).activations(np.ones((2, 5))), "before 1 spatial"),
        (lambda: Conv(Window((3,)), (3, 4)).gradients(np.ones((2, 5, 3))), "gy has shape"),
        (lambda: Conv(Window((3,)), (3, 4)).gradients(np.ones((2, 5, 4)), draws=True), "need draws, batch"),
        (lambda: Conv(Window((3,)), (3, 4)).matrix({"weight": np.ones((4, 3, 3)), "bias": np.ones(4)}), "weight has"),
        (lambda: Conv(Window((3,)), (3, 4)).parameters(np.ones((4, 9))), r"need \(groups, d_out, d_in\) = \(1, 4, 10"),
        (
            lambda: Conv(Window((3,), padding=4), (1, 1), padding_mode="reflect").activations(np.ones((1, 4, 1))),
            "reflect padding of .* needs a longer axis than 4",
        ),
        (
            lambda: Conv(Window((3,), padding=5), (1, 1), padding_mode="circular").activations(np.ones((1, 4, 1))),
            "circular padding",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
