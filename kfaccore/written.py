"""A file that is there whole or not at all, whatever stops the writer."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MARK = ".writing"


@contextmanager
def written(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, to write to: it takes the name `path` in one step when the block ends,
    and is removed if that fails.

    Links are followed and the umask holds; an existing file keeps its permissions. What a killed process of this
    machine left under this name is removed. Raises OSError as the file system does, the old file untouched.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; need the name of a file")
    _sweep(target)
    owner = f"{platform.node()}-{os.getpid()}-{threading.get_ident()}"
    temporary = target.with_name(f".{target.stem}.{owner}{_MARK}{target.suffix}")
    try:
        yield temporary
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o777)
        _flush(temporary)
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """To the disk, so that no power cut leaves the new name on an empty file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sweep(target: Path) -> None:
    """Remove temporary files of `target` whose process is gone."""
    here = f".{target.stem}.{platform.node()}-"
    for left in target.parent.glob(f".*{_MARK}{target.suffix}"):
        if not left.name.startswith(here):
            continue
        process = left.name[len(here) :].split("-")[0]
        if process.isdigit() and not _alive(int(process)):
            with suppress(OSError):
                left.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
