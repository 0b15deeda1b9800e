"""The weights of a plan as matrices of the equation, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

import kfaccore as kf
from kfaccore_tensorflow.bridge import to_numpy, to_tensor
from kfaccore_tensorflow.plan import Part, Plan
from kfaccore_tensorflow.trace import coverage


def matrices(model: Any, x: Any = None) -> dict[str, np.ndarray]:
    """{part: matrix} of the covered weights, copies, 2-D if there is one block: the `mean` of a `kfaccore.Posterior`.

    x    a batch, for a model that does not tell its inputs
    """
    return of_plan(coverage(model, x=x))


def assign(model: Any, matrices: Mapping[str, np.ndarray], x: Any = None) -> None:
    """Set the covered weights to `matrices`, such as `P.sample(noise)`; parts left out keep theirs.

    ValueError for parts that the model does not have, or of another size, before anything is set.
    """
    parts = {part.name: part for part in coverage(model, x=x).parts}
    unknown = sorted(set(matrices) - set(parts))
    if unknown:
        raise ValueError(f"the model has no parts {unknown}; it has {sorted(parts)}")
    for name, matrix in matrices.items():
        block = parts[name].block()
        shape = (block.blocks, block.d_out, block.d_in)
        if tuple(matrix.shape) not in (shape, shape[1:] if shape[0] == 1 else shape):
            raise ValueError(f"part {name!r} got a matrix of {tuple(matrix.shape)}; need {shape}, blocks first")
    put([(parts[name], np.asarray(matrix)) for name, matrix in matrices.items()])


def of_plan(plan: Plan) -> dict[str, np.ndarray]:
    """As `matrices`."""
    found = {}
    for part in plan.parts:
        matrix = part.matrix(_values(part))
        found[part.name] = matrix[0] if len(matrix) == 1 else matrix
    return found


def put(given: Sequence[tuple[Part, np.ndarray]]) -> None:
    """Writes matrices into the variables of their parts; elements that belong to other parts stay."""
    new: dict[int, tuple[Any, np.ndarray]] = {}
    for part, matrix in given:
        values = _values(part)
        placed = part.arrays(matrix)
        mask = part.arrays(np.ones(part.matrix(values).shape))
        for role, v in part.variables.items():
            value = new[id(v)][1] if id(v) in new else values[role]
            new[id(v)] = (v, np.where(mask[role] > 0, placed[role], value))
    for v, value in new.values():
        v.assign(to_tensor(value, v.dtype))


def check_columns(path: str | PathLike, plan: Plan) -> None:
    """ValueError where a file's matrix of a transposed convolution was written by torch, whose columns run the other
    way: it alone keeps the axis of one block."""
    turned = [part.name for part in plan.parts if any(stride < 0 for _, stride in part.matrices["weight"].ins)]
    saved = kf.flatten(kf.load(path)) if turned else {}
    theirs = [name for name in turned if saved[f"params/{name}"].ndim == 3]
    if theirs:
        raise ValueError(
            f"{path} was written by torch, which keeps the kernels of transposed convolutions the other way round than "
            f"is done here, of layers {theirs}: begin their curvature anew, and set their weights from the model's own"
        )


def _values(part: Part) -> dict[str, np.ndarray]:
    return {role: np.array(to_numpy(v.value)) for role, v in part.variables.items()}
