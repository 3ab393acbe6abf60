"""The wire format of protocol buffers, as far as checkpoints use it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # the wire types in use

_LAST_FIELD, _64_BITS = 2**29 - 1, 2**64 - 1


class MalformedError(ValueError):
    """An entry is not what it must be; the message completes 'entry 7 ...'."""


@contextmanager
def named(path: Path, number: int) -> Iterator[None]:
    """Names the file and the entry in what is raised inside."""
    try:
        yield
    except MalformedError as error:
        raise ValueError(f"{path}: entry {number} {error}") from None


def message_fields(message: bytes) -> dict[int, int | bytes]:
    """The integers and the strings of a message, by number."""
    return {
        number: varint(message, start, stop)[0]
        if wire == VARINT
        else message[start:stop]
        for number, wire, start, stop in fields(message, 0, len(message))
    }


def fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """The number, the wire type and the bounds of each field of a message."""
    while start < stop:
        tag, start = varint(data, start, stop)
        number, wire, first = tag >> 3, tag & 7, start
        if wire == VARINT:
            _, start = varint(data, start, stop)
        elif wire == BYTES:
            length, first = varint(data, start, stop)
            start = first + length
        elif wire in {FIXED32, FIXED64}:
            start += 4 if wire == FIXED32 else 8
        else:
            raise MalformedError(f"has a field of wire type {wire}.")
        if not 0 < number <= _LAST_FIELD:
            raise MalformedError(f"has a field of number {number}.")
        if start > stop:
            raise MalformedError("ends within a field.")
        yield number, wire, first, start


def varint(data: bytes, start: int, stop: int) -> tuple[int, int]:
    """An integer, and where it ends."""
    value = 0
    for at in range(start, min(stop, start + 10)):
        value |= (data[at] & 0x7F) << 7 * (at - start)
        if data[at] < 0x80:
            return value & _64_BITS, at + 1  # ten bytes have room for 70
    raise MalformedError("has an integer without an end.")


def varint_bytes(value: int) -> bytes:
    """An integer of variable length."""
    digits = [
        value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)
    ]
    return bytes([*(digit | 0x80 for digit in digits[:-1]), digits[-1]])
