"""The curvature of a mean loss, layer by layer, read from the states of methods: F~ as a `Basis` each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kfaccore import tree
from kfaccore.linalg import kron, side
from kfaccore.linalg.basis import Basis
from kfaccore.method import Block, Eigensystem, Hyper, KroneckerTerms, Matrix, Method, State, declares
from kfaccore.xp.arrays import Array, device_of, namespace

UNDAMPED = Hyper(0, 0.0, 0.0)
LIMIT = 2048  # parameters a block, up to which a sum of Kronecker products is multiplied out


@tree.kept
@dataclass(frozen=True)
class Curvature:
    """{layer: Basis} of the mean loss: undamped, without any penalty."""

    layers: dict[str, Basis]

    @classmethod
    def of(
        cls, methods: Method | Mapping[str, Method], states: Mapping[str, State], blocks: Mapping[str, Block]
    ) -> Curvature:
        """Of trained states: `Curvature.of(pre.methods, state.layers, dict(state.blocks))`.

        ValueError for a method that keeps neither an eigensystem, nor Kronecker terms, nor a dense block, and for
        layers that differ.
        """
        missing = sorted(set(states) ^ set(blocks))
        if missing:
            raise ValueError(f"states and blocks must be of the same layers; these are in one only: {missing}")
        found = {}
        for name, state in states.items():
            method = methods[name] if isinstance(methods, Mapping) else methods
            try:
                found[name] = basis(method, state, blocks[name])
            except ValueError as error:
                error.add_note(f"layer {name!r}")
                raise
        return cls(found)


def basis(method: Method, state: State, block: Block) -> Basis:
    """F~ of one state. ValueError where the method does not say it, or says it in too many terms for its size."""
    terms = method.kronecker_terms(state, block) if declares(method, KroneckerTerms) else ()
    if len(terms) == 1:
        return Basis.of_term(*terms[0])
    if terms:
        return Basis.of_matrix(multiplied(terms, block), block.d_out)
    system = method.eigensystem(state, UNDAMPED) if declares(method, Eigensystem) else None
    if system is not None:
        Qa, Qg, values = system
        return Basis(values, Qg, Qa)
    if declares(method, Matrix):
        return Basis.of_matrix(method.matrix(state, block), block.d_out)
    raise ValueError(
        f"{type(method).__name__} keeps no curvature whose eigenvectors can be had: take KFAC, EKFAC, TKFAC, TEKFAC, "
        f"KPSVD, Diagonal or Identity, BrandKFAC with sides up to {side.WIDEST}, or for small layers Exact, Deflation, "
        f"Lanczos or KFACCorrected"
    )


def multiplied(terms: tuple[tuple[Array, Array], ...], block: Block) -> Array:
    """sum of G (x) A, (blocks, D, D); ValueError above `LIMIT`."""
    size = block.d_out * block.d_in
    if size > LIMIT:
        raise ValueError(
            f"a sum of {len(terms)} Kronecker products of {block.d_out} x {block.d_in} = {size} parameters a block has "
            f"no basis of its own, and multiplying it out stops at {LIMIT}: take KFAC, EKFAC, TKFAC or TEKFAC"
        )
    A, G = terms[0]
    xp = namespace(A)
    units = xp.reshape(xp.eye(size, dtype=A.dtype, device=device_of(A)), (size, 1, block.d_out, block.d_in))
    total = xp.zeros_like(units)
    for A, G in terms:
        rows = [_applied(G, units[:, 0, ...], A, number) for number in range(block.blocks)]
        found = xp.stack(rows, axis=1)
        total = found + (total if total.shape == found.shape else xp.zeros_like(found))
    F = xp.permute_dims(xp.reshape(total, (size, block.blocks, size)), (1, 2, 0))
    return (F + F.mT) / 2


def _applied(G: Array, units: Array, A: Array, number: int) -> Array:
    """G V A of one block for every V of `units` (many, d_out, d_in)."""
    left = G[number : number + 1, ...]
    right = A[number : number + 1, ...]
    return kron.apply(left, units, right) if not side.is_diagonal(left) else side.times(left[:, :, None] * units, right)
