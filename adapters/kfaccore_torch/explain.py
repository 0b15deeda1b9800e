"""What an operation does with a parameter, for operations that no captured call is known of."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from kfaccore_torch.alone import Examples
from kfaccore_torch.calls import Use
from kfaccore_torch.elementwise import met, repeated
from kfaccore_torch.graph import Behind, operations
from kfaccore_torch.products import (
    convolution,
    grouped_product,
    looked_up,
    matrix_product,
    stacked_product,
    vector_product,
)
from kfaccore_torch.provenance import output_shape

PRODUCTS = {
    "MmBackward": matrix_product,
    "AddmmBackward": matrix_product,
    "MvBackward": vector_product,
    "BmmBackward": stacked_product,
    "BaddbmmBackward": stacked_product,
    "GroupedMmBackward": grouped_product,
    "ConvolutionBackward": convolution,
    "EmbeddingBackward": looked_up,
    "EmbeddingBagBackward": looked_up,
    "IndexBackward": looked_up,
    "IndexSelectBackward": looked_up,
}
_NAMES = "Add Sub Rsub Mul Div Addcmul Addcdiv Lerp Where Maximum Minimum Pow PreluKernel Addmm Baddbmm"
ELEMENTWISE = tuple(f"{name}Backward" for name in _NAMES.split(" "))


def explained(
    graph: Behind, known: dict[int, str], parameters: Mapping[str, torch.nn.Parameter], examples: Examples
) -> tuple[list[Use], dict[str, str]]:
    """Uses of parameters that were met past all calls, and the names of those that cannot be explained, with why."""
    found, odd = operations(graph, known, lambda name: name.startswith((*PRODUCTS, *ELEMENTWISE)))
    uses: list[Use] = []
    for node, refs in found.items():
        if not prod(output_shape(node)):  # no rows, as of an expert that no token goes to
            continue
        answer = _explain(node, refs, graph, parameters, examples)
        if isinstance(answer, str):
            odd.update({ref.name: f"it goes into {answer}" for ref in refs.values()})
            continue
        uses += answer
        told = {ref.name for use in answer for ref in (use.mark.weight, use.mark.bias) if ref is not None}
        odd.update({ref.name: f"it goes into {node.name()}" for ref in refs.values() if ref.name not in told})
    return uses, {name: why.replace("torch::autograd::", "") for name, why in odd.items()}


def _explain(
    node: Any, refs: Mapping[int, Any], graph: Behind, parameters: Mapping, examples: Examples
) -> list[Use] | str:
    name = node.name()
    kind = next((start for start in PRODUCTS if name.startswith(start)), None)
    if kind is not None and (set(refs) - _added(name) or kind == "ConvolutionBackward"):
        answer = PRODUCTS[kind](node, refs, _lead(node, graph))
        if isinstance(answer, str):
            return answer
        told = {use.mark.bias.name for use in answer if use.mark.bias is not None}
        apart = {i: ref for i, ref in refs.items() if i in _added(name) and ref.name not in told}
        more = met(node, apart, parameters, examples) if apart else []
        return more if isinstance(more, str) else [*answer, *more]
    if name.startswith(("ExpandBackward", "RepeatBackward")):
        return repeated(node, refs, parameters, examples)
    if name.startswith(ELEMENTWISE):
        return met(node, refs, parameters, examples)
    return name


def _added(name: str) -> set[int]:
    """Arguments of a product that are only added to it."""
    return {0} if name.startswith(("Addmm", "Baddbmm")) else set()


def _lead(node: Any, graph: Behind) -> tuple[int, ...] | None:
    """The axes that rows of a product have once it is reshaped for what comes next; None where they are not told."""
    users = set(graph.above.get(node, []))
    if len(users) != 1:
        return None
    (user,) = users
    if not user.name().startswith(("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward")):
        return None
    shape = output_shape(user)
    d = output_shape(node)[-1]
    for axis in range(len(shape) - 1, 0, -1):  # einsum gives the features several axes
        if prod(shape[axis:]) == d:
            return shape[:axis]
    return None
