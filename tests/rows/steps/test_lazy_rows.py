"""RowSlices, and lazy_rows against dense and row-by-row oracles."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from dense_rows import densely
from hypothesis import given
from hypothesis import strategies as st
from op_by_op import op_by_op

from monolith_optax import (
    RowSlices,
    adamom,
    check_in_place,
    lazy_rows,
    rmsprop,
    value_and_row_grad,
)

pytestmark = pytest.mark.usefixtures("mixed_dtypes")

NUM_ROWS, DIM = 12, 3
PADDING = [-1, -7, NUM_ROWS, NUM_ROWS + 1000]

ELEMENTWISE = {
    "adamom": functools.partial(adamom, 0.1, 0.99, 0.9, weight_decay=0.01),
    "adamom_v2": functools.partial(adamom, 0.1, 0.99, 0.9, use_v2=True),
    "rmsprop": functools.partial(rmsprop, 0.1, 0.9, 0.99, weight_decay=0.01),
    "rmsprop_v2": functools.partial(rmsprop, 0.1, 0.9, 0.99, use_v2=True),
    "adam": functools.partial(optax.adam, 0.1),
    "adamw": functools.partial(optax.adamw, 0.1, weight_decay=0.1),
    "optax_rmsprop": functools.partial(optax.rmsprop, 0.1, momentum=0.9),
    "adagrad": functools.partial(optax.adagrad, 0.1),
    "sgd": functools.partial(optax.sgd, 0.1, momentum=0.9),
    "lion": functools.partial(optax.lion, 0.1),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), adamom(0.1, 0.99, 0.9), optax.scale(0.5)
    ),
    "scheduled": lambda: adamom(optax.linear_schedule(0.1, 0.0, 10)),
    "injected": lambda: optax.inject_hyperparams(rmsprop)(learning_rate=0.1),
}


@pytest.fixture
def params():
    rng = np.random.default_rng(1)
    return {
        "table": jnp.asarray(rng.normal(size=(NUM_ROWS, DIM)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=(2,)), jnp.float32),
    }


def batch(ids, seed=0, dtype=np.float32):
    """Gradients of a batch: row slices for the table, an array for the rest."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(*np.shape(ids), DIM)).astype(dtype)
    rows[np.isin(ids, PADDING)] = np.nan
    slices = RowSlices(jnp.asarray(ids), jnp.asarray(rows))
    return {"table": slices, "dense": jnp.asarray(rng.normal(size=2), dtype)}


def to_dense(gradients):
    return densely(gradients, NUM_ROWS, gradients["table"].rows.dtype)


def run(tx, params, batches):
    step = op_by_op(
        lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(
            *tx.update(g, s, p)
        )
    )
    state = tx.init(params)
    for gradients in batches:
        params, state = step(gradients, state, params)
    return params, state


def covering(seed):
    """Ids of which every row has one at least, some several, and some are padding."""
    rng = np.random.default_rng(seed)
    ids = [*range(NUM_ROWS), *rng.integers(0, NUM_ROWS, 8), *PADDING]
    return rng.permutation(ids).astype(np.int32)


def test_gradients_of_microbatches_stack_up():
    params = jnp.zeros((NUM_ROWS, DIM))
    ids = jnp.arange(8).reshape(4, 2) % 3

    def microbatch(_, ids):
        return None, RowSlices(ids, jnp.ones((2, DIM)))

    _, stacked = jax.lax.scan(microbatch, None, ids)
    assert stacked.row_shape == (DIM,) or stacked.ids.shape == (4, 2)
    np.testing.assert_allclose((params + stacked)[:3, 0], [3, 3, 2])


# A few lengths alone: each new one is compiled anew.
ANY_IDS = st.sampled_from([0, 1, 9, 30]).flatmap(
    lambda n: st.lists(st.integers(-3, NUM_ROWS + 3), min_size=n, max_size=n)
)
LAZY_SGD = lazy_rows(optax.sgd(1.0))


