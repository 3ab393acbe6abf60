"""What is known of rows without a gradient: neither too little nor too much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from dense_rows import NUM_ROWS, assert_lazy_is_dense, assert_refused, stateless
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from monolith_optax import RowSlices, lazy_rows
from monolith_optax._rows.programs import known_constants, row_rules
from monolith_optax._rows.programs.known_constants import (
    UNKNOWN,
    ZERO,
    Constant,
    joined,
    literal,
)

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


@pytest.mark.parametrize(
    "dtype",
    sampled(["bool", "int4", "float8_e4m3fn", "float8_e5m2"], "bool", "float8_e5m2"),
)
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


ONE, THREE, MINUS_ZERO, TRUE, FALSE = map(literal, [1.0, 3.0, -0.0, True, False])
EITHER_ZERO = joined([ZERO, MINUS_ZERO])


def described(constant):
    """Two zeros are the same only if their signs are."""
    found = constant.found
    if found is None:
        return "unknown"
    return repr(complex(found)) if isinstance(found, np.ndarray) else "either zero"


def after(function, types, operands):
    """What is known of the result of one operation on pairs of numbers."""
    pairs = [jnp.ones(2, dtype) for dtype in types]
    [equation] = jax.make_jaxpr(function)(*pairs).jaxpr.eqns
    plan = row_rules.plan(equation, [True] * len(operands))
    return known_constants.after(equation, operands, plan.evaluate)[0]


# Operations, the types of their operands, what is known of these, and of the result.
AFTER = {
    "negated": (lax.neg, "d", [ZERO], MINUS_ZERO),
    "complex": (lax.neg, "D", [ONE], literal(complex(-1.0, -0.0))),
    "either, negated": (lax.neg, "d", [EITHER_ZERO], EITHER_ZERO),
    "either, squared": (lax.square, "d", [EITHER_ZERO], ZERO),
    "over either": (lax.div, "dd", [ONE, EITHER_ZERO], UNKNOWN),
    "finite": (lax.is_finite, "d", [ZERO], TRUE),
    "of the unknown": (lax.is_finite, "d", [UNKNOWN], UNKNOWN),
    "product of numbers": (lax.mul, "dd", [THREE, ZERO], ZERO),
    "product with zero": (lax.mul, "dd", [UNKNOWN, ZERO], EITHER_ZERO),
    "product with either": (lax.mul, "dd", [EITHER_ZERO, UNKNOWN], EITHER_ZERO),
    "product with one": (lax.mul, "dd", [UNKNOWN, ONE], UNKNOWN),
    "products with zero": (
        lambda x, y: lax.dot_general(x, y, (((), ()), ((0,), (0,)))),
        "dd", [UNKNOWN, ZERO], EITHER_ZERO,
    ),
    "sum with zero": (lax.add, "dd", [UNKNOWN, ZERO], UNKNOWN),
    "zero above": (lax.div, "dd", [ZERO, UNKNOWN], EITHER_ZERO),
    "zero below": (lax.div, "dd", [UNKNOWN, ZERO], UNKNOWN),
    "one above": (lax.div, "dd", [ONE, UNKNOWN], UNKNOWN),
    "one of the same": (lax.select_n, "?dd", [UNKNOWN, THREE, THREE], THREE),
    "one of two": (lax.select_n, "?dd", [UNKNOWN, THREE, ONE], UNKNOWN),
    "one of zeros": (lax.select_n, "?dd", [UNKNOWN, ZERO, MINUS_ZERO], EITHER_ZERO),
    "the first": (lax.select_n, "?dd", [FALSE, THREE, UNKNOWN], THREE),
    "the second": (lax.select_n, "?dd", [TRUE, UNKNOWN, THREE], THREE),
    "that of a zero": (lax.select_n, "idd", [EITHER_ZERO, THREE, UNKNOWN], THREE),
    "not": (lax.bitwise_not, "?", [ZERO], TRUE),
    "and false": (lax.bitwise_and, "??", [UNKNOWN, ZERO], FALSE),
    "and true": (lax.bitwise_and, "??", [UNKNOWN, TRUE], UNKNOWN),
    "spread": (lambda x: lax.broadcast_in_dim(x, (2, 3), (0,)), "d", [THREE], THREE),
    "to nothing": (
        lambda x: lax.broadcast_in_dim(x, (2, 0), (0,)), "d", [THREE], UNKNOWN
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_what_is_known_after_an_operation(name):
    function, types, operands, expected = AFTER[name]
    assert described(after(function, types, operands)) == described(expected)


def test_what_is_known_of_one_of_several():
    assert described(joined([ONE, ONE])) == described(ONE)
    assert described(joined([ONE, THREE])) == "unknown"
    assert described(joined([ZERO, ZERO])) == described(ZERO)
    assert described(joined([ZERO, UNKNOWN])) == "unknown"
    assert described(joined([UNKNOWN, UNKNOWN])) == "unknown"
    assert described(joined([ZERO, EITHER_ZERO])) == "either zero"
    assert described(joined([literal(0j), literal(-0j)])) == "either zero"
    assert described(joined([EITHER_ZERO, THREE])) == "unknown"


def test_only_numbers_that_are_written_in_a_program_are_known():
    assert described(literal(np.float32(1))) == described(ONE)
    assert described(literal(jnp.ones(()))) == "unknown"
    assert described(literal(np.ones(1))) == "unknown"


def test_which_constants_are_zero():
    zeros = [ZERO, MINUS_ZERO, EITHER_ZERO, FALSE]
    assert all(constant.is_zero() for constant in zeros)
    assert not any(constant.is_zero() for constant in (ONE, UNKNOWN, TRUE))
    np.testing.assert_array_equal(EITHER_ZERO.value, 0.0)


def test_operations_that_place_arrays_are_not_run():
    pairs = jnp.ones(2), jnp.ones(2)
    [equation] = jax.make_jaxpr(lax.optimization_barrier)(pairs).jaxpr.eqns
    after = known_constants.after(equation, [EITHER_ZERO, THREE], lambda _: 1 / 0)
    assert list(map(described, after)) == ["either zero", described(THREE)]


def test_nothing_is_computed_before_it_is_asked_for_and_chains_have_any_length():
    found = []

    def following(constant):
        return Constant(lambda: found.append(1) or constant.found, [constant])

    last = following(ONE)
    assert not found
    for _ in range(5000):
        last = following(last)
    assert described(last) == described(ONE)
