"""K-FAC for PyTorch: directions for any optimizer, or one optimizer that sets its own step."""

from kfaccore_torch.analysis import records, save_records
from kfaccore_torch.distributed import Distributed
from kfaccore_torch.engine import Settings
from kfaccore_torch.optimizer import Optimizer
from kfaccore_torch.preconditioner import Preconditioner
from kfaccore_torch.report import Coverage
from kfaccore_torch.table import Plan, plan

__all__ = [
    "Coverage",
    "Distributed",
    "Optimizer",
    "Plan",
    "Preconditioner",
    "Settings",
    "plan",
    "records",
    "save_records",
]
