"""Exchange of ids and rows between devices, and the ring for what does not fit.

On its own, as buffers and routes show in no result. `test_spread_tables.py` has the
law.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import sampled
from compiled_programs import copies, sent
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from monolith_optax._rows.slices import exchange, ring

NUM_ROWS, DIM, SHARE = 1040, 3, 128
AXES = ("x",)


def batches(devices):
    """Ids of all devices, one kind after the other, and whether they fit."""
    rng = np.random.default_rng(0)
    size, block = devices * SHARE, NUM_ROWS // devices
    even = rng.integers(0, NUM_ROWS, size)
    padding = rng.choice([-9, -1, NUM_ROWS, NUM_ROWS + 5], size)
    return {
        "even": (even, True),
        "one_id": (np.full(size, 5), True),
        "repeated": (np.tile(rng.integers(0, NUM_ROWS, 8), size // 8), True),
        "padding": (np.where(rng.random(size) < 0.3, padding, even), True),
        "all_padding": (padding, True),
        "zipf": (rng.zipf(1.2, size) * 7919 % NUM_ROWS, True),
        "one_owner": (np.tile(block + rng.permutation(block)[:SHARE], devices), False),
        "one_device": (np.concatenate([np.arange(SHARE), even[SHARE:]]), False),
    }


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), AXES, axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


@functools.cache
def programs(devices):
    """What a step does with a batch: rows of it, sums, reads and writes of a slot."""

    def local(table, ids, gradients):
        route = exchange.route(ids, NUM_ROWS, AXES, AXES)
        found = exchange.fetch(table, route, AXES)
        ringed = ring.gather(table, route.ids, route.spilled, AXES)
        found = jnp.where(route.spilled, ringed, found)
        found = found.at[route.positions].get(mode="fill", fill_value=0)
        masked = jnp.where(ids % 5 == 0, exchange.NOBODY, ids)
        sums = exchange.own_sums(route, masked, gradients + found)
        sent = exchange.send(route, *sums, AXES)
        spilled = route.spilled
        ids, sums = ring.sum_duplicates(*sent, NUM_ROWS, spilled, AXES)
        slot = ring.gather(table, ids, spilled, AXES)
        written = ring.scatter(table, ids, 2 * slot + sums, spilled, AXES, add=False)
        return found, (*sent, ids, sums), written, spilled

    split, where = P("x"), (P("x"), P("x"), P("x"), P())
    step = jax.shard_map(
        local,
        mesh=mesh_of(devices),
        in_specs=(split,) * 3,
        out_specs=where,
        check_vma=False,
    )
    return jax.jit(step, donate_argnums=0)


def data(devices, name):
    rng = np.random.default_rng(1)
    ids, fits = batches(devices)[name]
    table = rng.normal(size=(NUM_ROWS, DIM))
    return ids.astype("int32"), fits, table, rng.normal(size=(len(ids), DIM))


CASES = [(devices, name) for devices in (2, 4, 8) for name in batches(devices)]
KINDS = sampled(CASES, *(case for case in CASES if case[0] == 8))


@pytest.mark.parametrize(("devices", "name"), KINDS)
def test_rows_and_sums_are_those_of_one_device(devices, name):
    ids, fits, table, gradients = data(devices, name)
    with jax.enable_x64(True):
        found, parts, written, spilled = jax.device_get(
            programs(devices)(*map(jnp.asarray, (table, ids, gradients)))
        )
    assert bool(spilled) is not fits
    inside = (ids >= 0) & (ids < NUM_ROWS)
    expected = np.where(inside[:, None], table[ids % NUM_ROWS], 0)
    np.testing.assert_array_equal(found, expected)

    sums = np.zeros_like(table)
    given = inside & (ids % 5 != 0)
    np.add.at(sums, ids[given], (gradients + expected)[given])
    sent_ids, sent_rows, distinct, rows = parts
    for some, of_ids in ((sent_rows, sent_ids), (rows, distinct)):
        total = np.zeros_like(table)
        real = (of_ids >= 0) & (of_ids < NUM_ROWS)
        np.add.at(total, of_ids[real], some[real])
        np.testing.assert_allclose(total, sums, rtol=1e-12, atol=1e-12)
    real = distinct[distinct < NUM_ROWS]
    assert sorted(real) == sorted({*ids[given].tolist()})
    if fits:
        devices_of = np.repeat(np.arange(devices), len(sent_ids) // devices)
        real = sent_ids >= 0
        owners = sent_ids[real] // (NUM_ROWS // devices)
        np.testing.assert_array_equal(owners, devices_of[real])
    touched = np.isin(np.arange(NUM_ROWS), ids[given])[:, None]
    after = np.where(touched, 2 * table + sums, table)
    np.testing.assert_allclose(written, after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("devices", sampled([2, 8], 8))
def test_no_collective_carries_more_than_a_share_and_no_table_is_copied(devices):
    ids, _, table, gradients = data(devices, "even")
    compiled = programs(devices).lower(table, ids, gradients).compile()
    assert copies(compiled, (NUM_ROWS // devices, DIM)) == []
    places = devices * exchange.capacity(SHARE, devices)
    found = sent(compiled)
    assert sorted(found["all-to-all"]) == [4 * places] * 2 + [4 * places * DIM] * 2
    assert max(found["collective-permute"]) <= 4 * places * DIM
    assert max(found["all-reduce"]) <= 4
    assert found.keys() == {"all-to-all", "all-reduce", "collective-permute"}


@pytest.mark.parametrize("batch", [1, 256, 8192])
@pytest.mark.parametrize("devices", [2, 8, 256])
def test_even_ids_hardly_ever_spill(batch, devices):
    places = exchange.capacity(batch, devices)
    assert places <= batch
    rng = np.random.default_rng(0)
    counts = rng.binomial(batch, 1 / devices, size=1_000_000)
    assert counts.max() <= places


def test_places_for_each_id_of_a_batch():
    """docs/multihost.md tells them."""
    per_id = {
        batch: [
            round(devices * exchange.capacity(batch, devices) / batch, 1)
            for devices in (2, 4, 8, 64, 256)
        ]
        for batch in (256, 8192)
    }
    assert per_id == {256: [1.5, 1.8, 2.2, 5.8, 14.0], 8192: [1.1, 1.1, 1.2, 1.6, 2.5]}


def test_too_many_ids_at_once():
    with pytest.raises(ValueError, match=r"1073741824 ids on each of 2 devices"):
        exchange._check_keys(2**30, 2)
