"""A head that is trained first, the rest thawed later, and a run that is stopped and goes on."""

import io

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch import Preconditioner
from kfaccore_torch.examples.digits import data, mlp, right


def run(steps: int, thaw: int, state: bytes | None = None) -> tuple[nn.Module, bytes]:
    """Steps up to `steps`, from a saved state if there is one; the model and the state to save."""
    model, (x, y) = mlp(), data()
    saved = torch.load(io.BytesIO(state), weights_only=True) if state else {"step": 0}
    model[0].requires_grad_(saved["step"] >= thaw)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pre = Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(2, 10)))
    for name, part in {"model": model, "sgd": sgd, "pre": pre}.items() if state else ():
        part.load_state_dict(saved[name])
    for step in range(saved["step"], steps):
        model[0].requires_grad_(step >= thaw)  # what is thawed is measured and refreshed in its first step
        rows = torch.randint(len(x), (256,), generator=torch.Generator().manual_seed(step))
        sgd.zero_grad()
        with pre.capture():
            f = model(x[rows])
        pre.loss(f, y[rows]).backward()
        pre.step()
        sgd.step()
    buffer = io.BytesIO()
    state_dicts = {"model": model.state_dict(), "sgd": sgd.state_dict(), "pre": pre.state_dict()}
    torch.save({"step": steps, **state_dicts}, buffer)
    return model, buffer.getvalue()


def main() -> float:
    """Share of digits classified correctly after 40 steps, stopped at 25 and gone on."""
    model, _ = run(40, 10, run(25, 10)[1])
    return right(model, *data())
