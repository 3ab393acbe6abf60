"""Rows of some tables, as a caller names them: a prefix of params with row numbers."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._leaves import describe, dtype_of
from monolith_optax._rows.slices.duplicates import LAST_ID, distinct_ids
from monolith_optax._rows.slices.parts import int32_ids
from monolith_optax._rows.slices.row_access import Table, flattened
from monolith_optax._rows.types import PyTree, Shape
from monolith_optax._shardings import replicated


class NamedRows(NamedTuple):
    """Some rows of one table.

    Attributes:
      name: the path of the table in params.
      ids: their numbers, in one dimension; `LAST_ID` for padding.
      axes: the first axes of the table, which count its rows: several for a stack.
    """

    name: str
    ids: jax.Array
    axes: tuple[int, ...]

    @property
    def table(self) -> Table:
        """The positions of the rows; several may have the same row."""
        return Table(self.name, self.axes, self.ids)

    def distinct(self) -> "NamedRows":
        """Each row once, at its last position; the other positions are padding."""
        _, ids = distinct_ids(self.ids, math.prod(self.axes))
        return self._replace(ids=ids)

    def read(self, array: ArrayLike) -> jax.Array:
        """These rows of an array that has the rows of the table; zeros for padding."""
        rows = self.table.gather(flattened(jnp.asarray(array), self.axes))
        return self.table.mask(rows, np.zeros((), rows.dtype))

    def write(self, array: ArrayLike, rows: jax.Array) -> jax.Array:
        """The array with other numbers in these rows, which must be distinct."""
        flat = flattened(jnp.asarray(array), self.axes)
        return self.table.scatter(flat, rows).reshape(np.shape(array))


def named_rows(rows: PyTree, params: PyTree) -> dict[int, NamedRows]:
    """The rows that a prefix of params names, by the leaf of params.

    Leaves count as `jax.tree.leaves` does with None as a leaf.

    Raises:
      ValueError: rows is not a prefix of params, or does not fit a leaf.
      TypeError: rows are not integers.
    """
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_none)
    return {
        i: _of_leaf(f"params{keystr(path)}", leaf, ids)
        for i, ((path, leaf), ids) in enumerate(
            zip(leaves, broadcast("rows", rows, params), strict=True)
        )
        if ids is not None and leaf is not None
    }


def broadcast(what: str, prefix: PyTree, params: PyTree) -> list[PyTree]:
    """What a prefix of params says of each leaf; None counts as a leaf."""
    try:
        tree = jax.tree.broadcast(prefix, params, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(
            f"{what} must be a tree that is a prefix of the tree of params, in which "
            f"None is a leaf, but it is {jax.tree.structure(prefix)}, and that of "
            f"params is {jax.tree.structure(params)}."
        ) from error
    return jax.tree.leaves(tree, is_leaf=is_none)


def start_rows(
    what: str, start: ArrayLike | None, shape: Shape, dtype: DTypeLike
) -> jax.Array:
    """What `init` gives new rows, in their shape and dtype.

    Raises:
      ValueError: it gives nothing, or does not broadcast to their shape.
    """
    try:
        if start is None or np.broadcast_shapes(np.shape(start), shape) != shape:
            raise ValueError
    except ValueError:
        given = "None" if start is None else describe(start)
        raise ValueError(
            f"{what} must broadcast to {shape}, but init has {given} for it."
        ) from None
    return jnp.broadcast_to(jnp.asarray(start, dtype), shape)


def is_none(node: object) -> bool:
    """Whether a node of a tree is None."""
    return node is None


def _of_leaf(name: str, leaf: PyTree, ids: PyTree) -> NamedRows:
    shape = np.shape(leaf)
    if not shape:
        raise ValueError(f"rows names {name}, but a scalar has no rows.")
    if not jnp.issubdtype(dtype_of(ids), jnp.integer):
        raise TypeError(f"The rows of {name} must be integers, not {describe(ids)}.")
    axes = shape[: _count_of_axes(name, shape, ids)]
    ids = replicated(int32_ids(ids), leaf)
    flat, num_rows = _flat(ids, axes), math.prod(axes)
    flat = jnp.where((flat >= 0) & (flat < num_rows), flat, LAST_ID)
    return NamedRows(name, flat, axes)


def _count_of_axes(name: str, shape: tuple[int, ...], ids: PyTree) -> int:
    """How many axes of a leaf the ids count through."""
    given = np.shape(ids)
    if len(shape) <= 2:
        if len(given) == 1:
            return 1
        raise ValueError(
            f"The rows of {name} must have the shape (k,), but they are "
            f"{describe(ids)}."
        )
    if len(given) == 2 and 1 <= given[1] < len(shape):
        return int(given[1])
    raise ValueError(
        f"{name} has the shape {shape}, so its rows may be along its first axis, or it "
        f"may be a stack of tables, and {describe(ids)} does not say which. Give "
        "rows of shape (k, 1) for the first axis, or (k, 2) for pairs of a table and "
        "a row in it."
    )


def _flat(ids: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Row numbers that count through all axes; -1 if one of them is outside its own."""
    if ids.ndim == 1:
        return ids
    sizes = np.asarray(axes, np.int32)
    inside = ((ids >= 0) & (ids < sizes[None])).all(axis=1)
    steps = np.cumprod([1, *axes[:0:-1]], dtype=np.int32)[::-1]
    return jnp.where(inside, (ids * steps[None]).sum(axis=1, dtype=jnp.int32), -1)
