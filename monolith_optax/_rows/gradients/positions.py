"""Where images are looked up, and the rows of tables there."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import GatherScatterMode
from jax.sharding import NamedSharding, PartitionSpec

from monolith_optax._rows.gradients.lookup_tree import Found
from monolith_optax._rows.gradients.row_images import (
    Image,
    Parameter,
    Scope,
    in_order,
    is_table,
)
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.custom_rules import run_with_derivatives
from monolith_optax._rows.programs.row_values import Rows, Value, Whole
from monolith_optax._rows.programs.run_on_rows import Runner
from monolith_optax._rows.slices.row_access import Table, fetched


class Added:
    """What is added to the rows of tables where they are looked up."""

    def __init__(self, found: Found, zeros: Sequence[Any]) -> None:
        self._found = found
        leaves = [leaf for leaf, _ in found.tables]
        self._zeros = dict(zip(leaves, zeros, strict=True))
        self._ids: dict[int, Any] = {}
        self._outside: Any = None

    def rows(self, table: Parameter, at: "Positions") -> jax.Array:
        """The rows of a table and what is added to them."""
        if table.is_spread:
            return self._looked_up(table, at)
        array, ids = jaxprs.alike([table.array, at.ids])
        ids, self._ids[table.leaf] = self._signed(ids, at.outside)
        rows: jax.Array = fetched(array, ids, at.row_axes)
        if not isinstance(table.first_row, int):
            of_part = table.first_row * math.prod(array.shape[1 : at.row_axes])
            ids, of_part = jaxprs.alike([ids, of_part])
            of_table = (ids + of_part).astype(ids.dtype)
            self._ids[table.leaf] = chosen(at.outside, -1, of_table)
        rows = rows + _placed_as(rows, self._zeros[table.leaf])
        flat: jax.Array = rows.reshape(-1, *rows.shape[ids.ndim :])
        return flat

    def _signed(self, ids: jax.Array, outside: Any) -> tuple[jax.Array, jax.Array]:
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

    def _looked_up(self, table: Parameter, at: "Positions") -> jax.Array:
        """Rows that are there already."""
        ids, rows = at.ids, self._zeros[table.leaf]
        _, self._ids[table.leaf] = self._signed(ids, at.outside)
        sharding = jax.typeof(ids).sharding
        if not sharding.mesh.empty and jax.typeof(rows).sharding != sharding:
            where = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec))
            rows = jax.sharding.reshard(rows, where)
        flat: jax.Array = rows.reshape(-1, *rows.shape[ids.ndim :])
        return flat

    def ids(self) -> list[Any]:
        """For each table ids of the rows; `~id` or -1 for those without a gradient."""
        return [_in_this_mesh(self._ids[leaf]) for leaf, _ in self._found.tables]

    def lookup(self, indices: Any, image: Any, scope: Scope) -> tuple[jax.Array, Any]:
        """The rows of an image that a lookup takes, and which of them are inside."""
        lookup = self._found.lookup
        assert lookup is not None
        ids, valid = lookup.ids(indices)
        self._outside = None if valid is None else ~valid
        ids = ids.astype(self._found.ids_dtype)
        at = Positions(ids, self._outside, lookup.row_axes, scope, self)
        rows = at.rows(image)
        rows = rows.reshape(*ids.shape, *rows.shape[1:])
        if lookup.mode == GatherScatterMode.PROMISE_IN_BOUNDS:
            # JAX drops gradients of ids outside, of all that these rows depend on.
            rows = chosen(self._outside, lax.stop_gradient(rows), rows)
        return rows, None if self._outside is None else ~self._outside

    def all(self, image: Any, shape: tuple[int, ...], scope: Scope) -> jax.Array:
        """An image that leaves out rows of its tables, with all of its own rows."""
        axes = len(self._found.ids_shape)
        ids = np.arange(math.prod(shape[:axes]), dtype=self._found.ids_dtype)
        at = Positions(ids.reshape(shape[:axes]), None, axes, scope, self)
        result: jax.Array = at.rows(image).reshape(shape)
        return result


class Positions:
    """Rows of an image, in an array of ids that are all inside it.

    Attributes:
      ids: the ids.
      outside: which of them stand for others that are not inside; none, if it is None.
      row_axes: how many of the image's axes are rows.
      scope: the run of the program in which they are looked up.
    """

    def __init__(
        self, ids: Any, outside: Any, row_axes: int, scope: Scope, added: Added
    ) -> None:
        self.ids, self.outside, self.row_axes = ids, outside, row_axes
        self.scope, self._added = scope, added
        self._done: dict[int, Any] = {}
        self._tables: dict[Parameter, Any] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return math.prod(self.ids.shape)

    def rows(self, image: Any) -> Any:
        """The rows of an image, one after the other."""
        if isinstance(image, Parameter):
            if image not in self._tables:
                self._tables[image] = self._added.rows(image, self)
            return self._tables[image]
        for each in in_order(image, _needed, self._done):
            self._done[each.serial] = each.way.rows(each, self)
        return self._done[image.serial]

    def gather(self, array: Any) -> jax.Array:
        """The rows of an array that is there."""
        array, ids = jaxprs.alike([jnp.asarray(array), self.ids])
        rows = fetched(array, ids, self.row_axes)
        return rows.reshape(-1, *rows.shape[ids.ndim :])

    def moved(self, ids: Any, row_axes: int) -> "Positions":
        """Other positions, of rows from which these follow."""
        return Positions(ids, self.outside, row_axes, self.scope, self._added)

    def part(self, first_row: int, num_rows: int) -> tuple["Positions", jax.Array]:
        """The positions in some of the rows, and which positions are in them.

        The others are at rows that do not matter.
        """
        ids = self.ids - first_row
        inside = (ids >= 0) & (ids < num_rows)
        outside = ~inside
        if self.outside is not None:  # one for each window of several rows
            windows = (1,) * (inside.ndim - self.outside.ndim)
            outside |= self.outside.reshape(self.outside.shape + windows)
        ids = jnp.clip(ids, 0, max(num_rows - 1, 0))
        part = Positions(ids, outside, self.row_axes, self.scope, self._added)
        return part, inside.reshape(-1)

    def ruled(self, image: Image) -> Any:
        """The rows of a result of a function with its own derivative rule."""
        num_rows = jaxprs.type_of(image.equation.outvars[image.index]).shape[0]
        table = _Anywhere("the table", num_rows, self.ids.reshape(-1))
        runner = Runner([table])
        values: list[Value] = [
            Rows(self.rows(value), table)
            if is_table(value)
            else Whole(self.scope.whole(value))
            for value in image.operands
        ]
        results = run_with_derivatives(runner.run, image.equation, values)
        return results[image.index].at(table)


def _needed(image: Image) -> Any:
    return () if image.way.moves else image.operands


class _Anywhere(Table):
    """Any positions; several may have the same row."""

    def gather(self, array: jax.Array) -> jax.Array:
        array, ids = jaxprs.alike([jnp.asarray(array), self.ids])
        rows: jax.Array = fetched(array, ids, 1)
        return rows


def chosen(mask: Any, if_true: Any, if_false: jax.Array) -> jax.Array:
    """Elements, or windows of them, chosen by a mask of their first axes."""
    if mask is None:
        return if_false
    mask = mask.reshape(mask.shape + (1,) * (if_false.ndim - mask.ndim))
    if_true = jnp.asarray(if_true, if_false.dtype)
    mask, if_true, if_false = jaxprs.alike([mask, if_true, if_false])
    return jnp.where(mask, if_true, if_false)


def _placed_as(rows: jax.Array, zeros: jax.Array) -> jax.Array:
    sharding = jax.typeof(rows).sharding
    if jax.typeof(zeros).sharding == sharding:
        return zeros
    placed: jax.Array = jax.sharding.reshard(zeros, sharding)
    return placed


def _in_this_mesh(ids: jax.Array) -> jax.Array:
    """Ids whose equation stands in another kind of mesh, on all devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or jax.typeof(ids).sharding.mesh == mesh:
        return ids
    placed: jax.Array = jax.sharding.reshard(ids, NamedSharding(mesh, PartitionSpec()))
    return placed
