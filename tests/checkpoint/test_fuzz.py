"""Files of hash tables that nobody would write: read rightly, or a ValueError.

Longer by hand: TABLE_FUZZ_INPUTS=1000000 pytest -m slow --timeout 0 -n 0 THIS_FILE
"""

import io
import os
import random
import resource
import struct
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import hash_table_files as plain
import numpy as np
import pytest
from choosing import sampled
from hash_table_files import entry, floats, framed, message, varint

from monolith_optax.checkpoint._protobuf import MalformedError, message_fields
from monolith_optax.checkpoint._read_hash_table import Reader
from monolith_optax.checkpoint._table_files import saved_counts
from monolith_optax.checkpoint._tfrecord import Records, read_records

MANY = int(os.environ.get("TABLE_FUZZ_INPUTS", "10000"))
MOST_MEMORY = 20_000_000  # bytes; a file may claim any length
ADAGRAD = [("adagrad", 2)]
TWO = message(1, message(3, floats(1, [1.0]) + floats(2, [2.0]))) + message(
    1, message(4, floats(1, [3.0, 4.0]) + b"\x10\x09")
)
ENTRIES = {
    "adagrad": (ADAGRAD, [entry(5), entry(-6, time=None), entry(7, packed=True)]),
    "two": (
        [("ftrl", 1), ("dynamic_wd_adagrad", 2)],
        [entry(5, [1, 2, 3], TWO), entry(6, [1, 2, 3], TWO, time=2**40)],
    ),
    "no slots": ([("sgd", 2)], [entry(5, slots=message(1, message(2, b"")))]),
}
RECORDS = [entry(5), b"", b"ab" * 50, varint(2**63)]
METAS = [message(1, b"item") + b"\x10\x07", message(1, b"\xff\xfe"), b"\x10\x01"]
INFO = [
    b'feature_counts {\n  key: "item"\n  value: 89\n}\n', b'key: "\\303\\251\\n"',
    b'feature_counts { key: "a" value: 1 } feature_counts { key: "b" value: 22 }',
]  # fmt: skip
NASTY = [
    *(bytes([tag]) for tag in b"\x00\x01\x08\x09\x0a\x0d\x10\x12\x15\x1a\x20\x22\x7f"),
    b"\x80", b"\xff", b"\x80" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 11, bytes(8),
    (2**63).to_bytes(8, "little"), (2**62).to_bytes(8, "little"), b"\xff" * 4,
    b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x80\x80\x80\x80\x08", b"\x0a" * 100,
    b'"', b"\\", b"{", b"}", b" " * 1_000, b"\\777", b"feature_counts", b'key: "',
]  # fmt: skip


class Memory:
    """As much of a path as a reader of one file needs."""

    def __init__(self, data):
        self.data = data

    def __str__(self):
        return "memory"

    def is_file(self):
        return True

    def stat(self):
        return SimpleNamespace(st_size=len(self.data))

    def open(self, mode):
        assert mode == "rb"
        return io.BytesIO(self.data)


def most_memory():
    """The most that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of Linux


@pytest.fixture(autouse=True)
def little_memory(request):
    """Fails if a test took much; tracing is exact, and too slow for many inputs."""
    before = most_memory()
    if "slow" not in request.keywords:
        tracemalloc.start()
    yield
    if tracemalloc.is_tracing():
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY
    assert most_memory() - before < 5 * MOST_MEMORY


def mutated(rng, data):
    """Bytes after some cutting, doubling, inserting and flipping."""
    for _ in range(rng.randrange(4)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        middle = rng.choice([rng.choice(NASTY), data[a:b] * 2, b"", data[a:b]])
        data = data[:a] + middle + data[rng.choice([a, b]) :]
        if data and rng.random() < 0.5:
            at = rng.randrange(len(data))
            data = (
                data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            )
    return data


def read_entries(records, segments):
    """The columns of entries, or None if they are refused."""
    reader = Reader(segments)
    lengths = np.array([len(record) for record in records], np.int64)
    starts = np.cumsum(lengths) - lengths
    try:
        reader.add(Records(0, b"".join(records), starts, lengths), Path("file"))
    except ValueError as error:
        assert str(error).startswith("file: entry "), error  # noqa: PT017 (or accepted)
        return None
    return {name: array[: len(records)] for name, array in reader.arrays.items()}


def plain_fields(data):
    """Numbers, wire types and contents of a message's fields, which is well-formed."""

    def integer():
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value & (2**64 - 1)

    at = 0
    while at < len(data):
        tag = integer()
        if tag & 7 == 0:
            yield tag >> 3, 0, integer()
            continue
        size = {1: 8, 2: 0, 5: 4}[tag & 7] or integer()
        yield tag >> 3, tag & 7, data[at : at + size]
        at += size


