"""TensorFlow's index and data files from their description, right or wrong."""

import struct

from hash_table_files import masked_crc, message, varint

FLOAT, STRING = 1, 7


def number(field, value):
    """A field that holds an integer; none for 0, as protocol buffers have it."""
    return varint(field << 3) + varint(value) if value else b""


def tensor(data, *, shape, dtype=FLOAT, shard=0, offset=0, size=None, slices=()):
    """An entry of the index; the claims may differ from the data."""
    dims = b"".join(message(2, number(1, dim)) for dim in shape)
    return (
        number(1, dtype)
        + message(2, dims)
        + number(3, shard)
        + number(4, offset)
        + number(5, len(data) if size is None else size)
        + varint(6 << 3 | 5)
        + struct.pack("<I", masked_crc(data))
        + b"".join(message(7, each) for each in slices)
    )


def extents(*bounds):
    """A slice: for each dimension its start and length; None is the whole of it."""
    return b"".join(
        message(1, b"" if b is None else number(1, b[0]) + number(2, b[1]))
        for b in bounds
    )


def block(*pairs, compression=0):
    """A block of a sorted table, each key in full, and its trailer."""
    content = b"".join(
        b"\0" + varint(len(key)) + varint(len(value)) + key + value
        for key, value in pairs
    )
    content += struct.pack("<II", 0, 1)
    return trailed(content, compression)


def trailed(content, compression=0):
    """A block with its kind and checksum."""
    content += bytes([compression])
    return content + struct.pack("<I", masked_crc(content))


def handle(offset, content):
    """Where a block is."""
    return varint(offset) + varint(len(content) - 5)


def table(*blocks):
    """A sorted table of blocks."""
    file, handles = b"", []
    for each in blocks:
        handles.append(handle(len(file), each))
        file += each
    index = block(*((bytes([k]), where) for k, where in enumerate(handles)))
    footer = (handles[0] + handle(len(file), index)).ljust(40, b"\0")
    return file + index + footer + struct.pack("<Q", 0xDB4775248B80FB57)


def header(shards=1, endianness=0):
    """The entry that says how many data files there are."""
    return number(1, shards) + number(2, endianness) + message(3, number(1, 1))


def write(prefix, entries, *data, shards=None):
    """A checkpoint of such entries, with one data file for each of data."""
    pairs = [(b"", header(shards or max(len(data), 1))), *sorted(entries.items())]
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(block(*pairs)))
    for k, content in enumerate(data):
        name = f"{prefix.name}.data-{k:05}-of-{len(data):05}"
        prefix.with_name(name).write_bytes(content)
