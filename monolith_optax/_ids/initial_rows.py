"""First weights of new ids, which depend on a seed and the id and on nothing else."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from monolith_optax._ids.raw import as_int64


def uniform_rows(
    scale: float, *, seed: int = 0
) -> Callable[[Any, tuple[int, ...]], Any]:
    """First weights of new ids, uniform between -scale and scale.

    They depend on the seed, the id and the column and on nothing else: not on the
    batch, the order in which ids come, or the size of any table. NumPy on the host and
    JAX on every device compute the same bits.

    Args:
      scale: the largest weight.
      seed: a number from 0 to 2**64 - 1. Give each table another one.

    Returns:
      A function of ids of shape (k,) and the shape of a row, which returns float32 of
      shape (k, *shape). Ids are integers of 64 bits, signed or unsigned, or a pair of
      uint32 arrays, the lower and the upper bits of each id, since JAX has no integers
      of 64 bits by default; its result is then a JAX array if they are.

    Raises:
      ValueError: `scale` is not finite, or `seed` is out of range.

    Example:
      >>> import numpy as np
      >>> from monolith_optax import uniform_rows
      >>> first = uniform_rows(0.05, seed=1)
      >>> rows = first([2**60, 7], (3,))
      >>> print(rows.shape, np.array_equal(rows[1:], first([7], (3,))))
      (2, 3) True
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, but it is {scale}.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, but it is {seed}.")
    seeds = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)
    # One rounding, so that no compiler can make other bits of it.
    unit = np.float32(scale / 2**24)

    def rows(ids: Any, shape: tuple[int, ...]) -> Any:
        lower, upper = ids if isinstance(ids, tuple) else _halves(ids)
        one = _mixed(lower ^ seeds[0])
        # Mixed twice, so that no upper bits undo what a column does to the lower ones.
        other = _mixed(_mixed(one ^ upper ^ seeds[1]))
        columns = np.arange(1, math.prod(shape) + 1, dtype=np.uint32)[None]
        columns = columns * np.uint32(0x9E3779B9)
        bits = _mixed(_mixed(one[:, None] ^ columns) ^ other[:, None])
        # 24 bits as odd numbers around 0, each of which float32 has.
        odd = (bits >> np.uint32(8)).astype(np.int32) * np.int32(2) - np.int32(
            2**24 - 1
        )
        return (odd.astype(np.float32) * unit).reshape(-1, *shape)

    return rows


def _halves(raw: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = as_int64(raw).view(np.uint64)
    return ids.astype(np.uint32), (ids >> np.uint64(32)).astype(np.uint32)


def _mixed(x: Any) -> Any:
    """A bijection of 32 bits in which each bit depends on all others."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
