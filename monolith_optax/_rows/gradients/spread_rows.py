"""Rows of spread tables are looked up before the loss, all that can be at once.

A lookup in a table that is spread over devices is an exchange between them. So the ids
of all lookups are computed first, by the same program with zeros for rows, and each
table has one exchange for those that do not depend on looked-up rows. Then the program
runs with the rows that came back, and gradients are taken with respect to them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from monolith_optax._rows.gradients.lookup_tree import RESULTS, Found, Tree, lookups_of
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.dependencies import evaluate, sources
from monolith_optax._rows.programs.jaxprs import Program
from monolith_optax._rows.slices.exchange import NOBODY, Route
from monolith_optax._rows.slices.no_derivatives import forward_only
from monolith_optax._rows.slices.row_access import flattened
from monolith_optax._rows.slices.row_slices import RowSlices
from monolith_optax._rows.slices.spread import Spread
from monolith_optax._rows.slices.spread_lookups import look_up, send


class SpreadTable(NamedTuple):
    """A table that is spread over devices: its first axes, and how they are spread."""

    array: Any
    axes: tuple[int, ...]
    spread: Spread


class _Exchange(NamedTuple):
    """One exchange: its table, lookups, ids and route."""

    leaf: int
    lookups: list[int]
    ids: list[Any]
    route: Route


class SpreadRows:
    """The rows of all lookups in spread tables."""

    def __init__(
        self,
        tables: Mapping[int, SpreadTable],
        lookups: Sequence[tuple[Found, int]],
        ids_of: Callable[[list[Any]], list[Any]],
        zeros: Sequence[Any],
    ) -> None:
        """Looks the rows up.

        Args:
          tables: the spread tables, by leaf.
          lookups: all lookups in any tables, and the leaf of each.
          ids_of: gives the ids of all lookups, if their rows are what it is given. An
            id below zero is `~id` of a row that gets no gradient.
          zeros: what is added to the rows of each lookup.
        """
        self._tables, self._lookups = tables, lookups
        self._exchanges: list[_Exchange] = []
        # What is added to the rows of other tables, and the rows of these.
        self.rows = list(zeros)
        program, _ = jaxprs.trace(lambda *rows: ids_of(list(rows)), *zeros)
        for level in _levels(program, lookups, tables):
            self._exchange(program, level)

    def _exchange(self, program: Program, level: list[int]) -> None:
        """Looks up what depends only on rows that are there."""
        given = dict(zip(program.jaxpr.invars, self.rows, strict=True))
        wanted = [program.jaxpr.outvars[k] for k in level]
        ids = dict(zip(level, evaluate(program, given, wanted), strict=True))
        for leaf, table in self._tables.items():
            which = [k for k in level if self._lookups[k][1] == leaf]
            if not which:
                continue
            some = [ids[k].astype(jnp.int32) for k in which]
            inside = [jnp.where(each < 0, ~each, each) for each in some]
            array = flattened(table.array, table.axes)
            rows, route = look_up(table.spread, array, inside)
            for k, each in zip(which, rows, strict=True):
                self.rows[k] = forward_only(each)
            self._exchanges.append(_Exchange(leaf, which, some, route))

    def slices(self, leaf: int, gradients: Sequence[Any]) -> RowSlices:
        """The gradient of a table, from those of the rows of all lookups."""
        spread = self._tables[leaf].spread
        parts = []
        for each in self._exchanges:
            if each.leaf == leaf:
                ids = [
                    ids if self._lookups[k][0].has_gradient else jnp.full_like(ids, -1)
                    for k, ids in zip(each.lookups, each.ids, strict=True)
                ]
                rows = [gradients[k] for k in each.lookups]
                parts.append(RowSlices.placed(*send(spread, each.route, ids, rows)))
        if not parts:
            return self._nothing(leaf)
        return parts[0] if len(parts) == 1 else RowSlices.concatenate(parts)

    def _nothing(self, leaf: int) -> RowSlices:
        """The gradient of a table that is not looked up, where others have rows."""
        array, axes, spread = self._tables[leaf]
        ids = jnp.full(1, NOBODY)
        rows, route = look_up(spread, flattened(array, axes), [ids])
        return RowSlices.placed(*send(spread, route, [ids], rows))


def check_inside(
    program: Program, tree: Tree, leaves: Collection[int], names: Sequence[str]
) -> None:
    """Refuses lookups of spread tables whose rows cannot be looked up before.

    Raises:
      ValueError: a lookup is in a while loop or in a `shard_map`, or a function with a
        derivative rule, which runs with whole tables.
    """

    def check(program: Program, tree: Tree) -> None:
        for index, node in tree.items():
            if index == RESULTS:
                continue
            equation = program.jaxpr.eqns[index]
            name = str(equation.primitive.name)
            inside = [each for its in node.programs for each in lookups_of(its)]
            if name in jaxprs.CUSTOM_DERIVATIVES:
                refuse(node.lookups, _RULE)
            if name in _REFUSED:
                refuse(inside, _REFUSED[name])
            elif inside:
                programs = jaxprs.programs_of(equation)
                for inner, its in zip(programs, node.programs, strict=True):
                    check(inner, its)

    def refuse(lookups: Sequence[Found], why: str) -> None:
        for found in lookups:
            for leaf, _ in found.tables:
                if leaf in leaves:
                    raise ValueError(
                        f"tables spreads {names[leaf]} over devices, but it is looked "
                        f"up by {found.place} {why}"
                    )

    check(program, tree)


_RULE = (
    "in a function with a derivative rule, which runs with whole tables: rows of all "
    "devices would go to each of them. Give it rows that were looked up before, or say "
    "True instead of the spec."
)
_REFUSED = {
    "while": (
        "in a loop whose length is not known before. Look the rows up before the loop, "
        "or use lax.scan."
    ),
    "shard_map": (
        "inside a jax.shard_map. Lookups in a spread table are exchanges between "
        "devices already: write the model for the whole batch, under jax.jit, or say "
        "True instead of the spec."
    ),
}


def _levels(
    program: Program,
    lookups: Sequence[tuple[Found, int]],
    tables: Mapping[int, SpreadTable],
) -> list[list[int]]:
    """The lookups in spread tables, those first that depend on none of them."""
    which = {k for k, (_, leaf) in enumerate(lookups) if leaf in tables}
    found = sources(program, [frozenset([k]) & which for k in range(len(lookups))])
    left, levels = {k: found[k] for k in sorted(which)}, []
    while left:
        level = [k for k, needed in left.items() if not needed & left.keys()]
        if not level:
            place = lookups[min(left)][0].place
            raise ValueError(
                "tables spreads a table over devices whose rows cannot be looked up "
                f"before the loss: the ids of {place} depend on rows that the same "
                "loop has looked up. Say True instead of the spec."
            )
        levels.append(level)
        left = {k: needed for k, needed in left.items() if k not in level}
    return levels
