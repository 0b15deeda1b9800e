"""`train --tune-l2`: penalties at the maximum of the evidence, runs that go on bit for bit, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.cli import app
from kfaccore.method import Method

METHOD = kf.KFAC()
Penalties = float | dict[str, float]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def small_task(count=12):
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(count, 4)), rng.integers(0, 3, count)
    network = kn.Sequential((4,), (kn.Dense(5), kn.Tanh(), kn.Dense(3)))
    return kn.Task(network, kf.SoftmaxCrossEntropy(), lambda: (pair, pair), count, 9, {})


def begun(every, l2: Penalties = 0.01, method: Method = METHOD):
    task = small_task()
    pre = kf.Preconditioner(method, step=kf.SelfTuning())
    params = task.network.init(np.random.default_rng(1), np.asarray)
    return task, kn.Online(pre, task, l2, every), params


def brute_force(F, theta, count):
    """The p at which the dense gamma(p) = p |theta|^2, by halving; F of the mean loss, undamped."""
    values = count * np.linalg.eigvalsh(F)
    low = 1e-8
    high = 1e8
    for _ in range(200):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if (values / (values + middle)).sum() > middle * (theta**2).sum() else (low, middle)
    return low


def after(online, params, steps, at):
    """What a run held when `at` steps were taken."""
    found = {}
    for progress in online.fit(params, online.task.load()[0], steps=steps):
        found[progress.step] = dict(progress.params), progress.state
    return found[at]


def blocks_of(state):
    """{layer: the dense undamped block of K-FAC}."""
    layers = state.layers
    means = {name: (layers[name].A[0], layers[name].G[0], layers[name].weight[0]) for name in layers}
    return {name: np.kron(G / weight, A / weight) for name, (A, G, weight) in means.items()}


def test_each_layers_penalty_is_at_the_maximum_of_the_evidence():
    task, online, params = begun(every=4)
    theta, state = after(online, params, 9, at=8)
    last = online.found[-1]
    half = 0.0
    for name, F in blocks_of(state).items():
        p = brute_force(F, theta[name], 12)
        assert last.l2[name] == pytest.approx(p / 12, rel=1e-9)
        half += np.linalg.slogdet(np.eye(len(F)) + 12 * F / p)[1] + p * (theta[name] ** 2).sum()
    x, y = task.load()[0]
    f = task.network.forward(theta, x)[0]
    loss = (np.log(np.exp(f).sum(1)) - f[np.arange(12), y]).sum()
    assert last.evidence == pytest.approx(-loss - half / 2, rel=1e-10)
    assert [one.step for one in online.found] == [4, 8]
    assert last.codes == dict.fromkeys(params, "OK")
    assert online.optimiser.schedules.l2 == online.l2 == last.l2


def test_until_the_first_tuning_it_is_the_plain_run_and_after_it_the_one_with_those_penalties():
    task, online, params = begun(every=4)
    tuned = {p.step: (p.loss, p.state) for p in online.fit(params, task.load()[0], steps=6)}
    plain = task.network.init(np.random.default_rng(1), np.asarray)
    pre = kf.Preconditioner(METHOD, schedules=kf.Schedules(l2=dict.fromkeys(plain, 0.01)), step=kf.SelfTuning())
    for progress in kn.fit(task.network, plain, task.load()[0], task.loss, pre, batch=12, steps=4):
        assert progress.loss == tuned[progress.step][0]
    pre = kf.Preconditioner(METHOD, schedules=kf.Schedules(l2=online.found[0].l2), step=kf.SelfTuning())
    state = tuned[4][1]
    for progress in kn.fit(
        task.network, plain, task.load()[0], task.loss, pre, batch=12, steps=6, state=state, start=4
    ):
        assert progress.loss == tuned[progress.step][0]


def test_a_layer_without_a_maximum_keeps_its_penalty_and_says_so():
    """theta = 0: the evidence grows with p for ever."""
    _, online, params = begun(every=4)
    _, state = after(online, params, 4, at=4)
    online.begin(0.02)
    first = next(iter(params))
    online.tune(4, {**params, first: 0 * params[first]}, online.task.load()[0], state)
    assert online.found[-1].codes[first] == "UNCONVERGED"
    assert online.l2[first] == 0.02
    assert all(online.l2[name] != 0.02 for name in params if name != first)


def test_a_method_without_curvature_is_refused_before_the_first_step():
    _, online, params = begun(every=4, method=kf.FNGD())
    with pytest.raises(ValueError, match="FNGD keeps no curvature whose eigenvectors can be had"):
        next(online.fit(params, online.task.load()[0], steps=4))


@pytest.mark.parametrize(
    ("every", "l2", "message"),
    [
        (0, 0.1, "every is 0; need at least 1 step"),
        (1, 0.0, "l2 is 0.0; need a positive number"),
        (1, {"dense0": 0.1}, "need a positive number, one or one for each of"),
        (1, {"dense0": 0.1, "dense2": float("inf")}, "need a positive number"),
    ],
)
def test_wrong_arguments(every, l2, message):
    with pytest.raises(ValueError, match=message):
        begun(every, l2)


@pytest.fixture(scope="module")
def tuned_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    return out, run("train", "digits-classifier", "--tune-l2", "--steps", 8, "--out", out)


def test_the_command_shows_and_keeps_what_it_found(tuned_run):
    out, result = tuned_run
    assert result.exit_code == 0
    assert "l2 tuned 1 times" in " ".join(result.stdout.split())  # 1,437 examples in batches of 256: every 6 steps
    found = json.loads((out / "run.json").read_text())["tuned"]["kfac"]
    assert [one["step"] for one in found] == [6]
    meta = kf.metadata(out / "run.safetensors")
    assert meta["l2"] == found[-1]["l2"]
    assert meta["sharing"] == "reduce"


def test_a_tuned_run_goes_on_bit_for_bit(tuned_run, tmp_path):
    file = tuned_run[0] / "run.safetensors"
    command = ("train", "digits-classifier", "--tune-l2", "--steps", 14, "--out")
    assert run(*command, tmp_path / "on", "--resume", file).exit_code == 0
    assert run(*command, tmp_path / "whole").exit_code == 0
    on = kf.load(tmp_path / "on" / "run.safetensors")["params"]
    whole = kf.load(tmp_path / "whole" / "run.safetensors")["params"]
    for name, theta in whole.items():
        np.testing.assert_array_equal(on[name], theta)
    assert (
        kf.metadata(tmp_path / "on" / "run.safetensors")["l2"]
        == json.loads((tmp_path / "whole" / "run.json").read_text())["tuned"]["kfac"][-1]["l2"]
    )


def test_what_cannot_be_tuned_or_gone_on_with_is_refused(tuned_run):
    file = tuned_run[0] / "run.safetensors"
    classifier = ("train", "digits-classifier", "--steps", 10)
    for arguments, message in (
        (("train", "digits-autoencoder", "--tune-l2"), "--tune-l2 needs a classifier"),
        ((*classifier, "--tune-l2", "--method", "fngd"), "FNGD keeps no curvature"),
        ((*classifier, "--sharing", "mean"), "--sharing is 'mean'; there are expand, reduce"),
        ((*classifier, "--sharing", "reduce", "--method", "identity"), "--sharing reduce: identity has no such choice"),
        ((*classifier, "--resume", file), "is a run with --tune-l2: it goes on as it began"),
        ((*classifier, "--tune-l2", "--sharing", "expand", "--resume", file), "a run of --sharing reduce, not expand"),
        (("train", "poisson-2d", "--tune-l2"), "--tune-l2: not for poisson-2d"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("l2", [{"dense0": 1.0}, 3, {"dense0": -1.0, "dense2": 1.0, "dense4": 1.0}, "x"])
def test_damaged_penalties_of_a_file_are_refused(tuned_run, tmp_path, l2):
    file = tuned_run[0] / "run.safetensors"
    kf.save(tmp_path / "x", kf.load(file), **{**kf.metadata(file), "l2": l2})
    result = run("train", "digits-classifier", "--tune-l2", "--steps", 10, "--resume", tmp_path / "x")
    assert result.exit_code == 2
    assert "has damaged metadata: l2 is" in " ".join(result.stderr.split())


def test_a_network_level_method_alone_is_refused():
    task = small_task()
    pre = kf.Preconditioner(network=kf.TwoLevel(kf.KFAC()))
    run = kn.Online(pre, task, 0.1, 2)
    with pytest.raises(ValueError, match="says no curvature layer by layer"):
        next(run.fit(task.network.init(np.random.default_rng(1), np.asarray), task.load()[0], steps=2))
