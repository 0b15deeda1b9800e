"""Which ranks still live: what each leaves in the store while all is well, and who is named when a collective fails."""

from __future__ import annotations

import os
import platform
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds in which a process that was killed is gone, and the others have said why they stop
PAUSE = 0.02  # between two looks
_HERE: Counter[tuple[int, ...]] = Counter()  # roll calls so far, by ranks: all of these make them in the same order


@dataclass(frozen=True, eq=False)
class RollCall:
    """The global `ranks` that share collectives, `rank` this one, and where their processes are.

    Made on all of them at once; RuntimeError naming the first that does not come.
    """

    store: Any
    rank: int
    ranks: tuple[int, ...]
    number: int = field(init=False)
    processes: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", _HERE[self.ranks])
        _HERE[self.ranks] += 1
        self.store.set(self._key("process", self.rank), f"{machine()} {os.getpid()}")
        found = {}
        for rank in self.others:
            try:
                found[rank] = self.store.get(self._key("process", rank)).decode()
            except RuntimeError as error:
                raise RuntimeError(f"rank {self.rank} waits in vain for rank {rank} to begin: {error}") from error
        object.__setattr__(self, "processes", found)

    @property
    def others(self) -> list[int]:
        """The ranks but this one."""
        return [rank for rank in self.ranks if rank != self.rank]

    def enters(self, turn: int, what: str = "") -> None:
        """This rank begins its collective `turn`, in a call of `what`, if it is one that every rank must make."""
        self.store.set(self._key("turn", self.rank), f"{turn} {what}")

    def failed(self, error: Exception) -> None:
        """This rank stops for an error of its own, unless it stops for others' already."""
        self._leave("failed", f"{error}"[:500])

    def blame(self, turn: int) -> str:
        """Which ranks left word, died, fell behind or give no sign of life; the others learn that this one stops."""
        self._leave("stops", "")
        self._wait(lambda: bool(self._named(turn)))
        found = self._named(turn)
        if found:
            self._leave("stops", "; ".join(found))
        else:
            found = self._unnamed(turn)
        if self.rank == 0:  # the store may live here, and the others have to read it
            self._wait(lambda: not self._silent())
        return "; ".join([*self._alone(), *found])

    def _named(self, turn: int) -> list[str]:
        """What is known for sure, or from a rank that knows it."""
        gone = [rank for rank in self.others if _gone(self.processes[rank])]
        try:
            failed = self._said("failed")
            stops = self._said("stops")
            died = [rank for rank in gone if rank not in failed | stops]
            before = [rank for rank in died if self._turn(rank) < turn]
        except RuntimeError:
            return [f"the processes of ranks {gone} are gone, and the store with them"] if gone else []
        words = [f"rank {rank} failed with: {said}" for rank, said in failed.items()]
        if before:
            words.append(f"ranks {before} died or hang before collective {turn}: their processes are gone")
        if len(before) < len(died):
            inside = [rank for rank in died if rank not in before]
            words.append(f"ranks {inside} died inside collective {turn}: their processes are gone")
        told = [f"rank {rank} stops, for {said}" for rank, said in stops.items() if said]
        return words or told[:1]

    def _unnamed(self, turn: int) -> list[str]:
        """What is left to say of ranks on other machines, and of those that hang."""
        try:
            behind = [rank for rank in self._silent() if self._turn(rank) < turn]
            if behind:
                return [f"ranks {behind} died or hang before collective {turn}, or have fewer batches (uneven inputs)"]
            return [f"ranks {self._silent()} give no sign of life inside collective {turn}"]
        except RuntimeError:
            return [f"the host of the store, mostly rank {self.ranks[0]}, is gone"]

    def _silent(self) -> list[int]:
        """Ranks that live, as far as can be seen, and have not said that they stop."""
        said = self._said("failed") | self._said("stops")
        return [rank for rank in self.others if rank not in said and not _gone(self.processes[rank])]

    def _said(self, what: str) -> dict[int, str]:
        """Words of other ranks."""
        keys = {rank: self._key(what, rank) for rank in self.others}
        return {rank: self.store.get(key).decode() for rank, key in keys.items() if self.store.check([key])}

    def _turn(self, rank: int) -> int:
        key = self._key("turn", rank)
        return int(self.store.get(key).decode().split(" ")[0]) if self.store.check([key]) else 0

    def _alone(self) -> list[str]:
        """Calls that every rank must make and not all have made, with who has."""
        made: dict[str, list[int]] = {}
        with suppress(RuntimeError):
            for rank in self.ranks:
                key = self._key("turn", rank)
                word = self.store.get(key).decode() if self.store.check([key]) else ""
                made.setdefault(word.partition(" ")[2], []).append(rank)
        if len(made) < 2:
            return []
        return [
            f"ranks {ranks} alone called {what}, which every rank must call" for what, ranks in made.items() if what
        ]

    def _leave(self, what: str, word: str) -> None:
        with suppress(RuntimeError):  # the store's host may be gone: then nobody is left to read it
            if what == "stops" or not self.store.check([self._key("stops", self.rank)]):
                self.store.set(self._key(what, self.rank), word)

    def _key(self, what: str, rank: int) -> str:
        group = zlib.crc32(repr(self.ranks).encode())
        return f"kfaccore/{group}/{self.number}/{what}/{rank}"

    @staticmethod
    def _wait(done: Callable[[], bool]) -> None:
        """Until then, or until the grace is over."""
        end = time.monotonic() + GRACE
        with suppress(RuntimeError):
            while not done() and time.monotonic() < end:
                time.sleep(PAUSE)


def machine() -> str:
    """Where a process number means the same process."""
    with suppress(OSError):
        return f"{platform.node()}:{os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _gone(process: str) -> bool:
    """Whether a process of this machine has ended; not known, so False, of one elsewhere."""
    place, _, number = process.rpartition(" ")
    if place != machine():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    with suppress(OSError, IndexError):  # ended, but nobody has asked how
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return False
