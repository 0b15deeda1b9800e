"""Work on matrices that many callers need at once, done in one call for all matrices of one size.

A caller is a generator: it yields the `Ask`s it has, is sent their answers, and returns what it made of them. `alone`
runs one; `lockstep` many side by side, so that what they ask in the same round is answered together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from kfaccore.xp.arrays import Array, device_of, is_numpy, is_tracer, namespace
from kfaccore.xp.blocks import together
from kfaccore.xp.chunks import spans
from kfaccore.xp.widths import widths

BUDGET = 512 << 20  # bytes of the matrices that are worked on in one call

R = TypeVar("R")
Answer = tuple[Array, ...]


@dataclass(frozen=True, eq=False)
class Ask:
    """operation(*arrays): a tuple of arrays. All have a blocks axis first, and each block's answer is its own.

    grown   of an operation on matrices (blocks, d, d) that may stand in the corner of wider ones: the arrays for these,
            whose answer has the one for `arrays` in its corners
    """

    operation: Callable[..., Answer]
    arrays: tuple[Array, ...]
    grown: Callable[[tuple[Array, ...], int], tuple[Array, ...]] | None = None

    @property
    def blocks(self) -> int:
        """How many matrices."""
        return self.arrays[0].shape[0]

    @property
    def bytes(self) -> int:
        """Of the first array, the matrices themselves."""
        first = self.arrays[0]
        return prod(first.shape) * namespace(first).finfo(first.dtype).bits // 8


Asks = Generator[tuple[Ask, ...], list[Answer], R]


def alone(caller: Asks[R]) -> R:
    """What one caller returns."""
    try:
        asks = next(caller)
        while True:
            asks = caller.send(answered(asks))
    except StopIteration as end:
        return end.value


def lockstep(callers: Sequence[Asks[R]]) -> Asks[list[R]]:
    """What all of them return, in their order; itself a caller, whose rounds are those of the longest."""
    found: dict[int, R] = {}
    waiting: dict[int, tuple[Ask, ...]] = {}

    def advance(place: int, answers: list[Answer] | None) -> None:
        try:
            waiting[place] = callers[place].send(answers)  # type: ignore[arg-type]  # None starts it
        except StopIteration as end:
            found[place] = end.value

    for place in range(len(callers)):
        advance(place, None)
    while waiting:
        rounds = dict(waiting)
        waiting.clear()
        answers = yield tuple(ask for asks in rounds.values() for ask in asks)
        given = iter(answers)
        for place, asks in rounds.items():
            advance(place, [next(given) for _ in asks])
    return [found[place] for place in range(len(callers))]


def answered(asks: Sequence[Ask]) -> list[Answer]:
    """The answer of each: one call for those of one operation and size, in pieces of at most `BUDGET` bytes.

    NumPy's are called one by one, as LAPACK takes a matrix at a time and a copy is all that joining would add. What is
    traced is compiled size by size: there matrices that are cheap beside others stand in the corner of wider ones.
    """
    wider = widths([(ask.arrays[0].shape[0], ask.arrays[0].shape[-1]) for ask in asks if _grows(ask)])
    if any(size != width for size, width in wider.items()):
        found = answered([_at_width(ask, wider) for ask in asks])
        return [_corner(answer, ask) for answer, ask in zip(found, asks, strict=True)]
    kinds: dict[object, list[int]] = {}
    for place, ask in enumerate(asks):
        kinds.setdefault(_kind(ask, place), []).append(place)
    found: list[Answer] = [()] * len(asks)
    for places in kinds.values():
        for piece in _pieces(asks, places):
            answers = _at_once([asks[place] for place in piece])
            for place, answer in zip(piece, answers, strict=True):
                found[place] = answer
    return found


def _grows(ask: Ask) -> bool:
    """Whether its matrices may be worked on at a wider size."""
    first = ask.arrays[0]
    return ask.grown is not None and is_tracer(first) and first.ndim == 3 and first.shape[-1] > 1


def _at_width(ask: Ask, wider: Mapping[int, int]) -> Ask:
    """The same at the size it is worked on."""
    width = wider.get(ask.arrays[0].shape[-1], 0) if _grows(ask) else 0
    if ask.grown is None or width in (0, ask.arrays[0].shape[-1]):
        return Ask(ask.operation, ask.arrays)
    return Ask(ask.operation, ask.grown(ask.arrays, width))


def _corner(answer: Answer, ask: Ask) -> Answer:
    """The answer at an ask's own size."""
    d = ask.arrays[0].shape[-1]
    return tuple(x[:, :d, :d] if x.ndim == 3 and x.shape[-1] > d else x for x in answer)


def _kind(ask: Ask, place: int) -> object:
    """What asks have in common that can be answered in one call."""
    if is_numpy(ask.arrays[0]):
        return place
    outlines = tuple((tuple(x.shape[1:]), x.dtype, str(device_of(x))) for x in ask.arrays)
    return ask.operation, outlines


def _pieces(asks: Sequence[Ask], places: Sequence[int]) -> Iterator[list[int]]:
    """Places in their order, as many at a time as the budget holds, or one."""
    piece: list[int] = []
    held = 0
    for place in places:
        size = asks[place].bytes
        if piece and held + size > BUDGET:
            yield piece
            piece = []
            held = 0
        piece.append(place)
        held += size
    yield piece


def _at_once(asks: Sequence[Ask]) -> list[Answer]:
    """The answers of asks of one kind from one call; of one that is over the budget from several."""
    first = asks[0]
    if len(asks) == 1:
        return [_in_parts(first)]
    whole = first.operation(*(together(column) for column in zip(*(ask.arrays for ask in asks), strict=True)))
    answers = []
    start = 0
    for ask in asks:
        end = start + ask.blocks
        answers.append(tuple(x[start:end, ...] for x in whole))
        start = end
    return answers


def _in_parts(ask: Ask) -> Answer:
    """One ask's answer, some of its blocks at a time where all are over the budget."""
    each = max(1, ask.blocks * BUDGET // max(1, ask.bytes))
    if each >= ask.blocks or is_numpy(ask.arrays[0]):
        return ask.operation(*ask.arrays)
    parts = [ask.operation(*(x[part, ...] for x in ask.arrays)) for part in spans(ask.blocks, each)]
    return tuple(together(column) for column in zip(*parts, strict=True))
