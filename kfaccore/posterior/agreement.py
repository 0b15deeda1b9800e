"""How scores compare with each other, and with what retraining says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kfaccore.xp.arrays import Array, namespace, to_host


def cosine(scores: Array, self_q: Array, self_t: Array) -> Array:
    """scores over the roots of both self-influences, in [-1, 1]: the cosine in L^-1, which long gradients do not lead.

    scores (Q, T); self_q (Q,) and self_t (T,) are `P.covariance(records, diagonal=True)[:, 0]`. Zero where one is zero.
    """
    for x in (scores, self_q, self_t):
        namespace(x)  # TypeError for what is no array
    if tuple(scores.shape) != (*self_q.shape, *self_t.shape) or scores.ndim != 2:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, self-influences {tuple(self_q.shape)} and {tuple(self_t.shape)}"
            f"; need (Q, T), (Q,) and (T,)"
        )
    xp = namespace(scores)
    length = xp.sqrt(self_q[:, None] * self_t[None, :])
    return xp.where(length > 0, scores / xp.where(length > 0, length, xp.ones_like(length)), xp.zeros_like(scores))


def lds(scores: Array, subsets: Array | Sequence[Sequence[int]], outcomes: Array) -> float:
    """Linear datamodelling score: the mean over queries of the Spearman correlation of what `scores` predict of models
    trained on subsets with what those models give.

    scores     (Q, T), positive where more weight on t lowers m_q: the prediction is minus the sum over the subset
    subsets    (M, T), 1 where an example is in, or M lists of the places of those that are
    outcomes   (M, Q), m_q of the model trained on each subset

    Source: Park et al. 2023 (TRAK). ValueError for shapes that do not fit, fewer than 2 subsets, and places that are
    none: a list of 0 and 1 is no list of places.
    """
    given = to_host(scores)
    if given.ndim != 2:
        raise ValueError(f"scores have shape {given.shape}; need (Q, T)")
    inside = _membership(subsets, given.shape[1])
    seen = to_host(outcomes)
    if seen.shape != (len(inside), len(given)) or len(inside) < 2:
        raise ValueError(
            f"scores have shape {given.shape}, subsets {inside.shape} and outcomes {seen.shape}; need (Q, T), (M, T) "
            f"and (M, Q), M at least 2"
        )
    from scipy.stats import rankdata

    foretold = rankdata(-(inside @ given.T), axis=0)
    ranked = rankdata(seen, axis=0)
    foretold = foretold - foretold.mean(0)
    ranked = ranked - ranked.mean(0)
    length = np.sqrt((foretold**2).sum(0) * (ranked**2).sum(0))
    return float(np.mean((foretold * ranked).sum(0) / np.where(length > 0, length, 1.0)))


def _membership(subsets: Array | Sequence[Sequence[int]], count: int) -> np.ndarray:
    """(M, T), 1.0 where an example is in."""
    if not isinstance(subsets, list | tuple):
        inside = to_host(subsets)  # pyright: ignore[reportArgumentType] what is no list is an array
        if inside.ndim != 2 or inside.shape[1] != count:
            raise ValueError(f"subsets have shape {inside.shape}; need (M, T) with T = {count}, or lists of places")
        return inside.astype(np.float64)
    found = np.zeros((len(subsets), count))
    for row, places in zip(found, subsets, strict=True):
        row[_places(places, count)] = 1.0
    return found


def _places(places: Sequence[int], count: int) -> np.ndarray:
    """The places of a subset; ValueError unless each is one of `count` examples, and there once."""
    index = np.asarray(places)
    good = index.ndim == 1 and index.dtype.kind in "iu" and len(set(index.tolist())) == index.size
    if index.size and not (good and index.min() >= 0 and index.max() < count):
        raise ValueError(
            f"a subset is {places!r:.60}; need the places of its examples, whole numbers from 0 to {count - 1}, each "
            f"once, or for all subsets one array (M, T), 1 where an example is in"
        )
    return index.astype(int)
