"""`kfaccore influence`, `laplace` and `prune` on a short run: figures against the library's, pictures, exit codes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.cli import app

pytest.importorskip("sklearn")
TASK = kn.TASKS["digits-classifier"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and files of 3 queries and 40 examples."""
    out = tmp_path_factory.mktemp("posterior")
    arguments = ("train", "digits-classifier", "--steps", 8, "--l2", 1e-3, "--out", out / "run", "--json")
    assert run(*arguments).exit_code == 0
    data, held = TASK.load()
    np.savez(out / "train.npz", x=data[0][:40], y=data[1][:40])
    np.savez(out / "queries.npz", x=held[0][:3], y=held[1][:3])
    return out


def influence(out, *more):
    return run("influence", out / "run", "--queries", out / "queries.npz", "--train", out / "train.npz", *more)


def test_influence_orders_examples_by_their_effect(trained):
    result = influence(trained, "--top", 4, "--damping", 1e-3, "--json", "--plot")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    params = kf.load(trained / "run" / "run.safetensors")["params"]
    params = {name: params[name] for name in TASK.network.blocks()}
    data, held = TASK.load()
    x, y = data[0][:40], data[1][:40]
    stream = kn.Stream(TASK.network, params, TASK.loss, [(x, y)], kf.type2)
    P = kf.Posterior(params, kf.fit(kf.EKFAC(), stream), 1e-3)
    queries = next(iter(kn.measured(TASK.network, params, kn.margin, [(held[0][:3], held[1][:3])])))
    own = kn.Stream(TASK.network, params, TASK.loss, [(x, y)], kf.empirical)
    effects = -kf.scores(P, queries, own) / 40
    for number, row in enumerate(found["queries"]):
        order = np.argsort(-effects[number])
        assert [e["example"] for e in row["helpful"]] == order[:4].tolist()
        assert [e["example"] for e in row["harmful"]] == order[::-1][:4].tolist()
        assert effects[number, order[3]] > 0 > effects[number, order[-4]]
        assert row["helpful"][0]["effect"] == pytest.approx(effects[number, order[0]], rel=1e-3)
        assert row["label"] == held[1][number]
    assert (trained / "run" / "influence.png").read_bytes()[:4] == b"\x89PNG"
    shown = influence(trained, "--method", "kfac", "--top", 2)
    assert shown.exit_code == 0
    assert "helpful" in shown.stdout
    assert "effect: what the example's" in shown.stdout


def test_laplace_tunes_and_predicts(trained):
    result = run("laplace", trained / "run", "--json", "--plot")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["evidence"]["after"] > found["evidence"]["before"]
    assert list(found["precision"]) == ["dense0", "dense2", "dense4"]
    assert set(found["codes"].values()) == {"OK"}
    params = kf.load(trained / "run" / "run.safetensors")["params"]
    held = TASK.load()[1]
    f = TASK.network.forward(params, held[0])[0]
    own = found["predictions"]["parameters"]
    assert own["accuracy"] == pytest.approx((f.argmax(1) == held[1]).mean())
    assert own["log_loss"] == pytest.approx(float(TASK.loss.value(f, held[1])) / len(f), rel=1e-4)
    assert (trained / "run" / "laplace.png").exists()
    assert "probit, prior tuned" in run("laplace", trained / "run", "--method", "diagonal").stdout


def test_prune_keeps_accuracy_at_full_share(trained):
    result = run("prune", trained / "run", "--share", 0.8, "--json", "--plot")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kept"] == pytest.approx([1 - 0.16 * i for i in range(6)])
    assert set(found["accuracy"]) == {"magnitude", "OBD", "OBS", "EigenDamage"}
    assert len({row[0] for row in found["accuracy"].values()}) == 1
    assert (trained / "run" / "prune.png").exists()
    assert "not retrained" in run("prune", trained / "run", "--method", "diagonal", "--share", 0.5).stdout


