"""The rows of tables where images are looked up, and what is added to them."""

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import GatherScatterMode
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from monolith_optax._rows.gradients.lookup_tree import Arrays, Found
from monolith_optax._rows.gradients.row_images import (
    Parameter,
    Positions,
    Scope,
    Value,
)
from monolith_optax._rows.programs.varying import alike
from monolith_optax._rows.slices.row_access import fetched
from monolith_optax._rows.types import Shape
from monolith_optax._shardings import split_evenly


class Added:
    """What is added to the rows of tables where they are looked up."""

    def __init__(self, found: Found, zeros: Arrays) -> None:
        self._found = found
        leaves = [leaf for leaf, _ in found.tables]
        self._zeros = dict(zip(leaves, zeros, strict=True))
        self._ids: dict[int, jax.Array] = {}
        self._outside: jax.Array | None = None
        self._there: set[int] = set()  # tables whose rows are there already

    def rows(self, table: Parameter, at: Positions) -> jax.Array:
        """The rows of a table and what is added to them."""
        if table.is_spread:
            return self._looked_up(table, at)
        array, ids = alike([table.array, at.ids])
        ids, self._ids[table.leaf] = self._signed(ids, at.outside)
        rows = fetched(array, ids, at.row_axes)
        if not isinstance(table.first_row, int):
            of_part = table.first_row * math.prod(array.shape[1 : at.row_axes])
            ids, of_part = alike([ids, of_part])
            of_table = (ids + of_part).astype(ids.dtype)
            self._ids[table.leaf] = chosen(at.outside, -1, of_table)
        rows = rows + _placed_as(rows, self._zeros[table.leaf])
        return rows.reshape(-1, *rows.shape[ids.ndim :])

    def _signed(
        self, ids: jax.Array, outside: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The ids, and the ids with `~id` for those outside.

        All that a lookup does follows from the second array, which also goes into the
        slices. So XLA's CPU compiler makes it once, not inside each kernel that needs
        it, and the kernels of all lookups in a table are the same and compiled once.
        """
        if outside is None:
            return ids, ids
        signed = chosen(outside, ~ids, ids)
        beyond = signed < 0
        if outside is self._outside and outside.shape == beyond.shape:
            self._outside = beyond
        return jnp.where(beyond, ~signed, signed), signed

    def _looked_up(self, table: Parameter, at: Positions) -> jax.Array:
        """Rows that are there already."""
        ids, rows = at.ids, self._zeros[table.leaf]
        _, self._ids[table.leaf] = self._signed(ids, at.outside)
        self._there.add(table.leaf)
        sharding = jax.typeof(ids).sharding
        if not sharding.mesh.empty and jax.typeof(rows).sharding != sharding:
            where = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec))
            rows = jax.sharding.reshard(rows, where)
        return rows.reshape(-1, *rows.shape[ids.ndim :])

    def ids(self) -> Arrays:
        """For each table ids of the rows; `~id` or -1 for those without a gradient."""
        return [
            _in_this_mesh(self._ids[leaf], leaf in self._there)
            for leaf, _ in self._found.tables
        ]

    def lookup(
        self, indices: jax.Array, image: Value, scope: Scope
    ) -> tuple[jax.Array, jax.Array | None]:
        """The rows of an image that a lookup takes, and which of them are inside."""
        lookup = self._found.lookup
        assert lookup is not None
        ids, valid = lookup.ids(indices)
        self._outside = None if valid is None else ~valid
        ids = ids.astype(self._found.ids_dtype)
        at = Positions(ids, self._outside, lookup.row_axes, self.rows)
        rows = scope.rows(image, at)
        rows = rows.reshape(*ids.shape, *rows.shape[1:])
        if lookup.mode == GatherScatterMode.PROMISE_IN_BOUNDS:
            # JAX drops gradients of ids outside, of all that these rows depend on.
            rows = chosen(self._outside, lax.stop_gradient(rows), rows)
        return rows, None if self._outside is None else ~self._outside

    def all(self, image: Value, shape: Shape, scope: Scope) -> jax.Array:
        """An image that leaves out rows of its tables, with all of its own rows."""
        axes = len(self._found.ids_shape)
        ids = np.arange(math.prod(shape[:axes]), dtype=self._found.ids_dtype)
        # Of NumPy, so that what follows from them is computed now.
        here = cast(jax.Array, ids.reshape(shape[:axes]))
        at = Positions(here, None, axes, self.rows)
        return scope.rows(image, at).reshape(shape)


def chosen(
    mask: jax.Array | None, if_true: ArrayLike, if_false: jax.Array
) -> jax.Array:
    """Elements, or windows of them, chosen by a mask of their first axes."""
    if mask is None:
        return if_false
    mask = mask.reshape(mask.shape + (1,) * (if_false.ndim - mask.ndim))
    if_true = jnp.asarray(if_true, if_false.dtype)
    mask, if_true, if_false = alike([mask, if_true, if_false])
    return jnp.where(mask, if_true, if_false)


def _placed_as(rows: jax.Array, zeros: jax.Array) -> jax.Array:
    sharding = jax.typeof(rows).sharding
    if jax.typeof(zeros).sharding == sharding:
        return zeros
    placed: jax.Array = jax.sharding.reshard(zeros, sharding)
    return placed


def _in_this_mesh(ids: jax.Array, are_split: bool) -> jax.Array:
    """Ids whose equation stands in another kind of mesh.

    Devices exchange those of spread tables. Of others, every device needs all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or jax.typeof(ids).sharding.mesh == mesh:
        return ids
    spec = split_evenly(ids.shape, mesh) if are_split else PartitionSpec()
    placed: jax.Array = jax.sharding.reshard(ids, NamedSharding(mesh, spec))
    return placed
