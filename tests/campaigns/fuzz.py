"""Fuzz: every method of METHODS on random records, against the dense float64 formula of its row.

`python tests/campaigns/fuzz.py [--count N] [--namespace numpy] [--only NAME] [--seed S] [--part 0/2]` prints, a method,
how many directions were right with code OK, how many had another code, and every case that breaks a promise:

    wrong      code OK, and the direction is further from the formula than rounding explains
    refused    another code than OK on a finite record of condition <= 1e8 in float64, 1e4 in float32
    nonfinite  a direction that is not finite
    raised     an exception
    modified   an input whose bytes changed

The formulas (tests/formulas.py) use nothing of kfaccore.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns import cycles as cycles_of
from campaigns.ending import ended, options
from conftest import NAMESPACES, Namespace
from formulas import arrays, constant_gradients, one_example, scalars
from rows import METHODS, Row

MANDATORY = {np.dtype(np.float64): 1e8, np.dtype(np.float32): 1e4}  # condition up to which OK must be given
EXPONENT = {np.dtype(np.float64): 30.0, np.dtype(np.float32): 6.0}  # of the scale of a and of g
STARTS_FROM_ONE = {"singd": 0.5, "singd-ikfac": 0.5}  # roots start from I and move by a bounded share of themselves
ENOUGH = {"deflation": 8, "kfac-corrected": 8}  # cycles; of a Kronecker product they find all in the first
LEAST = 0.6  # share of OK below which a method is of no use, such as one that always says UNCONVERGED
SLACK = 300.0  # errors are compared with this many roundings times the condition
N = 2.5


@dataclass(frozen=True)
class Case:
    """One record, a gradient and a damping; `harmed` says that the record was made so that OK is not promised."""

    a: np.ndarray
    g: np.ndarray
    v: np.ndarray
    damping: float
    harmed: bool = False


def sizes(row: Row, rng: np.random.Generator, shapes: int) -> dict[str, int]:
    """Sizes of a record in the row's regime, of at most `shapes` kinds (0: any)."""
    if shapes:
        rng = np.random.default_rng(int(rng.integers(shapes)))
    found = {name: int(rng.integers(1, most)) for name, most in LIMITS.items()}
    if not row.everywhere and row.regime is one_example:
        found |= {"batch": 1, "shared": 1}
    if not row.everywhere and row.regime is scalars:
        found |= {"d_in": 1, "d_out": 1}
    if not row.everywhere and row.regime is constant_gradients:
        found |= {"batch": 1}
    return found


LIMITS = {"blocks": 3, "batch": 7, "shared": 4, "d_in": 6, "d_out": 6, "draws": 3}


def made(row: Row, rng: np.random.Generator, dtype: np.dtype, shapes: int = 0) -> Case:
    """One random case for a row."""
    a, g = arrays(rng, **sizes(row, rng, shapes))
    if not row.everywhere and row.regime is constant_gradients:
        g = np.repeat(g[..., :1, :], g.shape[-2], axis=-2)
    v = rng.normal(size=(len(a), g.shape[-1], a.shape[-1]))
    kind = rng.choice(["plain", "dead", "nan", "zero"], p=[0.8, 0.1, 0.05, 0.05])
    if kind == "dead":
        a[..., rng.integers(a.shape[-1])] = 0.0
        g[..., rng.integers(g.shape[-1])] = 0.0
    most = min(EXPONENT[dtype], STARTS_FROM_ONE.get(row.name, 99.0))
    a = a * 10.0 ** rng.uniform(-most, most)
    g = g * 10.0 ** rng.uniform(-most, most)
    size = (a**2).mean() * (g**2).sum() / N / g.shape[-1]  # a typical eigenvalue of F
    least = -2 if row.name in STARTS_FROM_ONE else -6
    wanted = size * 10.0 ** rng.uniform(least, 2) if size > 0 else 1.0
    damping = wanted if row.scale(4.0) == 4.0 else np.sqrt(wanted)  # some add it to both factors
    if kind == "nan":
        where = a if rng.random() < 0.5 else g
        where.flat[rng.integers(where.size)] = rng.choice([np.nan, np.inf, -np.inf])
    if kind == "zero":
        a = 0 * a
        g = 0 * g
    a, g, v = (np.asarray(x, dtype=dtype) for x in (a, g, v))
    return Case(a, g, v, float(damping), harmed=kind in ("nan", "zero"))


