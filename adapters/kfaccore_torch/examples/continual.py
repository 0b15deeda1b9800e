"""Five tasks one after the other: the energy of past posteriors keeps the old ones (EWC), with K-FAC."""

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt


def tasks(count: int = 5) -> list:
    x = torch.randn(200, 8)
    return [(x + 3 * torch.randn(8), (x @ torch.randn(8) > 0).long()) for _ in range(count)]


def trained(model: nn.Module, data: tuple, past: list, steps: int) -> None:
    plan, loss, optimizer = kt.plan(model), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        theta = {name: layer.matrix(layer.parameters) for name, layer in plan.layers.items()}  # in the graph
        energy = sum(P.energy(theta) for P in past) / len(data[0])
        (loss(model(data[0]), data[1]) + energy).backward()
        optimizer.step()


def main(steps: int = 150, remember: bool = True) -> float:
    torch.manual_seed(0)
    model, past, every = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2)), [], tasks()
    for data in every:
        trained(model, data, past, steps)
        stream = kt.Stream(model, nn.CrossEntropyLoss(), [data], fisher=kf.type2, namespace="torch")
        mean = kt.matrices(model, namespace="torch")
        past += [kf.Posterior(mean, kf.fit(kf.KFAC(), stream), 1e-3, len(data[0]))] if remember else []
    return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in every) / len(every)


if __name__ == "__main__":
    print(f"mean accuracy of five tasks: {main(remember=False):.2f} without the past, {main():.2f} with it")
