"""Every kind of lookup: value and gradients are JAX's, and nothing is table-sized."""

import jax
import jax.numpy as jnp
import pytest
from choosing import sampled
from jax import lax
from law import check, normal

from monolith_optax import value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64")

N, D = 2003, 4
# Some twice, from the end, at both ends, and on both sides beyond them.
IDS = jnp.array([[1, -1, N + 19], [N, 1 - 2 * N, 0], [N - 1, 7, 1]], jnp.int32)


def along(table, ids):
    return jnp.take_along_axis(table, jnp.broadcast_to(ids[:, :1], (3, D)), axis=0)


def windows(table, ids):
    def window(i):
        return lax.dynamic_slice(table, (i, jnp.ones_like(i)), (3, 2))

    return jax.vmap(window)(ids[:, 0])


def normalised(table):
    return table / jnp.linalg.norm(table, axis=1, keepdims=True)


@jax.custom_jvp
def clipped(table):
    return jnp.clip(table, -1.0, 1.0)


@clipped.defjvp
def _clipped_jvp(primals, tangents):
    return clipped(*primals), 3.0 * tangents[0]


@jax.custom_vjp
def rounded(table, scale):
    return jnp.round(table * scale) / scale


rounded.defvjp(
    lambda table, scale: (rounded(table, scale), scale),
    lambda scale, cotangent: (cotangent * scale, jnp.zeros_like(scale)),
)

LOOKUPS = {
    "array": lambda t, i: t[i],
    "one id": lambda t, i: t[i[0, 0]],
    "small ids": lambda t, i: t[i.astype(jnp.int16)],
    "wide ids": lambda t, i: t[i.astype(jnp.int64)],
    "unsigned ids": lambda t, i: t[jnp.abs(i).astype(jnp.uint16)],
    "take": lambda t, i: jnp.take(t, i, axis=0),
    "take, clip": lambda t, i: jnp.take(t, i, axis=0, mode="clip"),
    "take, wrap": lambda t, i: jnp.take(t, i, axis=0, mode="wrap"),
    "take, fill 0": lambda t, i: jnp.take(t, i, axis=0, mode="fill", fill_value=0),
    "get": lambda t, i: t.at[i].get(),
    "get, fill": lambda t, i: t.at[i].get(mode="fill", fill_value=7.0),
    "get, clip": lambda t, i: t.at[i].get(mode="clip"),
    "get, drop": lambda t, i: t.at[i].get(mode="drop", fill_value=0.0),
    "get, promise": lambda t, i: t.at[i].get(mode="promise_in_bounds"),
    "no wrapping": lambda t, i: t.at[i].get(
        mode="fill", fill_value=0, wrap_negative_indices=False
    ),
    "take_along_axis": along,
    "take_along_axis, rows": lambda t, i: jnp.take_along_axis(t, i[:, :1], axis=0),
    "columns": lambda t, i: t[i, 1:3],
    "one column": lambda t, i: t[i, 0],
    "columns by ids": lambda t, i: t[i, jnp.abs(i) % D],
    "columns backwards": lambda t, i: t[i, ::-2],
    "dynamic_slice": lambda t, i: lax.dynamic_slice(t, (i[0, 0], i[0, 0]), (3, 2)),
    "dynamic_index": lambda t, i: lax.dynamic_index_in_dim(t, i[1, 0]),
    "vmap": lambda t, i: jax.vmap(lambda j: t[j])(i),
    "vmap twice": lambda t, i: jax.vmap(jax.vmap(lambda j: t[j]))(i),
    "vmap, out axis": lambda t, i: jax.vmap(lambda j: t[j], out_axes=1)(i),
    "vmap, take": lambda t, i: jax.vmap(lambda j: jnp.take(t, j, axis=0))(i),
    "vmap, windows": windows,
    "vmap, columns": lambda t, i: jax.vmap(jax.vmap(lambda j: t[j, :2]))(i),
    "twice": lambda t, i: t[i] * t[i[:, :1]],
    "one-hot rank": lambda t, i: t[i][..., None],
    "cast": lambda t, i: t.astype(jnp.bfloat16)[i].astype(jnp.float64),
    "stop_gradient": lambda t, i: lax.stop_gradient(t)[i] + t[i],
    "reshaped": lambda t, i: t.reshape(N, 2, 2)[i],
    "scaled": lambda t, i: (t * 3.0 + 1.0)[i],
    "scaled columns": lambda t, i: (t * jnp.arange(1.0, 1.0 + D)[None])[i],
    "normalised": lambda t, i: normalised(t)[i],
    "softmax": lambda t, i: jax.nn.softmax(t, axis=-1)[i],
    "projected": lambda t, i: (t @ jnp.cos(jnp.arange(12.0)).reshape(D, 3))[i],
    "activated": lambda t, i: jax.nn.relu(t)[i],
    "masked": lambda t, i: jnp.where(jnp.arange(N)[:, None] == 1, 0.0, t)[i],
    "column of image": lambda t, i: (t**2)[i, 1],
    "column first": lambda t, i: t[:, 1][i],
    "padding row": lambda t, i: jnp.concatenate([jnp.zeros((1, D)), t])[i],
    "rows on both sides": lambda t, i: jnp.concatenate(
        [jnp.ones((2, D)), 3.0 * t, jnp.zeros((3, D))]
    )[i],
    "padding zeroed": lambda t, i: t.at[0].set(0.0)[i],
    "last row scaled": lambda t, i: (2.0 * t).at[-1].multiply(5.0)[i],
    "row beyond set": lambda t, i: t.at[N].set(0.0, mode="drop")[i],
    "custom_jvp": lambda t, i: clipped(t)[i],
    "custom_vjp": lambda t, i: rounded(t, jnp.array(2.0))[i],
    "constraint": lambda t, i: lax.with_sharding_constraint(
        t, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )[i],
}


