"""sparse_tables: by numbers of ids and rows, whatever the ids are."""

import jax
import jax.numpy as jnp
import optax
import pytest

from monolith_optax import RowSlices, lazy_rows, sparse_tables, value_and_row_grad


@pytest.fixture
def params():
    return {
        "item": jnp.ones((100, 2)),
        "day": jnp.ones((7, 2)),
        "twice": jnp.ones((30, 2)),
        "kernel": jnp.ones(2),
        "layers": jnp.ones((3, 2)),
    }


def loss(params, ids):
    rows = params["item"][ids] * params["day"][ids % 7]
    rows = rows * params["twice"][ids % 30] + params["twice"][ids % 29]
    return ((rows + params["layers"][:1]) @ params["kernel"]).mean()


def test_tables_with_more_rows_than_ids(params):
    expected = dict.fromkeys(params, False) | {"item": True}
    assert sparse_tables(loss, params, jnp.arange(16)) == expected
    expected["twice"] = True  # 28 ids
    assert sparse_tables(loss, params, jnp.arange(14)) == expected
    assert not any(sparse_tables(loss, params, jnp.arange(100)).values())


def test_ids_in_loops_count_in_each_turn(params):
    def looped(params, batches):
        return jax.lax.map(lambda ids: loss(params, ids), batches).mean()

    batches = jnp.zeros((10, 10), jnp.int32)
    assert not any(sparse_tables(looped, params, batches).values())
    assert sparse_tables(looped, params, batches[:9])["item"]


def test_short_batches_do_not_change_the_choice(params):
    def with_aux(params, ids):
        return loss(params, ids), ids

    tables = sparse_tables(with_aux, params, jnp.arange(16), has_aux=True)
    tx = lazy_rows(optax.adagrad(0.1))
    grad = value_and_row_grad(with_aux, tables, has_aux=True)

    def step(params, ids):
        _, gradients = grad(params, ids)
        is_rows = {k: isinstance(g, RowSlices) for k, g in gradients.items()}
        assert is_rows == tables
        return tx.update(gradients, tx.init(params), params)

    for size in 16, 3:
        jax.eval_shape(step, params, jnp.arange(size))
