"""The oracle of RowCache: the same stream with tables that hold all rows.

Two things are taken from inside the cache: its jitted functions, so that all caches of
a test compile once, and its store, as no public function shows rows that are not on the
device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from monolith_optax import (
    IdMap,
    RowCache,
    embedding,
    lazy_rows,
    reset_rows,
    uniform_rows,
    value_and_row_grad,
)
from monolith_optax._ids.device_tables import DeviceTables

# Tables of two vocabularies, of which one has two tables, and what is no table.
TABLES = {"user": "user", "item": {"vector": "item", "bias": "item"}, "mean": None}
INIT = {
    "user": uniform_rows(0.1, seed=1),
    "item": {"vector": uniform_rows(0.2, seed=2), "bias": 0.25},
    "mean": None,
}
BATCH = 12
ADAGRAD = lazy_rows(embedding.rowwise_adagrad(0.1))
NAMES = "user", "item"


def parameters(sizes):
    """Tables of so many rows."""
    users, items = sizes
    return {
        "user": jnp.full((users, 3), 0.5),
        "item": {"vector": jnp.zeros((items, 3)), "bias": jnp.ones((items,))},
        "mean": jnp.asarray(1.0),
    }


def loss(params, rows, stars):
    user, items = params["user"][rows["user"]], rows["item"]
    vectors = params["item"]["vector"]
    vector = vectors[items["liked"]] + vectors[items["shown"]].mean(1)
    bias = params["item"]["bias"][items["liked"]]
    return jnp.mean((params["mean"] + bias + jnp.sum(user * vector, 1) - stars) ** 2)


@functools.cache
def make_step(tx):
    """A jitted training step, for tables of any size."""
    tables = jax.tree.map(lambda x: x is not None, TABLES, is_leaf=lambda x: x is None)
    grad = value_and_row_grad(loss, tables)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, rows, stars):
        value, gradients = grad(params, rows, stars)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def stream(seed, count, universe=100, drift=1.0):
    """Batches of ids that come, stay for a while, leave and come back."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(-(2**63), 2**63, universe)
    for number in range(count):
        around = number * drift + universe * rng.random() * (rng.random() < 0.3)

        def some(*shape, around=around):
            at = around + 10 * rng.normal(size=shape)
            return pool[at.astype(int) % universe]

        yield {
            "number": number,
            "user": some(BATCH),
            "item": {"liked": some(BATCH), "shown": some(BATCH, 2)},
            "stars": rng.normal(size=BATCH).astype(np.float32),
        }


def time_of(batch):
    return batch["number"]


def ids_of(batch):
    return {name: batch[name] for name in NAMES}


@functools.cache
def make_reset(tx):
    """A jitted function that gives new rows their first weights and slots."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def reset(params, state, fresh, first):
        rows = {"user": fresh["user"], "item": fresh["item"], "mean": None}
        return reset_rows(tx, params, state, rows, first)

    return reset


def train_all_rows(tx, batches, *, admit_after=1, expire_after=None):
    """Tables that hold everything; returns what is left by id, and the losses."""
    size = 400
    maps = {name: IdMap(size, admit_after=admit_after) for name in NAMES}
    params, step, reset = parameters((size, size)), make_step(tx), make_reset(tx)
    state = tx.init(params)
    losses = []
    for batch in batches:
        number = batch["number"]
        if expire_after and number % 10 == 0:
            for ids in maps.values():
                ids.expire(before=number - expire_after)
        flat = {
            "user": batch["user"],
            "item": np.concatenate([x.ravel() for x in batch["item"].values()]),
        }
        fresh = {}
        for name, raw in flat.items():
            _, fresh[name] = maps[name].assign(raw, time=number)
        rows = {
            "user": maps["user"].lookup(batch["user"]),
            "item": {k: maps["item"].lookup(x) for k, x in batch["item"].items()},
        }
        by_row = {name: {row: i for i, row in maps[name].items()} for name in NAMES}
        new = {
            name: np.array([by_row[name].get(row, 0) for row in fresh[name].tolist()])
            for name in NAMES
        }
        first = {
            "user": INIT["user"](new["user"], (3,)),
            "item": {"vector": INIT["item"]["vector"](new["item"], (3,)), "bias": 0.25},
            "mean": None,
        }
        params, state = reset(params, state, fresh, first)
        params, state, value = step(params, state, rows, batch["stars"])
        losses.append(value)
    return by_id(params, state, size, maps), jax.device_get(losses)


def by_id(params, state, size, maps):
    """What each id has in each leaf, row 0 included, and the leaves without rows."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path((params, state)):
        leaf, key = np.asarray(leaf), jax.tree_util.keystr(path)
        if leaf.ndim and len(leaf) == size:
            ids = maps["user" if "user" in key else "item"]
            rows = {"row 0": 0} | dict(ids.items())
            found |= {(key, i): leaf[row].tobytes() for i, row in rows.items()}
        else:
            found[key] = leaf.tobytes()
    return found


@functools.cache
def device_tables(tx, sizes):
    """What compiles, made once for all caches."""
    return DeviceTables(tx, parameters(sizes), TABLES)


def make_cache(tx, sizes, **options):
    """A cache for a device with tables of so many rows, params and state."""
    params = parameters(sizes)
    cache = RowCache(tx, params, TABLES, init=INIT, **options)
    cache._traffic.tables = device_tables(tx, sizes)
    return cache, params, tx.init(params)


def source(cache, batches, expire_after=None):
    """Batches, between which old ids expire."""
    for batch in batches:
        if expire_after and batch["number"] % 10 == 0:
            cache.expire(before=batch["number"] - expire_after)
        yield batch


def train_cached(tx, batches, *, sizes, depth=3, expire_after=None, **options):
    """The same with a cache; returns it, what it has by id, and the losses."""
    cache, params, state = make_cache(tx, sizes, **options)
    params, state, losses = train_on(
        cache, params, state, tx, batches, depth=depth, expire_after=expire_after
    )
    return cache, cached_by_id(cache, params, state), losses


def train_on(cache, params, state, tx, batches, *, depth=3, expire_after=None):
    """Trains a cache further."""
    step, losses = make_step(tx), []
    for batch, rows, moves in cache.prefetch(
        source(cache, batches, expire_after), ids_of, time=time_of, depth=depth
    ):
        params, state = cache.move(params, state, moves)
        params, state, loss = step(params, state, rows, batch["stars"])
        losses.append(loss)
    return params, state, jax.device_get(losses)


def cached_by_id(cache, params, state):
    """The same as `by_id`, of a cache."""
    cache._traffic.write_back(params, state)
    leaves = jax.tree.leaves_with_path((params, state))
    found = {
        jax.tree_util.keystr(leaves[i][0]): np.asarray(leaves[i][1]).tobytes()
        for i in cache._traffic.tables.dense()
    }
    for cached in cache._traffic.ids.values():
        numbers = {"row 0": 0} | dict(cached.ids.items())
        for i, number in numbers.items():
            record = cached.store.read(np.array([number]))
            for field in record.dtype.names:
                key = jax.tree_util.keystr(leaves[int(field)][0])
                found[key, i] = record[field][0].tobytes()
    return found
