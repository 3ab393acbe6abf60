"""Rows taken by constants: slices, reshapes and other equations that compute nothing.

After `table[10:20]`, `table[7]` or `table.reshape(4, -1, columns)` each row is one row
of what was there before, and arithmetic on row ids says which one. Row axes are the
first axes of an array, the others its columns. A row id counts through all row axes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from monolith_optax._rows.programs.jaxprs import Equation, type_of
from monolith_optax._rows.types import Shape


class Along(NamedTuple):
    """Where along an axis rows are: at `start`, or further by steps along another axis.

    `axis` is an axis of the result, or None if rows are all at the start.
    """

    axis: int | None
    start: int = 0
    step: int = 1


class RowMap(NamedTuple):
    """Which row of an operand each row of a result is.

    Attributes:
      before: the shape of the operand.
      after: the shape of the result.
      axes: for each axis of the operand where along it rows are; or None, if rows only
        are in another shape.
      columns: how many of the last axes are the same in both.
      takes_all: whether no row is left out.
    """

    before: Shape
    after: Shape
    axes: tuple[Along, ...] | None
    columns: int
    takes_all: bool

    def ids(self, ids: jax.Array, columns: int) -> jax.Array:
        """The ids of rows in the operand, where so many last axes are columns."""
        if self.axes is None:
            return ids
        after = self.after[: len(self.after) - columns]
        before = self.before[: len(self.before) - columns]
        result: jax.Array | int = 0
        for axis, size in enumerate(before):
            along, start, step = self.axes[axis]
            where = start if along is None else start + step * _index(ids, after, along)
            result = result * size + where
        return ids * 0 + result


def _index(ids: jax.Array, shape: Shape, axis: int) -> jax.Array:
    """Where along an axis rows are."""
    later = math.prod(shape[axis + 1 :])
    if later != 1:
        ids = ids // max(later, 1)
    return ids if axis == 0 else ids % max(shape[axis], 1)


def row_map(
    equation: Equation, index: int, starts: Sequence[int] | None
) -> RowMap | None:
    """Which rows of its first operand a result has, if the equation only takes rows.

    Args:
      equation: the equation.
      index: which of its results.
      starts: where a `dynamic_slice` begins, if that is known.
    """
    name, params = str(equation.primitive.name), equation.params
    if name not in _MAPS:
        return None
    before, after = (
        type_of(equation.invars[0]).shape,
        type_of(equation.outvars[index]).shape,
    )
    if name == "dynamic_slice":
        if starts is None:
            return None
        starts = np.clip(starts, 0, np.subtract(before, after)).tolist()
        axes = [Along(axis, start) for axis, start in enumerate(starts)]
    elif name == "slice":
        steps = params["strides"] or [1] * len(before)
        starts = params["start_indices"]
        axes = [
            Along(i, *each) for i, each in enumerate(zip(starts, steps, strict=True))
        ]
    elif name == "split":
        axes = [Along(axis) for axis in range(len(before))]
        start = int(sum(params["sizes"][:index]))
        axes[params["axis"]] = Along(params["axis"], start)
    elif name == "unstack":  # since JAX 0.12
        taken = params["axis"]
        axes = [
            Along(None, index) if axis == taken else Along(axis - (axis > taken))
            for axis in range(len(before))
        ]
    elif name == "rev":
        axes = [
            Along(axis, size - 1, -1) if axis in params["dimensions"] else Along(axis)
            for axis, size in enumerate(before)
        ]
    elif name == "transpose":
        axes = [Along(params["permutation"].index(axis)) for axis in range(len(before))]
    elif math.prod(before) == math.prod(after):
        if params.get("dimensions") is not None and name == "reshape":
            return None
        return RowMap(before, after, None, _same_at_the_end(before, after), True)
    else:  # a broadcast
        axes = [
            Along(axis if size == after[axis] else None)
            for size, axis in zip(before, params["broadcast_dimensions"], strict=True)
        ]
    return RowMap(before, after, tuple(axes), *_kept(before, after, axes))


_MAPS = frozenset(
    {"reshape", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice", "split"}
    | {"rev", "transpose", "unstack"}
)


def _same_at_the_end(before: Shape, after: Shape) -> int:
    pairs = zip(reversed(before), reversed(after), strict=False)
    count = 0
    for a, b in pairs:
        if a != b:
            break
        count += 1
    return count


def _kept(before: Shape, after: Shape, axes: Sequence[Along]) -> tuple[int, bool]:
    """How many of the last axes are the same, and whether all rows are there."""
    count = 0
    while (
        count < min(len(before), len(after))
        and axes[-1 - count] == Along(len(after) - 1 - count)
        and before[-1 - count] == after[-1 - count]
    ):
        count += 1
    takes_all = all(
        size == 1 or (along is not None and after[along] == size)
        for size, (along, *_) in zip(before, axes, strict=True)
    )
    return count, takes_all
