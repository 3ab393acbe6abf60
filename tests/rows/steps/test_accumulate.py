"""accumulate against the gradient of the whole batch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled

from monolith_optax import RowSlices, accumulate, lazy_rows, value_and_row_grad

IDS = jnp.array([[1, 2], [2, 2], [0, 3], [-1, 9], [5, 5], [1, 0]])
TARGETS = np.arange(6, dtype=np.float32)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "table": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=3), jnp.float32),
    }


def loss(params, ids, targets, scale=1.0):
    rows = jnp.take(params["table"], ids, axis=0, fill_value=0).sum(1)
    return scale * jnp.mean((jnp.tanh(rows @ params["kernel"]) - targets) ** 2)


@pytest.mark.parametrize(
    ("num_batches", "jit"),
    sampled(itertools.product([1, 2, 3, 6], [False, True]), (2, False), (3, True)),
)
def test_it_is_the_gradient_of_the_whole_batch(params, num_batches, jit):
    grad = accumulate(value_and_row_grad(loss), num_batches)
    grad = jax.jit(grad) if jit else grad
    value, gradients = grad(params, IDS, targets=TARGETS, scale=2.0)
    expected = jax.value_and_grad(loss)(params, IDS, TARGETS, 2.0)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradients["kernel"], expected[1]["kernel"], rtol=1e-5)
    assert isinstance(gradients["table"], RowSlices)
    table = gradients["table"].to_dense(8)
    np.testing.assert_allclose(table, expected[1]["table"], rtol=1e-5, atol=1e-7)


def test_it_takes_jaxs_gradients_too(params):
    value, gradients = accumulate(jax.value_and_grad(loss), 3)(params, IDS, TARGETS)
    expected = jax.value_and_grad(loss)(params, IDS, TARGETS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        (value, gradients),
        expected,
    )


def test_auxiliary_output_and_keys(params):
    def with_aux(params, key, ids, targets):
        noise = jax.random.uniform(key)
        return noise * loss(params, ids, targets), {"noise": noise, "ids": ids}

    grad = accumulate(value_and_row_grad(with_aux, has_aux=True), 2)
    (value, aux), _ = grad(params, jax.random.key(0), IDS, TARGETS)
    keys = jax.random.split(jax.random.key(0), 2)
    noise = [jax.random.uniform(key) for key in keys]
    np.testing.assert_array_equal(aux["noise"], noise)
    np.testing.assert_array_equal(aux["ids"], IDS.reshape(2, 3, 2))
    parts = [loss(params, IDS[i : i + 3], TARGETS[i : i + 3]) for i in (0, 3)]
    np.testing.assert_allclose(value, np.mean(np.multiply(noise, parts)), rtol=1e-6)


@pytest.mark.usefixtures("mixed_dtypes")
def test_dense_gradients_are_there_once_and_not_once_for_each_part():
    def product(params, x):
        return (params["kernel"] * x.sum()).sum() + params["table"][0, x].sum()

    params = {"kernel": jnp.ones((1000, 100)), "table": jnp.ones((1, 9))}
    grad = accumulate(value_and_row_grad(product), 8)
    compiled = jax.jit(grad).lower(params, jnp.ones(8, jnp.int32)).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * params["kernel"].nbytes  # stacked they would be 8


def test_sixteen_bit_gradients_are_summed_in_float32():
    def product(params, x):
        return (params * x).sum()

    grad = accumulate(jax.value_and_grad(product), 1024)
    x = jnp.full((1024,), 1.0078125, jnp.bfloat16)
    _, gradient = grad(jnp.ones((), jnp.bfloat16), x)
    assert (gradient.dtype, gradient) == (jnp.bfloat16, x[0])


def test_a_step_of_micro_batches_is_a_step_of_the_batch(params):
    tx = lazy_rows(optax.adagrad(0.1))
    grads = [
        grad(params, IDS, TARGETS)[1]
        for grad in (
            accumulate(value_and_row_grad(loss), 3),
            value_and_row_grad(loss),
        )
    ]
    a, b = (
        optax.apply_updates(params, tx.update(g, tx.init(params), params)[0])
        for g in grads
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b)


def test_bad_batches(params):
    grad = accumulate(value_and_row_grad(loss), 4)
    with pytest.raises(ValueError, match=r"divided by 4, but the lengths are.*6"):
        grad(params, IDS, TARGETS)
    grad = accumulate(value_and_row_grad(loss), 2)
    with pytest.raises(ValueError, match=r"'\[0\]': 6, '\[1\]': 4"):
        grad(params, IDS, TARGETS[:4])
    with pytest.raises(ValueError, match=r"the lengths are \{\}"):
        grad(params, 3, 1.0)
