"""What is known of rows without a gradient: neither too little nor too much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_rows import NUM_ROWS, assert_lazy_is_dense, assert_refused, stateless
from jax.sharding import AxisType, PartitionSpec

from monolith_optax import RowSlices, lazy_rows

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes")


def number(x):
    return x.astype("float64")


# The sign of a zero in rows without a gradient is that of another number.
SIGNS = {
    "signbit": lambda g, p: g + number(jnp.sum(jnp.signbit(g * p))),
    "quotient": lambda g, p: g + number(jnp.sum(jnp.signbit(g / p))),
    "infinity": lambda g, p: g + number(jnp.sum(1 / (g * p) < 0)),
    "negated": lambda g, p: g + number(jnp.sum(jnp.signbit(-(g * p)))),
    "either case": lambda g, p: (
        g + number(jnp.sum(jnp.signbit(jnp.where(p > 0, g, -g))))
    ),
    "other case": lambda g, p: (
        g + number(jnp.sum(jnp.signbit(jnp.where(p > 0, -g, g))))
    ),
    "a product or not": lambda g, p: (
        g + number(jnp.sum(jnp.signbit(jnp.where(p > 0, g * p, g))))
    ),
}


@pytest.mark.parametrize("name", SIGNS)
def test_the_sign_of_a_zero_may_be_unknown(name):
    assert_refused(stateless(SIGNS[name]), "reduce_sum at")


KNOWN = {
    "norm": lambda g, p: g / (1 + jnp.sqrt(jnp.sum((g * p) ** 2))),
    "largest": lambda g, p: g + jnp.max(jnp.abs(g * p)),
    "scaled": lambda g, _: g + number(jnp.sum(jnp.signbit(-2 * g) & (g < 0))),
    "positive": lambda g, _: g + number(jnp.sum(jnp.signbit(2 * g))),
    "quotients": lambda g, p: g + jnp.sum(g / (p * p)),
    "matrix": lambda g, _: (
        g + jnp.sum(g @ jnp.cos(jnp.arange(float(g.shape[1]))[:, None]))
    ),
    "products": lambda g, p: g + jnp.sum(g * p * p),
    "both": lambda g, p: g + number(jnp.sum((p > 0) & (g > 0))),
    "compared": lambda g, p: g + number(jnp.sum(g * p > 0)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_zeros_are_known(name):
    assert_lazy_is_dense(stateless(KNOWN[name]))


def test_a_quotient_of_zero_is_zero_only_below_the_line():
    """Nothing divided by a gradient is known."""
    assert_refused(stateless(lambda g, p: g + jnp.sum(p / (1 + g))), "reduce_sum at")
    assert_refused(stateless(lambda g, p: g + jnp.sum(p * (1 + g))), "reduce_sum at")
    assert_refused(
        stateless(lambda g, p: g @ jnp.einsum("ni,nj->ij", jnp.cos(g), p)),
        "dot_general at",
    )


COLUMNS = jnp.array([0.0, 1.0, 2.0])


def test_a_constant_that_differs_between_columns_is_none():
    """Rows without a gradient are (0, 1, 2) here, and 0 in their first column."""
    assert_refused(stateless(lambda g, _: g + jnp.sum(g + COLUMNS[None])), "reduce_sum")
    assert_refused(stateless(lambda g, _: g + jnp.max(g + COLUMNS[None])), "reduce_max")

    def by_columns(g, _):
        shifted = g + jax.lax.broadcasted_iota(g.dtype, g.shape, 1)
        return g + jnp.sum(shifted)

    assert_refused(stateless(by_columns), "reduce_sum")


def reduced(dtype, reduce):
    def rule(g, _):
        return g + reduce(g.astype(dtype)).astype(g.dtype)

    return stateless(rule)


@pytest.mark.parametrize("dtype", ["bool", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_extremes_of_narrow_dtypes(dtype):
    assert_lazy_is_dense(reduced(dtype, jnp.max))
    assert_lazy_is_dense(reduced(dtype, jnp.min))


def test_extremes_of_negative_numbers():
    """Where there is nothing but padding, the largest is that of other rows."""
    assert_lazy_is_dense(reduced("float8_e4m3fn", lambda x: jnp.max(-1 - x * x)))


def test_bits_of_a_number():
    def rule(g, _):
        bits = jax.lax.bitcast_convert_type(jnp.ones((4,), "uint8"), "float32")
        return g * (1 + bits.astype(g.dtype))

    assert_lazy_is_dense(stateless(rule))


def test_constants_in_shard_map():
    """A constant is computed on no mesh."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    tx, table = lazy_rows(inner), jnp.ones((9, 2))

    def step(table, ids, rows):
        updates, _ = tx.update(RowSlices(ids, rows), inner.init(table), table)
        return updates.to_dense(9)

    spec = PartitionSpec()
    args = table, jnp.array([1, 2, 2]), jnp.ones((3, 2))
    for check_vma in True, False:
        with jax.set_mesh(mesh):
            on_mesh = jax.shard_map(
                step, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma
            )
            result = jax.jit(on_mesh)(*args)
        np.testing.assert_allclose(result, step(*args), rtol=1e-12)


def test_operations_of_one_number_per_row_made_from_a_number():
    """A reshape of a number is one of no row."""

    def rule(g, _):
        rates = jnp.linspace(0.1, 1.0, NUM_ROWS) + jnp.reshape(jnp.ones(()), (1,))
        return g * rates[:, None]

    assert_lazy_is_dense(stateless(rule))


def test_a_table_of_one_row_is_not_taken_for_a_number():
    """What has the shape (1, columns) may be spread to other rows."""

    def spread(g, _):
        return jax.tree.map(
            lambda g: g + jnp.broadcast_to(g, (5, 2)).sum(0, keepdims=True), g
        )

    inner = optax.stateless(spread)
    table, slices = jnp.ones((1, 2)), RowSlices(jnp.array([0, 0]), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="needs rows of"):
        lazy_rows(inner).update(slices, inner.init(table), table)
    inner = optax.stateless_with_tree_map(lambda g, p: g * jnp.ones((5, 2)).sum() + p)
    updates, _ = lazy_rows(inner).update(slices, inner.init(table), table)
    np.testing.assert_array_equal(updates.to_dense(1), [[21.0, 21.0]])
