"""RowCache ends with the bits of tables that hold everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_rows import (
    ADAGRAD,
    BATCH,
    cached_by_id,
    ids_of,
    make_cache,
    make_step,
    stream,
    time_of,
    train_all_rows,
    train_cached,
)
from choosing import sampled
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from registry import VARIANTS

from monolith_optax import RowCache, embedding, lazy_rows, uniform_rows

ROWWISE = {name: v for name, v in VARIANTS.items() if v.row.for_rows}
# A tenth more than the distinct ids that a batch may have, and row 0.
SIZES = int(1.1 * BATCH) + 1, int(1.1 * 3 * BATCH) + 1


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    wrong = [key for key in ours if ours[key] != theirs[key]]
    assert not wrong, f"{len(wrong)} of {len(ours)}, such as {wrong[:5]}"


def assert_same_losses(ours, theirs):
    assert np.array(ours).tobytes() == np.array(theirs).tobytes()


# Other tests take rowwise_adagrad, whose slot is one number for each row.
SAMPLES = sampled(ROWWISE, "adamom")


@pytest.mark.parametrize("name", SAMPLES)
def test_has_the_bits_of_tables_that_hold_everything(name):
    tx = lazy_rows(ROWWISE[name].make())
    ways = {"admit_after": 2, "expire_after": 25}
    batches = list(stream(1, 60))
    expected, expected_losses = train_all_rows(tx, batches, **ways)
    cache, found, losses = train_cached(tx, batches, sizes=SIZES, **ways)
    assert_same(found, expected)
    assert_same_losses(losses, expected_losses)
    counts = cache.counts
    assert counts.batches == 60
    assert min(counts.moved_in, counts.moved_out, counts.hits, counts.new) > 100


def random_ways(seed):
    rng = np.random.default_rng(seed)
    return {
        "admit_after": int(rng.integers(1, 4)),
        "expire_after": int(rng.integers(5, 40)) if rng.random() < 0.7 else None,
    }, {
        "universe": int(rng.integers(40, 200)),
        "drift": float(rng.random() * 5),
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_streams(seed, tmp_path):
    ways, kind = random_ways(seed)
    batches = list(stream(seed, 40, **kind))
    expected, expected_losses = train_all_rows(ADAGRAD, batches, **ways)
    for policy, folder, depth in ("lru", None, 3), ("lfu", tmp_path, 1 + seed % 5):
        _, found, losses = train_cached(
            ADAGRAD,
            batches,
            sizes=SIZES,
            depth=depth,
            policy=policy,
            folder=folder,
            **ways,
        )
        assert_same(found, expected)
        assert_same_losses(losses, expected_losses)


def test_ids_that_return_before_the_device_has_handed_them_back():
    batches = list(stream(5, 40, drift=0))
    expected, _ = train_all_rows(ADAGRAD, batches)
    cache, params, state = make_cache(ADAGRAD, SIZES)
    planned = [(b, *cache.assign(ids_of(b), time=time_of(b))) for b in batches]
    pending = [m.tables[name]._pending for *_, m in planned for name in m.tables]
    assert sum(len(theirs) for each in pending for *_, theirs in each) > 100
    step = make_step(ADAGRAD)
    for batch, rows, moves in planned:
        params, state = cache.move(params, state, moves)
        params, state, _ = step(params, state, rows, batch["stars"])
    assert_same(cached_by_id(cache, params, state), expected)


def small_cache(capacity=4, **options):
    params = {"items": jnp.zeros((capacity, 2)), "bias": jnp.zeros(())}
    tx = lazy_rows(embedding.adagrad(0.1))
    tables = {"items": "item", "bias": None}
    return RowCache(tx, params, tables, **options), params, tx.init(params)


def test_more_distinct_ids_than_rows_are_an_error_that_changes_nothing():
    cache, params, state = small_cache()
    _, moves = cache.assign({"item": [5, 6, 5, 5, 5]})
    params, state = cache.move(params, state, moves)
    with pytest.raises(ValueError, match=r"4 distinct ids of 'item', .* 5 rows"):
        cache.assign({"item": [1, 2, 3, 4, 4]})
    assert cache.num_ids == {"item": 2}
    again, moves = cache.assign({"item": [6, 5, 6, 6, 7]})
    assert again["item"].tolist() == [2, 1, 2, 2, 3]
    cache.move(params, state, moves)


def test_batches_are_moved_once_and_in_order():
    cache, params, state = small_cache()
    _, first = cache.assign({"item": [1, 2]})
    _, second = cache.assign({"item": [3, 4]})
    with pytest.raises(ValueError, match=r"the next one is 1, but .* of batch 2"):
        cache.move(params, state, second)
    params, state = cache.move(params, state, first)
    with pytest.raises(ValueError, match=r"the next one is 2, but .* of batch 1"):
        cache.move(params, state, first)
    params, state = cache.move(params, state, second)
    with pytest.raises(ValueError, match="the next one is none"):
        cache.move(params, state, second)


def test_tables_of_another_size_are_refused():
    cache, params, state = small_cache()
    _, moves = cache.assign({"item": [1, 2]})
    shorter = params | {"items": params["items"][:2]}
    with pytest.raises(ValueError, match=r"\['items'\] has 2 rows, but .* for 4"):
        cache.move(shorter, state, moves)
    cache.move(params, state, moves)


def test_lookup_registers_nothing():
    cache, params, state = small_cache(init=uniform_rows(1.0))
    rows, moves = cache.assign({"item": [1, 2, 3]}, time=5)
    params, state = cache.move(params, state, moves)
    trained = np.asarray(params["items"])[rows["item"]]
    for batch in [4, 5, 6], [7, 8, 9]:
        _, moves = cache.assign({"item": batch}, time=6)
        params, state = cache.move(params, state, moves)
    rows, moves = cache.lookup({"item": [3, 10, 1]})
    assert moves.fresh["item"].size == 0
    params, state = cache.move(params, state, moves)
    assert rows["item"][1] == 0
    found = np.asarray(params["items"])[rows["item"]]
    np.testing.assert_array_equal(found[[0, 2]], trained[[2, 0]])
    assert cache.num_ids == {"item": 9}
    assert cache.expire(before=6) == {"item": 3}
    assert cache.counts.batches == 3


def test_drain_after_a_loop_that_was_left():
    cache, params, state = small_cache()
    batches = np.arange(30).reshape(10, 3)
    for _, _, moves in cache.prefetch(batches, lambda batch: {"item": batch}):
        params, state = cache.move(params, state, moves)
        break
    with pytest.raises(RuntimeError, match="assigned but not moved"):
        cache.save("nowhere", params, state)
    params, state = cache.drain(params, state)
    _, moves = cache.assign({"item": [0, 1, 2]})
    cache.move(params, state, moves)


def test_other_threads_do_not_meet_a_prefetch():
    cache, params, state = small_cache()
    loop = cache.prefetch(np.arange(30).reshape(10, 3), lambda batch: {"item": batch})
    next(loop)
    for call in (
        lambda: cache.expire(before=3),
        lambda: cache.assign({"item": [1]}),
        lambda: cache.save("nowhere", params, state),
        lambda: next(cache.prefetch([], lambda _: {})),
    ):
        with pytest.raises(RuntimeError, match="batches that prefetch is preparing"):
            call()
    loop.close()
    cache.expire(before=3)


def test_moves_copy_no_table():
    rows = 50_000
    params = {"a": jnp.zeros((rows, 8)), "b": jnp.zeros((rows,))}
    tx = lazy_rows(embedding.adam(0.1))
    cache, state = RowCache(tx, params, "x", init=uniform_rows(1.0)), tx.init(params)
    _, moves = cache.assign({"x": np.arange(64)})
    arrays = {name: table.arrays() for name, table in moves.tables.items()}
    memory = (
        cache._traffic.tables.move.lower(params, state, arrays)
        .compile()
        .memory_analysis()
    )
    assert memory.temp_size_in_bytes < 4 * rows  # nor the smallest
    assert memory.alias_size_in_bytes >= 3 * 4 * 9 * rows


def test_shapes_and_kinds_of_ids():
    params = {"a": jnp.zeros((6, 2, 2)), "b": jnp.zeros(6, jnp.bfloat16)}
    tx = lazy_rows(embedding.sgd(0.1))
    cache = RowCache(tx, params, "x", init={"a": uniform_rows(1.0), "b": 0.5})
    state = tx.init(params)
    ids = {"one": np.array([[2**63, 7]], np.uint64), "other": (np.int8(7), [8])}
    rows, moves = cache.assign({"x": ids})
    assert rows["x"]["one"].tolist() == [[1, 2]]
    assert [x.tolist() for x in rows["x"]["other"]] == [2, [3]]
    params, state = cache.move(params, state, moves)
    assert params["b"].tolist() == [0, 0.5, 0.5, 0.5, 0, 0]
    expected = uniform_rows(1.0)([-(2**63), 7, 8], (2, 2))
    np.testing.assert_array_equal(params["a"][1:4], expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tables": {"a": "x"}}, "tables must be a tree that is a prefix"),
        ({"tables": {"a": 3, "b": None}}, "name of ids or None for params"),
        ({"tables": {"a": None, "b": "x"}}, "a scalar has no rows"),
        ({"tables": {"a": None, "b": None}}, "one leaf of params at least"),
        ({"init": np.zeros(3)}, "a number or a function of ids"),
        ({"policy": "fifo"}, "policy must be"),
        ({"admit_after": 0}, "admit_after must be from 1"),
    ],
)
def test_bad_arguments(change, match):
    params = {"a": jnp.zeros((4, 2)), "b": jnp.zeros(())}
    arguments = {"tables": {"a": "x", "b": None}} | change
    with pytest.raises((ValueError, TypeError), match=match):
        RowCache(embedding.sgd(0.1), params, **arguments)


def test_bad_batches():
    cache, *_ = small_cache(init=lambda ids, _: np.zeros((len(ids), 3)))
    with pytest.raises(ValueError, match=r"must have ids of \['item'\]"):
        cache.assign({"user": [1]})
    with pytest.raises(TypeError, match="Ids must be integers"):
        cache.assign({"item": [0.5]})
    with pytest.raises(ValueError, match=r"rows of shape \(1, 2\)"):
        cache.assign({"item": [1]})
    with pytest.raises(RuntimeError, match="stopped this cache amid a batch"):
        cache.assign({"item": [1]})
    with pytest.raises(ValueError, match="depth must be at least 1"):
        cache.prefetch([], lambda _: {}, depth=0)


def test_tables_that_are_divided_over_devices_are_refused():
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    table = jax.device_put(jnp.zeros((8, 2)), sharding)
    with pytest.raises(ValueError, match="is divided over several devices"):
        RowCache(embedding.sgd(0.1), table, "x")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tables_that_each_device_has_all_of(kind, tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        tx = lazy_rows(embedding.adagrad(0.1))
        start = {"a": jnp.zeros((6, 2))}
        params, state = jax.device_put((start, tx.init(start)), everywhere)
        cache = RowCache(tx, params, "x", init=uniform_rows(1.0))
        for batch in [1, 2, 3], [4, 5, 6], [1, 2, 3]:
            rows, moves = cache.assign({"x": batch})
            params, state = cache.move(params, state, moves)
        found = np.asarray(params["a"])[rows["x"]]
        np.testing.assert_array_equal(found, uniform_rows(1.0)([1, 2, 3], (2,)))
        cache.save(tmp_path, params, state)
        restored, _ = RowCache(tx, params, "x").restore(tmp_path, params, state)
        assert restored["a"].sharding.is_fully_replicated
