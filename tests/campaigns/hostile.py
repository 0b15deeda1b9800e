"""Hostile files: mutations of files this library writes, and of plain .npz, read by everything that reads.

`python tests/campaigns/hostile.py [--count N] [--seed S]`. What is promised: a file is read, or ValueError; at most
four times its bytes (and 2 MiB) are allocated, and an .npz may not grow beyond the limit of `load_records`.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import tempfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kfaccore as kf
from campaigns.ending import ended, options

FREE = 2 << 20  # bytes that reading may take beside four times the file
WORK = 64 << 20  # the same where something is computed
UNPACKED = 300 << 20  # the limit of an .npz, and some room
HUGE = [10**15, 2 * 10**9, -1, 0, 1.5, "7", None, [], {}, [[[[1]]]], True, float("1e300")]
READERS: list[Callable[[Path], object]] = [kf.load, kf.metadata, kf.load_records, kf.saved, kf.analysis.report]


def originals(rng: np.random.Generator, folder: Path) -> list[Path]:
    """A file of records of every kind of input, one of a state, and an .npz."""
    g = rng.normal(size=(2, 1, 4, 3, 2))
    mask = np.ones((4, 3), dtype=bool)
    image = kf.Patches(rng.normal(size=(4, 4, 4, 2)), kf.Window((2, 2)))
    records = {
        "dense": kf.Record(rng.normal(size=(1, 4, 3, 5)), g, 4.0, mask),
        "words": kf.Record(kf.Ids(rng.integers(0, 9, size=(4, 3)), 9), g, 4.0),
        "conv": kf.Record(image, rng.normal(size=(2, 1, 4, 9, 2)), 4.0, ids=np.arange(4)),
    }
    kf.save_records(folder / "records.safetensors", records, model="a model", clocks=[1, 2])
    state = kf.settle(kf.EKFAC(), records["dense"])
    kf.save(folder / "state.safetensors", {"params": {"dense": g[0, 0, 0]}, "state": state}, task="t")
    pre = kf.Preconditioner(kf.EKFAC())
    run = pre.init({"dense": kf.Block.of(records["dense"])}, records["dense"].g)
    run = pre.step(run, {"dense": records["dense"]}, {"dense": np.ones((2, 5))})[1]
    told = kf.describe(pre, run) | {"method": "ekfac"}
    kf.save(
        folder / "run.safetensors",
        {"params": {"dense": np.ones((2, 5))}, "state": run},
        **told,
    )
    arrays = {"dense.a": rng.normal(size=(4, 3, 5)), "dense.g": g[0, 0], "dense.n": np.array(4.0)}
    np.savez(folder / "records.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    return sorted(folder.iterdir())


def mutated(data: bytes, suffix: str, rng: np.random.Generator) -> bytes:
    """One mutation: bytes flipped, cut, repeated or joined, or a field of the header replaced by something else."""
    kind = rng.integers(5)
    if kind == 0:
        return data[: rng.integers(len(data))]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(rng.integers(1, 9)):
            flipped[rng.integers(min(len(flipped), int(rng.choice([1500, 10**9]))))] = int(rng.integers(256))
        return bytes(flipped)
    if kind == 2:
        at = int(rng.integers(len(data)))
        return data[:at] + data[: rng.integers(len(data))] + data[at:]
    return _npz(data, rng) if suffix == ".npz" else _header(data, rng)


def _header(data: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file with one field of its header, or of its metadata, replaced."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.5:
        meta = json.loads(header["__metadata__"]["meta"])
        _replace(meta, rng)
        header["__metadata__"]["meta"] = _nested() if rng.random() < 0.1 else json.dumps(meta)
    else:
        _replace(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _nested() -> str:
    return "[" * 20000 + "]" * 20000


def _replace(tree: dict | list, rng: np.random.Generator) -> None:
    """Put something else in a random place of a JSON tree."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = keys[rng.integers(len(keys))]
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
            node[key] = HUGE[rng.integers(len(HUGE))]
            return
        node = node[key]


def _npz(data: bytes, rng: np.random.Generator) -> bytes:
    """An .npz with an array of another kind, one that claims a great shape, or zeros that pack to nothing."""
    with np.load(io.BytesIO(data)) as found:
        arrays = dict(found)
    name = list(arrays)[rng.integers(len(arrays))]
    kind = rng.integers(4)
    out = io.BytesIO()
    if kind == 0:
        arrays[name] = np.array(["text"])
    if kind == 1:
        arrays[name] = np.zeros((3000, 3000), np.float32)
        np.savez_compressed(out, **arrays)
        return out.getvalue()
    if kind == 2:
        arrays[name] = arrays[name].astype(complex)
    np.savez(out, **arrays)
    if kind < 3:
        return out.getvalue()
    claimed = io.BytesIO()
    with zipfile.ZipFile(claimed, "w") as file:
        for other, x in arrays.items():
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                head, {"descr": "<f8", "fortran_order": False, "shape": (10**12,) if other == name else x.shape}
            )
            file.writestr(f"{other}.npy", head.getvalue() + np.ascontiguousarray(x, "<f8").tobytes())
    return claimed.getvalue()


def verdict(path: Path, reader: Callable[[Path], object]) -> str:
    """ "read", "refused", or what broke the promise."""
    tracemalloc.start()
    try:
        reader(path)
        found = "read"
    except ValueError:
        found = "refused"
    except Exception as error:
        found = f"raised {type(error).__name__}: {error}"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    free = WORK if reader is kf.analysis.report else FREE
    allowed = 4 * path.stat().st_size + (UNPACKED if path.suffix == ".npz" else free)
    return found if peak <= allowed else f"allocated {peak} bytes for a file of {path.stat().st_size}"


def campaign(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each verdict came in `count` mutations, and the broken promises."""
    seen: Counter[str] = Counter()
    broken: list[str] = []
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [(path.suffix, path.read_bytes()) for path in originals(rng, folder)]
        for number in range(count):
            suffix, data = files[number % len(files)]
            path = folder / f"mutant{suffix}"
            path.write_bytes(mutated(data, suffix, np.random.default_rng([seed, number])))
            for reader in READERS if suffix != ".npz" else [kf.load_records, kf.analysis.report]:
                found = verdict(path, reader)
                seen[found.split()[0]] += 1
                if found not in ("read", "refused"):
                    broken.append(f"mutation {number} of {suffix}, {reader.__name__}: {found}")
    return seen, broken


def main() -> int:
    given = options(__doc__, 300).parse_args()
    seen, broken = campaign(given.count, given.seed)
    return ended(f"hostile: {given.count} mutations, {dict(seen)}", broken)


if __name__ == "__main__":
    sys.exit(main())