def test_bad_input_ends_with_exit_2(trained, tmp_path):
    np.savez(tmp_path / "wide.npz", x=np.zeros((2, 5)), y=np.zeros(2, int))
    np.savez(tmp_path / "soft.npz", x=np.zeros((2, 64)), y=np.zeros(2))
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "empty").mkdir()
    spoilt = np.zeros((3, 64))
    spoilt[1, 5] = np.nan
    np.savez(tmp_path / "spoilt.npz", x=spoilt, y=np.zeros(3, int))
    np.savez(tmp_path / "strange.npz", x=np.zeros((3, 64)), y=np.array([0, 9, 10]))
    np.savez(tmp_path / "below.npz", x=np.zeros((8, 64)), y=np.full(8, -1))
    np.savez(tmp_path / "complex.npz", x=np.full((3, 64), 1 + 1j), y=np.zeros(3, int))
    np.savez(tmp_path / "alone.npz", x=np.zeros((3, 64)))
    kf.save(tmp_path / "other.safetensors", {"a": np.zeros(2)})
    folder = trained / "run"
    good = trained / "train.npz"
    asked = lambda file: ("influence", folder, "--queries", file, "--train", good)  # noqa: E731
    cases = [
        (asked(tmp_path / "wide.npz"), r"x has shape \(2, 5\)"),
        (asked(tmp_path / "soft.npz"), "need integer labels"),
        (asked(tmp_path / "text.npz"), "need an .npz of x and y"),
        (asked(tmp_path / "none.npz"), "need an .npz of x and y"),
        (asked(tmp_path / "spoilt.npz"), "x of examples 1 holds values that are not finite"),
        ((*asked(good)[:5], tmp_path / "spoilt.npz"), "--train .*not finite"),
        (asked(tmp_path / "complex.npz"), "x has dtype complex128; need real numbers"),
        (asked(tmp_path / "strange.npz"), "y of examples 2 is 10; need labels from 0 to 9"),
        (asked(tmp_path / "below.npz"), "y of examples 0, 1, 2, 3, 4 and 3 more is -1"),
        (asked(tmp_path / "alone.npz"), "has no array 'y', only x"),
        (("laplace", tmp_path / "other.safetensors"), "names no task"),
        (("prune", tmp_path / "empty"), "is a folder without run.safetensors"),
        ((*asked(good), "--method", "none"), "there are kfac"),
        ((*asked(good), "--method", "skfac"), "keeps no curvature"),
        ((*asked(good), "--damping", "-1"), "need a finite number"),
        (("laplace", tmp_path / "nowhere"), "is not a file"),
        (("laplace", folder, "--precision", "0"), "need a positive number"),
        (("laplace", folder, "--precision", "1e308"), r"has precision 1e\+308, inf in the float32 of its curvature"),
        (("prune", folder, "--share", "1"), "between 0 and 1"),
        (("prune", folder, "--precision", "-1"), "need a finite number"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert re.search(message, result.stderr.replace("\n", " ")), result.stderr


def test_an_example_is_helpful_or_harmful(trained):
    """Of one example every effect has one sign: the other kind is said to have none."""
    x, y = TASK.load()[0]
    np.savez(trained / "one.npz", x=x[:1], y=y[:1])
    given = ("influence", trained / "run", "--queries", trained / "one.npz", "--train", trained / "one.npz")
    (row,) = json.loads(run(*given, "--json", "--plot").stdout)["queries"]
    assert sorted(len(row[kind]) for kind in ("helpful", "harmful")) == [0, 1]
    assert "none" in run(*given).stdout


def test_a_task_without_labels(tmp_path):
    assert run("train", "digits-autoencoder", "--steps", 1, "--out", tmp_path, "--json").exit_code == 0
    np.savez(tmp_path / "q.npz", x=np.zeros((2, 64)), y=np.zeros(2))
    result = run("influence", tmp_path, "--queries", tmp_path / "q.npz", "--train", tmp_path / "q.npz")
    assert result.exit_code == 2
    assert "need the network's outputs (count, *(64,))" in result.stderr
    for verb in ("laplace", "prune"):
        result = run(verb, tmp_path)
        assert result.exit_code == 2
        assert "needs a classifier" in result.stderr
