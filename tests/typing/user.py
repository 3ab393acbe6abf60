"""A user's program, which type checkers read, and which runs.

`.ci/distributions` does both with the installed package. A line in `mistakes` must be
an error to each type checker that its comment names.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

import monolith_optax
from monolith_optax import (
    CacheCounts,
    IdMap,
    Moves,
    RowCache,
    RowSlices,
    adamom,
    apply_updates,
    checkpoint,
    embedding,
    global_norm,
    lazy_rows,
    net,
    pmean,
    psum,
    reset_rows,
    rmsprop,
    shampoo,
    split_ids,
    stochastic_rounding,
    uniform_rows,
    value_and_row_grad,
)

Params = dict[str, jax.Array]


def new_params() -> Params:
    return {"items": jnp.zeros((10, 2)), "bias": jnp.zeros(())}


def loss(params: Params, rows: jax.Array, rating: jax.Array) -> jax.Array:
    predicted = params["items"][rows].sum(-1) + params["bias"]
    return jnp.mean((predicted - rating) ** 2)


def loss_and_size(params: Params, rows: jax.Array) -> tuple[jax.Array, int]:
    return params["items"][rows].sum(), rows.size


def train(tx: optax.GradientTransformation) -> None:
    ids = IdMap(10)
    raw, rating = np.array([2**60, 7]), jnp.array([4.0, 2.5])
    rows, fresh = ids.assign(raw, time=1)
    assert_type(rows, NDArray[np.int32])
    assert_type(fresh, NDArray[np.int32])
    params = new_params()
    state = tx.init(params)
    new = {"items": fresh, "bias": None}
    params, state = reset_rows(tx, params, state, new, {"items": 0.1, "bias": None})
    batch = jnp.asarray(rows), rating
    before = loss(params, *batch)
    for _ in range(3):
        value, gradients = value_and_row_grad(loss)(params, *batch)
        assert_type(value, jax.Array)
        assert_type(global_norm(gradients), jax.Array)
        updates, state = tx.update(gradients, state, params)
        params = apply_updates(params, updates)
        assert_type(params, Params)
    assert loss(params, *batch) < before
    assert_type(ids.lookup(raw), NDArray[np.int32])
    assert_type(ids.expire(before=0), NDArray[np.int32])
    assert_type(split_ids(raw, 2), list[NDArray[np.int64]])


def optimizers() -> list[optax.GradientTransformationExtraArgs]:
    schedule = optax.linear_schedule(0.1, 0.01, transition_steps=10)
    return [
        assert_type(
            lazy_rows(optax.adagrad(0.1)), optax.GradientTransformationExtraArgs
        ),
        lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), adamom(schedule))),
        lazy_rows(stochastic_rounding(rmsprop(0.1), seed=0)),
        lazy_rows(
            optax.partition(
                {"table": embedding.rowwise_adagrad(0.1), "dense": shampoo(0.1)},
                {"items": "table", "bias": "dense"},
            )
        ),
    ]


def differentiate() -> None:
    params, rows = new_params(), jnp.array([1, 2])
    grad = value_and_row_grad(loss_and_size, has_aux=True)
    (value, size), gradients = grad(params, rows)
    assert_type(value, jax.Array)
    assert_type(size, int)
    assert_type(grad.explain(params, rows), str)
    slices: RowSlices = gradients["items"]
    assert_type(slices.ids, jax.Array)
    assert_type(slices.rows, jax.Array)
    assert_type(slices.to_dense(10), jax.Array)
    assert_type(slices + slices, RowSlices)
    assert_type(slices - 2 * slices, RowSlices)
    assert_type(-slices / 2, RowSlices)
    assert_type(slices + params["items"], jax.Array)
    assert_type(params["items"] - slices, jax.Array)


def over_devices(slices: RowSlices) -> RowSlices:
    assert_type(psum({"items": slices}, "data"), dict[str, RowSlices])
    return pmean(slices, "data")


def save() -> None:
    params = new_params()
    state = adamom(0.1).init(params)
    tensors = checkpoint.export_slots(params, state)
    assert_type(tensors, dict[str, np.ndarray])
    params, state = checkpoint.import_slots(tensors, params, state)
    params = new_params()
    ids = IdMap(10)
    ids.assign([5])
    state = embedding.sgd(0.1).init(params)
    leaves = {"item": {"items": "sgd"}}
    tables = checkpoint.export_hash_tables(params, state, {"item": ids}, leaves=leaves)
    assert_type(tables["item"].ids, NDArray[np.int64])
    assert_type(tables["item"].weights, NDArray[np.float32])
    params, state, maps = checkpoint.import_hash_tables(
        tables, params, state, leaves=leaves
    )
    assert_type(params, Params)
    assert_type(maps, dict[str, IdMap])


def cache_rows() -> None:
    tx, params = lazy_rows(embedding.adagrad(0.1)), new_params()
    state = tx.init(params)
    tables = {"items": "item", "bias": None}
    cache = RowCache(tx, params, tables, init=uniform_rows(0.1, seed=1), policy="lfu")
    batches = [(np.arange(6), 1), (np.arange(3, 9), 2)]
    for batch, rows, moves in cache.prefetch(
        batches, lambda batch: {"item": batch[0]}, time=lambda batch: batch[1]
    ):
        assert_type(batch[1], int)
        assert_type(moves, Moves)
        params, state = cache.move(params, state, moves)
        assert rows["item"].shape == (6,)
    assert_type(params, Params)
    assert_type(cache.counts, CacheCounts)
    assert_type(cache.num_ids, dict[str, int])
    params, state = cache.drain(params, state)
    cache.expire(before=2)


def check_nodes() -> None:
    addresses = ["localhost:none"]  # malformed, so that nothing is connected to
    report = asyncio.run(net.check_nodes(addresses))
    assert_type(report, net.NodeReport)
    assert_type(report[addresses[0]].reason, net.Reason | None)
    assert_type(net.NodeAliveChecker(addresses).all_nodes_alive(), bool)
    assert_type(net.parse_address("localhost:1").port, int)
    transitions = net.watch_nodes(addresses, interval=1)
    assert_type(transitions, AsyncGenerator[net.Transition, None])


def mistakes(params: Params, rows: jax.Array, slices: RowSlices) -> None:
    """Nothing calls it."""
    value_and_row_grad(loss)(params, rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    value_and_row_grad(loss)([1.0], rows, rows)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    value_and_row_grad(loss, aux=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RowCache(adamom(), params, "item", policy="fifo")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lazy_rows(0.1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    adamom(use_v3=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    IdMap("10")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    IdMap(10).expire()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RowSlices(rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    slices.rows = rows  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    checkpoint.read_hash_table("folder", "name")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    net.watch_nodes(["localhost:1"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    monolith_optax.adam(0.1)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    for tx in optimizers():
        train(tx)
    differentiate()
    save()
    cache_rows()
    check_nodes()
    print(f"monolith_optax {monolith_optax.__version__} works")
