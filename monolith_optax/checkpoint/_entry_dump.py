"""EntryDump, the message of one entry of a hash table, many at a time.

Entries of a table have the same layout: the same tags at the same places, and numbers
between them. So one entry is parsed field by field, all others whose tags are the same
are found by comparing bytes, and each number becomes a column of a matrix of bytes. An
entry of another layout, such as one with packed floats or a longer time, is parsed in
turn, so that any order and any encoding is read.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from monolith_optax.checkpoint._entry_columns import Place, Varint
from monolith_optax.checkpoint._protobuf import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    MalformedError,
    fields,
    named,
)
from monolith_optax.checkpoint._segments import (
    KINDS,
    NAMES,
    PER_WEIGHT,
    STEP,
    Column,
    Segments,
)
from monolith_optax.checkpoint._tfrecord import Records

# As many entries at a time as keep their bytes in the processor's cache.
_BATCH = 1_024

# More segments than any table has.
_SEGMENTS = 4_096


@dataclass
class Layout:
    """Where the numbers of an entry are.

    Attributes:
      record: the entry that it was made of.
      id: where the id is.
      weights: where the weights are.
      slots: for each message of slots the name of its optimizer, and where its fields
        are, by their numbers.
      last_update: where the time is, if there is one.
    """

    record: bytes
    id: int | None = None
    weights: "array[int]" = field(default_factory=lambda: array("q"))
    slots: list[tuple[str, dict[int, "array[int] | Varint"]]] = field(
        default_factory=list
    )
    last_update: Varint | None = None

    def __post_init__(self) -> None:
        """Parses the entry."""
        for number, wire, start, stop in fields(self.record, 0, len(self.record)):
            if (number, wire) == (1, FIXED64):
                self.id = start
            elif (number, wire) in {(2, FIXED32), (2, BYTES)}:
                _add_floats(self.weights, start, stop)
            elif (number, wire) == (3, BYTES):
                self._add_slots(start, stop)
            elif (number, wire) == (4, VARINT):
                self.last_update = Varint(start, stop)
            elif number <= 4:
                raise MalformedError(f"has a field {number} of wire type {wire}.")
        if self.id is None:
            raise MalformedError("has no id.")

    def _add_slots(self, start: int, stop: int) -> None:
        for number, wire, first, last in fields(self.record, start, stop):
            if (number, wire) != (1, BYTES):
                raise MalformedError("has slots that are not Monolith's.")
            kinds = list(islice(fields(self.record, first, last), 2))
            if len(kinds) != 1 or kinds[0][0] not in NAMES or kinds[0][1] != BYTES:
                raise MalformedError("has slots of an unknown optimizer.")
            if len(self.slots) == _SEGMENTS:
                raise MalformedError(f"has slots of more than {_SEGMENTS} segments.")
            name, places = NAMES[kinds[0][0]], dict[int, "array[int] | Varint"]()
            for slot, wire, first, last in fields(self.record, *kinds[0][2:]):
                if slot > len(KINDS[name].slots):
                    continue
                if wire == VARINT:
                    places[slot] = Varint(first, last)
                    continue
                floats = places.setdefault(slot, array("q"))
                if wire == FIXED64 or isinstance(floats, Varint):
                    raise MalformedError(f"has a slot of {name} of wire type {wire}.")
                _add_floats(floats, first, last)
            self.slots.append((name, places))

    @cached_property
    def _mask(self) -> np.ndarray:
        """Which bits are the same in all entries of this layout, uint8 (length,)."""
        mask = np.full(len(self.record), 0xFF, np.uint8)
        for place in [self.id, self.weights, self.last_update] + [
            place for _, places in self.slots for place in places.values()
        ]:
            if isinstance(place, Varint):
                mask[place.start : place.stop] = 0x80  # whether another byte follows
            elif isinstance(place, int):
                mask[place : place + 8] = 0
            elif place is not None:
                at = np.array(place, np.int64)
                for byte in range(4):
                    mask[at + byte] = 0
        return mask

    def matches(self, entries: np.ndarray) -> np.ndarray:
        """Which entries of the same length, uint8 (n, length), have this layout."""
        whole = f"V{len(self.record)}"  # compares all bytes of an entry at once
        own = np.frombuffer(self.record, np.uint8) & self._mask
        same: np.ndarray = (entries & self._mask).view(whole)[:, 0] == own.view(whole)
        return same

    def segments(self) -> tuple[list[tuple[str, int | None]], int]:
        """The segments as far as slots tell, and how many weights they leave over.

        Optimizers without a slot per weight have a dim of None; `moving_average`
        does not show at all.
        """
        found: list[tuple[str, int | None]] = []
        for name, places in self.slots:
            dim = 1 if name == "batch_softmax" else None
            for number, kind in enumerate(KINDS[name].slots.values(), 1):
                place = places.get(number)
                if kind == PER_WEIGHT and isinstance(place, array):
                    dim = len(place)
            found.append((name, dim))
        return found, len(self.weights) - sum(dim or 0 for _, dim in found)

    def places(self, segments: Segments) -> dict[Column, Place]:
        """Where each column of a table of these segments is.

        Raises:
          MalformedError: the entry does not fit.
        """
        places: dict[Column, Place] = {
            "ids": self.id,
            "weights": self.weights,
            "last_update": self.last_update,
        }
        written = iter(self.slots)
        fits = len(self.weights) == sum(dim for _, dim in segments)
        for k, (name, dim) in enumerate(segments):
            kind = KINDS[name]
            if kind.number is None:
                continue
            found, of_number = next(written, ("", {}))
            fits &= found == name and len(of_number) == len(kind.slots)
            for number, (slot, of_kind) in enumerate(kind.slots.items(), 1):
                place = places[k, slot] = of_number.get(number)
                if of_kind == STEP:
                    fits &= isinstance(place, Varint)
                else:
                    numbers = dim if of_kind == PER_WEIGHT else 1
                    fits &= isinstance(place, array) and len(place) == numbers
        if not fits or next(written, None) is not None:
            raise MalformedError(f"does not fit {list(segments)}: {self._offer()}")
        return places

    def _offer(self) -> str:
        found, left = self.segments()
        unknown = [name for name, dim in found if dim is None]
        if len(unknown) == 1 and left > 0:
            found = [(name, dim or left) for name, dim in found]
            left, unknown = 0, []
        segments = ", ".join(f'("{name}", {dim or "?"})' for name, dim in found)
        would = f"it has {len(self.weights)} weights, and [{segments}] would fit"
        if left < 0:
            return f"{would} {len(self.weights) - left} weights."
        if unknown:
            return f"{would}, where the ? are {left} together."
        if left:
            return f'{would} with ("moving_average", {left}) at its place among them.'
        return f"{would}."


def groups(
    records: Records, path: Path
) -> Iterator[tuple[Layout, np.ndarray, np.ndarray]]:
    """Entries by their layouts.

    Yields:
      A layout, the entries (uint8, (n, length)) and their positions in `records`.

    Raises:
      ValueError: an entry is malformed.
    """
    data = np.frombuffer(records.data, np.uint8)
    latest: dict[int, Layout] = {}  # by length
    for begin in range(0, len(records.starts), _BATCH):
        lengths = records.lengths[begin : begin + _BATCH]
        for length in np.unique(lengths).tolist():
            positions = begin + np.flatnonzero(lengths == length)
            rows = sliding_window_view(data, max(length, 1))
            entries = rows[records.starts[positions]]
            while len(positions):
                layout = latest.get(length)
                if layout is None or not (same := layout.matches(entries)).any():
                    with named(path, records.first + int(positions[0])):
                        layout = Layout(records.one(int(positions[0])))
                    latest[length], same = layout, layout.matches(entries)
                if same.all():
                    yield layout, entries, positions
                    break
                yield layout, entries[same], positions[same]
                entries, positions = entries[~same], positions[~same]


def _add_floats(to: "array[int]", start: int, stop: int) -> None:
    if (stop - start) % 4:
        raise MalformedError("has packed floats that are not 4 bytes each.")
    to.extend(range(start, stop, 4))
