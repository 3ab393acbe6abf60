"""Reading and writing hash tables: `python -m benchmarks.hash_tables [ENTRIES]`.

Prints entries per second of processor time, which one core does, and how much the
process grew at most. The tables have dim 32 and adagrad; one is a single table in 4
shards, one is a multi table
with Snappy in 1. Needs the extra 'hash-tables'.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cramjam
import numpy as np

from monolith_optax.checkpoint import (
    HashTable,
    Segment,
    hash_tables,
    read_hash_table,
    write_hash_table,
)
from monolith_optax.checkpoint._tfrecord import framed

DIM = 32
SEGMENTS = [("adagrad", DIM)]
BLOCK = 262_144


def main() -> None:
    """Writes the tables, and reads each in a process of its own."""
    entries = int(sys.argv[1]) if sys.argv[1:] else 2_000_000
    with tempfile.TemporaryDirectory() as folder:
        table = trained(entries)
        write_hash_table(folder, "warm-up", trained(1_000))
        start = time.process_time()
        write_hash_table(folder, "item", table, shards=4)
        per_second = entries / (time.process_time() - start)
        print(f"write: {per_second / 1e6:.2f} million entries a second", flush=True)
        as_multi_table(Path(folder), "item", entries)
        del table
        for name in "item", "multi":
            command = [sys.executable, "-m", "benchmarks.hash_tables", folder, name]
            subprocess.run(command, check=True)


def trained(entries: int) -> HashTable:
    """A table of random numbers, a few of its entries without a time."""
    rng = np.random.default_rng(0)
    return HashTable(
        ids=rng.integers(-(2**63), 2**63, entries),
        weights=rng.standard_normal((entries, DIM), np.float32),
        segments=(Segment("adagrad", DIM, {"norm": rng.random((entries, DIM), "f4")}),),
        last_update=rng.integers(1_700_000_000, 1_700_100_000, entries)
        * (rng.random(entries) > 0.01),
    )


def as_multi_table(folder: Path, name: str, entries: int) -> None:
    """Writes the files of a single table once more, as those of a multi table."""
    data = b"".join(
        file.read_bytes() for file in folder.glob(f"MonolithHashTable_{name}-*")
    )
    meta = b"\x0a\x05multi\x10" + varint(entries)
    meta_file = folder / "MonolithMultiHashTable_.meta-00000-of-00001"
    meta_file.write_bytes(framed(np.frombuffer(meta, np.uint8)[None]).tobytes())
    with (folder / "MonolithMultiHashTable_-00000-of-00001").open("wb") as out:
        for first in range(0, len(data), BLOCK):
            block = bytes(cramjam.snappy.compress_raw(data[first : first + BLOCK]))
            out.write(len(block).to_bytes(4, "big") + block)


def varint(value: int) -> bytes:
    """An integer as protocol buffers have it."""
    more, last = [], value
    while last > 0x7F:
        more.append(last & 0x7F | 0x80)
        last >>= 7
    return bytes([*more, last])


def measure(folder: str, name: str) -> None:
    """Reads a table, after a small one for what libraries need once."""
    read_hash_table(folder, "warm-up", segments=SEGMENTS)
    before = peak()
    start = time.process_time()
    table = read_hash_table(folder, name, segments=SEGMENTS)
    seconds = time.process_time() - start
    grown = peak() - before
    entries = len(table.ids)
    result = entries * (8 + 4 * DIM + 4 * DIM + 8) / 1e9
    shards = Path(folder).glob(f"Monolith*{'' if name == 'multi' else name}-*")
    shard = max(file.stat().st_size for file in shards) / 1e9
    print(
        f"read {name}: {entries / seconds / 1e6:.2f} million entries a second; "
        f"{grown:.3f} GB more at most, {grown / result:.2f} x the result of "
        f"{result:.3f} GB; the largest shard has {shard:.3f} GB",
        flush=True,
    )
    if name == "item":
        start = time.process_time()
        listed = sum(table.entries for table in hash_tables(folder))
        per_second = listed / (time.process_time() - start)
        print(f"list: {per_second / 1e6:.2f} million entries a second", flush=True)


def peak() -> float:
    """The most memory that this program has had, in GB; on Linux."""
    status = Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return int(kilobytes) / 1e6


if __name__ == "__main__":
    measure(*sys.argv[1:]) if sys.argv[2:] else main()
