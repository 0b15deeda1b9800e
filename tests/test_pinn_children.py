"""PyTorch's Taylor producer against its model, by autodiff one point at a time; what it refuses, by name."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from kfaccore_torch import taylor  # noqa: E402
from kfaccore_torch.taylor import capture, smooth  # noqa: E402

EYE = torch.eye(2, dtype=torch.float64)


def mlp(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).double()


def points(n=5):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def laplacian(u):
    return u.second[:, 0] + u.value[:, 0] ** 2


def wanted(model, x):
    """Laplacian plus squared value of each point, and its derivative by each parameter."""

    def one(p, params):
        net = lambda q: torch.func.functional_call(model, params, (q[None],))[0, 0]  # noqa: E731
        return torch.func.jacrev(torch.func.jacrev(net))(p).trace() + net(p) ** 2

    params = dict(model.named_parameters())
    r = torch.stack([one(p, params) for p in x])
    return r, [torch.func.grad(lambda params, p=p: one(p, params))(params) for p in x]


def twice_an_activation():
    act = nn.Tanh()
    return mlp(nn.Linear(2, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 1)), "0 2 4"


def twice_a_layer():
    layer = nn.Linear(4, 4)
    return mlp(nn.Linear(2, 4), nn.Tanh(), layer, nn.Tanh(), layer, nn.Sigmoid(), nn.Linear(4, 1)), "0 2 6"


def tied_layers():
    model = mlp(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 1))
    model[4].weight, model[4].bias = model[2].weight, model[2].bias
    return model, "0 2 6"


def sharp_softplus():
    return mlp(nn.Linear(2, 4), nn.Softplus(beta=5), nn.Linear(4, 1)), "0 2"


@pytest.mark.parametrize("made", [twice_an_activation, twice_a_layer, tied_layers, sharp_softplus])
def test_records_are_the_derivatives_of_what_the_model_computes(made):
    model, names = made()
    x = points()
    r, records = capture(model, x, laplacian, EYE)
    want, jacobians = wanted(model, x)
    assert torch.allclose(r, want.detach(), rtol=1e-12, atol=1e-13)
    assert " ".join(records) == names
    for name, record in records.items():
        for i, jacobian in enumerate(jacobians):
            found = record.g[0, 0, i].T @ record.a[0, i]
            whole = torch.cat([jacobian[f"{name}.weight"], jacobian[f"{name}.bias"][:, None]], dim=1)
            assert torch.allclose(found, whole, rtol=1e-11, atol=1e-12), (name, i)


@pytest.mark.parametrize("how", ["frozen", "no_grad"])
def test_a_frozen_layer_and_no_grad_change_nothing(how):
    model = mlp(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    _, want = capture(model, points(), laplacian, EYE)
    model[0].requires_grad_(how != "frozen")
    with torch.set_grad_enabled(how != "no_grad"):
        _, records = capture(model, points(), laplacian, EYE)
    for name, record in records.items():
        assert torch.equal(record.g, want[name].g)
        assert not record.a.requires_grad


class Boundary(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * x[:, :1]


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Backwards(nn.Sequential):
    def forward(self, x):
        return self[4](self[1](self[0](self[3](self[2](x)))))


def hooked(where):
    model = mlp(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    where(model)
    return model


OTHERWISE = {
    "own forward of the model": (lambda: Boundary(*mlp(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))), "Boundary"),
    "own forward of a layer": (lambda: mlp(nn.Linear(2, 4), nn.Tanh(), Tripled(4, 1)), r"'2' \(Tripled\)"),
    "own order": (lambda: Backwards(*hooked(lambda m: None)), r"'0' \(Linear\)"),
    "hook": (lambda: hooked(lambda m: m[2].register_forward_hook(lambda m, x, y: y + 1)), r"'2' \(Linear\)"),
    "hook of an activation": (lambda: hooked(lambda m: m[1].register_forward_hook(lambda m, x, y: 2 * y)), "'1'"),
    "pre-hook": (lambda: hooked(lambda m: m.register_forward_pre_hook(lambda m, x: (2 * x[0],))), "'0'"),
    "forward set": (lambda: hooked(lambda m: setattr(m[3], "forward", torch.sin)), r"'3' \(Tanh\)"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_model_that_is_not_its_children_in_turn_is_refused_by_the_first_that_differs(case):
    made, name = OTHERWISE[case]
    with pytest.raises(ValueError, match=rf"Taylor rules do not give model\(x\): .*{name}"):
        capture(made(), points(), laplacian, EYE)


def test_a_hook_that_comes_later_is_seen():
    model = hooked(lambda m: None)
    capture(model, points(), laplacian, EYE)
    model[2].register_forward_hook(lambda m, x, y: y + 1)
    with pytest.raises(ValueError, match=r"'2' \(Linear\)"):
        capture(model, points(), laplacian, EYE)


def test_layers_that_share_a_part_are_refused():
    model = mlp(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="layers '0' and '2' share some of their parameters"):
        capture(model, points(), laplacian, EYE)


class Centred(nn.Module):
    def forward(self, z):
        return z - z.mean(1, keepdim=True)


class Cube(nn.Module):
    def forward(self, z):
        return z**3


def test_registered_derivatives_are_compared_with_the_activation(monkeypatch):
    monkeypatch.setattr(taylor, "_SMOOTH", dict(taylor._SMOOTH))
    smooth(Centred)(lambda z: (z - z.mean(1, keepdim=True), torch.full_like(z, 0.75), torch.zeros_like(z)))
    smooth(Cube)(lambda z: (z**3, 3 * z**2, 5 * z))
    for kind, order in ((Centred, "first"), (Cube, "second")):
        with pytest.raises(ValueError, match=rf"the {order} derivative of '1' \({kind.__name__}\) .* elementwise"):
            capture(mlp(nn.Linear(2, 4), kind(), nn.Linear(4, 1)), points(), laplacian, EYE)


def test_a_residual_sees_its_own_point_alone():
    model = mlp(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    others = {
        "mean": lambda u: u.value[:, 0] - u.value[:, 0].mean(),
        "pairs": lambda u: u.value[:, 0] - u.value[:, 0].flip(0),
        "differences": lambda u: 2 * u.value[:, 0] - u.value[:, 0].roll(1) - u.value[:, 0].roll(-1),
    }
    for residual in others.values():
        with pytest.raises(ValueError, match="depends on other points"):
            capture(model, points(6), residual)
    with pytest.raises(ValueError, match=r"uses parameters \['0.weight', '0.bias', '2.weight'"):
        capture(model, points(), lambda u: u.value[:, 0] - model(points() + 1)[:, 0])
    with pytest.raises(ValueError, match="does not depend on the slots"):
        capture(model, points(), lambda u: u.value[:, 0].detach())
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)  # an unknown of the equation may be there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(model, points(), lambda u: factor * u.value[:, 0] * points()[:, 0])
