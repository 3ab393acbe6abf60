"""Rows of ids that are on any device: they go round a ring.

It is the slow and exact way for batches that do not fit their buffers (`exchange.py`),
which needs no more memory than one device's share. All functions run inside
`jax.shard_map`. A batch that has not spilled makes no turn: a loop of no turns costs
nothing and leaves a table where it is, which `lax.cond` would copy.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from monolith_optax._rows.slices.duplicates import (
    LAST_ID,
    at_least_float32,
    distinct_ids,
    one_position,
    sum_rows,
)
from monolith_optax._rows.slices.exchange import Axes, own_positions, own_rows
from monolith_optax._rows.types import EquationParams

Pair: TypeAlias = tuple[jax.Array, jax.Array]  # ids and their rows

# How ids beyond an array are left out of a scatter.
_DROP: EquationParams = {"mode": "drop", "wrap_negative_indices": False}


def gather(
    array: jax.Array, ids: jax.Array, spilled: jax.Array, axes: Axes
) -> jax.Array:
    """Rows of ids: of this device's at once, those of others by the ring."""

    def turn(_: jax.Array, carry: Pair) -> Pair:
        ids, rows = _passed_on(carry, axes)
        return ids, rows + own_rows(array, ids, axes)

    rows = own_rows(array, ids, axes)
    turns = lax.axis_size(axes) - 1
    carry = lax.fori_loop(0, jnp.where(spilled, turns, 0), turn, (ids, rows))
    # The last one brings them home.
    home = jnp.where(spilled, 1, 0)
    _, rows = lax.fori_loop(0, home, lambda _, carry: _passed_on(carry, axes), carry)
    return jnp.asarray(rows)


def scatter(
    array: jax.Array,
    ids: jax.Array,
    rows: jax.Array,
    spilled: jax.Array,
    axes: Axes,
    *,
    add: bool,
) -> jax.Array:
    """The array with new rows at distinct ids, or with something added to its rows."""

    def put(array: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
        at = array.at[own_positions(len(array), ids, axes)]
        return at.add(rows, **_DROP) if add else at.set(rows, **_DROP)

    def turn(_: jax.Array, carry: tuple[jax.Array, Pair]) -> tuple[jax.Array, Pair]:
        array, passed = carry
        ids, rows = _passed_on(passed, axes)
        return put(array, ids, rows), (ids, rows)

    turns = jnp.where(spilled, lax.axis_size(axes) - 1, 0)
    first = put(array, ids, rows), (ids, rows)
    array, _ = lax.fori_loop(0, turns, turn, first)
    return array


def sum_duplicates(
    ids: jax.Array, rows: jax.Array, num_rows: int, spilled: jax.Array, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """The ids and rows of all devices, with each id once on one of the devices.

    It is `duplicates.sum_duplicates`. If a batch has spilled, an id with its complete
    sum stays on the first of the devices that have it.
    """
    positions, distinct = distinct_ids(ids, num_rows)
    wide = rows.astype(at_least_float32(rows.dtype))
    mine = sum_rows(positions, wide, rows.shape[ids.ndim :])
    here, device = jnp.arange(len(ids), dtype=jnp.int32), lax.axis_index(axes)

    def turn(
        count: jax.Array, carry: tuple[Pair, jax.Array, jax.Array]
    ) -> tuple[Pair, jax.Array, jax.Array]:
        passed, total, kept = carry
        ids, rows = _passed_on(passed, axes)
        # The last position of an id that both have is one of this device.
        both = one_position(jnp.concatenate([ids, distinct]), np.uint32(num_rows))
        mine = both[: len(ids)] - len(ids)
        mine = jnp.where((mine >= 0) & (mine < len(ids)), mine, LAST_ID)
        total = total.at[mine].add(rows, **_DROP)
        before = device > count  # the ids came from an earlier device, which keeps them
        kept = kept.at[jnp.where(before, mine, LAST_ID)].set(False, **_DROP)
        return (ids, rows), total, kept

    start = (distinct, mine), mine, jnp.ones(len(ids), bool)
    turns = jnp.where(spilled, lax.axis_size(axes) - 1, 0)
    _, total, kept = lax.fori_loop(0, turns, turn, start)
    total = jnp.where(jnp.expand_dims(kept, range(1, total.ndim)), total, 0)
    return jnp.where(kept, distinct, LAST_ID - here), total.astype(rows.dtype)


def _passed_on(pair: Pair, axes: Axes) -> Pair:
    """The ids and rows that the device before this one had."""
    devices = lax.axis_size(axes)
    steps = [(device, (device + 1) % devices) for device in range(devices)]
    ids, rows = (lax.ppermute(array, axes, steps) for array in pair)
    return ids, rows
