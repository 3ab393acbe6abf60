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

    def needs(self, table: Table | None) -> "list[tuple[Value, Table | None]]":
        """What the rows are made of, and of what table's batch; None: all there are."""
        del table
        return []

    def make(self, table: Table | None, operands: list[jax.Array]) -> jax.Array:
        """The rows of a table's batch, or all there are, from what they need."""
        raise NotImplementedError

    def at(self, table: Table | None) -> jax.Array:
        """The rows of a table's batch; or all there are."""
        # Without recursion: a chain of operations may be longer than Python's stack.
        made: dict[tuple[Later, Table | None], jax.Array] = {}
        left: list[tuple[Later, Table | None]] = [(self, table)]
        while left:
            value, where = left[-1]
            needed = value.needs(where)
            missing = [
                (operand, there)
                for operand, there in needed
                if isinstance(operand, Later) and (operand, there) not in made
            ]
            if missing:
                left += missing
                continue
            left.pop()
            if (value, where) not in made:
                operands = [
                    made[operand, there]
                    if isinstance(operand, Later)
                    else operand.at(there)
                    for operand, there in needed
                ]
                made[value, where] = value.make(where, operands)
        return made[self, table]


@dataclass(frozen=True, eq=False)
class Given(Later):
    """The rows of an array that is there; a batch's rows may be enough."""

    array: ArrayLike

    def make(self, table: Table | None, operands: list[jax.Array]) -> jax.Array:
        """The rows of a table's batch, or all there are."""
        del operands
        return Whole(self.array).at(table)


@dataclass(frozen=True, eq=False)
class Made(Later):
    """A result of an equation that keeps rows apart, or makes them from nothing."""

    equation: Equation
    operands: "Sequence[Value]"
    index: int
    _drawn_for: list[Table | None] = field(default_factory=list)

    def needs(self, table: Table | None) -> "list[tuple[Value, Table | None]]":
        """The operands, of all rows if the equation does not keep this table's."""
        plan = self._plan(table)
        by_row = plan.by_row if plan else [False] * len(self.operands)
        return [
            (operand, table if row else None)
            for operand, row in zip(self.operands, by_row, strict=True)
        ]

    def make(self, table: Table | None, operands: list[jax.Array]) -> jax.Array:
        """The rows of a table's batch, or all there are, from its operands."""
        if self.equation.primitive.name == "random_bits" and not np.ndim(operands[0]):
            self._draw(table)
        plan = self._plan(table)
        if plan and table:
            return plan.apply(table.batch_size, operands, table.split)[self.index]
        return Whole(jaxprs.bind(self.equation, operands)[self.index]).at(table)

    def _plan(self, table: Table | None) -> row_rules.Plan | None:
        if table is None:
            return None
        by_row = [isinstance(operand, Later) for operand in self.operands]
        return row_rules.plan(self.equation, by_row, len(table.axes))

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

    def make(self, table: Table | None, operands: list[jax.Array]) -> jax.Array:
        """The rows of a table's batch, or all there are."""
        del operands
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
