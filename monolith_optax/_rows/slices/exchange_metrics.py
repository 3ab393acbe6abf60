"""How the ids of a batch are shared among the owners of a spread table's rows."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import keystr

from monolith_optax._public import public
from monolith_optax._rows.slices.exchange import Axes
from monolith_optax._rows.slices.row_slices import RowSlices, is_slices
from monolith_optax._rows.slices.spread import Placement, Spread
from monolith_optax._rows.types import PyTree


@public("monolith_optax")
class ExchangeMetrics(NamedTuple):
    """What `exchange_metrics` says of a batch and a table.

    Attributes:
      fits: whether the ids of all devices fitted their buffers. If not, the step took
        the slow way; its numbers are the same.
      distinct_ids: how many rows of the table have a gradient, int32.
      largest_share: the part of them that one device owns, of the device that owns most
        of them, float32. If row numbers are spread, it is near 1 / devices.
    """

    fits: jax.Array
    distinct_ids: jax.Array
    largest_share: jax.Array


def exchange_metrics(gradients: PyTree) -> dict[str, ExchangeMetrics]:
    """How a batch was shared among the devices that own the rows of spread tables.

    Call it inside the jitted step, on the gradients of `value_and_row_grad`, and return
    what it gives. Ids are counted where they are, and only a number for each device is
    sent. If batches often do not fit, row numbers are not spread.

    Args:
      gradients: a tree with slices of tables that are spread over devices. Those of
        several batches that were added or stacked count as one batch.

    Returns:
      By the path of its leaf, what is known of each spread table.

    Raises:
      ValueError: no leaf has slices of a spread table.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> from monolith_optax import exchange_metrics, value_and_row_grad
      >>> two = jax.devices()[:2]
      >>> mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=two)
      >>> rows = NamedSharding(mesh, PartitionSpec("x"))
      >>> params = {"items": jax.device_put(jnp.ones((8, 2)), rows)}
      >>> def loss(params, ids):
      ...     return params["items"][ids].sum()
      >>> def step(params, ids):
      ...     grad = value_and_row_grad(loss, {"items": rows})
      ...     return exchange_metrics(grad(params, ids)[1])
      >>> ids = jax.device_put(jnp.array([0, 0, 1, 5]), rows)
      >>> found = jax.jit(step)(params, ids)["items"]
      >>> print(found.fits, found.distinct_ids, found.largest_share)
      True 3 0.6666667
    """
    leaves = jax.tree.leaves_with_path(gradients, is_leaf=is_slices)
    found = {
        keystr(path, simple=True, separator=".") or "gradients": _of_table(
            leaf, leaf.placement
        )
        for path, leaf in leaves
        if is_slices(leaf) and leaf.placement is not None
    }
    if not found:
        raise ValueError(
            "exchange_metrics needs the gradients of tables that are spread over "
            "devices, which value_and_row_grad gives with a PartitionSpec in tables, "
            f"but these are {[keystr(path) for path, _ in leaves]} without any."
        )
    return found


def _of_table(slices: RowSlices, placement: Placement) -> ExchangeMetrics:
    nothing = jnp.zeros((*slices.ids.shape, 0), jnp.float32)
    ids, _, where = placement.sum_duplicates(slices.ids, nothing)
    owned = _owned(ids, where.spread)
    total = owned.sum(dtype=jnp.int32)
    most, all_of_them = owned.max(), jnp.maximum(total, 1)
    share = most.astype(jnp.float32) / all_of_them.astype(jnp.float32)
    return ExchangeMetrics(~where.spilled, total, share)


@functools.partial(jax.jit, static_argnames="spread")
def _owned(ids: jax.Array, spread: Spread) -> jax.Array:
    """How many of distinct ids each device owns."""
    devices = math.prod(spread.mesh.shape[axis] for axis in spread.axes)

    def local(ids: jax.Array) -> jax.Array:
        return _count(ids, spread.num_rows // devices, devices, spread.axes)

    everywhere = PartitionSpec()
    whole = spread.on_devices(local, spread.by_rows, everywhere)
    return spread.automatic(whole, everywhere)(ids)


def _count(ids: jax.Array, rows_each: int, devices: int, axes: Axes) -> jax.Array:
    owners = jnp.where(ids < 0, devices, ids // rows_each)
    counts = jnp.zeros(devices, jnp.int32).at[owners].add(1, mode="drop")
    total: jax.Array = lax.psum(counts, axes)
    return total
