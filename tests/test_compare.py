"""compare and advise: figures against dense float64 matrices, plans against brute force, orderings, the commands."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from typer.testing import CliRunner

import kfaccore as kf
from kfaccore.analysis import Figures, advise, compare, violations
from kfaccore.analysis.advise import BY
from kfaccore.analysis.price import price
from kfaccore.cli import app
from kfaccore.linalg import kron
from kfaccore.methods import CATALOGUE
from rows import arrays

METHODS = {name: CATALOGUE[name]() for name in ("kfac", "ekfac", "diagonal", "identity", "exact")}


def records(rng):
    """Two blocks with shared positions, a convolution and an embedding."""
    image = kf.Patches(rng.normal(size=(7, 4, 4, 2)), kf.Window((2, 2)), bias=True)
    return {
        "fc": kf.Record(*arrays(rng), 5.0),
        "conv": kf.Record(image, rng.normal(size=(2, 7, 9, 3)), 7.0),
        "table": kf.Record(kf.Ids(rng.integers(0, 6, (7, 2)), 6), rng.normal(size=(2, 7, 2, 2)), 7.0),
    }


class TwoTerms(kf.KFAC):
    """K-FAC and a second Kronecker term, which says so in `terms`."""

    def kronecker_terms(self, state, block):
        (A, G), flip = super().kronecker_terms(state, block)[0], -0.3
        return (A, G), (A * A, flip * G * G)

    def matvec(self, state, v, hyper):
        return sum(kron.apply(G, v, A) for A, G in self.kronecker_terms(state, None))


def matrix(method, record, damping):
    """F~ of a fitted method by its products with unit vectors, (blocks, D, D)."""
    state = kf.settle(method, record, damping=damping)
    shape = record.blocks, record.d_out, record.d_in
    columns = []
    for i in range(shape[1] * shape[2]):
        unit = np.zeros(shape)
        unit[:, i // shape[2], i % shape[2]] = 1.0
        columns.append(method.matvec(state, unit, kf.Hyper(0, 0.0, 0.0)).reshape(shape[0], -1))
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize("layer", ["fc", "conv", "table"])
def test_figures_are_the_dense_ones(rng, layer):
    record, damping = records(rng)[layer], 0.2
    grad = rng.normal(size=(record.blocks, record.d_out, record.d_in))
    methods = {**METHODS, "two": TwoTerms()}
    F = kf.dense(record)
    x = np.linalg.solve(F + damping * np.eye(F.shape[-1]), grad.reshape(record.blocks, -1, 1)).ravel()
    for found in compare({layer: record}, methods, {layer: grad}, damping, repeats=1):
        method = methods[found.method]
        near = matrix(method, record, damping)
        want = np.linalg.norm(near - F) / np.linalg.norm(F)
        assert found.error == pytest.approx(want, rel=1e-9, abs=1e-7)
        assert found.standard_error == 0.0
        assert found.norm == pytest.approx(np.linalg.norm(F), rel=1e-12)
        assert found.trace_ratio == pytest.approx(
            np.trace(near, axis1=1, axis2=2).sum() / np.trace(F, axis1=1, axis2=2).sum(), rel=1e-10
        )
        state = kf.settle(method, record, damping=damping)
        y = method.solve(state, grad, kf.Hyper(0, 0.0, damping)).direction.ravel()
        assert found.inverse_error == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-9, abs=1e-10)
        assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-10)
        assert found.bytes == sum(np.asarray(leaf).nbytes for leaf in kf.tree.leaves(state))
        assert set(found.seconds) == {"update", "refresh", "solve"}
        assert found.note == ""


def test_default_gradient_and_damping(rng):
    record = records(rng)["fc"]
    (found,) = compare({"fc": record}, {"kfac": kf.KFAC()}, repeats=1)
    F = kf.dense(record)
    assert found.damping == pytest.approx(0.1 * np.trace(F, axis1=1, axis2=2).mean() / F.shape[-1], rel=1e-12)
    grad = np.einsum("bnso,bnsi->boi", record.g[0], record.a) / record.n
    x = np.linalg.solve(F + found.damping * np.eye(12), grad.reshape(2, 12, 1))
    assert found.size == pytest.approx(np.linalg.norm(x), rel=1e-11)


def test_probes_above_the_limit_of_rows(rng):
    """Estimates within four standard errors, of the same probes for every method; solves by conjugate gradients."""
    given = {"fc": kf.Record(rng.normal(size=(60, 5)), rng.normal(size=(60, 4)) ** 3, 60.0)}
    known, guessed = (compare(given, METHODS, damping=0.3, repeats=1, rows=rows) for rows in (60, 59))
    for exact, probed in zip(known, guessed, strict=True):
        assert probed.inverse_error == pytest.approx(exact.inverse_error, rel=1e-7, abs=1e-8)
        if exact.method != "exact":
            assert probed.standard_error > 0
        assert abs(probed.error - exact.error) <= 4 * probed.standard_error + 1e-7
    twice = compare(given, {"kfac": kf.KFAC()}, damping=0.3, repeats=1, rows=59)
    assert twice[0].error == guessed[0].error


def test_what_a_method_cannot_do_is_a_note(rng):
    given = {"table": records(rng)["table"]}
    (found,) = compare(given, {"kfac": kf.KFAC(sharing=kf.reduce)}, repeats=1)
    assert "use expand" in found.note
    assert np.isnan(found.error)
    with pytest.raises(ValueError, match="no draws"):
        compare({"x": kf.Record(np.ones((3, 2)), np.ones((0, 3, 2)), 3.0)}, METHODS)


REFERENCE = {  # relative errors of one fixed record, printed to three digits
    "kfac": 0.570,
    "ekfac": 0.465,
    "tkfac": 0.334,
    "tekfac": 0.260,
    "kpsvd": 0.248,
    "kfac-corrected": 0.215,
    "deflation": 0.182,
    "lanczos": 0.182,
}


def test_reference_magnitudes():
    draw = np.random.default_rng(0)
    z, Wa, Wg = draw.normal(size=(64, 4)), draw.normal(size=(4, 6)), draw.normal(size=(4, 5))
    a = np.concatenate([np.tanh(z @ Wa), np.ones((64, 1))], axis=1)
    g = (z @ Wg) * (0.3 + np.abs(z[:, :1]))
    methods = {name: CATALOGUE[name]() for name in REFERENCE if name in CATALOGUE}
    assert {"kfac", "ekfac"} <= set(methods)
    found = compare({"x": kf.Record(a, g, 64.0)}, methods, repeats=1, converged=True)
    for row in found:
        assert row.error == pytest.approx(REFERENCE[row.method], abs=1e-3), row.method
    assert violations(found, methods) == []


def test_orderings_on_random_records():
    """No known ordering breaks, with shared positions and without."""
    draw = np.random.default_rng(1)
    methods = {name: METHODS[name] for name in ("kfac", "ekfac", "diagonal", "exact")}
    for _ in range(200):
        shape = dict(zip(("blocks", "batch", "shared", "d_in", "d_out"), draw.integers(1, 5, 5), strict=True))
        found = compare({"x": kf.Record(*arrays(draw, **shape), 3.0)}, methods, repeats=1, converged=True)
        assert violations(found, methods) == []


def test_violations_name_layer_and_method():
    def row(method, error, **more):
        return Figures("fc", method, error=error, trace_ratio=1.0, **more)

    methods = {"kfac": kf.KFAC(), "ekfac": kf.EKFAC(), "exact": kf.Exact()}
    assert violations([row("kfac", 0.4), row("ekfac", 0.4), row("exact", 0.0)], methods) == []
    worse = [row("kfac", 0.4), row("ekfac", 0.41), row("exact", 0.1)]
    assert violations(worse, methods) == [
        "fc: error of ekfac 0.41 > kfac 0.4",
        "fc: error of exact 0.1, must be 0",
    ]
    assert violations([row("kfac", 0.4), row("ekfac", 0.41, standard_error=0.01)], methods) == []
    off = Figures("fc", "ekfac", error=0.1, trace_ratio=0.9)
    assert violations([off], methods) == ["fc: trace ratio of ekfac 0.9, must be 1"]


def _figures(rng, layers, methods=3):
    found = []
    for layer in range(layers):
        size = float(rng.uniform(0.5, 2.0))
        for method in range(methods):
            cost = {"update": float(rng.uniform()), "refresh": 0.0, "solve": 0.0}
            gain, count = float(rng.uniform()), int(rng.integers(1, 50))
            found.append(Figures(f"l{layer}", f"m{method}", gain=gain, best=size, bytes=count, seconds=cost))
    return found


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_a_plan_is_the_brute_force_one(rng, layers):
    for _ in range(20):
        figures = _figures(rng, layers)
        rows = {(f.layer, f.method): f for f in figures}
        plans = []
        for names in itertools.product(("m0", "m1", "m2"), repeat=layers):
            chosen = [rows[f"l{i}", name] for i, name in enumerate(names)]
            lost = sum((1 - f.gain) * f.best for f in chosen)
            plans.append((sum(f.bytes for f in chosen), lost, names))
        least = min(plan[0] for plan in plans)
        for budget in (least, least + 10, least + 40, 1e9):
            best = min((p for p in plans if p[0] <= budget), key=lambda p: (p[1], p[0]))
            found = advise(figures, lambda f: float(f.bytes), budget).best
            assert tuple(found.methods.values()) == best[2]
            assert found.cost == best[0]
            whole = sum(rows[f"l{i}", "m0"].best for i in range(layers))
            assert found.gain == pytest.approx(1 - best[1] / whole, rel=1e-12)
        impossible = advise(figures, lambda f: float(f.bytes), least - 1)
        assert impossible.best is None
        assert impossible.cheapest.cost == least


def test_a_recommendation_beats_the_floor():
    """Identity and Diagonal cost next to nothing: what gains no more is not taken, however large the budget."""

    def choice(**gains):
        rows = [Figures("x", name, gain=gain, best=1.0, bytes=i) for i, (name, gain) in enumerate(gains.items())]
        return advise(rows, lambda f: float(f.bytes), 100).best.methods["x"]

    assert choice(identity=0.5, diagonal=0.6, kfac=0.605) == "diagonal"
    assert choice(identity=0.6, diagonal=0.5, kfac=0.605) == "identity"
    assert choice(identity=0.5, diagonal=0.6, kfac=0.62) == "kfac"
    assert choice(kfac=0.605, identity=0.5, diagonal=0.6) == "kfac"  # which costs less here
    nothing = [Figures("x", name, best=0.0, bytes=i) for i, name in enumerate(("identity", "kfac"))]
    assert advise(nothing, lambda f: float(f.bytes), 100).best.methods == {"x": "identity"}


def test_the_ranking_is_by_gain_not_by_error(rng):
    """A direction that is right but for its length, against one near zero."""
    rows = [
        Figures("x", "short", gain=0.01, best=1.0, inverse_error=0.9998, size=1.0, bytes=1),
        Figures("x", "long", gain=0.9, best=1.0, inverse_error=2.26, size=1.0, bytes=1),
    ]
    assert advise(rows, lambda f: float(f.bytes), 9).best.methods == {"x": "long"}
    assert advise(rows, lambda f: float(f.bytes), 9, BY["direction"]).best.methods == {"x": "short"}


def test_predicted_bytes_are_those_of_the_preconditioner(rng):
    given = records(rng)
    figures = compare(given, METHODS, repeats=1)
    blocks = {name: kf.Block.of(record) for name, record in given.items()}
    found = advise(figures, lambda f: float(f.bytes), 1e6).cheapest
    chosen = {layer: METHODS[name] for layer, name in found.methods.items()}
    assert found.cost == sum(kf.Preconditioner(chosen).memory(blocks, np.zeros(1)).values())
    for name in METHODS:
        kept = kf.Preconditioner(METHODS[name]).memory(blocks, np.zeros(1))
        assert {f.layer: f.bytes for f in figures if f.method == name} == kept


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def saved(tmp_path, rng):
    path = tmp_path / "batch.safetensors"
    with pytest.raises(ValueError, match=r"the file will be a safetensors: name it \.safetensors"):
        kf.save_records(path.with_suffix(".npz"), records(rng))
    assert not path.with_suffix(".npz").exists()
    kf.save_records(path, records(rng))
    return path


def test_compare_command(saved, tmp_path):
    picture = tmp_path / "picture.png"
    result = run("compare", saved, "--methods", "kfac,ekfac,exact", "--check", "--json", "--plot", picture)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["layers"]] == ["kfac", "ekfac", "exact"] * 3
    assert found["violations"] == []
    assert found["methods"]["exact"]["error"] < 1e-6 < found["methods"]["ekfac"]["error"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "against the exact block" in run("compare", saved, "--methods", "kfac").stdout


def test_check_exits_1_on_a_violation(saved, monkeypatch):
    class EKFAC(kf.KFAC):
        """Further from F than K-FAC."""

        def kronecker_terms(self, state, block):
            ((A, G),) = super().kronecker_terms(state, block)
            return ((-A, G),)

    monkeypatch.setitem(CATALOGUE, "ekfac", EKFAC)
    result = run("compare", saved, "--methods", "kfac,ekfac", "--check")
    assert result.exit_code == 1
    assert "violated: fc: error of ekfac" in result.output


def test_advise_command(saved, rng):
    result = run("advise", saved, "--memory", "1MB", "--methods", "kfac,identity,exact", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["feasible"]
    assert set(found["methods"].values()) == {"exact"}
    pre = eval(found["python"], {"kf": kf})
    assert pre.methods == kf.Exact()
    assert sum(pre.memory(blocks(saved), np.zeros(1)).values()) == found["cost"]
    tight = run("advise", saved, "--memory", "20B", "--methods", "kfac,identity,exact", "--json")
    assert tight.exit_code == 0
    assert set(json.loads(tight.stdout)["methods"].values()) == {"identity"}
    none = run("advise", saved, "--memory", "1B", "--methods", "kfac,exact")
    assert none.exit_code == 1
    assert "the smallest needs" in none.output
    assert "kf.Preconditioner(" in none.output
    assert run("advise", saved, "--time", "1s", "--methods", "kfac,exact").exit_code == 0


def blocks(path):
    return {name: kf.Block.of(record) for name, record in kf.load_records(path)[0].items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "nowhere.npz"), "nowhere.npz is not a file"),
        (("compare", "FILE", "--methods", "kfca"), "no method 'kfca'; there are kfac"),
        (("compare", "FILE", "--damping", "-1"), "--damping is -1.0"),
        (("advise", "FILE"), "give one budget"),
        (("advise", "FILE", "--memory", "4 apples"), "need a number above 0, with one of"),
        (("advise", "FILE", "--memory", "0MB"), "need a number above 0, with one of"),
        (("advise", "FILE", "--memory", "4MB", "--by", "luck"), "--by is 'luck'"),
    ],
)
def test_bad_input_is_named(saved, arguments, message):
    result = run(*(saved if a == "FILE" else a for a in arguments))
    assert result.exit_code == 2
    assert message in result.output


def test_a_damping_that_is_none_is_refused_and_one_lost_in_rounding_named(rng):
    record = kf.Record(rng.normal(size=(10, 6)), rng.normal(size=(10, 3)) @ np.ones((3, 3)), 10.0)
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"damping is .*; need a positive number"):
            kf.analysis.compare({"w": record}, {"kfac": kf.KFAC()}, damping=damping)
    found = kf.analysis.compare({"w": record}, {"kfac": kf.KFAC()}, damping=1e-2)[0]
    assert not found.note
    still = kf.analysis.compare({"w": record}, {"kfac": kf.KFAC()}, {"w": np.zeros((3, 6))})[0]
    assert still.note.startswith("its gradient is zero")


def test_a_refresh_is_priced_once_and_an_update_a_sweep(rng):
    """Else methods that sweep are put off: decompositions are most of what they take."""
    a = rng.normal(size=(1, 2, 1, 40))
    record = kf.Record(a, a[None, ...], 2.0)
    found = price(kf.Deflation(), record)
    assert found.swept < 40**3 < found.once
    assert found.work(30) == 30 * found.swept + found.once
