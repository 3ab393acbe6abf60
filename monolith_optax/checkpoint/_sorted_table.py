"""Sorted tables of keys and values, which TensorFlow has from LevelDB.

A table consists of blocks. A last one lists the others, and the footer says where it
is. Within a block a key leaves out what it shares with the one before it.
"""

from collections.abc import Iterator

from monolith_optax.checkpoint._checksum import crc32c, masked
from monolith_optax.checkpoint._protobuf import MalformedError, varint

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48
_TRAILER = 5  # whether the block is compressed, and its checksum
_RUN = 16  # at least every so many entries a key is there in full


def items(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table, in ascending order of keys.

    Together they have at most 16 times as many bytes as the table.

    Raises:
      MalformedError: the table is damaged.
    """
    if len(data) < _FOOTER or not data.endswith(_MAGIC):
        raise MalformedError("does not end as such a file does.")
    start = len(data) - _FOOTER
    _, start = _handle(data, start)  # of a block that is not used
    blocks, _ = _handle(data, start)
    last = None
    for _, handle in _entries(_block(data, blocks)):
        for key, value in _entries(_block(data, _handle(handle, 0)[0])):
            if last is not None and key <= last:
                raise MalformedError("has keys that do not ascend.")
            yield key, value
            last = key


def _handle(data: bytes, start: int) -> tuple[slice, int]:
    """Where a block is, and where what says so ends."""
    offset, start = varint(data, start, len(data))
    size, start = varint(data, start, len(data))
    return slice(offset, offset + size), start


def _block(data: bytes, where: slice) -> bytes:
    """The content of a block."""
    end = where.stop + _TRAILER
    if end > len(data):
        raise MalformedError("has a block beyond its end.")
    kind = data[where.stop]
    stored = int.from_bytes(data[where.stop + 1 : end], "little")
    if masked(crc32c()(data[where.start : where.stop + 1])) != stored:
        raise MalformedError("has a block whose checksum is wrong.")
    if kind != 0:
        raise MalformedError("is compressed, which no index of TensorFlow's is.")
    return data[where]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block."""
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    if len(block) < 4 or end < 0:
        raise MalformedError("has a block that is too short.")
    key, at, run = b"", 0, 0
    while at < end:
        shared, at = varint(block, at, end)
        fresh, at = varint(block, at, end)
        size, at = varint(block, at, end)
        run = run + 1 if shared else 0
        if shared > len(key) or run >= _RUN or at + fresh + size > end:
            raise MalformedError("has an entry that is too long.")
        key = key[:shared] + block[at : at + fresh]
        at += fresh + size
        yield key, block[at - size : at]
