"""The numbers of many entries of one layout: columns of a matrix of their bytes."""

from array import array
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from monolith_optax.checkpoint._protobuf import BYTES, FIXED32, FIXED64, varint_bytes
from monolith_optax.checkpoint._segments import (
    KINDS,
    PER_WEIGHT,
    STEP,
    Column,
    Segments,
)


class Varint(NamedTuple):
    """The bytes of an integer of variable length."""

    start: int
    stop: int


# Where the numbers of a column are: an int64, floats at offsets, or an integer; None
# for a time that was left out.
Place: TypeAlias = "int | array[int] | Varint | None"


def read_column(entries: np.ndarray, place: Place) -> np.ndarray:
    """The numbers at one place of entries of one layout.

    Args:
      entries: uint8, (n, length).
      place: where the numbers are.

    Returns:
      int64 (n,), or float32 (n, number of floats), perhaps a view.
    """
    if place is None:
        return np.zeros(len(entries), np.int64)
    if isinstance(place, int):
        return _strided(entries, "<i8", place, 1, 8)[:, 0]
    if isinstance(place, Varint):
        value = np.zeros(len(entries), np.uint64)
        for shift, at in enumerate(range(place.start, place.stop)):
            bits = (entries[:, at] & 0x7F).astype(np.uint64)
            value |= bits << np.uint64(7 * shift)
        return value.view(np.int64)
    offsets = np.array(place, np.int64)
    if _is_regular(offsets):
        step = int(offsets[1] - offsets[0]) if len(offsets) > 1 else 4
        return _strided(entries, "<f4", int(offsets[0]), len(offsets), step)
    numbers = np.ascontiguousarray(entries[:, offsets[:, None] + np.arange(4)])
    return numbers.view("<f4")[:, :, 0]


def write_column(entries: np.ndarray, place: Place, values: np.ndarray) -> None:
    """The way back from `read_column`, for places in what `blank` made."""
    if isinstance(place, int):
        _strided(entries, "<i8", place, 1, 8)[:, 0] = values
    elif isinstance(place, Varint):
        last = place.stop - 1
        for shift, at in enumerate(range(place.start, place.stop)):
            more = 0x80 if at < last else 0
            bits = values.view(np.uint64) >> np.uint64(7 * shift)
            entries[:, at] = (bits & np.uint64(0x7F)).astype(np.uint8) | more
    elif place is not None:
        # The tag of each float is one byte.
        floats = _strided(entries, "<f4", place[0], len(place), 5)
        floats[:] = values.reshape(floats.shape)


def varint_lengths(values: np.ndarray) -> np.ndarray:
    """How many bytes integers take, (n,)."""
    bits = np.arange(7, 64, 7, dtype=np.uint64)
    lengths: np.ndarray = 1 + np.sum(
        values.view(np.uint64)[:, None] >> bits > 0, axis=1
    )
    return lengths


def blank(segments: Segments, lengths: Mapping[Column, int]) -> bytes:
    """An entry as Monolith writes it, with zeros for numbers.

    Args:
      segments: of the table.
      lengths: how many bytes each integer takes.
    """

    def integer(number: int, column: Column) -> bytes:
        return varint_bytes(number << 3) + b"\x80" * (lengths[column] - 1) + b"\0"

    def message(number: int, content: bytes) -> bytes:
        return varint_bytes(number << 3 | BYTES) + varint_bytes(len(content)) + content

    def floats(number: int, count: int) -> bytes:
        return (varint_bytes(number << 3 | FIXED32) + bytes(4)) * count

    slots = b""
    for k, (name, dim) in enumerate(segments):
        kind = KINDS[name]
        content = b"".join(
            integer(number, (k, slot))
            if of_kind == STEP
            else floats(number, dim if of_kind == PER_WEIGHT else 1)
            for number, (slot, of_kind) in enumerate(kind.slots.items(), 1)
        )
        if kind.number is not None:
            slots += message(1, message(kind.number, content))
    weights = floats(2, sum(dim for _, dim in segments))
    identity = varint_bytes(1 << 3 | FIXED64) + bytes(8)
    return identity + weights + message(3, slots) + integer(4, "last_update")


def _strided(
    entries: np.ndarray, dtype: str, first: int, count: int, step: int
) -> np.ndarray:
    """Equally distant numbers of each entry, as a view."""
    shape, strides = (len(entries), count), (entries.shape[1], step)
    return np.ndarray(shape, dtype, entries.data, first, strides)


def _is_regular(at: np.ndarray) -> bool:
    return len(at) > 0 and bool(np.all(np.diff(at) == np.diff(at[:2])))
