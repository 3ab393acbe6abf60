"""Every read and write of rows of a table."""

import copy
import functools
import math
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import GatherDimensionNumbers, GatherScatterMode
from jax.typing import ArrayLike

from monolith_optax._rows.slices.duplicates import (
    at_least_float32,
    check_size,
    is_beyond,
    sum_duplicates,
)
from monolith_optax._rows.slices.spread import Placement
from monolith_optax._shardings import explicit_sharding, replicated, rows_sharding


class Table:
    """The rows of a table that a step touches.

    Attributes:
      name: the path of the table in the parameters.
      num_rows: how many rows the table has.
      axes: its first axes, which count its rows: several for a stack of tables.
      ids: for each position in the batch a row id, no two of them the same. Positions
        of padding and of further occurrences of an id have ids beyond the table, for
        which `is_beyond` holds.
      placement: where the rows are, if they are spread over devices.
      split: the mesh axes over which the positions are split then.
    """

    def __init__(
        self,
        name: str,
        rows: int | tuple[int, ...],
        ids: jax.Array,
        placement: Placement | None = None,
    ) -> None:
        """Gives the number of rows, or the axes that count them."""
        self.name, self.ids, self.placement = name, ids, placement
        self.axes = rows if isinstance(rows, tuple) else (rows,)
        self.num_rows = math.prod(self.axes)
        self.split = None if placement is None else placement.spread.axes

    def with_ids(self, ids: jax.Array) -> "Table":
        """The table with the same ids in another array, as that of another trace."""
        table = copy.copy(self)
        table.ids = ids
        return table

    @property
    def batch_size(self) -> int:
        """How many positions there are."""
        return self.ids.shape[0]

    @property
    def valid(self) -> jax.Array:
        """Which positions have a row of the table."""
        return ~is_beyond(self.ids)

    def gather(self, array: jax.Array) -> jax.Array:
        """The rows of an array that is as long as the table; beyond it, any of them.

        As StableHLO defines it, a gather clamps ids and a scatter, which is what the
        derivative of a gather is, drops those beyond. JAX's modes that do more keep
        XLA from fusing gathers, and a step takes half as long again.
        """
        if self.placement is not None:
            return self.placement.gather(array, self.ids)
        if self.num_rows == 0:
            return jnp.zeros((self.batch_size, *jnp.shape(array)[1:]), array.dtype)
        return (
            jnp.asarray(array)
            .at[self.ids]
            .get(
                mode="promise_in_bounds",
                wrap_negative_indices=False,
                out_sharding=rows_sharding(array, self.ids),
            )
        )

    def gather_any(self, array: ArrayLike) -> jax.Array:
        """The rows of an array that has the row axes of the table.

        Along some of them it may have one entry for all rows. The first axes of a stack
        become one.
        """
        array, count = jnp.asarray(array), len(self.axes)
        if count == 1 or array.shape[:count] == self.axes:
            return self.gather(flattened(array, self.axes))
        at, later = [], self.num_rows
        for size, given in zip(self.axes, array.shape, strict=False):
            later //= max(size, 1)
            here = self.ids // max(later, 1) % max(size, 1)
            at.append(here if given == size else jnp.zeros_like(here))
        rows: jax.Array = array.at[tuple(at)].get(
            mode="promise_in_bounds", wrap_negative_indices=False
        )
        return rows

    def scatter(self, array: jax.Array, rows: jax.Array) -> jax.Array:
        """The array with new rows; rows beyond it are dropped."""
        if self.placement is not None:
            return self.placement.scatter(array, self.ids, rows)
        return (
            jnp.asarray(array, rows.dtype)
            .at[self.ids]
            .set(
                rows,
                mode="drop",
                unique_indices=True,
                wrap_negative_indices=False,
                out_sharding=explicit_sharding(array),
            )
        )

    def mask(self, rows: jax.Array, fill: ArrayLike) -> jax.Array:
        """The rows with another value at the positions that have no row."""
        valid = jnp.expand_dims(self.valid, tuple(range(1, rows.ndim)))
        return jnp.where(valid, rows, fill)


