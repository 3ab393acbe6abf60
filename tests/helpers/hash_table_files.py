"""Hash tables' files in plain Python, byte by byte, for comparison and for damage.

Written from the description of the format, without the packages that the code uses.
"""

import json
import struct
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[1] / "data" / "hash_tables"
SAMPLES = json.loads((DATA / "tables.json").read_text())
SPECS = {("single", name): spec for name, spec in SAMPLES["single"].items()} | {
    ("native", name): spec for name, spec in SAMPLES["native"]["tables"].items()
}


def segments_of(job, name):
    """The segments of a sample."""
    return [(s["optimizer"], s["dim"]) for s in SPECS[job, name]["segments"]]


def truth_of(job, name):
    """What the sample holds, by the names of its file of truth."""
    with np.load(DATA / job / f"truth_{name}.npz") as arrays:
        return {k: x for k, x in arrays.items() if k not in ("expired_ids", "lookup")}


def as_truth(table):
    """A HashTable under the names of the files of truth."""
    arrays = {
        "ids": table.ids,
        "num": table.weights,
        "last_update_ts_sec": table.last_update,
    }
    for k, segment in enumerate(table.segments):
        for slot, array in segment.slots.items():
            arrays[f"segment{k}/{segment.optimizer}/{slot}"] = array
    return arrays


def assert_same_bits(table, truth):
    """Compares dtypes, shapes and bytes."""
    arrays = as_truth(table)
    assert arrays.keys() == truth.keys()
    for name, array in truth.items():
        assert arrays[name].dtype == array.dtype, name
        assert arrays[name].shape == array.shape, name
        assert arrays[name].tobytes() == array.tobytes(), name


def _crc_table():
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        yield crc


_CRC = list(_crc_table())


def masked_crc(data):
    """The checksum of TFRecord."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def framed(*records):
    """A file of records."""
    file = b""
    for record in records:
        length = struct.pack("<Q", len(record))
        file += length + struct.pack("<I", masked_crc(length))
        file += record + struct.pack("<I", masked_crc(record))
    return file


def records_in(file):
    """The records of a file, frames and all."""
    start = 0
    while start < len(file):
        stop = start + 16 + struct.unpack_from("<Q", file, start)[0]
        yield file[start:stop]
        start = stop


def varint(value):
    """An integer of protocol buffers."""
    value &= 2**64 - 1
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(number, content):
    """A field that holds a message, a string or packed numbers."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def floats(number, values, packed=False):
    """A field of repeated floats."""
    each = [struct.pack("<f", value) for value in values]
    if packed:
        return message(number, b"".join(each))
    return b"".join(varint(number << 3 | 5) + one for one in each)


def entry(raw, num=(1.0, 2.0), slots=None, time=7, packed=False):
    """An entry; by default of two weights with adagrad."""
    if slots is None:
        slots = message(1, message(1, floats(1, [0.5] * len(num), packed)))
    out = b"\x09" + struct.pack("<q", raw) + floats(2, num, packed) + message(3, slots)
    return out + (b"" if time is None else b"\x20" + varint(time))


def snappy(data, block=262_144):
    """TensorFlow's blocks, of literals only."""
    out = b""
    for start in range(0, len(data), block):
        part = data[start : start + block]
        raw = varint(len(part))
        for first in range(0, len(part), 60):
            literal = part[first : first + 60]
            raw += bytes([len(literal) - 1 << 2]) + literal
        out += struct.pack(">I", len(raw)) + raw
    return out


def write_single(folder, suffix, *shards):
    """Files of a single table, from the records of its shards."""
    folder.mkdir(exist_ok=True)
    for k, records in enumerate(shards):
        name = f"MonolithHashTable_{suffix}-{k:05}-of-{len(shards):05}"
        (folder / name).write_bytes(framed(*records))


def write_multi(folder, server, tables, counts=None, block=262_144):
    """The files of several tables, in one shard, from the records of each."""
    folder.mkdir(exist_ok=True)
    records = [record for of_table in tables.values() for record in of_table]
    base = f"MonolithMultiHashTable_{server}"
    path = folder / f"{base}-00000-of-00001"
    path.write_bytes(snappy(framed(*records), block))
    counts = counts or {name: len(records) for name, records in tables.items()}
    metas = [
        message(1, name.encode()) + b"\x10" + varint(n) for name, n in counts.items()
    ]
    (folder / f"{base}.meta-00000-of-00001").write_bytes(framed(*metas))
    return path
