"""Functions whose lookups in spread tables are exchanges: results, costs, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import sampled
from compiled_programs import copies, sent
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from monolith_optax import TableStack, bag_lookup, with_row_lookups

NUM_ROWS, DIM, BATCH = 1040, 3, 96
TABLES = {"items": P("x"), "users": True, "weight": None}


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("x",), axis_types=(axis_type,))


def placed(*trees, axis_type=AxisType.Auto):
    """Trees whose tables are split by rows, and other arrays by their batch."""
    mesh = mesh_of(axis_type)

    def place(x):
        rows = x.shape[:1] in ((NUM_ROWS,), (BATCH,))
        return jax.device_put(x, NamedSharding(mesh, P("x") if rows else P()))

    return jax.tree.map(place, trees)


def data(most=NUM_ROWS):
    rng = np.random.default_rng(0)
    shapes = {"items": (NUM_ROWS, DIM), "users": (50, DIM), "weight": (DIM,)}
    params = {name: rng.normal(size=s).astype("f") for name, s in shapes.items()}
    return params, rng.integers(0, most, (BATCH, 2)).astype("int32")


@jax.custom_jvp
def ruled(table, ids):
    return jnp.sin(table[ids]).sum(1)


ruled.defjvp(lambda primals, tangents: (ruled(*primals), tangents[0][primals[1]]))


def results(params, ids):
    """All kinds of results, some of them of lookups that depend on others."""
    items, users = params["items"], params["users"]
    rows = (items / jnp.linalg.norm(items, axis=1, keepdims=True))[ids]
    again = items[jnp.argmax(rows, -1) * 300]

    def step(_, some):
        return None, bag_lookup(items, some[None], combiner="max")[0]

    return {
        "scores": (rows * again * users[ids % 50]) @ params["weight"],
        "best": jnp.argmax(rows.sum(1) @ items.T, 1),
        "ruled": ruled(items, ids),
        "in scan": [lax.scan(step, None, ids)[1], None],
        "name": "recall",
    }


# If all ids have one owner, they do not fit their buffers and go round the ring.
@pytest.mark.parametrize("most", sampled([NUM_ROWS, NUM_ROWS // 8], NUM_ROWS // 8))
def test_results_are_those_of_the_function(most):
    params, ids = data(most)
    names = []

    def arrays(fun):
        def without_name(*args):
            found = fun(*args)
            names.append(found.pop("name"))
            return found

        return jax.jit(without_name)

    spread = arrays(with_row_lookups(results, TABLES))(*placed(params, ids))
    chex.assert_trees_all_close(
        *map(jax.device_get, (spread, arrays(results)(params, ids))), rtol=1e-5
    )
    assert names == ["recall"] * 2


def test_without_spread_tables_it_is_the_function():
    params, ids = jax.tree.map(jnp.asarray, data())
    plain = with_row_lookups(results, {**TABLES, "items": True})(params, ids)
    chex.assert_trees_all_equal(plain.pop("name"), "recall")
    expected = results(params, ids)
    chex.assert_trees_all_equal(plain, {k: expected[k] for k in plain})


@pytest.mark.slow
def test_tables_of_a_stack():
    rng = np.random.default_rng(2)
    sizes = {"a": 1000, "b": 1008, "c": 40}
    tables = {k: rng.normal(size=(n, DIM)).astype("f") for k, n in sizes.items()}
    stack = TableStack(tables, shards=8)
    mesh = mesh_of()

    def lookups(stacks, ids):
        found = stack.unpack(stacks)
        return [found[k][ids[:, i] % n] for i, (k, n) in enumerate(sizes.items())]

    ids = rng.integers(0, 1000, (BATCH, 3)).astype("int32")
    stacks = jax.tree.map(jnp.asarray, stack.pack(tables))
    where = NamedSharding(mesh, P("x"))
    args = jax.device_put((stacks, ids), where)
    spread = jax.jit(with_row_lookups(lookups, P("x"))).lower(*args).compile()
    chex.assert_trees_all_equal(
        jax.device_get(spread(*args)), jax.device_get(lookups(stacks, ids))
    )
    # Ids to their owners, and rows back: once for all tables.
    assert len(sent(spread)["all-to-all"]) == 2
    assert "all-gather" not in sent(spread)


def test_a_lookup_sends_the_share_of_a_device():
    """JAX's own sums rows of the global batch over all devices."""

    def loss(params, ids):
        return jnp.mean(params["items"][ids].sum(1) ** 2)

    args = placed(*data())
    compiled = jax.jit(with_row_lookups(loss, TABLES)).lower(*args).compile()
    found = sent(compiled)
    assert found.keys() == {"all-to-all", "all-reduce", "collective-permute"}
    assert max(found["all-reduce"]) <= 16
    assert copies(compiled, (NUM_ROWS // 8, DIM)) == []
    assert max(sent(jax.jit(loss).lower(*args).compile())["all-reduce"]) > 2000


def take(params, ids):
    sharding = jax.typeof(ids).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return params["items"].at[ids].get(out_sharding=sharding)
    return params["items"][ids]


def test_explicit_axes():
    params, ids = placed(*data(), axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        rows = jax.jit(with_row_lookups(take, TABLES))(params, ids)
        assert jax.typeof(rows).sharding.spec[0] == "x"
        np.testing.assert_array_equal(rows, take(*data()))
        plain = lambda params, ids: params["items"][ids]  # noqa: E731
        by_user = jax.sharding.auto_axes(plain, out_sharding=P("x"))
        for fun in plain, by_user:
            run = jax.jit(with_row_lookups(fun, TABLES)).lower(params, ids).compile()
            rows = run(params, ids)
            assert rows.sharding.is_equivalent_to(ids.sharding, rows.ndim)
            np.testing.assert_array_equal(rows, take(*data()))
            assert "all-gather" not in sent(run)


def in_while(params, ids):
    def step(carry):
        return carry[0] + 1, carry[1] + params["items"][ids[carry[0]]].sum()

    return lax.while_loop(lambda c: c[0] < ids.max() % 9, step, (0, jnp.float32(0)))


def columns(params, ids):
    return params["items"].T[ids % DIM]


@pytest.mark.parametrize(
    ("fun", "match"),
    [
        (in_while, "in a loop whose length is not known before"),
        (columns, "Table items is used by .*exchange between devices. Say False"),
    ],
)
def test_lookups_that_are_no_exchanges_are_refused(fun, match):
    with pytest.raises(ValueError, match=match):
        with_row_lookups(fun, TABLES)(*placed(*data()))


def test_derivatives_are_refused():
    params, ids = placed(*data())

    def loss(params):
        return with_row_lookups(take, TABLES)(params, ids).sum()

    with pytest.raises(ValueError, match="for evaluation only: use value_and_row_grad"):
        jax.jit(jax.grad(loss)).lower(params)
