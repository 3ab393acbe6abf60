"""Lookups: which rows of a table are taken, and what is made of them.

Every lookup is described as a gather (`as_gather.py` says which). Its row axes are the
first axes of the table: one, or more if the table is a stack of tables that are looked
up side by side, as `jax.vmap` does it. A row id then counts through all of them.

`table[ids, 1:3]`, of a table of shape (100, 4), is this program:

    i:i32[2,2] = concatenate[dimension=1] ids ones
    j:f32[2,2] = gather[
      dimension_numbers=GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
      slice_sizes=(1, 2)
    ] table i

It is a `Lookup` with the batch (2,), the sizes (1, 2) and one row axis.

- `ids` takes the ids out of the indices: `start_index_map` says that their first column
  is along axis 0. It clips them to 0 to 99, and those that this changes are outside.
- The rows with these ids are fetched, (2, 4), and zeros are added to them.
- `result` makes of them what the equation gives, (2, 2): the same gather again, of rows
  that already are in the order of the batch, from column 1 in each. For whole rows,
  `slice_sizes=(1, 4)`, only axes are put in their order.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import GatherDimensionNumbers, GatherScatterMode
from jax.typing import ArrayLike

from monolith_optax._rows.programs.varying import alike


@dataclass(frozen=True)
class Lookup:
    """A gather of some rows, or of columns of some rows.

    Attributes:
      shape: of the table.
      batch: the shape of the batch of ids.
      numbers: JAX's description of the gather.
      sizes: of the window that each id takes.
      mode: what ids outside the table do.
      fill: what mode FILL_OR_DROP gives for them.
      row_axes: how many axes of the table are rows.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    numbers: GatherDimensionNumbers
    sizes: tuple[int, ...]
    mode: GatherScatterMode
    fill: ArrayLike
    row_axes: int

    @property
    def windows(self) -> tuple[int, ...]:
        """How many rows each id takes along each row axis."""
        return self.sizes[: self.row_axes]

    @property
    def ids_shape(self) -> tuple[int, ...]:
        """The shape of the ids of all rows that are taken."""
        return (*self.batch, *(size for size in self.windows if size != 1))

    def ids(self, indices: ArrayLike) -> tuple[jax.Array, jax.Array | None]:
        """The ids of the rows that are taken, and which of them are in the table.

        Those that are not are the ids of other rows; all are if there is None.
        """
        indices = wide(indices)
        along = self._along(0, indices)
        for axis in range(1, self.row_axes):
            along = along * self.shape[axis] + self._along(axis, indices)
        ids = jnp.asarray(along)
        if ids.shape != self.ids_shape:
            ids = jnp.broadcast_to(ids, self.batch + self.windows)
            ids = ids.reshape(self.ids_shape)
        if self.mode == GatherScatterMode.CLIP:
            return ids, None
        inside = [
            start == self._clipped(axis, start)
            for which, axis in enumerate(self.numbers.start_index_map)
            if axis < self.row_axes or self.sizes[axis] == self.shape[axis]
            for start in [indices[..., which]]
        ]
        return ids, functools.reduce(jnp.logical_and, inside)

    def _along(self, axis: int, indices: jax.Array) -> jax.Array | np.ndarray:
        """Where along a row axis the rows are, an axis for each of the result."""
        dtype = ids_dtype(math.prod(self.shape[: self.row_axes]))
        window = np.arange(self.sizes[axis], dtype=dtype)
        after = self.row_axes - axis - 1
        window = window.reshape((1,) * (len(self.batch) + axis) + (-1,) + (1,) * after)
        start = self._start(axis, indices)
        if start is None:
            return window
        if axis in self.numbers.start_index_map:
            start = self._clipped(axis, self._seen(axis, jnp.asarray(start)))
        start = jnp.asarray(start, dtype)
        if self.windows == (1,):
            return start
        return start.reshape(start.shape + (1,) * self.row_axes) + window

    def _clipped(self, axis: int, start: jax.Array) -> jax.Array:
        last = self.shape[axis] - self.sizes[axis]
        none, last = (start.dtype.type(bound) for bound in (0, last))
        return lax.clamp(none, start, last)

    def _seen(self, axis: int, start: jax.Array) -> jax.Array:
        """Where windows start, unchanged, as `checkify.index_checks` should see it.

        Rows are fetched by ids that are all inside. So that it finds those that are
        not, they are looked up as they are in an array without columns. The sum over
        no columns is 0, which compilers know.
        """
        size, last = self.sizes[axis], start.ndim
        numbers = GatherDimensionNumbers(
            offset_dims=(last, last + 1),
            collapsed_slice_dims=(),
            start_index_map=(0,),
        )
        empty = jnp.zeros((self.shape[axis], 0), start.dtype)
        empty, start = alike([empty, start])
        windows = lax.gather(
            empty,
            start[..., None],
            numbers,
            slice_sizes=(size, 0),
            mode=GatherScatterMode.PROMISE_IN_BOUNDS,
        )
        return start + windows.sum((last, last + 1), dtype=start.dtype)

    def result(
        self, rows: jax.Array, indices: jax.Array, valid: jax.Array | None
    ) -> jax.Array:
        """What the equation gives, from the rows with the ids."""
        columns = self.shape[self.row_axes :]
        rows = rows.reshape(*self.batch, *self.windows, *columns)
        if self.sizes[self.row_axes :] == columns:
            result = self._arranged(rows)
        else:
            result = self._columns(rows, indices)
        if valid is None or self.mode != GatherScatterMode.FILL_OR_DROP:
            return result
        valid = jnp.expand_dims(valid, self.numbers.offset_dims)
        return jnp.where(valid, result, jnp.asarray(self.fill, result.dtype))

    def _start(self, axis: int, indices: jax.Array) -> jax.Array | np.ndarray | None:
        """Where windows start along an axis, with the shape of the batch or with 1s."""
        numbers = self.numbers
        if axis in numbers.start_index_map:
            return indices[..., numbers.start_index_map.index(axis)]
        if axis in numbers.operand_batching_dims:
            which = numbers.operand_batching_dims.index(axis)
            along = numbers.start_indices_batching_dims[which]
            shape = [1] * len(self.batch)
            shape[along] = self.batch[along]
            return np.arange(self.batch[along], dtype=indices.dtype).reshape(shape)
        return None

    def _dropped(self, axis: int) -> bool:
        numbers = self.numbers
        return axis in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)

    def _arranged(self, rows: jax.Array) -> jax.Array:
        """Whole rows with their axes where the gather would have them."""
        batch = len(self.batch)
        dropped = [
            batch + axis for axis in range(len(self.shape)) if self._dropped(axis)
        ]
        rows = jnp.squeeze(rows, dropped)
        offsets = iter(range(batch, rows.ndim))
        ids = iter(range(batch))
        order = [
            next(offsets) if axis in self.numbers.offset_dims else next(ids)
            for axis in range(rows.ndim)
        ]
        return rows if order == list(range(rows.ndim)) else rows.transpose(order)

    def _columns(self, rows: jax.Array, indices: jax.Array) -> jax.Array:
        """Some columns of the rows: the gather again, with rows as they come."""
        batch = len(self.batch)
        columns = range(self.row_axes, len(self.shape))
        starts = {axis: self._start(axis, wide(indices)) for axis in columns}
        along_batch = {
            axis: jnp.broadcast_to(start, self.batch)
            for axis, start in starts.items()
            if start is not None
        }
        numbers = GatherDimensionNumbers(
            offset_dims=self.numbers.offset_dims,
            collapsed_slice_dims=tuple(
                batch + axis for axis in range(len(self.shape)) if self._dropped(axis)
            ),
            start_index_map=tuple(batch + axis for axis in along_batch),
            operand_batching_dims=tuple(range(batch)),
            start_indices_batching_dims=tuple(range(batch)),
        )
        result: jax.Array = lax.gather(
            rows,
            jnp.stack([*along_batch.values()], -1),
            numbers,
            slice_sizes=((1,) * batch) + self.sizes,
            mode=self.mode,
            fill_value=self.fill,
        )
        return result


def ids_dtype(num_rows: int) -> np.dtype:
    """The dtype of ids, 32 bits if they are enough."""
    return np.dtype(np.int32 if num_rows <= np.iinfo(np.int32).max else np.int64)


def wide(indices: ArrayLike) -> jax.Array:
    """Indices in a dtype that holds every size."""
    array: jax.Array = jnp.asarray(indices)
    return array if array.dtype.itemsize >= 4 else array.astype(jnp.int32)
