"""The core's state as bytes for Keras's files: layers are told by their order where Keras named them anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tensorflow as tf

import kfaccore as kf


class Checkpointed(tf.train.experimental.PythonState):
    """What `tf.train.Checkpoint` saves of the curvature of a model: the bytes of `model.curvature`, which it sets."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def serialize(self) -> bytes:
        """None as no bytes."""
        return self.model.curvature or b""

    def deserialize(self, string_value: bytes) -> None:
        """The inverse of `serialize`."""
        self.model.curvature = string_value or None


def saved(state: Any, names: Sequence[str]) -> bytes:
    """One safetensors file, with the names of its layers in order."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "state")
        kf.save(path, state, parts=list(names))
        return path.read_bytes()


def restored(given: bytes, like: Any, names: Sequence[str]) -> Any:
    """The state in such a file, less layers that were frozen since; ValueError when it is of other layers or settings
    than `like`."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "state")
        path.write_bytes(given)
        theirs = kf.metadata(path).get("parts", [])
        if not isinstance(theirs, list) or not all(isinstance(name, str) for name in theirs):
            raise ValueError(f"the state has damaged metadata: parts is {theirs!r:.80}; need names of layers")
        if set(theirs) != set(names) and len(theirs) == len(names):
            kf.save(path, _renamed(kf.load(path), dict(zip(theirs, names, strict=True)), set(theirs)))
        elif set(names) < set(theirs):
            kf.save(path, _renamed(kf.load(path), {name: name for name in names}, set(theirs)))
        return kf.load(path, like=like)


def parts_in(given: bytes) -> list[str]:
    """The layers of such a file."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "state")
        path.write_bytes(given)
        return list(kf.metadata(path).get("parts", []))


def _renamed(tree: Any, names: dict[str, str], known: set[str]) -> Any:
    """The same tree, its dicts of `known` layers keyed by other names, those without one left out."""
    if not isinstance(tree, dict):
        return tree
    if tree and set(tree) <= known:
        return {names[key]: _renamed(value, names, known) for key, value in tree.items() if key in names}
    return {key: _renamed(value, names, known) for key, value in tree.items()}
