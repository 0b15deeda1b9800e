"""Trees on disk: one safetensors file, written atomically, readable by every framework.

Leaves are stored under their tree paths ("layers/fc1/A"); the header carries a schema number and the caller's meta as
JSON. A tree with a dataclass of `tree.kept` in it also has its structure there, so that it is read back as what it was.
Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from kfaccore import tree as trees
from kfaccore.outline import filled, outline
from kfaccore.tree import Tree
from kfaccore.written import written
from kfaccore.xp.arrays import from_host, namespace, to_host

SCHEMA = 1
_NEEDED = "a file of kfaccore's save or save_records, or of `kfaccore train --out`"
_KINDS = {  # first bytes: what begins so
    b"PK": "a zip archive, as torch.save, Keras and NumPy write",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x80": "a pickle, which is never read",
}


def save(path: str | os.PathLike, tree: object, **meta: object) -> None:
    """Write the leaves of `tree` and JSON-able `meta` to `path`; the old file stays until the new one is complete.

    Arrays and NumPy's numbers in `meta` are written as lists and numbers. Raises TypeError for leaves that are neither
    arrays nor numbers and for meta that JSON has no form for, ValueError for two leaves of one path, OSError as the
    file system does.
    """
    from safetensors.numpy import save as serialise

    arrays = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in flatten(tree).items()}
    header = {"kfaccore": str(SCHEMA), "meta": _text(meta)}
    structure = outline(tree)
    if structure is not None:
        header["structure"] = structure
    data = serialise(arrays, header)
    with written(path) as file:
        file.write_bytes(data)


def _text(meta: dict[str, object]) -> str:
    """Meta as JSON; TypeError that names what has no form there."""
    for name, value in meta.items():
        try:
            json.dumps(value, default=_plain)
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise TypeError(
                f"meta {name!r} is a {kind} that JSON has no form for ({error}); give numbers, text, lists"
            ) from error
    return json.dumps(meta, default=_plain)


def _plain(value: Any) -> object:
    """An array or a number of one as lists and numbers of Python."""
    if hasattr(value, "shape"):
        return to_host(value).tolist()
    raise TypeError(f"a {type(value).__name__}")


def flatten(tree: object) -> dict[str, np.ndarray]:
    """The leaves of `tree` by path, on the host; they may share memory with it.

    Raises TypeError for leaves that are neither arrays nor numbers, ValueError for two leaves of one path.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in trees.items(tree):
        if not hasattr(leaf, "shape") and not isinstance(leaf, int | float):
            raise TypeError(f"leaf {name!r} is a {type(leaf).__name__}; need arrays or numbers")
        if isinstance(leaf, np.ma.MaskedArray) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "cOSUmM"):
            raise TypeError(f"leaf {name!r} is a {type(leaf).__name__} of {leaf.dtype}; need arrays of real numbers")
        if name in arrays:
            raise ValueError(f"two leaves share the path {name!r}: rename one (a key may hold no '/')")
        arrays[name] = to_host(leaf)
    return arrays


def unflatten(arrays: dict[str, np.ndarray], like: Tree, source: str = "the state") -> Tree:
    """The inverse of `flatten`: copies, shaped, typed and placed like `like`. A matrix of one block is the same with
    its blocks axis and without it, as frameworks have either.

    Raises ValueError, naming `source` and leaf, when the leaves are not those of `like`.
    """
    if not isinstance(arrays, dict) or not all(isinstance(x, np.ndarray) for x in arrays.values()):
        raise ValueError(f"{source} is no dict of arrays by path: got {type(arrays).__name__}")
    wanted = dict(trees.items(like))
    for _, later in sorted(trees.later(like).items(), reverse=True):  # a file of before lacks all of the newest eras
        if later & set(arrays):
            break
        arrays = {**arrays, **{name: np.zeros_like(to_host(wanted[name])) for name in later}}
    if set(wanted) != set(arrays):
        missing = sorted(set(wanted) - set(arrays))
        extra = sorted(set(arrays) - set(wanted))
        raise ValueError(f"{source} holds other leaves than asked for: missing {missing[:5]}, unexpected {extra[:5]}")
    for name, leaf in wanted.items():
        if _blockless(arrays[name].shape) != _blockless(tuple(np.shape(leaf))):
            raise ValueError(f"{source}: leaf {name!r} has shape {arrays[name].shape}; need {tuple(np.shape(leaf))}")
    leaves = iter([_placed(arrays[name].reshape(np.shape(leaf)), leaf) for name, leaf in wanted.items()])
    return trees.map(lambda _: next(leaves), like)