@given(ANY_IDS, st.integers(0, 3))
def test_any_ids(ids, seed):
    gradients = batch(np.array(ids, np.int32), seed)
    params = {"table": jnp.zeros((NUM_ROWS, DIM)), "dense": jnp.zeros(2)}
    update = jax.jit(LAZY_SGD.update)
    updates, _ = update(gradients, LAZY_SGD.init(params), params)
    result = optax.apply_updates(params, updates)
    expected = -to_dense(gradients)["table"]
    np.testing.assert_allclose(result["table"], expected, atol=1e-5)
    touched = [i for i in updates["table"].ids.tolist() if i != -1]
    assert sorted({i for i in ids if 0 <= i < NUM_ROWS}) == sorted(touched)
    assert updates["table"].ids.shape == (len(ids),)


@pytest.mark.parametrize("name", sampled(ELEMENTWISE, "adamom", "clipped", "injected"))
def test_with_ids_that_cover_every_row_it_is_the_dense_optimizer(name):
    """Prints the largest difference, which `pytest -rP` shows."""
    inner = ELEMENTWISE[name]()
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        params = {
            "table": jnp.asarray(rng.normal(size=(NUM_ROWS, DIM))),
            "dense": jnp.asarray(rng.normal(size=2)),
        }
        batches = [batch(covering(seed), seed, np.float64) for seed in range(5)]
        lazy = run(lazy_rows(inner), params, batches)
        dense = run(inner, params, map(to_dense, batches))
        difference = jax.tree.map(
            lambda a, b: float(np.max(np.abs(np.subtract(a, b)))), lazy, dense
        )
        print(f"{name}: {max(jax.tree.leaves(difference)):.1e}")
        chex.assert_trees_all_close(lazy, dense, rtol=1e-11, atol=1e-14)


IDS = [[3, 5, 3, -1], [5, 7, 12, 7], [3, 3, 3, 3], [0, 11, 5, -7]]


@pytest.mark.parametrize(
    "name",
    sampled(
        ["adamom", "adamom_v2", "rmsprop", "rmsprop_v2", "adagrad", "sgd", "lion"],
        *["adamom", "rmsprop_v2", "lion"],
    ),
)
def test_each_touched_row_is_trained_by_itself_and_no_other(params, name):
    inner = ELEMENTWISE[name]()
    batches = [batch(np.array(ids), seed) for seed, ids in enumerate(IDS)]
    result, state = run(lazy_rows(inner), params, batches)
    touched = sorted({i for ids in IDS for i in ids if 0 <= i < NUM_ROWS})
    for row in touched:
        # The oracle: this row alone, on the steps that touch it alone.
        steps = [
            {"row": to_dense(gradients)["table"][row]}
            for gradients in batches
            if row in gradients["table"].ids
        ]
        expected, _ = run(inner, {"row": params["table"][row]}, steps)
        np.testing.assert_allclose(result["table"][row], expected["row"], rtol=1e-5)
    others = np.setdiff1d(np.arange(NUM_ROWS), touched)
    assert len(others) > 3

    def rows(tree):
        return [x[others] for x in jax.tree.leaves(tree) if x.shape == (NUM_ROWS, DIM)]

    assert len(rows(state)) == len(rows(inner.init(params))) > 0
    chex.assert_trees_all_equal(rows(state), rows(inner.init(params)))
    chex.assert_trees_all_equal(rows(result), rows(params))


def test_c_counts_the_steps_of_each_row(params):
    tx = lazy_rows(adamom(ada_decay=1.0))
    _, state = run(tx, params, [batch(np.array(ids)) for ids in IDS])
    assert state.c["table"][:, 0].tolist() == [1, 0, 0, 2, 0, 3, 0, 1, 0, 0, 0, 1]
    assert state.c["dense"].tolist() == [4, 4]
    assert state.count == 4


