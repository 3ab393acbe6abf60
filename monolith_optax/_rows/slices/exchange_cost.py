"""What the exchange of a spread table's rows sends, by its shapes."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from monolith_optax._rows.slices.duplicates import at_least_float32
from monolith_optax._rows.slices.exchange import capacity

_ID = 4  # bytes


class Exchange(NamedTuple):
    """The exchange of a batch and a table, for each device.

    Attributes:
      ids: how many ids of the batch a device has.
      limit: how many distinct ones of them its buffer holds for each owner.
      places: how many rows a device gets back as an owner.
      sent: bytes, of a batch that fits its buffers.
    """

    ids: int
    limit: int
    places: int
    sent: int


def exchange_of(
    ids: int, row_shape: tuple[int, ...], dtype: DTypeLike, owners: int, copies: int
) -> Exchange:
    """The exchange of the ids of a batch.

    Args:
      ids: of the whole batch.
      row_shape: the shape of a row of the table.
      dtype: that of the table.
      owners: over how many devices the rows are split.
      copies: how many devices have each row.
    """
    numbers = int(np.prod(row_shape, dtype=int))
    row = numbers * jnp.dtype(dtype).itemsize
    sums = numbers * jnp.dtype(at_least_float32(dtype)).itemsize
    mine = max(-(-ids // (owners * copies)), 1)
    asked = owners * capacity(mine, owners)
    sent = asked * (_ID + row)
    # Devices with the same rows share their sums before they send them to owners.
    shared = copies * mine
    places = owners * capacity(shared, owners)
    sent += places * (_ID + sums) + (shared * (_ID + sums) if copies > 1 else 0)
    return Exchange(mine, capacity(mine, owners), places, sent)


def in_bytes(number: float) -> str:
    """A number of bytes, in words."""
    for unit in "B", "kB", "MB", "GB":
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
