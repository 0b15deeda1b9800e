"""J of one block of a layer, a row an example and draw, on the host: products with it, and J J^T.

Inputs come some columns at a time in float64, whatever they are kept in, and a convolution's are never unfolded: a
kernel position is a slice of the image. Nothing of the size of J exists, but where it is at most `held` numbers and an
example has more positions than draws: there it is made once, and a product costs 2 K d_in d_out.
Cost: a product 2 K S d_in d_out for K = draws batch rows and S positions; J J^T K (K + S) d_in d_out,
K^2 (d_in + d_out) without shared positions, for ids the sum over them of (their rows)^2 d_out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from kfaccore.convolution.patches import Patches
from kfaccore.convolution.window import offsets
from kfaccore.record import Ids, Record
from kfaccore.xp.arrays import to_host
from kfaccore.xp.chunks import HELD, at_once, spans

Columns = tuple[slice, np.ndarray]  # which, and they: (batch, shared, columns)


class Rows:
    """J of a host record of one block; g (draws, batch, shared, d_out) is zero where a position does not exist."""

    def __init__(self, record: Record, held: int = HELD) -> None:
        self.record = record
        self.g = to_host(record.g)[:, 0].astype(np.float64, copy=False)
        self.draws, self.batch, self.shared, self.d_out = self.g.shape
        self.count = self.draws * self.batch
        # one position, or ids: products without J cost no more
        many = self.shared > self.draws and not isinstance(record.a, Ids)
        self.held = many and self.count * self.d_out * record.d_in <= held

    @cached_property
    def J(self) -> np.ndarray:
        """(K, d_out d_in), rows ordered by draw, then example; only where `held`."""
        J = np.empty((self.draws, self.batch, self.d_out, self.record.d_in))
        for span, columns in self._columns():
            J[..., span] = self.g.mT @ columns
        return J.reshape(self.count, -1)

    def image(self, v: np.ndarray) -> np.ndarray:
        """J v, (draws, batch), for v (d_out, d_in)."""
        if self.held:
            return (self.J @ v.reshape(-1)).reshape(self.draws, self.batch)
        a = self.record.a
        if isinstance(a, Ids):
            z = v.T[to_host(a.index)]
        else:
            z = np.zeros((self.batch, self.shared, self.d_out))
            for span, columns in self._columns():
                z += columns @ v[:, span].T
        return np.einsum("vbso,bso->vb", self.g, z)

    def pulled(self, w: np.ndarray) -> np.ndarray:
        """J^T w, (d_out, d_in), for w (draws, batch)."""
        if self.held:
            return (w.reshape(-1) @ self.J).reshape(self.d_out, -1)
        g = np.einsum("vbso,vb->bso", self.g, w).reshape(-1, self.d_out)
        found = np.zeros((self.d_out, self.record.d_in))
        a = self.record.a
        if isinstance(a, Ids):
            np.add.at(found.T, to_host(a.index).ravel(), g)
            return found
        for span, columns in self._columns():
            found[:, span] = g.T @ columns.reshape(-1, columns.shape[-1])
        return found

    def gram(self) -> np.ndarray:
        """J J^T, (K, K), rows ordered by draw, then example."""
        if self.held:
            return self.J @ self.J.T
        if isinstance(self.record.a, Ids):
            return self._gram_of_ids(to_host(self.record.a.index))
        K = self.count
        if self.shared == 1:
            inner = sum((columns[:, 0] @ columns[:, 0].T for _, columns in self._columns()), np.zeros(()))
            g = self.g.reshape(K, -1)
            return np.tile(inner, (self.draws, self.draws)) * (g @ g.T)
        gram = np.zeros((K, K))
        for _, columns in self._columns():
            # as many outputs at once as keep this part of J bounded
            for outputs in spans(self.d_out, at_once(K * columns.shape[-1])):
                J = self.g[..., outputs].mT @ columns
                J = J.reshape(K, -1)
                gram += J @ J.T
        return gram

    def _columns(self) -> Iterator[Columns]:
        """The inputs (batch, shared, some columns)."""
        a = self.record.a
        if isinstance(a, Patches):
            yield from self._of_patches(a)
            return
        for span in spans(a.shape[-1], at_once(self.batch * self.shared)):
            yield span, to_host(a[0, :, :, span]).astype(np.float64)

    def _of_patches(self, a: Patches) -> Iterator[Columns]:
        at = 0
        for part in offsets(a.image, a.window):
            columns = to_host(part)[0].reshape(self.batch, self.shared, -1).astype(np.float64)
            yield slice(at, at + columns.shape[-1]), columns
            at += columns.shape[-1]
        if a.bias:
            yield slice(at, at + 1), np.ones((self.batch, self.shared, 1))

    def _gram_of_ids(self, index: np.ndarray) -> np.ndarray:
        """Rows of the table meet where two examples have one id: a small product an id."""
        examples = np.arange(self.batch)[:, None]
        pairs, place = np.unique((index * self.batch + examples).ravel(), return_inverse=True)
        J = np.zeros((self.draws, len(pairs), self.d_out))  # of each (id, example) that occurs
        for draw in range(self.draws):
            np.add.at(J[draw], place.ravel(), self.g[draw].reshape(-1, self.d_out))
        gram = np.zeros((self.count, self.count))
        starts = np.unique(pairs // self.batch, return_index=True)[1]
        for start, end in zip(starts, [*starts[1:], len(pairs)], strict=True):
            rows = pairs[start:end] % self.batch + self.batch * np.arange(self.draws)[:, None]
            part = J[:, start:end].reshape(-1, self.d_out)
            gram[np.ix_(rows.ravel(), rows.ravel())] += part @ part.T
        return gram
