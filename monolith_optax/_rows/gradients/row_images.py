"""Images of tables in a run of a program.

`image_facts.py` says what an image is. None is computed where its equation stands: a
lookup asks for rows at some positions, and these are made of the rows of the operands
there, down to those of tables.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp

from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation
from monolith_optax._rows.programs.made_later import Done, made
from monolith_optax._rows.programs.varying import alike
from monolith_optax._rows.slices.row_access import fetched


@dataclass(frozen=True, eq=False)
class Parameter:
    """A table itself: a leaf of the parameters, or a device's part of it.

    Attributes:
      leaf: which leaf it is.
      array: the table.
      first_row: the row of the table with which this part begins.
      is_spread: whether its rows have been looked up before the program runs, and are
        what is added to them.
    """

    leaf: int
    array: jax.Array
    first_row: jax.Array | int = 0
    is_spread: bool = False


@dataclass(frozen=True, eq=False)
class Image:
    """A result of an equation that keeps the rows of its operands apart.

    Attributes:
      way: how its rows follow from those of the operands.
      equation: the equation.
      operands: its operands, some of which are images.
      index: which of its results this is.
    """

    way: "Way"
    equation: Equation
    operands: "Sequence[Value]"
    index: int

    def make(self, at: "Positions | None") -> "Making":
        """Makes its rows at some positions, one after the other; None: all of it."""
        if at is not None:
            return (yield from self.way.rows(self, at))
        arrays: list[jax.Array] = []
        for value in self.operands:
            arrays += [(yield from made_of(value, None))]
        return jaxprs.bind(self.equation, arrays)[self.index]


Value: TypeAlias = Parameter | Image | jax.Array
Values: TypeAlias = list[Value]
Making: TypeAlias = Generator[tuple[Image, "Positions | None"], jax.Array, jax.Array]


class Way(Protocol):
    """How rows of a result follow from those of the operands."""

    def rows(self, image: Image, at: "Positions") -> Making:
        """Makes the rows of the image at some positions, one after the other."""


class Positions:
    """Positions in a batch, each with the id of a row that is inside an image.

    Attributes:
      ids: the ids.
      outside: which of them stand for others that are not inside; none, if it is None.
      row_axes: how many of the image's axes are rows.
    """

    def __init__(
        self,
        ids: jax.Array,
        outside: jax.Array | None,
        row_axes: int,
        of_table: "Callable[[Parameter, Positions], jax.Array]",
    ) -> None:
        """Gives the ids, and what fetches rows of tables there."""
        self.ids, self.outside, self.row_axes = ids, outside, row_axes
        self._of_table = of_table
        self._tables: dict[Parameter, jax.Array] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return math.prod(self.ids.shape)

    def fetch(self, value: Parameter | jax.Array) -> jax.Array:
        """The rows of a table or of an array that is there, one after the other."""
        if isinstance(value, Parameter):
            if value not in self._tables:
                self._tables[value] = self._of_table(value, self)
            return self._tables[value]
        array, ids = alike([jnp.asarray(value), self.ids])
        rows = fetched(array, ids, self.row_axes)
        return rows.reshape(-1, *rows.shape[ids.ndim :])

    def moved(self, ids: jax.Array, row_axes: int) -> "Positions":
        """Other positions, of rows from which these follow."""
        return Positions(ids, self.outside, row_axes, self._of_table)

    def part(self, first_row: int, num_rows: int) -> tuple["Positions", jax.Array]:
        """The positions in some of the rows, and which positions are in them.

        The others are at rows that do not matter.
        """
        ids = self.ids - first_row
        inside = (ids >= 0) & (ids < num_rows)
        outside = ~inside
        if self.outside is not None:  # one for each window of several rows
            windows = (1,) * (inside.ndim - self.outside.ndim)
            outside |= self.outside.reshape(self.outside.shape + windows)
        ids = jnp.clip(ids, 0, num_rows - 1)
        part = Positions(ids, outside, self.row_axes, self._of_table)
        return part, inside.reshape(-1)


def made_of(value: Value, at: Positions | None) -> Making:
    """Makes the rows of a value at some positions; None: all of it."""
    if isinstance(value, Image):
        return (yield value, at)
    if at is not None:
        return at.fetch(value)
    return value.array if isinstance(value, Parameter) else value


class Scope:
    """What has been made of images in one run of a program.

    Each run has its own: an array must not leave the trace in which it was made.
    """

    def __init__(self) -> None:
        self._done: Done[Positions | None] = {}

    def rows(self, value: Value, at: Positions) -> jax.Array:
        """The rows of a value at some positions, one after the other."""
        return made(made_of(value, at), self._done)

    def whole(self, value: Value) -> jax.Array:
        """All of a value."""
        return made(made_of(value, None), self._done)
