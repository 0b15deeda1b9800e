"""K-FAC for PyTorch: directions for any optimizer, or one optimizer that sets its own step."""

from kfaccore_torch.asked import plan
from kfaccore_torch.distributed import Distributed
from kfaccore_torch.optimizer import Optimizer
from kfaccore_torch.own_losses import ExampleLoss, Loss
from kfaccore_torch.passes import drawing
from kfaccore_torch.plan import Plan
from kfaccore_torch.preconditioner import Preconditioner
from kfaccore_torch.records import records, save_records
from kfaccore_torch.report import Coverage
from kfaccore_torch.settings import Settings
from kfaccore_torch.stream import Stream, measured, outputs
from kfaccore_torch.weights import assign, matrices

__all__ = [
    "Coverage",
    "Distributed",
    "ExampleLoss",
    "Loss",
    "Optimizer",
    "Plan",
    "Preconditioner",
    "Settings",
    "Stream",
    "assign",
    "drawing",
    "matrices",
    "measured",
    "outputs",
    "plan",
    "records",
    "save_records",
]
