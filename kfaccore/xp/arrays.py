"""Which namespace an array belongs to, and the few operations on whole arrays that depend on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard, TypeVar

import array_api_compat as aac
import numpy as np

from kfaccore.xp.typing import Array

__all__ = ["Array"]

Carry = TypeVar("Carry", bound=tuple)


def namespace(*arrays: Array) -> Any:
    """The Array API namespace shared by `arrays`; TypeError when they come from different ones."""
    kinds = set(map(type, arrays)) or {np.ndarray}
    known = _KNOWN.get(*kinds) if len(kinds) == 1 else None
    if known is not None:
        return known
    try:
        found = aac.array_namespace(*arrays)
    except TypeError as error:
        names = ", ".join(sorted({f"{type(x).__module__}.{type(x).__name__}" for x in arrays}))
        raise TypeError(f"arrays must come from one Array API namespace, got {names}; convert them first") from error
    if len(kinds) == 1:
        _KNOWN[kinds.pop()] = found
    return found


_KNOWN: dict[type, Any] = {np.ndarray: aac.array_namespace(np.zeros(0))}  # of a class: asking takes a microsecond


def is_numpy(x: object) -> TypeGuard[np.ndarray]:
    """Whether `x` is a NumPy array."""
    return isinstance(x, np.ndarray)


def device_of(x: Array) -> Any:
    """The device of `x`; None for a tracer, which has none, and for a JAX array that lies on several.

    The core asks here and nowhere else: a tracer's refusal spells out all that was traced before it.
    """
    if type(x) is np.ndarray:
        return "cpu"
    if aac.is_jax_array(x):
        known: Any = x
        return None if is_tracer(x) or len(known.sharding.device_set) > 1 else aac.device(x)
    return aac.device(x)


def on_gpu(x: object) -> bool:
    """Whether `x` is an array of CuPy, or of torch on CUDA."""
    known: Any = x
    return aac.is_cupy_array(x) or (aac.is_torch_array(x) and known.is_cuda)


def widen(x: Array, what: str) -> Array:
    """`x` as float32 or float64: half precision is widened at the door, and of a subclass of NumPy's array, such as
    np.matrix, only the numbers are kept. TypeError for integers, booleans and complex numbers, naming `what`."""
    if is_numpy(x) and type(x) is not np.ndarray and not isinstance(x, np.ma.MaskedArray):
        x = np.asarray(x)
    return namespace(x).astype(x, namespace(x).float32) if is_half(x, what) else x


def is_half(x: Array, what: str) -> bool:
    """Whether the real numbers x are of half precision; TypeError as `widen`."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array, shape {x.shape}: give its data, and mask= of what exists")
    if isinstance(x, np.matrix):
        raise TypeError(f"{what} is an np.matrix, whose products are not those of arrays: give np.asarray(x)")
    xp = namespace(x)
    if x.dtype in (xp.float32, xp.float64):
        return False
    if str(x.dtype).rsplit(".", 1)[-1] in ("float16", "bfloat16"):
        return True
    need = "a real floating dtype: cast it first"
    if isinstance(x.dtype, np.dtype) and x.dtype.kind == "f" and not x.dtype.isnative:
        need = "this machine's byte order, and those are big-endian numbers: x.astype(x.dtype.newbyteorder('='))"
    raise TypeError(f"{what} has dtype {x.dtype}, shape {tuple(x.shape)}; need {need}")


def place(like: Array) -> dict[str, Any]:
    """The dtype and device of a state made like `like`: half precision is widened here too; TypeError as `widen`."""
    return {"dtype": namespace(like).float32 if is_half(like, "like") else like.dtype, "device": device_of(like)}


def eps(dtype: object, xp: Any) -> float:
    """Machine epsilon of `dtype` as a Python float."""
    return float(xp.finfo(dtype).eps)


def scalar(value: float | Array, like: Array) -> Array | float:
    """`value` ready for arithmetic with `like`: Python numbers as they are, arrays in the dtype of `like`."""
    if isinstance(value, int | float):
        return value
    xp = namespace(like)
    if aac.is_torch_array(value):  # which `asarray` may cut off its graph
        return xp.astype(value, like.dtype)
    return xp.astype(xp.asarray(value), like.dtype)


def all_finite(x: Array, axes: int = 1) -> Array:
    """Whether all entries are finite, for each index of the leading `axes` axes (bool array of that shape)."""
    xp = namespace(x)
    lead = tuple(x.shape[:axes])
    if is_numpy(x):  # one BLAS pass; the exact test runs only when the square overflowed or something is wrong
        flat = xp.reshape(x, (*lead, -1))
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.vdot(flat, flat)):
                return np.ones(lead, dtype=bool)
        return xp.all(xp.isfinite(flat), axis=-1)
    return _summary(x, axes) < float("inf")


