"""Reading TensorFlow's checkpoint files, without TensorFlow.

Files are not trusted: what an index claims is compared with the sizes of the data files
before it takes memory.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from monolith_optax._public import public
from monolith_optax.checkpoint._checksum import extend_crc32c, masked
from monolith_optax.checkpoint._protobuf import MalformedError, varint
from monolith_optax.checkpoint._tensor_index import Stored, read_index

_PIECE = 2**23


def read_tensorflow(prefix: str | os.PathLike[str]) -> "TensorFlowCheckpoint":
    """The tensors of a TensorFlow checkpoint, each read when you ask for it.

    Needs `pip install "monolith_optax[hash-tables]"`, but not TensorFlow.

    Args:
      prefix: the path of its index file without `.index`, such as `model/model.ckpt-6`.

    Raises:
      FileNotFoundError: there is no such checkpoint, or one of its files is missing.
      ValueError: a file is damaged; damaged tensors are found when they are read.
      ImportError: the packages of the extra are not installed.

    Example:
      >>> from monolith_optax.checkpoint import read_tensorflow
      >>> tensors = read_tensorflow("tests/data/checkpoints/adamom/model.ckpt-6")
      >>> print(tensors.shapes["mlp/dense/kernel"], tensors["global_step"])
      (4, 3) 6
    """
    return TensorFlowCheckpoint(prefix)


@public("monolith_optax.checkpoint")
class TensorFlowCheckpoint(Mapping[str, np.ndarray]):
    """A mapping from the names in a TensorFlow checkpoint to arrays.

    Nothing is cached: an array is read again each time you ask for it, so that
    importing a checkpoint takes little more memory than its result.

    Attributes:
      prefix: the path of its index file without `.index`.
      shapes: the shape of each tensor.
      dtypes: the NumPy dtype of each tensor; object for strings, and for types that
        NumPy does not have, which cannot be read.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Reads names, shapes and dtypes."""
        self.prefix = os.fspath(prefix)
        index = Path(f"{self.prefix}.index")
        if not index.is_file():
            raise FileNotFoundError(
                f"There is no file {index}. The prefix of a checkpoint ends before "
                "'.index', as in 'model/model.ckpt-6'."
            )
        self._shards, tensors = read_index(index)
        self._tensors = dict(sorted(tensors.items()))
        self.shapes = {name: stored.shape for name, stored in self._tensors.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._tensors.items()}
        self._check_sizes()

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        stored = self._tensors[name]
        if not stored.is_known:
            raise ValueError(
                f"{name!r} has TensorFlow's type {stored.type}, which NumPy does not "
                "have."
            )
        if not stored.parts:
            return self._read(name, stored)
        whole = np.empty(stored.shape, stored.dtype)
        is_there = np.zeros(stored.shape, np.bool_)
        for where, part in stored.parts:
            whole[where] = self._read(name, part)
            is_there[where] = True
        if not is_there.all():
            raise ValueError(
                f"{self.prefix}.index is damaged: the parts of {name!r} overlap."
            )
        return whole

    def __iter__(self) -> Iterator[str]:
        """The names in alphabetical order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self._tensors

    def _check_sizes(self) -> None:
        """Compares what the index claims with the data files."""
        claimed: Counter[int] = Counter()
        sizes: dict[int, int] = {}
        for name, stored in self._tensors.items():
            for stretch in stored.stretches:
                shard, end = stretch.shard, stretch.offset + stretch.size
                claimed[shard] += stretch.size
                if shard not in sizes:
                    sizes[shard] = self._size(shard)
                if end > sizes[shard]:
                    raise ValueError(
                        f"{self._file(shard)} is damaged: {name!r} should end at byte "
                        f"{end} of it, but it has {sizes[shard]}."
                    )
        for shard, size in claimed.items():
            if size > sizes[shard]:
                raise ValueError(
                    f"{self.prefix}.index is damaged: its tensors claim {size} bytes "
                    f"of {self._file(shard)}, which has {sizes[shard]}."
                )

    def _file(self, shard: int) -> Path:
        return Path(f"{self.prefix}.data-{shard:05}-of-{self._shards:05}")

    def _size(self, shard: int) -> int:
        file = self._file(shard)
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no file {file}, but there is {self.prefix}.index."
            )
        return file.stat().st_size

    def _read(self, name: str, stored: Stored) -> np.ndarray:
        data = np.empty(stored.size, np.uint8)
        file = self._file(stored.shard)
        with file.open("rb") as opened:
            opened.seek(stored.offset)
            there = opened.readinto(data.data)
        try:
            if there != stored.size:
                raise MalformedError("is cut off.")
            if stored.has_strings:
                return _strings(data.tobytes(), stored)
            _check(_crc(data), stored)
        except MalformedError as error:
            raise ValueError(f"{file} is damaged: {name!r} {error}") from None
        array: np.ndarray = data.view(stored.dtype)
        return array.reshape(stored.shape)


def _crc(data: np.ndarray) -> int:
    """The CRC of bytes, without a copy of them all."""
    extend, crc = extend_crc32c(), 0
    for start in range(0, len(data), _PIECE):
        crc = extend(crc, data[start : start + _PIECE].tobytes())
    return crc


def _check(crc: int, stored: Stored) -> None:
    if masked(crc) != stored.crc:
        raise MalformedError("has a wrong checksum.")


def _strings(data: bytes, stored: Stored) -> np.ndarray:
    """Strings: all lengths, the checksum of these, and then the strings."""
    extend, crc, at = extend_crc32c(), 0, 0
    lengths = []
    for _ in range(math.prod(stored.shape)):
        length, at = varint(data, at, len(data))
        lengths.append(length)
        if length >= 2**64:
            raise MalformedError("has a string that is too long.")
        crc = extend(crc, length.to_bytes(4 if length < 2**32 else 8, "little"))
    checksum, at = data[at : at + 4], at + 4
    if checksum != masked(crc).to_bytes(4, "little"):
        raise MalformedError("has a wrong checksum of its lengths.")
    if at + sum(lengths) != len(data):
        raise MalformedError("has strings that do not fill its bytes.")
    _check(extend(extend(crc, checksum), data[at:]), stored)
    array = np.empty(len(lengths), object)
    for k, length in enumerate(lengths):
        array[k] = data[at : at + length]
        at += length
    return array.reshape(stored.shape)
