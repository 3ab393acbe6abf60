"""How rows of an image follow from those of an equation's operands."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from monolith_optax._rows.gradients.gather import Lookup
from monolith_optax._rows.gradients.image_facts import VARYING
from monolith_optax._rows.gradients.row_images import (
    Image,
    Making,
    Positions,
    made_of,
)
from monolith_optax._rows.gradients.row_maps import RowMap
from monolith_optax._rows.programs import row_rules
from monolith_optax._rows.programs.custom_rules import run_with_derivatives
from monolith_optax._rows.programs.jaxprs import type_of
from monolith_optax._rows.programs.row_values import Rows, Value, Whole
from monolith_optax._rows.programs.run_on_rows import Runner
from monolith_optax._rows.programs.varying import alike
from monolith_optax._rows.slices.row_access import Table, fetched


@dataclass(frozen=True)
class Planned:
    """An equation that applies to other numbers of rows."""

    plan: row_rules.Plan

    def rows(self, image: Image, at: Positions) -> Making:
        arrays = []
        for by_row, value in zip(self.plan.by_row, image.operands, strict=True):
            arrays.append((yield from made_of(value, at if by_row else None)))
        if image.equation.primitive.name in VARYING:
            return arrays[0]  # rows vary as their ids do already
        return self.plan.apply(at.count, arrays)[image.index]


@dataclass(frozen=True)
class Moved:
    """Rows that are only taken, by constants."""

    row_map: RowMap

    def rows(self, image: Image, at: Positions) -> Making:
        columns = len(self.row_map.after) - at.row_axes
        row_axes = len(self.row_map.before) - columns
        there = at.moved(self.row_map.ids(at.ids, columns), row_axes)
        return (yield from made_of(image.operands[0], there))


@dataclass(frozen=True)
class Concatenated:
    """Rows of arrays that come one after the other."""

    def rows(self, image: Image, at: Positions) -> Making:
        result, first_row = None, 0
        for atom, value in zip(image.equation.invars, image.operands, strict=True):
            num_rows = type_of(atom).shape[0]
            if num_rows == 0:
                continue
            part, inside = at.part(first_row, num_rows)
            first_row += num_rows
            here = yield from made_of(value, part)
            inside = inside.reshape(-1, *[1] * (here.ndim - 1))
            if result is not None:
                inside, here, result = alike([inside, here, result])
                here = jnp.where(inside, here, result)
            result = here
        assert result is not None
        return result


@dataclass(frozen=True)
class Changed:
    """Rows of an array in which one has been changed."""

    row: Lookup

    def rows(self, image: Image, at: Positions) -> Making:
        before = yield from made_of(image.operands[0], at)
        indices = yield from made_of(image.operands[1], None)
        update = yield from made_of(image.operands[2], None)
        row, valid = self.row.ids(indices)
        flat = at.ids.reshape(-1)
        here: jax.Array = flat == row.astype(flat.dtype).reshape(())
        here = here if valid is None else here & valid.reshape(())
        here = here.reshape(-1, *[1] * (before.ndim - 1))
        update = update.reshape(1, *before.shape[1:])
        here, before, update = alike([here, before, update])
        after = _CHANGES[str(image.equation.primitive.name)](before, update)
        return jnp.where(here, after, before)


_CHANGES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "scatter": lambda _, row: row,
    "scatter-mul": lambda before, row: before * row,
}


@dataclass(frozen=True)
class Ruled:
    """A function with a derivative rule of its own; which operands are tables."""

    by_row: tuple[bool, ...]

    def rows(self, image: Image, at: Positions) -> Making:
        num_rows = type_of(image.equation.outvars[image.index]).shape[0]
        table = _Anywhere("the table", num_rows, at.ids.reshape(-1))
        operands: list[Value] = []
        for by_row, value in zip(self.by_row, image.operands, strict=True):
            array = yield from made_of(value, at if by_row else None)
            operands.append(Rows(array, table) if by_row else Whole(array))
        run = Runner([table]).run
        results = run_with_derivatives(run, image.equation, operands)
        return results[image.index].at(table)


class _Anywhere(Table):
    """Any positions; several may have the same row."""

    def gather(self, array: jax.Array) -> jax.Array:
        array, ids = alike([jnp.asarray(array), self.ids])
        return fetched(array, ids, 1)


@dataclass(frozen=True)
class Turned:
    """Nothing follows from it."""

    def rows(self, image: Image, at: Positions) -> Making:
        raise AssertionError(image, at)
