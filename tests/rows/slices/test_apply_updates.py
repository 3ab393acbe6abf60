"""apply_updates against optax's, and where optax's cannot serve."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from monolith_optax import RowSlices, apply_updates


def test_it_is_optaxs():
    params = {"a": jnp.arange(6.0).reshape(3, 2), "b": (jnp.ones(()), None)}
    updates = jax.tree.map(lambda p: 0.1 * p - 1, params)
    for ours, optaxs in zip(
        jax.tree.leaves(apply_updates(params, updates)),
        jax.tree.leaves(optax.apply_updates(params, updates)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, optaxs)
    assert apply_updates(params, updates)["b"][1] is None


def test_slices_are_added():
    table = jnp.ones((3, 2))
    slices = RowSlices([2, 2, -1, 3], jnp.ones((4, 2)))
    result = jax.jit(apply_updates)({"t": table}, {"t": slices})
    assert result["t"].tolist() == [[1, 1], [1, 1], [3, 3]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_are_rounded_once(dtype):
    """Float32 updates, without promotion; an update rounded first would be lost."""
    numpy_dtype = ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else np.float16
    params = np.linspace(1, 2, 50).astype(numpy_dtype).reshape(25, 2)
    updates = np.linspace(-0.01, 0.01, 50).astype(np.float32).reshape(25, 2)
    expected = (params.astype(np.float64) + updates).astype(np.float32)
    expected = expected.astype(numpy_dtype)
    given = jnp.asarray(params)
    for update in jnp.asarray(updates), RowSlices(np.arange(25), updates):
        actual = jax.jit(apply_updates)(given, update)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(np.asarray(actual), expected)


def test_what_has_no_update_stays_as_it_is():
    params = {"w": jnp.ones(2), "activation": jax.nn.relu, "ids": jnp.arange(3)}
    updates = {"w": jnp.ones(2), "activation": None, "ids": None}
    result = apply_updates(params, updates)
    assert result["w"].tolist() == [2, 2]
    assert result["activation"] is jax.nn.relu
    assert result["ids"] is params["ids"]


def test_equinox_modules():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    embedding = eqx.nn.Embedding(5, 2, key=jax.random.key(1))
    _, updates = eqx.filter_value_and_grad(lambda m: m(jnp.ones(2)).sum())(model)
    slices = RowSlices([4, 4], jnp.ones((2, 2)))
    embedding_updates = eqx.tree_at(lambda e: e.weight, embedding, slices)
    new_model, new_embedding = apply_updates(
        (model, embedding), (updates, embedding_updates)
    )
    expected = eqx.apply_updates(model, updates)
    assert eqx.tree_equal(new_model, expected)
    np.testing.assert_allclose(new_embedding.weight[4], embedding.weight[4] + 2)


BAD = {
    r"updates\['w'\] is for a parameter of shape \(1,\), .* shape \(3,\)": (
        jnp.ones(3),
        jnp.ones(1),
    ),
    r"updates\['w'\] is for a parameter of shape \(3, 2\), .* shape \(3, 1\)": (
        jnp.ones((3, 1)),
        RowSlices([1], jnp.ones((1, 2))),
    ),
    r"params\['w'\] is of int32, .* floating-point": (jnp.arange(3), jnp.ones(3)),
    r"params\['w'\] is of <class 'float'>": (1.0, jnp.ones(())),
    r"shape \(\)": (jnp.ones(()), RowSlices(1, jnp.ones(()))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_updates(message):
    param, update = BAD[message]
    with pytest.raises(ValueError, match=message):
        apply_updates({"w": param}, {"w": update})
