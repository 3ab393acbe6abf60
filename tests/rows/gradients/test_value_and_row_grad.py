"""value_and_row_grad: which leaves are tables, what is said of them, and errors."""

import inspect
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from law import check, normal, rows_of

from monolith_optax import (
    RowSlices,
    ValueAndRowGrad,
    adamom,
    lazy_rows,
    value_and_row_grad,
)

TABLES = {"user": True, "items": {"item": True}, "mlp": False}
USERS, PAIRS = jnp.array([0, 6, 0]), jnp.array([[1, 2], [1, 1], [10, 0]])
FILE = pathlib.Path(__file__).name


@pytest.fixture
def params():
    with jax.enable_x64(True):
        yield {
            "user": normal(7, 4),
            "items": {"item": normal(11, 4, seed=1)},
            "mlp": normal(4, seed=2),
        }


def loss(params, users, pairs, scale=1.0):
    """Several lookups of one table, two tables, and a dense parameter."""
    user = params["user"][users]
    left = params["items"]["item"][pairs[:, 0]]
    both = params["items"]["item"][pairs]
    score = jnp.tanh(user * left + both.sum(1)) @ params["mlp"]
    return scale * jnp.mean(score**2)


@pytest.mark.parametrize("by", [lambda f: f, jax.jit])
@pytest.mark.parametrize("named", sampled([False, True], False))
def test_gradients_are_jaxs(params, by, named):
    gradients = check(
        loss,
        params,
        USERS,
        PAIRS,
        2.0,
        rows={"user", "items.item"},
        tables=TABLES if named else None,
        by=by,
    )
    assert gradients["user"].ids.tolist() == [0, 6, 0]
    assert gradients["items"]["item"].rows.shape == (9, 4)


def test_it_looks_like_the_function_whose_gradients_it_takes():
    grad = value_and_row_grad(loss)
    assert isinstance(grad, ValueAndRowGrad)
    assert (grad.__name__, grad.__doc__) == (loss.__name__, loss.__doc__)
    assert inspect.signature(grad) == inspect.signature(loss)


def test_a_function_with_fields_is_not_copied():
    class Loss:
        _fun = None

        def __init__(self):
            self._tables, self._argnums = "mine", "mine"

        def __call__(self, table, ids):
            return table[ids].sum()

    _, gradient = value_and_row_grad(Loss())(jnp.ones((4, 1)), jnp.array([3]))
    assert gradient.ids.tolist() == [3]


def test_keyword_arguments_are_passed_on(params):
    value, _ = value_and_row_grad(loss)(params, USERS, pairs=PAIRS, scale=3.0)
    np.testing.assert_allclose(value, loss(params, USERS, PAIRS, 3.0), rtol=1e-12)


@pytest.mark.parametrize("num_rows", [1, 2, 4, 1000])
def test_the_choice_does_not_depend_on_how_much_there_is(num_rows):
    def square(params, ids):
        found = params["t"][ids] * params["t"][ids[0]][None]
        return jnp.sum((found @ params["w"]) ** 2)

    params = {"t": jnp.ones((num_rows, 4)), "w": jnp.ones(4)}
    for num_ids in 1, 4, num_rows:
        explanation = value_and_row_grad(square).explain(
            params, jnp.zeros(num_ids, int)
        )
        assert explanation.startswith("t: rows, looked up by gather at")


WITHOUT_IDS = {
    "[]": (lambda t, i: t[i], (10, 3)),
    "take": (lambda t, i: jnp.take(t, i, axis=0), (10, 3)),
    "matrices": (lambda t, i: t[i], (10, 3, 2)),
    "vmap": (lambda t, i: jax.vmap(lambda j: t[j])(i), (10, 3)),
    "jit": (jax.jit(lambda t, i: jax.nn.relu(t[i])), (10, 3)),
    "stack": (lambda t, i: jax.vmap(lambda t: t[i])(t), (2, 10, 3)),
}


