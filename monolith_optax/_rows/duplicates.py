"""Sums of rows that have the same id."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monolith_optax._rows.shardings import replicated
from monolith_optax._rows.slices import RowSlices, wide_ids


def sum_duplicates(slices: RowSlices, num_rows: int) -> RowSlices:
    """The same sum with each id once, in one dimension.

    There are as many ids as before. The places of padding, and of all but one of the
    occurrences of an id, hold distinct ids beyond the table and rows of zeros.
    """
    ids = replicated(wide_ids(slices.ids)).reshape(-1)
    rows = replicated(slices.rows).reshape(len(ids), *slices.row_shape)
    here = jnp.arange(len(ids), dtype=ids.dtype)
    places = _one_place_each(ids, (ids >= 0) & (ids < num_rows))
    return RowSlices(
        jnp.where(places == here, ids, num_rows + here),
        jnp.zeros_like(rows).at[places].add(rows, mode="drop"),
    )


@jax.jit  # for calls outside of jit, which would compile the loop anew each time
def _one_place_each(ids: jax.Array, valid: jax.Array) -> jax.Array:
    """A place of each id that all of its occurrences agree on; beyond if not valid.

    In each round an id hashes to a slot and the last place that claims a slot wins it,
    for all occurrences of its id. The ids that lost go on with another hash function.
    Two rounds are the rule, and on CPU they take a fifth of the time of sorting.
    """
    here = jnp.arange(len(ids), dtype=ids.dtype)
    bits = (8 * len(ids) - 1).bit_length()

    def compete(carry: Any) -> Any:
        factor, places, undecided = carry
        hashes = (ids.astype(jnp.uint32) * factor) >> np.uint32(32 - bits)
        slots = hashes.astype(jnp.int32)
        claimed = jnp.where(undecided, slots, 1 << bits)
        last = jnp.zeros(1 << bits, ids.dtype).at[claimed].max(here, mode="drop")
        winners = last[slots]
        won = undecided & (ids[winners] == ids)
        return factor * _GOLDEN, jnp.where(won, winners, places), undecided & ~won

    start = jnp.uint32(_GOLDEN), jnp.full_like(ids, len(ids)), valid
    return jax.lax.while_loop(lambda carry: carry[2].any(), compete, start)[1]


# 2**32 divided by the golden ratio: its odd multiples hash neighbours far apart.
_GOLDEN = np.uint32(2654435769)
