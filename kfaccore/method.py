"""The one page to read before writing a method: what it must offer, and what it may.

A method is a frozen dataclass of numbers and functions; its State is a frozen dataclass of arrays. A layer gives a
record; the method measures it, updates its state, refreshes its factors, and solves. Nothing here raises on data:
failure is a `Code`, one a block.

What a method may offer is a capability: a Protocol below, a line of `CAPABILITIES` that says who asks for it, and
`declares(method, Capability)` where it is asked. Nothing else about a method is ever looked up.
"""

from __future__ import annotations

from dataclasses import Field, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from kfaccore import tree
from kfaccore.block import Block, Hyper
from kfaccore.declared import declares, names
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array
from kfaccore.xp.asking import Asks

if TYPE_CHECKING:
    from kfaccore.linalg.side import Side

__all__ = ["CAPABILITIES", "Block", "Hyper", "Method", "State", "Stats", "declares", "names"]


class State(Protocol):
    """A frozen dataclass of arrays, the same tree and shapes from `init` on; `code` (blocks,) is the last refresh's."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def code(self) -> Array: ...


@runtime_checkable
class Stats(Protocol):
    """A frozen dataclass of sums and their denominators; `bad` (blocks,) counts the non-finite records in them or,
    as a bool, says whether there are any."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def bad(self) -> Array: ...


S = TypeVar("S", bound=State)
T = TypeVar("T", bound=Stats)
R = TypeVar("R", bound=State, contravariant=True)  # a state that is only read
M = TypeVar("M", bound=Stats, covariant=True)  # Stats that are only made


