"""The compiled step: in place, without copies, without a way to the host."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from choosing import only

from monolith_optax import adamom, check_in_place

SIZE = 100_000


def compiled_step(tx, dtype):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.ones(SIZE, dtype)}
    state = tx.init(params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, params).compile()


# Steps on tables are in place inside lazy_rows, whose tests hold that. What is not for
# rows keeps matrices of their number squared.
@only(lambda variant: variant.row.is_dense and variant.row.for_rows)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_step_is_in_place(variant, dtype):
    compiled = compiled_step(variant.make(), dtype)
    check_in_place(compiled)
    assert compiled.memory_analysis().temp_size_in_bytes < SIZE / 10
    program = compiled.as_text()
    assert not re.search(r" (custom-call|infeed|outfeed|send|recv)\(", program)


def test_a_step_needs_nothing_from_the_host(variant):
    tx = variant.make()
    params = {"w": jnp.ones(8)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    updates, _ = step(params, state, params)
    with jax.transfer_guard("disallow"):
        again, _ = step(params, state, params)
    chex.assert_trees_all_equal(updates, again)


def test_a_rule_is_traced_once_for_leaves_of_one_shape():
    tx = adamom()

    def equations(count):
        params = [jnp.ones(8)] * count
        return len(jax.make_jaxpr(tx.update)(params, tx.init(params), params).eqns)

    assert equations(20) - equations(10) == 10
