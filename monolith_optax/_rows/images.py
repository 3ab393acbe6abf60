"""Images of tables: values of a traced program that have a row for each of a table.

Before a model looks rows up, it may cast a table, scale it, normalise its rows. As long
as each row of the image depends only on the same row of the tables, the image of the
rows that are looked up is all that is needed, and nothing as large as a table is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from monolith_optax._rows import jaxprs, rules
from monolith_optax._rows.derivatives import run_with_derivatives
from monolith_optax._rows.jaxprs import Equation, Program, type_of
from monolith_optax._rows.program import Runner
from monolith_optax._rows.tables import Table
from monolith_optax._rows.values import MixesRowsError, Rows


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
      leaves: the tables on whose rows it depends. None for rows that come from
        nowhere, such as a number broadcast to the shape of a table.
      is_data: whether it depends on more than numbers that are part of the program.
      rows_first: whether rows are along the first axis. An image for which this is
        not so serves nothing.
      elementwise: whether entries, and not only rows, are kept apart.
    """

    equation: Equation
    operands: Sequence[Any]
    index: int
    leaves: frozenset[int]
    is_data: bool
    rows_first: bool
    elementwise: bool
    _whole: list[Any] = field(default_factory=list)

    def whole(self) -> Any:
        """All rows."""
        if self._whole:
            return self._whole[0]
        array = jaxprs.bind(self.equation, list(map(whole, self.operands)))[self.index]
        if not self.leaves:  # the others outlive the trace that this belongs to
            self._whole.append(array)
        return array


Image = Leaf | Mapped


class At(Protocol):
    """Where a table is looked up."""

    @property
    def table(self) -> Table:
        """The positions, as the table's part that a program runs on."""

    def leaf(self, leaf: Leaf) -> Any:
        """The rows of a table at these positions."""


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
    leaves = leaves_of(images)
    # Values are arrays when the program runs, and bools when it is only read.
    from_data = bool(leaves) or any(
        v is True or (is_image(v) and v.is_data) for v in operands
    )
    elementwise = name in rules.ELEMENTWISE and all(
        value.elementwise if is_image(value) else not type_of(operand).shape
        for operand, value in zip(equation.invars, operands, strict=True)
    )
    return [
        Mapped(equation, operands, index, leaves, from_data, not turned, elementwise)
        for index in range(len(equation.outvars))
    ]


def made(equation: Equation, num_rows: frozenset[int]) -> bool:
    """Whether an equation makes as many rows as a table has, from nothing as large."""
    if equation.primitive.name not in ("broadcast_in_dim", "iota"):
        return False
    shape = type_of(equation.outvars[0]).shape
    if not shape or shape[0] not in num_rows:
        return False
    return rules.plan(equation, [False] * len(equation.invars)) is not None


def rows(image: Image, at: At) -> Any:
    """The rows of an image where it is looked up, one position after the other."""
    done: dict[int, Any] = {}

    def rows_of(value: Any) -> Any:
        if id(value) not in done:
            done[id(value)] = (
                at.leaf(value) if isinstance(value, Leaf) else apply(value)
            )
        return done[id(value)]

    def apply(image: Mapped) -> Any:
        equation, operands = image.equation, image.operands
        if equation.primitive.name in jaxprs.CUSTOM_DERIVATIVES:
            runner = Runner([at.table])
            values = [
                Rows(rows_of(value), at.table)
                if is_image(value)
                else runner.whole(value)
                for value in operands
            ]
            results = run_with_derivatives(runner.run, equation, values)
            return results[image.index].at(at.table)
        plan = rules.plan(equation, list(map(is_image, operands)))
        assert plan is not None
        arrays = [
            rows_of(value)
            if is_image(value)
            else at.table.gather(value)
            if needed
            else value
            for needed, value in zip(plan.by_row, operands, strict=True)
        ]
        if equation.primitive.name in _VARYING:
            return arrays[0]  # rows vary as their ids do already
        return plan.apply(at.table.batch_size, arrays)[image.index]

    return rows_of(image)


# What these say of whole tables need not hold for some rows.
_HINTS = ("sharding_constraint", "optimization_barrier")
_VARYING = ("pvary", "pcast")
_PLACEMENTS = ("sharding_constraint", "reshard", "mesh_cast", *_VARYING)


def _keeps_rows(equation: Equation, operands: Sequence[Any]) -> bool:
    if equation.primitive.name in jaxprs.CUSTOM_DERIVATIVES:
        program = jaxprs.called_program(equation)
        assert program is not None
        results = _results(program, operands)
        return results is not None and all(map(is_image, results))
    return rules.plan(equation, list(map(is_image, operands))) is not None


def _results(program: Program, operands: Sequence[Any]) -> list[Any] | None:
    """What a program makes of images, or None if it does not keep rows apart."""

    def step(equation: Equation, operands: list[Any]) -> Sequence[Any]:
        if not any(map(is_image, operands)):
            return [True] * len(equation.outvars)
        called = None
        if equation.primitive.name in jaxprs.CALLS:
            called = jaxprs.called_program(equation)
        results = _results(called, operands) if called else mapped(equation, operands)
        if results is None:
            raise MixesRowsError("mixes rows", equation)
        return results

    try:
        return jaxprs.interpret(program, operands, step, lambda _: True)
    except MixesRowsError:
        return None
