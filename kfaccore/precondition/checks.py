"""What can be told wrong before anything is computed, so that a call that fails has changed nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from types import FunctionType
from typing import TYPE_CHECKING

from kfaccore.fisher import empirical, forward_only
from kfaccore.method import Block, OwnGradients, Terms, declares
from kfaccore.options import need, one_term
from kfaccore.precondition.comm import Communicator
from kfaccore.precondition.due import Due
from kfaccore.precondition.given import Given, named, records_of
from kfaccore.precondition.groups import Grads, NetworkMethod
from kfaccore.record import Record
from kfaccore.solution import check_gradient
from kfaccore.step.rule import Checks, Rule, Spread

if TYPE_CHECKING:
    from kfaccore.precondition.preconditioner import Preconditioner, State
    from kfaccore.xp.arrays import Array

Fisher = Callable[..., object]  # type2, monte_carlo, empirical or forward_only


def agreeing(network: NetworkMethod | None, step: Rule, comm: Communicator) -> None:
    """TypeError for what is no rule; ValueError where a network-level method or a rule cannot work over the ranks."""
    need("Preconditioner", "step", step, Rule, "a rule such as Fixed(lr) or SelfTuning()")
    if comm.world == 1:
        return
    if network is not None:
        raise ValueError(f"{network} needs the records of all {comm.world} ranks; it runs in one process")
    if step.needs_records and not declares(step, Spread):
        raise ValueError(f"{step} needs the records of all ranks: on {comm.world} take SelfTuning() or Fixed(lr)")


def fitting(pre: Preconditioner, fisher: Fisher | None) -> None:
    """ValueError where a rule or a method cannot use the draws that the caller says its records hold.

    A rule that models the loss has the first word: under it a method of own gradients is given the rule's samples.
    """
    own = [method for method in pre.assigned.every() if declares(method, OwnGradients)]
    if fisher not in (None, empirical) and own and not pre.rule.needs_records:
        method = type(own[0]).__name__
        raise ValueError(
            f"the records are of {_name(fisher)}, and {method} takes the loss's own gradients: use empirical"
        )
    if pre.rule.needs_records and fisher is empirical:
        raise ValueError(
            f"the records are of the true labels (empirical), which do not model the loss as {type(pre.rule).__name__} "
            f"does: draw labels with monte_carlo or type2, or use LineSearch()"
        )
    if pre.rule.needs_records and fisher is forward_only:
        raise ValueError(_undrawn(pre))


def _undrawn(pre: Preconditioner) -> str:
    rule = type(pre.rule).__name__
    return f"{rule} models the loss from draws, and forward_only has none: use monte_carlo or type2"


def checked(
    pre: Preconditioner,
    due: Due,
    state: State,
    records: Mapping[str, Given | Sequence[Given]],
    grads: Grads,
) -> dict[str, Sequence[Given]]:
    """Records as sequences of micro-batches; ValueError for what does not fit."""
    blocks = dict(state.blocks)
    _known(blocks, grads=grads, records=records)
    for name, grad in grads.items():
        with named(name):
            check_gradient(grad, (blocks[name].blocks, blocks[name].d_out, blocks[name].d_in))
    together = set(pre.assigned.together(blocks)) if grads else set()
    if together - set(grads):
        raise ValueError(f"layers {sorted(together - set(grads))} have no gradients; {pre.network} needs them all")
    idle = pre.idle(state)
    rows = pre.assigned.solved_with_rows(grads, state.layers) - idle
    if not (pre.rule.needs_records or rows) and (not due.measures or not blocks.keys() - idle):
        return {}
    if rows - together and not records:
        method = type(pre.assigned.of(min(rows - together))).__name__
        raise ValueError(
            f"layers {sorted(rows - together)} have gradients but no records, and {method} solves with the rows of "
            f"every batch, whatever the clocks: ask wants_records(state) before each step"
        )
    _present(pre, due, state, records, set(grads), together - idle, set(grads) - idle)
    taken = {name: given for name, given in records.items() if name not in idle or pre.rule.needs_records}
    batches = {}
    for name, given in taken.items():
        with named(name):
            batches[name] = _sequence(pre, name, given, name in together)
    for name, batch in batches.items():
        _are_records(pre, name, batch, state, pre.rule.needs_records or name in rows | together)
        for record in records_of(batch):
            have = Block.of(record)
            need = blocks[name]
            if (have.blocks, have.d_out, have.d_in) != (need.blocks, need.d_out, need.d_in):
                raise ValueError(f"the record of layer {name!r} is for {have}; init was told {need}")
            if pre.rule.needs_records and record.draws == 0:
                raise ValueError(f"the record of layer {name!r} has zero draws: {_undrawn(pre)}")
        if len(batch) > 1:
            _one_kind(name, batch)
    _in_turns(pre, {name: batch for name, batch in batches.items() if name in together})
    return batches


def _are_records(pre: Preconditioner, name: str, batch: Sequence[Given], state: State, rows: bool) -> None:
    """TypeError for what is neither a Record nor Stats of one, and for Stats where the step needs the `rows`."""
    for given in batch:
        terms = given if isinstance(given, tuple) else (given,)
        for x in terms:
            if isinstance(x, Record) or (x is given and is_dataclass(x) and not rows):
                continue
            whose = pre.rule if pre.rule.needs_records else pre.assigned.whose(name, state.layers)
            other = f": {type(whose).__name__} needs the rows themselves" if rows else ", or Stats made of one"
            raise TypeError(
                f"layer {name!r} was given a {type(x).__name__} as a record; need a Record, or a list of one a "
                f"micro-batch{other}"
            )


def _one_kind(name: str, batches: Sequence[Given]) -> None:
    """ValueError for micro-batches of which some have draws: with none G is I by definition, no sum of anything."""
    draws = [next(records_of([batch])).draws for batch in batches if isinstance(batch, Record | tuple)]
    if 0 in draws and any(draws):
        raise ValueError(
            f"micro-batches of layer {name!r} have {draws} draws: those of zero draws (forward only) say that G = I, "
            f"which is no average with the others; draw for all of them or for none"
        )


def _in_turns(pre: Preconditioner, batches: Mapping[str, Sequence[Given]]) -> None:
    """ValueError where layers that are measured together have unequal numbers of micro-batches."""
    counts = {name: len(batch) for name, batch in batches.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"layers have {counts} micro-batches, and {type(pre.network).__name__} measures all of them on the same "
            f"examples: give every layer a record of each micro-batch; of one that it had no part in, with g = 0"
        )


def kinds(**given: tuple[object, type]) -> None:
    """TypeError for what is not of the class that it must be."""
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise TypeError(f"Preconditioner({name}={value!r}): need {kind.__name__}(...)")


def beside(
    pre: Preconditioner,
    state: State,
    grads: Grads,
    own: Mapping[str, object] | None,
    lengths: Mapping[str, float | Array] | None,
) -> None:
    """ValueError for what a step is told of layers that are not there, or that its rule could not use."""
    _known(dict(state.blocks), own=own or {}, lengths=lengths or {})
    if declares(pre.rule, Checks):
        pre.rule.check(grads, lengths)


def _known(blocks: Mapping[str, Block], **given: Mapping[str, object]) -> None:
    for what, layers in given.items():
        unknown = sorted(set(layers) - set(blocks))
        if unknown:
            raise ValueError(f"{what} has layers {unknown} that init never saw; it knows {sorted(blocks)}")


def _present(
    pre: Preconditioner,
    due: Due,
    state: State,
    records: Mapping[str, object],
    names: set[str],
    together: set[str],
    measured: set[str],
) -> None:
    """ValueError where records are due and not there."""
    if measured and not records and (pre.rule.needs_records or due.update is not False):
        raise ValueError(
            f"step {state.step} updates statistics (every {pre.clocks.update} steps) but got no records; "
            f"ask wants_records(state) before each step"
        )
    missing = sorted((names if pre.rule.needs_records else together) - set(records))
    if missing:
        whose = pre.rule if pre.rule.needs_records else pre.network
        raise ValueError(f"layers {missing} have gradients but no records, which {whose} needs at every step")


def _sequence(pre: Preconditioner, name: str, given: Given | Sequence[Given], together: bool) -> Sequence[Given]:
    """One layer's micro-batches; a tuple is one batch for a method of several loss terms."""
    terms = isinstance(given, tuple) and not together and declares(pre.assigned.of(name), Terms)
    if terms and pre.rule.needs_records and not pre.rule.terms:
        raise ValueError(f"{pre.rule} cannot model several loss terms; use Quadratic() or GridSearch()")
    if not terms:
        one_term(pre.network if together else pre.assigned.of(name), given)
    # a Protocol is not asked: that would look at what Stats hold
    if terms or not isinstance(given, list | tuple | Iterator):
        return [given]  # pyright: ignore[reportReturnType]
    batches = list(given)
    if not batches:
        raise ValueError("an empty sequence of micro-batches came: leave the layer out, or give at least one Record")
    return batches


def _name(fisher: Fisher | None) -> str:
    return fisher.__name__ if isinstance(fisher, FunctionType) else repr(fisher)
