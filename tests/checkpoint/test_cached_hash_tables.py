"""Hash tables into a RowCache and out of it: the same bits, some entries at a time."""

import hash_table_files as plain
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_optax import RowCache, adamom, embedding
from monolith_optax.checkpoint import (
    HashTable,
    Segment,
    _cached_hash_tables,
    read_cached_hash_tables,
    read_hash_table,
    write_cached_hash_tables,
    write_hash_table,
)

LEAVES = {"user": {"user/0": "ftrl", "user/1": "adam"}, "item": {"item": "adagrad"}}
FOLDER = plain.DATA / "single" / "model.ckpt-1200.assets"


def table(name):
    return read_hash_table(FOLDER, name, segments=plain.segments_of("single", name))


def new_cache(folder=None, rows=9):
    """A cache for far fewer rows than the tables have entries."""
    dims = [dim for _, dim in plain.segments_of("single", "user")]
    params = {
        "user": [jnp.zeros((rows, dim)) for dim in dims],
        "item": jnp.zeros((rows, plain.segments_of("single", "item")[0][1])),
        "dense": jnp.ones(2),
    }
    labels = {"user": ["ftrl", "adam"], "item": "adagrad", "dense": "adamom"}
    names = "ftrl", "adam", "adagrad"
    each = {name: getattr(embedding, name)() for name in names}
    tx = optax.partition({**each, "adamom": adamom(0.1)}, labels)
    tables = {"user": "users", "item": "items", "dense": None}
    return RowCache(tx, params, tables, folder=folder), params, tx.init(params)


def assert_same(folder, name):
    read = read_hash_table(folder, name, segments=plain.segments_of("single", name))
    plain.assert_same_bits(read, plain.as_truth(table(name)))


@pytest.mark.parametrize("shards", [1, 3])
def test_in_and_out_with_a_batch_between_has_the_same_bits(
    shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(_cached_hash_tables, "_CHUNK", 100)
    cache, params, state = new_cache(tmp_path if shards == 3 else None)
    read_cached_hash_tables(FOLDER, cache, params, state, leaves=LEAVES)
    assert cache.num_ids == {"users": 302, "items": 495}
    # Some rows go to the device and others back, but nothing trains them.
    for start in 0, 7, 14, 0:
        some = slice(start, start + 7)
        ids = {"users": table("user").ids[some], "items": table("item").ids[some]}
        rows, moves = cache.lookup(ids)
        params, state = cache.move(params, state, moves)
    np.testing.assert_array_equal(
        np.asarray(params["item"])[rows["items"]], table("item").weights[:7]
    )
    write_cached_hash_tables(
        tmp_path, cache, params, state, leaves=LEAVES, shards=shards
    )
    assert len(list(tmp_path.iterdir())) == 2 * shards
    assert_same(tmp_path, "user")
    assert_same(tmp_path, "item")


def test_new_ids_and_times_come_out(tmp_path):
    cache, params, state = new_cache()
    read_cached_hash_tables(FOLDER, cache, params, state, leaves=LEAVES)
    old = int(table("item").ids[0])
    _, moves = cache.assign({"users": [], "items": [old, 2**40]}, time=2**31)
    params, state = cache.move(params, state, moves)
    write_cached_hash_tables(tmp_path, cache, params, state, leaves=LEAVES)
    read = read_hash_table(tmp_path, "item", segments=[("adagrad", 8)])
    assert len(read.ids) == 496
    times = dict(zip(read.ids.tolist(), read.last_update.tolist(), strict=True))
    assert times[old] == times[2**40] == 2**31
    new = read.ids.tolist().index(2**40)
    assert (read.weights[new] == 0).all()
    assert (read.segments[0].slots["norm"][new] == np.float32(0.1)).all()


@pytest.mark.parametrize(
    ("leaves", "match"),
    [
        ({"item": LEAVES["item"]}, "tables of all ids of the cache"),
        (LEAVES | {"user": {"user/1": "adam"}}, "must be all that the cache has"),
        (LEAVES | {"item": {"item": "adam"}}, "must have the slots of one"),
        (LEAVES | {"x": {"dense": "adagrad"}}, r"the shape \(rows, dim\)"),
    ],
)
def test_leaves_that_do_not_fit(leaves, match):
    cache, params, state = new_cache()
    with pytest.raises(ValueError, match=match):
        read_cached_hash_tables(FOLDER, cache, params, state, leaves=leaves)


def test_ids_that_are_there_twice_are_refused(tmp_path):
    cache, params, state = new_cache()
    norm = {"norm": np.ones((2, 8), np.float32)}
    item = HashTable(
        ids=np.array([7, 8]),
        weights=np.ones((2, 8), np.float32),
        segments=(Segment("adagrad", 8, norm),),
        last_update=np.zeros(2, np.int64),
    )
    write_hash_table(tmp_path, "item", item, shards=2)
    write_hash_table(tmp_path, "user", table("user"))
    (first, second) = sorted(tmp_path.glob("*item*"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"'item' make no IdMap: .* 7 more than once"):
        read_cached_hash_tables(tmp_path, cache, params, state, leaves=LEAVES)
    assert cache.num_ids == {"users": 0, "items": 0}


def test_a_cache_in_use_is_refused():
    cache, params, state = new_cache()
    cache.assign({"users": [1], "items": [2]})
    with pytest.raises(RuntimeError, match="needs a new cache"):
        read_cached_hash_tables(FOLDER, cache, params, state, leaves=LEAVES)
    with pytest.raises(RuntimeError, match="assigned but not moved"):
        write_cached_hash_tables(FOLDER, cache, params, state, leaves=LEAVES)
