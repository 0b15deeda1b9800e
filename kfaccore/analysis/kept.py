"""Figures that were measured before, so that nothing is measured twice: a JSON file beside the records.

Keys are digests of what figures depend on: the arrays of the layer, method and options, settings, version, machine.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from hashlib import blake2b
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np

from kfaccore.analysis.figures import Figures
from kfaccore.method import Method
from kfaccore.record import Factored, Record
from kfaccore.record.digest import digest
from kfaccore.written import written
from kfaccore.xp.arrays import Array

SCHEMA = 2  # 1: figures of EKFAC and TEKFAC on large layers were those of their basis alone
Row = dict[str, Any]


@dataclass
class Kept:
    """Figures by key; `path` is where they stay, None for a run that keeps nothing."""

    path: Path | None = None
    backend: str = "numpy"
    rows: dict[str, Row] = field(default_factory=dict)
    trouble: str = ""
    changed: bool = False

    @classmethod
    def beside(cls, records: Path, backend: str = "numpy") -> Kept:
        """The table of a file of records; one that cannot be read is begun anew, which `trouble` says."""
        path = records.with_name(f"{records.name}.figures.json")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = found["figures"] if found["kfaccore"] == SCHEMA else {}
            return cls(path, backend, {str(key): row for key, row in rows.items() if isinstance(row, dict)})
        except FileNotFoundError:
            return cls(path, backend)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return cls(path, backend, trouble=f"{path} could not be read and is begun anew: {error}")

    def keys(
        self, record: Record, grad: Array | Factored | None, methods: Mapping[str, Method], settings: object
    ) -> dict[str, str]:
        """The key of each method on this layer; digests are made only where figures are kept."""
        if self.path is None:
            return dict.fromkeys(methods, "")
        import kfaccore

        content = digest(record, grad, (record.blocks, record.d_out, record.d_in))
        shared = (SCHEMA, kfaccore.__version__, platform.node(), self.backend, content, settings)
        return {label: _hashed(repr((*shared, label, spelt(method)))) for label, method in methods.items()}

    def get(self, key: str, layer: str, method: str) -> Figures | None:
        """The figures under this key, for the layer as it is called now."""
        row = self.rows.get(key)
        if row is None:
            return None
        known = {f.name: f.type for f in fields(Figures)}
        values = {name: math.nan if x is None else x for name, x in row.items() if name in known}
        try:
            return Figures(**{**values, "layer": layer, "method": method})  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None

    def put(self, key: str, figures: Figures) -> None:
        """Keep these; what was left out for want of time or memory is not kept."""
        if self.path is None or "not measured" in figures.note:
            return
        self.add({key: finite(asdict(figures))})

    def add(self, rows: Mapping[str, Row]) -> None:
        """Keep rows as they are, such as those of a survey of another process."""
        self.rows |= rows
        self.changed |= bool(rows)

    def write(self) -> None:
        """Replace the file, whole or not at all; where that cannot be, `trouble` says why."""
        if self.path is None or not self.changed:
            return
        try:
            text = json.dumps({"kfaccore": SCHEMA, "figures": self.rows}, allow_nan=False)
            with written(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            self.changed = False
        except OSError as error:
            self.trouble = f"figures are not kept for the next time: {error}"


def finite(row: Mapping[str, object]) -> Row:
    """A row for JSON: NaN and infinity are null."""
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return finite(value)
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spelt(value: object) -> str:
    """A method with its options, the same in every process: functions by name, not by address."""
    if is_dataclass(value) and not isinstance(value, type):
        options = ", ".join(f"{f.name}={spelt(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__module__}.{type(value).__qualname__}({options})"
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def _hashed(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()
