"""A hash table of Monolith's in memory."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monolith_optax._public import public


@public("monolith_optax.checkpoint")
@dataclass(frozen=True, eq=False)
class Segment:
    """Some of a hash table's weights, and the optimizer's slots for them.

    Attributes:
      optimizer: the name of the optimizer.
      dim: how many of the table's weights are this segment's.
      slots: arrays by Monolith's names of slots, of shape (n, dim), or (n,) for those
        that have one number per entry; float32, or int64 for steps.
    """

    optimizer: str
    dim: int
    slots: dict[str, np.ndarray]


@public("monolith_optax.checkpoint")
@dataclass(frozen=True, eq=False)
class HashTable:
    """A hash table of Monolith's, of n entries.

    Attributes:
      ids: int64, (n,), ascending where the table was read. Monolith's users know them
        as `ids.view(np.uint64)`.
      weights: float32, (n, dim), of all segments, side by side.
      segments: what the weights consist of, in order.
      last_update: the time of the data that last updated an entry, in seconds since
        1970, int64, (n,); 0 where it is unknown.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    segments: tuple[Segment, ...]
    last_update: NDArray[np.int64]
