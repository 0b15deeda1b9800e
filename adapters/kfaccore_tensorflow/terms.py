"""Products of a tensor and a weight as terms of letters: which axes are rows, inputs, outputs and blocks.

A letter in all three terms is a block, in input and output a row, in input and weight contracted (d_in), in weight and
output d_out; the input is summed first over a letter that stands nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters

import numpy as np

from kfaccore_tensorflow.layout import Layout, Matrix


@dataclass(frozen=True)
class Terms:
    """x, weight -> out, one letter an axis."""

    x: str
    weight: str
    out: str

    @property
    def blocks(self) -> str:
        """Letters of all three: a matrix each."""
        return "".join(c for c in self.out if c in self.x and c in self.weight)

    @property
    def rows(self) -> str:
        return "".join(c for c in self.out if c in self.x and c not in self.weight)

    @property
    def ins(self) -> str:
        """Letters that are summed."""
        return "".join(c for c in self.x if c in self.weight and c not in self.out)

    @property
    def outs(self) -> str:
        """Letters of weight and output alone."""
        return "".join(c for c in self.out if c in self.weight and c not in self.x)

    def refusal(self) -> str | None:
        """Why this is not one matrix a block, if it is not."""
        if any(len(set(term)) != len(term) for term in (self.x, self.weight, self.out)):
            return "repeats an axis"
        if not self.rows:
            return "contracts the batch axis"
        if set(self.weight) - set(self.x) - set(self.out):
            return "sums the weight over an axis"
        return None

    def matrix(self, layout: Layout) -> Matrix:
        """Of the weight's layout, its axes in the order of its letters."""
        groups = ([self.weight.index(c) for c in group] for group in (self.blocks, self.outs, self.ins))
        return Matrix.split(layout, *groups)

    def arrays(self, x: np.ndarray, gy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a (blocks, *rows, d_in) and g (draws, blocks, *rows, d_out) from the input and the output's gradients."""
        lone = tuple(i for i, c in enumerate(self.x) if c not in self.weight and c not in self.out)
        kept = "".join(c for c in self.x if c in self.weight or c in self.out)
        lead = self.blocks + self.rows
        a = _ordered(x.sum(axis=lone), kept, lead + self.ins)
        g = _ordered(gy, "*" + self.out, "*" + lead + self.outs)
        many = len(self.blocks)
        rows = a.shape[many : many + len(self.rows)]
        blocks = int(np.prod(a.shape[:many]))
        d_in = int(np.prod(a.shape[len(lead) :]))
        d_out = int(np.prod(g.shape[1 + len(lead) :]))
        return a.reshape(blocks, *rows, d_in), g.reshape(len(g), blocks, *rows, d_out)


def einsum_terms(equation: str, ranks: tuple[int, int], weight: int) -> Terms:
    """Of an equation of two operands, its ellipses written out; `weight` is the place of the weight."""
    operands, out = equation.replace(" ", "").split("->")
    terms = operands.split(",")
    free = [c for c in ascii_letters if c not in equation]
    spelled = []
    widest = max(rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True))
    for term, rank in zip(terms, ranks, strict=True):
        extra = rank - len(term.replace("...", ""))
        spelled.append(term.replace("...", "".join(free[widest - extra : widest])))
    return Terms(spelled[1 - weight], spelled[weight], out.replace("...", "".join(free[:widest])))


def matmul_terms(ranks: tuple[int, int], turned: tuple[bool, bool], weight: int) -> Terms:
    """Of a (batched) matrix product whose operands may be transposed; leading axes meet from the right."""
    lead = [ascii_letters[26 + i] for i in range(max(ranks) - 2)]  # capitals
    first = ["".join(lead[len(lead) - (rank - 2) :]) for rank in ranks]
    left = first[0] + ("ji" if turned[0] else "ij")
    right = first[1] + ("kj" if turned[1] else "jk")
    pair = (left, right)
    return Terms(pair[1 - weight], pair[weight], "".join(lead) + "ik")


def _ordered(x: np.ndarray, have: str, want: str) -> np.ndarray:
    return np.transpose(x, [have.index(c) for c in want])
