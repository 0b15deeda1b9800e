"""From directions to the update that is subtracted."""

from kfaccore.step.fixed import Fixed

__all__ = ["Fixed"]
