"""Images of tables: values of a traced program that have a row for each of a table.

Before a model looks rows up, it may cast a table, scale it, normalise its rows. As long
as each row of the image depends only on the same row of the tables, the image of the
rows that are looked up is all that is needed, and nothing as large as a table is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from monolith_optax._rows.gradients import as_gather
from monolith_optax._rows.programs import jaxprs, row_rules
from monolith_optax._rows.programs.jaxprs import Equation, Program, type_of
from monolith_optax._rows.programs.row_values import MixesRowsError


@dataclass(frozen=True, eq=False)
class Leaf:
    """A table itself: a leaf of the parameters, or a device's part of it.

    Attributes:
      index: which leaf it is.
      array: the table; None while lookups are only being found.
      first_row: the row of the table with which this part begins.
    """

    index: int
    array: Any = None
    first_row: Any = 0

    offsets = property(lambda self: frozenset([(self.index, 0)]))
    leaves = property(lambda self: frozenset([self.index]))
    is_data = True
    rows_first = True
    elementwise = True

    def whole(self) -> Any:
        """The table."""
        return self.array

    def placed(self, equation: Equation) -> "Leaf":
        """The table after an equation that says on which devices it is."""
        if self.array is None:
            return self
        [array] = jaxprs.bind(equation, [self.array])
        return Leaf(self.index, array, self.first_row)


@dataclass(frozen=True, eq=False)
class Mapped:
    """A result of an equation that keeps the rows of its operands apart.

    Attributes:
      equation: the equation.
      operands: its operands, some of which are images.
      index: which of its results this is.
      offsets: the tables on whose rows it depends, and which row of it is the first
        one of each. None for rows that come from nowhere, such as a number broadcast
        to the shape of a table.
      is_data: whether it depends on more than numbers that are part of the program.
      rows_first: whether rows are along the first axis. An image for which this is
        not so serves nothing.
      elementwise: whether entries, and not only rows, are kept apart.
    """

    equation: Equation
    operands: Sequence[Any]
    index: int
    offsets: frozenset[tuple[int, int]]
    is_data: bool
    rows_first: bool
    elementwise: bool
    _whole: list[Any] = field(default_factory=list)

    @property
    def leaves(self) -> frozenset[int]:
        """The tables."""
        return frozenset(leaf for leaf, _ in self.offsets)

    def whole(self) -> Any:
        """All rows."""
        if self._whole:
            return self._whole[0]
        array = jaxprs.bind(self.equation, list(map(whole, self.operands)))[self.index]
        if not self.leaves:  # the others outlive the trace that this belongs to
            self._whole.append(array)
        return array


Image = Leaf | Mapped


def is_image(value: Any) -> bool:
    """Whether a value is an image of tables, or of none."""
    return isinstance(value, Leaf | Mapped)


def leaves_of(values: Sequence[Any]) -> frozenset[int]:
    """The tables of which some values are images."""
    return frozenset().union(*(value.leaves for value in values if is_image(value)))


def whole(value: Any) -> Any:
    """All of an image, or the value itself."""
    return value.whole() if is_image(value) else value


def is_data(value: Any) -> bool:
    """Whether a value depends on data; of other values this is all that is known."""
    return bool(value.is_data if is_image(value) else value)


def mapped(equation: Equation, operands: Sequence[Any]) -> list[Any] | None:
    """The results as images, or None if an equation does not keep rows apart."""
    images = [value for value in operands if is_image(value)]
    if not all(image.rows_first for image in images):
        return None
    name = equation.primitive.name
    if name in _PLACEMENTS and isinstance(operands[0], Leaf):
        return [operands[0].placed(equation)]
    if name in _HINTS and len(images) == len(operands):
        return list(operands)
    turned = name == "transpose" and equation.params["permutation"][0] != 0
    if not turned and not _keeps_rows(equation, operands):
        return None
    offsets = _offsets(equation, operands)
    leaves = frozenset(leaf for leaf, _ in offsets)
    if len(offsets) > len(leaves):  # several rows of one table in one
        return None
    # Values are arrays when the program runs, and bools when it is only read.
    from_data = bool(leaves) or any(
        v is True or (is_image(v) and v.is_data) for v in operands
    )
    elementwise = name in row_rules.ELEMENTWISE and all(
        value.elementwise if is_image(value) else not type_of(operand).shape
        for operand, value in zip(equation.invars, operands, strict=True)
    )
    return [
        Mapped(equation, operands, index, offsets, from_data, not turned, elementwise)
        for index in range(len(equation.outvars))
    ]


def _offsets(equation: Equation, operands: Sequence[Any]) -> frozenset[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    first_row = 0
    for operand, value in zip(equation.invars, operands, strict=True):
        if is_image(value):
            found |= {(leaf, first_row + offset) for leaf, offset in value.offsets}
        if as_gather.is_concatenation(equation):
            first_row += type_of(operand).shape[0]
    return frozenset(found)


def made(equation: Equation, num_rows: frozenset[int]) -> bool:
    """Whether an equation makes as many rows as a table has, from nothing as large."""
    if equation.primitive.name not in ("broadcast_in_dim", "iota"):
        return False
    shape = type_of(equation.outvars[0]).shape
    if not shape or shape[0] not in num_rows:
        return False
    return row_rules.plan(equation, [False] * len(equation.invars)) is not None


# What these say of whole tables need not hold for some rows.
_HINTS = ("sharding_constraint", "optimization_barrier")
VARYING = ("pvary", "pcast")
_PLACEMENTS = ("sharding_constraint", "reshard", "mesh_cast", *VARYING)


def _keeps_rows(equation: Equation, operands: Sequence[Any]) -> bool:
    if equation.primitive.name in jaxprs.CUSTOM_DERIVATIVES:
        program = jaxprs.called_program(equation)
        assert program is not None
        results = _results(program, operands)
        return results is not None and all(map(is_image, results))
    if equation.primitive.name in as_gather.CHANGES:
        others = leaves_of(operands[1:])
        return not others and as_gather.changed_row(equation) is not None
    if as_gather.is_concatenation(equation):
        return True
    return row_rules.plan(equation, list(map(is_image, operands))) is not None


def _results(program: Program, operands: Sequence[Any]) -> list[Any] | None:
    """What a program makes of images, or None if it does not keep rows apart."""

    def step(equation: Equation, operands: list[Any]) -> Sequence[Any]:
        if not any(map(is_image, operands)):
            return [True] * len(equation.outvars)
        called, name = None, equation.primitive.name
        if name in jaxprs.CALLS:
            called = jaxprs.called_program(equation)
        results = _results(called, operands) if called else mapped(equation, operands)
        if (
            results is None
            or as_gather.is_concatenation(equation)
            or name in as_gather.CHANGES
        ):
            raise MixesRowsError("mixes rows", equation)
        return results

    try:
        return jaxprs.interpret(program, operands, step, lambda _: True)
    except MixesRowsError:
        return None
