"""From what a model returns to the tensor that the loss is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Output = str | int | Callable[[Any], Any] | None


def picked(f: Any, output: Output) -> Any:
    """`output` of what a model returned: a key or attribute by name, a place in a tuple, or a function of it.

    A tensor is what it is, so that logits may be handed over as well. Raises ValueError where there is no such output.
    """
    if output is None or isinstance(f, torch.Tensor):
        return f
    if callable(output):
        return output(f)
    try:
        if isinstance(output, int):
            return tuple(f.values())[output] if isinstance(f, Mapping) else f[output]
        return f[output] if isinstance(f, Mapping) else getattr(f, output)
    except (KeyError, IndexError, AttributeError):
        there = (
            f" of {sorted(map(str, f))}" if isinstance(f, Mapping) else f" of {len(f)}" if isinstance(f, tuple) else ""
        )
        raise ValueError(f"output={output!r} is not in what the model returned, a {type(f).__name__}{there}") from None


def tensor_of(f: Any) -> torch.Tensor:
    """A prediction; TypeError, with what to do, for what is not one tensor."""
    if isinstance(f, torch.Tensor):
        return f
    names = [str(name) for name in f] if isinstance(f, Mapping) else []
    which = repr("logits" if "logits" in names else names[0]) if names else "0" if isinstance(f, tuple) else "..."
    text = f", such as output.{which[1:-1]}" if names else ""
    raise TypeError(
        f"the prediction is a {type(f).__name__}{f' of {names}' if names else ''}, not a tensor: hand over the tensor "
        f"that the loss is of{text}, or pass output={which}; for several with a loss each use kfaccore.Joint"
    )


def nothing(f: Any) -> str:
    """Of a prediction without rows, or with a head without any, which it is."""
    heads = {f"head {name!r}": x for name, x in f.items()} if isinstance(f, Mapping) else {"the prediction": f}
    name, shape = next((name, tuple(x.shape)) for name, x in heads.items() if 0 in x.shape)
    return f"the batch is empty: {name} has shape {shape}"