@pytest.mark.parametrize("ids", [np.zeros((0,), int), np.array(PADDING), [[5]]])
@pytest.mark.parametrize(
    "name",
    sampled(["adamom", "rmsprop_v2", "adam", "clipped"], "clipped"),
)
def test_few_ids_or_none(name, params, ids):
    inner = ELEMENTWISE[name]()
    ids = np.asarray(ids, np.int32)
    gradients = batch(ids)
    tx = lazy_rows(inner)
    before = tx.init(params)
    result, state = run(tx, params, [gradients])
    chex.assert_tree_all_finite((result, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    untouched = [row for row in range(NUM_ROWS) if row not in ids]
    chex.assert_trees_all_equal(
        result["table"][jnp.array(untouched)], params["table"][jnp.array(untouched)]
    )
    if ids.size == 1:
        assert (result["table"][5] != params["table"][5]).all()


def test_norms_count_neither_padding_nor_duplicates_twice():
    # Two halves of one row are 1, not the root of a half; padding counts for nothing.
    slices = RowSlices(jnp.array([4, 4, -1]), jnp.array([[0.5], [0.5], [jnp.nan]]))
    params = {"table": jnp.zeros((NUM_ROWS, 1))}
    tx = lazy_rows(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0)))
    updates, _ = tx.update({"table": slices}, tx.init(params), params)
    assert (params["table"] + updates["table"])[4] == -0.5


