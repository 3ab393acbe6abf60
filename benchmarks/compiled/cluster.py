"""Steps on a table that no device could hold: what each device of a cluster needs.

Every device has as many rows and as many ids of the batch, so that targets with more
devices have larger tables and batches.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from benchmarks.compiled.targets import Target
from monolith_optax import (
    adamom,
    apply_updates,
    lazy_rows,
    slot_shardings,
    value_and_row_grad,
)

# Narrower rows would be copied on a TPU (docs/tpu.md).
ROWS_EACH, WIDTH = 2**21, 128
IDS_EACH = 256, 8_192

Step = Callable[[Any, jax.Array], Any]


def names() -> dict[str, Callable[[Target], Any]]:
    """The steps, by what the page says of them."""
    ways = {"dense": _dense, "True": _whole_batch, "spread": _spread}
    return {
        f"{name}, {ids:,} ids": functools.partial(_lowered, way, ids)
        for ids in IDS_EACH
        for name, way in ways.items()
    }


def _loss(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.mean((params["table"][ids] @ params["weight"]) ** 2)


def _dense(tx: Any, where: Any) -> Step:
    def gradients(params: Any, ids: jax.Array) -> Any:
        return jax.lax.with_sharding_constraint(jax.grad(_loss)(params, ids), where)

    return _step(tx, gradients)


def _whole_batch(tx: Any, where: Any) -> Step:
    del where
    grad = value_and_row_grad(_loss, {"table": True, "weight": False})
    return _step(tx, lambda *args: grad(*args)[1])


def _spread(tx: Any, where: Any) -> Step:
    grad = value_and_row_grad(_loss, {"table": where["table"], "weight": False})
    return _step(tx, lambda *args: grad(*args)[1])


def _step(tx: Any, gradients_of: Callable[..., Any]) -> Step:
    def step(carry: Any, ids: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(gradients_of(params, ids), state, params)
        return apply_updates(params, updates), state

    return step


def _lowered(way: Callable[..., Step], ids_each: int, target: Target) -> Any:
    split, whole = target.split(), target.everywhere()
    tx = lazy_rows(adamom(0.1))
    number = len(target.devices)
    params = {
        "table": jax.ShapeDtypeStruct((number * ROWS_EACH, WIDTH), jnp.float32),
        "weight": jax.ShapeDtypeStruct((WIDTH,), jnp.float32),
    }
    where = {"table": split, "weight": whole}
    places = where, slot_shardings(tx, params, where)
    carry = jax.tree.map(_on, (params, jax.eval_shape(tx.init, params)), places)
    ids = jax.ShapeDtypeStruct((number * ids_each,), jnp.int32)
    step = jax.jit(way(tx, where), donate_argnums=0, out_shardings=places)
    return step.lower(carry, _on(ids, split))


def _on(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
