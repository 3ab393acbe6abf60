"""Shardings of tables, rows and ids on meshes of several devices.

On explicit axes JAX asks where the result of each gather and scatter goes. On automatic
axes its partitioner decides, and types show only the mesh. The partitioner would split
a batch of rows among the devices, and then sum whole tables over them. So ids and rows
go to all devices first.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike


def explicit_sharding(array: ArrayLike) -> NamedSharding | None:
    """The sharding that an array's type has on a mesh with explicit axes."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def replicated(array: ArrayLike, table: ArrayLike | None = None) -> Any:
    """The array on all devices of its mesh, or else of the table's.

    Every device needs the whole batch, as its rows of a table may be anywhere in it.
    Only programs need this: without a trace there is nothing to partition.
    """
    mesh = _mesh(array)
    if mesh.empty and table is not None:
        mesh = _mesh(table)
    everywhere = NamedSharding(mesh, PartitionSpec())
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(array, everywhere)
    if AxisType.Auto in mesh.axis_types and isinstance(array, jax.core.Tracer):
        return _constrained(array, everywhere)
    return jnp.asarray(array)


def _mesh(array: ArrayLike) -> Any:
    return jax.typeof(array).sharding.mesh


# Outside `jit` there are traces too, such as those of derivatives. Their arrays may be
# on one device, where JAX only accepts such a constraint inside `jit`.
@functools.partial(jax.jit, static_argnums=1)
def _constrained(array: Any, sharding: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(array, sharding)


def rows_sharding(table: ArrayLike, ids: ArrayLike) -> NamedSharding | None:
    """Where looked-up rows go if shardings are explicit: split as ids and columns."""
    sharding = explicit_sharding(table)
    if sharding is None:
        return None
    batch, columns = jax.typeof(ids).sharding.spec, sharding.spec[1:]
    if set(jax.tree.leaves(tuple(batch))) & set(jax.tree.leaves(tuple(columns))):
        columns = ()
    return NamedSharding(sharding.mesh, PartitionSpec(*batch, *columns))


def split_evenly(shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """A spec that splits the first axis that all devices can share; else none."""
    for axis, size in enumerate(shape):
        if size and size % mesh.size == 0:
            return PartitionSpec(*[None] * axis, mesh.axis_names)
    return PartitionSpec()


def with_row_axis(sharding: Any, count: int = 1, split: Any = None) -> Any:
    """A sharding whose first axes are one, for any number of rows.

    Args:
      sharding: the sharding.
      count: how many first axes become one.
      split: the mesh axes over which this is split; None: it is on all devices.
    """
    if isinstance(sharding, PartitionSpec):
        return PartitionSpec(split, *sharding[count:])
    return NamedSharding(sharding.mesh, with_row_axis(sharding.spec, count, split))
