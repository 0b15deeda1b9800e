"""Settings as JSON, for Keras's saved models: numbers, and names of kfaccore's own classes and functions."""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any

import kfaccore as kf
from kfaccore_tensorflow.moved import MOVED


def encoded(value: Any) -> Any:
    """A JSON-able form of numbers, strings, tuples, dicts, and dataclasses and functions that kfaccore names.

    Raises ValueError for anything else, such as a lambda: a loaded model could not know it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [encoded(item) for item in value]
    if isinstance(value, dict):
        return {"mapping": {key: encoded(item) for key, item in value.items()}}
    if isinstance(value, kf.Preconditioner):
        arguments = ("methods", "clocks", "schedules", "network", "comm", "donate", "widest")
        given = {name: encoded(getattr(value, name)) for name in arguments} | {"step": encoded(value.rule)}
        return {"object": _name(type(value)), "fields": given}
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: encoded(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"object": _name(type(value)), "fields": named}
    if isinstance(value, FunctionType):
        return {"function": _name(value)}
    raise ValueError(f"{value!r} cannot be saved with a model; save weights only, or use numbers")


def decoded(value: Any) -> Any:
    """The inverse of `encoded`; imports from kfaccore alone."""
    if isinstance(value, list):
        return tuple(decoded(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "mapping" in value:
        return {key: decoded(item) for key, item in value["mapping"].items()}
    found = _named(value.get("object") or value["function"])
    return found(**{key: decoded(item) for key, item in value["fields"].items()}) if "object" in value else found


def _name(thing: Any) -> str:
    """Where a class or function is found: its public name if it has one, which no rearrangement of rooms changes."""
    name = f"{thing.__module__}:{thing.__qualname__}"
    if getattr(kf, thing.__qualname__, None) is thing:
        name = f"kfaccore:{thing.__qualname__}"
    try:
        known = _named(name) is thing
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise ValueError(f"{thing.__qualname__} is not kfaccore's own, so it cannot be saved with a model")
    return name


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    module = MOVED.get(name, MOVED.get(module, module))
    if module.split(".")[0] not in ("kfaccore", "kfaccore_tensorflow") or not attribute.isidentifier():
        raise ValueError(f"{name!r} is not kfaccore's own")
    return getattr(importlib.import_module(module), attribute)
