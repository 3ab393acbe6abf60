"""The commonest mistakes, and what is said of them."""

import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from monolith_optax import RowSlices, lazy_rows, reset_rows

PARAMS = {"table": jnp.ones((9, 2)), "bias": jnp.ones(2)}
GRADIENTS = {
    "table": RowSlices(jnp.array([1, 2]), jnp.ones((2, 2))),
    "bias": jnp.ones(2),
}


def step(tx):
    return tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)


INSIDE = "inside lazy_rows"


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.sgd(0.1),
        lambda: optax.adam(0.1),
        lambda: optax.adagrad(0.1),
        lambda: optax.chain(optax.clip(1.0), lazy_rows(optax.sgd(0.1))),
        lambda: optax.chain(optax.clip_by_block_rms(1.0), lazy_rows(optax.sgd(0.1))),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), lazy_rows(optax.sgd(0.1))),
        lambda: optax.chain(lazy_rows(optax.sgd(0.1)), optax.scale(2.0)),
        lambda: optax.masked(
            lazy_rows(optax.sgd(0.1)), lambda t: jax.tree.map(lambda x: x.ndim > 1, t)
        ),
    ],
)
def test_what_does_not_take_slices_names_lazy_rows(make):
    tx = make()
    with pytest.raises((TypeError, ValueError), match=INSIDE):
        jax.eval_shape(tx.update, GRADIENTS, tx.init(PARAMS), PARAMS)


@pytest.mark.filterwarnings("ignore:optax.global_norm is:DeprecationWarning")
@pytest.mark.parametrize("norm", [optax.global_norm, optax.tree.norm])
def test_norms_of_slices_name_ours(norm):
    with pytest.raises(TypeError, match=r"global_norm, .* of monolith_optax"):
        jax.eval_shape(norm, GRADIENTS)


@pytest.mark.skipif(not hasattr(optax, "microbatch"), reason="optax has none here")
def test_sums_of_micro_batches_name_accumulate():
    def gradients(ids):
        return RowSlices(ids, jnp.ones((2, 2)))

    with pytest.raises(TypeError, match=r"accumulate .* of monolith_optax"):
        optax.microbatch(gradients, 0, 2)(jnp.arange(8))


@pytest.mark.parametrize("row", [1.0, jnp.nan])
def test_apply_if_finite_may_be_outside(row):
    slices = GRADIENTS["table"].with_rows([[1.0, 2.0], [3.0, row]])
    gradients = GRADIENTS | {"table": slices}
    found = []
    for tx in (
        optax.apply_if_finite(lazy_rows(optax.adagrad(0.1)), 2),
        lazy_rows(optax.apply_if_finite(optax.adagrad(0.1), 2)),
    ):
        updates, state = jax.jit(tx.update)(gradients, tx.init(PARAMS), PARAMS)
        found.append((optax.apply_updates(PARAMS, updates), state))
    chex.assert_trees_all_close(*found, rtol=1e-6)
    assert (found[0][0]["table"][2, 1] == 1) == np.isnan(row)


def test_multi_steps_outside():
    tx = optax.MultiSteps(lazy_rows(optax.sgd(0.1)), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tries a step on zeros
        with pytest.raises((ValueError, AttributeError)) as caught:
            step(tx)
    if isinstance(caught.value, AttributeError):  # optax 0.2.6 asks slices for a dtype
        assert "'RowSlices' object has no attribute 'dtype'" in str(caught.value)
    else:
        assert re.search(INSIDE, str(caught.value))


def test_arithmetic():
    with pytest.raises(TypeError, match=INSIDE):
        jax.tree.map(lambda g: g * 2, GRADIENTS)
    with pytest.raises(TypeError, match=INSIDE):
        jnp.sum(GRADIENTS["table"])


def test_slices_are_not_an_array():
    with pytest.raises((TypeError, ValueError)):  # the latter with JAX 0.8
        jnp.asarray(GRADIENTS["table"])
    with pytest.raises(TypeError, match="to_dense"):
        np.asarray(GRADIENTS["table"])


def test_dense_gradients_for_all_tables_are_told_once():
    tx, dense = lazy_rows(optax.sgd(0.1)), jax.tree.map(jnp.ones_like, PARAMS)
    with pytest.warns(UserWarning, match="value_and_row_grad"):
        tx.update(dense, tx.init(PARAMS), PARAMS)
    tx.update(dense, tx.init(PARAMS), PARAMS)
    only_vectors = {"bias": jnp.ones(2)}
    tx = lazy_rows(optax.sgd(0.1))
    tx.update(only_vectors, tx.init(only_vectors), only_vectors)


@pytest.mark.parametrize(
    "make", [contrib.schedule_free_sgd, contrib.schedule_free_adamw]
)
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(tx)])
def test_averages_of_parameters_are_refused(make, wrap):
    tx = lazy_rows(wrap(make(0.1)))
    with pytest.raises(ValueError, match="ScheduleFreeState averages parameters"):
        step(tx)


def as_lists(state):
    return jax.tree.map(
        lambda node: list(node) if isinstance(node, tuple) else node,
        [list(part) for part in state],
    )


@pytest.mark.parametrize(
    "restored", [as_lists, lambda _: optax.sgd(0.1).init(PARAMS), list]
)
def test_a_state_of_another_tree(restored):
    tx = lazy_rows(optax.adam(0.1))
    state = restored(tx.init(PARAMS))
    match = "state must be that of the optimizer"
    with pytest.raises(ValueError, match=match):
        tx.update(GRADIENTS, state, PARAMS)
    with pytest.raises(ValueError, match=match):
        reset_rows(tx, PARAMS, state, {"table": jnp.array([1]), "bias": None}, 0.0)


def test_errors_of_the_optimizer_itself_stay():
    def update(*_):
        raise KeyError("its own")

    tx = lazy_rows(optax.GradientTransformation(lambda _: (), update))
    with pytest.raises(KeyError, match="its own"):
        step(tx)


def test_a_table_without_columns():
    params = {"table": jnp.ones((9, 0)), "other": jnp.ones((5, 2))}
    gradients = {
        "table": RowSlices(jnp.array([1, 2]), jnp.ones((2, 0))),
        "other": RowSlices(jnp.array([1, 1]), jnp.ones((2, 2))),
    }
    tx = lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    updates, _ = tx.update(gradients, tx.init(params), params)
    expected = np.zeros((5, 2))
    expected[1] = -(0.5**0.5)
    np.testing.assert_allclose(updates["other"].to_dense(5), expected, rtol=1e-6)
    assert updates["table"].rows.shape == (2, 0)


def by_path(params):
    def label(path, _):
        return "table" if "table" in jax.tree_util.keystr(path) else "rest"

    return jax.tree_util.tree_map_with_path(label, params)


def test_labels_by_path_inside():
    kinds = {"table": optax.adagrad(0.1), "rest": optax.sgd(0.1)}
    by_function = step(lazy_rows(optax.partition(kinds, by_path)))
    by_tree = step(lazy_rows(optax.partition(kinds, by_path(PARAMS))))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(by_function[1]),
        jax.tree.leaves(by_tree[1]),
    )
    np.testing.assert_array_equal(
        by_function[0]["table"].rows, by_tree[0]["table"].rows
    )
