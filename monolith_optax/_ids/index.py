"""A hash table in NumPy, from 64-bit ids to the entries that hold them.

Open addressing, many ids at a time: each round of a probe is a few array operations on
the ids that have not found their slot yet. A slot is the 32-bit number of an entry, and
the id is compared with the entry's, so that an id costs 8 bytes and its slots 7 to 14.
Probes are triangular (1, 3, 6, ... slots further on): they visit every slot of a table
whose size is a power of two, and unlike linear probes they leave no long clusters,
where many rounds would run for the sake of a few ids.
"""

from collections.abc import Iterator

import numpy as np

# Entry 0 holds no id: a slot of 0 is empty, and an id that is not there has entry 0.
NOTHING = 0

# At most this share of the slots is taken.
_FULL = 0.6

# As many ids at a time as keep a round's arrays in the processor's cache.
_BATCH = 16_384


class IdIndex:
    """Finds the entry of an id. The ids of the entries are the caller's array."""

    def __init__(self) -> None:
        """An index of no ids."""
        self._slots = np.zeros(16, np.int32)

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes."""
        return self._slots.nbytes

    def find(self, ids: np.ndarray, ids_of: np.ndarray) -> np.ndarray:
        """The entries of ids, and `NOTHING` for those that are not there.

        Args:
          ids: int64, (n,).
          ids_of: the id of each entry, int64.
        """
        entries = np.empty(len(ids), np.int32)
        for batch in _batches(len(ids)):
            self._find(ids[batch], ids_of, entries[batch])
        return entries

    def _find(self, ids: np.ndarray, ids_of: np.ndarray, out: np.ndarray) -> None:
        slot = self._first_slots(ids)
        entries = self._slots[slot]
        out[:] = entries
        left = np.flatnonzero((entries != NOTHING) & (ids_of[entries] != ids))
        slot, ids, step = slot[left], ids[left], 1
        while len(left):
            slot = (slot + step) & (len(self._slots) - 1)
            entries = self._slots[slot]
            out[left] = entries
            again = (entries != NOTHING) & (ids_of[entries] != ids)
            left, slot, ids, step = left[again], slot[again], ids[again], step + 1

    def insert(self, first: int, last: int, ids_of: np.ndarray) -> None:
        """Adds the entries from `first` to `last`, whose ids are not there yet."""
        if last > _FULL * len(self._slots):
            size = 2 ** int(np.ceil(np.log2(last / _FULL)))
            self._slots = np.zeros(size, np.int32)
            first = NOTHING + 1
        for batch in _batches(last - first):
            entries = np.arange(first + batch.start, first + batch.stop, dtype=np.int32)
            self._insert(entries, ids_of[entries])

    def _insert(self, entries: np.ndarray, ids: np.ndarray) -> None:
        slot, step = self._first_slots(ids), 1
        while len(entries):
            empty = self._slots[slot] == NOTHING
            # Of several entries that want the same slot one gets it.
            self._slots[slot[empty]] = entries[empty]
            left = self._slots[slot] != entries
            entries, slot = entries[left], slot[left]
            slot = (slot + step) & (len(self._slots) - 1)
            step += 1

    def _first_slots(self, ids: np.ndarray) -> np.ndarray:
        """Where the probes begin: the upper bits of a well mixed id."""
        mixed = ids.view(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed >>= np.uint64(65 - len(self._slots).bit_length())
        return mixed.view(np.int64)


def _batches(length: int) -> Iterator[slice]:
    for start in range(0, length, _BATCH):
        yield slice(start, min(start + _BATCH, length))
