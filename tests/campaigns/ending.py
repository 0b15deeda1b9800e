"""What the campaigns' command lines share: their options, and the line that ends them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_SHOWN = 40


def options(page: str | None, count: int) -> argparse.ArgumentParser:
    """A command line with --count and --seed, described by the first line of a module's page."""
    parser = argparse.ArgumentParser(description=(page or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def ended(done: str, broken: Sequence[str]) -> int:
    """Print the first broken promises and the verdict, in what any terminal has; the exit status."""
    for line in broken[:_SHOWN]:
        print("   ", line.encode("ascii", "backslashreplace").decode())
    print(f"{done}: {len(broken)} broken promises")
    return 1 if broken else 0
