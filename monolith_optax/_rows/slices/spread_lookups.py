"""Lookups in spread tables, and their gradients on the way back."""

import functools
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from monolith_optax._rows.slices import exchange, ring
from monolith_optax._rows.slices.duplicates import at_least_float32
from monolith_optax._rows.slices.exchange import NOBODY, Route
from monolith_optax._rows.slices.spread import Placement, Spread
from monolith_optax._rows.types import PyTree
from monolith_optax._shardings import rows_sharding

Arrays: TypeAlias = Sequence[jax.Array]
Found: TypeAlias = tuple[list[jax.Array], Route]
Sent: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def look_up(
    spread: Spread, table: jax.Array, ids: Sequence[jax.Array]
) -> tuple[list[jax.Array], Route]:
    """Rows of a table for several arrays of ids, and the route that they took.

    The ids may have any shape; those outside the table get zeros. For arrays of the
    same shape, `send` then brings gradients the same way back.
    """
    rows, route = _look_up(table, tuple(ids), spread)
    return rows, route


def send(
    spread: Spread,
    route: Route,
    ids: Sequence[jax.Array],
    rows: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array, Placement]:
    """Gradients of rows that were looked up, as ids, rows and placement of slices.

    Args:
      spread: how the rows of the table are spread.
      route: that of the lookup.
      ids: the same ids, in the same arrays, or NOBODY for those without a gradient.
      rows: their gradients.
    """
    ids_, rows_, spilled = _send(route, tuple(ids), tuple(rows), spread)
    return ids_, rows_, Placement(spilled, spread)


@functools.partial(jax.jit, static_argnames="spread")
def _look_up(table: jax.Array, ids: Arrays, spread: Spread) -> Found:
    split = PartitionSpec(spread.all_axes)

    def local(table: jax.Array, ids: Arrays) -> Found:
        sizes = list(map(len, ids))
        found = _route(jnp.concatenate(ids), spread)
        rows = exchange.fetch(table, found, spread.axes)
        ringed = ring.gather(table, found.ids, found.spilled, spread.axes)
        rows = jnp.where(found.spilled, ringed, rows)
        rows = rows.at[found.positions].get(mode="fill", fill_value=0)
        return jnp.split(rows, np.cumsum(sizes)[:-1]), found

    def whole(table: jax.Array, ids: Arrays) -> Found:
        shares = [_share(each, each.ndim, NOBODY, spread) for each in ids]
        run = spread.on_devices(
            local, (spread.by_rows, split), (split, _of_route(split))
        )
        parts, found = run(table, shares)
        rows = [
            part[: each.size].reshape(*each.shape, *table.shape[1:])
            for part, each in zip(parts, ids, strict=True)
        ]
        return rows, found

    specs = [rows_sharding(table, each) for each in ids]
    of_rows = [PartitionSpec() if each is None else each.spec for each in specs]
    return spread.automatic(whole, (of_rows, _of_route(split)))(table, ids)


@functools.partial(jax.jit, static_argnames="spread")
def _send(route: Route, ids: Arrays, rows: Arrays, spread: Spread) -> Sent:
    split, dtype = PartitionSpec(spread.all_axes), rows[0].dtype

    def local(route: Route, ids: Arrays, rows: Arrays) -> Sent:
        wide = jnp.concatenate(rows).astype(at_least_float32(dtype))
        sums = exchange.own_sums(route, jnp.concatenate(ids), wide)
        if others := spread.other_axes:  # the owners on the other axes need them, too
            gathered = [lax.all_gather(each, others, tiled=True) for each in sums]
            route = _route(gathered[0], spread)
            sums = exchange.own_sums(route, *gathered)
        sums = exchange.send(route, *sums, spread.axes)
        if wide.dtype != dtype:  # narrow rows are rounded once, at the owner
            sums = ring.sum_duplicates(
                *sums, spread.num_rows, route.spilled, spread.axes
            )
        return sums[0], sums[1].astype(dtype), route.spilled

    def whole(route: Route, ids: Arrays, rows: Arrays) -> Sent:
        shares = [
            (
                _share(some, some.ndim, NOBODY, spread),
                _share(of_them, some.ndim, 0, spread),
            )
            for some, of_them in zip(ids, rows, strict=True)
        ]
        run = spread.on_devices(local, (_of_route(split), split, split), out)
        return run(route, *map(list, zip(*shares, strict=True)))

    out = spread.by_rows, spread.by_rows, PartitionSpec()
    return spread.automatic(whole, out)(route, ids, rows)


def _route(ids: jax.Array, spread: Spread) -> Route:
    return exchange.route(ids, spread.num_rows, spread.axes, spread.all_axes)


def _of_route(split: PartitionSpec) -> PyTree:
    return Route._make([split] * 3 + [PartitionSpec()])


def _share(array: jax.Array, axes: int, fill: ArrayLike, spread: Spread) -> jax.Array:
    """An array whose first axes become one that can be split over all devices."""
    flat = array.reshape(-1, *array.shape[axes:])
    devices = spread.mesh.size
    missing = devices * -(-max(len(flat), 1) // devices) - len(flat)
    padding = [(0, missing)] + [(0, 0)] * (flat.ndim - 1)
    return jnp.pad(flat, padding, constant_values=fill) if missing else flat