class Method(Protocol[S, T]):
    """What every method offers, and on which clock the preconditioner calls it."""

    cycles: ClassVar[int]  # measure-update-refresh rounds on one record until the last refresh is settled

    def init(self, block: Block, like: Array) -> S:
        """Once: the whole tree, in the namespace, dtype and device of `like`; leaf shapes never change again."""
        ...

    def measure(self, state: S, record: Any, hyper: Hyper) -> T:
        """Update clock: sums and their own denominators of one Record; of a tuple of them for a method of `Terms`."""
        ...

    def combine(self, first: T, second: T) -> T:
        """Update clock: Stats of two micro-batches or ranks as one."""
        ...

    def update(self, state: S, stats: T, hyper: Hyper, donate: bool = False) -> S:
        """Update clock: move the averages; non-finite Stats change nothing. `donate` may reuse `state`'s buffers."""
        ...

    def refresh(self, state: S, hyper: Hyper) -> S:
        """Refresh clock: inverses from averages; writes `code` into the state."""
        ...

    def solve(self, state: S, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        """Every step: the direction of one gradient."""
        ...

    def matvec(self, state: S, v: Array, hyper: Hyper) -> Array:
        """The method's own F~ applied to v (blocks, d_out, d_in), undamped."""
        ...


class RowsAtSolve(Protocol):
    """`solve` is given the newest record of its layer, at every step whatever the clocks say."""

    rows_at_solve: ClassVar[bool]


class OwnGradients(Protocol):
    """`measure` takes the gradients of the training loss itself, never those of sampled labels."""

    own_gradients: ClassVar[bool]


class Unmeasured(Protocol):
    """The method needs no records: its state does not depend on data."""

    unmeasured: ClassVar[bool]


class Resting(Protocol[R]):
    """Coefficients of per-example gradients that are shared between epochs."""

    def rests(self, hyper: Hyper) -> bool | Array:
        """Whether a step needs no record, its gradient being made of output gradients that went through `weighted`."""
        ...

    def weighted(self, state: R, g: Array, hyper: Hyper, ids: Array | None = None) -> Array:
        """g (batch, [positions,] d_out) as the weight gradient shall see it; ids (batch,) are dataset positions."""
        ...


class LinearSides(Protocol):
    """Memory and work are linear in a side's width, so that no side needs to become diagonal however wide it is."""

    linear_sides: bool


class Terms(Protocol):
    """`measure` takes a tuple of `terms` records, one a term of the loss with its own n."""

    terms: int


class KroneckerTerms(Protocol[R]):
    """F~ is a sum of Kronecker products."""

    def kronecker_terms(self, state: R, block: Block) -> tuple[tuple[Array, Array], ...]:
        """Pairs (A, G), a factor (blocks, d, d) or (blocks, d) if diagonal, of F~ = sum of G (x) A; none where a
        state without matrices has a side too wide for one."""
        ...


class Inverses(Protocol[R]):
    """A solve is G^-1 V A^-1."""

    def inverses(self, state: R, hyper: Hyper) -> tuple[Array, Array] | None:
        """((A + d_a I)^-1, (G + d_g I)^-1), shaped like the factors; None where these options solve otherwise."""
        ...


class InverseSides(Protocol[R]):
    """A solve is G^-1 V A^-1, and its inverses are never matrices."""

    def inverse_sides(self, state: R, hyper: Hyper) -> tuple[Side, Side]:
        """As `inverses`, by their products with rows (`linalg.side.Unformed`); (blocks, d) of a diagonal side."""
        ...


class Eigensystem(Protocol[R]):
    """F~ + damping I is diagonal in a Kronecker basis."""

    def eigensystem(self, state: R, hyper: Hyper) -> tuple[Array, Array, Array] | None:
        """(Qa, Qg, values) of a solve Qg [(Qg^T V Qa) / values] Qa^T: values (blocks, d_out, d_in) with the damping of
        `hyper` in them, so that with damping 0 they are F~'s own. A basis (blocks, d) of ones is the standard one; None
        where these options solve otherwise."""
        ...


class Matrix(Protocol[R]):
    """The dense block is kept."""

    def matrix(self, state: R, block: Block) -> Array:
        """F~ (blocks, D, D) for row-major vec, D = d_out d_in."""
        ...


class MovesWithBasis(Protocol):
    """What `measure` takes lives in the basis of the last refresh, so that data must be seen once more after it."""

    moves_with_basis: ClassVar[bool]


class Halves(Protocol[R, M]):
    """What a refresh reads and what is taken in its basis can be measured apart: for one pass over all data each."""

    def basis_stats(self, state: R, record: Record, hyper: Hyper) -> M:
        """As `measure` for all that a refresh reads; an update with it tells nothing else."""
        ...

    def moment_stats(self, state: R, record: Record, hyper: Hyper) -> M:
        """As `measure` for what lives in the basis; of all else the Stats say what the state says already."""
        ...


class Restless(Protocol):
    """Even without memory (decay 0) one more update on the same record after a refresh moves the state."""

    restless: ClassVar[bool]


class Unit(Protocol[R]):
    """Damping is in units of the block's own curvature."""

    def unit(self, state: R) -> float | Array:
        """What damping 1 adds to the eigenvalues in use, a number or (blocks,)."""
        ...


class Refreshing(Protocol[S]):
    """A refresh that hands its matrices out: those of one size, of all layers, are worked on in one call."""

    in_steps: ClassVar[bool]

    def refreshing(self, state: S, hyper: Hyper) -> Asks[S]:
        """`refresh` as a generator: it yields `Ask`s, is sent their answers, and returns the state."""
        ...


CAPABILITIES: dict[type, str] = {  # capability: who asks for it
    RowsAtSolve: "precondition",
    OwnGradients: "every shell; the command line",
    Unmeasured: "precondition",
    Resting: "precondition",
    LinearSides: "precondition",
    Terms: "precondition; the command line",
    KroneckerTerms: "posterior, analysis, TwoLevel",
    Inverses: "TwoLevel, own shares",
    InverseSides: "TwoLevel, own shares; before Inverses",
    Eigensystem: "posterior, TwoLevel",
    Matrix: "posterior, analysis",
    MovesWithBasis: "posterior, analysis",
    Halves: "posterior",
    Restless: "analysis",
    Unit: "SharedDamping",
    Refreshing: "precondition; TwoLevel, SharedDamping",
}


@dataclass(frozen=True)
class Additive:
    """Base of methods whose Stats are sums."""

    def combine(self, first: T, second: T) -> T:
        """Leafwise sum."""
        return tree.add(first, second)


def inverse_sides(method: object, state: State, hyper: Hyper) -> tuple[Side, Side] | None:
    """(A^-1, G^-1) of a solve G^-1 V A^-1, unformed where the method can; None where it solves otherwise."""
    if declares(method, InverseSides):
        return method.inverse_sides(state, hyper)
    return method.inverses(state, hyper) if declares(method, Inverses) else None
