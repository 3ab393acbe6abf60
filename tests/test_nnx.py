"""nnx_value_and_row_grad: nnx.value_and_grad, also in what it changes in the model."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from flax import nnx

from monolith_optax import (
    RowSlices,
    check_in_place,
    lazy_rows,
    nnx_value_and_row_grad,
)

ROWS, DIM = 5000, 4


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.items = nnx.Embed(ROWS, DIM, rngs=rngs)
        self.norm = nnx.BatchNorm(DIM, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.dropout(self.norm(self.items(ids))))


def loss(model, ids, target):
    return jnp.mean((model(ids) - target) ** 2)


def trained(value_and_grad, tx, *, jit, has_aux=False):
    """The losses of three steps on one batch, and all that the model has after them."""
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    function = (lambda *args: (loss(*args), args[1] + 1)) if has_aux else loss

    def step(model, optimizer, ids):
        grad = value_and_grad(function, has_aux=has_aux)
        value, gradients = grad(model, ids, 1.0)
        optimizer.update(model, gradients)
        return value

    if jit:
        step = nnx.jit(step, donate_argnums=(0, 1))
    values = [step(model, optimizer, jnp.array([3, 14, 15, 3])) for _ in range(3)]
    return values, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("jit", "has_aux"),
    sampled(itertools.product([False, True], [False, True]), (True, True)),
)
def test_values_statistics_and_counts_are_those_of_nnx(jit, has_aux):
    options = {"jit": jit, "has_aux": has_aux}
    expected = trained(nnx.value_and_grad, optax.adagrad(0.1), **options)
    actual = trained(nnx_value_and_row_grad, lazy_rows(optax.adagrad(0.1)), **options)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    _, state = actual
    assert state["dropout"]["rngs"]["count"] == 3  # another mask in each step
    assert not np.allclose(state["norm"]["mean"], 0)


def test_gradients_are_rows():
    grad = nnx.jit(nnx_value_and_row_grad(loss))
    _, gradients = grad(Model(), jnp.array([3, 14]), 1.0)
    leaves = jax.tree.leaves(gradients, is_leaf=lambda g: isinstance(g, RowSlices))
    [slices] = [leaf for leaf in leaves if isinstance(leaf, RowSlices)]
    np.testing.assert_array_equal(slices.ids, [3, 14])
    assert len(leaves) == 5


def test_tables_may_be_named():
    def tied(model, ids):
        return jnp.sum(model.items(ids) @ model.items.embedding[...].T)

    model = nnx.Dict(items=nnx.Embed(ROWS, DIM, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"embedding.* is used by dot_general"):
        nnx_value_and_row_grad(tied, True)(model, jnp.array([1]))


def test_a_step_is_in_place():
    def step(model, optimizer, ids):
        value, gradients = nnx_value_and_row_grad(loss)(model, ids, 1.0)
        optimizer.update(model, gradients)
        return value

    model = Model()
    optimizer = nnx.Optimizer(model, lazy_rows(optax.adagrad(0.1)), wrt=nnx.Param)
    jitted = nnx.jit(step, donate_argnums=(0, 1))
    check_in_place(jitted, model, optimizer, jnp.arange(4))