def loss_of(lookup):
    def loss(params, ids):
        found = lookup(params["t"], ids)
        weights = jnp.arange(1.0, 1.0 + found.size, dtype=found.dtype)
        return jnp.sum(jnp.sin(found) * weights.reshape(found.shape)).astype(float)

    return loss


RARE = (
    *("rows on both sides", "last row scaled", "row beyond set"),
    *("small ids", "wide ids", "take, clip", "take, fill 0", "get, drop", "vmap twice"),
    *("vmap, take", "columns backwards", "one-hot rank", "softmax", "activated"),
    *("scaled columns", "column first", "column of image"),
)


@pytest.mark.parametrize(
    "name",
    sampled(LOOKUPS, *(name for name in LOOKUPS if name not in RARE)),
)
def test_lookups(name):
    def loss(params, ids):
        found = LOOKUPS[name](params["t"], ids)
        weights = jnp.arange(1.0, 1.0 + found.size).reshape(found.shape)
        # NaN of rows outside of the table must not hide the others.
        return jnp.sum(jnp.nan_to_num(jnp.sin(found) * weights))

    # Narrow gradients of one row add up in another order.
    rtol = 1e-2 if name == "cast" else 1e-10
    check(loss, {"t": normal(N, D)}, IDS, rows={"t"}, rtol=rtol, small=True)


@pytest.mark.parametrize(
    "image",
    [
        lambda t: jnp.concatenate([t, t]),
        lambda t: jnp.concatenate([t, t[:1]]) * jnp.concatenate([t[:1], t]),
        lambda t: (
            jnp.concatenate([t, jnp.ones((1, D))])
            * jnp.concatenate([jnp.ones((1, D)), t])
        ),
        lambda t: t.at[jnp.array([0, 1])].set(0.0),
        lambda t: t.at[0, 1].set(0.0),
    ],
)
def test_images_that_are_several_rows_of_a_table_are_dense(image):
    def loss(params, ids):
        return jnp.sum(jnp.sin(image(params["t"])[ids]))

    check(loss, {"t": normal(N, D)}, IDS % N, rows=set())


