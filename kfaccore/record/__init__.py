"""The record of a layer for one mini-batch: what every method reads, and all that a shell must make.

`record` has the arrays (and `dense`, the Fisher block by definition), `sharing` the functions from record to record
(`expand`, `reduce`, `concat`), `jacobian` products with the per-example gradients, `files` records on disk.
"""

from kfaccore.record.ids import Ids
from kfaccore.record.record import Factored, Record, dense

__all__ = ["Factored", "Ids", "Record", "dense"]
