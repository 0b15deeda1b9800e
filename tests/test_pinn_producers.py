"""NumPy's hand-written rules, PyTorch's autodiff and JAX's taps give the same records, independently."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore_numpy.equations.network import PINN
from kfaccore_numpy.equations.problems import PROBLEMS

NAMES = ["poisson-2d", "heat-4d", "fokker-planck-9d"]


def made(name):
    pinn = PINN.of(PROBLEMS[name], 7, 5)
    params = pinn.init(2)
    return pinn, params, pinn.problem.sample(np.random.default_rng(3), 6, 4)


def residuals(name, x, y):
    """The equation in coefficients first (batch, d, 1), second (batch, 1), written apart from the package."""
    d = x.shape[1]

    def inside(u):
        if name.startswith("poisson"):
            return u.second[:, 0] + y
        if name.startswith("heat"):
            return u.first[:, 0, 0] - 0.25 * u.second[:, 0] - y
        slope = u.first[:, 1:, 0]
        return u.first[:, 0, 0] - (d - 1) / 2 - (slope * x[:, 1:]).sum(1) / 2 - (slope**2).sum(1) - u.second[:, 0] - y

    return inside


def agree(want, got, tolerance=1e-10):
    for name, record in want.items():
        for x, y in ((record.a, got[name].a), (record.g, got[name].g)):
            x, y = np.asarray(x), np.asarray(y)
            assert x.shape == y.shape
            assert np.abs(x - y).max() <= tolerance * np.abs(x).max(), name


def numpy_records(captured, term):
    return {name: records[term] for name, records in captured.records.items()}


@pytest.mark.parametrize("name", NAMES)
def test_torch_agrees(name):
    torch = pytest.importorskip("torch")
    from kfaccore_torch.taylor import capture

    pinn, params, batch = made(name)
    layers = []
    for W in params.values():
        linear = torch.nn.Linear(W.shape[1] - 1, W.shape[0], dtype=torch.float64)
        linear.weight.data, linear.bias.data = torch.tensor(W[:, :-1]), torch.tensor(W[:, -1])
        layers += [linear, torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1])
    captured = pinn.capture(params, batch)
    rename = dict(zip([n for n, _ in model.named_children()][::2], params, strict=True))
    (x, y), (b, values) = [tuple(map(torch.tensor, pair)) for pair in batch]
    c = torch.tensor(pinn.problem.equation.slots.second, dtype=torch.float64)
    r, records = capture(model, x, residuals(name, x, y), c)
    assert np.allclose(r.numpy(), captured.residuals[0], rtol=1e-10, atol=1e-12)
    agree(numpy_records(captured, 0), {rename[n]: record for n, record in records.items()})
    r, records = capture(model, b, lambda u: u.value[:, 0] - values)
    assert np.allclose(r.numpy(), captured.residuals[1], rtol=1e-12, atol=1e-13)
    agree(numpy_records(captured, 1), {rename[n]: record for n, record in records.items()})


@pytest.mark.parametrize("name", NAMES)
def test_jax_agrees(name):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    from kfaccore_jax.taylor import capture

    pinn, params, batch = made(name)
    captured = pinn.capture(params, batch)
    weights = {n: jax.numpy.asarray(W) for n, W in params.items()}
    (x, y), (b, values) = [tuple(map(jax.numpy.asarray, pair)) for pair in batch]
    c = jax.numpy.asarray(pinn.problem.equation.slots.second)

    @jax.jit  # as a training step is
    def captures(weights):
        return capture(weights, x, residuals(name, x, y), c), capture(weights, b, lambda u: u.value[:, 0] - values)

    (r, inside), (_, boundary) = captures(weights)
    assert np.allclose(np.asarray(r), captured.residuals[0], rtol=1e-10, atol=1e-12)
    agree(numpy_records(captured, 0), inside)
    agree(numpy_records(captured, 1), boundary)


def test_torch_activations_against_autodiff():
    torch = pytest.importorskip("torch")
    from kfaccore_torch.taylor import _SMOOTH, capture, forward

    rev, c = torch.func.jacrev, torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64)
    for kind in _SMOOTH:
        model = torch.nn.Sequential(torch.nn.Linear(2, 6), kind(), torch.nn.Linear(6, 1, bias=False)).double()
        want = torch.vmap(lambda p, m=model: (rev(rev(lambda q: m(q)[0]))(p) * c).sum())(x)
        assert torch.allclose(forward(model, x, c)[0].second[:, 0], want, rtol=1e-11), kind
    model = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.ReLU(), torch.nn.Linear(6, 1)).double()
    with pytest.raises(ValueError, match="ReLU under a second-order operator"):
        capture(model, x, lambda u: u.second[:, 0], c)
    model[1] = torch.nn.Dropout()
    with pytest.raises(TypeError, match="Dropout has no derivatives here"):
        capture(model, x, lambda u: u.second[:, 0], c)
    model[1] = torch.nn.Tanh()
    with pytest.raises(ValueError, match=r"residual gave shape \(5, 1\)"):
        capture(model, x, lambda u: u.second, c)


def test_jax_activations_need_no_registration():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    from kfaccore_jax.taylor import capture, forward

    jnp, rng = jax.numpy, np.random.default_rng(1)
    params = {"a": jnp.asarray(rng.normal(size=(6, 3))), "b": jnp.asarray(rng.normal(size=(1, 7)))}
    x, c = jnp.asarray(rng.normal(size=(4, 2))), jnp.asarray(rng.normal(size=(2, 2)))

    def u(p):
        return params["b"][0, :-1] @ jnp.sin(params["a"][:, :-1] @ p + params["a"][:, -1]) + params["b"][0, -1]

    want = jax.vmap(lambda p: (jax.hessian(u)(p) * c).sum())(x)
    found = forward(params, x, c, jnp.sin)[0]
    assert jnp.allclose(found.second[:, 0], want, rtol=1e-11)
    for kinked in (jax.nn.relu, jax.nn.relu6, jnp.abs):
        with pytest.raises(ValueError, match="piecewise linear activation"):
            capture(params, x, lambda v: v.second[:, 0], c, kinked)
    with pytest.raises(ValueError, match=r"residual gave shape \(4, 1\)"):
        capture(params, x, lambda v: v.second, c)
    capture(params, x, lambda v: v.value[:, 0], None, jax.nn.relu)  # without an operator it is fine


REFUSED = {  # what becomes of points (5, 2) and operator (2, 2), the error and its message
    "one input short": (lambda x, c: (x[:, :1], c), ValueError, r"points have shape .*5, 1.*; need \(points, 2\)"),
    "no points": (lambda x, c: (x[:0], c), ValueError, "at least one point"),
    "one point alone": (lambda x, c: (x[0], c), ValueError, r"points have shape .*2,.*; need \(points, 2\)"),
    "other operator": (lambda x, c: (x, c[:1]), ValueError, r"operator has shape .*1, 2.*; need \(2, 2\)"),
    "single points": (lambda x, c: (x.astype(np.float32), c), TypeError, "parameters .*float64, points .*float32"),
    "single operator": (lambda x, c: (x, c.astype(np.float32)), TypeError, "operator .*float32; need one dtype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_torch_refuses_what_does_not_fit(case):
    torch = pytest.importorskip("torch")
    from kfaccore_torch.taylor import capture

    change, error, message = REFUSED[case]
    x, c = map(torch.tensor, change(np.random.default_rng(0).normal(size=(5, 2)), np.eye(2)))
    model = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
    with pytest.raises(error, match=message):
        capture(model, x, lambda u: u.second[:, 0], c)
    with pytest.raises(TypeError, match="the model is Tanh"):
        capture(torch.nn.Tanh(), x, lambda u: u.second[:, 0], c)


@pytest.mark.parametrize("case", REFUSED)
def test_jax_refuses_what_does_not_fit(case):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    from kfaccore_jax.taylor import capture

    change, error, message = REFUSED[case]
    x, c = map(jax.numpy.asarray, change(np.random.default_rng(0).normal(size=(5, 2)), np.eye(2)))
    params = {"a": jax.numpy.ones((6, 3)), "b": jax.numpy.ones((1, 7))}
    with pytest.raises(error, match=message):
        jax.jit(lambda p: capture(p, x, lambda u: u.second[:, 0], c)[0])(params)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_float32_with_tiny_damping_is_warned_about_with_the_number(framework):
    pytest.importorskip(framework)
    pinn, params, batch = made("poisson-2d")
    records = pinn.capture(params, batch).records["dense2"]
    put = {"torch": _torch_array, "jax": _jax_array}[framework]
    single = tuple(kf.Record(put(r.a[0]), put(r.g[0, 0]), r.n) for r in records)
    with pytest.warns(RuntimeWarning, match=r"damping 1e-12 is below 1.2e-07, the rounding of .*float32"):
        kf.settle(kf.PINNKFAC(), single, damping=1e-12)
    with pytest.raises(ValueError, match="record has 1 terms; this PINNKFAC needs a tuple of 2"):
        kf.settle(kf.PINNKFAC(), single[:1])  # the boundary was forgotten


def _torch_array(x):
    import torch

    return torch.tensor(np.array(x, dtype=np.float32))


def _jax_array(x):
    import jax

    return jax.numpy.asarray(np.array(x, dtype=np.float32))
