"""Whether one equation sums over examples: an element of its result depends on several of them.

Seen from its shapes at two batch sizes, n and 2 n. An operation is known to act example by example, or to do so but
along the axes that its parameters name; any other one to which a growing array goes counts as a sum. Where a reshape
deals the examples out to several axes, of which one alone grows, what is done along the others cannot be seen any
more: such rows count as mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfaccore_jax.batch import jaxprs, turns
from kfaccore_jax.order import carries, grown
from kfaccore_jax.tags import JITS, REMATS, SAME

_CALLS = JITS | REMATS | {"cond", "while", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "shard_map"}
_CALLS |= {"custom_linear_solve", "custom_vmap_call", "composite"}  # asked by what is inside them
_APART = """
    abs acos acosh add add_any asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type broadcast_in_dim
    cbrt ceil clamp complex conj cos cosh digamma div erf erf_inv erfc exp exp2 expand_dims expm1 floor igamma
    igamma_grad_a igammac imag integer_pow lgamma log log1p logistic max min mul neg nextafter polygamma pow
    random_gamma random_gamma_grad real regularized_incomplete_beta rem round rsqrt select_n sign sin sinh sqrt square
    squeeze stack stop_gradient sub tan tanh transpose zeta device_put
"""
ELEMENTWISE = frozenset(_APART.split()) - {"broadcast_in_dim", "expand_dims", "squeeze", "stack", "transpose"}
_AXES = {
    "argmax argmin reduce_sum reduce_max reduce_min reduce_prod psum psum2 psum_invariant pmax pmin": "axes",
    "reduce rev": "dimensions",
    "sort concatenate": "dimension",
    "split unstack cumsum cumprod cummax cummin cumlogsumexp": "axis",
    "approx_top_k": "reduction_dimension",
}
_ALONG = {name: parameter for names, parameter in _AXES.items() for name in names.split()}
_MATRICES = """
    qr geqrf geqp3 householder_product ormqr svd lu eigh eig schur hessenberg cholesky cholesky_update symmetric_product
    triangular_solve tridiagonal tridiagonal_solve
"""
_KNOWN = frozenset(_APART.split()) | SAME | _CALLS
Axes = list[set[int]]  # of each operand those that grow


def mixes(p: Any, q: Any, n: int, within: bool = True, dealt: bool = False) -> bool:
    """Whether an element of a result depends on several examples; with `within` also by what is inside the equation.

    dealt   whether the model takes examples out of the batch axis to one before it, not undoing that they were joined
    """
    if any(len(grown(v, w)) > 1 for v, w in zip(p.outvars, q.outvars, strict=True) if carries(v)):
        return True  # a pair of examples an element
    if _alone(p, q, n, dealt):
        return True
    bodies = [list(jaxprs(x)) for x in (p, q)] if within else []
    pairs = [zip(one.eqns, two.eqns, strict=True) for one, two in zip(*bodies, strict=True)] if within else []
    return any(mixes(a, b, n, True, dealt) for pair in pairs for a, b in pair)


def _alone(p: Any, q: Any, n: int, dealt: bool) -> bool:
    """By the equation's own operation."""
    name = p.primitive.name
    axes = [set(grown(v, w)) for v, w in zip(p.invars, q.invars, strict=True)]
    if not any(axes) or not any(carries(v) for v in p.outvars):
        return False
    if name == "scan":  # its turns are the examples
        return p.params["length"] != q.params["length"] and p.params["num_carry"] > 0
    if name in _KNOWN:
        return False
    if name in _ALONG:
        return bool(_named(p.params[_ALONG[name]]) & set().union(*axes))
    if name == "reshape":
        after = grown(p.outvars[0], q.outvars[0])
        out = dealt and any(turns(p, i, j) < 0 for i in axes[0] for j in after)
        return out or any(p.outvars[0].aval.shape[i] % n for i in after)
    family = next((kind for kind in ("scatter", "reduce_window") if name.startswith(kind)), name)
    return family not in _RULES or _RULES[family](p, axes, n)


