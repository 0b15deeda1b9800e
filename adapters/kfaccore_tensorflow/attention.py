"""Attention layers of Keras: rows that come out are the query's, and masks tell which positions nobody may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from inspect import signature
from typing import Any

import keras
import tensorflow as tf

Tensor = Any
MANY = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
PLAIN = (keras.layers.Attention, keras.layers.AdditiveAttention)


@dataclass(frozen=True)
class Attended:
    """What one call looks from, and what it looks at: keys and values that are not the query itself."""

    query: Tensor
    keys: tuple[Tensor, ...]


@dataclass
class Told:
    """Masks (batch, *positions) that attention layers were called under, by the tensors they are of."""

    masks: dict[int, list[Tensor]] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # so that no other tensor gets one's id
    made: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def look(self, layer: Any, call: Callable, args: Sequence, kwargs: Mapping[str, Any]) -> Attended | None:
        """What a call attends, its masks kept; None of a layer that is no attention of Keras's."""
        tensors: list[Any] = []
        masks: list[Any] = []
        whole = None
        if isinstance(layer, MANY):
            given = signature(call).bind(*args, **kwargs).arguments
            tensors = [given.get(name) for name in ("query", "value", "key")]
            masks = [given.get(f"{name}_mask") for name in ("query", "value", "key")]
            whole = given.get("attention_mask")
        elif isinstance(layer, PLAIN):
            tensors = list(kwargs.get("inputs") or args[0])
            masks = list(kwargs.get("mask") or [])
        query, *keys = [x for x in tensors if tf.is_tensor(x)] or [None]
        if query is None:
            return None
        self.kept += [query, *keys]
        found: dict[int, list[Any]] = {id(query): masks[:1]}
        for x in keys:  # whatever masks one of them masks all
            found.setdefault(id(x), []).extend([*masks[1:], self._seen(layer, x, whole)])
        for key, some in found.items():
            some = [mask for mask in some if tf.is_tensor(mask) and (mask.shape.rank or 0) >= 2]
            if some:
                self.masks.setdefault(key, []).append(self._all(some))
        return Attended(query, tuple(x for x in keys if x is not query))

    def _seen(self, layer: Any, x: Tensor, mask: Any) -> Tensor | None:
        """Of keys or values (batch, *positions, d), those that a mask (batch, ..., queries, keys) lets anyone look at;
        None where it has no axis of examples."""
        axes = 0 if x.shape.rank is None else x.shape.rank - 2
        if mask is None or len(getattr(layer, "attention_axes", None) or (1,)) != axes:
            return None
        mask = tf.convert_to_tensor(mask)
        if (mask.shape.rank or 0) <= 2 * axes:
            return None
        key = (id(mask), -axes)
        if key not in self.made:
            self.kept.append(mask)
            others = list(range(1, mask.shape.rank - axes))
            self.made[key] = tf.reduce_any(tf.cast(mask, tf.bool), others)
        return self.made[key]

    def _all(self, masks: Sequence[Tensor]) -> Tensor:
        """Positions that all masks leave, as Keras takes them together."""
        first, *others = dict.fromkeys(map(id, masks))
        by_id = {id(mask): mask for mask in masks}
        if not others:
            return by_id[first]
        key = (first, *others)
        if key not in self.made:
            self.kept += masks
            self.made[key] = reduce(tf.logical_and, [tf.cast(by_id[i], tf.bool) for i in key])
        return self.made[key]
