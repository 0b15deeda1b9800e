"""From directions to the update that is subtracted."""

from kfaccore.step.averaging import IterateAverage
from kfaccore.step.fixed import PLAIN, Fixed
from kfaccore.step.grid import GridSearch
from kfaccore.step.line_search import LineSearch
from kfaccore.step.quadratic import Quadratic
from kfaccore.step.rule import Rule, spread
from kfaccore.step.self_tuning import SelfTuning

__all__ = [
    "PLAIN",
    "Fixed",
    "GridSearch",
    "IterateAverage",
    "LineSearch",
    "Quadratic",
    "Rule",
    "SelfTuning",
    "spread",
]
