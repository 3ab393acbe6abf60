"""psum and pmean: data-parallel training is training on the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import sampled
from jax.sharding import AxisType, PartitionSpec

import monolith_optax
from monolith_optax import RowSlices, adamom, lazy_rows, value_and_row_grad

P = PartitionSpec
MESH = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
IDS = jnp.array([3, 0, 3, 5, -1, 0, 2, 3])


@pytest.mark.parametrize("check_vma", sampled([True, False], True))
@pytest.mark.parametrize("name", ["psum", "pmean"])
@pytest.mark.parametrize("axes", ["x", ("x", "y")])
def test_they_are_those_of_the_dense_gradients(name, axes, check_vma):
    rows = jnp.sin(jnp.arange(16.0)).reshape(8, 2)

    def on_each(ids, rows):
        slices = RowSlices(ids, rows)
        tree = {"slices": slices, "dense": slices.to_dense(6), "none": None}
        return getattr(monolith_optax, name)(tree, axes)

    spec = P(("x", "y"))
    out = P() if axes == ("x", "y") else P("y")
    result = jax.jit(
        jax.shard_map(
            on_each,
            mesh=MESH,
            in_specs=spec,
            out_specs={"slices": out, "dense": out, "none": None},
            check_vma=check_vma,
        )
    )(IDS, rows)
    parts = 1 if axes == ("x", "y") else 2
    assert result["slices"].ids.shape == (8,)
    for part in range(parts):
        mine = jax.tree.map(
            lambda x, part=part: x.reshape(parts, -1, *x.shape[1:])[part], result
        )
        np.testing.assert_allclose(
            mine["slices"].to_dense(6), mine["dense"], rtol=1e-6, atol=1e-7
        )
    total = RowSlices(IDS, rows).to_dense(6)
    scale = {"psum": 1, "pmean": 8 // parts}[name]
    parts_sum = result["dense"].reshape(parts, 6, 2).sum(0)
    np.testing.assert_allclose(parts_sum, total / scale, rtol=1e-5, atol=1e-7)


def test_data_parallel_training_is_training_on_the_whole_batch():
    params = {"table": jnp.sin(jnp.arange(12.0)).reshape(6, 2), "scale": jnp.ones(2)}
    tx = lazy_rows(adamom(0.1))
    ids = jnp.array([3, 0, 3, 5, 5, 0, 2, 3])

    def loss(params, ids):
        return jnp.mean(jnp.sin(params["table"][ids]) @ params["scale"])

    grad = value_and_row_grad(loss, {"table": True, "scale": False})

    def step(params, state, ids, average=lambda gradients: gradients):
        updates, state = tx.update(average(grad(params, ids)[1]), state, params)
        return monolith_optax.apply_updates(params, updates), state

    def data_parallel(params, state, ids):
        return step(params, state, ids, lambda g: monolith_optax.pmean(g, ("x", "y")))

    expected = jax.jit(step)(params, tx.init(params), ids)
    actual = jax.jit(
        jax.shard_map(
            data_parallel,
            mesh=MESH,
            in_specs=(P(), P(), P(("x", "y"))),
            out_specs=P(),
            check_vma=False,  # with it, JAX sums gradients of dense parameters itself
        )
    )(params, tx.init(params), ids)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_vmap():
    slices = RowSlices(IDS.reshape(2, 4), jnp.ones((2, 4, 1)))
    total = jax.vmap(lambda s: monolith_optax.psum(s, "i"), axis_name="i")(slices)
    assert total.ids.tolist() == [IDS.tolist()] * 2


@pytest.mark.parametrize("reduce", [monolith_optax.psum, monolith_optax.pmean])
def test_several_axes_of_nested_vmaps(reduce):
    slices = RowSlices(jnp.arange(6).reshape(2, 3, 1), jnp.ones((2, 3, 1, 2)))
    inner = jax.vmap(lambda s: reduce(s, ("a", "b")), axis_name="b")
    total = jax.vmap(inner, axis_name="a")(slices)
    each = 1.0 if reduce is monolith_optax.psum else 1 / 6
    for device in total.ids.reshape(6, 6):
        assert device.tolist() == list(range(6))
    assert jnp.allclose(total.rows, each)
