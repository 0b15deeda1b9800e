"""Whether a method sees the same in rows however they are dealt to examples; then rows that mix examples may stand as
their shape suggests, which is cheaper, and else they must stand together."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

import kfaccore as kf


def stands_together(core: kf.Preconditioner, blocks: dict[str, kf.Block], name: str) -> bool:
    """Whether rows of a layer that mix examples have to be positions of one example for its statistics to be right.

    A rule that judges steps by examples is given rows an example all the same, and a network-level method too: these
    are biased there, and marked.
    """
    return not _needs_examples(core, blocks, name) and not _indifferent(core.assigned.of(name))


def dealt_anyhow(core: kf.Preconditioner, blocks: dict[str, kf.Block], name: str) -> bool:
    """Whether nothing but a method that sees the same in rows however they are dealt is given those of a layer."""
    return not _needs_examples(core, blocks, name) and _indifferent(core.assigned.of(name))


def _needs_examples(core: kf.Preconditioner, blocks: dict[str, kf.Block], name: str) -> bool:
    return core.rule.needs_records or name in core.assigned.together(blocks)


@cache
def _indifferent(method: Any) -> bool:
    """Asked of the method: statistics of two examples of three rows, and of the same rows as one example of six."""
    rng = np.random.default_rng(0)
    a: Any = rng.standard_normal((1, 2, 3, 2))
    g: Any = rng.standard_normal((1, 1, 2, 3, 2))
    apart = kf.Record(a, g, 2.0)
    together = kf.Record(a.reshape(1, 1, 6, 2), g.reshape(1, 1, 1, 6, 2), 2.0)
    state = method.init(kf.Block(2, 2, rows=8, samples=8), np.zeros(1))
    hyper = kf.Hyper(0, 0.9, 1e-3)
    try:
        found = [kf.flatten(method.measure(state, record, hyper)) for record in (apart, together)]
    except (ValueError, TypeError):  # it wants terms, or to know which examples these are
        return False
    if {name: x.shape for name, x in found[0].items()} != {name: x.shape for name, x in found[1].items()}:
        return False
    return all(np.allclose(x, found[1][name], rtol=1e-9, atol=1e-12) for name, x in found[0].items())
