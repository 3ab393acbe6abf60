"""Raw 64-bit ids, as users have them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_int64(raw: Any) -> np.ndarray:
    """Ids of any integer dtype as int64; unsigned ones keep their bits."""
    ids = np.asarray(raw)
    if not ids.size:  # NumPy calls an empty list floats
        return np.zeros(ids.shape, np.int64)
    if ids.dtype == object:
        ids = _from_objects(ids)
    if ids.dtype.kind == "i" or ids.dtype.kind == "u":
        wide = np.int64 if ids.dtype.kind == "i" else np.uint64
        return np.ascontiguousarray(ids, wide).view(np.int64).reshape(ids.shape)
    raise TypeError(
        f"Ids must be integers, but these have the dtype {ids.dtype}. Lists of Python "
        "integers with some of 2**63 or more: np.array(ids, np.uint64)."
    )


def _from_objects(ids: np.ndarray) -> np.ndarray:
    """Python's or NumPy's integers in the dtype that holds them all, if one does."""
    for one in ids.flat:
        if not isinstance(one, int | np.integer) or isinstance(one, bool):
            raise TypeError(f"Ids must be integers, but {one!r} is among them.")
    least, most = min(map(int, ids.flat)), max(map(int, ids.flat))
    for dtype in (np.int64, np.uint64):
        if np.iinfo(dtype).min <= least and most <= np.iinfo(dtype).max:
            return ids.astype(dtype)
    raise ValueError(
        "Ids are integers of 64 bits, all signed or all unsigned, but these are from "
        f"{least} to {most}."
    )


def split_ids(raw: Any, num_owners: int) -> list[NDArray[np.int64]]:
    """Which ids of a batch belong to which owner, where `id mod num_owners` owns an id.

    Monolith's parameter servers have the same rule: the remainder of the signed id,
    from 0 to `num_owners - 1`.

    Args:
      raw: 64-bit ids, signed or unsigned, of any shape.
      num_owners: how many maps share the ids, each for one shard of a table.

    Returns:
      For each owner the positions of its ids in `raw.reshape(-1)`, int64, ascending.

    Raises:
      TypeError: `raw` does not consist of integers.
      ValueError: an integer does not fit into 64 bits, or `num_owners` is less than 1.

    Example:
      >>> import numpy as np
      >>> from monolith_optax import IdMap, split_ids
      >>> maps = [IdMap(capacity=100), IdMap(capacity=100)]  # one per shard
      >>> batch = np.array([6, 3, 6, 4])
      >>> rows = np.zeros(batch.shape, np.int32)
      >>> for owner, positions in enumerate(split_ids(batch, len(maps))):
      ...     of_shard, fresh = maps[owner].assign(batch[positions], time=0)
      ...     rows[positions] = owner * 100 + of_shard  # in the whole table
      >>> print(rows)
      [  1 101   1   2]
    """
    if num_owners < 1:
        raise ValueError(f"num_owners must be at least 1, but it is {num_owners}.")
    owners = as_int64(raw).reshape(-1) % num_owners
    order = np.argsort(owners, kind="stable")
    ends = np.cumsum(np.bincount(owners, minlength=num_owners))
    return np.split(order, ends[:-1])