def load(path: str | os.PathLike, like: Any = None) -> Any:
    """The tree in `path`: shaped, typed and placed like `like`; without it as it was saved where its classes are
    `tree.kept` (Posterior, Curvature, Basis), on NumPy, or nested dicts of NumPy arrays.

    Raises ValueError, naming file and leaf, when the file is damaged or its leaves are not those of `like`;
    FileNotFoundError when there is none.
    """
    arrays, _, structure = _read(path)
    if like is not None:
        return unflatten(arrays, like, str(path))
    return _nested(arrays) if structure is None else filled(structure, arrays, str(path))


def metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The meta given to `save`."""
    return Opened(path).meta


class Opened:
    """A file of `save` whose leaves are read when they are asked for: `names`, `file[name]`, and its `meta`.

    Raises FileNotFoundError, and ValueError naming the file, for what is no such file or cannot be read as arrays.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        if Path(path).is_dir():
            raise FileNotFoundError(f"{path} is a folder, not a file; a run's file in its folder is run.safetensors")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is not a file")
        with self._readable():
            from safetensors import safe_open

            self._file = safe_open(path, framework="numpy")
            header = self._file.metadata() or {}
            self.names = list(self._file.keys())
        self.structure = header.get("structure")
        if "kfaccore" not in header:
            raise ValueError(
                f"{path} was not written by kfaccore: it holds arrays, and nothing says of what; need {_NEEDED}"
            )
        if header["kfaccore"] != str(SCHEMA):
            raise ValueError(f"{path} has kfaccore schema {header.get('kfaccore')}; this version reads {SCHEMA}")
        try:
            self.meta: dict[str, Any] = json.loads(header.get("meta", ""))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} has damaged metadata: {error}") from error
        if not isinstance(self.meta, dict):
            raise ValueError(f"{path} has damaged metadata: need an object, got {type(self.meta).__name__}")

    def __getitem__(self, name: str) -> np.ndarray:
        with self._readable():
            return self._file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the leaf."""
        with self._readable():
            return tuple(self._file.get_slice(name).get_shape())

    @contextmanager
    def _readable(self) -> Iterator[None]:
        from safetensors import SafetensorError

        # dtypes that NumPy does not have end as TypeError, AttributeError or KeyError
        kinds = (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError)
        try:
            yield
        except kinds as error:
            raise ValueError(f"{self.path} is not a readable safetensors file{_instead(self.path)}: {error}") from error


def _instead(path: str | os.PathLike) -> str:
    """What a file is that is none of ours, and what is needed, where its first bytes tell."""
    with suppress(OSError), Path(path).open("rb") as file:
        start = file.read(4)
        for magic, kind in _KINDS.items():
            if start.startswith(magic):
                return f" but {kind}; need {_NEEDED}"
    return ""


def _read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any], Any]:
    file = Opened(path)
    return {name: file[name] for name in file.names}, file.meta, file.structure


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, array in sorted(arrays.items()):
        *folders, last = name.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"leaf {name!r} lies under another leaf")
        node[last] = array
    return root


def _blockless(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix without its axis of one block."""
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _placed(array: np.ndarray, like: Any) -> Any:
    """`array` as the kind of leaf `like` is."""
    if isinstance(like, int | float):
        return type(like)(array.item())
    placed = from_host(array, like)
    if array.dtype == np.float32 and str(like.dtype) == "torch.bfloat16":
        return namespace(like).astype(placed, like.dtype)  # as which it was widened to be saved
    if placed.dtype != like.dtype:
        raise ValueError(f"a leaf of dtype {array.dtype} was saved where {like.dtype} is needed")
    return placed
