"""Does the JAX adapter see every parameter of models that nobody here wrote, and are its records right?

Each model of `jax_zoo_models.py`, in float64: leaves and elements with records of their own, Kronecker and diagonal
sides apart; per layer the gradient of a random draw, put together from records alone, against autograd's; CPU seconds
of plan, of tracing and of compiling a K-FAC step beside those of SGD. `pip install .[zoo-jax]` has the libraries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax_zoo_models import ZOO
from report import Claim, at_least, at_most, finish, parser

import kfaccore as kf
import kfaccore_jax as kj

jax.config.update("jax_enable_x64", True)
T = TypeVar("T")
QUICK = ("ppo_two_heads", "ferminet_like", "lstm")
LIMITS = {"flax_resnet18": 15.0, "convnext": 20.0}


@dataclass
class Found:
    """What one model gave: shares of elements, relative error of the worst leaf, CPU seconds."""

    elements: int
    kronecker: float
    diagonal: float
    error: float
    plan: float
    trace: float
    compile: float
    sgd: float
    missing: list[str]


def clocked(function: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and its CPU seconds."""
    start = time.process_time()
    found = function()
    return found, time.process_time() - start


def covered(plan: kj.Plan) -> tuple[int, float, float]:
    """Elements of all leaves, and the shares with two full factors and with a diagonal one."""
    total = sum(int(np.prod(row.shape)) for row in plan.table)
    full = 0
    diagonal = 0
    for layer in plan.layers:
        block = layer.block
        size = block.blocks * block.d_out * block.d_in
        if block.diagonal_in or block.d_in == 1:
            diagonal += size
        else:
            full += size
    return total, full / total, diagonal / total


def error_of(apply: Callable, plan: kj.Plan, params: object, x: object) -> float:
    """The gradient of <draw, prediction> from records against autograd's: worst leaf, relative to its largest entry."""
    shapes = jax.eval_shape(apply, params, x)
    rng = np.random.default_rng(7)
    draw = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)

    @jax.jit
    def both(params: object) -> tuple[object, object]:
        captured = kj.capture(plan, params, x)
        records = captured.records(jax.tree.map(lambda d: d[None], draw), 1.0, fisher=kf.monte_carlo)
        sums = {name: jnp.einsum("vkbso,kbsi->koi", r.g, r.rows()) for name, r in records.items()}
        return plan.tree(jax.tree.map(jnp.zeros_like, params), sums), captured.gradients(draw)

    got, want = both(params)
    worst = 0.0
    names = {row.leaf for row in plan.table if row.covered}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = ".".join(str(key.key) for key in path)
        if name in names:
            size = float(jnp.max(jnp.abs(b)))
            worst = max(worst, float(jnp.max(jnp.abs(a - b))) / (size if size > 1e-9 else 1.0))
    return worst


def steps(apply: Callable, plan: kj.Plan, params: object, x: object) -> tuple[float, float, float]:
    """CPU seconds of tracing and compiling a K-FAC step of random draws, and of both for SGD's."""
    tx = kj.kfac(plan, clocks=kf.Clocks(10, 100))
    state = tx.init(params)
    n = float(len(jax.tree.leaves(x)[0]))

    def kfac(params: object, state: object, fresh: bool) -> object:
        captured = kj.capture(plan, params, x)
        slope = jax.tree.map(lambda f: f / n, captured.prediction)
        draws = jax.tree.map(lambda f: f[None], captured.prediction)
        records = captured.records(draws, n, fisher=kf.monte_carlo)
        return tx.update(captured.gradients(slope), state, params, records=records, fresh=fresh)

    def sgd(params: object) -> object:
        return jax.grad(lambda p: sum(jnp.sum(f**2) for f in jax.tree.leaves(apply(p, x))) / n)(params)

    traced, tracing = clocked(lambda: jax.jit(partial(kfac, fresh=True)).lower(params, state))
    _, compiling = clocked(traced.compile)
    _, plain = clocked(lambda: jax.jit(sgd).lower(params).compile())
    return tracing, compiling, plain


def tried(make: Callable) -> Found:
    apply, params, x = make()
    plan, planning = clocked(lambda: kj.plan(apply, params, x))
    elements, kronecker, diagonal = covered(plan)
    error = error_of(apply, plan, params, x)
    tracing, compiling, plain = steps(apply, plan, params, x)
    missing = [f"{row.leaf}: {row.reason}" for row in plan.table if not row.covered]
    return Found(elements, kronecker, diagonal, error, planning, tracing, compiling, plain, missing)


def claims_of(name: str, found: Found) -> list[Claim]:
    whole = found.kronecker + found.diagonal
    claims = [
        at_least(f"{name}: share of elements with records of their own", whole, 0.99),
        at_most(f"{name}: worst leaf of the records' gradient", found.error, 1e-10),
    ]
    if name in LIMITS:
        spent = found.plan + found.trace + found.compile
        claims.append(at_most(f"{name}: CPU seconds of plan, trace and compile", spent, LIMITS[name]))
    return claims


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="*", default=None, help="names of models")
    given = arguments.parse_args()
    names = given.only or (QUICK if given.quick else tuple(ZOO))
    claims: list[Claim] = []
    rows = []
    start = time.perf_counter()
    for name in names:
        found = tried(ZOO[name])
        claims += claims_of(name, found)
        numbers = (found.kronecker, found.diagonal, found.error, found.plan, found.trace, found.compile, found.sgd)
        rows.append([name, str(found.elements), *(f"{x:.3g}" for x in numbers), "; ".join(found.missing)])
    claims.append(at_most("minutes of all models", (time.perf_counter() - start) / 60, 30.0))
    columns = [
        "model",
        "elements",
        "Kronecker",
        "diagonal",
        "error",
        "plan s",
        "trace s",
        "compile s",
        "SGD s",
        "not covered",
    ]
    finish("JAX models", columns, rows, claims, given.json)


if __name__ == "__main__":
    main()
