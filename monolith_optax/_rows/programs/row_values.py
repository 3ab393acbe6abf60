"""The values that a step on some rows of tables computes with.

Optax's clipping by a norm, traced on a table of shape (100, 4), has these equations.
With a batch of three rows, `run_on_rows.py` makes of them:

    a:f32[100,4] = square g             Rows: (3, 4), as g is Rows
    b:f32[100,4] = broadcast_in_dim 0.  Made: as many rows as somebody needs
    c:f32[100,4] = square b             Made, of b
    d:f32[100,4] = add a c              Rows: c is asked for rows of g's table here,
                                        and makes (3, 4) of three rows of b
    e:f32[] = reduce_sum[axes=(0, 1)] d Whole, a number
    f:f32[100,4] = div g e              Rows

Only what meets rows of a table is known to need rows of that table. What does not is
`Later`: it is made for each table that asks for it, or as a whole where none does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import jax
import numpy as np
from jax.typing import ArrayLike

from monolith_optax._rows.programs import jaxprs, row_rules
from monolith_optax._rows.programs.jaxprs import Equation, Program, source_line
from monolith_optax._rows.programs.known_constants import UNKNOWN, Constant
from monolith_optax._rows.programs.made_later import Making, made
from monolith_optax._rows.slices.row_access import Table


class MixesRowsError(ValueError):
    """A step would need rows of a table that the batch does not have.

    Attributes:
      reason: what an operation does, or a leaf.
      equations: the operation, and the calls that lead to it.
      asked_by: who needs the rows.
      advice: what works without them.
    """

    def __init__(
        self,
        reason: str,
        *equations: Equation,
        asked_by: str = "lazy_rows",
        advice: str = "Use a dense gradient",
    ) -> None:
        super().__init__(reason)
        self.reason, self.equations = reason, equations
        self.asked_by, self.advice = asked_by, advice

    def inside(self, caller: Equation) -> "MixesRowsError":
        """The same error, of an operation inside a call."""
        equations = *self.equations, caller
        new = MixesRowsError(
            self.reason, *equations, asked_by=self.asked_by, advice=self.advice
        )
        return new.with_traceback(self.__traceback__)

    def of(self, asked_by: str, advice: str) -> "MixesRowsError":
        """The same error, where another function needs the rows."""
        new = MixesRowsError(
            self.reason, *self.equations, asked_by=asked_by, advice=advice
        )
        return new.with_traceback(self.__traceback__)

    def __str__(self) -> str:
        what = f"{source_line(*self.equations)} " if self.equations else ""
        return (
            f"{self.asked_by} needs an optimizer that treats each row by itself, but "
            f"in this one {what}{self.reason}. {self.advice}, or give its tables to "
            "another optimizer with optax.partition."
        )


@dataclass(frozen=True, eq=False)
class Whole:
    """An array; `constant` is what is known of its entries."""

    array: ArrayLike
    constant: Constant = UNKNOWN

    def at(self, table: Table | None) -> jax.Array:
        """The rows of a table's batch; or all there are."""
        if table is None:
            return cast(jax.Array, self.array)
        return table.gather_any(self.array)


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
class Later:
    """As many rows as a table has, not made before it is known where they are needed.

    `constant` is what is known of all of their entries.
    """

    constant: Constant = field(default=UNKNOWN, kw_only=True)

    def make(self, table: Table | None) -> Making[Table | None]:
        """Makes the rows of a table's batch, or all there are."""
        raise NotImplementedError

    def at(self, table: Table | None) -> jax.Array:
        """The rows of a table's batch; or all there are."""
        return made(self.make(table), {})


@dataclass(frozen=True, eq=False)
class Given(Later):
    """The rows of an array that is there; a batch's rows may be enough."""

    array: ArrayLike

    def make(self, table: Table | None) -> Making[Table | None]:
        """Makes the rows of a table's batch, or all there are."""
        yield from ()
        return Whole(self.array).at(table)


@dataclass(frozen=True, eq=False)
class Made(Later):
    """A result of an equation that keeps rows apart, or makes them from nothing."""

    equation: Equation
    operands: "Sequence[Value]"
    index: int
    _drawn_for: list[Table | None] = field(default_factory=list)

    def make(self, table: Table | None) -> Making[Table | None]:
        """Makes the rows of a table's batch, or all there are, from its operands.

        These are whole if the equation does not keep rows of this table apart.
        """
        by_row = [isinstance(operand, Later) for operand in self.operands]
        plan = table and row_rules.plan(self.equation, by_row, len(table.axes))
        arrays: list[jax.Array] = []
        for i, operand in enumerate(self.operands):
            there = table if plan and plan.by_row[i] else None
            if isinstance(operand, Later):
                arrays += [(yield operand, there)]
            else:
                arrays += [operand.at(there)]
        if self.equation.primitive.name == "random_bits" and not np.ndim(arrays[0]):
            self._draw(table)
        if plan and table:
            return plan.apply(table.batch_size, arrays, table.split)[self.index]
        return Whole(jaxprs.bind(self.equation, arrays)[self.index]).at(table)

    def _draw(self, table: Table | None) -> None:
        """Refuses to draw numbers for one table that were drawn for another."""
        self._drawn_for.append(table)
        if any(other is not table for other in self._drawn_for):
            names = " and ".join(
                each.name if each else "all rows"
                for each in (table, self._drawn_for[0])
            )
            raise MixesRowsError(
                f"the noise of {source_line(self.equation)} belongs to {names} at once"
            )


@dataclass(frozen=True, eq=False)
class Chosen(Later):
    """Rows that a function makes, such as those of a branch of a conditional."""

    choose: Callable[[Table | None], jax.Array]

    def make(self, table: Table | None) -> Making[Table | None]:
        """Makes the rows of a table's batch, or all there are."""
        yield from ()
        return self.choose(table)


Value = Whole | Rows | Later

Run = Callable[[Program, Sequence[Value]], list[Value]]


class Kind(NamedTuple):
    """What is known of a value before it is computed."""

    type: type[Value]
    table: Table | None
    constant: Constant

    @property
    def is_later(self) -> bool:
        """Whether it is rows that are not made yet."""
        return issubclass(self.type, Later)


def kind(value: Value) -> Kind:
    """The kind of a value."""
    table = value.table if isinstance(value, Rows) else None
    return Kind(type(value), table, value.constant)


def known_as(array: jax.Array, table: Table | None, constant: Constant) -> Value:
    """Rows of a table, or a whole array."""
    return Whole(array, constant) if table is None else Rows(array, table, constant)
