"""The index of a TensorFlow checkpoint: which tensors there are, and where."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from monolith_optax.checkpoint._protobuf import (
    BYTES,
    MalformedError,
    fields,
    message_fields,
)
from monolith_optax.checkpoint._sorted_table import items

# TensorFlow's numbers of types, except quantized and opaque types.
_DTYPES = {
    1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 5: np.int16, 6: np.int8,
    7: object, 8: np.complex64, 9: np.int64, 10: np.bool_, 14: jnp.bfloat16,
    17: np.uint16, 18: np.complex128, 19: np.float16, 22: np.uint32, 23: np.uint64,
    24: jnp.float8_e5m2, 25: jnp.float8_e4m3fn,
    26: jnp.float8_e4m3fnuz, 27: jnp.float8_e4m3b11fnuz,
    28: jnp.float8_e5m2fnuz, 29: jnp.int4, 30: jnp.uint4,
}  # fmt: skip
# The fields of an entry.
_TYPE, _SHAPE, _SHARD, _OFFSET, _SIZE, _CRC, _SLICES = range(1, 8)

Extents = list[tuple[int, int | None]]


@dataclass(frozen=True)
class Stored:
    """Where a tensor is.

    Attributes:
      type: TensorFlow's number of its type.
      shape: its shape.
      shard: the number of its data file.
      offset: where in this file it begins.
      size: how many bytes it has there.
      crc: their masked CRC32C.
      parts: where each part of a partitioned variable belongs, and where it is stored;
        such a variable has no bytes of its own.
    """

    type: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    parts: tuple[tuple[tuple[slice, ...], "Stored"], ...] = ()

    @property
    def dtype(self) -> Any:
        """Its dtype: object for strings, and for types that NumPy does not have."""
        return np.dtype(_DTYPES.get(self.type, object))

    @property
    def has_strings(self) -> bool:
        """Whether it is one of strings, or of a type that NumPy does not have."""
        return bool(self.dtype.hasobject)

    @property
    def is_known(self) -> bool:
        """Whether its type is one that can be read."""
        return self.type in _DTYPES

    @property
    def stretches(self) -> "list[Stored]":
        """All that data files hold of it."""
        return [part for _, part in self.parts] or [self]


def read_index(path: Path) -> tuple[int, dict[str, Stored]]:
    """How many data files there are, and the tensors by name.

    Raises:
      ValueError: the file is damaged.
    """
    tensors = {}
    try:
        entries = dict(items(path.read_bytes()))
        shards = _shards(entries.pop(b"", None))
        for key, entry in entries.items():
            if key.startswith(b"\0"):  # a part of a partitioned variable
                continue
            name = _name(key)
            try:
                tensors[name] = _tensor(key, entry, entries, shards)
            except MalformedError as error:
                raise MalformedError(f"has an entry {name!r} that {error}") from None
    except MalformedError as error:
        raise ValueError(f"{path} is damaged: it {error}") from None
    return shards, tensors


def _shards(header: bytes | None) -> int:
    if header is None:
        raise MalformedError("has no header.")
    known = message_fields(header)
    if _integer(known, 2):
        raise MalformedError("is from a big-endian machine.")
    return _integer(known, 1)


def _name(key: bytes) -> str:
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedError(f"has a name that is not UTF-8, {key!r}.") from None


def _tensor(
    key: bytes, entry: bytes, entries: Mapping[bytes, bytes], shards: int
) -> Stored:
    """What an entry says of a tensor, if its numbers agree."""
    stored = _stored(entry, shards)
    if slices := _messages(entry, _SLICES):
        parts = tuple(
            _part(key, stored, message, entries, shards) for message in slices
        )
        count = sum(math.prod(part.shape) for _, part in parts)
        if count != math.prod(stored.shape) or stored.has_strings:
            raise MalformedError("has parts that are not the whole.")
        return replace(stored, parts=parts)
    _check_size(stored)
    return stored


def _stored(entry: bytes, shards: int) -> Stored:
    known = message_fields(entry)
    crc = known.get(_CRC, bytes(4))
    if not isinstance(crc, bytes) or len(crc) != 4:
        raise MalformedError("has a checksum of another kind.")
    dims = _messages(_bytes(known, _SHAPE), 2)
    shape = tuple(_integer(message_fields(dim), 1) for dim in dims)
    # NumPy counts the bytes of empty arrays as if no dimension were 0.
    if len(shape) > 64 or math.prod(dim or 1 for dim in shape) >= 2**59:
        raise MalformedError("has a shape that no array has.")
    stored = Stored(
        type=_integer(known, _TYPE),
        shape=shape,
        shard=_integer(known, _SHARD),
        offset=_integer(known, _OFFSET),
        size=_integer(known, _SIZE),
        crc=int.from_bytes(crc, "little"),
    )
    if stored.shard >= shards:
        raise MalformedError(f"is in data file {stored.shard} of {shards}.")
    return stored


def _check_size(stored: Stored) -> None:
    size, dtype, count = stored.size, stored.dtype, math.prod(stored.shape)
    # The length of each string takes a byte at least.
    fits = size >= count if stored.has_strings else size == count * dtype.itemsize
    if stored.is_known and not fits:
        raise MalformedError(f"has {size} bytes, but the shape {stored.shape}.")


def _part(
    key: bytes,
    whole: Stored,
    message: bytes,
    entries: Mapping[bytes, bytes],
    shards: int,
) -> tuple[tuple[slice, ...], Stored]:
    """Where a part belongs, and where it is stored."""
    extents = _extents(message)
    entry = entries.get(_part_key(key, extents))
    if entry is None or len(extents) != len(whole.shape):
        raise MalformedError("has a part that is not there.")
    part = _stored(entry, shards)
    _check_size(part)
    where = tuple(
        slice(start, start + (dim if length is None else length))
        for (start, length), dim in zip(extents, whole.shape, strict=True)
    )
    is_inside = all(s.stop <= dim for s, dim in zip(where, whole.shape, strict=True))
    if (
        not is_inside
        or part.type != whole.type
        or part.shape != tuple(s.stop - s.start for s in where)
    ):
        raise MalformedError("has a part that does not fit.")
    return where, part


def _extents(message: bytes) -> Extents:
    """The start and the length in each dimension; None: all of it."""
    each = [message_fields(extent) for extent in _messages(message, 1)]
    return [(_integer(e, 1), _integer(e, 2) if 2 in e else None) for e in each]


def _part_key(name: bytes, extents: Extents) -> bytes:
    """The key of a part, whose bytes sort as name and numbers do."""
    escaped = re.sub(rb"[\0\xff]", lambda c: c[0] + bytes([255 - c[0][0]]), name)
    rank = bytes([1, len(extents)]) if extents else b"\0"
    numbers = [n for start, length in extents for n in (start, length)]
    return b"".join([b"\0", escaped, b"\0\1", rank, *map(_ordered, numbers)])


def _ordered(number: int | None) -> bytes:
    """A number whose first bits tell how many bytes it has; None is -1."""
    if number is None:
        return b"\x7f"
    size = number.bit_length() // 7 + 1
    first_bits = ((1 << size) - 1) << 7 * size
    return (number ^ first_bits).to_bytes(size, "big")


def _integer(known: Mapping[int, int | bytes], number: int) -> int:
    value = known.get(number, 0)
    if not isinstance(value, int):
        raise MalformedError(f"has a field {number} of another kind.")
    return value


def _bytes(known: Mapping[int, int | bytes], number: int) -> bytes:
    value = known.get(number, b"")
    if not isinstance(value, bytes):
        raise MalformedError(f"has a field {number} of another kind.")
    return value


def _messages(message: bytes, number: int) -> list[bytes]:
    """All fields of that number."""
    return [
        message[start:stop]
        for field, wire, start, stop in fields(message, 0, len(message))
        if (field, wire) == (number, BYTES)
    ]
