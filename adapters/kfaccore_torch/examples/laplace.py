"""A trained classifier as a Laplace posterior: the evidence tunes the prior, the probit link predicts."""

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore.posterior import probit


def main(steps: int = 200) -> tuple[float, float]:
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    batches = [(x[:100], y[:100]), (x[100:], y[100:])]
    curvature = kf.fit(kf.EKFAC(), kt.Stream(model, loss, batches, fisher=kf.type2))
    P = kf.Posterior(kt.matrices(model), curvature, precision=1.0, scale=len(x))
    value = len(x) * float(loss(model(x), y).detach())
    tuned, _ = kf.tuned(P)
    print("log evidence", float(kf.evidence(P, value)), "tuned", float(kf.evidence(tuned, value)))
    far = torch.tensor([[0.5, 0.5], [20.0, 20.0]])  # inside the data, and far from all of it
    with torch.no_grad():
        f = model(far).numpy()
    (records,) = kt.outputs(model, [far])
    near, away = torch.as_tensor(probit(f, tuned.covariance(records))).max(1).values.tolist()
    print("confidence near and far", near, away)
    return near, away


if __name__ == "__main__":
    main()