def test_a_row_that_another_one_replaces():
    def loss(params, ids):
        return jnp.sum(jnp.sin(params["t"].at[0].set(params["t"][1])[ids]))

    check(loss, {"t": normal(N, D)}, IDS % N, rows={"t"}, small=True)


def test_two_tables_as_one_and_a_padding_row_that_is_learnt():
    def loss(params, ids):
        both = jnp.concatenate([params["pad"], params["a"], params["b"]])
        return jnp.sum(jnp.sin(both.at[7].set(params["other"])[ids]))

    params = {"a": normal(N, D), "b": normal(N, D, seed=2)}
    params |= {"pad": normal(1, D, seed=3), "other": normal(D, seed=4)}
    ids = jnp.array([0, 1, 7, N, N + 1, 2 * N, 7, -1, 2 * N + 9])
    check(loss, params, ids, rows={"a", "b", "pad"})


CONSTANT = {
    "int": lambda t: t[3],
    "negative": lambda t: t[-1],
    "slice": lambda t: t[2:5],
    "slice with step": lambda t: t[8:2:-2],
    "slice of columns": lambda t: t[1:9:3, 1:3],
    "list": lambda t: t[jnp.array([1, 2, 1])],
    "arange": lambda t: t[jnp.arange(5)],
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_ids_are_rows_only_if_asked_for(name):
    def loss(params):
        return jnp.sum(jnp.sin(CONSTANT[name](params["t"])))

    params = {"t": normal(N, D)}
    check(loss, params, rows=set())
    check(loss, params, rows={"t"}, tables=True)
    assert "constants" in value_and_row_grad(loss).explain(params)


STACKED = {
    "one each": (lambda t, i: jax.vmap(lambda t, i: t[i])(t, i), (3, N, D)),
    "shared ids": (lambda t, i: jax.vmap(lambda t: t[i])(t), (3, N, D)),
    "take": (
        lambda t, i: jax.vmap(lambda t, i: jnp.take(t, i, axis=0))(t, i),
        (3, N, D),
    ),
    "cast": (
        lambda t, i: jax.vmap(lambda t, i: t.astype(jnp.float32)[i])(t, i),
        (3, N, D),
    ),
    "columns": (lambda t, i: jax.vmap(lambda t, i: t[i, :2])(t, i), (3, N, D)),
    "scalars": (lambda t, i: jax.vmap(lambda t, i: t[i])(t, i), (3, N)),
    "per example": (
        lambda t, i: jax.vmap(jax.vmap(lambda t, i: t[i]), (None, 1), 1)(t, i),
        (3, N, D),
    ),
    "nested": (
        lambda t, i: jax.vmap(jax.vmap(lambda t, i: t[i]))(t, jnp.stack([i, i], 1)),
        (3, 2, N, D),
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_tables(name):
    lookup, shape = STACKED[name]
    ids = jnp.array([[1, -1], [N, 3], [0, 0]])
    rtol = 1e-5 if name == "cast" else 1e-10
    params, loss = {"t": normal(*shape)}, loss_of(lookup)
    tables = True if name == "scalars" else None
    check(loss, params, ids, rows={"t"}, tables=tables, rtol=rtol, small=True)


def test_a_stack_of_numbers_is_rows_only_if_asked_for():
    lookup, shape = STACKED["scalars"]
    loss, params = loss_of(lookup), {"t": normal(*shape)}
    ids = jnp.array([[1, -1], [10, 3], [0, 0]])
    check(loss, params, ids, rows=set())
    assert "as a stack of numbers by gather" in value_and_row_grad(loss).explain(
        params, ids
    )


def test_an_image_of_several_tables():
    def loss(params, ids):
        combined = (params["a"] * params["b"][:, None])[ids]
        return jnp.sum(jnp.sin(combined))

    params = {"a": normal(N, D), "b": normal(N)}
    check(loss, params, IDS, rows={"a", "b"}, small=True)
