"""Ids to the devices that own their rows, and rows back.

All functions but `capacity` run inside `jax.shard_map`, on the part of each device. The
rows of a table are in blocks, one after the other on the devices of some mesh axes. A
device sends each of its distinct ids once, in a buffer that has the same number of
places for each owner. If ids are spread, this number is hardly ever too small
(`capacity`). If it is, nothing here is lost: the batch spills, and goes round a ring
(`ring.py`).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from monolith_optax._rows.slices.duplicates import LAST_ID, distinct_ids, sum_rows

Axes = tuple[str, ...]


def axes_of_rows(spec: PartitionSpec) -> Axes:
    """The mesh axes over which a spec splits the first dimension."""
    first = spec[0] if len(spec) else None
    return first if isinstance(first, tuple) else () if first is None else (first,)


# The id of an empty place in a buffer.
NOBODY = np.int32(-1)


class Route(NamedTuple):
    """Where the ids of a device's share of a batch go.

    Attributes:
      positions: for each id of the batch, the position that stands for all of its
        occurrences; beyond the batch for those of no row.
      ids: the distinct ids at these positions; elsewhere, ids beyond the table.
      places: of the distinct ids in the buffer; beyond it where there is none.
      spilled: whether a batch of any device does not fit its buffer.
    """

    positions: jax.Array
    ids: jax.Array
    places: jax.Array
    spilled: jax.Array


@functools.cache
def capacity(batch: int, devices: int) -> int:
    """How many places a buffer has for each owner.

    If each of `batch` ids goes to any owner with the same probability, an owner gets
    `batch / devices` of them on average, and more than twice or ten times as many are
    rare. It is the smallest number that, by Chernoff's bound, is too small for any of
    the `devices ** 2` pairs in less than one batch of a million. Ids that are drawn
    without repetition, as distinct ids are, spread more evenly still.
    """
    mean, enough = batch / devices, math.log(1e-6) - 2 * math.log(devices)
    places = math.ceil(mean)
    while places < batch:
        left_out = places + 1
        bound = left_out - mean - left_out * math.log(left_out / mean)
        if bound <= enough:
            break
        places += 1
    return places


def route(ids: jax.Array, num_rows: int, axes: Axes, all_axes: Axes) -> Route:
    """Where ids of one dimension go.

    Args:
      ids: those of the device.
      num_rows: of the table; ids that are not below it have no row.
      axes: the mesh axes over which rows are spread.
      all_axes: these, and those over which each row is on several devices.
    """
    batch, devices = len(ids), lax.axis_size(axes)
    limit = capacity(batch, devices)
    positions, distinct = distinct_ids(ids, num_rows)
    here = jnp.arange(batch, dtype=jnp.int32)
    owners = jnp.minimum(distinct // (num_rows // devices), devices)
    # Sorting numbers that hold both is several times as fast as sorting pairs.
    _check_keys(batch, devices)
    keys = jnp.sort(owners * batch + here)
    firsts = jnp.searchsorted(keys, batch * jnp.arange(devices + 1, dtype=jnp.int32))
    by_owner = keys // batch
    ranks = here - firsts.astype(jnp.int32)[by_owner]
    fits = (ranks < limit) & (by_owner < devices)
    places = jnp.where(fits, by_owner * limit + ranks, devices * limit)
    places = jnp.zeros(batch, jnp.int32).at[keys % batch].set(places)
    left_out = jnp.any((ranks >= limit) & (by_owner < devices))
    spilled = lax.pmax(left_out.astype(jnp.int32), all_axes) > 0
    return Route(positions, distinct, places, spilled)


def fetch(table: jax.Array, route: Route, axes: Axes) -> jax.Array:
    """Rows of the distinct ids; of ids without a place, zeros."""
    asked = to_owners(_buffer(route, route.ids, NOBODY, axes), axes)
    rows = own_rows(table, asked, axes)
    return _from(to_owners(rows, axes), route.places)


def own_sums(
    route: Route, ids: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums of rows at the positions of distinct ids.

    Args:
      route: that of the batch.
      ids: for each position of the batch its id, or NOBODY to leave it out.
      rows: as many rows.

    Returns:
      At each position that stands for an id, the id and the sum of its rows, in float32
      or wider. An id without any rows to give is NOBODY.
    """
    positions = jnp.where(ids < 0, len(ids), route.positions)
    given = jnp.full(len(ids), NOBODY).at[positions].max(ids, mode="drop")
    return given, sum_rows(positions, rows, rows.shape[1:])


def send(
    route: Route, ids: jax.Array, rows: jax.Array, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """Sums at the owners of their rows, or where they are if the batch has spilled.

    Args:
      route: that of the batch.
      ids: at the positions that stand for an id, the id or NOBODY.
      rows: their rows.
      axes: the mesh axes over which rows are spread.

    Returns:
      As many ids and rows as a buffer has places. An id may come from several devices.
    """
    sent = to_owners(_buffer(route, ids, NOBODY, axes), axes)
    sent_rows = to_owners(_buffer(route, rows, 0, axes), axes)
    more = len(sent) - len(ids)
    kept = jnp.pad(ids, (0, more), constant_values=NOBODY)
    kept_rows = jnp.pad(rows, [(0, more)] + [(0, 0)] * (rows.ndim - 1))
    return (
        jnp.where(route.spilled, kept, sent),
        jnp.where(route.spilled, kept_rows, sent_rows),
    )


def to_owners(buffer: jax.Array, axes: Axes) -> jax.Array:
    """The places of all devices for this one, in the order of the devices."""
    received: jax.Array = lax.all_to_all(buffer, axes, 0, 0, tiled=True)
    return received


def own_positions(num_own: int, ids: jax.Array, axes: Axes) -> jax.Array:
    """Where ids are in this device's block of rows; beyond it if they are not."""
    first = lax.axis_index(axes) * num_own
    here = ids - first
    return jnp.where((here >= 0) & (here < num_own), here, LAST_ID)


def own_rows(table: jax.Array, ids: jax.Array, axes: Axes) -> jax.Array:
    """This device's rows of ids, and zeros for the ids of others."""
    return _from(table, own_positions(len(table), ids, axes))


def _from(array: jax.Array, places: jax.Array) -> jax.Array:
    return array.at[places].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _buffer(route: Route, values: jax.Array, empty: ArrayLike, axes: Axes) -> jax.Array:
    devices = lax.axis_size(axes)
    size = devices * capacity(len(values), devices)
    buffer = jnp.full((size, *values.shape[1:]), empty, values.dtype)
    return buffer.at[route.places].set(values, mode="drop", wrap_negative_indices=False)


def _check_keys(batch: int, devices: int) -> None:
    if batch * (devices + 1) > LAST_ID:
        raise ValueError(
            f"{batch} ids on each of {devices} devices are too many to exchange at "
            "once: their product must be less than 2**31. Look them up in parts."
        )
