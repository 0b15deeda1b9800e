"""channels_last, torch.compile, an average of the weights (EMA), and evaluation inside the loop."""

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch import Preconditioner
from kfaccore_torch.examples.digits import cnn, data, right


def main(steps: int = 30, compiled: bool = True) -> tuple[float, float]:
    """Share of digits classified correctly, by the network and by its average."""
    net = cnn().to(memory_format=torch.channels_last)
    x, y = data()
    x = x.reshape(-1, 1, 8, 8).to(memory_format=torch.channels_last)
    model = torch.compile(net, backend="eager") if compiled else net  # captured steps run it as it was written
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    pre = Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(2, 10)))
    for step in range(steps):
        rows = torch.randint(len(x), (256,))
        sgd.zero_grad()
        with pre.capture():
            f = model(x[rows])
        pre.loss(f, y[rows]).backward()
        if step % 10 == 9:
            right(model, x, y)  # no_grad: nothing is seen of it, wherever it stands
        pre.step()
        sgd.step()
        average.update_parameters(net)
    torch.optim.swa_utils.update_bn([x], average)
    return right(net, x, y), right(average, x, y)


if __name__ == "__main__":
    print("{:.1%} of the digits, {:.1%} by the average".format(*main()))