def _summary(x: Array, axes: int) -> Array:
    """A number for each index of the leading `axes` that is finite where all entries are: one reduction, no array of
    flags, of torch no copy of what lies apart."""
    xp = namespace(x)
    foreign: Any = x
    if aac.is_torch_array(foreign) and foreign.ndim > axes and 0 not in foreign.shape:
        import torch

        return torch.linalg.vector_norm(foreign, float("inf"), dim=tuple(range(axes, foreign.ndim)))
    x = xp.reshape(x, (*x.shape[:axes], -1))
    if aac.is_torch_array(x) or aac.is_cupy_array(x):  # `cupy.all` is 10-50 times slower
        return largest(x)
    with np.errstate(invalid="ignore"):  # of namespaces made of NumPy
        return xp.sum(x * 0.0, axis=-1)


def largest(x: Array) -> Array:
    """The largest absolute entry over the last axis, NaN where there is one."""
    foreign: Any = x
    if aac.is_torch_array(foreign):
        import torch

        return torch.linalg.vector_norm(foreign, float("inf"), dim=-1)
    return namespace(x).max(abs(x), axis=-1)


def shifted(x: Array, shift: Array) -> Array:
    """x + shift I for matrices (blocks, d, d) and shift (blocks,)."""
    foreign: Any = x
    if aac.is_torch_array(foreign):
        found = foreign.clone()
        found.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
        return found
    eye = namespace(x).eye(x.shape[-1], dtype=x.dtype, device=device_of(x))
    return x + shift[:, None, None] * eye


def select(condition: Array, yes: Array, no: Array) -> Array:
    """`yes` where the per-block `condition` (leading axes) holds, `no` elsewhere; free on NumPy when all agree."""
    if is_numpy(condition):
        if condition.all():
            return yes
        if not condition.any():
            return no
    xp = namespace(yes, no)
    return xp.where(_before(condition, yes), yes, no)


def kept(x: Array, condition: Array, value: float) -> Array:
    """`x` where the per-block `condition` (leading axes) holds, `value` elsewhere, in the dtype of x; free on NumPy
    when all hold."""
    if is_numpy(condition) and condition.all():
        return x
    xp = namespace(x)
    other = _constant(value, x) if aac.is_torch_array(x) else xp.full_like(x, value)
    return xp.where(_before(condition, x), x, other)


def filled(x: Array, condition: Array, value: float) -> Array:
    """`value` where the per-block `condition` (leading axes) holds, `x` elsewhere, in the dtype of x."""
    xp = namespace(x)
    other = _constant(value, x) if aac.is_torch_array(x) else xp.full_like(x, value)
    return xp.where(_before(condition, x), other, x)


def _before(condition: Array, x: Array) -> Array:
    """A condition of the leading axes with as many axes as x."""
    return namespace(condition).reshape(condition, (*condition.shape, *(1,) * (x.ndim - condition.ndim)))


def _constant(value: float, like: Any) -> Any:
    """A number of torch on a device, made once, as each would be a launch; a tensor of a mode has one of that mode."""
    import torch

    return _made(value, like.dtype, like.device) if type(like) is torch.Tensor else like.new_full((), value)


@cache
def _made(value: float, dtype: Any, device: Any) -> Any:
    import torch

    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def loop(cond: Callable[[Carry], Array], body: Callable[[Carry], Carry], carry: Carry, limit: int) -> Carry:
    """Repeat `carry = body(carry)` while `cond(carry)`, at most `limit` times.

    Python on eager namespaces (one host read an iteration), `jax.lax.while_loop` on tracers.
    """
    if any(is_tracer(x) for x in carry):
        import jax

        def step(counted):
            count, carry = counted
            return count + 1, body(carry)

        return jax.lax.while_loop(lambda counted: (counted[0] < limit) & cond(counted[1]), step, (0, carry))[1]
    for _ in range(limit):
        if not bool(cond(carry)):
            break
        carry = body(carry)
    return carry


def is_tracer(x: object) -> TypeGuard[Array]:
    """Whether `x` is a JAX array whose value is not known yet."""
    if not aac.is_jax_array(x):
        return False
    import jax

    return isinstance(x, jax.core.Tracer)


def to_host(x: Array | float) -> np.ndarray:
    """A NumPy copy or view of `x` on the host; a view must not be written to."""
    foreign: Any = x
    if aac.is_cupy_array(foreign):
        return foreign.get()
    if aac.is_torch_array(foreign):
        # a conjugate or negative view is a flag in torch, which NumPy cannot read, as it cannot read bfloat16
        foreign = foreign.detach().resolve_conj().resolve_neg().cpu()
        return (foreign.float() if str(foreign.dtype) == "torch.bfloat16" else foreign).numpy()
    return np.asarray(foreign)


def from_host(x: np.ndarray, like: Array) -> Array:
    """`x` in the namespace and on the device of `like`, with the dtype of `x`; always a copy that may be kept."""
    device = {} if aac.is_jax_array(like) else {"device": device_of(like)}
    return namespace(like).asarray(np.array(x), **device)