def flattened(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A stack as one table: its first axes become one."""
    if len(axes) < 2:
        return array
    return array.reshape(math.prod(axes), *array.shape[len(axes) :])


def fetched(table: jax.Array, ids: jax.Array, row_axes: int) -> jax.Array:
    """Rows of a table by ids that are all inside."""
    columns = table.shape[row_axes:]
    if row_axes > 1:
        table = table.reshape(-1, *columns)
    numbers = GatherDimensionNumbers(
        offset_dims=tuple(range(ids.ndim, ids.ndim + len(columns))),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    rows: jax.Array = lax.gather(
        table,
        ids[..., None],
        numbers,
        slice_sizes=(1, *columns),
        mode=GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return rows


def touched(
    name: str,
    array: jax.Array,
    axes: tuple[int, ...],
    ids: jax.Array,
    rows: jax.Array,
    placement: Placement | None,
) -> tuple[Table, jax.Array]:
    """The rows of a table that slices name, and the sums of theirs.

    Args:
      name: the path of the table in the parameters.
      array: the table.
      axes: its first axes, which count its rows.
      ids: those of the slices.
      rows: theirs.
      placement: theirs.
    """
    num_rows = math.prod(axes)
    if _is_of(placement, num_rows):
        ids, rows, placement = placement.sum_duplicates(ids, rows)
        return Table(name, axes, ids, placement), rows
    ids, rows = replicated(ids, array), replicated(rows, array)
    ids, rows = sum_duplicates(ids, rows, num_rows)
    return Table(name, axes, ids), rows


def row_axes(
    shape: tuple[int, ...], row_shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The first axes of a parameter that count rows of a shape; None if none do.

    There are several if the parameter is a stack of tables. Numbers are not looked for
    in stacks, since slices of numbers for a table of longer rows are a mistake.
    """
    count = len(shape) - len(row_shape)
    is_stack = count > 1 and len(row_shape) > 0
    if shape[count:] != row_shape or not (count == 1 or is_stack):
        return None
    return shape[:count]


def add_slices(
    table: jax.Array,
    ids: jax.Array,
    rows: jax.Array,
    placement: Placement | None,
) -> jax.Array:
    """A table plus slices, in the dtype of the table.

    Raises:
      ValueError: the rows do not fit the table, or its dtype is not a floating one.
    """
    row_shape = rows.shape[ids.ndim :]
    if (axes := row_axes(table.shape, row_shape)) is None:
        raise ValueError(
            f"Rows of shape {row_shape} cannot be added to a table of shape "
            f"{table.shape}."
        )
    if not jnp.issubdtype(table.dtype, jnp.inexact):
        raise ValueError(
            f"Rows of {rows.dtype} cannot be added to a table of {table.dtype}: it "
            "must have a floating-point dtype."
        )
    total = _add_rows(flattened(table, axes), ids, rows, placement)
    return total.reshape(table.shape)


def _add_rows(
    table: jax.Array, ids: jax.Array, rows: jax.Array, placement: Placement | None
) -> jax.Array:
    num_rows, wide = len(table), at_least_float32(table.dtype)
    check_size(num_rows, ids.size)
    if num_rows == 0:
        return table
    rows = rows.astype(wide)
    if _is_of(placement, num_rows):
        if wide == table.dtype:
            return placement.add(table, ids, rows)
        ids, rows, placement = placement.sum_duplicates(ids, rows)
        old = placement.gather(table, ids).astype(wide)
        return placement.scatter(table, ids, (old + rows).astype(table.dtype))
    ids, rows = replicated(ids, table), replicated(rows, table)
    if wide == table.dtype:
        total: jax.Array = _add_at(table, ids, rows)
        return total
    ids, rows = sum_duplicates(ids, rows, num_rows)
    old = table.at[ids].get(
        mode="fill",
        fill_value=0,
        unique_indices=True,
        wrap_negative_indices=False,
        out_sharding=rows_sharding(table, ids),
    )
    return table.at[ids].set(
        (old.astype(wide) + rows).astype(table.dtype),
        mode="drop",
        unique_indices=True,
        wrap_negative_indices=False,
        out_sharding=explicit_sharding(table),
    )


def _is_of(placement: Placement | None, num_rows: int) -> TypeGuard[Placement]:
    """Whether slices are placed as a table of so many rows is spread."""
    return placement is not None and placement.spread.num_rows == num_rows


@functools.partial(jax.jit, inline=True)  # one program, also outside jit
def _add_at(table: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    return table.at[ids].add(
        rows,
        mode="drop",
        wrap_negative_indices=False,
        out_sharding=explicit_sharding(table),
    )