@pytest.mark.parametrize("name", sampled(WITHOUT_IDS, "[]", "take"))
def test_a_batch_without_ids_gives_rows(name):
    lookup, shape = WITHOUT_IDS[name]

    def loss(params, ids):
        return jnp.sum(jnp.sin(lookup(params["t"], ids))) + params["w"]

    params = {"t": normal(*shape), "w": normal()}
    some = check(loss, params, jnp.array([1, 2]), rows={"t"}, rtol=1e-6)
    none = check(loss, params, jnp.zeros(0, int), rows={"t"}, by=lambda f: f)
    assert none["t"].row_shape == some["t"].row_shape
    assert none["t"].ids.size == 0


def test_no_ids_make_no_tables_of_other_leaves_that_are_not_used():
    def loss(params, ids):
        return jnp.sum(jnp.sin(params["t"][ids]))

    params = {"t": jnp.ones((10, 3)), "bias": jnp.ones(3), "kernel": jnp.ones((3, 2))}
    check(loss, params, jnp.zeros(0, int), rows={"t"}, by=lambda f: f)


def tied(params, users, pairs):
    found = params["user"][users]
    logits = found @ params["user"].T
    return loss(params, users, pairs) + jnp.sum(jax.nn.softmax(logits))


def test_a_tied_table_is_dense_and_an_error_if_asked_for(params):
    line = inspect.getsourcelines(tied)[1] + 2
    check(tied, params, USERS, PAIRS, rows={"items.item"})
    why = f"user: dense, as it is used by dot_general at {FILE}:{line}"
    assert why in value_and_row_grad(tied).explain(params, USERS, PAIRS)
    message = rf"Table user is used by dot_general at {FILE}:{line}, so "
    with pytest.raises(ValueError, match=message):
        value_and_row_grad(tied, TABLES)(params, USERS, PAIRS)
    tables = {**TABLES, "user": False}
    check(tied, params, USERS, PAIRS, rows={"items.item"}, tables=tables)


def summed(params):
    return jnp.sum(params["user"] ** 2)


def assigned(params):
    return jnp.sum(params["user"].at[:2].set(0.0)[USERS])


def scanned(params):
    return jax.lax.scan(lambda c, row: (c + row.sum(), None), 0.0, params["user"])[0]


def all_rows(params):
    return jnp.sum(params["user"][:, USERS % 4])


def returned(params):
    table = jax.lax.cond(USERS[0] > 0, lambda: params["user"], lambda: -params["user"])
    return jnp.sum(table[USERS])


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (summed, "is used by reduce_sum at"),
        (assigned, "is used by scatter at"),
        (scanned, "changes in scan at"),
        (all_rows, "has a part of each of its rows taken by gather at"),
        (returned, "is a result of cond at"),
    ],
)
def test_other_uses_are_dense_and_say_why(params, loss, reason):
    check(loss, params, rows=set())
    explanation = value_and_row_grad(loss).explain(params)
    assert f"user: dense, as it {reason} {FILE}:" in explanation
    with pytest.raises(ValueError, match=f"Table user {reason} {FILE}:"):
        value_and_row_grad(loss, TABLES)(params)


def test_explain_names_every_leaf(params):
    lines = value_and_row_grad(loss).explain(params, USERS, PAIRS).split("\n")
    first = inspect.getsourcelines(loss)[1] + 2
    user, left, both, score = (f"{FILE}:{first + i}" for i in range(4))
    assert lines == [
        f"items.item: rows, looked up by gather at {left}, gather at {both}",
        f"mlp: dense, as it is used by dot_general at {score}",
        f"user: rows, looked up by gather at {user}",
    ]
    lines = value_and_row_grad(loss, TABLES).explain(params, USERS, PAIRS).split("\n")
    assert lines[1] == "mlp: dense, as tables says"


def test_a_leaf_that_is_not_used(params):
    def of_users(params, ids):
        return jnp.sum(params["user"][ids])

    check(of_users, params, USERS, rows={"user"})
    gradients = check(
        of_users, params, USERS, rows={"user", "items.item"}, tables=TABLES
    )
    assert gradients["items"]["item"].ids.shape == (0,)
    assert "is never looked up" in value_and_row_grad(of_users).explain(params, USERS)


