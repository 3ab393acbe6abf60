"""Sums of rows that have the same id, in float32 or wider, rounded once."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._shardings import replicated

# The one position of each id, and ids that are all different.
_Found: TypeAlias = tuple[jax.Array, jax.Array]

# Of the rounds of `_by_hashing`: the factor, the limit, what is found, and who is left.
_Round: TypeAlias = tuple[ArrayLike, ArrayLike, _Found, jax.Array]


def sum_duplicates(
    ids: jax.Array, rows: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """The ids and rows of a table, with each id once.

    Nothing but the shape of the table depends on `num_rows`, so that XLA compiles most
    of a step only once for tables of different sizes.

    Args:
      ids: int32 ids of any shape.
      rows: rows of shape `ids.shape + row_shape`.
      num_rows: how many rows the table has.

    Returns:
      As many ids as before, in one dimension, all distinct, and their rows. Positions
      of padding, and of all but one of the occurrences of an id, hold ids beyond the
      table, for which `is_beyond` holds, and rows of zeros.
    """
    row_shape = rows.shape[ids.ndim :]
    positions, distinct = distinct_ids(replicated(ids).reshape(-1), num_rows)
    return distinct, sum_rows(positions, rows, row_shape)


def distinct_ids(ids: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The one position of each id, and ids that are all different.

    At its one position an id stays; at all others, and at those of padding, there are
    ids beyond the table, for which `is_beyond` holds.
    """
    check_size(num_rows, ids.shape[0])
    found: _Found = _search(ids, np.uint32(num_rows))
    return found


def is_beyond(distinct: jax.Array) -> jax.Array:
    """Which of the ids of `distinct_ids` stand for no row of their table."""
    return distinct > LAST_ID - distinct.shape[0]


def sum_rows(
    positions: jax.Array, rows: jax.Array, row_shape: tuple[int, ...]
) -> jax.Array:
    """The sums of rows at their positions; rows beyond them are dropped."""
    rows = replicated(rows).reshape(positions.shape[0], *row_shape)
    wide = rows.astype(at_least_float32(rows.dtype))
    sums = jnp.zeros_like(wide).at[positions]
    return sums.add(wide, mode="drop", wrap_negative_indices=False).astype(rows.dtype)


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """The dtype in which numbers of a floating-point dtype are summed."""
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32)


def check_size(num_rows: int, batch_size: int) -> None:
    """Ids from `num_rows` on stand for no row; there must be one for each position."""
    if not isinstance(batch_size, int):
        batch_size = 1  # symbolic: nobody knows it yet
    if num_rows + max(batch_size, 1) > 2**31:
        raise ValueError(
            f"A table of {num_rows} rows with a batch of {batch_size} ids is too large "
            "for int32 row ids: together they must not be more than 2**31. Split the "
            "table into several."
        )


def one_position(ids: jax.Array, num_rows: ArrayLike) -> jax.Array:
    """The last position in the batch of each id, on which all of its occurrences agree.

    Ids of no row get a position beyond the batch. `num_rows` is a uint32.
    """
    positions: jax.Array = _search(ids, num_rows)[0]
    return positions


@jax.jit  # for calls outside jit, which would compile the search anew each time
def _search(ids: jax.Array, num_rows: ArrayLike) -> _Found:
    if not isinstance(ids.shape[0], int):  # symbolic, for jax.export
        return _by_sorting(ids, num_rows)
    on_gpu = _by_pairs if len(ids) <= MOST_PAIRS else _by_sorting
    found: _Found = jax.lax.platform_dependent(
        ids, num_rows, cuda=on_gpu, rocm=on_gpu, default=_by_hashing
    )
    return found


def _by_hashing(ids: jax.Array, num_rows: ArrayLike) -> _Found:
    """In each round an id hashes to a slot, and the last position there wins the slot.

    It wins for all occurrences of its id. The ids that lost continue with another hash
    function. Two rounds are the rule, and on CPU they take a fifth of the time of
    sorting.

    The loop finds the distinct ids, too: XLA's CPU compiler makes what follows from
    positions inside each gather, which then takes twice as long.
    """
    size = len(ids)
    bits = (8 * size - 1).bit_length()
    here = jnp.arange(size, dtype=jnp.int32)
    numbers = ids.astype(jnp.uint32)  # those below zero are beyond every table

    def compete(carry: _Round) -> _Round:
        factor, limit, (positions, distinct), undecided = carry
        undecided &= numbers < limit
        slots = ((numbers * factor) >> (32 - bits)).astype(jnp.int32)
        claimed = jnp.where(undecided, slots, 1 << bits)
        nobody = jnp.zeros(1 << bits, jnp.int32).at[claimed]
        last = nobody.max(here, mode="drop", wrap_negative_indices=False)
        winners = _within(last, slots)
        won = undecided & (_within(ids, winners) == ids)
        positions = jnp.where(won, winners, positions)
        distinct = jnp.where(won & (winners == here), ids, distinct)
        return factor * _GOLDEN, _NO_LIMIT, (positions, distinct), undecided & ~won

    beyond = 0 * ids + size  # inside shard_map it varies as the ids do
    nothing = beyond, 0 * ids + LAST_ID - here
    # A limit that the rounds change is not a constant of the compiled loop, which is
    # then the same for tables of all sizes.
    start = jnp.uint32(_GOLDEN), num_rows, nothing, beyond > 0
    return jax.lax.while_loop(lambda c: c[3].any(), compete, start)[2]


def _by_pairs(ids: jax.Array, num_rows: ArrayLike) -> _Found:
    """Compares each id with each, in one kernel that stores none of the pairs.

    A loop on a GPU waits for the host in each round, which takes longer.
    """
    here = jnp.arange(len(ids), dtype=jnp.int32)
    same = ids[:, None] == ids[None, :]
    last = jnp.where(same, here[None, :], -1).max(axis=1, initial=-1)
    return _with_distinct_ids(ids, num_rows, last, here)


def _by_sorting(ids: jax.Array, num_rows: ArrayLike) -> _Found:
    """Sorts the ids once, and finds the end of each id's run by halving.

    The steps of that search are written out, so that one kernel takes them all.
    """
    size = ids.shape[0]
    bits = size.bit_length() if isinstance(size, int) else 31
    here = 0 * ids + jnp.arange(size, dtype=jnp.int32)  # inside shard_map as ids are
    ascending, order = jax.lax.sort((ids, here), num_keys=1, is_stable=True)
    up_to = 0 * ids  # how many of the sorted ids are known to be no greater
    for bit in reversed(range(bits)):
        more = up_to + (1 << bit)
        greatest = _within(ascending, jnp.minimum(more, size) - 1)
        up_to = jnp.where((more <= size) & (greatest <= ids), more, up_to)
    return _with_distinct_ids(ids, num_rows, _within(order, up_to - 1), here)


def _with_distinct_ids(
    ids: jax.Array, num_rows: ArrayLike, last: jax.Array, here: jax.Array
) -> _Found:
    positions = jnp.where(ids.astype(jnp.uint32) < num_rows, last, ids.shape[0])
    return positions, jnp.where(positions == here, ids, LAST_ID - here)


def _within(array: jax.Array, indices: jax.Array) -> jax.Array:
    return array.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)


# Beyond every table, as `check_size` holds.
LAST_ID = np.iinfo(np.int32).max

# Comparing all pairs of 16,384 ids takes longer than a loop, on an H200.
MOST_PAIRS = 8192

_NO_LIMIT = np.uint32(2**32 - 1)

# 2**32 divided by the golden ratio: its odd multiples hash neighbours far apart.
_GOLDEN = np.uint32(2654435769)
