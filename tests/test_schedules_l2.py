"""A penalty of its own for every layer, and a preconditioner with other schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn

NETWORK = kn.Sequential((4,), (kn.Dense(5), kn.Tanh(), kn.Dense(3)))
RULES = {"fixed": kf.Fixed(0.1, 0.9), "line-search": kf.LineSearch(), "self-tuning": kf.SelfTuning()}


def trained(schedules, rule, steps=4):
    """Parameters and losses after a few steps."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 4))
    y = rng.integers(0, 3, 12)
    params = NETWORK.init(np.random.default_rng(1), np.asarray)
    pre = kf.Preconditioner(kf.KFAC(), schedules=schedules, step=rule)
    state = pre.init(NETWORK.blocks(), next(iter(params.values())))
    losses = []
    for index in range(steps):
        draw = np.random.default_rng(index)
        loss, state, _ = kn.step(NETWORK, params, (x, y), kf.SoftmaxCrossEntropy(), pre, state, index, draw)
        losses.append(loss)
    return params, losses


@pytest.mark.parametrize("name", RULES)
def test_equal_penalties_are_one(name):
    one = trained(kf.Schedules(l2=0.02), RULES[name])
    for l2 in (dict.fromkeys(NETWORK.blocks(), 0.02), lambda step: 0.02):
        each = trained(kf.Schedules(l2=l2), RULES[name])
        np.testing.assert_allclose(each[1], one[1], rtol=1e-12)
        for layer, W in one[0].items():
            np.testing.assert_allclose(each[0][layer], W, rtol=1e-9, atol=1e-12)


def test_a_layer_without_penalty_is_left_alone():
    """With one layer penalised the loss has that penalty alone, at the parameters the step begins with."""
    params = NETWORK.init(np.random.default_rng(1), np.asarray)
    first = next(iter(params))
    plain = trained(kf.Schedules(), kf.Fixed(0.1), 1)[1][0]
    l2 = {name: 0.5 if name == first else 0.0 for name in params}
    found = trained(kf.Schedules(l2=l2), kf.Fixed(0.1), 1)[1][0]
    assert found == pytest.approx(plain + 0.25 * (params[first] ** 2).sum(), rel=1e-13)


def test_the_curvature_of_each_penalty_joins_its_layers_damping(rng):
    pre = kf.Preconditioner(kf.Identity(), schedules=kf.Schedules(0.1, l2={"a": 0.2, "b": lambda step: 0.3 + step}))
    state = pre.init({"a": kf.Block(2, 2), "b": kf.Block(2, 2)}, np.zeros(1))
    grads = {"a": rng.normal(size=(2, 2)), "b": rng.normal(size=(2, 2))}
    _, state, info = pre.step(state, None, grads)
    assert info.damping == pytest.approx({"a": 0.1 + 0.2, "b": 0.1 + 0.3})
    assert pre.step(state, None, grads)[2].damping["b"] == pytest.approx(0.1 + 1.3)


@pytest.mark.parametrize("rule", [*RULES.values(), kf.GridSearch()])
def test_other_schedules_leave_the_rest(rule):
    pre = kf.Preconditioner(kf.EKFAC(), kf.Clocks(2, 4), kf.Schedules(0.1), step=rule, donate=True, widest=64)
    other = replace(pre, schedules=kf.Schedules(0.3, l2={"a": 0.1}))
    assert other.schedules.damping == 0.3
    for field in ("methods", "clocks", "rule", "donate", "widest", "comm", "network"):
        assert getattr(other, field) == getattr(pre, field)
    assert replace(pre, step=kf.LineSearch()).rule == kf.LineSearch()


def test_bad_penalties():
    with pytest.raises(ValueError, match=r"l2\['b'\] is -1"):
        kf.Schedules(l2={"a": 0.0, "b": -1.0})
    with pytest.raises(ValueError, match="l2 is inf"):
        kf.Schedules(l2=float("inf"))
    with pytest.raises(ValueError, match=r"l2 has no entry for layer 'b'; it has \['a'\]"):
        kf.Schedules(l2={"a": 0.1}).penalty("b", 0)


class Made(Mapping):
    """A mapping that makes what it is asked for, and holds none of it."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, name):
        return self.make("abc".index(name))

    def __iter__(self):
        return iter("abc")

    def __len__(self):
        return 3


@pytest.mark.parametrize("network", [None, kf.TwoLevel()])
@pytest.mark.parametrize("l2", [0.0, 0.5, Made(lambda i: 0.5 * 3.0**i), Made(lambda i: lambda step: 0.5 * 3.0**i)])
@pytest.mark.parametrize("damping", [Made(lambda i: 10.0**i), Made(lambda i: lambda step: 10.0**i)])
def test_numbers_that_a_mapping_makes_are_each_layers_own(damping, l2, network, rng):
    records = {n: kf.Record(rng.normal(size=(8, 4)), rng.normal(size=(8, 3)), 8.0) for n in "abc"}
    grads = {n: rng.normal(size=(3, 4)) for n in "abc"}
    found = []
    for schedules in (
        kf.Schedules(damping=damping, l2=l2),
        kf.Schedules(damping=dict(damping), l2=dict(l2) if isinstance(l2, Made) else l2),
    ):
        pre = kf.Preconditioner(kf.KFAC(), network=network, schedules=schedules)
        state = pre.init({n: kf.Block(3, 4) for n in "abc"}, grads["a"])
        found.append(pre.step(state, records, grads))
    for name in "abc":
        assert np.array_equal(found[0][0][name], found[1][0][name])
    assert found[0][2].damping == found[1][2].damping
    assert len(set(found[0][2].damping.values())) == 3


def test_methods_that_a_mapping_makes_keep_their_capabilities(rng):
    made = Made(lambda i: (kf.KFAC, kf.Identity, kf.CGFAC)[i]())
    pre = kf.Preconditioner(made)
    state = pre.init({n: kf.Block(3, 4) for n in "abc"}, np.zeros(1))
    assert pre.assigned.unmeasured("abc", state.layers) == {"b"}
    assert set(pre.assigned.free(dict.fromkeys("abc", 0), state.layers)) == {"a", "b", "c"}
    assert [type(pre.methods[n]) for n in "abc"] == [kf.KFAC, kf.Identity, kf.CGFAC]
    assert pre.methods["a"] is pre.methods["a"]
