"""One file for a tree: round trips, damage and interrupted writes."""

from __future__ import annotations

import errno
import json
import os
import platform
import struct
import subprocess
import sys

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree


def fitted(rng, put=np.array):
    record = kf.Record(put(rng.normal(size=(6, 4))), put(rng.normal(size=(6, 3))), 6.0)
    pre = kf.Preconditioner(kf.EKFAC(), step=kf.Fixed(0.1, 0.9))
    state = pre.init({"fc": kf.Block(3, 4)}, record.a)
    return pre.step(state, {"fc": record}, {"fc": put(np.ones((3, 4)))})[1]


def test_round_trip(xp, rng, tmp_path):
    state, path = fitted(rng, xp.put), tmp_path / "x.safetensors"
    kf.save(path, {"state": state, "tuple": (xp.put(np.arange(3)), 2.5)}, note="hello", rates={"a": 0.1})
    like = {"state": state, "tuple": (xp.put(np.zeros(3, int)), 0.0)}
    back = kf.load(path, like=like)
    assert type(back["state"]) is type(state)
    assert back["state"].blocks == state.blocks
    assert (back["state"].step, back["tuple"][1]) == (1, 2.5)
    for (name, x), (_, y) in zip(tree.items(state), tree.items(back["state"]), strict=True):
        assert type(x) is type(y), name
        x, y = (xp.get(v) if hasattr(v, "shape") and not isinstance(v, np.ndarray) else v for v in (x, y))
        assert np.array_equal(x, y), name
    assert kf.metadata(path) == {"note": "hello", "rates": {"a": 0.1}}


def test_without_like_nested_numpy(rng, tmp_path):
    state, path = fitted(rng), tmp_path / "x.safetensors"
    kf.save(path, state)
    found = kf.load(path)
    assert np.array_equal(found["layers"]["fc"]["basis"]["Qa"], state.layers["fc"].basis.Qa)
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 500, -1])
def test_truncated_files_are_refused(rng, tmp_path, keep):
    path = tmp_path / "x.safetensors"
    kf.save(path, fitted(rng))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x.safetensors is not a readable safetensors file"):
        kf.load(path)


def header(text: bytes, tail: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + tail


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63) + b"{}",
        header(b"not json"),
        header(b'{"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 99999]}}', b"12345678"),
        header(b'{"a": {"dtype": "F64", "shape": [1000000000000], "data_offsets": [0, 8]}}', b"12345678"),
        b"\x80\x04\x95pickle",
    ],
)
def test_hostile_files_are_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        kf.load(path)


def test_meta_of_arrays_is_written_and_what_json_has_no_form_for_is_named(xp, tmp_path):
    path = tmp_path / "x.safetensors"
    kf.save(path, {"x": np.ones(2)}, rate=np.float32(0.5), sizes=xp.put(np.arange(3)), nested={"a": [np.int64(2)]})
    assert kf.metadata(path) == {"rate": 0.5, "sizes": [0, 1, 2], "nested": {"a": [2]}}
    before = path.read_bytes()
    with pytest.raises(TypeError, match="meta 'thing' is a dict that JSON has no form for"):
        kf.save(path, {"x": np.ones(2)}, thing={"a": object()})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "was not written by kfaccore: it holds arrays"),
        ({"kfaccore": "99", "meta": "{}"}, "schema 99"),
        ({"kfaccore": "1", "meta": "{"}, "damaged metadata"),
        ({"kfaccore": "1", "meta": "[]"}, "need an object, got list"),
    ],
)
def test_other_files_are_refused(tmp_path, meta, message):
    text = json.dumps({"__metadata__": meta}).encode()
    (tmp_path / "x.safetensors").write_bytes(header(text))
    with pytest.raises(ValueError, match=message):
        kf.load(tmp_path / "x.safetensors")


