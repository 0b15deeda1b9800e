"""What an optax transformation does, seen on leaves of the user's own tree: whether it turns gradients round, whether a
part of its step shrinks parameters, and whether a chain with `kfac` in it goes downhill.

Masks, labels and rates by leaf may be functions of names, axes and sizes, or trees. So the tree is theirs, and so are
the shapes, but for networks that are too large to be tried on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache, partial, wraps
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import optax

_LARGE = 1 << 22  # numbers in all; of larger trees no axis is longer than the longest of these that fits
_AXES = (256, 64, 16, 2)
_STEPS = 100  # a rate may begin with 0, and gradients may be gathered over some steps

_ONCE = {"xla_backend_optimization_level": 0}  # of XLA on a CPU: a program that runs a few times on small arrays
_TOLD = {"value": 1.0, "value_fn": lambda params: 1.0}  # a batch that is made up

_trying: ContextVar[bool] = ContextVar("_trying", default=False)  # whether a chain is tried on a made gradient

Outline = tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]


def outline(tree: Any) -> Outline:
    """Structure, and shape and dtype of each leaf."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [tuple(x.shape) for x in leaves]
    for most in _AXES:
        if sum(prod(shape) for shape in shapes) <= _LARGE:
            break
        shapes = [tuple(min(most, n) for n in shape) for shape in shapes]
    return structure, tuple(zip(shapes, [x.dtype for x in leaves], strict=True))


@lru_cache(maxsize=64)
def turns(tx: optax.GradientTransformation, of: Outline) -> bool | None:
    """Whether a gradient is turned round, as a whole optimizer does; None where nothing moves in 100 steps."""
    with jax.ensure_compile_time_eval():
        zeros = _filled(of, 0.0)
        ones = _filled(of, 1.0)
        back = _filled(of, -1.0)
        state = tx.init(zeros)
        mirrored = state
        update = _update(tx, ones, state, zeros)
        for _ in range(_STEPS):
            moves, state = update(ones, state, zeros)
            other, mirrored = update(back, mirrored, zeros)
            move = _summed(moves) - _summed(other)  # noise that is added is the same in both
            if move != 0.0:
                return move < 0.0
    return None


def unless_tried(real: Callable, trial: Callable) -> Callable:
    """`real`, and `trial` in its place while `check_downhill` tries the chain that it stands in."""

    @wraps(real)
    def run(*args: Any, **given: Any) -> Any:
        return (trial if _trying.get() else real)(*args, **given)

    return run


def signed_alone(init: Callable, update: Callable) -> tuple[Callable, Callable]:
    """`init` and `update` of `kfac`, of which a trial asks for the sign alone: the gradient's, which is handed on."""

    def handed_on(grads: Any, state: Any, params: Any = None, **given: object) -> tuple[Any, Any]:
        return grads, state

    return unless_tried(init, lambda params: ()), unless_tried(update, handed_on)


def tried(tx: Any) -> Any:
    """`tx` as `check_downhill` takes it: what `kfaccore_jax.step` tells of a batch is made up."""
    return tx._replace(update=partial(tx.update, **_TOLD, records=None, whole=None, nonnegative=True))


def check_downhill(tx: Any, params: Any) -> None:
    """ValueError where a chain with `kfac` in it, of `tried`, moves parameters up a gradient."""
    token = _trying.set(True)
    try:
        turned = turns(tx, outline(params))
    except Exception:  # what cannot be tried so is not judged; its step says what is wrong with it
        return
    finally:
        _trying.reset(token)
    if turned is False:
        raise ValueError(
            "tx moves parameters up the gradient, so that the loss grows: what kfac() gives has the gradient's sign, "
            "under graft and SelfTuning too; end with what turns it round, as optax.chain(kfac(plan), optax.sgd(0.1)) "
            "does, or optax.scale(-1.0) where kfac sets the length"
        )


@lru_cache(maxsize=64)
def shrinks(tx: optax.GradientTransformation, of: Outline) -> bool:
    """Whether a step has a part that is linear in the parameters and asks for nothing of the gradient."""
    with jax.ensure_compile_time_eval():
        ones = _filled(of, 1.0)
        state = tx.init(ones)
        update = _update(tx, ones, state, ones)
        for _ in range(_STEPS):

            def step(sign: float, size: float, state: Any = state) -> Any:
                return update(_times(sign, ones), state, _times(size, ones))

            def part(sign: float, size: float) -> Any:
                return jax.tree.map(jnp.subtract, step(sign, size + 1.0)[0], step(sign, size)[0])

            one = part(1.0, 0.0)
            if _any(one):
                return all(_alike(one, part(*other)) for other in ((1.0, 1.0), (-0.5, 0.0), (-0.5, 1.0)))
            moves, state = step(1.0, 1.0)
            if _any(moves):
                return False
    return False


def _update(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    """`tx.update` as one program; as it is where it needs numbers to decide by."""
    import optax

    update = partial(optax.with_extra_args_support(tx).update, **_TOLD)
    compiled = jax.jit(update, compiler_options=_ONCE if jax.default_backend() == "cpu" else None)
    try:
        compiled(grads, state, params)
    except jax.errors.ConcretizationTypeError:
        return update
    return compiled


def _filled(of: Outline, value: float) -> Any:
    structure, leaves = of
    made = [jnp.asarray(np.full(shape, value, dtype)) for shape, dtype in leaves]  # nothing is compiled for a shape
    return jax.tree.unflatten(structure, made)


def _summed(tree: Any) -> float:
    inexact = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(float(np.sum(np.real(np.asarray(x)), dtype=np.float64)) for x in inexact)


def _times(number: float, tree: Any) -> Any:
    return jax.tree.map(lambda x: (number * x).astype(x.dtype), tree)


def _any(tree: Any) -> bool:
    return any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(tree))


def _alike(one: Any, other: Any) -> bool:
    """Whether two trees differ by rounding alone."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(bool(jnp.allclose(x, y, rtol=1e-2, atol=0.0)) for x, y in pairs)
