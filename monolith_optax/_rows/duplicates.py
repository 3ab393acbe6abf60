"""Sums of rows that have the same id, in float32 or wider, rounded once."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from monolith_optax._rows.shardings import explicit_sharding, replicated, rows_sharding


def sum_duplicates(
    ids: Sequence[jax.Array], rows: Sequence[jax.Array], num_rows: Sequence[int]
) -> list[tuple[jax.Array, jax.Array]]:
    """The ids and rows of several tables, with each id of a table once.

    Args:
      ids: for each table, int32 ids of any shape.
      rows: for each table, rows of shape `ids.shape + row_shape`.
      num_rows: for each table, how many rows it has.

    Returns:
      For each table as many ids as before, in one dimension, all distinct, and their
      rows. Positions of padding, and of all but one of the occurrences of an id, hold
      ids beyond the table and rows of zeros.
    """
    flat = [replicated(part).reshape(-1) for part in ids]
    for part, size in zip(flat, num_rows, strict=True):
        check_size(size, len(part))
    valid = [
        (part >= 0) & (part < size) for part, size in zip(flat, num_rows, strict=True)
    ]
    positions = one_position_each(flat, valid)
    result = []
    for part, its_rows, size, its_positions, before in zip(
        flat, rows, num_rows, positions, ids, strict=True
    ):
        here = jnp.arange(len(part), dtype=jnp.int32)
        distinct = jnp.where(its_positions == here, part, size + here)
        row_shape = its_rows.shape[before.ndim :]
        result.append((distinct, sum_rows(its_positions, its_rows, row_shape)))
    return result


def sum_rows(
    positions: jax.Array, rows: jax.Array, row_shape: tuple[int, ...]
) -> jax.Array:
    """The sums of rows at their positions, of which those beyond are dropped."""
    rows = replicated(rows).reshape(len(positions), *row_shape)
    wide = rows.astype(at_least_float32(rows.dtype))
    return jnp.zeros_like(wide).at[positions].add(wide, mode="drop").astype(rows.dtype)


def add_rows(table: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """A table plus the rows of some ids, in the dtype of the table."""
    num_rows, wide = len(table), at_least_float32(table.dtype)
    check_size(num_rows, ids.size)
    if num_rows == 0:
        return table
    rows = rows.astype(wide)
    if wide == table.dtype:
        ids = replicated(jnp.where(ids < 0, num_rows, ids))
        return table.at[ids].add(
            replicated(rows), mode="drop", out_sharding=explicit_sharding(table)
        )
    [(ids, rows)] = sum_duplicates([ids], [rows], [num_rows])
    old = table.at[ids].get(
        mode="fill",
        fill_value=0,
        unique_indices=True,
        out_sharding=rows_sharding(table, ids),
    )
    return table.at[ids].set(
        (old.astype(wide) + rows).astype(table.dtype),
        mode="drop",
        unique_indices=True,
        out_sharding=explicit_sharding(table),
    )


def at_least_float32(dtype: DTypeLike) -> jnp.dtype[Any]:
    """The dtype in which numbers of a floating-point dtype are summed."""
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32)


def check_size(num_rows: int, batch_size: int) -> None:
    """Ids from `num_rows` on stand for no row; there must be one for each position."""
    if num_rows + max(batch_size, 1) > 2**31:
        raise ValueError(
            f"A table of {num_rows} rows with a batch of {batch_size} ids is too large "
            "for int32 row ids: together they must not be more than 2**31. Split the "
            "table into several."
        )


@jax.jit  # for calls outside of jit, which would compile the loop anew each time
def one_position_each(ids: list[jax.Array], valid: list[jax.Array]) -> list[jax.Array]:
    """For each table, a position in its batch on which all occurrences of an id agree.

    Ids that are not valid get a position beyond the batch.

    In each round an id hashes to a slot and the last position that claims a slot wins
    it, for all occurrences of its id. The ids that lost continue with another hash
    function. Two rounds are the rule, and on CPU they take a fifth of the time of
    sorting. Each table has slots of its own, so that all tables share the rounds.
    """
    if not ids:
        return []
    sizes = [len(part) for part in ids]
    bits = np.array([(8 * size - 1).bit_length() for size in sizes])
    num_slots = int((1 << bits).sum())
    first_slots = _of_each_position(np.cumsum(1 << bits) - (1 << bits), sizes)
    shifts = _of_each_position(32 - bits, sizes).astype(jnp.uint32)
    all_ids, undecided = jnp.concatenate(ids), jnp.concatenate(valid)
    here = jnp.arange(len(all_ids), dtype=jnp.int32)

    def compete(carry: Any) -> Any:
        factor, positions, undecided = carry
        hashes = (all_ids.astype(jnp.uint32) * factor) >> shifts
        slots = first_slots + hashes.astype(jnp.int32)
        claimed = jnp.where(undecided, slots, num_slots)
        last = jnp.zeros(num_slots, jnp.int32).at[claimed].max(here, mode="drop")
        winners = last[slots]
        won = undecided & (all_ids[winners] == all_ids)
        return factor * _GOLDEN, jnp.where(won, winners, positions), undecided & ~won

    beyond = 0 * all_ids + len(all_ids)  # inside shard_map it varies as the ids do
    start = jnp.uint32(_GOLDEN), beyond, undecided
    _, positions, _ = jax.lax.while_loop(lambda c: c[2].any(), compete, start)
    ends = np.cumsum(sizes)
    return [
        positions[end - size : end] - (end - size)
        for size, end in zip(sizes, ends.tolist(), strict=True)
    ]


def _of_each_position(of_each_table: np.ndarray, sizes: list[int]) -> jax.Array:
    return jnp.concatenate(
        [
            jnp.full(size, value, jnp.int32)
            for value, size in zip(of_each_table.tolist(), sizes, strict=True)
        ]
    )


# 2**32 divided by the golden ratio: its odd multiples hash neighbours far apart.
_GOLDEN = np.uint32(2654435769)
