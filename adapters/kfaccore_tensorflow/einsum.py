"""EinsumDense: which letters are batch, shared, inputs, outputs and blocks, and the transposes that follow.

A letter in all three terms is a block, in input and output shared, in input and kernel contracted (d_in), in kernel and
output d_out. The first letter of the input is the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from string import ascii_letters

import numpy as np

from kfaccore import Block


def spelled(equation: str, rank: int) -> tuple[str, str, str]:
    """Terms (input, kernel, output) of an equation for inputs of `rank` axes, the ellipsis written as letters.

    Raises ValueError for equations that are not one matrix a block.
    """
    equation = equation.replace(" ", "")
    terms, output = equation.split("->")
    x, kernel = terms.split(",")
    free = [letter for letter in ascii_letters if letter not in equation]
    extra = "".join(free[: rank - len(x.replace("...", ""))])
    x = x.replace("...", extra)
    output = output.replace("...", extra)
    reason = None
    if any(len(set(term)) != len(term) for term in (x, kernel, output)):
        reason = "an axis is repeated"
    elif x[0] in kernel or x[0] not in output:
        reason = "the batch axis is contracted"
    elif set(x) - set(kernel) - set(output):
        reason = "an axis of the input is summed without a weight"
    if reason:
        raise ValueError(f"in the equation {equation!r} {reason}")
    return x, kernel, output


@dataclass(frozen=True)
class Einsum:
    """terms (input, kernel, output); sizes of the kernel's letters; whether the bias spans all of blocks and d_out."""

    terms: tuple[str, str, str]
    sizes: tuple[int, ...]
    bias: bool

    @property
    def letters(self) -> tuple[str, str, str, str]:
        """(blocks, shared, inputs, outputs)."""
        x, kernel, output = self.terms
        return (
            "".join(c for c in output if c in x and c in kernel),
            "".join(c for c in x[1:] if c in output and c not in kernel),
            "".join(c for c in x if c in kernel and c not in output),
            "".join(c for c in output if c in kernel and c not in x),
        )

    def block(self) -> Block:
        """d_out, d_in with the bias column, blocks."""
        blocks, _, inputs, outputs = self.letters
        return Block(self._size(outputs), self._size(inputs) + self.bias, self._size(blocks))

    def rows(self, x: np.ndarray, gy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input and output gradients, draws first -> a (blocks, batch, shared, d_in) and g alike, draws first."""
        blocks, shared, inputs, outputs = self.letters
        lead = blocks + self.terms[0][0] + shared
        a = _ordered(x, self.terms[0], lead + inputs)
        a = a.reshape(self._size(blocks), x.shape[0], -1, self._size(inputs))
        g = _ordered(gy, "*" + self.terms[2], "*" + lead + outputs)
        g = g.reshape(len(gy), *a.shape[:3], self._size(outputs))
        return np.concatenate([a, np.ones_like(a[..., :1])], axis=-1) if self.bias else a, g

    def matrix(self, named: dict[str, np.ndarray]) -> np.ndarray:
        """{"weight", "bias"} -> (blocks, d_out, d_in)."""
        blocks, _, inputs, outputs = self.letters
        block = self.block()
        w = _ordered(named["weight"], self.terms[1], blocks + outputs + inputs)
        w = w.reshape(block.blocks, block.d_out, -1)
        if not self.bias:
            return w
        kept = self._kept()
        bias = named["bias"].reshape([self._size(c) for c in kept])
        return np.concatenate([w, _ordered(bias, kept, blocks + outputs).reshape(*w.shape[:2], 1)], axis=-1)

    def parameters(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `matrix`; the bias comes back with the axes that have a size."""
        blocks, _, inputs, outputs = self.letters
        order = blocks + outputs + inputs
        w = matrix[..., : matrix.shape[-1] - self.bias].reshape([self._size(c) for c in order])
        named = {"weight": _ordered(w, order, self.terms[1])}
        if self.bias:
            bias = matrix[..., -1].reshape([self._size(c) for c in blocks + outputs])
            named["bias"] = _ordered(bias, blocks + outputs, self._kept())
        return named

    def _kept(self) -> str:
        """Letters of a full bias in the order of the output."""
        return "".join(c for c in self.terms[2] if c in self.terms[1])

    def _size(self, letters: str) -> int:
        sizes = dict(zip(self.terms[1], self.sizes, strict=True))
        return prod(sizes[letter] for letter in letters)


def _ordered(x: np.ndarray, have: str, want: str) -> np.ndarray:
    return np.transpose(x, [have.index(letter) for letter in want])
