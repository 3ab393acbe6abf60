"""Shardings of tables, rows and ids on meshes with explicit axes.

There JAX asks where the result of each gather and scatter goes. On other meshes it
finds out by itself, and all functions here leave it to that.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike


def explicit_sharding(array: ArrayLike) -> NamedSharding | None:
    """The sharding that an array's type has on a mesh with explicit axes."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def replicated(array: ArrayLike) -> jax.Array:
    """The array, on all devices if its sharding is explicit.

    Every device needs the whole batch, as its rows of a table may be anywhere in it.
    """
    sharding = explicit_sharding(array)
    if sharding is None:
        return jnp.asarray(array)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    copy: jax.Array = jax.sharding.reshard(array, everywhere)
    return copy


def rows_sharding(table: ArrayLike, ids: ArrayLike) -> NamedSharding | None:
    """Where looked-up rows go if shardings are explicit: split as ids and columns."""
    sharding = explicit_sharding(table)
    if sharding is None:
        return None
    batch, columns = jax.typeof(ids).sharding.spec, sharding.spec[1:]
    if set(jax.tree.leaves(tuple(batch))) & set(jax.tree.leaves(tuple(columns))):
        columns = ()
    return NamedSharding(sharding.mesh, PartitionSpec(*batch, *columns))


def without_row_axis(sharding: Any) -> Any:
    """A sharding with its first axis on all devices, for any number of rows."""
    if isinstance(sharding, PartitionSpec):
        return PartitionSpec(None, *sharding[1:])
    return NamedSharding(sharding.mesh, without_row_axis(sharding.spec))
