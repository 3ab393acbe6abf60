"""Rows taken by constants: a lookup in a slice of a table is a lookup in the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import sampled
from jax import lax
from law import check, normal

from monolith_optax import value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64")

N, D = 2003, 4
# Of a part with 10 rows: twice, from its end, and beyond it on both sides.
IDS = jnp.array([[3, -1, 3], [10, -12, 0], [9, 2000, 3]], jnp.int32)


@pytest.fixture
def params():
    return {"t": normal(N, D), "w": normal(D, seed=1)}


PARTS = {
    "slice": lambda t: t[20:30],
    "first rows": lambda t: t[:10],
    "last rows": lambda t: t[-10:],
    "stride": lambda t: t[5:35:3],
    "backwards": lambda t: t[50:30:-2],
    "of a slice": lambda t: t[100:200][20:30],
    "slice_in_dim": lambda t: lax.slice_in_dim(t, 20, 30),
    "dynamic_slice": lambda t: lax.dynamic_slice(t, (20, 0), (10, D)),
    "dynamic_slice, clipped": lambda t: lax.dynamic_slice(t, (N, 0), (10, D)),
    "dynamic_slice_in_dim": lambda t: lax.dynamic_slice_in_dim(t, -30, 10),
    "split": lambda t: jnp.split(t, [20, 30])[1],
    "joined": lambda t: t[:20].reshape(2, 10, D)[1],
    "shards": lambda t: t[:2000].reshape(4, 500, D)[:, 3:8].reshape(20, D)[4:14],
    "transposed": lambda t: t[:20].reshape(10, 2, D).transpose(1, 0, 2)[1],
    "one axis more": lambda t: t[20:30][None][0],
    "image": lambda t: jnp.tanh(t[20:30] * 3.0),
    "of an image": lambda t: (t * 3.0)[20:30],
    "matrix": lambda t: t[20:30] @ jnp.cos(jnp.arange(8.0)).reshape(D, 2),
    "relu": lambda t: jax.nn.relu(t[20:30]),
    "in a jit": lambda t: jax.jit(lambda t: t[20:30])(t),
    "parts together": lambda t: jnp.concatenate([t[:5], jnp.ones((1, D)), t[70:74]]),
    "its own row": lambda t: t[20:30].at[2].set(t[1]),
}
MODES = {
    "": lambda t, i: t[i],
    "clip": lambda t, i: jnp.take(t, i, axis=0, mode="clip"),
    "fill": lambda t, i: jnp.take(t, i, axis=0, mode="fill", fill_value=0),
    "drop": lambda t, i: t.at[i].get(
        mode="fill", fill_value=7.0, wrap_negative_indices=False
    ),
    "vmap": lambda t, i: jax.vmap(jax.vmap(lambda j: t[j]))(i),
}


def head(found):
    weights = jnp.arange(1.0, 1.0 + found.size).reshape(found.shape)
    return jnp.sum(jnp.nan_to_num(jnp.sin(found) * weights))


SAMPLE = "backwards", "split", "shards", "image", "its own row"


@pytest.mark.parametrize("name", sampled(PARTS, *SAMPLE))
def test_lookups_in_parts(params, name):
    def loss(params, ids):
        return sum(head(mode(PARTS[name](params["t"]), ids)) for mode in MODES.values())

    if name == "parts together":  # two rows of one table in one: one of them is whole
        check(loss, params, IDS, rows={"t"})
    elif "gather" in str(jax.make_jaxpr(PARTS[name])(params["t"])):  # JAX 0.8, of steps
        check(loss, params, IDS, rows=set())
    else:
        gradients = check(loss, params, IDS, rows={"t"}, small=True)
        assert gradients["t"].ids.size <= 3 * IDS.size * len(MODES)


def part_in(params):
    return jnp.tanh(params["t"][20:30])


INSIDE = {
    "scan": lambda p, i: lax.map(lambda j: head(p["t"][20:30][j]), i).sum(),
    "scan of an outer part": lambda p, i: (
        lambda t: lax.map(lambda j: head(t[j]), i).sum()
    )(part_in(p)),
    "checkpoint": jax.checkpoint(lambda p, i: head(part_in(p)[i])),
    "checkpoint of an outer part": lambda p, i: jax.checkpoint(lambda t: head(t[i]))(
        part_in(p)
    ),
    "cond": lambda p, i: lax.cond(
        i[0, 0] > 0, lambda: head(p["t"][20:30][i]), lambda: head(p["t"][40:44][i])
    ),
    "cond of an outer part": lambda p, i: (
        lambda t: lax.cond(i[0, 0] > 9, lambda: 0.0, lambda: head(t[i]))
    )(part_in(p)),
    "a part that leaves a cond": lambda p, i: (
        head(lax.cond(i[0, 0] > 0, lambda: p["t"][20:30], lambda: p["t"][:10]))
        + head(p["t"][i])
    ),
    "a part that leaves a checkpoint": lambda p, i: (
        head(jax.checkpoint(lambda t: t[20:30])(p["t"])[i]) + head(p["t"][i])
    ),
    "jit": jax.jit(lambda p, i: head(jax.jit(part_in)(p)[i])),
    "vmap of parts": lambda p, i: head(
        jax.vmap(lambda t, j: t[j])(p["t"][:30].reshape(3, 10, D), i)
    ),
    "while": lambda p, i: (
        head(p["t"][20:30][i])
        * lax.while_loop(
            lambda c: c[0] < 3,
            lambda c: (c[0] + 1, c[1] * jnp.sign(p["t"][40:44][c[0]].sum())),
            (0, 0),
        )[1]
    ),
    "scan over a part": lambda p, i: (
        head(p["t"][i])
        + lax.scan(lambda c, row: (c + head(row), None), 0.0, p["t"][20:25])[0]
    ),
    "parameter of a rule": lambda p, i: (
        head(p["t"][i]) + jnp.sum(jax.nn.relu(p["t"][20:25]) @ p["w"])
    ),
}


@pytest.mark.parametrize("name", sampled(INSIDE, "scan", "a part that leaves a cond"))
def test_parts_inside_of_others(params, name):
    check(INSIDE[name], params, IDS, rows={"t"}, small=True)


USED = {
    "a row": lambda t: t[7] * 2.0,
    "the last row": lambda t: t[-1],
    "an entry": lambda t: t[7, 1],
    "rows": lambda t: t[20:30],
    "rows as a matrix": lambda t: t[20:30] @ t[20:30].T,
    "rows and columns": lambda t: t[20:30, 1:3],
    "rows by a list": lambda t: t[np.array([3, 1, 3])],
    "image": lambda t: jnp.tanh(t[20:30] + t[40:50]),
    "rows of an image": lambda t: jnp.tanh(t)[20:30],
    "shared": lambda t: t[20:30] * t[21:31],
}


@pytest.mark.parametrize("name", sampled(USED, "a row", "rows as a matrix", "shared"))
def test_parts_that_are_used_otherwise_are_all_of_their_rows(params, name):
    def loss(params, ids):
        return head(params["t"][ids]) + head(USED[name](params["t"]))

    gradients = check(loss, params, IDS, rows={"t"}, small=True)
    assert IDS.size < gradients["t"].ids.size <= IDS.size + 20


def test_what_is_said_of_parts(params):
    def loss(params, ids):
        part = params["t"][20:30]
        return head(params["t"][ids]) + head(part.sum(0) * params["w"])

    line = loss.__code__.co_firstlineno + 2
    explanation = value_and_row_grad(loss).explain(params, IDS)
    assert explanation.startswith(
        f"t: rows, looked up by gather at test_constants.py:{line}, "
        f"reduce_sum at test_constants.py:{line} (all 10 rows of a slice)\n"
    )


def test_a_table_of_which_most_is_used_is_dense(params):
    def loss(params, ids):
        return head(params["t"][ids]) + head(params["t"][1:])

    check(loss, params, IDS, rows=set())
    check(loss, params, IDS, rows={"t"}, tables={"t": True, "w": False})
    explanation = value_and_row_grad(loss).explain(params, IDS)
    assert (
        "t: dense, as it has more than half of its rows used by reduce_sum"
        in explanation
    )


def test_layers_that_are_only_taken_by_constants_are_dense(params):
    def loss(params, ids):
        x = params["t"][ids]
        for k in range(3):
            x = jnp.tanh(x @ params["layers"][k])
        return head(x)

    params |= {"layers": normal(3, D, D, seed=5)}
    check(loss, params, IDS, rows={"t"})


def test_a_stack_of_tables_that_is_looked_up_one_by_one():
    def loss(params, ids):
        first, second = params["stack"]
        return head(first[ids]) + head(second[ids[0]]) + head(params["stack"][1][3])

    stack = {"stack": normal(2, 1001, D)}
    gradients = check(loss, stack, IDS, rows={"stack"}, small=True)
    assert gradients["stack"].row_shape == (D,)


def test_a_device_has_the_parts_of_all_tables(params):
    mesh = jax.make_mesh((8,), ("x",))
    whole = jax.NamedSharding(mesh, jax.P())

    def loss(params, ids):
        return head(params["t"][20:30][ids]) + head(params["t"][40:42])

    params = jax.device_put(params, whole)
    check(loss, params, jax.device_put(IDS, whole), rows={"t"}, by=jax.jit)


def test_more_slices_than_python_has_stack():
    def loss(table, ids):
        for _ in range(500):
            table = table[::-1]
        return table[ids].sum()

    table, ids = jax.typeof(jnp.ones((9, 2))), jax.typeof(jnp.zeros(1, jnp.int32))
    _, found = jax.eval_shape(value_and_row_grad(loss), table, ids)
    assert found.rows.shape == (1, 2)