def _named(along: Any) -> set[Any]:
    """The axes that a parameter names: of an array, or of a mesh."""
    return set(along) if isinstance(along, tuple | list) else {along}


def _top(p: Any, axes: Axes, n: int) -> bool:
    return p.params.get("axis", p.invars[0].aval.ndim - 1) in axes[0]


def _product(p: Any, axes: Axes, n: int) -> bool:
    return any(set(over) & grows for over, grows in zip(p.params["dimension_numbers"][0], axes, strict=True))


def _cut(p: Any, axes: Axes, n: int) -> bool:
    """Slices, pads and repetitions: another length along the examples."""
    before = p.invars[0].aval.shape
    after = p.outvars[0].aval.shape[-len(before) :]
    return any(before[i] != after[i] for i in axes[0])


def _written(p: Any, axes: Axes, n: int) -> bool:
    """dynamic_update_slice: each example writes to its own place, or all places get the same."""
    whole, part = (v.aval.shape for v in p.invars[:2])
    return not axes[1] <= axes[0] or any(whole[i] != part[i] for i in axes[1])


def _scatter(p: Any, axes: Axes, n: int) -> bool:
    """Growing axes of the updates that are whole slices or paired with the operand's go to the same examples."""
    numbers = p.params["dimension_numbers"]
    operand, indices, updates = axes
    kept = set(numbers.update_window_dims)
    rows = [i for i in range(p.invars[2].aval.ndim) if i not in kept]  # one for each axis of the indices but the last
    paired = {rows[i] for i in getattr(numbers, "scatter_indices_batching_dims", ())}
    targets = set(numbers.scatter_dims_to_operand_dims)
    return bool(targets & operand or not updates <= kept | paired or (updates and not operand) or indices - paired)


def _gather(p: Any, axes: Axes, n: int) -> bool:
    """Rows of a table for each example, or the same part of each example."""
    numbers = p.params["dimension_numbers"]
    whole = {i for i, size in enumerate(p.params["slice_sizes"]) if size == p.invars[0].aval.shape[i]}
    whole |= set(getattr(numbers, "operand_batching_dims", ()))
    return bool(axes[0] & set(numbers.start_index_map) or axes[0] - whole)


def _conv(p: Any, axes: Axes, n: int) -> bool:
    """Examples are apart as images, as output channels of the kernel, and as groups of channels."""
    numbers = p.params["dimension_numbers"]
    images, kernels = (tuple(spec) for spec in (numbers.lhs_spec, numbers.rhs_spec))
    grouped = p.params["feature_group_count"] % n == 0
    split = p.params["batch_group_count"] == 1 or p.params["batch_group_count"] % n == 0
    apart = {images[0]} if split else set()
    apart |= {images[1]} if grouped else set()
    return bool(axes[0] - apart or axes[1] - {kernels[0]})


def _window(p: Any, axes: Axes, n: int) -> bool:
    return any(p.params["window_dimensions"][axis] > 1 for grows in axes for axis in grows)


def _fft(p: Any, axes: Axes, n: int) -> bool:
    return any(axis >= p.invars[0].aval.ndim - len(p.params["fft_lengths"]) for axis in axes[0])


def _matrix(p: Any, axes: Axes, n: int) -> bool:
    return any(axis >= len(v.aval.shape) - 2 for v, grows in zip(p.invars, axes, strict=True) for axis in grows)


_RULES: dict[str, Callable[[Any, Axes, int], bool]] = {
    "top_k": _top,
    "dot_general": _product,
    "slice": _cut,
    "dynamic_slice": _cut,
    "pad": _cut,
    "tile": _cut,
    "dynamic_update_slice": _written,
    "scatter": _scatter,
    "gather": _gather,
    "conv_general_dilated": _conv,
    "reduce_window": _window,
    "select_and_scatter_add": _window,
    "select_and_gather_add": _window,
    "fft": _fft,
    **dict.fromkeys(_MATRICES.split(), _matrix),
}
