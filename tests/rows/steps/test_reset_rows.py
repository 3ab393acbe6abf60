"""reset_rows against a whole new init, of which only the reset rows are taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from dense_rows import DIM, NUM_ROWS
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from op_by_op import op_by_op
from registry import VARIANTS

from monolith_optax import (
    IdMap,
    adamom,
    check_in_place,
    embedding,
    lazy_rows,
    reset_rows,
)

pytestmark = pytest.mark.usefixtures("mixed_dtypes")

ROWS = [40, 3, -1, NUM_ROWS, 0, -(2**31), 7]
RESET = np.isin(np.arange(NUM_ROWS), [40, 3, 0, 7])


def is_table(params):
    return jax.tree.map(lambda x: x.ndim == 2, params)


def label(params):
    return jax.tree.map(lambda x: "rows" if x.ndim == 2 else "rest", params)


def keyed(params):
    return {"table": "rows", "dense": "rest"} if params else {}


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(2)),
    "lazy": lazy_rows,
    "masked": lambda tx: optax.masked(tx, is_table),
    "masked_by_path": lambda tx: optax.masked(tx, {"table": True, "dense": False}),
    "partition": lambda tx: optax.partition(
        {"rows": lazy_rows(tx), "rest": optax.adam(0.1)}, label
    ),
    "partition_by_path": lambda tx: optax.partition(
        {"rows": tx, "rest": optax.adam(0.1)}, keyed
    ),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(tx, optax.scale(learning_rate))
    )(learning_rate=0.1),
}
OTHERS = {
    "adam": functools.partial(optax.adam, 0.1),
    "starts_with_params": functools.partial(optax.contrib.schedule_free_sgd, 0.1),
    "adafactor": functools.partial(optax.adafactor, 0.1),
}


def parameters():
    rng = np.random.default_rng(1)
    return {
        "table": jnp.asarray(rng.normal(size=(NUM_ROWS, DIM)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=2), jnp.float32),
    }


def trained(tx, params, by=op_by_op):
    """Params and state whose slots are not those of the beginning."""
    state, update = tx.init(params), by(tx.update)
    for _ in range(2):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def reset_leaf(old, new):
    """A leaf of the state with the rows of a new one."""
    if np.shape(old)[:1] != (NUM_ROWS,):
        return old
    return np.where(RESET.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def assert_reset(tx):
    params, state = trained(tx, parameters())
    start = np.random.default_rng(2).normal(size=(len(ROWS), DIM)).astype("float32")
    table = np.array(params["table"])
    table[[40, 3, 0, 7]] = start[[0, 1, 4, 6]]
    expected = params | {"table": jnp.asarray(table)}
    reset = op_by_op(functools.partial(reset_rows, tx))
    actual = reset(
        params,
        state,
        {"table": jnp.array(ROWS), "dense": None},
        {"table": start, "dense": None},
    )
    expected = expected, jax.tree.map(reset_leaf, state, tx.init(expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for new, wanted in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert new.dtype == wanted.dtype
        np.testing.assert_array_equal(new, wanted)


@pytest.mark.parametrize(
    "name", [f"ours: {name}" for name, v in VARIANTS.items() if v.row.for_rows]
)
def test_every_optimizer(name):
    assert_reset(VARIANTS[name.removeprefix("ours: ")].make())


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("name", sampled(["adam", "group_adagrad"], "group_adagrad"))
def test_every_wrapping(wrapping, name):
    assert_reset(WRAPPED[wrapping](VARIANTS[name].make()))


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_of_others(name):
    assert_reset(OTHERS[name]())


def test_tables_of_one_size_are_told_apart():
    tx = embedding.adam(0.1)
    params, state = trained(tx, {"a": jnp.ones((5, 2)), "b": jnp.ones((5, 2))})
    rows = {"a": jnp.array([1]), "b": jnp.array([2, 4])}
    after, slots = reset_rows(tx, params, state, rows, {"a": 7.0, "b": 8.0})
    for name, reset, start in (("a", [1], 7), ("b", [2, 4], 8)):
        is_reset = np.isin(np.arange(5), reset)
        np.testing.assert_array_equal(after[name][:, 0] == start, is_reset)
        np.testing.assert_array_equal(slots.m[name][:, 0] == 0, is_reset)
        np.testing.assert_array_equal(slots.beta1_power[name] > 0.85, is_reset)


def test_one_prefix_for_the_segments_of_a_table():
    tx = lazy_rows(embedding.adagrad(0.1))
    params = {"user": [jnp.ones((5, 1)), jnp.ones((5, 3))], "bias": jnp.ones(5)}
    params, state = trained(tx, params)
    rows = {"user": jnp.array([4, -1]), "bias": None}
    after, slots = reset_rows(tx, params, state, rows, 0.5)
    for k in range(2):
        assert (after["user"][k][4] == 0.5).all()
        assert (slots.norm["user"][k][4] == np.float32(0.1)).all()
    np.testing.assert_array_equal(after["bias"], params["bias"])
    np.testing.assert_array_equal(slots.norm["bias"], state.norm["bias"])


def test_what_an_id_map_calls_fresh():
    ids = IdMap(capacity=4)
    tx = embedding.adagrad(0.1)
    table, state = trained(tx, jnp.ones((4, 2)))
    _, fresh = ids.assign(np.array([2**60, 7, 7]))
    after, _ = reset_rows(tx, table, state, fresh, 0.0)
    assert (after[:, 0] == 0).tolist() == [False, True, True, False]


def test_nothing_as_large_as_the_table_is_copied():
    tx = lazy_rows(optax.chain(embedding.adam(0.1), optax.trace(0.9)))
    num_rows = 100_000
    table = jnp.zeros((num_rows, 16))
    reset = jax.jit(functools.partial(reset_rows, tx), donate_argnums=(0, 1))
    rows, start = jnp.arange(64), jnp.zeros((64, 16))
    check_in_place(reset, table, tx.init(table), rows, start)


@pytest.mark.parametrize(
    "axis_type", sampled([AxisType.Auto, AxisType.Explicit], AxisType.Explicit)
)
def test_a_sharded_table_keeps_its_sharding(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    place = NamedSharding(mesh, PartitionSpec("x"))
    tx = lazy_rows(embedding.adam(0.1))
    with jax.set_mesh(mesh):
        table = jax.device_put(jnp.ones((16, 2)), place)
        table, state = trained(tx, table, by=jax.jit)
        new, slots = jax.jit(functools.partial(reset_rows, tx))(
            table, state, jnp.array([3, -1, 15]), 0.0
        )
    for array in new, slots.m, slots.beta1_power:
        assert array.sharding.is_equivalent_to(place, array.ndim)
    assert np.flatnonzero(np.asarray(new)[:, 0] == 0).tolist() == [3, 15]
    assert np.flatnonzero(np.asarray(slots.m)[:, 0] == 0).tolist() == [3, 15]


@pytest.mark.parametrize(
    ("rows", "init", "error", "match"),
    [
        ({"table": [0.5], "dense": None}, 0.0, TypeError, r"\['table'\].* integers"),
        ({"table": [[1]], "dense": None}, 0.0, ValueError, r"\['table'\].*\(k,\)"),
        ({"table": [1]}, 0.0, ValueError, "rows must be .* prefix"),
        ({"table": [1], "dense": None}, {"b": 1.0}, ValueError, "init must be"),
        ({"table": [1], "dense": None}, None, ValueError, r"\['table'\].*None"),
        (
            {"table": [1, 2], "dense": None},
            {"table": np.zeros((3, DIM)), "dense": None},
            ValueError,
            r"\['table'\] must broadcast to \(2, 3\).*\(3, 3\)",
        ),
    ],
)
def test_bad_input(rows, init, error, match):
    tx = adamom(0.1)
    params = parameters()
    rows = {k: None if x is None else jnp.array(x) for k, x in rows.items()}
    with pytest.raises(error, match=match):
        reset_rows(tx, params, tx.init(params), rows, init)


@pytest.mark.parametrize(
    "rows", [np.array([2**32 + 3, 1, -(2**63)]), jnp.array([1, 255], jnp.uint8)]
)
def test_integers_of_other_widths_name_no_other_rows(rows):
    table = jnp.ones((300, 2))
    after, _ = reset_rows(adamom(), table, adamom().init(table), rows, 0.0)
    expected = {3: [1], 2: [1, 255]}[len(rows)]
    assert np.flatnonzero(after[:, 0] == 0).tolist() == expected


def test_params_may_hold_none():
    params = {"a": jnp.ones((3, 2)), "b": None}
    state = adamom().init(params)
    rows = {"a": jnp.array([1]), "b": None}
    after, _ = reset_rows(adamom(), params, state, rows, 0.0)
    assert after["b"] is None
    assert after["a"][:, 0].tolist() == [1, 0, 1]


def test_a_state_of_something_else():
    params, rows = parameters(), {"table": jnp.array([1]), "dense": None}
    with pytest.raises(ValueError, match="must be that of the optimizer"):
        reset_rows(adamom(0.1), params, embedding.adam().init(params), rows, 0.0)
    other = adamom(0.1).init(params | {"table": jnp.ones((3, DIM))})
    with pytest.raises(ValueError, match=r"state.m\['table'\] has the shape \(3, 3\)"):
        reset_rows(adamom(0.1), params, other, rows, 0.0)


def test_labels_that_count_rows():
    def labels(params):
        return jax.tree.map(lambda x: str(len(x) == NUM_ROWS), params)

    tx = optax.partition({"True": embedding.adam(), "False": optax.sgd(0.1)}, labels)
    assert_reset(tx)  # optax.tree.map_params says whose slots they are
    tx = optax.GradientTransformation(
        lambda params: [jnp.zeros(len(params))] * (len(params) == NUM_ROWS),
        optax.identity().update,
    )
    table = jnp.ones((NUM_ROWS, DIM))
    with pytest.raises(ValueError, match=r"state\[0\].* depend on the number of rows"):
        reset_rows(tx, table, tx.init(table), jnp.array([1]), 0.0)


def test_slots_that_depend_on_other_rows():
    def init(params):
        return jax.tree.map(lambda x: jnp.broadcast_to(x.sum(0), x.shape), params)

    tx = optax.GradientTransformation(init, optax.identity().update)
    table = jnp.ones((NUM_ROWS, DIM))
    with pytest.raises(
        ValueError,
        match=r"^reset_rows needs .* reduce_sum.*\. Begin with a new state, or",
    ):
        reset_rows(tx, table, init(table), jnp.array([1]), 0.0)


def test_a_scalar_has_no_rows():
    params = {"scale": jnp.ones(())}
    with pytest.raises(ValueError, match=r"params\['scale'\].* no rows"):
        reset_rows(
            adamom(), params, adamom().init(params), {"scale": jnp.array([0])}, 0.0
        )


def test_a_row_that_is_there_twice_gets_the_last_of_its_weights():
    tx = optax.contrib.schedule_free_sgd(0.1)  # whose slot z begins with the weights
    table = jnp.zeros((4, 2))
    start = jnp.array([[1.0], [2.0], [3.0]])
    after, state = reset_rows(tx, table, tx.init(table), jnp.array([2, 2, 0]), start)
    for array in after, state.z:
        assert array[:, 0].tolist() == [3, 0, 2, 0]


def test_rows_of_a_stack_of_tables():
    tx = optax.chain(embedding.adagrad(0.1), optax.trace(0.9))
    stack = jnp.ones((2, 5, 3))
    stack, state = trained(tx, stack)
    pairs = jnp.array([[1, 4], [0, 2], [0, 5], [-1, 0], [2, 0]])
    after, slots = reset_rows(tx, stack, state, pairs, 7.0)
    reset = np.zeros((2, 5), bool)
    reset[1, 4] = reset[0, 2] = True
    np.testing.assert_array_equal((after == 7).all(-1), reset)
    initial = tx.init(jnp.ones((2, 5, 3)))
    for leaf, old, start in zip(
        *map(jax.tree.leaves, (slots, state, initial)), strict=True
    ):
        if leaf.shape[:2] == (2, 5):
            where = reset.reshape(2, 5, *[1] * (leaf.ndim - 2))
            np.testing.assert_array_equal(leaf, np.where(where, start, old))
    whole, _ = reset_rows(tx, stack, state, jnp.array([[1], [2]]), 7.0)
    assert (whole == 7).all((1, 2)).tolist() == [False, True]
    tx = embedding.rowwise_adagrad(0.1)  # of a stack: a number for each table
    with pytest.raises(ValueError, match=r"state.sum_square of shape \(2,\)"):
        reset_rows(tx, stack, tx.init(stack), pairs, 7.0)
    with pytest.raises(ValueError, match=r"stack of tables.*\(k, 2\) for pairs"):
        reset_rows(tx, stack, state, jnp.array([1]), 0.0)


def test_slots_that_begin_with_row_numbers_or_noise():
    def numbered(params):
        return jnp.arange(len(params))[:, None] + params

    tx = optax.GradientTransformation(numbered, optax.identity().update)
    table = jnp.zeros((6, 2))
    _, slots = reset_rows(tx, table, jnp.zeros((6, 2)), jnp.array([4, 1]), 0.5)
    assert slots[:, 0].tolist() == [0, 1.5, 0, 0, 4.5, 0]

    def noisy(params):
        return jax.random.normal(jax.random.key(0), params.shape)

    tx = optax.GradientTransformation(noisy, optax.identity().update)
    with pytest.raises(ValueError, match=r"random_bits.* draws random numbers"):
        reset_rows(tx, table, noisy(table), jnp.array([4]), 0.5)