@pytest.mark.parametrize(
    "id_dtype",
    sampled(["int32", "int8", "uint32", "int64"], "int32"),
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(params, dtype, id_dtype):
    with jax.enable_x64(id_dtype == "int64"):
        ids = np.array([[3, 5], [3, 0]], id_dtype)
        params = optax.tree.cast(params, dtype)
        gradients = batch(ids)
        tx = lazy_rows(adamom(0.1))
        before = tx.init(params)
        updates, state = jax.jit(tx.update)(gradients, before, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
        assert updates["table"].rows.dtype == dtype
        assert state.v["table"].dtype == jnp.float32
        result = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, params)
        expected, _ = jax.jit(adamom(0.1).update)(to_dense(gradients), before, params)
        np.testing.assert_allclose(
            updates["table"].to_dense(NUM_ROWS), expected["table"], rtol=1e-2
        )


@pytest.mark.parametrize("name", sampled(ELEMENTWISE, "adamom", "injected"))
def test_dense_gradients_take_the_dense_step(name, params):
    inner = ELEMENTWISE[name]()
    gradients = to_dense(batch(covering(0)))
    state = inner.init(params)
    with pytest.warns(UserWarning, match="All gradients given to lazy_rows are arrays"):
        step = lazy_rows(inner).update(gradients, state, params)
    chex.assert_trees_all_equal(step, inner.update(gradients, state, params))


BAD = {
    "rows": (
        lambda g: g | {"table": RowSlices(g["table"].ids, jnp.ones((2, 4)))},
        "rows",
    ),
    "no table": (lambda g: {"table": g["dense"], "dense": g["table"]}, r"\['dense'\]"),
    "tree": (lambda g: {"table": g["table"]}, "structure"),
}


@pytest.mark.parametrize("bad", BAD)
def test_slices_that_do_not_fit(params, bad):
    change, message = BAD[bad]
    tx = lazy_rows(adamom(0.1))
    with pytest.raises(ValueError, match=message):
        tx.update(change(batch(np.array([1, 2]))), tx.init(params), params)


def test_params_are_needed(params):
    tx = lazy_rows(adamom(0.1))
    with pytest.raises(ValueError, match="params is None"):
        tx.update(batch(np.array([1])), tx.init(params))


@pytest.mark.parametrize("optimizer", [adamom, rmsprop])
def test_plain_optimizers_refuse_slices(params, optimizer):
    tx = optimizer()
    expected = r"\['table'\]: expected an array, got RowSlices.*lazy_rows"
    with pytest.raises(ValueError, match=expected):
        tx.update(batch(np.array([1])), tx.init(params), params)


@pytest.mark.slow
def test_inside_optax(params):
    batches = [batch(covering(seed), seed) for seed in range(3)]
    plain, _ = run(lazy_rows(adamom(0.1)), params, batches)

    def same(tx):
        result, _ = run(tx, params, batches)
        chex.assert_trees_all_close(result, plain, rtol=1e-5)

    same(optax.chain(lazy_rows(adamom(0.1)), optax.identity()))
    same(lazy_rows(optax.chain(optax.clip_by_global_norm(1e6), adamom(0.1))))
    same(optax.inject_hyperparams(lambda rate: lazy_rows(adamom(rate)))(rate=0.1))
    same(lazy_rows(optax.inject_hyperparams(adamom)(learning_rate=0.1)))
    labels = {"table": "a", "dense": "b"}
    same(optax.partition({"a": lazy_rows(adamom(0.1)), "b": adamom(0.1)}, labels))
    same(lazy_rows(optax.partition({"a": adamom(0.1), "b": adamom(0.1)}, labels)))
    same(
        lazy_rows(
            optax.chain(
                optax.masked(adamom(0.1), {"table": True, "dense": False}),
                optax.masked(adamom(0.1), {"table": False, "dense": True}),
            )
        )
    )


def test_scan(params):
    batches = [batch(covering(seed), seed) for seed in range(4)]
    tx = lazy_rows(adamom(0.1))

    def step(carry, gradients):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    carry, _ = jax.lax.scan(step, (params, tx.init(params)), stacked)
    chex.assert_trees_all_close(carry, run(tx, params, batches), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamom", "rmsprop", "adam"])
def test_nothing_as_large_as_the_table_is_copied(name):
    tx = lazy_rows(ELEMENTWISE[name]())
    num_rows, batch_size = 100_000, 64
    params = {"table": jnp.zeros((num_rows, 16))}
    slices = RowSlices(jnp.arange(batch_size), jnp.ones((batch_size, 16)))

    def step(params, state, slices):
        updates, state = tx.update({"table": slices}, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    check_in_place(jitted, params, tx.init(params), slices)


def test_padding_sees_no_row_of_the_table():
    """Not even the last one, and not even what is no number there."""
    tx = lazy_rows(
        optax.chain(adamom(0.1, mom_decay=0.0), optax.clip_by_global_norm(1.0))
    )
    params = {"table": jnp.ones((NUM_ROWS, DIM)), "dense": jnp.ones(2)}
    state = tx.init(params)
    ours, clip = state
    m = ours.m | {"table": ours.m["table"].at[-1].set(jnp.nan)}
    gradients = batch(np.array([1, 1, -1]))
    updates, _ = tx.update(gradients, (ours._replace(m=m, v=m), clip), params)
    chex.assert_tree_all_finite(updates["dense"])


def test_wide_ids_without_wide_integers_are_padding():
    ids = np.array([2**32 + 3, -(2**63), 2**31, 1])
    slices = RowSlices(ids, jnp.ones((4, 1)))
    expected = [0, 1, 0, 0, 0]
    updates, _ = LAZY_SGD.update(
        slices, LAZY_SGD.init(jnp.zeros((5, 1))), jnp.zeros((5, 1))
    )
    assert (-updates.to_dense(5))[:, 0].tolist() == expected


def test_it_is_traced_where_transfers_are_forbidden():
    tx = lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))
    table, slices = jnp.ones((50, 3)), RowSlices(jnp.array([1, 1]), jnp.ones((2, 3)))
    state, step = tx.init(table), jax.jit(tx.update)
    with jax.transfer_guard("disallow"):
        updates, _ = step(slices, state, table)
    np.testing.assert_array_equal(updates.ids, [-1, 1])


@pytest.mark.slow
def test_a_step_is_exported_for_batches_of_any_size():
    tx = lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), adamom(0.1)))
    params = {"table": jnp.arange(150.0).reshape(50, 3), "kernel": jnp.ones(3)}

    @jax.jit
    def step(params, state, ids):
        def loss(params, ids):
            return jnp.sin(params["table"][ids] @ params["kernel"]).mean()

        value, gradients = value_and_row_grad(loss)(params, ids)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    [size] = jax.export.symbolic_shape("batch")
    batch = jax.ShapeDtypeStruct((size,), jnp.int32)
    exported = jax.export.export(step)(params, state, batch)
    for ids in ([3], [1, 1, 49, -1, 2, 1, 70]):
        actual = exported.call(params, state, jnp.array(ids))
        expected = step(params, state, jnp.array(ids))
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)
