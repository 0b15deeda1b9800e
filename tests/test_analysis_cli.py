"""compare and advise as commands: bounded, interruptible, never twice the same work, readable anywhere."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits
from typer.testing import CliRunner

import kfaccore as kf
from kfaccore.analysis import compare
from kfaccore.analysis.figures import Figures
from kfaccore.analysis.survey import Survey
from kfaccore.cli import app
from kfaccore.cli.ranking import shown
from kfaccore.cli.survey import Found
from kfaccore.methods import CATALOGUE

CHEAP = "kfac,diagonal,identity"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def plain(rng, batch=6, d_in=4, d_out=3):
    return kf.Record(rng.normal(size=(batch, d_in)), rng.normal(size=(batch, d_out)), float(batch))


@pytest.fixture
def saved(tmp_path, rng):
    path = tmp_path / "batch.safetensors"
    kf.save_records(path, {name: plain(rng) for name in ("fc[0]", "fc1", "head")})
    return path


def counted(monkeypatch):
    """Names of the methods whose `init` runs on arrays."""
    seen = []
    for name in CHEAP.split(","):
        kind = CATALOGUE[name]

        class Counted(kind):
            called = name

            def init(self, block, like):
                if isinstance(like, np.ndarray):
                    seen.append(self.called)
                return super().init(block, like)

        Counted.__qualname__ = kind.__qualname__
        monkeypatch.setitem(CATALOGUE, name, Counted)
    return seen


def test_nothing_is_measured_twice(saved, monkeypatch):
    seen = counted(monkeypatch)
    first = run("compare", saved, "--methods", CHEAP, "--json")
    assert set(seen) == set(CHEAP.split(","))
    seen.clear()
    again = run("compare", saved, "--methods", CHEAP, "--json")
    assert seen == []
    assert again.stdout == first.stdout
    advised = run("advise", saved, "--memory", "1MB", "--methods", "kfac")
    assert advised.exit_code == 0, advised.output
    assert seen == []
    run("compare", saved, "--methods", CHEAP, "--damping", "0.5")
    assert seen


def test_other_content_is_measured(saved, rng, monkeypatch):
    run("compare", saved, "--methods", CHEAP)
    kf.save_records(saved, {"fc[0]": plain(rng)})
    seen = counted(monkeypatch)
    run("compare", saved, "--methods", "kfac")
    assert seen


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kfaccore": 1}', '{"kfaccore": 1, "figures": {"x": 3}}', "[" * 9999])
def test_a_damaged_table_is_begun_anew(saved, text):
    table = saved.with_name(saved.name + ".figures.json")
    table.write_text(text)
    result = run("compare", saved, "--methods", "kfac")
    assert result.exit_code == 0, result.output
    assert json.loads(table.read_text())["figures"]


def test_a_table_that_cannot_be_written_is_said(saved):
    saved.with_name(saved.name + ".figures.json").mkdir()
    result = run("compare", saved, "--methods", "kfac")
    assert result.exit_code == 0, result.output
    assert "figures are not kept for the next time" in result.stdout
    assert len(list(saved.parent.iterdir())) == 2


def test_ctrl_c_shows_and_keeps_what_is_there(saved, monkeypatch):
    class Stopped(kf.Diagonal):
        def measure(self, state, record, hyper):
            raise KeyboardInterrupt

    monkeypatch.setitem(CATALOGUE, "diagonal", Stopped)
    result = run("compare", saved, "--methods", "identity,diagonal", "--layers", "head", "--json")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["layers"] if row["gain"]] == ["identity"]
    assert [row["note"] for row in found["layers"]] == ["", "not measured: stopped"]
    assert found["interrupted"]
    assert found["fits"] == {"head": True}  # for all that is known
    shown = run("compare", saved, "--methods", "identity,diagonal", "--layers", "head").stdout
    assert "identity" in shown
    assert "- not measured: diagonal on head" in shown
    assert json.loads(saved.with_name(saved.name + ".figures.json").read_text())["figures"]


def test_a_budget_leaves_out_what_would_not_fit(saved):
    result = run("compare", saved, "--methods", CHEAP, "--budget", "1e-9")
    assert result.exit_code == 0, result.output
    assert "not measured for want of time (--budget): kfac, diagonal, identity on fc[0], fc1, head" in result.stdout
    assert "run it again" in result.stdout
    assert json.loads(run("compare", saved, "--methods", CHEAP, "--budget", "0", "--json").stdout)["notes"] == []


def test_what_could_not_be_measured_is_no_success(tmp_path, rng):
    """Neither of all layers nor of one."""
    path = tmp_path / "r.safetensors"
    kf.save_records(path, {"small": plain(rng), "wide": plain(rng, 3, 400, 400)})
    for peak, measured, line in (
        ("1kB", [], "kf.Preconditioner({}, clocks"),
        ("5MB", ["small"], "kf.Preconditioner({'small': kf."),
    ):
        asked = ("advise", path, "--memory", "1MB", "--methods", "kfac", "--peak", peak)
        told = run(*asked, "--json")
        found = json.loads(told.stdout)
        assert told.exit_code == 1
        assert list(found["methods"]) == measured
        assert found["not_measured"] == [name for name in ("small", "wide") if name not in measured]
        assert not found["feasible"]
        assert (found["gain"] is None) == (not measured)
        assert found["python"].startswith(line)
        plainly = run(*asked)
        assert ("most within the budget" in plainly.stdout) == bool(measured)
        assert "nothing could be measured on" in plainly.stderr
        assert "(--peak)" in plainly.stderr
    assert "- not measured within the memory allowed (--peak): " in run("compare", path, "--peak", "1kB").stdout


def test_a_layer_larger_than_the_peak_is_said(tmp_path, rng):
    path = tmp_path / "x.safetensors"
    kf.save_records(path, {"x": plain(rng, 3, 400, 400)})
    told = run("compare", path, "--methods", "kfac,identity", "--peak", "1MB", "--json")
    rows = json.loads(told.stdout)["layers"]
    assert all("directions of 400 x 400 need about" in row["note"] for row in rows)
    rows = json.loads(run("compare", path, "--methods", "kfac,identity", "--peak", "15MB", "--json").stdout)["layers"]
    assert "it needs about" in rows[0]["note"]
    assert rows[1]["gain"] > 0


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_no_more_is_held_than_the_peak(kind):
    """Traced: every method that is measured at all, on a layer whose float64 states would not fit."""
    rng = np.random.default_rng(0)
    if kind == "dense":
        record = kf.Record(rng.normal(size=(64, 700)).astype("f4"), rng.normal(size=(64, 500)).astype("f4"), 64.0)
    else:
        image = kf.Patches(rng.normal(size=(16, 12, 12, 40)).astype("f4"), kf.Window((3, 3), 1, 1), bias=True)
        record = kf.Record(image, rng.normal(size=(16, 144, 64)).astype("f4"), 16.0)
    peak = 60 << 20
    methods = {name: CATALOGUE[name]() for name in ("identity", "diagonal", "kfac", "ekfac", "skfac", "exact", "kpsvd")}
    tracemalloc.start()
    found = compare({"x": record}, methods, damping=0.1, repeats=1, peak=peak)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held <= peak
    assert sum(f.gain == f.gain for f in found) >= 3
    assert all(f.note for f in found if f.gain != f.gain)


@pytest.mark.parametrize("width", [20, 1100])
def test_narrow_layers_are_measured_by_one_thread(width):
    """BLAS has as many as before afterwards, and where a side is wide."""

    class Seen(kf.Identity):
        def solve(self, *arguments):
            seen.append(threads())
            return super().solve(*arguments)

    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    seen: list = []
    rng = np.random.default_rng(0)
    record = kf.Record(rng.normal(size=(4, width)), rng.normal(size=(4, 3)), 4.0)
    with threadpool_limits(2, user_api="blas"):
        compare({"x": record}, {"seen": Seen()}, repeats=1)
        assert threads() == [2] * len(threads())
    assert seen
    assert all(pools == [1 if width == 20 else 2] * len(pools) for pools in seen)


def test_layers_are_names_before_they_are_patterns(saved):
    def layers(pattern):
        rows = json.loads(run("compare", saved, "--methods", "identity", "--layers", pattern, "--json").stdout)
        return [row["layer"] for row in rows["layers"]]

    assert layers("fc[0]") == ["fc[0]"]
    assert layers("head,fc*") == ["fc[0]", "fc1", "head"]
    result = run("compare", saved, "--layers", "conv*")
    assert result.exit_code == 2
    assert "no layer 'conv*'; there are fc[0], fc1, head" in result.stderr


def test_csv_has_a_line_a_figure(saved):
    rows = list(csv.DictReader(io.StringIO(run("compare", saved, "--methods", CHEAP, "--csv").stdout)))
    assert [row["layer"] for row in rows[::3]] == ["fc[0]", "fc1", "head"]
    found = json.loads(run("compare", saved, "--methods", CHEAP, "--json").stdout)["layers"]
    assert [float(row["gain"]) for row in rows] == [row["gain"] for row in found]
    assert run("compare", saved, "--csv", "--json").exit_code == 2


def survey(layers):
    """Found figures of so many layers of different shapes, all methods each."""
    found = Found()
    for i in range(layers):
        found.shapes[f"layer{i}"] = f"{i} x {i}"
        for place, name in enumerate(CATALOGUE):
            seconds = {"update": 1e-3, "refresh": 1e-3, "solve": 1e-4}
            row = Figures(f"layer{i}", name, 1 - place / 30, length=1.0, bytes=10, seconds=seconds, best=1.0)
            found.put(row)
    return found


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_five_layers_are_one_screen(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    found = survey(5)
    lines = shown(found, {"kfac": {"gain": 1.0}}, 1, 5, False)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= max(columns, 79)
    assert all(line.isascii() for line in lines)
    assert len(shown(found, {"kfac": {"gain": 1.0}}, 1, 5, True)) > 5 * len(CATALOGUE)


def test_layers_of_one_shape_share_a_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    found = survey(4)
    found.shapes = dict.fromkeys(found.shapes, "8 x 8")
    lines = shown(found, {}, 1, 5, False)
    assert lines[1] == "layer0, layer1, ... layer3 (4 layers): 8 x 8"
    assert lines[2].split()[:3] == ["kfac", "1.00", "(1.00)"]


def test_a_layer_that_nothing_fits_is_said(monkeypatch):
    found = Found(shapes={"x": "2 x 2"})
    found.put(Figures("x", "kfac", gain=0.04))
    found.put(Figures("x", "fngd", gain=1.0, own=True))
    assert "no method fits: the best gain is 0.04, below 0.3" in "\n".join(shown(found, {}, 1, 5, False))


def test_a_zero_gradient_and_extreme_values_go_through(tmp_path, rng):
    path = tmp_path / "x.npz"
    a = rng.normal(size=(5, 3))
    np.savez(path, **{"zero[b].a": a, "zero[b].g": np.zeros((5, 2)), "huge.a": a * 1e300, "huge.g": a[:, :2] * 1e300})
    result = run("compare", path, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout, parse_constant=lambda word: pytest.fail(word))["layers"]
    assert all("nothing to gain" in row["note"] for row in rows if row["layer"] == "zero[b]")
    assert {row["gain"] is None for row in rows if row["method"] == "kfac" and row["layer"] == "huge"} == {False}
    assert "zero[b]" in run("compare", path).stdout


def test_a_bad_layer_does_not_hide_the_others(tmp_path, rng):
    path = tmp_path / "x.npz"
    a = rng.normal(size=(5, 3))
    np.savez(path, **{"bad.a": a * np.nan, "bad.g": a, "good.a": a, "good.g": a})
    result = run("compare", path, "--methods", "kfac")
    assert result.exit_code == 2
    assert "good" in result.stdout
    assert "layer 'bad': its a holds values that are not finite" in result.stderr


def test_the_survey_spends_shares_of_its_time():
    made = Survey(seconds=100.0)
    made.grant(0.25)
    assert 24.0 < made.left <= 25.0
    made.grant(1.0)
    assert 99.0 < made.left <= 100.0


@pytest.mark.parametrize("verb", [("compare",), ("compare", "--json"), ("advise", "--memory", "1MB")])
def test_a_file_of_which_nothing_can_be_read_shows_only_why(tmp_path, verb):
    """Every layer that could not be read once, and no table of nothing."""
    path = tmp_path / "bad.npz"
    g = np.ones((6, 3))
    np.savez(path, **{"fc.a": np.ones((5, 4)), "fc.g": g, "head.a": np.ones((6, 4)), "head.g": g * np.nan})
    result = run(*verb[:1], path, *verb[1:])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("batch is 5 in a") == 1
    assert result.stderr.count("layer 'head': its g holds values that are not finite") == 1


def test_layers_that_can_be_read_are_shown_beside_one_that_cannot(tmp_path, rng):
    path = tmp_path / "one.npz"
    np.savez(
        path, **{"fc.a": np.ones((5, 4)), "fc.g": np.ones((6, 3)), "x.a": np.eye(4), "x.g": rng.normal(size=(4, 2))}
    )
    result = run("compare", path, "--methods", CHEAP)
    assert result.exit_code == 2
    assert "x: 2 x 4" in result.stdout
    assert "layer 'fc'" in result.stderr


def test_a_gradient_of_zero_is_said_to_gain_nothing(tmp_path, rng):
    path = tmp_path / "still.npz"
    np.savez(path, **{"fc.a": np.ones((5, 4)), "fc.g": np.zeros((5, 3))})
    result = run("advise", path, "--memory", "1MB", "--methods", CHEAP)
    assert result.exit_code == 0
    assert "nothing to gain on fc: the gradient is zero there" in result.stdout
