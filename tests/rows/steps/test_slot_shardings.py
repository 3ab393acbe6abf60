"""Shardings of slots, whatever wraps the optimizer."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from monolith_optax import embedding, lazy_rows, slot_shardings


def mesh_and_where():
    mesh = jax.make_mesh((1, 1), ("x", "y"))
    split = NamedSharding(mesh, PartitionSpec("x", "y"))
    return (
        mesh,
        split,
        {"a": split, "b": split, "c": NamedSharding(mesh, PartitionSpec())},
    )


PARAMS = {"a": jnp.ones((8, 2)), "b": jnp.ones((8, 2)), "c": jnp.ones(8)}


def test_partition_inside():
    mesh, split, where = mesh_and_where()
    tx = lazy_rows(
        optax.partition(
            {"rows": embedding.rowwise_adagrad(0.1), "rest": optax.adam(0.1)},
            {"a": "rows", "b": "rest", "c": "rest"},
        )
    )
    found = slot_shardings(tx, jax.eval_shape(lambda: PARAMS), where)
    assert jax.tree.structure(found) == jax.tree.structure(tx.init(PARAMS))
    of_rows = found.inner_states["rows"].inner_state
    assert of_rows.sum_square["a"] == NamedSharding(mesh, PartitionSpec("x"))
    assert of_rows.sum_square["b"] == optax.MaskedNode()
    rest = found.inner_states["rest"].inner_state[0]
    assert rest.mu["b"] == split
    assert rest.nu["c"] == where["c"]
    assert rest.count == NamedSharding(mesh, PartitionSpec())
    state = jax.jit(tx.init, out_shardings=found)(PARAMS)
    assert jax.tree.map(lambda x: x.sharding, state) == found


def test_a_prefix():
    _, split, _ = mesh_and_where()
    tables = {"a": PARAMS["a"], "b": PARAMS["b"]}
    found = slot_shardings(optax.trace(0.9), tables, split)
    assert found.trace == {"a": split, "b": split}


def test_errors():
    _, split, where = mesh_and_where()
    with pytest.raises(ValueError, match="prefix of the tree of params"):
        slot_shardings(optax.adam(0.1), PARAMS, {"a": split})
    with pytest.raises(ValueError, match="NamedSharding for each"):
        slot_shardings(optax.adam(0.1), PARAMS, where | {"c": jax.devices()[0]})

    def turned(params):
        return params["a"].T

    tx = optax.GradientTransformation(turned, lambda *_: None)
    with pytest.raises(ValueError, match=r"state of shape \(2, 8\) belongs to"):
        slot_shardings(tx, PARAMS, where)
