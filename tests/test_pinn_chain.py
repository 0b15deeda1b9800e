"""JAX's Taylor producer: the order of the layers however a dict went, and functions that mix numbers, by name."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)
from kfaccore_jax.taylor import capture  # noqa: E402

jnp = jax.numpy
NAMES = tuple(f"dense_{i}" for i in range(1, 12))


def made(widths, names):
    rng = np.random.default_rng(0)
    shapes = zip(names, widths[1:], widths[:-1], strict=True)
    return {name: jnp.asarray(rng.normal(size=(d_out, d_in + 1)) / 2) for name, d_out, d_in in shapes}


def points():
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))


def network(params, names, x):
    for i, name in enumerate(names):
        x = (jnp.tanh(x) if i else x) @ params[name][:, :-1].T + params[name][:, -1]
    return x[:, 0]


def value(params, x, order=None):
    return capture(params, x, lambda u: u.value[:, 0], order=order)[0]


def test_eleven_layers_in_their_order_eagerly_in_jit_and_after_a_pytree():
    params, x = made([2, *[4] * 10, 1], NAMES), points()
    want = network(params, NAMES, x)
    sorted_by_jax = jax.tree.map(lambda W: W, params)
    assert jnp.allclose(value(params, x), want, rtol=1e-13)
    assert jnp.allclose(jax.jit(lambda p, x: value(p, x, NAMES))(params, x), want, rtol=1e-13)
    assert jnp.allclose(value(sorted_by_jax, x, NAMES), want, rtol=1e-13)
    assert jnp.allclose(jax.jit(value)(OrderedDict(params), x), want, rtol=1e-13)  # of those jax keeps the order
    assert jnp.allclose(jax.jit(value)(params, x), want, rtol=1e-13)  # names that count tell it
    assert jnp.allclose(value(sorted_by_jax, x), want, rtol=1e-13)


def test_names_that_tell_no_order_are_refused_once_jax_may_have_sorted_them():
    names = ("first", "second", "third", "fourth")
    params, x = made([2, 4, 4, 4, 1], names), points()
    assert jnp.allclose(value(params, x), network(params, names, x), rtol=1e-13)
    for call in (jax.jit(value), lambda p, x: value(jax.tree.map(lambda W: W, p), x)):
        with pytest.raises(ValueError, match=r"order of the layers .* cannot be seen.*give order="):
            call(params, x)


@pytest.mark.parametrize("widths", [[2, 8, 8, 1], [2, 8, 5, 1]])
def test_widths_that_leave_one_order_tell_it(widths):
    names = ("input", "hidden", "output")
    params, x = made(widths, names), points()
    assert jnp.allclose(jax.jit(value)(params, x), network(params, names, x), rtol=1e-13)
    with pytest.raises(ValueError, match=r"points have shape \(3, 1\); need \(points, 2\)"):
        jax.jit(value)(params, x[:, :1])


def test_orders_that_do_not_fit_are_refused():
    params, x = made([2, 8, 5, 1], ("input", "hidden", "output")), points()
    with pytest.raises(ValueError, match=r"order has layers .*; params have"):
        value(params, x, ("input", "output"))
    with pytest.raises(ValueError, match="layer 'output' takes 5 numbers and 'input' before it gives 8"):
        value(params, x, ("input", "output", "hidden"))


def standardised(z):
    return (z - z.mean(-1, keepdims=True)) / (1 + z.std(-1, keepdims=True))


def over_points(z):
    return jnp.tanh(z - z.mean(0))


@pytest.mark.parametrize("activation", [jax.nn.softmax, standardised, over_points])
@pytest.mark.parametrize("jit", [False, True])
def test_an_activation_that_mixes_numbers_is_refused(activation, jit):
    params = made([2, 8, 1], "ab")

    def r(x):
        return capture(params, x, lambda u: u.second[:, 0], jnp.eye(2), activation)[0]

    with pytest.raises(ValueError, match=rf"activation {activation.__name__} is not elementwise"):
        (jax.jit(r) if jit else r)(points())


OTHERS = {
    "mean": lambda u: u.value[:, 0] - u.value[:, 0].mean(),
    "pairs": lambda u: u.value[:, 0] - u.value[::-1, 0],
    "differences": lambda u: 2 * u.value[:, 0] - jnp.roll(u.value[:, 0], 1) - jnp.roll(u.value[:, 0], -1),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_residual_that_sees_other_points_is_refused_and_traced_gives_no_number(case):
    params = made([2, 8, 1], "ab")
    with pytest.raises(ValueError, match="depends on other points"):
        capture(params, points(), OTHERS[case])
    found = jax.jit(lambda p, x: capture(p, x, OTHERS[case])[1]["a"].g)(params, points())
    assert np.isnan(np.asarray(found)).all()


def test_what_is_traced_and_right_keeps_its_numbers():
    params, x = made([2, 8, 1], "ab"), points()

    def g(p, x, slope, y):
        bent = lambda z: jnp.tanh(slope * z)  # noqa: E731
        return capture(p, x, lambda u: u.second[:, 0] * y - u.value[:, 0] ** 2, jnp.eye(2), bent)[1]["a"].g

    args = params, x, jnp.asarray(1.5), jnp.arange(3.0)
    assert jnp.allclose(jax.jit(g)(*args), g(*args), rtol=1e-12)
    assert np.isfinite(np.asarray(g(*args))).all()