def test_other_leaves_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    kf.save(path, {"a": np.ones(3), "b": np.ones(2)})
    with pytest.raises(ValueError, match=r"missing \['c'\], unexpected \['b'\]"):
        kf.load(path, like={"a": np.ones(3), "c": np.ones(2)})
    with pytest.raises(ValueError, match=r"leaf 'b' has shape \(2,\); need \(3,\)"):
        kf.load(path, like={"a": np.ones(3), "b": np.ones(3)})
    with pytest.raises(ValueError, match="dtype float64 was saved where float32"):
        kf.load(path, like={"a": np.ones(3), "b": np.ones(2, np.float32)})
    with pytest.raises(FileNotFoundError, match="is not a file"):
        kf.load(tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    ("start", "kind"), [(b"PK\x03\x04", "a zip archive"), (b"\x89HDF\r\n", "an HDF5 file"), (b"\x80\x02", "a pickle")]
)
def test_files_of_others_are_told_what_they_are(tmp_path, start, kind):
    (tmp_path / "x").write_bytes(start + bytes(100))
    with pytest.raises(
        ValueError, match=f"is not a readable safetensors file but {kind}.*need a file of kfaccore's save"
    ):
        kf.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        kf.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    kf.save(path, {"a": np.ones(3)})
    before = path.read_bytes()
    with pytest.raises(TypeError, match="leaf 'b' is a str"):
        kf.save(path, {"a": np.ones(3), "b": "no"})
    with pytest.raises(ValueError, match="two leaves share the path 'a/b'"):
        kf.save(path, {"a/b": np.ones(3), "a": {"b": np.ones(3)}})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        kf.save(path, {"a": np.zeros(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def _tree(number):
    return {"x": np.full(3, float(number))}


def test_save_honours_the_umask_and_keeps_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        kf.save(tmp_path / "new.safetensors", _tree(1))
    finally:
        os.umask(old)
    assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new.safetensors").chmod(0o604)
    kf.save(tmp_path / "new.safetensors", _tree(2))
    assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == 0o604


def test_save_follows_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "there" / "file.safetensors")
    kf.save(tmp_path / "link.safetensors", _tree(1))
    assert (tmp_path / "link.safetensors").is_symlink()
    assert kf.load(tmp_path / "there" / "file.safetensors")["x"][0] == 1.0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, number, where):
    path = tmp_path / "state.safetensors"
    kf.save(path, _tree(1))

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, where, refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        kf.save(path, _tree(2))
    monkeypatch.undo()
    assert kf.load(path)["x"][0] == 1.0
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="need the name of a file"):
        kf.save(tmp_path, _tree(1))


def test_what_a_killed_writer_left_is_swept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours = f".state.{platform.node()}-{gone.pid}-1.writing.safetensors"
    alive = f".state.{platform.node()}-{os.getppid()}-1.writing.safetensors"
    other = f".other.{platform.node()}-{gone.pid}-1.writing.safetensors"
    for name in (ours, alive, other):
        (tmp_path / name).write_bytes(b"half")
    kf.save(tmp_path / "state.safetensors", _tree(1))
    assert {path.name for path in tmp_path.iterdir()} == {"state.safetensors", alive, other}


@pytest.mark.parametrize("found", [None, [1, 2], {"x": "text"}, {"x": [1.0, 2.0, 3.0]}])
def test_malformed_states_are_refused(found):
    with pytest.raises(ValueError, match="the state"):
        kf.unflatten(found, _tree(1))


@pytest.mark.parametrize("method", [kf.EKFAC(), kf.SKFAC(), kf.SKFAC(rows=12)], ids=["ekfac", "skfac", "skfac in rows"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_run_that_goes_on_from_its_file_is_the_same_to_the_bit(method, order, tmp_path):
    """What a step keeps is summed over later; sums are rounded in the order of memory, which a file does not have."""
    rates = kf.Schedules(0.01, 0.9)
    pre = kf.Preconditioner(method, step=kf.SelfTuning(), clocks=kf.Clocks(1, 2), schedules=rates)
    blocks = {"x": kf.Block(23, 37), "y": kf.Block(23, 37), "z": kf.Block(5, 1)}
    like = np.zeros(1, np.float32)

    def step(state, number):
        rng = np.random.default_rng(number)

        def drawn(*shape):
            return np.asarray(rng.normal(size=shape), np.float32, order=order)

        records = {n: kf.Record(drawn(11, b.d_in), drawn(2, 11, b.d_out), 11.0) for n, b in blocks.items()}
        grads = {n: drawn(b.d_out, b.d_in) for n, b in blocks.items()}
        updates, state, _ = pre.step(state, records, grads)
        return updates, state

    state = pre.init(blocks, like)
    for number in range(4):
        _, state = step(state, number)
    kf.save(tmp_path / "state.safetensors", state)
    again = kf.load(tmp_path / "state.safetensors", like=pre.init(blocks, like))
    for number in range(4, 9):
        want, state = step(state, number)
        got, again = step(again, number)
        for name, update in want.items():
            np.testing.assert_array_equal(got[name], update)