def verdict(row: Row, case: Case, namespace: Namespace) -> str:
    """ "ok", "coded" or the name of the promise that was broken."""
    inputs = (case.a, case.g, case.v)
    given = tuple(map(namespace.put, inputs))
    cycles = ENOUGH.get(row.name, row.method.cycles * (10 if row.name in STARTS_FROM_ONE else 1))
    try:
        found = cycles_of.direction(row.method, N, given, case.damping, cycles, namespace.name == "jax")
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    if any(x.tobytes() != namespace.get(y).tobytes() for x, y in zip(inputs, given, strict=True)):
        return "modified"
    direction, codes = map(namespace.get, found)
    if not np.isfinite(direction).all():
        return f"nonfinite codes {codes}"
    ok = (codes == 0).all()
    if case.harmed:
        return "ok" if ok else "coded"
    matrix = row.matrix(*(x.astype(np.float64) for x in (case.a, case.g)), N, case.damping)
    if not np.isfinite(matrix).all():  # nothing left to be relative to: a dead layer, an overflow of its own
        return "ok" if ok else "coded"
    condition = max(np.linalg.cond(m) for m in matrix)
    eps = float(np.finfo(case.a.dtype).eps)
    if not ok:
        return f"refused codes {codes} condition {condition:.1e}" if condition <= MANDATORY[case.a.dtype] else "coded"
    if SLACK * eps * condition > 0.1:
        return "ok"
    want = np.stack([np.linalg.solve(m, x.ravel()) for m, x in zip(matrix, case.v.astype(np.float64), strict=True)])
    want = want.reshape(case.v.shape)
    miss = max(np.abs(x - y).max() / np.abs(y).max() for x, y in zip(direction, want, strict=True))
    bound = SLACK * eps * max(condition, 10.0)
    return "ok" if miss <= bound else f"wrong by {miss:.1e} of {bound:.1e} condition {condition:.1e}"


def campaign(
    row: Row, namespace: Namespace, numbers: range, seed: int, shapes: int = 0
) -> tuple[Counter[str], list[str]]:
    """How often each verdict came in the cases of these numbers, and the broken promises."""
    seen: Counter[str] = Counter()
    broken: list[str] = []
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        dtype = np.dtype(np.float32 if number % 2 else np.float64)
        case = made(row, rng, dtype, shapes)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = verdict(row, case, namespace)
        seen[found.split()[0]] += 1
        if found not in ("ok", "coded"):
            broken.append(
                f"{row.name} {namespace.name} seed {seed}, {number} {dtype} a {case.a.shape} g {case.g.shape}: {found}"
            )
    if seen["ok"] < LEAST * len(numbers):
        broken.append(f"{row.name} {namespace.name}: OK in {seen['ok']} of {len(numbers)} cases")
    return seen, broken


def main() -> int:
    parser = options(__doc__, 200)
    parser.add_argument("--namespace", default="numpy")
    parser.add_argument("--only", default="")
    parser.add_argument("--shapes", type=int, default=0, help="kinds of sizes a method; 0: any")
    parser.add_argument("--part", default="0/1", help="K/N: every N-th case from the K-th on")
    given = parser.parse_args()
    first, every = map(int, given.part.split("/"))
    numbers = range(first, given.count, every)
    namespace = next(n for n in NAMESPACES if n.name == given.namespace)
    failures: list[str] = []
    for row in METHODS:
        if given.only and given.only != row.name:
            continue
        seen, broken = campaign(row, namespace, numbers, given.seed, given.shapes)
        failures += [f"{row.name}: {line}" for line in broken]
        share = seen["ok"] / len(numbers)
        print(f"{row.name:24} OK {share:.3f}  {dict(seen)}", flush=True)
    return ended(f"fuzz: {len(numbers)} records a method on {namespace.name}", failures)


if __name__ == "__main__":
    sys.exit(main())
