"""What is known of the values of a program while its lookups are being found.

Before a model looks rows up, it may cast a table, scale it, normalise its rows, or take
a slice of it. As long as each row of the result depends only on one row of the tables,
it is an image of them: the image of the rows that are looked up is all that is needed,
and nothing as large as a table is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeGuard

import jax
import numpy as np
from jax.typing import ArrayLike

from monolith_optax._rows.gradients.row_maps import RowMap
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, type_of

# How the rows of a table came to be those of an image: the maps that took some of them,
# and how many rows were put before them.
Path: TypeAlias = tuple[RowMap | int, ...]

# The mesh axes over which an axis of an array is split.
Split: TypeAlias = str | tuple[str, ...] | None


class Source(NamedTuple):
    """A table on whose rows an image depends.

    Attributes:
      leaf: which leaf of the parameters it is.
      axes: how many axes it has.
      part: which part of it, where devices have parts.
      path: how each row's place in the table follows from that in the image.
      row_axes: how many of the table's axes are rows, if that is fixed already.
      partial: whether the image leaves out rows of the table.
    """

    leaf: int
    axes: int
    part: Split = None
    path: Path = ()
    row_axes: int | None = None
    partial: bool = False

    def rows_with(self, columns: int) -> int:
        """How many axes are rows, if so many of the image's are columns."""
        return self.axes - columns if self.row_axes is None else self.row_axes


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of an image. Two images are two, also if the same is known of them.

    Attributes:
      sources: the tables on whose rows it depends. None for rows that come from
        nowhere, such as a number broadcast to the shape of a table.
      columns: how many of its last axes are columns, at least and at most; the others
        are rows.
      is_data: whether it depends on more than numbers that are part of the program.
      usable: whether anything but a name is known of it: not if its rows are no longer
        along the first axes. Nothing follows from such an image.
      detached: whether no gradient comes back from it.
      is_leaf: whether it is a table itself, or a device's part of it.
    """

    sources: frozenset[Source]
    columns: tuple[int, int]
    is_data: bool = True
    usable: bool = True
    detached: bool = False
    is_leaf: bool = False

    @property
    def leaves(self) -> frozenset[int]:
        """The tables."""
        return frozenset(source.leaf for source in self.sources)

    @property
    def partial(self) -> bool:
        """Whether it leaves out rows of each of its tables."""
        return all(source.partial for source in self.sources)


VARYING = ("pvary",)  # it changes the type only


@dataclass(frozen=True, eq=False)
class Number:
    """A number that is written in a program, or computed from such numbers."""

    literal: ArrayLike | None
    equation: Equation | None = None
    operands: Sequence["Number"] = ()

    def value(self) -> int:
        """The number."""
        if self.equation is None:
            return int(np.asarray(self.literal))
        if self.equation.primitive.name in VARYING:
            return self.operands[0].value()
        with jax.ensure_compile_time_eval():
            operands = [
                np.asarray(number.value(), type_of(atom).dtype)
                for number, atom in zip(
                    self.operands, self.equation.invars, strict=True
                )
            ]
            return int(jaxprs.bind(self.equation, operands)[0])


# Of an image its facts, of a number how it is computed, and of all else only whether it
# depends on data.
Known: TypeAlias = Facts | Number | bool


def leaves_of(values: Sequence[Known]) -> frozenset[int]:
    """The tables that some values are images of."""
    found = [value.leaves for value in values if isinstance(value, Facts)]
    return frozenset().union(*found) if found else frozenset()


def is_table(value: Known) -> TypeGuard[Facts]:
    """Whether a value is an image of at least one table."""
    return isinstance(value, Facts) and bool(value.sources)


def is_data(value: Known) -> bool:
    """Whether a value depends on data."""
    return value.is_data if isinstance(value, Facts) else value is True


def which_images(values: Sequence[Known]) -> frozenset[int]:
    """Which of some values are images, of tables or of none."""
    return frozenset(i for i, value in enumerate(values) if isinstance(value, Facts))


def which_tables(values: Sequence[Known]) -> frozenset[int]:
    """Which of some values are images of tables."""
    return frozenset(i for i, value in enumerate(values) if is_table(value))


def without_other_images(values: Sequence[Known]) -> list[Known]:
    """Values, in which images of nothing are not images any more."""
    return [
        value.is_data if isinstance(value, Facts) and not value.sources else value
        for value in values
    ]