def plain_entry(record):
    """Id, bytes of weights, and time of an entry."""
    raw, weights, time = None, b"", 0
    for number, wire, content in plain_fields(record):
        if (number, wire) == (1, 1):
            [raw] = struct.unpack("<q", content)
        elif number == 2:
            weights += content
        elif number == 4:
            [time] = struct.unpack("<q", struct.pack("<Q", content))
    return raw, weights, time


def check_entries(records, segments):
    """Entries are read as by plain code, together as each of them by itself."""
    alone = [read_entries([record], segments) for record in records]
    together = read_entries(records, segments)
    assert (together is None) == any(one is None for one in alone)
    for record, one in zip(records, alone, strict=True):
        if one is not None:
            found = one["ids"][0], one["weights"].tobytes(), one["last_update"][0]
            assert found == plain_entry(record)
    if together is not None:
        for name, array in together.items():
            parts = np.concatenate([one[name] for one in alone])
            assert array.tobytes() == parts.tobytes()
    return together is not None


def read_file(data, *, snappy=False):
    """The records of a file, or None if it is refused."""
    try:
        return [
            records.one(position)
            for records in read_records(Memory(data), snappy=snappy)
            for position in range(len(records.starts))
        ]
    except ValueError as error:
        assert str(error).startswith("memory"), error  # noqa: PT017 (or accepted)
        return None


def mutated_file(rng):
    """A file of records: itself damaged, or of a header with a right checksum."""
    data = framed(*rng.choices(RECORDS, k=rng.randrange(4)))
    if rng.random() < 0.5:
        return mutated(rng, data)
    claim = rng.choice([0, 1, 2**31, 2**62, 2**64 - 1, rng.randrange(2**64)])
    header = claim.to_bytes(8, "little")
    header += plain.masked_crc(header).to_bytes(4, "little")
    return data + header + mutated(rng, framed(b"abc"))


def mutated_blocks(rng):
    """A compressed file: damaged outside of blocks, or inside."""
    data = plain.snappy(mutated_file(rng), block=rng.choice([7, 60, 262_144]))
    if rng.random() < 0.3:
        return mutated(rng, data)
    length = int.from_bytes(data[:4], "big")
    block = mutated(rng, data[4 : 4 + length])
    return len(block).to_bytes(4, "big") + block + data[4 + length :]


@pytest.mark.parametrize("count", sampled([80, MANY], 80))
@pytest.mark.parametrize("name", ENTRIES)
def test_mutated_entries(name, count):
    segments, seeds = ENTRIES[name]
    rng, accepted = random.Random(0), 0
    for _ in range(count):
        records = [mutated(rng, r) for r in rng.choices(seeds, k=rng.randrange(1, 4))]
        accepted += check_entries(records, segments)
    assert 0 < accepted < count


@pytest.mark.parametrize("count", sampled([500, MANY], 500))
def test_mutated_files(count):
    rng, accepted = random.Random(0), 0
    for _ in range(count):
        data = mutated_file(rng)
        records = read_file(data)
        if records is not None:
            accepted += 1
            assert framed(*records) == data
    assert 0 < accepted < count


@pytest.mark.parametrize("count", sampled([500, MANY], 500))
def test_mutated_snappy_blocks(count):
    rng, accepted = random.Random(0), 0
    for _ in range(count):
        accepted += read_file(mutated_blocks(rng), snappy=True) is not None
    assert 0 < accepted < count


@pytest.mark.parametrize("count", sampled([500, MANY], 500))
def test_mutated_messages(count):
    rng, accepted = random.Random(0), 0
    for _ in range(count):
        data = mutated(rng, rng.choice(METAS))
        try:
            fields = message_fields(data)
        except MalformedError:
            continue
        accepted += 1
        last = {number: content for number, _, content in plain_fields(data)}
        assert fields == last
    assert 0 < accepted < count


@pytest.mark.parametrize(
    "data", [b"\x80" * 9 + b"\x50\x0a", b"\xf8\xff\xff\xff\xff\x7f\x0a"]
)
def test_numbers_that_no_field_has(data):
    """Found above: they were taken for fields that readers may skip."""
    with pytest.raises(MalformedError, match="a field of number"):
        message_fields(data)


@pytest.mark.parametrize("count", sampled([60, MANY], 60))
def test_mutated_counts(count, tmp_path):
    folder, path = tmp_path / "model-7.assets", tmp_path / "ckpt.info-7"
    rng, accepted = random.Random(0), 0
    for _ in range(count):
        path.write_bytes(mutated(rng, rng.choice(INFO)))
        try:
            counts = saved_counts(folder)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (or accepted)
            continue
        accepted += 1
        assert all(type(n) is int and n >= 0 for n in counts.values())
    assert 0 < accepted < count
