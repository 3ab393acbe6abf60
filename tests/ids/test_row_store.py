"""RowStore against a plain array, in memory and in files."""

import os

import numpy as np
import pytest

from monolith_optax._ids import row_store
from monolith_optax._ids.row_store import RowStore

RECORD = np.dtype(
    [("0", np.float32, (3,)), ("1", np.float16, (2,)), ("2", np.int32)], align=True
)


def random_records(rng, count):
    records = np.zeros(count, RECORD)
    for name in RECORD.names:
        records[name] = rng.integers(-99, 99, records[name].shape)
    return records


@pytest.mark.parametrize("on_disk", [False, True])
def test_is_an_array_that_grows(on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(row_store, "_FIRST", 4)
    monkeypatch.setattr(row_store, "_MOST", 16)
    rng = np.random.default_rng(0)
    store = RowStore(RECORD, tmp_path if on_disk else None)
    plain = np.zeros(500, RECORD)
    for size in range(1, 100, 7):
        store.grow(size)
        assert size <= len(store) <= 2 * size + 16
        rows = rng.permutation(size)[: rng.integers(0, size + 1)].astype(np.int32)
        plain[rows] = random_records(rng, len(rows))
        store.write(rows, plain[rows])
        rows = rng.integers(0, len(store), 50)
        assert store.read(rows).tobytes() == plain[rows].tobytes()
        parts = list(store.parts(size))
        assert np.concatenate(parts).tobytes() == plain[:size].tobytes()
    assert store.nbytes == len(store) * RECORD.itemsize
    assert len(store.read(np.zeros(0, np.int32))) == 0


def test_growing_moves_no_rows():
    store = RowStore(RECORD)
    store.grow(1)
    (first,) = store.parts(len(store))
    store.grow(100_000)
    first["2"] = 7
    assert store.read(np.arange(3))["2"].tolist() == [7, 7, 7]


def test_files_leave_nothing_behind(tmp_path):
    store = RowStore(RECORD, tmp_path)
    store.grow(10)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = RowStore(RECORD, tmp_path)
    store.grow(1)
    size = len(store)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        store.grow(size + 1)
    assert len(store) == size
