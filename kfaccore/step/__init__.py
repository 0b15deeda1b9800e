"""From directions to the update that is subtracted."""

from kfaccore.step.fixed import Fixed
from kfaccore.step.line_search import LineSearch
from kfaccore.step.quadratic import Quadratic
from kfaccore.step.self_tuning import SelfTuning

__all__ = ["Fixed", "LineSearch", "Quadratic", "SelfTuning"]
