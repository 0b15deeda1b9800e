"""Options of methods, checked when a method is made rather than where they are first used."""

from __future__ import annotations

from collections.abc import Mapping

from kfaccore.method import Method, Terms, declares, names


def instance(owner: object, field: str, kind: type, choices: str) -> None:
    """TypeError unless `owner.field` has every name of the Protocol `kind`; `choices` tells what could be given."""
    need(type(owner).__name__, field, getattr(owner, field), kind, choices)


def function(owner: object, field: str, choices: str) -> None:
    """TypeError unless `owner.field` can be called."""
    value = getattr(owner, field)
    _not_a_class(type(owner).__name__, field, value)
    if not callable(value):
        raise TypeError(f"{type(owner).__name__}({field}={value!r}): need {choices}")


def need(owner: str, field: str, value: object, kind: type, choices: str) -> None:
    """`instance` for a value at hand, given the name of what it is for."""
    _not_a_class(owner, field, value)
    missing = [name for name in names(kind) if not hasattr(value, name)]
    if missing:
        raise TypeError(f"{owner}({field}={value!r}): need {choices}; {missing} is missing there")


def by_layer(hint: str = "", **given: object) -> None:
    """TypeError for what is given otherwise than by layer."""
    for what, layers in given.items():
        if not isinstance(layers, Mapping):
            raise TypeError(f"{what} is a {type(layers).__name__}; need a mapping from layer{hint}")


def is_method(owner: str, method: object) -> None:
    """TypeError for what is no method."""
    need(owner, "method", method, Method, "a method such as KFAC()")


def one_term(method: object, given: object) -> None:
    """ValueError for a tuple of loss terms and a method that takes one; micro-batches of one term are a list."""
    if isinstance(given, tuple) and not declares(method, Terms):
        raise ValueError(
            f"a tuple of {len(given)} records came, which is one record a term of the loss, each with its own n; "
            f"{type(method).__name__} takes one term: use PINNKFAC({len(given)}), or give micro-batches of one term as "
            f"a list"
        )


def _not_a_class(owner: str, field: str, value: object) -> None:
    if isinstance(value, type):
        name = value.__name__
        raise TypeError(f"{owner}({field}={name}) is the class itself; give it an instance: {name}()")
