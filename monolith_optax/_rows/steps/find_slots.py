"""The slots among leaves of a state whose tables `init` does not show.

If such a leaf is as long as a table and a step changes it, it must be a slot: one or
more entries for each row. It belongs to the table with whose rows the program combines
it, directly or after any operations. The order of fields does not matter.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Atom, Equation, Program, type_of
from monolith_optax._rows.programs.row_values import MixesRowsError
from monolith_optax._rows.slices.row_access import Table
from monolith_optax._rows.steps.state_leaves import Leaf

# A table or a leaf; arrays hold as many entries along the first axis.
Source: TypeAlias = Table | int
Sources: TypeAlias = frozenset[Source]


def unchanged_slots(program: Program, weights: Sequence[Leaf]) -> list[bool]:
    """For each leaf of the state, whether a step gives it back as it is.

    The program is that of a step, from gradients, state, parameters and others to
    updates and state.
    """
    jaxpr, count = program.jaxpr, len(weights)
    after = jaxpr.outvars[count:]
    before = jaxpr.invars[count : count + len(after)]
    return [new is old for new, old in zip(after, before, strict=True)]


def slots_of_program(
    program: Program, weights: Sequence[Leaf], slots: Sequence[Leaf]
) -> list[Leaf]:
    """The leaves of a state with the tables that the program of a step shows.

    Raises:
      MixesRowsError: a leaf changes that is as long as a table, and nothing tells
        whose it is.
    """
    found = list(slots)
    candidates = {
        i: tables
        for i, unchanged in enumerate(unchanged_slots(program, weights))
        if not (slots[i].is_told or unchanged)
        for tables in [_as_long(slots[i], weights)]
        if tables
    }
    if not candidates:
        return found
    of_weights = [leaf.table for leaf in weights]
    of_slots = [i if i in candidates else leaf.table for i, leaf in enumerate(slots)]
    others = len(program.jaxpr.invars) - 2 * len(weights) - len(slots)
    groups = combined(program, [*of_weights, *of_slots, *of_weights, *[None] * others])
    for i, tables in candidates.items():
        names = [table.name for table in tables if table in groups.of(i)]
        if len(names) > 1:
            both = " and ".join(names)
            raise MixesRowsError(f"{slots[i].name} belongs to {both} at once")
        if not names:
            raise MixesRowsError(
                f"{slots[i].name} changes and is as long as {tables[0].name}, but "
                "nothing tells whether its entries belong to the rows, as init does "
                "not make it from the shape of the table"
            )
        [table] = [table for table in tables if table.name in names]
        found[i] = slots[i]._replace(table=table)
    return found


def _as_long(leaf: Leaf, weights: Sequence[Leaf]) -> list[Table]:
    """The tables with as many rows as a leaf has entries, if they have several."""
    shape = np.shape(leaf.array)
    return [
        weight.table
        for weight in weights
        if weight.table and weight.table.num_rows > 1
        if shape[: len(weight.table.axes)] == weight.table.axes
    ]


class Groups:
    """Sources that a program combines entry by entry, or may combine so."""

    def __init__(self) -> None:
        self._group: dict[Source, set[Source]] = {}

    def of(self, source: Source) -> set[Source]:
        """All sources with which one is combined."""
        return self._group.get(source, {source})

    def join(self, sources: Sources) -> None:
        """Notes that sources are combined."""
        joined = set().union(*map(self.of, sources)) if sources else set()
        for source in joined:
            self._group[source] = joined


def combined(program: Program, sources: Sequence[Source | None]) -> Groups:
    """Which sources a program combines.

    Args:
      program: the program.
      sources: what each of its operands has the rows of, if of anything.
    """
    groups = Groups()

    def run(program: Program, operands: Sequence[Sources]) -> list[Sources]:
        return jaxprs.interpret(program, operands, step, lambda _: frozenset())

    def step(equation: Equation, operands: list[Sources]) -> Sequence[Sources]:
        name = equation.primitive.name
        if name in jaxprs.CALLS | jaxprs.CUSTOM_DERIVATIVES:
            [called] = jaxprs.programs_of(equation)
            return run(called, operands)
        if name == "cond":
            each = [run(branch, operands[1:]) for branch in jaxprs.branches(equation)]
            return [_joined(groups, results) for results in zip(*each, strict=True)]
        by_length: dict[int, list[Sources]] = {}
        for atom, operand in zip(equation.invars, operands, strict=True):
            by_length.setdefault(_length(atom), []).append(operand)
        found = {n: _joined(groups, each) for n, each in by_length.items() if n > 0}
        return [found.get(_length(out), frozenset()) for out in equation.outvars]

    run(program, [frozenset() if s is None else frozenset([s]) for s in sources])
    return groups


def _joined(groups: Groups, operands: Sequence[Sources]) -> Sources:
    sources = frozenset().union(*operands) if operands else frozenset()
    groups.join(sources)
    return sources


def _length(atom: Atom) -> int:
    shape = getattr(type_of(atom), "shape", ())
    return shape[0] if shape else -1
