"""K-FAC: F ~ G (x) A, so x = (G + d_g I)^-1 V (A + d_a I)^-1.

A = mean over rows of a a^T and G = (1/n) sum of g g^T are exponential moving averages that start at zero and are
divided by their weight; `sharing` (expand or reduce) turns shared positions into rows.

Exact when the layer sees one example (any net and loss), and for type-2 or Monte-Carlo draws in deep linear nets with
squared error, with the sharing that fits the setting.
Source: Martens & Grosse 2015 (1503.05671); Eschenhagen et al. 2023 (2311.00636).
Cost: update rows (d_in^2 + d_out^2); refresh d_in^3 + d_out^3; memory 2 (d_in^2 + d_out^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore.damping import Split, pi
from kfaccore.linalg.inverse import Inverse, Parts, accepted, cholesky
from kfaccore.method import Block, Hyper
from kfaccore.methods.kronecker.product import Product
from kfaccore.record import Record
from kfaccore.record.sharing import expand
from kfaccore.xp.arrays import Array
from kfaccore.xp.asking import Asks


@dataclass(frozen=True)
class State:
    """Averages A (blocks, d_in, d_in) and G, or (blocks, d) of a diagonal side, times their `weight` (blocks,); what
    `inverse` made of them at the last refresh; code (blocks,)."""

    A: Array
    G: Array
    weight: Array
    inverse: Parts
    code: Array


@dataclass(frozen=True)
class KFAC(Product[State]):
    """K-FAC: x = (G + d_g I)^-1 V (A + d_a I)^-1, A the mean of a a^T over rows, G = (1/n) sum over rows of g g^T.

    V and x are (blocks, d_out, d_in), A (blocks, d_in, d_in), G (blocks, d_out, d_out); `split` makes d_a and d_g of
    the damping. Exact for one example, and in deep linear nets with squared error. ValueError for a split that the
    inverse cannot use. Martens & Grosse 2015, arxiv.org/abs/1503.05671; sharing: arxiv.org/abs/2311.00636.

    >>> import numpy as np
    >>> a, g = np.eye(2), np.eye(2)
    >>> kf.direction(kf.Record(a, g, n=2), np.ones((2, 2)), KFAC(split=kf.per_factor), damping=0.5)
    array([[1., 1.],
           [1., 1.]])

    sharing   expand | reduce | any function from record to record
    inverse   cholesky (separable splits, damping baked at refresh) | eigh (every split, newest damping)
    split     pi | equal | per_factor | exact | Relative(...)
    """

    sharing: Callable[[Record], Record] = expand
    inverse: Inverse = cholesky
    split: Split = pi
    cycles: ClassVar[int] = 1

    def init(self, block: Block, like: Array) -> State:
        fields = factors.init(block, like)
        return State(**fields, inverse=self.inverse.init(fields["A"], fields["G"]))

    def measure(self, state: State, record: Record, hyper: Hyper) -> factors.Sums:
        return factors.sums(record, self.sharing, state)

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        A, G = self.product(state)
        new, code = yield from self.inverse.refreshing(A, G, self.split, hyper.damping)
        inverse, code = accepted(new, code, state.inverse, state.code, state.weight)
        return replace(state, inverse=inverse, code=code)
