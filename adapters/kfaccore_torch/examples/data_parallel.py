"""DistributedDataParallel with K-FAC: `torchrun --nproc-per-node 2 -m kfaccore_torch.examples.data_parallel`."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import kfaccore as kf
from kfaccore_torch import Preconditioner


def main(steps: int = 60) -> float:
    """Share of digits classified correctly after `steps` global batches of 256."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 10))
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    core = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(update=2, refresh=10))  # over all ranks
    pre = Preconditioner(model, nn.CrossEntropyLoss(), core)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))[rank::world]
        optimizer.zero_grad()
        with pre.capture():
            f = model(x[rows])
        pre.loss(f, y[rows]).backward()
        pre.step()
        optimizer.step()
    return float((net(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(f"{main():.1%} of the digits")
    dist.destroy_process_group()
