"""What tables will cost, from shapes, and what compiled programs say of it."""

import jax
import jax.numpy as jnp
import optax
import pytest
from compiled_programs import sent
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from monolith_optax import (
    adamom,
    embedding,
    lazy_rows,
    plan_tables,
    slot_shardings,
    value_and_row_grad,
)

MESH = AbstractMesh((8,), ("x",))
SPREAD = NamedSharding(MESH, P("x"))
ADAGRAD = lazy_rows(embedding.adagrad(0.1))


def table(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_small_tables_and_weights_are_on_every_device():
    params = {"days": table(7, 16), "items": table(2**20, 16), "weight": table(16)}
    ids = {"days": 4096, "items": 4096, "weight": 0}
    plan = plan_tables(ADAGRAD, params, ids, SPREAD)
    assert plan.tables == {"days": False, "items": P("x"), "weight": False}
    assert plan.where["items"] == SPREAD
    assert plan.where["days"] == NamedSharding(MESH, P())
    assert plan.leaves["days"] == (False, 2 * 7 * 64, 2 * 7 * 64, 2 * 7 * 64)
    assert plan.leaves["items"].held == 2 * 2**20 * 64 // 8
    assert str(plan).splitlines()[0].split() == ["held", "sent", "needed"]
    assert str(plan).splitlines()[-1].startswith("each device")


def test_all_slots_are_held_and_rowwise_ones_are_small():
    params = {"items": table(2**20, 16)}
    sizes = {
        embedding.sgd: 16,
        embedding.rowwise_adagrad: 17,
        adamom: 64,
    }
    for make, numbers in sizes.items():
        plan = plan_tables(lazy_rows(make(0.1)), params, {"items": 4096}, SPREAD)
        assert plan.leaves["items"].held == 2**20 // 8 * numbers * 4


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match=r"8 devices, .* 1000003 .* make it 1000008"):
        plan_tables(ADAGRAD, table(1_000_003, 16), 64, SPREAD)
    with pytest.raises(ValueError, match="spread must split rows over mesh axes"):
        plan_tables(ADAGRAD, table(80, 16), 64, NamedSharding(MESH, P()))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8,), (2, 4)])
@pytest.mark.parametrize("make", [embedding.sgd, adamom])
def test_compiled_programs_hold_send_and_need_it(make, sizes):
    names = ("data", "x")[-len(sizes) :]
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    rows = NamedSharding(mesh, P("x"))
    tx, ids = lazy_rows(make(0.1)), 8 * 512
    # Compiled for CPUs, 16-bit rows would be sent in 32 bits.
    params = {"items": table(80_000, 64), "users": table(40_000, 32)}
    plan = plan_tables(tx, params, dict.fromkeys(params, ids), rows)
    assert plan.tables == dict.fromkeys(params, P("x"))

    def loss(params, ids):
        return sum(jnp.sum(table[ids] ** 2) for table in params.values())

    def step(carry, ids):
        params, state = carry
        _, gradients = value_and_row_grad(loss, plan.tables)(params, ids)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    places = plan.where, slot_shardings(tx, params, plan.where)
    carry = jax.tree.map(
        lambda leaf, where: leaf.update(sharding=where),
        (params, jax.eval_shape(tx.init, params)),
        places,
    )
    batch = jax.ShapeDtypeStruct(
        (ids,), "int32", sharding=NamedSharding(mesh, P(names))
    )
    compiled = jax.jit(step, donate_argnums=0).lower(carry, batch).compile()
    memory, found = compiled.memory_analysis(), sent(compiled)
    total = [sum(column) for column in zip(*plan.leaves.values(), strict=True)]
    _, held, sends, needs = total
    assert 0 <= memory.argument_size_in_bytes - 4 * ids // 8 - held <= 8
    assert sends == sum(found["all-to-all"]) + sum(found.get("all-gather", []))
    # On two axes gradients are summed by rows: no table, only the loss, is reduced.
    assert max(found["all-reduce"]) <= 16
    assert memory.temp_size_in_bytes / 1.5 < needs < 1.5 * memory.temp_size_in_bytes
