"""Lookups with something added to the rows that they take."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import GatherScatterMode
from jax.sharding import NamedSharding, PartitionSpec

from monolith_optax._rows.gradients import as_gather
from monolith_optax._rows.gradients.image_rows import rows as rows_of_image
from monolith_optax._rows.gradients.lookup_tree import Found
from monolith_optax._rows.gradients.row_images import Leaf, leaves_of, whole
from monolith_optax._rows.gradients.rule_lookups import Rule
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation
from monolith_optax._rows.slices.row_access import Table, fetched


class _At:
    """Where an equation looks its image up."""

    def __init__(self, found: Found, ids: Any, valid: Any, zeros: Any) -> None:
        self._found, self._lookup, self._all_zeros = found, found.lookup, zeros
        self._local, self._valid = ids, valid
        self._zeros = dict(zip(found.leaves, zeros, strict=True))
        self.table = _Positions("the table", found.lookup.num_rows, ids.reshape(-1))
        self.ids: dict[int, Any] = {}

    def leaf(self, leaf: Leaf) -> jax.Array:
        """The rows of a table, and what is added to them."""
        rows = fetched(leaf.array, self._local, self._lookup.row_axes)
        outside = None if self._valid is None else ~self._valid
        if self._lookup.mode == GatherScatterMode.PROMISE_IN_BOUNDS:
            rows = _chosen(outside, lax.stop_gradient(rows), rows)
        first_row = leaf.first_row * self._lookup.rows_of_first_axis
        ids = (self._local + first_row).astype(self._local.dtype)
        self.ids[leaf.index] = _chosen(outside, -1, ids)
        rows = rows + _placed_as(rows, self._zeros[leaf.index])
        return rows.reshape(-1, *rows.shape[self._local.ndim :])

    def part(self, first_row: int, num_rows: int) -> tuple["_At", jax.Array]:
        """The positions in some of the rows, and which positions are in them."""
        ids = self._local - first_row
        inside = (ids >= 0) & (ids < num_rows)
        valid = inside if self._valid is None else self._valid & inside
        ids = jnp.clip(ids, 0, max(num_rows - 1, 0))
        part = _At(self._found, ids, valid, self._all_zeros)
        part.ids = self.ids
        return part, inside.reshape(-1)


class _Positions(Table):
    """Any positions, of which several may have the same row."""

    def gather(self, array: jax.Array) -> jax.Array:
        return fetched(jnp.asarray(array), self.ids, 1)


def look_up(
    equation: Equation, operands: Sequence[Any], found: Found, zeros: Any
) -> tuple[list[Any], list[Any]]:
    """The result of a lookup with zeros added to its rows, and the ids of the rows."""
    image = operands[0]
    with jaxprs.standing_at(equation):
        indices = as_gather.indices_of(equation, list(map(whole, operands[1:])))
        ids, valid = found.lookup.ids(indices)
        at = _At(found, ids, valid, zeros)
        rows = rows_of_image(image, at)
        result = found.lookup.result(rows, indices, valid)
        if equation.primitive.name == "slice":
            result = as_gather.sliced_columns(equation, result)
    return [result], [_in_this_mesh(at.ids[leaf]) for leaf in found.leaves]


def run_rule(
    equation: Equation, operands: Sequence[Any], found: Sequence[Found], zeros: Any
) -> tuple[list[Any], list[Any]]:
    """The results of a function whose rule gives tables a gradient, and the ids of it.

    The rows to which it gives a gradient have zeros added, as if they were looked up.
    """
    rule, arrays = Rule(equation), list(map(whole, operands))
    tables = [i for i, value in enumerate(operands) if leaves_of([value])]
    scatters = [(i, scatter) for i in tables for scatter in rule.scatters(i)]
    indices = rule.indices(arrays, [scatter for _, scatter in scatters])
    rows, ids = [], []
    for (i, _), lookup, where, added in zip(
        scatters, found, indices, zeros, strict=True
    ):
        at = _At(lookup, *lookup.lookup.ids(where), added)
        rows.append(rows_of_image(operands[i], at))
        ids.append([_in_this_mesh(at.ids[leaf]) for leaf in lookup.leaves])
    results = rule.run(arrays, tables, rows, [scatter for _, scatter in scatters])
    return results, ids


def _chosen(mask: Any, if_true: Any, if_false: jax.Array) -> jax.Array:
    """Elements, or windows of them, chosen by a mask of their first axes."""
    if mask is None:
        return if_false
    mask = mask.reshape(mask.shape + (1,) * (if_false.ndim - mask.ndim))
    return jnp.where(mask, jnp.asarray(if_true, if_false.dtype), if_false)


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
