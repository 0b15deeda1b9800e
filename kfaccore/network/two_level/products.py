"""Products with the network's J and F_d = F + damping I over all layers, from records; rows are draws and examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import add

from kfaccore.convolution.patches import Patches
from kfaccore.network.two_level.gradients import Gradients, Tree
from kfaccore.network.two_level.vectors import Outer, Vector, dense, dots, inner
from kfaccore.record import Ids, Record
from kfaccore.record.jacobian import adjoint, contracted, outputs, pulled, weighed
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.memory import plus

Records = Mapping[str, Record]
Dampings = Mapping[str, float | Array]
Slope = Callable[[], Array | None] | None  # gives <r, g>, where it can


def image(records: Records, v: Tree) -> Array:
    """J v of every draw and example over all layers, (rows,)."""
    return gathered(records, {name: outputs(records[name], x)[0] for name, x in v.items()})


def gathered(records: Records, z: Tree) -> Array:
    """J v, (rows,), given V a of every layer."""
    return reduce(add, (_rows(records[name], x) for name, x in z.items()))


def _rows(record: Record, z: Array) -> Array:
    """<g, V a> of each draw and example, (rows,), given V a."""
    return namespace(z).reshape(contracted(record, z), (-1,))


def curved(records: Records, damping: Dampings, n: float | Array, v: Tree, w: Array) -> Tree:
    """F_d v over all layers, given w = J v."""
    found = {}
    for name, x in v.items():
        record = records[name]
        back = adjoint(record, namespace(w).reshape(w, (record.draws, record.batch)))
        found[name] = back / n + scalar(damping[name], x) * x
    return found


def residuals(records: Records, damping: Dampings, n: float | Array, z0: Tree, w0: Array, g: Gradients) -> Tree:
    """g - F_d z0 over all layers, given w0 = J z0; one product with a where gradient and record share their inputs."""
    found = {}
    for name, x in z0.items():
        record = records[name]
        rows = g.rows(name, record)
        w = namespace(w0).reshape(w0, (record.draws, record.batch))
        if rows is None:
            left = g.of(name) - adjoint(record, w) / n
        else:
            rows -= weighed(record, w / n)  # an array of its own
            left = pulled(record, rows)
        found[name] = plus(left, -scalar(damping[name], x), x)
    return found


def images(
    records: Records, layers: Sequence[str], vectors: Sequence[Vector], g: Gradients, known: Mapping[int, Array]
) -> tuple[Array, tuple[Slope, ...]]:
    """Y = J R^T, (rows, m), and of each vector <r, g> to be called where V a tells it, else None; `known` has V a of
    some arrays by their id."""
    columns: dict[int, Array] = {}
    slopes: dict[int, Slope] = dict.fromkeys(range(len(vectors)))
    for name in dict.fromkeys(layers):
        record = records[name]
        arrays: dict[int, Array] = {}
        for i, (layer, r) in enumerate(zip(layers, vectors, strict=True)):
            if layer != name:
                continue
            if isinstance(r, Outer):
                columns[i] = _product_rows(record, r)
            else:
                arrays[i] = r
        for i, z in zip(arrays, _outputs(record, list(arrays.values()), known), strict=True):
            columns[i] = _rows(record, z)
            slopes[i] = partial(_slope, g, name, record, z)
    ordered = [columns[i] for i in range(len(vectors))]
    return namespace(ordered[0]).stack(ordered, axis=-1), tuple(slopes.values())


def _product_rows(record: Record, r: Outer) -> Array:
    """<g, V a> of each draw and example, (rows,), for V = left right^T."""
    p, q = dots(record, r)
    xp = namespace(q)
    return xp.reshape(xp.sum(q * p[None, ...], axis=(1, 3)), (-1,))


def _slope(g: Gradients, name: str, record: Record, z: Array) -> Array | None:
    """<r, g> from V a, where the gradient has the record's inputs."""
    rows = g.rows(name, record)
    return None if rows is None else inner(rows, z)


def _outputs(record: Record, vs: list[Array], known: Mapping[int, Array]) -> list[Array]:
    """V a for each v: together where the rows must be formed, else apart, which needs no copy of the vectors."""
    if isinstance(record.a, Ids | Patches) and len(vs) > 1:
        return outputs(record, *vs)
    return [known[id(v)] if id(v) in known else outputs(record, v)[0] for v in vs]


def ridge(layers: Sequence[str], vectors: Sequence[Vector], damping: Dampings) -> Array:
    """damping <r_i, r_j> of vectors of one layer, (m, m)."""
    pairs = list(zip(layers, vectors, strict=True))
    xp = namespace(dense(vectors[0]))
    zero = 0.0 * inner(vectors[0], vectors[0])
    rows = []
    for name, x in pairs:
        row = [scalar(damping[name], zero) * inner(x, y) if name == other else zero for other, y in pairs]
        rows.append(xp.stack(row))
    return xp.stack(rows)
