"""What is looked up for each layer is looked up once for all: no scan over all layers inside a loop over them."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.step import own

L = 200


class Name(str):
    """A layer's name that counts how often it is compared with another object."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other):
        Name.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def problem(rng, sizes):
    """Records, own gradients and gradients of L layers of `sizes` kinds."""
    records, mine, grads = {}, {}, {}
    for i in range(L):
        name = Name(f"layer{i}")
        a = rng.normal(size=(3, 2 + i % sizes))
        records[name] = kf.Record(a, rng.normal(size=(2, 3, 2)), 3.0)
        mine[name] = kf.Record(a, rng.normal(size=(3, 2)), 3.0)
        grads[name] = mine[name].examples()[0].sum(1) / 3
    return records, mine, grads


@pytest.mark.parametrize("sizes", [1, 3, L])
@pytest.mark.parametrize("rule", [kf.SelfTuning(), kf.Fixed()], ids=["self-tuning", "fixed"])
def test_names_are_compared_a_few_times_a_layer(rng, rule, sizes, monkeypatch):
    records, mine, grads = problem(rng, sizes)
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), step=rule)
    state = pre.init({name: kf.Block.of(record) for name, record in records.items()}, grads["layer0"])
    first = next(iter(grads))
    given = {"own": mine} if rule.wants_own else {}
    asked = []
    monkeypatch.setattr(own, "most_examples", lambda records: asked.append(1) or max_batch(records))
    for parts in ((), (first,)):  # of all layers, then with one that is frozen
        seen, owned, moving = (
            {name: x for name, x in whole.items() if name not in parts} for whole in (records, mine, grads)
        )
        given = {"own": owned} if rule.wants_own else {}
        Name.compared = 0
        _, state, info = pre.step(state, seen, moving, loss=1.0, **given)
        if rule.judges:
            _, state = pre.judge(state, 1.0, lambda share: None, lambda: 0.9)
        info.metrics()
        for mapping in (state.layers, state.missed, info.codes, info.squares):
            assert len(list(mapping.items())) == len(mapping)
            assert all(name in mapping for name in moving)
        assert Name.compared < 20 * L
        assert len(asked) <= 2
        asked.clear()


def max_batch(records):
    return max(records.values(), key=lambda record: record.batch)


def test_what_is_not_there_is_not_found(rng):
    records, _, grads = problem(rng, 3)
    pre = kf.Preconditioner(kf.KFAC())
    state = pre.init({name: kf.Block.of(record) for name, record in records.items()}, grads["layer0"])
    _, state, info = pre.step(state, records, grads)
    for mapping in (state.layers, state.missed, info.codes, info.squares):
        assert "none" not in mapping
        with pytest.raises(KeyError, match="none"):
            mapping["none"]
    np.testing.assert_array_equal(
        state.layers["layer7"].A, kf.io.unflatten(kf.flatten(state), state).layers["layer7"].A
    )
