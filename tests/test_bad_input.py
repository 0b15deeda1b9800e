"""Bad input: the message says what came and what is needed, or a code comes back, and the state stays as it was."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree

A, G = np.ones((6, 4)), np.ones((6, 3))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: kf.Record(np.ones(4), G, 6.0), ValueError, r"a has shape \(4,\)"),
        (lambda: kf.Record(A, np.ones((1, 1, 6, 3)), 6.0), ValueError, r"\(1, 1, 6, 3\); need rank 2 like a"),
        (lambda: kf.Record(A, np.ones((5, 3)), 6.0), ValueError, r"batch is 6 in a .* and 5 in g"),
        (lambda: kf.Record(np.ones((6, 2, 4)), np.ones((6, 3, 3)), 6.0), ValueError, "shared is 2 in a .* and 3 in g"),
        (lambda: kf.Record(np.ones((2, 6, 1, 4)), np.ones((3, 6, 1, 3)), 6.0), ValueError, "blocks is 2 in a"),
        (lambda: kf.Record(A, G, 0), ValueError, "n is 0; need the positive share"),
        (lambda: kf.Record(A, G, -1.0), ValueError, "n is -1.0"),
        (lambda: kf.Record(A, G, "six"), TypeError, "n is 'six'; need a number"),
        (lambda: kf.Record(A, G, np.ones(6)), TypeError, "need a number or a 0-d array"),
        (lambda: kf.Record(A, G, float("nan")), ValueError, "n is nan"),
        (lambda: kf.Record(A.astype(int), G, 6.0), TypeError, r"a has dtype int64, shape \(6, 4\); need"),
        (lambda: kf.Record(A, G.astype(np.float32), 6.0), TypeError, "float64 and g float32; need one dtype"),
        (lambda: kf.Record(np.ones((0, 4)), np.ones((0, 3)), 6.0), ValueError, "the record is empty"),
        (lambda: kf.Record(A, G, 6.0, np.ones((6, 2), bool)), ValueError, r"mask has shape \(6, 2\); need"),
        (lambda: kf.Record(A, G, 6.0, ids=np.arange(5)), ValueError, r"ids has shape \(5,\); need \(batch,\) = \(6,\)"),
        (lambda: kf.Record(kf.Ids(np.ones(6), 4), G, 6.0), TypeError, "Ids.index has dtype float64"),
        (lambda: kf.Ids(np.ones(6, int), 0), ValueError, "Ids.size is 0"),
        (lambda: kf.reduce(kf.Record(kf.Ids(np.ones(6, int), 4), G, 6.0)), TypeError, "use expand"),
        (lambda: kf.concat(kf.Record(A, G, 6.0), kf.Record(A[:, :2], G, 6.0)), ValueError, "d_in is 4 in the first"),
        (lambda: kf.Factored(A, np.ones((2, 6, 3)), 6.0), ValueError, "2 draws; a gradient has one"),
        (lambda: kf.Factored(kf.Ids(np.ones(6, int), 4), G, 6.0), TypeError, "Factored takes arrays"),
        (lambda: kf.Hyper(0, 0.9, -1.0), ValueError, "damping is -1.0; need a finite number >= 0"),
        (lambda: kf.Hyper(0, 1.0, 1.0), ValueError, "decay is 1.0"),
        (lambda: kf.direction(kf.Record(A, G, 6.0), np.ones((4, 3))), ValueError, r"grad has shape \(1, 4, 3\)"),
        (lambda: kf.direction(kf.Record(A, G, 6.0), np.ones((3, 4), int)), TypeError, "grad has dtype int64"),
        (lambda: kf.direction(kf.Record(A, G, 6.0), np.ones((3, 4)), damping=-1.0), ValueError, "damping is -1.0"),
        (lambda: kf.KFAC(split=kf.exact), ValueError, "inverse=eigh"),
        (lambda: kf.Exact().init(kf.Block(1000, 1000), A), ValueError, "use KFAC or EKFAC"),
        (lambda: kf.Block(0, 3), ValueError, "at least 1"),
        (lambda: kf.Clocks(0, 1), ValueError, "Clocks.update is 0; need a whole number of at least 1"),
        (
            lambda: kf.Preconditioner(kf.KFAC(), network="two-level"),
            TypeError,
            "network='two-level'.: need a network-level",
        ),
    ],
)
def test_message(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_mixed_namespaces():
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(TypeError, match=r"one Array API namespace, got .*array_api_strict"):
        kf.Record(strict.asarray(A), G, 6.0)


def test_mixed_devices():
    strict = pytest.importorskip("array_api_strict")
    there = strict.asarray(G, device=strict.Device("device1"))
    with pytest.raises(ValueError, match="need one device"):
        kf.Record(strict.asarray(A), there, 6.0)


def fresh(rng, **options):
    a, g = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(damping=0.1), **options)
    state = pre.init({"fc": kf.Block(3, 4)}, a)
    record, grad = kf.Record(a, g, 6.0), g.T @ a / 6
    return pre, pre.step(state, {"fc": record}, {"fc": grad})[1], record, grad


def snapshot(state):
    return [np.array(leaf) for leaf in tree.leaves(state)]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("records", "grads", "message"),
    [
        ({"no": 0}, {"fc": 0}, r"records has layers \['no'\] that init never saw"),
        ({"fc": 0}, {"no": 0}, r"grads has layers \['no'\]"),
        (None, {"fc": 0}, "got no records"),
        ({"fc": 1}, {"fc": 0}, "the record of layer 'fc' is for"),
        ({"fc": 0}, {"fc": 1}, r"grad has shape \(1, 2, 2\)"),
    ],
)
def test_a_failed_step_changes_nothing(rng, donate, records, grads, message):
    pre, state, record, grad = fresh(rng, donate=donate)
    good, wrong = (record, kf.Record(A[:, :2], G, 6.0)), (grad, np.ones((2, 2)))
    before = snapshot(state)
    given = None if records is None else {name: good[i] for name, i in records.items()}
    with pytest.raises(ValueError, match=message):
        pre.step(state, given, {name: wrong[i] for name, i in grads.items()})
    assert all(np.array_equal(x, y) for x, y in zip(before, snapshot(state), strict=True))


def test_an_error_names_its_layer_once(rng):
    pre, state, record, _ = fresh(rng)
    with pytest.raises(ValueError, match="grad has shape") as caught:
        pre.step(state, {"fc": record}, {"fc": np.ones((2, 2))})
    assert caught.value.__notes__ == ["in layer 'fc'"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["a", "g", "grad"])
@pytest.mark.parametrize("donate", [False, True])
def test_non_finite_numbers_are_counted(rng, bad, where, donate):
    pre, state, record, grad = fresh(rng, donate=donate)
    a, g, v = record.a[0, :, 0].copy(), record.g[0, 0, :, 0].copy(), grad.copy()
    {"a": a, "g": g, "grad": v}[where][1, 0] = bad
    kept = snapshot((state.layers["fc"].A, state.layers["fc"].G, state.layers["fc"].weight))
    updates, after, info = pre.step(state, {"fc": kf.Record(a, g, 6.0)}, {"fc": v})
    assert info.counts() == {kf.Code.NONFINITE: 1}
    assert np.isfinite(updates["fc"]).all()
    if where == "grad":
        assert not updates["fc"].any()
    else:
        now = snapshot((after.layers["fc"].A, after.layers["fc"].G, after.layers["fc"].weight))
        assert all(np.array_equal(x, y) for x, y in zip(kept, now, strict=True))
        assert updates["fc"].any()


def test_zero_gradients_give_zero_directions(rng):
    pre, state, record, grad = fresh(rng, step=kf.Fixed(1.0, 0.0, kf.KLClip()))
    updates, _, info = pre.step(state, {"fc": record}, {"fc": 0 * grad})
    assert not updates["fc"].any()
    assert info.counts() == {kf.Code.OK: 1}


def test_zero_curvature_divides_by_damping(rng):
    record = kf.Record(A, 0 * G, 6.0)
    v = rng.normal(size=(3, 4))
    np.testing.assert_allclose(kf.direction(record, v, kf.KFAC(inverse=kf.eigh, split=kf.exact), 0.25), v / 0.25)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dead_units_and_rank_deficiency_at_damping_1e_12(rng, dtype):
    a, g = rng.normal(size=(3, 20)).astype(dtype), rng.normal(size=(3, 15)).astype(dtype)
    a[:, 4] = g[:, 2] = 0
    record, v = kf.Record(a, g, 3.0), rng.normal(size=(15, 20)).astype(dtype)
    for method in (kf.KFAC(), kf.KFAC(inverse=kf.eigh), kf.KFAC(inverse=kf.eigh, split=kf.exact), kf.EKFAC()):
        solution = method.solve(kf.settle(method, record, damping=1e-12), v, kf.Hyper(0, 0.0, 1e-12))
        assert np.isfinite(solution.direction).all()
        assert solution.direction.any()
        assert solution.code[0] in (kf.Code.OK, kf.Code.JITTERED, kf.Code.FLOAT64)
        assert (solution.code[0] == kf.Code.OK) <= (dtype == np.float64)


def test_a_failed_refresh_keeps_the_previous_inverse(rng):
    method = kf.KFAC()
    record = kf.Record(rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), 6.0)
    state = kf.settle(method, record, damping=0.1)
    broken = dataclasses.replace(state, A=-state.A)
    after = method.refresh(broken, kf.Hyper(0, 0.0, 0.1))
    assert after.code.tolist() == [kf.Code.PREVIOUS]
    assert np.array_equal(after.inverse.A, state.inverse.A)
    assert np.array_equal(after.inverse.G, state.inverse.G)


@pytest.mark.parametrize("damping", [None, -1.0, float("nan")])
def test_a_direction_needs_a_damping(rng, damping):
    record = kf.Record(rng.normal(size=(5, 3)), rng.normal(size=(5, 2)), 5.0)
    with pytest.raises(ValueError, match=f"damping is {damping}; need a number of at least 0"):
        kf.direction(record, np.ones((2, 3)), damping=damping)


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("draws", [True, False])
def test_masks_of_any_dtype_are_flags(rng, dtype, draws):
    a, g = rng.normal(size=(6, 2, 4)), rng.normal(size=(1, 6, 2, 3))
    mask = (rng.random((6, 2)) < 0.5).astype(dtype)
    mask[0] = 1
    g = g if draws else g[:0]
    wanted = kf.Record(a, g, 6.0, mask.astype(bool))
    for put in namespaces():
        found = kf.Record(put(a), put(g), 6.0, put(mask))
        for name in ("a", "g", "mask", "n"):
            assert np.array_equal(np.asarray(getattr(found, name)), getattr(wanted, name))


def test_weights_are_no_mask(rng):
    a, g = rng.normal(size=(6, 2, 4)), rng.normal(size=(6, 2, 3))
    weights = np.linspace(0.0, 1.0, 12).reshape(6, 2)
    for mask in (weights, (2 * weights).astype(np.int64), weights * np.nan):
        with pytest.raises(ValueError, match=r"mask has entries such as .* need 0 or 1"):
            kf.Record(a, g, 6.0, mask)
        for put in namespaces()[1:]:
            for draws in (g[None], g[None][:0]):
                record = kf.Record(put(a), put(draws), 6.0, put(mask))
                pre = kf.Preconditioner(kf.KFAC())
                state = pre.init({"l": kf.Block(3, 4)}, put(a))
                _, _, info = pre.step(state, {"l": record}, {"l": put(np.ones((3, 4)))})
                assert info.counts() == {kf.Code.NONFINITE: 1}


def namespaces():
    """NumPy, and frameworks whose arrays the host does not read."""
    found = [np.asarray]
    for name in ("torch", "jax.numpy"):
        if importlib.util.find_spec(name.partition(".")[0]):
            found.append(importlib.import_module(name).asarray)
    return found


@pytest.mark.parametrize("network", [kf.TwoLevel(), kf.Tridiagonal(("a", "b")), kf.GlobalFNGD()], ids=type)
def test_layers_measured_together_come_in_equal_micro_batches(rng, network):
    def record():
        return kf.Record(rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), 6.0)

    pre = kf.Preconditioner(network=network)
    grads = {n: rng.normal(size=(4, 4)) for n in "ab"}
    state = pre.init({n: kf.Block(4, 4, rows=32, samples=32) for n in "ab"}, grads["a"])
    with pytest.raises(
        ValueError, match=r"layers have \{'a': 2, 'b': 1\} micro-batches, and " + type(network).__name__
    ):
        pre.step(state, {"a": [record(), record()], "b": record()}, grads)
    assert pre.step(state, {n: [record(), record()] for n in "ab"}, grads)[2].counts() == {kf.Code.OK: 2}


def test_micro_batches_with_and_without_draws_are_no_average(rng):
    pre, state, record, grad = fresh(rng)
    without = dataclasses.replace(record, g=record.g[:0])
    for batches in ([record, without], [without, record, record]):
        with pytest.raises(ValueError, match=r"micro-batches of layer 'fc' have \[.*0.*\] draws"):
            pre.step(state, {"fc": batches}, {"fc": grad})
    assert pre.step(state, {"fc": [without, without]}, {"fc": grad})[2].counts() == {kf.Code.OK: 1}


BIG = np.dtype(">f8")


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: kf.Record(A.astype(BIG), G, 6.0), r"a has dtype >f8, shape \(6, 4\)"),
        (lambda: kf.Record(A, G.astype(">f4"), 6.0), r"g has dtype >f4, shape \(6, 3\)"),
        (lambda: kf.Record(A.astype(">f2"), G, 6.0), r"a has dtype >f2"),
        (lambda: kf.Patches(np.ones((2, 4, 4, 1), BIG), kf.Window((2, 2))), "image has dtype >f8"),
        (lambda: kf.Factored(A.astype(BIG), G, 6.0), "a has dtype >f8"),
        (lambda: kf.type2(kf.Gaussian(), G.astype(BIG)), "f has dtype >f8"),
        (lambda: kf.Preconditioner(kf.KFAC()).init({"fc": kf.Block(3, 4)}, A.astype(BIG)), "like has dtype >f8"),
        (lambda: stepped(np.ones((3, 4), BIG)), "grad has dtype >f8"),
        (lambda: solved(np.ones((3, 4), BIG)), "grad has dtype >f8"),
    ],
)
def test_numbers_of_another_byte_order_are_named(call, what):
    order = r".*; need this machine's byte order, .* big-endian numbers: x\.astype\(x\.dtype\.newbyteorder\('='\)\)"
    with pytest.raises(TypeError, match=what + order):
        call()


def solved(grad):
    method = kf.KFAC()
    return method.solve(kf.settle(method, kf.Record(A, G, 6.0)), grad, kf.Hyper(0, 0.0, 0.1))


def stepped(grad):
    pre = kf.Preconditioner(kf.KFAC())
    return pre.step(pre.init({"fc": kf.Block(3, 4)}, A), {"fc": kf.Record(A, G, 6.0)}, {"fc": grad})


@pytest.mark.parametrize("kind", [">i8", ">u8", ">i4", ">u4", ">i2"])
def test_integers_of_another_byte_order_name_the_same_rows(kind):
    """Ids and labels are made this machine's, none of them another's row for want of bits."""
    given = np.array([0, 3, 1], kind)
    record = kf.Record(kf.Ids(given, 4), np.ones((3, 2)), 3.0)
    assert record.a.index.dtype.isnative
    assert record.a.index[:, 0].tolist() == [0, 3, 1]
    f = np.arange(12.0).reshape(3, 4)
    loss = kf.SoftmaxCrossEntropy()
    assert np.array_equal(kf.empirical(loss, f, given), kf.empirical(loss, f, given.astype(int)))
    if kind[2] == "8":
        far = kf.Record(kf.Ids(np.array([0, 2**32 + 3, 1], kind), 4), np.ones((3, 2)), 3.0)
        assert np.isnan(far.g[0, 0, :, 0]).any(axis=-1).tolist() == [False, True, False]


_RECORD = kf.Record(np.ones((2, 3)), np.ones((2, 2)), 2.0)
_STATS = kf.KFAC().measure(kf.KFAC().init(kf.Block(2, 3), np.zeros(1)), _RECORD, kf.Hyper(0, 0.0, 0.1))
_ROWS = "'fc' was given a Sums as a record; .*: {} needs the rows themselves"


@pytest.mark.parametrize(
    ("how", "given", "message"),
    [
        ({"methods": kf.KFAC()}, None, "'fc' was given a NoneType as a record; need a Record, or .* Stats made of one"),
        ({"methods": kf.KFAC()}, [_RECORD, None], "'fc' was given a NoneType as a record"),
        ({"methods": kf.KFAC()}, np.ones((2, 3)), "'fc' was given a ndarray as a record"),
        ({"methods": kf.KFAC(), "step": kf.SelfTuning()}, _STATS, _ROWS.format("SelfTuning")),
        ({"methods": kf.FNGD()}, [_RECORD, _STATS], _ROWS.format("FNGD")),
        ({"network": kf.TwoLevel()}, _STATS, _ROWS.format("TwoLevel")),
        ({"network": kf.Tridiagonal()}, _STATS, _ROWS.format("Tridiagonal")),
    ],
    ids=["nothing", "nothing among", "array", "rule", "rows", "network", "tridiagonal"],
)
def test_what_is_no_record_is_named_before_anything_moves(how, given, message):
    """The first layer's statistics have not moved either, though its buffers may be reused."""
    pre = kf.Preconditioner(**how, donate=True)
    grads = {"first": np.ones((2, 3)), "fc": np.ones((2, 3))}
    state = pre.init({name: kf.Block(2, 3) for name in grads}, np.zeros(1))
    before = [np.array(x) for x in tree.leaves(state)]
    with pytest.raises(TypeError, match=message):
        pre.step(state, {"first": _RECORD, "fc": given}, grads, loss=1.0)
    assert all(np.array_equal(x, y) for x, y in zip(before, tree.leaves(state), strict=True))


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_numpy_matrices_are_arrays_or_refused(rng):
    """Their * is a product of matrices: of a square layer numbers came out that were wrong."""
    a, g, V = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.normal(size=(3, 3))
    record = kf.Record(np.asmatrix(a), np.asmatrix(g), 6.0)
    plain = kf.Record(a, g, 6.0)
    np.testing.assert_array_equal(kf.dense(record), kf.dense(plain))
    P = kf.Posterior({"w": np.asmatrix(V)}, kf.fit(kf.KFAC(), [{"w": plain}]), precision=0.5)
    for name in ("matvec", "solve", "root"):
        of = getattr(P, name)
        np.testing.assert_array_equal(of({"w": np.asmatrix(V)})["w"], of({"w": V})["w"])
    assert P.energy({"w": np.asmatrix(V + 1)}) == P.energy({"w": V + 1})
    for method in (kf.Diagonal(), kf.KFAC()):
        with pytest.raises(TypeError, match=r"grad is an np.matrix.* give np.asarray\(x\)"):
            kf.direction(record, np.asmatrix(V), method)


