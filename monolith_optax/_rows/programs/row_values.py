"""The values that a step on some rows of tables computes with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from monolith_optax._rows.programs.jaxprs import Equation, Program, source_line
from monolith_optax._rows.programs.known_constants import UNKNOWN, Constant
from monolith_optax._rows.slices.row_access import Table


class MixesRowsError(ValueError):
    """A step would need rows of a table that the batch does not have."""

    def __init__(self, what: str, equation: Equation | None = None) -> None:
        super().__init__(what)
        # The equation that does it, and the calls that lead to it.
        self.equations = [] if equation is None else [equation]
        # Who needs the rows, and what works without: reset_rows has its own.
        self.needed_by, self.way_out = "lazy_rows", "Step on it densely"

    def __str__(self) -> str:
        what = [source_line(*self.equations)] if self.equations else []
        return (
            f"{self.needed_by} needs an optimizer that treats each row by itself, but "
            f"in this one {' '.join([*what, *self.args])}. {self.way_out}, or give its "
            "tables to another optimizer with optax.partition."
        )


@dataclass(frozen=True, eq=False)
class Whole:
    """An array; `constant` is what is known of its entries."""

    array: Any
    constant: Constant = UNKNOWN

    def at(self, table: Table | None) -> Any:
        """The rows of a table's batch; or all there are."""
        return self.array if table is None else table.gather(self.array)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table at the batch's positions.

    `constant` is what is known of the rows without a gradient.
    """

    array: jax.Array
    table: Table
    constant: Constant = UNKNOWN

    def at(self, table: Table | None) -> jax.Array:
        """The rows; there are none of another table, and nobody has all."""
        assert table is self.table
        return self.array


@dataclass(frozen=True, eq=False)
class Pending:
    """As many rows as a table has, not made before it is known where they are needed.

    `make` makes them at the positions of a table's batch, or all of them. `constant` is
    what is known of all of their entries.
    """

    make: Callable[[Table | None, dict[Any, Any]], Any]
    constant: Constant = UNKNOWN

    def at(self, table: Table | None, made: dict[Any, Any] | None = None) -> Any:
        """The rows of a table's batch; or all there are."""
        made = {} if made is None else made
        if self not in made:
            made[self] = self.make(table, made)
        return made[self]


Value = Whole | Rows | Pending

Run = Callable[[Program, Sequence[Value]], list[Value]]


class Kind(NamedTuple):
    """What is known of a value before it is computed."""

    type: type[Value]
    table: Table | None
    constant: Constant


def kinds(run: Run, programs: Sequence[Program], operands: list[Value]) -> list[Any]:
    """The kinds of the results of each of some programs."""
    found: list[list[Kind]] = []

    def abstractly() -> None:
        for program in programs:
            results = run(program, operands)
            tables = [v.table if isinstance(v, Rows) else None for v in results]
            found.append(
                [
                    Kind(type(value), table, value.constant)
                    for value, table in zip(results, tables, strict=True)
                ]
            )

    jax.eval_shape(abstractly)
    return found


def common_table(
    equation: Equation, values: Sequence[Value] | Sequence[Kind]
) -> Table | None:
    """The one table whose rows are among the values of an equation, if any are.

    Raises:
      MixesRowsError: there are rows of several tables.
    """
    found = [v.table for v in values if not isinstance(v, Whole | Pending)]
    tables = list(dict.fromkeys(table for table in found if table is not None))
    if len(tables) > 1:
        raise MixesRowsError(
            f"combines rows of {' and '.join(table.name for table in tables)}",
            equation,
        )
    return tables[0] if tables else None


def known_as(array: Any, table: Table | None, constant: Constant) -> Value:
    """Rows of a table, or a whole array."""
    return Whole(array, constant) if table is None else Rows(array, table, constant)
