"""global_norm against the norm of the dense gradient, by NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax import RowSlices, global_norm, value_and_row_grad

IDS = np.array([[3, 0, 3, 3], [5, -1, -7, 0]])


def tree(dtype=np.float32):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 4, 2)).astype(dtype)
    rows[1, 1:3] = np.nan  # padding
    return {
        "table": RowSlices(IDS, rows),
        "other": RowSlices(IDS[0, :3], rows[0, :3, 0]),
        "empty": RowSlices(np.zeros(0, int), np.zeros((0, 2), dtype)),
        "dense": jnp.asarray(rng.normal(size=3), dtype),
        "none": None,
    }


def dense_norm(tree):
    total = np.sum(np.asarray(tree["dense"], np.float64) ** 2)
    for slices in tree["table"], tree["other"]:
        table = np.zeros((6, *slices.row_shape))
        rows = np.asarray(slices.rows, np.float64).reshape(-1, *slices.row_shape)
        for row_id, row in zip(np.ravel(slices.ids), rows, strict=True):
            if row_id >= 0:
                table[row_id] += row
        total += np.sum(table**2)
    return np.sqrt(total)


def test_it_is_the_norm_of_the_dense_gradient():
    gradients = tree()
    norm = jax.jit(global_norm)(gradients)
    assert norm.shape == ()
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, dense_norm(gradients), rtol=1e-6)


def test_dtypes_are_float32_or_wider():
    with jax.enable_x64(True):
        gradients = tree(np.float64) | {"dense": jnp.ones(3, jnp.bfloat16)}
        norm = jax.jit(global_norm)(gradients)
        assert norm.dtype == jnp.float64
        np.testing.assert_allclose(norm, dense_norm(gradients), rtol=1e-14)
    # bfloat16 stops counting ones at 256.
    ones = RowSlices(np.full(4096, 2), jnp.ones((4096, 1), jnp.bfloat16))
    assert jax.jit(global_norm)((ones, jnp.ones(4096, jnp.bfloat16))) == np.sqrt(
        np.float32(4096**2 + 4096)
    )


def test_dense_trees_are_as_in_optax():
    arrays = {"a": jnp.arange(3.0), "b": jnp.array([1 + 2j, 3j], jnp.complex64)}
    np.testing.assert_allclose(global_norm(arrays), optax.tree.norm(arrays), rtol=1e-6)
    assert global_norm({}) == 0


def test_gradients_of_lookups():
    def loss(params, ids):
        return jnp.sum(jnp.sin(params["table"][ids]) @ params["scale"])

    params = {"table": jnp.arange(12.0).reshape(6, 2), "scale": jnp.ones(2)}
    ids = jnp.array([3, 0, 3, 5])
    grad = value_and_row_grad(loss, {"table": True, "scale": False})
    norm = jax.jit(lambda *args: global_norm(grad(*args)[1]))(params, ids)
    expected = optax.tree.norm(jax.grad(loss)(params, ids))
    np.testing.assert_allclose(norm, expected, rtol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_meshes(axis_type):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
    gradients = tree()
    del gradients["other"], gradients["empty"], gradients["dense"]
    split = jax.device_put(gradients, NamedSharding(mesh, PartitionSpec("x")))
    with jax.set_mesh(mesh):
        norm = jax.jit(global_norm)(split)
    np.testing.assert_allclose(norm, global_norm(gradients), rtol=1e-6)


def test_a_sum_that_is_infinite_in_float16_is_so_in_the_norm():
    slices = RowSlices(jnp.array([1, 1]), jnp.full((2, 1), 40_000, jnp.float16))
    assert jax.jit(global_norm)(slices) == jnp.inf
    assert jnp.isfinite(global_norm(slices / 2))
