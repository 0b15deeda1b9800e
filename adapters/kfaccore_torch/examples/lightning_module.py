"""A Lightning module with K-FAC: manual optimization, so that the loop is in sight, and checkpoints."""

import lightning
import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch import Preconditioner
from kfaccore_torch.examples.toys import loader, points


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
        self.pre = Preconditioner(self.net, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), kf.Clocks(2, 10)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.optimizers().zero_grad()
        with self.pre.capture():
            f = self.net(batch[0])
        self.manual_backward(self.pre.loss(f, batch[1]))
        self.pre.step()
        self.optimizers().step()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["kfaccore"] = self.pre.state_dict()


def main(epochs: int = 6) -> float:
    """Share of points classified correctly."""
    x, y = points()
    model = Classifier()
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, loader(64))
    return float((model.net(x).argmax(1) == y).float().mean())
