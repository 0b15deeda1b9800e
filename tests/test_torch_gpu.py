"""Models on CUDA: the step of the CPU, in the precision that the user trains in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore.xp.precision import exact
from kfaccore_torch import launched

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
METHODS = {
    "kfac": kf.KFAC(),
    "eigh": kf.KFAC(inverse=kf.eigh),
    "ekfac": kf.EKFAC(),
    "skfac": kf.SKFAC(),
    "tkfac": kf.TKFAC(),
    "singd": kf.SINGD(),
}


def net() -> nn.Module:
    """Windows of every geometry that a GPU lays out, norms, and dense layers."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 6, 1),
        nn.Tanh(),
        nn.Conv2d(6, 5, (3, 2), (2, 1), (1, 0), (1, 2)),
        nn.Flatten(),
        nn.Linear(5 * 4 * 6, 9),
        nn.LayerNorm(9),
        nn.Linear(9, 4),
    )


def moved(
    device: str, method: object, dtype: torch.dtype = torch.float64, **settings: object
) -> dict[str, torch.Tensor]:
    """Directions of the third step of three batches."""
    model = net().to(device, dtype)
    generator = torch.Generator().manual_seed(2)
    core = kf.Preconditioner(method, kf.Clocks(1, 2), kf.Schedules(damping=1e-2), donate=True)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core, fisher=kf.empirical, **settings)
    for _ in range(3):
        x = torch.randn(16, 3, 16, 16, generator=generator, dtype=torch.float64).to(device, dtype)
        y = torch.randint(0, 4, (16,), generator=generator).to(device)
        model.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("namespace", ["torch", "cupy"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_directions_are_those_of_the_cpu(method, namespace):
    """Three steps of a small net in float64 agree to rounding."""
    want = moved("cpu", method, namespace="torch")
    for name, x in moved("cuda", method, namespace=namespace).items():
        torch.testing.assert_close(x, want[name], rtol=1e-8, atol=1e-10 * float(want[name].abs().max()))


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(), kf.SINGD()], ids=lambda m: type(m).__name__)
def test_a_graph_gives_the_step(method, monkeypatch):
    """Twenty steps with updates and refreshes, recorded and not, agree."""
    found = []
    for records in (True, False):
        if not records:
            monkeypatch.setattr(launched, "records_on", lambda device: False)
        model = net().cuda()
        core = kf.Preconditioner(method, kf.Clocks(4, 8), kf.Schedules(damping=1e-2), donate=True)
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core, precision=kf.Precision())
        generator = torch.Generator().manual_seed(2)
        told = []
        for _ in range(20):
            x = torch.randn(16, 3, 16, 16, generator=generator).cuda()
            y = torch.randint(0, 4, (16,), generator=generator).cuda()
            model.zero_grad()
            with pre.capture():
                f = model(x)
            pre.loss(f, y).backward()
            pre.step()
            if len(told) < 18:
                told.append((pre.info, pre.info.metrics()))
        assert all(info.metrics() == numbers for info, numbers in told)  # though the graph writes its arrays again
        assert (pre.engine.launch.recorded is not None) == records
        found.append([p.grad for p in model.parameters()])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)  # sums of convolutions' gradients come in any order


def test_torch_is_the_default():
    pre = kt.Preconditioner(nn.Linear(2, 2).cuda(), nn.MSELoss())
    assert pre.engine.namespace == "torch"


@pytest.mark.parametrize(
    ("how", "dense"),
    [("highest", kf.Precision()), ("high", kf.Precision("bfloat16", "tf32"))],
)
def test_each_layer_has_the_precision_of_its_own_product(how, dense):
    """cuDNN's flag for convolutions, matmul's for dense layers; the flags are as they were after a step."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).cuda()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(how)
    try:
        with pre.capture():
            f = model(torch.randn(4, 1, 3, 3, device="cuda"))
        pre.loss(f, torch.zeros(4, dtype=torch.int64, device="cuda")).backward()
        pre.step()
        assert torch.get_float32_matmul_precision() == how
    finally:
        torch.set_float32_matmul_precision(before)
    assert pre.engine.observed_precision() == {"0": kf.Precision("bfloat16", "tf32"), "2": dense}


def test_autocast_is_seen_at_the_call():
    """Entered inside the capture or around it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)).cuda()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss())
    with pre.capture(), torch.autocast("cuda", torch.bfloat16):
        f = model(torch.randn(4, 8, device="cuda"))
    pre.loss(f, torch.zeros(4, dtype=torch.int64, device="cuda")).backward()
    pre.step()
    found = pre.engine.observed_precision()
    assert found is not None
    assert set(found.values()) == {kf.Precision("bfloat16", "tf32")}


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [
        (kf.Precision(), 0.0, 3e-4),
        (kf.Precision("bfloat16"), 1e-5, 5e-2),
        (kf.Precision("float32", "tf32"), 1e-5, 5e-2),
    ],
    ids=["float32", "bfloat16 rows", "TF32 solves"],
)
def test_errors_against_float64(precision, least, most):
    """Of all layers together; the model's own products are float32."""
    flags = torch.backends.cudnn
    kept = flags.allow_tf32
    flags.allow_tf32 = False
    try:
        want = moved("cuda", kf.KFAC())
        found = moved("cuda", kf.KFAC(), torch.float32, precision=precision)
    finally:
        flags.allow_tf32 = kept
    gap = sum(float((found[name] - x).square().sum()) for name, x in want.items())
    size = sum(float(x.square().sum()) for x in want.values())
    assert least <= (gap / size) ** 0.5 <= most


def test_a_factorisation_is_never_tf32():
    """At condition 1e6 an inverse in TF32 is not one: the flag is off inside, and on again after."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(700, 700)))[0]
    X = torch.from_numpy((Q * np.logspace(0, -6, 700)) @ Q.T).float().cuda()[None]
    torch.set_float32_matmul_precision("high")
    try:
        with exact():
            inverse, code = kf.xp.spd_inverse(X)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert int(code[0]) in (int(kf.Code.OK), int(kf.Code.FLOAT64))
    error = (X[0].double() @ inverse[0].double() - torch.eye(700, device="cuda")).norm() / 700**0.5
    assert float(error) < 0.1


def test_draws_are_a_function_of_the_seed():
    """Made on the device: the same in every run of one seed, others of another."""
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))  # of no concern
        model = nn.Linear(3, 5).cuda()
        with torch.no_grad():
            model.weight.fill_(0.1)
            model.bias.zero_()
        pre = kt.Preconditioner(model, nn.MSELoss(), seed=seed)
        with pre.capture():
            f = model(torch.ones(64, 3, device="cuda"))
        pre.loss(f, torch.zeros(64, 5, device="cuda")).backward()
        pre.step()
        found.append(pre.engine.state.layers["linear"].G.cpu())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
