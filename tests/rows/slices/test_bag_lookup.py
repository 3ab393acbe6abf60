"""bag_lookup against a loop over bags in NumPy, and its gradients against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import sampled
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax import Bags, RowSlices, bag_lookup, value_and_row_grad

NUM_ROWS = 9
LISTS = [[3, 1, 3], [], [8], [0, -1, 9, 5], [2, 2]]
WEIGHTS = [[0.5, 2.0, -1.0], [], [3.0], [1.0, 7.0, 7.0, 0.25], [1.0, 1.5]]
COMBINERS = "sum", "mean", "sqrtn", "max"


def a_table(row_shape=(4,), dtype=np.float64):
    rng = np.random.default_rng(0)
    return rng.normal(size=(NUM_ROWS, *row_shape)).astype(dtype)


def in_a_loop(table, lists, weights, combiner):
    """The definition, bag by bag."""
    bags = []
    for ids, scale in zip(lists, weights, strict=True):
        valid = [(i, w) for i, w in zip(ids, scale, strict=True) if 0 <= i < len(table)]
        if not valid:
            bags.append(np.zeros(table.shape[1:]))
            continue
        rows = np.array([table[i] for i, _ in valid])
        w = np.array([w for _, w in valid])
        total = np.tensordot(w, rows, 1)
        bags.append(
            {
                "sum": total,
                "mean": total / w.sum(),
                "sqrtn": total / np.sqrt((w * w).sum()),
                "max": rows.max(0),
            }[combiner]
        )
    return np.array(bags)


def ones(lists):
    return [[1.0] * len(part) for part in lists]


@pytest.mark.parametrize("row_shape", [(4,), (), (2, 3)])
@pytest.mark.parametrize("combiner", sampled(COMBINERS, "sqrtn", "max"))
def test_bags(combiner, row_shape):
    with jax.enable_x64(True):
        table = a_table(row_shape)
        for weights in (ones(LISTS), WEIGHTS)[: 1 if combiner == "max" else 2]:
            expected = in_a_loop(table, LISTS, weights, combiner)
            bags = Bags.from_lists(LISTS, weights, capacity=16)
            given = (
                None if combiner == "max" or weights == ones(LISTS) else bags.weights
            )
            actual = jax.jit(bag_lookup, static_argnames="combiner")(
                jnp.asarray(table), *bags[:2], weights=given, combiner=combiner
            )
            np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combiner", sampled(COMBINERS, "mean"))
def test_offsets_segments_and_padded_ids_are_the_same(combiner):
    table = jnp.asarray(a_table(dtype=np.float32))
    bags = Bags.from_lists(LISTS)
    expected = bag_lookup(table, *bags, combiner=combiner)
    segments = np.repeat([0, 2, 3, 4, -1], [3, 1, 4, 2, len(bags.ids) - 10])
    order = np.random.default_rng(0).permutation(len(segments))
    actual = bag_lookup(
        table, bags.ids[order], segments=segments[order], num_bags=5, combiner=combiner
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    padded = np.full((5, 6), -1)
    for k, part in enumerate(LISTS):
        padded[k, : len(part)] = part
    actual = bag_lookup(table, padded, combiner=combiner)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    again = Bags.from_padded(padded)
    assert again.ids.tolist()[:9] == [3, 1, 3, 8, 0, 9, 5, 2, 2]
    np.testing.assert_allclose(
        bag_lookup(table, *again, combiner=combiner), expected, rtol=1e-6
    )


@pytest.mark.parametrize("combiner", sampled(COMBINERS, "mean"))
def test_gradients_are_jaxs_and_of_rows(combiner):
    with jax.enable_x64(True):
        params = {"table": jnp.asarray(a_table()), "dense": jnp.ones(4)}
        bags = Bags.from_lists(LISTS, WEIGHTS)
        weights = None if combiner == "max" else jnp.asarray(bags.weights, jnp.float64)

        def loss(params, weights):
            rows = bag_lookup(
                params["table"], *bags[:2], weights=weights, combiner=combiner
            )
            return jnp.sin(rows @ params["dense"]).sum()

        def padded(params, weights):
            """The same loss, bag by bag."""
            total = jnp.zeros(())
            for ids, scale in zip(
                LISTS, [None] * 5 if weights is None else weights, strict=True
            ):
                valid = [k for k, i in enumerate(ids) if 0 <= i < NUM_ROWS]
                if not valid:
                    continue
                rows = params["table"][jnp.array([ids[k] for k in valid])]
                if combiner == "max":
                    bag = rows.max(0)
                else:
                    w = scale[jnp.array(valid)]
                    bag = (w[:, None] * rows).sum(0)
                    bag = (
                        bag
                        / {
                            "sum": 1.0,
                            "mean": w.sum(),
                            "sqrtn": jnp.sqrt((w * w).sum()),
                        }[combiner]
                    )
                total += jnp.sin(bag @ params["dense"])
            return total

        lists = None
        if weights is not None:
            lists = [jnp.asarray(part, jnp.float64) for part in WEIGHTS]
        value_and_grad = jax.jit(jax.value_and_grad(padded, (0, 1), allow_int=True))
        expected_value, (expected, of_lists) = value_and_grad(params, lists)
        ours = value_and_row_grad(loss, {"table": True, "dense": False})
        value, actual = jax.jit(ours)(params, weights)
        np.testing.assert_allclose(value, expected_value, rtol=1e-12)
        assert isinstance(actual["table"], RowSlices)
        np.testing.assert_allclose(
            actual["table"].to_dense(NUM_ROWS),
            expected["table"],
            rtol=1e-10,
            atol=1e-12,
        )
        np.testing.assert_allclose(actual["dense"], expected["dense"], rtol=1e-10)
        if weights is not None:
            of_weights = jax.jit(jax.grad(loss, 1))(params, weights)
            joined = np.concatenate(of_lists)
            np.testing.assert_allclose(of_weights[:10], joined, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("combiner", ["mean", "max"])
def test_bags_of_a_table_that_is_spread_over_devices(combiner):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    table = jnp.asarray(np.tile(a_table(dtype=np.float32), (8, 1)))
    bags = Bags.from_lists([[71, 1, 3], [], [8, 71]] * 8)

    def loss(table):
        return jnp.sin(bag_lookup(table, *bags, combiner=combiner)).sum()

    expected = jax.value_and_grad(loss)(table)
    spread = jax.device_put(table, NamedSharding(mesh, PartitionSpec("x")))
    grad = jax.jit(value_and_row_grad(loss, PartitionSpec("x")))
    value, gradient = grad(spread)
    assert isinstance(gradient, RowSlices)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(
        gradient.to_dense(len(table)), expected[1], rtol=1e-5, atol=1e-6
    )


def test_a_maximum_that_several_have_has_the_gradient_of_the_first():
    table = jnp.array([[1.0, 5.0], [1.0, 2.0], [-jnp.inf, 2.0]])

    @jax.jit
    def largest(table):
        ids, offsets = jnp.array([1, 0, 1, 2]), jnp.array([0, 3, 4])
        return bag_lookup(table, ids, offsets, combiner="max")

    np.testing.assert_array_equal(largest(table), [[1, 5], [-np.inf, 2]])
    gradient = jax.grad(lambda table: largest(table).sum())(table)
    np.testing.assert_array_equal(gradient, [[0, 1], [1, 0], [1, 1]])
    nan = largest(table.at[0, 0].set(jnp.nan))
    np.testing.assert_array_equal(nan, [[np.nan, 5], [-np.inf, 2]])


@pytest.mark.parametrize("combiner", COMBINERS)
def test_padding_has_nothing_of_rows_that_are_not_finite(combiner):
    table = jnp.array([[jnp.nan, jnp.inf], [1.0, 2.0], [jnp.inf, jnp.nan]])
    ids, offsets = jnp.array([-1, 1, 7]), jnp.array([0, 3])

    def loss(table, weights):
        return bag_lookup(table, ids, offsets, weights, combiner=combiner).sum()

    value, slices = jax.jit(value_and_row_grad(loss, True))(table, None)
    assert value == 3
    assert slices.ids.tolist()[1] == 1
    assert max(slices.ids.tolist()[::2]) < 0
    assert slices.to_dense(3).tolist() == [[0, 0], [1, 1], [0, 0]]
    if combiner == "max":
        return
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    of_table, of_weights = grad(table, jnp.array([3.0, 2.0, 5.0]))
    assert of_table[::2].tolist() == [[0, 0], [0, 0]]
    assert of_weights[::2].tolist() == [0, 0]


def test_sums_of_sixteen_bits_are_taken_in_float32():
    table = jnp.ones((1, 1), jnp.bfloat16)
    bag = bag_lookup(table, jnp.zeros(512, jnp.int32), jnp.array([0, 512]))
    assert (bag.dtype, bag.item()) == (jnp.bfloat16, 512)


def test_empty_batches():
    table = jnp.ones((3, 2))
    none = jnp.zeros(0, jnp.int32)
    assert bag_lookup(table, none, jnp.zeros(1, jnp.int32)).shape == (0, 2)
    np.testing.assert_array_equal(bag_lookup(table, none, jnp.zeros(3, jnp.int32)), 0)
    np.testing.assert_array_equal(bag_lookup(table, jnp.zeros((2, 0), jnp.int32)), 0)


def test_bad_lookups():
    table, ids, offsets = jnp.ones((3, 2)), jnp.array([0, 1]), jnp.array([0, 2])
    for match, kwargs in {
        "must be integers": {"ids": jnp.ones(2), "offsets": offsets},
        "offsets or segments": {"ids": ids},
        r"shape \(n,\)": {"ids": ids[None], "offsets": offsets},
        "come with num_bags": {"ids": ids, "segments": ids},
        r"shape \(num_bags \+ 1,\)": {"ids": ids, "offsets": offsets, "num_bags": 2},
        "combiner must be": {"ids": ids, "offsets": offsets, "combiner": "median"},
        "takes no weights": {
            "ids": ids,
            "offsets": offsets,
            "combiner": "max",
            "weights": jnp.ones(2),
        },
        "weights must have the shape": {
            "ids": ids,
            "offsets": offsets,
            "weights": jnp.ones(3),
        },
    }.items():
        with pytest.raises(ValueError, match=match):
            bag_lookup(table, **kwargs)
