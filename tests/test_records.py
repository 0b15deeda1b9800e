"""Records on disk: what is written is what is read, whatever wrote it; what is not a record is named."""

from __future__ import annotations

import contextlib
import json
import struct

import numpy as np
import pytest

import kfaccore as kf
from rows import arrays


def same(got, want):
    assert type(got.a) is type(want.a)
    for left, right in ((got.rows(), want.rows()), (got.g, want.g)):
        assert np.array_equal(left, right)
        assert left.dtype == right.dtype
    assert got.n == want.n
    for name in ("mask", "ids"):
        left, right = getattr(got, name), getattr(want, name)
        assert (left is None) == (right is None)
        assert left is None or np.array_equal(left, right)


def records(rng, put=np.array):
    image = kf.Patches(put(rng.normal(size=(5, 4, 4, 2)).astype("f4")), kf.Window((2, 2), 2, 1), bias=True)
    g = put(rng.normal(size=(2, 5, 9, 3)).astype("f4"))
    a, gs = arrays(rng)
    mask = put(rng.uniform(size=(5, 3)) > 0.4)
    ids = put(np.arange(5))
    return {
        "z/conv": kf.Record(image, g, 5.0),
        "fc": kf.Record(put(a), put(gs), 2.5, mask, ids),
        "table": kf.Record(kf.Ids(put(rng.integers(0, 6, (5, 2))), 6), put(rng.normal(size=(5, 2, 2))), 5.0),
    }


def test_every_kind_comes_back(xp, tmp_path):
    want = records(np.random.default_rng(3))
    given = records(np.random.default_rng(3), xp.put)
    grads = {"fc": xp.put(np.ones((2, 3, 4))), "table": kf.Factored(xp.put(np.eye(2)), xp.put(np.eye(2)), 2.0)}
    kf.save_records(tmp_path / "x", given, grads, seed=7)
    got, kept = kf.load_records(tmp_path / "x")
    assert list(got) == list(want)
    for name, record in want.items():
        same(got[name], record)
    assert set(kept) == {"fc", "table"}
    np.testing.assert_array_equal(kept["table"][0], np.eye(2) / 2)
    assert kf.metadata(tmp_path / "x")["seed"] == 7


def test_files_join_as_micro_batches(rng, tmp_path):
    a, g, grad = rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), rng.normal(size=(2, 3, 4))
    parts = [kf.Record(a[:2], g[:2], 2.0), kf.Record(a[2:], g[2:], 4.0)]
    for i, part in enumerate(parts):
        kf.save_records(tmp_path / f"{i}", {"fc": part}, {"fc": grad[i]})
    got, grads = kf.load_records(tmp_path / "0", tmp_path / "1")
    same(got["fc"], kf.Record(a, g, 6.0))
    np.testing.assert_allclose(grads["fc"], (2 * grad[0] + 4 * grad[1]) / 6, rtol=1e-15)


def test_a_raw_npz_serves(rng, tmp_path):
    a, g = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    np.savez(tmp_path / "x.npz", **{"net.fc.a": a, "net.fc.g": g, "out.a": g, "out.g": a, "out.n": 3.0})
    got, grads = kf.load_records(tmp_path / "x.npz")
    same(got["net.fc"], kf.Record(a, g, 6.0))
    same(got["out"], kf.Record(g, a, 3.0))
    assert grads == {}


def test_what_the_numpy_adapter_saves(tmp_path):
    import kfaccore_numpy as kn

    task = kn.TASKS["curves-autoencoder"]
    net, rng = kn.Sequential((6,), (kn.Dense(4), kn.Tanh(), kn.Dense(6))), np.random.default_rng(0)
    params, x = net.init(rng, np.float64), rng.normal(size=(5, 6))
    kn.save_records(tmp_path / "x", net, params, (x, x), task.loss, seed=3)
    got, grads = kf.load_records(tmp_path / "x")
    assert {name: kf.Block.of(r) for name, r in got.items()} == net.blocks()
    f, tape = net.forward(params, x)
    g = net.backward(params, tape, task.loss.gradient(f, x))
    for name, grad in net.gradients(tape, g, 5.0, factored=False).items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-12)
        np.testing.assert_allclose(got[name].a, net.records(tape, g, 5.0)[name].a, rtol=1e-12)
    again = tmp_path / "again"
    kn.save_records(again, net, params, (x, x), task.loss, seed=3)
    for name, record in kf.load_records(again)[0].items():
        same(record, got[name])


def _npz(**arrays):
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"PK not a zip"), "is not a readable .npz"),
        (_npz(fc=np.ones(3)), "array 'fc' is not named layer.a"),
        (_npz(**{"fc.a": np.ones((3, 2))}), r"layer 'fc': found \['a'\]; need a .* and g"),
        (_npz(**{"fc.a": np.ones((3, 2)), "fc.g": np.ones((4, 2))}), "layer 'fc': batch is 3 in a"),
        (_npz(**{"fc.a": np.ones((3, 2)), "fc.g": np.ones((3, 2)), "fc.n": -1.0}), "n is -1.0"),
        (
            _npz(**{"fc.a": np.ones((3, 2)), "fc.g": np.ones((3, 2)), "fc.n": [3.0]}),
            r"n has shape \(1,\); need one number",
        ),
        (_npz(), "holds no arrays"),
    ],
)
def test_what_is_not_a_record_is_named(tmp_path, write, message):
    path = tmp_path / "x.npz"
    write(path)
    with pytest.raises(ValueError, match=message):
        kf.load_records(path)


def test_other_files(rng, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        kf.load_records(tmp_path / "nowhere.safetensors")
    kf.save(tmp_path / "state", {"A": np.ones(3)})
    with pytest.raises(ValueError, match="holds no records"):
        kf.load_records(tmp_path / "state")
    for name in ("one", "two"):
        kf.save_records(tmp_path / name, {name: kf.Record(np.ones((3, 2)), np.ones((3, 2)), 3.0)})
    with pytest.raises(ValueError, match=r"two has layers \['two'\], .*one has \['one'\]"):
        kf.load_records(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("size", [2 * 10**9, 10**15, 2**62, -1])
def test_a_size_that_is_only_said_is_not_allocated(rng, tmp_path, size):
    path = tmp_path / "x.safetensors"
    record = kf.Record(kf.Ids(rng.integers(0, 9, size=(4, 3)), 9), rng.normal(size=(1, 1, 4, 3, 2)), 4.0)
    kf.save_records(path, {"words": record})
    tree = kf.load(path)
    tree["records"]["words"]["size"] = np.array(size)
    kf.save(path, tree)
    for read in (kf.load_records, kf.analysis.report):
        with pytest.raises(ValueError, match="layer 'words': "):
            read(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BF16", "C64", "no"])
def test_dtypes_that_numpy_does_not_have(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    size = {"BF16": 2, "C64": 8}.get(dtype, 1)
    text = {"__metadata__": {"kfaccore": "1", "meta": "{}"}}
    text["a"] = {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}
    header = json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * size))
    for read in (kf.load, kf.load_records):
        with contextlib.suppress(ValueError):
            read(path)