@pytest.mark.parametrize("theta", [[[1.0] * 4] * 3, None, 1.0], ids=["list", "none", "number"])
def test_an_energy_of_what_is_no_array_is_named(theta):
    P = kf.Posterior({"w": np.ones((3, 4))}, kf.fit(kf.KFAC(), [{"w": kf.Record(A, G, 6.0)}]), precision=0.5)
    with pytest.raises(TypeError, match="arrays must come from one Array API namespace, got builtins"):
        P.energy({"w": theta})


@pytest.mark.parametrize("what", ["records", "grads"])
def test_what_is_no_mapping_from_layer_is_named(what):
    """Micro-batches are a list inside the mapping, not a list of mappings, as `fit` takes it."""
    pre = kf.Preconditioner(kf.KFAC())
    state = pre.init({"w": kf.Block(3, 4)}, A)
    given = {"records": {"w": kf.Record(A, G, 6.0)}, "grads": {"w": np.ones((3, 4))}}
    given[what] = [given[what]]
    with pytest.raises(TypeError, match=rf"{what} is a list; need a mapping from layer"):
        pre.step(state, given["records"], given["grads"])


RECORD = kf.Record(A, G, 6.0)
FIT = [{"w": RECORD}]


def posterior(**given):
    return kf.Posterior(
        **{"mean": {"w": np.ones((3, 4))}, "curvature": kf.fit(kf.KFAC(), FIT), "precision": 0.5, **given}
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kf.direction(RECORD, np.ones((3, 4)), kf.KFAC), "method=KFAC. is the class itself"),
        (lambda: kf.direction(RECORD, np.ones((3, 4)), "kfac"), "settle.method='kfac'.: need a method such as"),
        (lambda: kf.direction({"w": RECORD}, np.ones((3, 4))), "settle got a dict as record; need Record"),
        (lambda: kf.fit(kf.KFAC, FIT), r"fit\(method=KFAC\) is the class itself"),
        (lambda: kf.fit(kf.KFAC(), [RECORD]), "batch 0 is a Record; need a mapping from layer to Record"),
        (lambda: kf.fit(kf.KFAC(), [{"w": (A, G)}]), "batch 0 has a tuple for layer 'w'; need a Record"),
        (lambda: kf.Preconditioner(kf.KFAC(), clocks=(1, 10)), r"clocks=\(1, 10\)\): need Clocks"),
        (lambda: kf.Preconditioner(kf.KFAC(), schedules=0.1), r"schedules=0.1\): need Schedules"),
        (lambda: kf.Preconditioner(kf.KFAC()).init({"w": (3, 4)}, A), r"blocks\['w'\]=\(3, 4\)\): need Block"),
        (lambda: kf.Preconditioner(kf.KFAC()).init(kf.Block(3, 4), A), "blocks is a Block; need a mapping from layer"),
        (lambda: kf.Fixed(rescale=kf.KLClip), r"rescale=KLClip\) is the class itself"),
        (lambda: kf.TwoLevel(kf.KFAC), r"TwoLevel\(method=KFAC\) is the class itself"),
        (lambda: posterior(mean=np.ones((3, 4))), "one of mean and curvature is a ndarray; need a mapping from layer"),
        (lambda: posterior(curvature=kf.settle(kf.KFAC(), RECORD)), "curvature is a State; need kf.fit"),
        (lambda: posterior(precision="1"), "precision of layer 'w' is '1'; need a number"),
        (lambda: posterior(precision=None), "precision of layer 'w' is None; need a number"),
        (lambda: posterior().solve(np.ones((3, 4))), "vector is a ndarray; need a mapping from layer"),
        (lambda: posterior().covariance(RECORD), "is a Record; need a mapping from layer"),
        (lambda: kf.scores(posterior(), [FIT[0]], FIT), "is a list; need a mapping from layer"),
        (lambda: kf.scores(posterior(), FIT[0], FIT, memory="1GB"), "memory is '1GB'"),
        (lambda: kf.merge(posterior()), "merge got a Posterior; need a list of posteriors"),
        (lambda: kf.tuned(posterior(), together=("w",)), r"together is \('w',\); need tuples of layers"),
        (lambda: kf.analysis.compare(RECORD, {"k": kf.KFAC()}), "records is a Record; need a mapping from layer"),
        (lambda: kf.analysis.compare(FIT[0], [kf.KFAC()]), "methods is a list; need a mapping from name"),
        (lambda: kf.analysis.compare(FIT[0], {"k": kf.KFAC}), "is the class itself"),
        (lambda: kf.analysis.report(RECORD), "records is a Record; need a mapping from layer"),
        (
            lambda: kf.analysis.operator(kf.KFAC(), kf.settle(kf.KFAC(), RECORD), {}),
            "states is a State; need a",
        ),
    ],
)
def test_what_is_of_another_kind_is_named(call, message):
    """A class for an instance, an array for a mapping: the argument is named, where it is given."""
    with pytest.raises(TypeError, match=message):
        call()


def test_whole_numbers_are_asked_for():
    with pytest.raises(ValueError, match=r"k\) is -1; need a whole number of at least 0"):
        kf.settle(kf.KFAC(), RECORD, -1)
    with pytest.raises(ValueError, match=r"rank is 2\.5; need a whole number of at least 1"):
        kf.scores(posterior(), FIT[0], FIT, rank=2.5)
