"""Explicit capture: the model calls `tap` for each layer. The floor that stands if jaxprs change: public jax only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfaccore import Window
from kfaccore_jax.calls import BiasOf, Call, View
from kfaccore_jax.layout import Layout

if TYPE_CHECKING:
    from kfaccore_jax.walk import Walk


class Tap:
    """Runs layers and remembers them; examples on the first axis of every x, parameters straight from `params`."""

    def __init__(self, walk: Walk, leaves: Sequence[Any]) -> None:
        self._walk = walk
        self._leaves = list(leaves)

    def dense(self, x: Any, w: Any, b: Any = None) -> Any:
        """x (batch, *shared, d_in) @ w (d_in, d_out) + b."""
        (n_in, s_in), (n_out, s_out) = Layout.of(w.shape).axes
        shared = tuple(range(x.ndim - 1))
        view = View((), shared, (x.ndim - 1,))
        outs = ((n_out, s_out),)
        ins = ((n_in, s_in),)
        call = Call("dense", self._leaf(w), (), outs, ins, 0, view, view, bias=self._bias(b))
        return self._done(call, x, x @ w, b)

    def conv(
        self, x: Any, w: Any, b: Any = None, stride: int | tuple = 1, padding: Any = "same", dilation: int | tuple = 1
    ) -> Any:
        """x (batch, *spatial, C) convolved with w (*kernel, C, C_out), + b."""
        axes = w.ndim - 2
        window = Window(tuple(w.shape[:axes]), stride, padding, dilation)
        letters = "DHW"[3 - axes :]
        y = jax.lax.conv_general_dilated(
            x,
            w,
            window.stride,
            list(window.padding),
            rhs_dilation=window.dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )
        *ins, outs = Layout.of(w.shape).axes
        inner = tuple(range(1, axes + 1))
        last = axes + 1
        views = View((), (0,), (*inner, last)), View((), (0, *inner), (last,))
        call = Call("conv", self._leaf(w), (), (outs,), tuple(ins), 0, *views, window, bias=self._bias(b))
        return self._done(call, x, y, b)

    def embedding(self, ids: Any, table: Any) -> Any:
        """Rows of table (size, d_out) for ids (batch, *shared)."""
        rows, outs = Layout.of(table.shape).axes
        shared = tuple(range(ids.ndim))
        views = View((), shared), View((), shared, (ids.ndim,))
        return self._done(Call("embedding", self._leaf(table), (), (outs,), (rows,), 0, *views), ids, table[ids])

    def scale(self, x: Any, gain: Any) -> Any:
        """x (batch, *shared, d) * gain (d,)."""
        return self._done(self._lone("scale", x, gain), x, x * gain)

    def bias(self, x: Any, b: Any) -> Any:
        """x (batch, *shared, d) + b (d,)."""
        return self._done(self._lone("bias", x, b), None, x + b)

    def _lone(self, kind: str, x: Any, w: Any) -> Call:
        view = View((), tuple(range(x.ndim - 1)), (x.ndim - 1,))
        return Call(kind, self._leaf(w), (), Layout.of(w.shape).axes, (), 0, View(), view)

    def _bias(self, b: Any) -> BiasOf | None:
        return None if b is None else BiasOf(self._leaf(b), (), Layout.of(b.shape).axes, 0, 1.0)

    def _done(self, call: Call, x: Any, y: Any, b: Any = None) -> Any:
        y = self._walk.capture(str(len(self._walk.calls)), call, x, y)
        return y if b is None else y + b

    def _leaf(self, w: Any) -> int:
        for i, leaf in enumerate(self._leaves):
            if leaf is w:
                return i
        raise ValueError(f"tap got an array of shape {jnp.shape(w)} that is no leaf of params; pass leaves untouched")
