"""Calls and their output gradients as kfaccore's records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import kfaccore as kf
from kfaccore_tensorflow.halves import Half, looked_up, table
from kfaccore_tensorflow.kinds import Elementwise, Kind, Seen
from kfaccore_tensorflow.layout import Layout
from kfaccore_tensorflow.loops import lay
from kfaccore_tensorflow.masks import Rows
from kfaccore_tensorflow.padding import Alive, alive
from kfaccore_tensorflow.places import Place
from kfaccore_tensorflow.plan import Part
from kfaccore_tensorflow.slopes import change


@dataclass(frozen=True)
class Shape:
    """What is known of a call when a graph is traced.

    turned    whether its matrix is the part's transposed
    paths     layouts of the factors that changed it, of each way it came; none where it came as it is
    masks     (places among the batch's masks, step or None) of each layer call around it, the innermost first
    together  calls of this number are one layer call: their rows are summed
    of_inputs whether the batch goes into the call's output
    """

    kind: Kind
    turned: bool = False
    paths: tuple[tuple[Layout, ...], ...] = ()
    masks: tuple[tuple[tuple[int, ...], int | None], ...] = ()
    together: int = -1
    of_inputs: bool = True


@dataclass(frozen=True)
class Given:
    """The arrays of one call: the other operand, slopes of what changed the weight, output gradients, draws first, and
    the other factor of a weight that is a product."""

    x: np.ndarray | None
    slopes: Sequence[np.ndarray]
    g: np.ndarray
    by: np.ndarray | None = None


def seen(part: Part, shape: Shape, given: Given) -> Seen:
    """Rows of one call, the weight's change taken into g."""
    x = given.x
    if table(shape.kind) and x is not None:
        x = x.astype(np.int64)
    found = shape.kind.rows(x, given.g, part.bias and not isinstance(shape.kind, Elementwise))
    if isinstance(shape.kind, Half):
        assert given.by is not None
        return shape.kind.through(found, given.by)
    if not shape.paths:
        return found
    weight = part.variables["weight"]
    matrix = part.matrices["weight"].of(change(shape.paths, given.slopes, weight.shape))  # (blocks, d_out, d_in)
    if not isinstance(shape.kind, Elementwise):  # all elements changed alike, else there would be no record
        return Seen(found.a, found.g * matrix.reshape(-1)[0])
    rows = (1,) * len(found.rows)
    return Seen(found.a, found.g * matrix[..., 0].reshape(1, len(matrix), *rows, matrix.shape[1]))


@dataclass(frozen=True)
class Batch:
    """n and the number of examples; masks (examples, positions) of the layers' calls; `present`, which examples count,
    or None for all.

    unseen    {part: shape of a mask that leaves out some of its rows, though which is not to be seen}; filled by
              `record`, as is `alive`, which positions of it move the prediction
    """

    n: float
    examples: int
    masks: Sequence[np.ndarray]
    present: np.ndarray | None
    unseen: dict[str, tuple[int, ...]]
    alive: dict[str, list[Alive]]


def record(
    part: Part,
    shapes: Sequence[Shape],
    given: Sequence[Seen],
    places: Sequence[Place],
    batch: Batch,
    stacked: bool = False,
) -> kf.Record:
    """One record of all calls of a part: several calls are more positions of the same examples.

    places     where the rows of each call stand; a part whose rows are no one's own has a record of one example
    stacked    draws of a part that is used both ways are more examples, else positions of each draw's own, which keeps
               draws apart and takes as many times the memory
    """
    together = any(place.axis is None for place in places)
    if together:
        places = [Place(None, mixes=True)] * len(places)
    examples = 1 if together else batch.examples
    every = [_piece(part, *one, examples) for one in zip(shapes, given, places, strict=True)]
    _stand(part, every, shapes, given, places, batch)
    pieces = []
    merged: dict[tuple, int] = {}
    for shape, found, piece in zip(shapes, given, every, strict=True):
        key = (shape.together, found.rows)
        if isinstance(shape.kind, Elementwise) and key in merged:
            pieces[merged[key]].g = pieces[merged[key]].g + piece.g
        else:
            merged[key] = len(pieces)
            pieces.append(piece)
    if any(piece.turned for piece in pieces):
        pieces = [_stacked(piece) for piece in pieces] if stacked else pieces
        _met(pieces)
    return _joined(part, pieces, batch.n)


@dataclass
class _Piece:
    """a (blocks, examples, positions, d_in), Ids or Patches; g (draws, blocks, examples, positions, d_out)."""

    a: Any
    g: np.ndarray
    turned: bool = False
    exists: np.ndarray | None = None


def _stand(
    part: Part,
    pieces: Sequence[_Piece],
    shapes: Sequence[Shape],
    given: Sequence[Seen],
    places: Sequence[Place],
    batch: Batch,
) -> None:
    """Which rows of each call exist: by a mask along its own rows, else along all calls."""
    calls = []
    for shape, found, place, piece in zip(shapes, given, places, pieces, strict=True):
        lookup = table(shape.kind) is not None
        calls.append(Rows.of(piece.g, shape.masks, batch.examples, found.rows, place, lookup))
        calls[-1].lay(batch.masks)
    for mask in lay(calls, batch.masks):
        batch.unseen[part.name] = mask
    batch.alive[part.name] = alive(calls)
    for piece, call in zip(pieces, calls, strict=True):
        piece.exists = call.existing(batch.present)


def _piece(part: Part, shape: Shape, found: Seen, place: Place, examples: int) -> _Piece:
    rows = len(found.rows)
    g = place.put(found.g, 2, rows, examples)
    a = found.a
    if isinstance(a, kf.Patches):
        whole = place.axis == 0 and not place.inner and found.rows[0] == examples
        if not whole:
            unfolded = np.asarray(a.unfold())
            unfolded = unfolded.reshape(unfolded.shape[0], *found.rows, unfolded.shape[-1])
            a = place.put(unfolded, 1, rows, examples)
        return _Piece(a, g, shape.turned)
    looked = looked_up(shape.kind)
    if looked:
        index = place.put(a[..., None], 0, rows, examples)[..., 0]
        if part.lookup:
            return _Piece(kf.Ids(index, looked.size), g)
        hot = np.zeros((1, *index.shape, looked.size), g.dtype)
        np.put_along_axis(hot, index[None, ..., None], 1, axis=-1)
        return _Piece(hot, g, shape.turned)
    return _Piece(place.put(a, 1, rows, examples), g, shape.turned)


def _met(pieces: list[_Piece]) -> None:
    """Uses of a table both ways: rows of turned ones change sides, and each row is scaled by itself alone to an input
    of length 1, so that A has trace 1 and G the trace of all rows, and micro-batches and ranks add."""
    for piece in pieces:
        _turn(piece) if piece.turned else _apart(piece)
        length = np.linalg.norm(piece.a, axis=-1, keepdims=True)
        piece.a = piece.a / np.where(length > 0, length, 1.0)
        piece.g = piece.g * length


def _stacked(piece: _Piece) -> _Piece:
    """One draw of draws times as many examples."""
    draws, blocks, examples, positions, d = piece.g.shape
    a = _unfolded(piece.a)
    g = np.moveaxis(piece.g, 0, 1).reshape(1, blocks, draws * examples, positions, d)
    exists = None if piece.exists is None else np.tile(piece.exists, (draws, 1))
    return _Piece(np.tile(a, (1, draws, 1, 1)), g, piece.turned, exists)


def _turn(piece: _Piece) -> None:
    """Output gradients become inputs and the other way: each draw has positions of its own, as inputs have no draws."""
    inputs = _unfolded(piece.a)
    draws, blocks, examples, positions, _ = piece.g.shape
    piece.a = np.moveaxis(piece.g, 0, 2).reshape(blocks, examples, draws * positions, piece.g.shape[-1])
    piece.g = _by_draw(np.broadcast_to(inputs, (draws, *inputs.shape)))
    if piece.exists is not None:
        piece.exists = np.tile(piece.exists, (1, draws))


def _apart(piece: _Piece) -> None:
    """Positions of each draw's own for rows that have not changed sides: as often as those that have."""
    draws = len(piece.g)
    piece.a = np.tile(_unfolded(piece.a), (1, 1, draws, 1))
    piece.g = _by_draw(piece.g)
    if piece.exists is not None:
        piece.exists = np.tile(piece.exists, (1, draws))


def _by_draw(rows: np.ndarray) -> np.ndarray:
    """(draws, blocks, examples, positions, d) at positions (draws, positions) that are zero in other draws."""
    draws, blocks, examples, positions, d = rows.shape
    g = np.zeros((draws, blocks, examples, draws, positions, d), rows.dtype)
    for draw in range(draws):
        g[draw, :, :, draw] = rows[draw]
    return g.reshape(draws, blocks, examples, draws * positions, d)


def _unfolded(a: Any) -> np.ndarray:
    return np.asarray(a.unfold() if isinstance(a, kf.Patches) else a)


def _joined(part: Part, pieces: list[_Piece], n: float) -> kf.Record:
    """Calls behind each other on the axis of positions."""
    exists = None
    if any(piece.exists is not None for piece in pieces):
        every = [np.ones(piece.g.shape[2:4], bool) if piece.exists is None else piece.exists for piece in pieces]
        exists = np.concatenate(every, axis=1)
    if len(pieces) == 1:
        return kf.Record(pieces[0].a, pieces[0].g, n, exists)
    g = np.concatenate([piece.g for piece in pieces], axis=3)
    if part.lookup:
        index = np.concatenate([piece.a.index for piece in pieces], axis=1)
        return kf.Record(kf.Ids(index, pieces[0].a.size), g, n, exists)
    a = [_unfolded(piece.a) for piece in pieces]
    return kf.Record(np.concatenate(a, axis=2), g, n, exists)
