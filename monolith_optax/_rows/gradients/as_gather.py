"""Equations as lookups: those that take rows of a table, and those that add to them.

Three operations take rows: `gather`, and with a table of shape (100, 4)

    a:f32[2,4] = dynamic_slice[slice_sizes=(2, 4)] table i 0
    b:f32[3,4] = slice[start_indices=(10, 0) limit_indices=(16, 4) strides=(2, 1)] table

- `a` is a gather without a batch, of a window of two whole rows: sizes (2, 4), and one
  index, which has an entry for each axis. As `dynamic_slice` moves windows inside the
  table, its mode is CLIP. The ids are those of the window, `i` and `i + 1`.
- `b` is a gather of the ids 10, 12 and 14, with the batch (3,) and the sizes (1, 4).
  Its columns, all of them here, are taken from the rows later (`sliced_columns`).

`scattered` goes the other way: a `scatter-add` into zeros is the gradient of a lookup,
whose numbers are those of the scatter under other names.
"""

import math
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherDimensionNumbers, GatherScatterMode
from jax.typing import ArrayLike

from monolith_optax._rows.gradients.gather import Lookup, wide
from monolith_optax._rows.programs.jaxprs import Equation, bind, type_of


def lookup(equation: Equation) -> Lookup | str:
    """How an equation looks up its first operand, or why it does not.

    The reason continues a sentence that begins with the table.
    """
    name = str(equation.primitive.name)
    shape = type_of(equation.invars[0]).shape
    if name == "gather":
        return _of_gather(equation)
    if name == "dynamic_slice":
        sizes = equation.params["slice_sizes"]
        axes = tuple(range(len(shape)))
        numbers = GatherDimensionNumbers(axes, (), axes)
        batch: tuple[int, ...] = ()
    else:  # a slice, whose columns come after it
        sizes = (1, *shape[1:])
        numbers = GatherDimensionNumbers(tuple(range(1, len(shape))), (0,), (0,))
        batch = (len(_slice_rows(equation)),)
    if (batch or sizes)[0] == shape[0] != 1:
        return "has all of its rows taken"
    return Lookup(shape, batch, numbers, sizes, GatherScatterMode.CLIP, 0, 1)


def scattered(equation: Equation, summed: Collection[int]) -> Lookup | str:
    """The lookup to whose rows a scatter adds, or why there is none.

    Args:
      equation: the scatter.
      summed: the axes of its operand that are summed over afterwards: those of the
        batch, if it is under `jax.vmap`.
    """
    numbers = equation.params["dimension_numbers"]
    operand, indices, updates = (type_of(atom).shape for atom in equation.invars)
    if not set(summed) <= set(numbers.operand_batching_dims):
        return _UNKNOWN
    kept = [axis for axis in range(len(operand)) if axis not in summed]
    batching = [
        (kept.index(axis), along)
        for axis, along in zip(
            numbers.operand_batching_dims,
            numbers.scatter_indices_batching_dims,
            strict=True,
        )
        if axis in kept
    ]
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = iter([updates[axis] for axis in numbers.update_window_dims])
    sizes = [1 if axis in dropped else next(window) for axis in kept]
    as_gather = GatherDimensionNumbers(
        offset_dims=tuple(numbers.update_window_dims),
        collapsed_slice_dims=tuple(map(kept.index, numbers.inserted_window_dims)),
        start_index_map=tuple(map(kept.index, numbers.scatter_dims_to_operand_dims)),
        operand_batching_dims=tuple(axis for axis, _ in batching),
        start_indices_batching_dims=tuple(along for _, along in batching),
    )
    shape = tuple(operand[axis] for axis in kept)
    mode = equation.params["mode"]
    return _as_gather(shape, indices[:-1], as_gather, sizes, mode, 0)


CHANGES = ("scatter", "scatter-mul")


def changed_row(equation: Equation) -> Lookup | None:
    """Which row an equation changes, if it is all of a single one."""
    name, params = equation.primitive.name, equation.params
    if name == "scatter" and params["update_jaxpr"] is not None:
        return None  # a function of what is there
    found = scattered(equation, ())
    if isinstance(found, str) or found.row_axes > 1 or math.prod(found.ids_shape) != 1:
        return None
    return found if found.sizes[1:] == found.shape[1:] else None


def indices_of(equation: Equation, operands: Sequence[jax.Array]) -> jax.Array:
    """The indices of what is taken, in the form of a gather's.

    Args:
      equation: the lookup.
      operands: those of its operands that come after the table.
    """
    name = equation.primitive.name
    if name == "gather":
        return operands[0]
    if name == "dynamic_slice":
        return jnp.stack(list(map(wide, operands)))
    return jnp.asarray(np.asarray(_slice_rows(equation), np.int32)[:, None])


def sliced_columns(equation: Equation, rows: jax.Array) -> jax.Array:
    """The columns that a slice takes, of rows that are taken already."""
    start, limit = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"]
    columns: jax.Array = bind(
        equation,
        [rows],
        start_indices=(0, *start[1:]),
        limit_indices=(len(rows), *limit[1:]),
        strides=strides and (1, *strides[1:]),
    )[0]
    return columns


def _slice_rows(equation: Equation) -> range:
    start, limit = equation.params["start_indices"], equation.params["limit_indices"]
    return range(start[0], limit[0], (equation.params["strides"] or [1])[0])


def _of_gather(equation: Equation) -> Lookup | str:
    table, indices = (type_of(atom).shape for atom in equation.invars)
    fill = equation.params["fill_value"]
    if fill is None:
        fill = _default_fill(type_of(equation.outvars[0]).dtype)
    numbers, sizes, mode = (
        equation.params[name] for name in ("dimension_numbers", "slice_sizes", "mode")
    )
    return _as_gather(table, indices[:-1], numbers, sizes, mode, fill)


def _as_gather(
    shape: tuple[int, ...],
    batch: tuple[int, ...],
    numbers: GatherDimensionNumbers,
    sizes: Sequence[int],
    mode: GatherScatterMode,
    fill: ArrayLike,
) -> Lookup | str:
    if mode not in _MODES or not numbers.start_index_map:
        return _UNKNOWN
    rows = min(numbers.start_index_map)
    if rows == 0 and sizes[0] == shape[0] != 1:
        return "has all of its rows taken"
    if any(
        axis not in numbers.operand_batching_dims
        and (sizes[axis] != shape[axis] or rows + 1 == len(shape))
        for axis in range(rows)
    ):
        return "has a part of each of its rows taken"
    return Lookup(shape, batch, numbers, tuple(sizes), mode, fill, rows + 1)


def _default_fill(dtype: np.dtype) -> ArrayLike:
    """What JAX takes for entries outside an array."""
    if jnp.issubdtype(dtype, jnp.integer):
        unsigned = jnp.issubdtype(dtype, jnp.unsignedinteger)
        return np.iinfo(dtype).max if unsigned else np.iinfo(dtype).min
    return True if dtype == jnp.bool_ else jnp.nan


_MODES = (
    GatherScatterMode.CLIP,
    GatherScatterMode.FILL_OR_DROP,
    GatherScatterMode.PROMISE_IN_BOUNDS,
)
_UNKNOWN = "is looked up in a way that is not known"
