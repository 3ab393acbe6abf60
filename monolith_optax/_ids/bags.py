"""Bags: features with any number of ids, as arrays of few different sizes."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from monolith_optax._public import public


@public("monolith_optax")
class Bags(NamedTuple):
    """The ids of the bags of a batch, one bag after another.

    It is made in the input pipeline, from NumPy, and is what `bag_lookup` takes:
    `bag_lookup(table, *bags)`.

    A jitted step is compiled again for each new length of `ids`. So arrays are filled
    up with -1 to one of few lengths, at most a quarter longer than the ids: four
    between a power of two and the next.

    Attributes:
      ids: int32, of shape `(capacity,)`; -1 beyond the last bag.
      offsets: int32, of shape `(num_bags + 1,)`. Bag k has the ids from `offsets[k]` to
        before `offsets[k + 1]`.
      weights: float32, of the shape of ids, with 0 beyond the last bag; None without
        weights.

    Example:
      >>> from monolith_optax import Bags
      >>> bags = Bags.from_lists([[3, 14], [], [15]])
      >>> print(bags.ids, bags.offsets)
      [ 3 14 15] [0 2 2 3]
    """

    ids: Any
    offsets: Any
    weights: Any = None

    @classmethod
    def from_lists(
        cls,
        lists: Iterable[Sequence[int]],
        weights: Iterable[Sequence[float]] | None = None,
        capacity: int | None = None,
    ) -> "Bags":
        """Bags of a list of ids each.

        Args:
          lists: for each bag its ids.
          weights: for each bag the weights of its ids.
          capacity: the length of the arrays; one of few that is enough if it is None.

        Raises:
          ValueError: an id does not fit into int32, weights do not have the lengths of
            the ids, or there are more ids than capacity.
        """
        parts = [np.asarray(part) for part in lists]
        flat = None
        if weights is not None:
            of_parts = [np.asarray(part, np.float32) for part in weights]
            if [len(part) for part in of_parts] != [len(part) for part in parts]:
                raise ValueError("weights must have a number for each id of each bag.")
            flat = np.concatenate([np.zeros(0, np.float32), *of_parts])
        lengths = [len(part) for part in parts]
        # An empty list has no integers, only NumPy's default dtype.
        filled = [part for part in parts if len(part)]
        values = np.concatenate(filled) if filled else np.zeros(0, np.int32)
        return cls.from_csr(values, np.cumsum([0, *lengths]), flat, capacity)

    @classmethod
    def from_padded(
        cls, ids: Any, weights: Any = None, capacity: int | None = None
    ) -> "Bags":
        """Bags that are the rows of an array, in which negative ids are padding.

        Args:
          ids: integers of shape `(num_bags, length)`.
          weights: numbers of the same shape.
          capacity: as for `from_lists`.

        Raises:
          ValueError: as for `from_lists`.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2:
            raise ValueError(
                f"ids must have the shape (num_bags, length), not {ids.shape}."
            )
        there = ids >= 0
        offsets = np.cumsum([0, *there.sum(axis=1)])
        flat = None if weights is None else np.asarray(weights, np.float32)[there]
        return cls.from_csr(ids[there], offsets, flat, capacity)

    @classmethod
    def from_csr(
        cls,
        values: Any,
        offsets: Any,
        weights: Any = None,
        capacity: int | None = None,
    ) -> "Bags":
        """Bags whose ids follow one another, as in a CSR matrix or a ragged tensor.

        For a `tf.RaggedTensor`, values and offsets are its `values` and `row_splits`.

        Args:
          values: the ids of all bags, of shape `(n,)`.
          offsets: where bags begin, and where the last one ends, of shape
            `(num_bags + 1,)`.
          weights: a number for each id.
          capacity: as for `from_lists`.

        Raises:
          ValueError: as for `from_lists`, or offsets do not go from 0 to n in order.
        """
        values, offsets = np.asarray(values), np.asarray(offsets)
        if len(values) and values.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers, but they are {values.dtype}.")
        count = len(values)
        if offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"offsets must go from 0 to the number of ids, {count}, in order, "
                f"but they are {offsets}."
            )
        ids = values.astype(np.int32)
        wrong = np.flatnonzero(ids != values)
        if len(wrong):
            raise ValueError(
                f"Id {values[wrong[0]]} at position {wrong[0]} does not fit into "
                "int32. Turn 64-bit ids into rows first, with IdMap.assign."
            )
        size = _length(len(ids)) if capacity is None else capacity
        if len(ids) > size:
            raise ValueError(f"There are {len(ids)} ids, but the capacity is {size}.")
        after = size - len(ids)
        filled = None
        if weights is not None:
            filled = np.pad(np.asarray(weights, np.float32), (0, after))
        ids = np.pad(ids, (0, after), constant_values=-1)
        return cls(ids, offsets.astype(np.int32), filled)


def _length(count: int) -> int:
    """The next of few lengths: four between a power of two and the next."""
    step = 1 << max((count - 1).bit_length() - 3, 0)
    return max(-(-count // step) * step, 1)
