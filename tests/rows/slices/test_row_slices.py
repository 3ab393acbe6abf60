"""RowSlices: operators against NumPy, and ids that no arithmetic reaches."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_optax import RowSlices, adamom, lazy_rows, value_and_row_grad

# The searches of other devices, which nothing public runs on this one.
from monolith_optax._rows.slices.duplicates import (
    _by_hashing,
    _by_pairs,
    _by_sorting,
    is_beyond,
    one_position,
    sum_duplicates,
)

IDS = np.array([[2, 0], [2, -1], [5, 4]])
NUM_ROWS, DIM = 5, 2


def make(dtype=jnp.float32, seed=0):
    rows = np.random.default_rng(seed).normal(size=(*IDS.shape, DIM))
    rows[1, 1], rows[2, 0] = np.nan, np.inf  # padding may hold anything
    return RowSlices(IDS, jnp.asarray(rows, dtype))


def dense(slices, num_rows=NUM_ROWS):
    """The oracle: the sum of the rows by NumPy in float64."""
    table = np.zeros((num_rows, *slices.row_shape))
    rows = np.asarray(slices.rows, np.float64).reshape(-1, *slices.row_shape)
    for row_id, row in zip(np.ravel(slices.ids), rows, strict=True):
        if 0 <= row_id < num_rows:
            table[row_id] += row
    return table


def test_ids_are_int32_integers():
    slices = make()
    assert slices.ids.dtype == jnp.int32
    assert slices.ids.tolist() == IDS.tolist()
    assert slices.row_shape == (DIM,)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.uint32, np.int64, np.uint64])
def test_integers_that_do_not_fit_are_padding(dtype):
    info = np.iinfo(dtype)
    ids = np.array([0, 7, info.max, info.min], dtype)
    expected = [i if abs(int(i)) < 2**31 else -1 for i in ids]
    slices = RowSlices(ids, jnp.ones((4, 1)))
    assert slices.ids.tolist() == expected
    with jax.enable_x64(True):
        assert RowSlices(jnp.asarray(ids), jnp.ones((4, 1))).ids.tolist() == expected


def test_ids_beyond_64_bits_without_x64():
    slices = RowSlices([2**32 + 3, -(2**63), 2**31, 1], np.ones((4, 1), np.float32))
    assert slices.to_dense(5)[:, 0].tolist() == [0, 1, 0, 0, 0]


TABLE = jnp.arange(10, dtype=jnp.float32).reshape(NUM_ROWS, DIM)
OPERATORS: dict[str, tuple[Callable, Callable]] = {
    "table + slices": (lambda s: TABLE + s, lambda d: TABLE + d),
    "slices + table": (lambda s: s + TABLE, lambda d: TABLE + d),
    "table - slices": (lambda s: TABLE - s, lambda d: TABLE - d),
    "slices - table": (lambda s: s - TABLE, lambda d: d - TABLE),
    "numpy + slices": (lambda s: np.asarray(TABLE) + s, lambda d: TABLE + d),
    "slices + slices": (lambda s: s + s / 2, lambda d: 1.5 * d),
    "slices - slices": (lambda s: s - s * 3, lambda d: -2 * d),
    "2 * slices": (lambda s: 2 * s, lambda d: 2 * d),
    "slices * array": (lambda s: s * jnp.array(2), lambda d: 2 * d),
    "slices / 3": (lambda s: s / 3, lambda d: d / 3),
    "-slices": (lambda s: -s, lambda d: -d),
    "concatenate": (lambda s: RowSlices.concatenate([s, -s, s]), lambda d: d),
    "with_rows": (lambda s: s.with_rows(2 * s.rows), lambda d: 2 * d),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    operation, on_arrays = OPERATORS[name]
    slices = make()
    actual = operation(slices)
    if isinstance(actual, RowSlices):
        assert actual.rows.dtype == jnp.float32
        actual = actual.to_dense(NUM_ROWS)
    np.testing.assert_allclose(actual, on_arrays(dense(slices)), rtol=1e-6, atol=1e-6)


def test_astype():
    half = make().astype(jnp.bfloat16)
    assert half.rows.dtype == jnp.bfloat16
    assert half.ids.tolist() == IDS.tolist()
    assert (half / 3).rows.dtype == jnp.bfloat16


def test_scaling_rounds_once():
    slices = RowSlices([0], jnp.full((1, 1), 3, jnp.bfloat16))
    expected = jnp.asarray(np.float32(3) * np.float32(0.3), jnp.bfloat16)
    assert (slices * 0.3).rows[0, 0] == expected
    assert (slices / 3).rows[0, 0] == 1


def test_repr_and_print_show_ids_and_rows():
    slices = RowSlices([3, -1], jnp.array([[0.5], [2.0]]))
    assert repr(slices) == (
        "RowSlices(ids=Array([ 3, -1], dtype=int32), rows=Array([[0.5],\n"
        "       [2. ]], dtype=float32))"
    )
    assert str(slices) == "RowSlices(ids=[ 3 -1], rows=[[0.5]\n [2. ]])"
    assert "NamedSharding" not in repr(jax.tree.map(lambda _: "leaf", slices))


def test_equality_is_identity_and_iteration_an_error():
    slices = make()
    assert slices == slices
    assert slices != make()
    assert len({slices, slices}) == 1
    with pytest.raises(TypeError, match="not iterable"):
        iter(slices)
    with pytest.raises(AttributeError):
        slices.rows = slices.rows


def test_iterating_over_a_table_in_a_loss_ends():
    grad = value_and_row_grad(lambda table: sum(row.sum() for row in table))
    value, gradient = grad(jnp.ones((3, 2)))
    assert value == 6
    np.testing.assert_array_equal(gradient, np.ones((3, 2)))


BAD = {
    "must be integers, but they are float32": lambda s: RowSlices(s.rows, s.rows),
    "must have a floating-point dtype, not int32": lambda s: RowSlices(s.ids, s.ids),
    "must have the shape of the ids": lambda s: RowSlices(IDS, s.rows[:2]),
    "shape of the ids, ": lambda s: s.with_rows(s.rows[:2]),
    "cannot be added to a table of shape": lambda s: s + jnp.ones((5, 4)),
    "to a table of shape ()": lambda s: 1 + s,
    "cannot be added to a table of int32": lambda s: s + jnp.ones((5, 2), jnp.int32),
    "scaled by a scalar": lambda s: s * jnp.ones(2),
    "rows of one shape": lambda s: RowSlices.concatenate([s, RowSlices(IDS, IDS / 1)]),
    "shape, not None": lambda _: RowSlices.concatenate([]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_slices(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", ".")):
        BAD[message](make())


# Ids are not numbers -----------------------------------------------------------------


def over_devices(collective):
    return lambda g: jax.vmap(lambda _: collective(g, "x"), axis_name="x")(jnp.ones(2))


def transform(tx):
    return lambda g: tx.update(g, tx.init(g))


ARITHMETIC = {
    "g * 2": lambda g: jax.tree.map(lambda x: x * 2, g),
    "g / 2": lambda g: jax.tree.map(lambda x: x / 2, g),
    "-g": lambda g: jax.tree.map(operator.neg, g),
    "g - g": lambda g: jax.tree.map(operator.sub, g, g),
    "clip": lambda g: jax.tree.map(lambda x: jnp.clip(x, -1, 1), g),
    "sign": lambda g: jax.tree.map(jnp.sign, g),
    "astype": lambda g: jax.tree.map(lambda x: x.astype(jnp.float32), g),
    "psum": over_devices(jax.lax.psum),
    "pmean": over_devices(jax.lax.pmean),
    "optax.scale": lambda g: optax.scale(2.0).update(g, optax.EmptyState()),
    "optax.clip": lambda g: optax.clip(1.0).update(g, optax.EmptyState()),
    "optax.tree.add": lambda g: optax.tree.add(g, g),
    "optax.tree.scale": lambda g: optax.tree.scale(2.0, g),
    "optax.tree.cast": lambda g: optax.tree.cast(g, jnp.bfloat16),
    "optax.tree.sum": optax.tree.sum,
    "optax.global_norm": optax.global_norm,
    "optax.tree.norm": optax.tree.norm,
    "optax.clip_by_global_norm": lambda g: optax.clip_by_global_norm(1.0).update(
        g, optax.EmptyState()
    ),
    "np.asarray": lambda g: jax.tree.map(np.asarray, g),
}
# Outside jit these end in 'Cannot call abstract method' of JAX's class of keys.
UNNAMED = ("astype", "optax.tree.cast", "optax.global_norm", "optax.tree.norm")


@pytest.mark.filterwarnings("ignore:optax.global_norm is:DeprecationWarning")
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_on_leaves_is_an_error_that_names_the_ids(name):
    gradients = {"table": make()}
    # JAX says ValueError where dtypes are converted.
    with pytest.raises((TypeError, ValueError), match="row ids of RowSlices"):
        jax.eval_shape(ARITHMETIC[name], gradients)
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        ARITHMETIC[name](gradients)
    assert name.startswith((*UNNAMED, "optax.clip_by", "np.")) or (
        "row ids of RowSlices" in str(error.value)
    )


def test_a_schedule_outside_of_lazy_rows_is_an_error():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = optax.chain(lazy_rows(adamom(0.1)), optax.scale_by_learning_rate(schedule))
    params = jnp.ones((NUM_ROWS, DIM))
    with pytest.raises(ValueError, match=r"to key<row ids of RowSlices: put .*>"):
        jax.eval_shape(tx.update, make(), tx.init(params), params)


ZEROS = {
    "zeros_like": lambda g: jax.tree.map(jnp.zeros_like, g),
    "zeros": lambda g: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), g),
    "ones_like": lambda g: jax.tree.map(jnp.ones_like, g),
    "where": lambda g: jax.tree.map(
        lambda x: jnp.where(jnp.array(False), x, jnp.zeros_like(x)), g
    ),
    "set_to_zero": lambda g: optax.set_to_zero().update(g, optax.EmptyState())[0],
    "optax.tree.zeros_like": optax.tree.zeros_like,
}


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_are_padding(name):
    zeros = ZEROS[name](make())
    assert (zeros.ids < 0).all()
    table = jnp.full((NUM_ROWS, DIM), 3.0)
    assert (table + zeros.with_rows(jnp.ones_like(zeros.rows)) == table).all()


def test_where_keeps_what_is_finite():
    slices = make()
    kept = jax.tree.map(
        lambda x: jnp.where(jnp.array(True), x, jnp.zeros_like(x)), slices
    )
    assert kept.ids.tolist() == IDS.tolist()


def test_ids_that_a_function_has_replaced_are_an_error():
    slices = jax.tree.map(lambda x: jnp.zeros(x.shape), make())
    with pytest.raises(TypeError, match="row ids of RowSlices have become float32"):
        jnp.zeros((NUM_ROWS, DIM)) + slices


# Duplicates --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_duplicates_are_summed_in_float32_and_rounded_once(dtype):
    """4,096 ones stop growing at 256 in bfloat16 and at 2,048 in float16."""
    many = RowSlices(jnp.full(4096, 1), jnp.ones((4096, 1), dtype))
    assert many.to_dense(3).dtype == dtype
    assert many.to_dense(3)[:, 0].tolist() == [0, 4096, 0]
    table = jnp.full((3, 1), 0.5, dtype)
    assert (table + many).dtype == dtype
    expected = jnp.asarray(4096.5, dtype)
    assert (table + many)[:, 0].tolist() == [0.5, expected, 0.5]
    # Updates that dtype rounds to nothing one by one.
    few = RowSlices(jnp.full(4096, 1), jnp.full((4096, 1), 1 / 4096, jnp.float32))
    assert (jnp.ones((3, 1), dtype) + few)[:, 0].tolist() == [1, 2, 1]


def test_adamom_sees_the_sum_of_duplicates_in_a_bfloat16_table():
    tx = lazy_rows(adamom(0.1))
    table = jnp.zeros((3, 1), jnp.bfloat16)
    many = RowSlices(jnp.full(4096, 1), jnp.ones((4096, 1), jnp.bfloat16))
    _, state = jax.jit(tx.update)(many, tx.init(table), table)
    assert state.v[:, 0].tolist() == [0, 4096.0**2, 0]


@pytest.mark.parametrize("search", [_by_hashing, _by_pairs, _by_sorting])
@pytest.mark.parametrize("num_rows", [1, 7, 2**31 - 1000])
@pytest.mark.parametrize("size", [0, 1, 500])
def test_each_search_finds_the_last_position_of_each_id(search, num_rows, size):
    """And there the id; elsewhere ids that count down from the largest."""
    ids = np.random.default_rng(size).integers(-3, 10, size).astype(np.int32)
    last = {int(i): position for position, i in enumerate(ids) if 0 <= i < num_rows}
    positions, distinct = jax.jit(search)(jnp.asarray(ids), np.uint32(num_rows))
    assert positions.tolist() == [last.get(int(i), size) for i in ids]
    assert distinct.tolist() == [
        i if last.get(i) == k else 2**31 - 1 - k for k, i in enumerate(ids.tolist())
    ]


@pytest.mark.parametrize("size", [2, 3, 7, 8, 9, 63, 64, 65, 2**17 + 1])
def test_sorting_finds_the_last_positions_in_batches_of_any_size(size):
    rng = np.random.default_rng(size)
    ids = rng.integers(0, max(2, size // 3), size).astype(np.int32)
    ids[rng.integers(0, size, 2)] = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    ids[0] = -1
    last = np.full(size, size)
    _, inverse = np.unique(ids, return_inverse=True)
    np.maximum.at(of_id := np.zeros(size, int), inverse, np.arange(size))
    valid = (ids >= 0) & (ids < 2**31 - 1)
    last[valid] = of_id[inverse][valid]
    positions, _ = jax.jit(_by_sorting)(jnp.asarray(ids), np.uint32(2**31 - 1))
    np.testing.assert_array_equal(positions, last)


def test_each_device_and_each_example_may_search_by_sorting():
    ids = jnp.array([[3, 1, 3], [2, 2, 9]] * 4, jnp.int32)
    search = functools.partial(_by_sorting, num_rows=jnp.uint32(5))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    by_row, expected = jax.sharding.PartitionSpec("x"), [[2, 1, 2], [1, 1, 3]] * 4
    in_parts = jax.shard_map(
        lambda part: search(part[0])[0][None],
        mesh=mesh,
        in_specs=by_row,
        out_specs=by_row,
    )
    assert jax.jit(in_parts)(ids).tolist() == expected
    assert jax.vmap(search)(ids)[0].tolist() == expected


@pytest.mark.parametrize("size", [1, 8192, 8193, 262_144])
def test_the_search_for_duplicates_has_no_loop_on_a_gpu(size):
    ids, num_rows = jnp.zeros(size, jnp.int32), jnp.uint32(7)
    traced = jax.jit(lambda *args: one_position(*args)).trace(ids, num_rows)
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.while" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_sums_of_duplicates():
    """In tables of very different sizes, two of which get no ids."""
    rng = np.random.default_rng(0)
    num_rows = [4, 2**31 - 100, 7, 0, 3, 50]
    sizes = [(5, 4), (40,), (0,), (3,), (), (2, 3, 4)]
    ids = [
        rng.integers(-2, min(n, 20) + 2, size)
        for n, size in zip(num_rows, sizes, strict=True)
    ]
    rows = [rng.normal(size=(*size, 2)).astype(np.float32) for size in sizes]
    ids[1][:2] = 2**31 - 101, 2**31 - 1
    result = jax.jit(lambda ids, rows: list(map(sum_duplicates, ids, rows, num_rows)))(
        [jnp.asarray(part, jnp.int32) for part in ids], list(map(jnp.asarray, rows))
    )
    for part, its_rows, size, (distinct, sums) in zip(
        ids, rows, num_rows, result, strict=True
    ):
        expected = {}
        for row_id, row in zip(part.ravel(), its_rows.reshape(-1, 2), strict=True):
            if 0 <= row_id < size:
                expected[row_id] = expected.get(row_id, 0) + row.astype(np.float64)
        assert distinct.dtype == jnp.int32
        distinct = np.asarray(distinct)
        assert distinct.shape == (part.size,)
        assert len(set(distinct.tolist())) == part.size
        assert (distinct >= 0).all()
        valid = distinct < size
        assert is_beyond(jnp.asarray(distinct)).tolist() == (~valid).tolist()
        assert set(distinct[valid].tolist()) == set(expected)
        for row_id, row in zip(distinct[valid], np.asarray(sums)[valid], strict=True):
            np.testing.assert_allclose(row, expected[row_id], rtol=1e-5)
        assert not np.asarray(sums)[~valid].any()


def test_the_search_for_duplicates_is_compiled_the_same_for_tables_of_all_sizes():
    compiled = (
        jax.jit(lambda ids, rows: sum_duplicates(ids, rows, 12_345))
        .lower(jnp.zeros(8, jnp.int32), jnp.ones((8, 2)))
        .compile()
    )
    loops, program = compiled.as_text().split("\nENTRY")
    assert "constant(12345)" in program
    assert "constant(12345)" not in loops


@pytest.mark.parametrize("num_rows", [2**31 - 3, 2**31, 2**40])
def test_tables_too_large_for_int32_ids_are_an_error(num_rows):
    slices = RowSlices(jnp.arange(4), jnp.ones((4, 1)))
    with pytest.raises(ValueError, match=f"table of {num_rows} rows .* int32 row ids"):
        sum_duplicates(slices.ids, slices.rows, num_rows)
    with pytest.raises(ValueError, match="int32 row ids"):
        jax.eval_shape(
            operator.add, jax.ShapeDtypeStruct((num_rows, 1), jnp.float32), slices
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tables_without_rows(dtype):
    table, slices = jnp.zeros((0, DIM), dtype), make(dtype)
    assert (table + slices).shape == slices.to_dense(0).shape == (0, DIM)
    tx = lazy_rows(adamom(0.1))
    updates, state = tx.update(slices, tx.init(table), table)
    assert (updates.ids == -1).all()
    assert optax.apply_updates(table, updates).shape == state.m.shape == (0, DIM)