def test_auxiliary_output_is_what_it_is_in_jax(params):
    class Opaque:
        pass

    opaque = Opaque()

    def with_aux(params, *batch):
        found = params["user"][batch[0]]
        return loss(params, *batch), {
            "rows": found,
            "table": params["user"],
            "scaled": params["user"] * 2,
            "name": "a string",
            "count": 3,
            "numpy": np.ones(2),
            "none": None,
            "opaque": opaque,
        }

    grad = value_and_row_grad(with_aux, has_aux=True)
    (value, aux), gradients = grad(params, USERS, PAIRS)
    dense = jax.value_and_grad(with_aux, has_aux=True)
    (expected, expected_aux), _ = dense(params, USERS, PAIRS)
    assert aux.pop("opaque") is expected_aux.pop("opaque") is opaque
    assert aux.pop("name") == expected_aux.pop("name")
    assert aux["count"] == 3
    assert isinstance(aux["count"], int)
    chex.assert_trees_all_close((value, aux), (expected, expected_aux), rtol=1e-12)
    assert rows_of(gradients) == {"user", "items.item"}


def test_the_loss_runs_once_for_each_trace(params):
    calls = []

    def counted(params, *batch):
        calls.append(batch)
        return loss(params, *batch)

    grad = jax.jit(value_and_row_grad(counted))
    for _ in range(3):
        grad(params, USERS, PAIRS)
    assert len(calls) == 1


def test_numpy_ids_are_data_and_closed_over_arrays_too(params):
    check(
        loss,
        params,
        np.asarray(USERS),
        np.asarray(PAIRS),
        rows={"user", "items.item"},
        by=lambda f: f,
    )

    def closed(params):
        return loss(params, USERS, PAIRS)

    check(closed, params, rows={"user", "items.item"})


def test_negative_ids_are_padding_where_the_lookup_says_so(params):
    def total(params, ids):
        rows = params["user"].at[ids]
        rows = rows.get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return jnp.sum(rows @ params["mlp"])

    gradients = check(total, params, jnp.array([3, -1, 7, 3]), rows={"user"})
    assert gradients["user"].ids.tolist() == [3, -1, -1, 3]


def test_nan_of_the_fill_mode_is_no_gradient(params):
    def total(params, ids):
        rows = params["user"].at[ids].get(mode="fill")
        return jnp.nansum(rows**2)

    gradients = check(total, params, jnp.array([3, 9]), rows={"user"})
    assert gradients["user"].ids.tolist() == [3, -1]


def test_a_model_is_trained(params):
    tx = lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), adamom(0.05)))

    @jax.jit
    def step(params, state):
        value, gradients = value_and_row_grad(loss)(params, USERS, PAIRS)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    before, state, values = params, tx.init(params), []
    for _ in range(50):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]
    chex.assert_trees_all_equal(params["user"][1:6], before["user"][1:6])


@pytest.mark.parametrize(
    ("tables", "message"),
    [({"user": True}, "prefix of the tree"), (True, "mlp is used by dot_general")],
)
def test_bad_tables(params, tables, message):
    with pytest.raises(ValueError, match=message):
        value_and_row_grad(loss, tables)(params, USERS, PAIRS)


def test_a_scalar_is_no_table():
    with pytest.raises(ValueError, match="scalar"):
        value_and_row_grad(lambda p: p["a"], True)({"a": jnp.zeros(())})


def test_slices_of_a_bfloat16_table_are_bfloat16():
    table = jnp.ones((5, 2), jnp.bfloat16)
    _, gradients = value_and_row_grad(lambda t, i: jnp.sum(t[i].astype(jnp.float32)))(
        table, USERS % 5
    )
    assert isinstance(gradients, RowSlices)
    assert gradients.rows.dtype == jnp.bfloat16


@pytest.mark.parametrize("big", [2**32 + 3, -(2**31) - 1, np.uint64(2**63)])
def test_ids_that_jax_would_cut_are_an_error(big):
    params = {"table": jnp.zeros((10, 2))}
    grad = value_and_row_grad(lambda params, ids: params["table"][ids].sum())
    for call in grad, grad.explain:
        with pytest.raises(ValueError, match=f"integer {big} of 64 bits, which JAX"):
            call(params, np.array([1, big]).astype(np.asarray(big).dtype))
    _, gradients = grad(params, np.array([1, 2**31 - 1, -1]))
    assert gradients["table"].ids.tolist() == [1, -1, 9]
    with jax.enable_x64(True):
        grad(params, np.array([1, 2**32 + 3]))
