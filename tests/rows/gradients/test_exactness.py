"""Where values and gradients could differ from JAX's in silence, and once did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import sampled
from jax.experimental import checkify
from law import check, normal

from monolith_optax import value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64")

N, D = 7, 3
IDS = jnp.array([1, 3, 3, 3])


@pytest.fixture
def params():
    return {"t": normal(N, D), "w": normal(D, seed=1)}


def head(found):
    return jnp.sum(jnp.sin(found) * 3.0)


WITH_OTHERS = {
    "product": lambda t, w: t * w[None],
    "sum": lambda t, w: t + w[None],
    "row": lambda t, w: t.at[6].set(w),
    "rows": lambda t, w: jnp.concatenate([t, w[None]]),
    "matrix": lambda t, w: t @ jnp.outer(w, w),
}


@pytest.mark.parametrize("mode", [None, "clip", "fill", "promise_in_bounds"])
@pytest.mark.parametrize("name", WITH_OTHERS)
def test_ids_beyond_the_table_give_other_leaves_jaxs_gradient(params, name, mode):
    def loss(params, ids):
        image = WITH_OTHERS[name](params["t"], params["w"])
        found = image[ids] if mode is None else image.at[ids].get(mode=mode)
        return head(jnp.nan_to_num(found))

    check(loss, params, jnp.array([1, 9, 12, -20]), rows={"t"})


def test_a_function_applied_to_a_row_is_what_it_is_in_jax(params):
    def loss(params, ids):
        return head(params["t"].at[3].apply(jnp.sin)[ids])

    for grad in jax.value_and_grad(loss), value_and_row_grad(loss):
        with pytest.raises(NotImplementedError):
            grad(params, IDS)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_rows_of_minus_zero_stay_what_they_are(dtype):
    def loss(params, ids):
        rows = params["t"][ids]
        return jnp.sum(jnp.where(jnp.signbit(rows), 1.0, 2.0) * (rows + 1)).astype(
            float
        )

    params = {"t": jnp.array([[-0.0, 1.0], [2.0, 0.0]], dtype)}
    check(loss, params, jnp.array([0, 1, 0]), rows={"t"})


@pytest.mark.parametrize(
    "result", [lambda x: {"loss": x}, lambda x: (x, 1.0), lambda x: [x]]
)
def test_results_that_are_not_scalars_are_errors_as_in_jax(params, result):
    def loss(params, ids):
        return result(head(params["t"][ids]))

    for grad in jax.value_and_grad(loss), value_and_row_grad(loss):
        with pytest.raises(TypeError, match="scalar"):
            grad(params, IDS)


def test_has_aux_asks_for_a_pair(params):
    grad = value_and_row_grad(lambda p, i: head(p["t"][i]), has_aux=True)
    with pytest.raises(TypeError, match="must return a pair of a scalar"):
        grad(params, IDS)


def test_numpy_arguments_reach_the_loss_as_they_are(params):
    def loss(params, ids, names):
        assert type(ids) is np.ndarray
        assert ids.dtype == np.uint64
        assert names["user"] == "a"
        if ids[0] == 2**40:
            ids = np.unique(ids) % N
        return head(params["t"][ids.astype(np.int32)])

    ids = np.array([2**40, 3, 3], np.uint64)
    check(loss, params, ids, {"user": "a"}, rows={"t"}, by=lambda f: f)


def test_very_many_operations_in_a_row(params):
    def loss(params, ids):
        table = params["t"]
        for _ in range(400):
            table = table * 1.001
        return head(table[ids])

    check(loss, params, IDS, rows={"t"}, by=lambda f: f)


def test_an_image_as_auxiliary_output_is_made_once(params):
    def loss(params, ids):
        table = params["t"]
        for _ in range(40):
            table = table + table * 0.5
        return head(table[ids]), table

    check(loss, params, IDS, rows={"t"}, has_aux=True)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, lambda f: f])
def test_no_tracers_leak(params, wrap):
    with jax.check_tracer_leaks():
        check(wrap(lambda p, i: head((p["t"] * 2)[i])), params, IDS, rows={"t"})


def test_a_matrix_of_the_size_of_another_leaf_is_no_table(params):
    def loss(params, ids):
        return head((params["t"] @ jnp.eye(D))[ids]) + params["w"].sum()

    check(loss, params, IDS, rows={"t"})


def test_low_rank_tables_need_no_name():
    def loss(params, ids):
        return head((params["a"] @ params["b"])[ids])

    params = {"a": normal(N, 2), "b": normal(2, D, seed=1)}
    check(loss, params, IDS, rows={"a"})


SQUARE = {
    "transposed": lambda t: t.T,
    "product": lambda t: t @ t,
    "with itself": lambda t: t * t.T,
    "columns": lambda t: t * t[0][:, None],
    "rows": lambda t: t * t[0][None],
    "sums of columns": lambda t: t - t.sum(0, keepdims=True),
    "reversed columns": lambda t: t[:, ::-1],
    "broadcast": lambda t: jnp.broadcast_to(t.sum(1), (D, D)),
}


@pytest.mark.parametrize("name", SQUARE)
def test_axes_of_square_tables_are_told_apart(name):
    def loss(params, ids):
        return head(SQUARE[name](params["t"])[ids])

    params, ids = {"t": normal(D, D)}, jnp.array([0, 2, 2])
    by_row = name in {"reversed columns", "rows", "columns"}
    check(loss, params, ids, rows={"t"} if by_row else set())


LOOKUPS = {
    "rows": lambda t, i: t[i],
    "image": lambda t, i: (t * 2)[i],
    "part": lambda t, i: t[1:][i],
    "numbers": lambda t, i: t[:, 0][i],
    "scan": lambda t, i: jax.lax.scan(lambda c, j: (c, t[j]), 0, i)[1],
    "stack": lambda t, i: jax.vmap(lambda t: t[i])(t[:6].reshape(2, 3, D)),
}


@pytest.mark.parametrize("name", sampled(LOOKUPS, "part"))
def test_checkify_finds_the_ids_that_it_finds_in_jax(params, name):
    def loss(params, ids):
        return head(LOOKUPS[name](params["t"], ids)) + params["w"].sum()

    def found(grad, ids):
        checked = checkify.checkify(grad(loss), errors=checkify.index_checks)
        with jax.numpy_dtype_promotion("standard"):  # checkify mixes dtypes
            return jax.jit(checked)(params, jnp.array(ids))[0].get() is not None

    for ids in [2, -1, 2], [1, 9, 2]:
        assert found(jax.value_and_grad, ids) == (9 in ids)
        assert found(value_and_row_grad, ids) == (9 in ids)
