"""Slices of one table, one after the other, which is their sum."""

import functools
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from monolith_optax._rows.slices.spread import Pair, Placement, Spread
from monolith_optax._shardings import replicated

# Ids, their rows, and where these are.
Parts: TypeAlias = tuple[jax.Array, jax.Array, Placement | None]


def concatenated(slices: Sequence[Parts]) -> Parts:
    """Several slices as one.

    Raises:
      ValueError: there are none, their rows have several shapes, or only some of them
        are of a table that is spread over devices.
    """
    row_shapes = {rows.shape[ids.ndim :] for ids, rows, _ in slices}
    if len(row_shapes) != 1:
        raise ValueError(
            f"Slices of one table have rows of one shape, not {row_shapes or None}."
        )
    placements = [placement for *_, placement in slices if placement is not None]
    if not placements:
        whole = [(replicated(ids), replicated(rows)) for ids, rows, _ in slices]
        return *_concatenated(*whole), None
    spreads = {placement.spread for placement in placements}
    if len(placements) < len(slices) or len(spreads) > 1:
        raise ValueError(
            "Slices of a table that is spread over devices can only be added to others "
            "of the same table: take all of their gradients with the same tables= of "
            "value_and_row_grad."
        )
    [spread] = spreads
    spilled = jnp.stack([jnp.any(placement.spilled) for placement in placements])
    pairs = tuple((ids, rows) for ids, rows, _ in slices)
    return *_on_devices(pairs, spread), Placement(jnp.any(spilled), spread)


@functools.partial(jax.jit, static_argnames="spread")
def _on_devices(pairs: tuple[Pair, ...], spread: Spread) -> Pair:
    """The same for each device by itself."""
    specs = tuple((spread.of_slices(ids),) * 2 for ids, _ in pairs)
    out = spread.by_rows, spread.by_rows
    return spread.automatic(spread.on_devices(_concatenated, specs, out), out)(*pairs)


def _concatenated(*pairs: Pair) -> Pair:
    return (
        jnp.concatenate([ids.reshape(-1) for ids, _ in pairs]),
        jnp.concatenate(
            [rows.reshape(ids.size, *rows.shape[ids.ndim :]) for ids, rows in pairs]
        ),
    )
