"""Images of tables: values of a traced program that have a row for each of a table.

Before a model looks rows up, it may cast a table, scale it, normalise its rows, or take
a slice of it. As long as each row of the image depends only on one row of the tables,
the image of the rows that are looked up is all that is needed, and nothing as large as
a table is made.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, type_of


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
    part: Any = None
    path: tuple[Any, ...] = ()
    row_axes: int | None = None
    partial: bool = False

    def rows_with(self, columns: int) -> int:
        """How many axes are rows, if so many of the image's are columns."""
        return self.axes - columns if self.row_axes is None else self.row_axes


class Facts(NamedTuple):
    """What is known of an image before it is computed.

    Attributes:
      sources: the tables on whose rows it depends. None for rows that come from
        nowhere, such as a number broadcast to the shape of a table.
      columns: how many of its last axes are columns, at least and at most; the others
        are rows.
      is_data: whether it depends on more than numbers that are part of the program.
      usable: whether anything but a name is known of it: not if its rows are no longer
        along the first axes. Nothing follows from such an image.
      detached: whether no gradient comes back from it.
    """

    sources: frozenset[Source]
    columns: tuple[int, int]
    is_data: bool = True
    usable: bool = True
    detached: bool = False

    @property
    def leaves(self) -> frozenset[int]:
        """The tables."""
        return frozenset(source.leaf for source in self.sources)

    @property
    def partial(self) -> bool:
        """Whether it leaves out rows of each of its tables."""
        return all(source.partial for source in self.sources)


@dataclass(frozen=True, eq=False)
class Parameter:
    """A table itself: a leaf of the parameters, or a device's part of it.

    Attributes:
      leaf: which leaf it is.
      array: the table; None while lookups are only being found.
      first_row: the row of the table with which this part begins.
      facts: what is known of it; None when the program runs.
      is_spread: whether its rows have been looked up before the program runs, and are
        what is added to them.
    """

    leaf: int
    array: Any = None
    first_row: Any = 0
    facts: Any = None
    is_spread: bool = False


_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Image:
    """A result of an equation that keeps the rows of its operands apart.

    Attributes:
      way: how its rows follow from those of the operands.
      equation: the equation.
      operands: its operands, some of which are images.
      index: which of its results this is.
      facts: what is known of it.
      serial: larger than that of its operands.
    """

    way: Any
    equation: Equation
    operands: Sequence[Any]
    index: int
    facts: Facts
    serial: int = field(default_factory=lambda: next(_serial))


VARYING = ("pvary",)  # it changes the type only


class Known:
    """A number that is written in a program, or computed from such numbers."""

    def __init__(self, equation: Equation | None, operands: Sequence[Any]) -> None:
        self._equation, self._operands = equation, operands

    def value(self) -> int:
        """The number."""
        if self._equation is None:
            return int(self._operands[0])
        if self._equation.primitive.name in VARYING:
            return int(self._operands[0].value())
        with jax.ensure_compile_time_eval():
            operands = [
                np.asarray(v.value(), t.dtype)
                for v, t in zip(
                    self._operands, map(type_of, self._equation.invars), strict=True
                )
            ]
            return int(jaxprs.bind(self._equation, operands)[0])


def is_image(value: Any) -> bool:
    """Whether a value is an image of tables, or of none."""
    return isinstance(value, Parameter | Image)


def leaves_of(values: Sequence[Any]) -> frozenset[int]:
    """The tables that some values are images of."""
    found = [value.facts.leaves for value in values if is_image(value)]
    return frozenset().union(*found) if found else frozenset()


def is_table(value: Any) -> bool:
    """Whether a value is an image of at least one table."""
    if isinstance(value, Parameter):
        return True
    return isinstance(value, Image) and bool(value.facts.sources)


def is_data(value: Any) -> bool:
    """Whether a value depends on data; of other values this is nearly all we know."""
    return bool(value.facts.is_data if is_image(value) else value is True)


def which_tables(values: Sequence[Any]) -> frozenset[int]:
    """Which of some values are images of tables."""
    return frozenset(i for i, value in enumerate(values) if is_table(value))


def without_other_images(values: Sequence[Any]) -> list[Any]:
    """Values, in which images of nothing are not images any more."""
    return [is_data(v) if is_image(v) and not is_table(v) else v for v in values]


class Scope:
    """The whole arrays of images, in one run of a program.

    Each run has its own: an array must not leave the trace in which it was made.
    """

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def whole(self, value: Any) -> Any:
        """All of an image, or the value itself."""
        if not isinstance(value, Image):
            return value.array if isinstance(value, Parameter) else value
        for image in in_order(value, lambda image: image.operands, self._made):
            self._made[image.serial] = jaxprs.bind(
                image.equation, [self._known(v) for v in image.operands]
            )[image.index]
        return self._made[value.serial]

    def _known(self, value: Any) -> Any:
        return (
            self._made[value.serial] if isinstance(value, Image) else self.whole(value)
        )


def in_order(image: Image, needed: Any, done: Any) -> list[Image]:
    """Images on which one depends, and it itself, each after what it depends on.

    Args:
      image: the image.
      needed: the values on which an image depends.
      done: the serial numbers of images that are not needed any more.
    """
    found: dict[int, Image] = {}
    left = [image]
    while left:
        each = left.pop()
        if each.serial not in found and each.serial not in done:
            found[each.serial] = each
            left += [value for value in needed(each) if isinstance(value, Image)]
    return [found[serial] for serial in sorted(found)]
