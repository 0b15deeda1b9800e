"""From directions to the update that is subtracted."""

from kfaccore.step.fixed import Fixed
from kfaccore.step.self_tuning import SelfTuning

__all__ = ["Fixed", "SelfTuning"]
