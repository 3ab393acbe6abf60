"""The rows of images of tables where they are looked up."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from monolith_optax._rows.gradients import as_gather
from monolith_optax._rows.gradients.row_images import (
    VARYING,
    Image,
    Leaf,
    Mapped,
    is_image,
    whole,
)
from monolith_optax._rows.programs import jaxprs, row_rules
from monolith_optax._rows.programs.custom_rules import run_with_derivatives
from monolith_optax._rows.programs.jaxprs import Equation, type_of
from monolith_optax._rows.programs.row_values import Rows
from monolith_optax._rows.programs.run_on_rows import Runner
from monolith_optax._rows.slices.row_access import Table


class At(Protocol):
    """Where a table is looked up."""

    @property
    def table(self) -> Table:
        """The positions, as the table's part that a program runs on."""

    def leaf(self, leaf: Leaf) -> Any:
        """The rows of a table at these positions."""

    def part(self, first_row: int, num_rows: int) -> tuple["At", jax.Array]:
        """The positions in some of the rows, and which positions are in them.

        The others are at rows that do not matter.
        """


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
        if as_gather.is_concatenation(equation):
            return _concatenated(equation, operands, at)
        if equation.primitive.name in as_gather.CHANGES:
            return _changed(equation, operands, rows_of(operands[0]), at)
        plan = row_rules.plan(equation, list(map(is_image, operands)))
        assert plan is not None
        arrays = [
            rows_of(value)
            if is_image(value)
            else at.table.gather(value)
            if needed
            else value
            for needed, value in zip(plan.by_row, operands, strict=True)
        ]
        if equation.primitive.name in VARYING:
            return arrays[0]  # rows vary as their ids do already
        return plan.apply(at.table.batch_size, arrays)[image.index]

    return rows_of(image)


def _concatenated(equation: Equation, operands: Sequence[Any], at: At) -> Any:
    """Rows of arrays that come one after the other."""
    result, first_row = None, 0
    for operand, value in zip(equation.invars, operands, strict=True):
        num_rows = type_of(operand).shape[0]
        part, inside = at.part(first_row, num_rows)
        first_row += num_rows
        if num_rows == 0:
            continue
        here = rows(value, part) if is_image(value) else part.table.gather(value)
        inside = inside.reshape(-1, *[1] * (here.ndim - 1))
        result = here if result is None else jnp.where(inside, here, result)
    return result


def _changed(equation: Equation, operands: Sequence[Any], before: Any, at: At) -> Any:
    """Rows of an array in which one has been changed."""
    changed = as_gather.changed_row(equation)
    assert changed is not None
    indices, update = map(whole, operands[1:])
    row, valid = changed.ids(indices)
    here: jax.Array = at.table.ids == row.astype(at.table.ids.dtype).reshape(())
    here = here if valid is None else here & valid.reshape(())
    after = _CHANGES[equation.primitive.name](
        before, update.reshape(1, *before.shape[1:])
    )
    return jnp.where(here.reshape(-1, *[1] * (before.ndim - 1)), after, before)


_CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "scatter": lambda _, row: row,
    "scatter-add": lambda before, row: before + row,
    "scatter-mul": lambda before, row: before * row,
}
