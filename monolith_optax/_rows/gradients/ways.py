"""How rows of an image follow from those of an equation's operands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from monolith_optax._rows.gradients import row_maps
from monolith_optax._rows.gradients.positions import Positions
from monolith_optax._rows.gradients.row_images import VARYING, Image, is_image
from monolith_optax._rows.programs import jaxprs, row_rules
from monolith_optax._rows.programs.jaxprs import type_of


class Way(Protocol):
    """How rows of a result follow from those of the operands."""

    moves: ClassVar[bool]  # whether these are at other positions

    def rows(self, image: Image, at: Positions) -> Any:
        """The rows of the image at some positions, one after the other."""


@dataclass(frozen=True)
class Planned:
    """An equation that applies to other numbers of rows."""

    plan: row_rules.Plan
    moves: ClassVar[bool] = False

    def rows(self, image: Image, at: Positions) -> Any:
        name = image.equation.primitive.name
        arrays = [
            (at.rows(value) if is_image(value) else at.gather(value))
            if needed
            else at.scope.whole(value)
            for needed, value in zip(self.plan.by_row, image.operands, strict=True)
        ]
        if name in VARYING:
            return arrays[0]  # rows vary as their ids do already
        return self.plan.apply(at.count, arrays)[image.index]


@dataclass(frozen=True)
class Moved:
    """Rows that are only taken, by constants."""

    row_map: row_maps.RowMap
    moves: ClassVar[bool] = True

    def rows(self, image: Image, at: Positions) -> Any:
        columns = len(self.row_map.after) - at.row_axes
        there = at.moved(
            self.row_map.ids(at.ids, columns), len(self.row_map.before) - columns
        )
        return there.rows(image.operands[0])


@dataclass(frozen=True)
class Concatenated:
    """Rows of arrays that come one after the other."""

    moves: ClassVar[bool] = True

    def rows(self, image: Image, at: Positions) -> Any:
        result, first_row = None, 0
        for atom, value in zip(image.equation.invars, image.operands, strict=True):
            num_rows = type_of(atom).shape[0]
            part, inside = at.part(first_row, num_rows)
            first_row += num_rows
            if num_rows == 0:
                continue
            here = part.rows(value) if is_image(value) else part.gather(value)
            inside = inside.reshape(-1, *[1] * (here.ndim - 1))
            if result is not None:
                inside, here, result = jaxprs.alike([inside, here, result])
                here = jnp.where(inside, here, result)
            result = here
        return result


@dataclass(frozen=True)
class Changed:
    """Rows of an array in which one has been changed."""

    row: Any
    moves: ClassVar[bool] = False

    def rows(self, image: Image, at: Positions) -> Any:
        before = at.rows(image.operands[0])
        indices, update = map(at.scope.whole, image.operands[1:])
        row, valid = self.row.ids(indices)
        flat = at.ids.reshape(-1)
        here: jax.Array = flat == row.astype(flat.dtype).reshape(())
        here = here if valid is None else here & valid.reshape(())
        here = here.reshape(-1, *[1] * (before.ndim - 1))
        update = update.reshape(1, *before.shape[1:])
        here, before, update = jaxprs.alike([here, before, update])
        after = _CHANGES[image.equation.primitive.name](before, update)
        return jnp.where(here, after, before)


_CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "scatter": lambda _, row: row,
    "scatter-mul": lambda before, row: before * row,
}


@dataclass(frozen=True)
class Ruled:
    """A function with a derivative rule of its own."""

    moves: ClassVar[bool] = False

    def rows(self, image: Image, at: Positions) -> Any:
        return at.ruled(image)


@dataclass(frozen=True)
class Turned:
    """Nothing follows from it."""

    moves: ClassVar[bool] = False

    def rows(self, image: Image, at: Positions) -> Any:
        raise AssertionError(image, at)
