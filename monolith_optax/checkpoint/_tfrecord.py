"""TFRecord files: records of bytes, each with checksums of its length and its data.

A file may be compressed with Snappy, in blocks that end anywhere, also inside a record.
Files are read in pieces, so that memory does not grow with them, and what a file says
about its own sizes is compared with the file before anything is read or allocated.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from monolith_optax.checkpoint._checksum import crc32c, masked

_PIECE = 2**23
_HEADER = 12  # the length and its checksum
_FRAME = _HEADER + 4

# TensorFlow's reader refuses larger blocks.
_BLOCK = 262_144
# What Snappy needs at most for a block, and the most that a byte of it stands for.
_COMPRESSED_BLOCK = 32 + _BLOCK + _BLOCK // 6
_EXPANSION = 22


class Records(NamedTuple):
    """Some records of a file, one after the other.

    Attributes:
      first: the number of the first record, counted from 0 in the whole file.
      data: bytes with the records in them.
      starts: where each record's data begins, int64.
      lengths: how long it is, int64.
    """

    first: int
    data: bytes
    starts: np.ndarray
    lengths: np.ndarray

    def part(self, these: slice) -> "Records":
        """Some of the records, from one on."""
        first = self.first + these.start
        return Records(first, self.data, self.starts[these], self.lengths[these])

    def one(self, position: int) -> bytes:
        """One record."""
        start = int(self.starts[position])
        return self.data[start : start + int(self.lengths[position])]


def read_records(
    path: Path, *, snappy: bool = False, on_bytes: Callable[[int], object] | None = None
) -> Iterator[Records]:
    """The records of a file, all checksums checked.

    Args:
      path: the file.
      snappy: whether it is compressed.
      on_bytes: is told how many bytes of the file have been read, again and again.

    Raises:
      ValueError: the file is damaged.
    """
    if not path.is_file():  # opening a pipe would wait for its writer
        raise ValueError(f"{path} is not a file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        scan = _Scan(path)
        rest, done = b"", 0
        for piece in _blocks(file, path, size) if snappy else _pieces(file):
            behind = (size - file.tell()) * (_EXPANSION if snappy else 1)
            data = rest + piece
            records, end = scan(data, behind)
            if len(records.starts):
                yield records
            rest = data[end:]
            if on_bytes:
                on_bytes(file.tell() - done)
                done = file.tell()
    if rest:
        raise ValueError(
            f"{path} is cut off in record {scan.count}, after {len(rest)} bytes."
        )


class _Scan:
    """Finds the records in pieces of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._crc = crc32c()
        self._lengths: dict[bytes, int] = {}  # by headers that have been checked

    def __call__(self, data: bytes, behind: int) -> tuple[Records, int]:
        """The records that are whole, and where they end.

        Args:
          data: a piece of the file that begins with a record.
          behind: how many bytes may follow at most.
        """
        ends, end, known, size = [0], 0, self._lengths, len(data)
        while end + _HEADER <= size:
            header = data[end : end + _HEADER]
            length = known.get(header)
            if length is None:
                length = self._length(header, self.count + len(ends) - 1)
            end += _FRAME + length
            if end > size:
                if end > size + behind:
                    raise ValueError(
                        f"{self.path} is cut off in record {self.count + len(ends) - 1}"
                        f", which is {length} bytes long."
                    )
                break
            ends.append(end)
        # Checksums in a loop of their own: it is the one that takes the time.
        bounds = np.array(ends, np.int64)
        starts, lengths = bounds[:-1] + _HEADER, np.diff(bounds) - _FRAME
        crc = self._crc
        crcs = [crc(data[a + _HEADER : b - 4]) for a, b in pairwise(ends)]
        records = Records(self.count, data, starts, lengths)
        self._check(records, crcs)
        self.count += len(crcs)
        return records, ends[-1]

    def _length(self, header: bytes, number: int) -> int:
        if masked(self._crc(header[:8])) != int.from_bytes(header[8:], "little"):
            raise ValueError(
                f"{self.path}: the checksum of the length of record {number} is wrong."
            )
        if len(self._lengths) >= 1_024:
            self._lengths.clear()
        self._lengths[header] = int.from_bytes(header[:8], "little")
        return self._lengths[header]

    def _check(self, records: Records, crcs: list[int]) -> None:
        ends = records.starts + records.lengths
        at = ends[:, None] + np.arange(4)
        stored = np.frombuffer(records.data, np.uint8)[at].view("<u4")[:, 0]
        wrong = np.flatnonzero(stored != masked(np.array(crcs, np.uint64)))
        if len(wrong):
            raise ValueError(
                f"{self.path}: the checksum of record {self.count + wrong[0]} is wrong."
            )


def framed(records: np.ndarray) -> np.ndarray:
    """Records of one length, uint8 of (n, length), as they are in a file."""
    crc, (count, length) = crc32c(), records.shape
    out = np.empty((count, length + _FRAME), np.uint8)
    header = length.to_bytes(8, "little")
    header += masked(crc(header)).to_bytes(4, "little")
    out[:, :_HEADER] = np.frombuffer(header, np.uint8)
    out[:, _HEADER:-4] = records
    crcs = np.array([crc(record.tobytes()) for record in records], np.uint64)
    out[:, -4:] = masked(crcs).astype("<u4")[:, None].view(np.uint8)
    return out


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


def _blocks(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    """What the blocks of a compressed file stand for, several at a time."""
    cramjam = _cramjam()
    blocks, length = [], 0
    while header := file.read(4):
        start = file.tell()
        compressed = int.from_bytes(header, "big")
        if len(header) < 4 or compressed > size - start:
            raise ValueError(f"{path} is cut off in the Snappy block at byte {start}.")
        if not 0 < compressed <= _COMPRESSED_BLOCK:
            raise ValueError(
                f"{path}: the Snappy block at byte {start} is {compressed} bytes long, "
                f"but such blocks have from 1 to {_COMPRESSED_BLOCK}."
            )
        block = file.read(compressed)
        try:
            expanded = cramjam.snappy.decompress_raw_len(block)
            if expanded > _BLOCK:
                raise ValueError(
                    f"{path}: the Snappy block at byte {start} expands to {expanded} "
                    f"bytes, but TensorFlow's blocks have at most {_BLOCK}."
                )
            blocks.append(bytes(cramjam.snappy.decompress_raw(block)))
        except cramjam.DecompressionError as error:
            raise ValueError(
                f"{path}: the Snappy block at byte {start} is damaged: {error}"
            ) from error
        length += expanded
        if length >= _PIECE:
            yield b"".join(blocks)
            blocks, length = [], 0
    yield b"".join(blocks)


def _cramjam() -> Any:
    try:
        import cramjam
    except ImportError as error:
        raise ImportError(
            "Hash tables need a package for Snappy: "
            'pip install "monolith_optax[hash-tables]".'
        ) from error
    return cramjam
