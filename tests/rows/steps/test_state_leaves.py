"""Whose rows the leaves of a state are: by identity, whatever lengths are the same."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from monolith_optax import (
    embedding,
    grow_rows,
    plan_tables,
    read_rows,
    reset_rows,
    slot_shardings,
)
from monolith_optax._rows.steps.state_leaves import UNTOLD, owners

# All lengths are the same.
PARAMS = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 2)), "c": jnp.ones(4), "d": 1.0}


class State(NamedTuple):
    full: dict
    rows: dict
    columns: dict
    turned: jax.Array
    both: jax.Array
    fixed: jax.Array
    count: int


def init(params):
    return State(
        full=jax.tree.map(jnp.zeros_like, params),
        rows={k: jnp.zeros(params[k].shape[0]) for k in "ab"},
        columns={k: jnp.zeros(params[k].shape[1:]) for k in "ab"},
        turned=params["b"].T,
        both=jnp.concatenate([params["a"][:, 0], params["b"][:, 0]]),
        fixed=jnp.zeros(4),
        count=0,
    )


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda node: node is None)


def found(tx, params=PARAMS, row_axes=None):
    state = jax.eval_shape(tx.init, params)
    return jax.tree.unflatten(
        jax.tree.structure(state), owners(tx, params, state, row_axes)
    )


def test_leaves_grow_with_their_parameter():
    tree = found(optax.GradientTransformation(init, lambda *_: None))
    assert tree.full == {"a": 0, "b": 1, "c": 2, "d": None}
    assert tree.rows == {"a": 0, "b": 1}
    assert tree.columns == {"a": None, "b": None}
    assert tree.turned is tree.both is UNTOLD
    assert tree.fixed is tree.count is None


def test_only_some_parameters():
    tree = found(optax.adafactor(0.1, min_dim_size_to_factor=2), row_axes={1: 1})
    assert set(leaves(tree)) == {1, None}


def test_stacks():
    params = {"a": jnp.ones((3, 4, 2)), "b": jnp.ones((3, 4, 2))}

    def init(p):
        return [p["a"], p["b"][..., :1], p["b"][..., 0], p["a"][:, 0, 0], p["a"][0]]

    tx = optax.GradientTransformation(init, lambda *_: None)
    assert found(tx, params, {0: 2, 1: 2}) == [0, 1, 1, UNTOLD, UNTOLD]


@pytest.mark.parametrize("exact", [True, False])
def test_masks_of_one_exact_size(exact):
    """Only optax can tell then, and it knows of full slots."""

    def mask(params):
        return jax.tree.map(lambda p: not exact or jnp.shape(p) == (4, 4), params)

    tree = found(optax.masked(optax.adam(0.1), mask))
    mu = tree.inner_state[0].mu
    assert mu["a"] == 0
    assert leaves(mu) == ([0] if exact else [0, 1, 2, None])
    assert tree.inner_state[0].count is None


def test_an_init_that_cannot_be_traced():
    def init(params):
        return [float(params["a"][0, 0]), params["a"]]

    tx = optax.GradientTransformation(init, lambda *_: None)
    assert owners(tx, PARAMS, tx.init(PARAMS)) == [None, UNTOLD]


def test_wrappers():
    tx = optax.partition(
        {"x": embedding.adagrad(0.1), "y": optax.adam(0.1)},
        {"a": "x", "b": "y", "c": "y", "d": "y"},
    )
    tree = found(optax.chain(optax.clip_by_global_norm(1.0), tx))
    assert leaves(tree[1].inner_states["x"].inner_state.norm) == [0]
    assert leaves(tree[1].inner_states["y"].inner_state[0].nu) == [1, 2, None]


@pytest.mark.parametrize(
    ("use", "most"),
    [
        (lambda tx, p, s: read_rows(tx, p, s, ROWS), 1),
        (lambda tx, p, s: reset_rows(tx, p, s, ROWS, 0.0), 2),  # the other one runs
        (lambda tx, p, s: grow_rows(tx, p, s, {"a": 5, "b": None}), 2),  # the same
        (lambda tx, p, _: slot_shardings(tx, p, WHERE), 2),  # types, and who owns them
        (lambda tx, p, _: plan_tables(tx, p, {"a": 4, "b": 0}, WHERE), 2),
    ],
    ids=["read", "reset", "grow", "shardings", "plan"],
)
def test_how_often_init_is_called(use, most):
    calls = []
    adam = optax.adam(0.1)

    def init(params):
        calls.append(params)
        return adam.init(params)

    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    use(optax.GradientTransformation(init, adam.update), params, adam.init(params))
    assert len(calls) == most


ROWS = {"a": jnp.array([1]), "b": None}
WHERE = NamedSharding(AbstractMesh((2,), ("x",)), PartitionSpec("x"))


def test_a_state_of_other_shapes_is_refused_by_what_one_trace_shows():
    tx = optax.adam(0.1)
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    for name, shape in ("a", (5, 4)), ("a", (4, 5)), ("a", ()), ("b", (5, 4)):
        state = tx.init(params)
        mu = state[0].mu | {name: jnp.ones(shape)}
        state = (state[0]._replace(mu=mu), *state[1:])
        with pytest.raises(ValueError, match=r"optimizer gives it \(4, 4\)"):
            read_rows(tx, params, state, ROWS)
