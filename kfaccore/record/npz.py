"""Arrays of an .npz that nobody vouches for: nothing is unpickled, and nothing larger than told is allocated."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np

_BROKEN = (OSError, BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error)  # archives
_WRONG = (ValueError, KeyError, MemoryError)  # arrays


class Npz:
    """An .npz of at most `unpacked` bytes (or four times the file, where that is more): `names`, and `file[name]`.

    Raises ValueError for what is not an .npz of numbers, or is larger; FileNotFoundError when there is no file.
    """

    def __init__(self, path: Path, unpacked: int) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path} is {'a folder' if path.is_dir() else 'not a file'}")
        limit = max(unpacked, 4 * path.stat().st_size)
        with self._readable():
            self._archive = ZipFile(path)
            members = self._archive.infolist()
            total = sum(member.file_size for member in members)
            if total > limit:
                raise ValueError(f"it unpacks to {total} bytes, and {limit} are allowed: raise `unpacked`")
        self._members = {member.filename.removesuffix(".npy"): member for member in members}
        self.names = list(self._members)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._members:
            raise ValueError(f"{self.path} has no array {name!r}, only {', '.join(self.names[:8]) or 'none'}")
        with self._readable():
            return _array(self._archive, self._members[name])

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (*_BROKEN, *_WRONG) as error:
            raise ValueError(f"{self.path} is not a readable .npz of arrays: {error}") from error


def _array(archive: ZipFile, member: ZipInfo) -> np.ndarray:
    """One array, whose header is believed only as far as there are bytes."""
    with archive.open(member) as file:
        shape, dtype = _header(file)
        wanted = math.prod(shape) * dtype.itemsize
        found = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"array {member.filename!r} is of Python objects; need numbers")
    if wanted != found:
        raise ValueError(f"array {member.filename!r} claims {wanted} bytes, shape {shape}, and has {found}")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"an array of .npy version {version}; this reads 1.0 and 2.0")
    shape, _, dtype = readers[version](file)
    return shape, dtype
