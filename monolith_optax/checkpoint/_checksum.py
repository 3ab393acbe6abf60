"""The checksum of TensorFlow's files: CRC32C, masked."""

from collections.abc import Callable
from typing import Any


def masked(crc: Any) -> Any:
    """The checksum as it is stored, of a CRC or of an array (uint64) of them."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c() -> Callable[[bytes], int]:
    """The function for CRC32C of bytes."""
    value: Callable[[bytes], int] = _package().value
    return value


def extend_crc32c() -> Callable[[int, bytes], int]:
    """The function for CRC32C of bytes behind others, whose CRC comes first."""
    extend: Callable[[int, bytes], int] = _package().extend
    return extend


def _package() -> Any:
    try:
        import google_crc32c
    except ImportError as error:
        raise ImportError(
            "Reading and writing these files needs a package for CRC32C: "
            'pip install "monolith_optax[hash-tables]".'
        ) from error
    return google_crc32c
