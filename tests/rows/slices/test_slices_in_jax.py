"""What JAX can do with RowSlices: everything it does with arrays but arithmetic."""

import copy
import os
import pickle
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax import RowSlices

IDS = [3, 0, 3, -1, 4, 7, 2**31 - 1, 1]
ROWS = np.arange(16, dtype=np.float32).reshape(8, 2)


@pytest.fixture
def slices():
    return RowSlices(np.array(IDS), jnp.asarray(ROWS))


def assert_same(actual, ids=IDS, rows=ROWS):
    assert isinstance(actual, RowSlices)
    assert actual.ids.dtype == jnp.int32
    np.testing.assert_array_equal(actual.ids, ids)
    np.testing.assert_array_equal(actual.rows, rows)


def test_it_is_a_pytree(slices):
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(slices)]
    assert paths == [".ids", ".rows"]
    leaves, structure = jax.tree.flatten(slices)
    assert_same(jax.tree.unflatten(structure, leaves))


def test_jit_and_donation(slices):
    step = jax.jit(lambda s: RowSlices(s.ids + 1, -s.rows), donate_argnums=0)
    compiled = step.lower(slices).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= ROWS.nbytes + 4 * len(IDS)
    next_slices = compiled(slices)  # ahead of time, and donated
    assert slices.rows.is_deleted()
    assert_same(next_slices, np.array(IDS, np.int32) + np.int32(1), -ROWS)


def test_loops_and_conditionals(slices):
    def body(carry, _):
        carry = RowSlices(carry.ids + 1, 2 * carry.rows)
        return carry, carry

    @jax.jit
    def run(start):
        carry, outputs = jax.lax.scan(body, start, length=2)
        looped = jax.lax.fori_loop(0, 2, lambda _, c: body(c, None)[0], start)
        chosen = jax.lax.cond(looped.ids[0] > 0, lambda: looped, lambda: -looped)
        return carry, outputs, jax.lax.while_loop(lambda _: False, lambda c: c, chosen)

    start = slices.with_rows(slices.rows)
    carry, outputs, looped = run(start)
    plus = np.array(IDS, np.int32)[None] + np.array([[1], [2]], np.int32)
    assert_same(carry, plus[1], 4 * ROWS)
    assert_same(outputs, plus, np.stack([2 * ROWS, 4 * ROWS]))
    assert_same(looped, plus[1], 4 * ROWS)
    assert outputs.row_shape == (2,)


def test_vmap(slices):
    singles = jax.vmap(lambda s: RowSlices(s.ids, 2 * s.rows))(slices)
    assert_same(singles, rows=2 * ROWS)


def test_eval_shape(slices):
    shapes = jax.eval_shape(lambda s: s + s, slices)
    assert shapes.ids.shape == (16,)
    assert shapes.ids.dtype == jnp.int32
    assert shapes.row_shape == (2,)
    assert "shape=(16,), dtype=int32" in repr(shapes)
    dense = jax.eval_shape(lambda s: jnp.ones((9, 2)) + s, shapes)
    assert dense.shape == (9, 2)


def test_gradients_flow_through(slices):
    def loss(rows, table):
        return jnp.sum((table + 3 * RowSlices(jnp.asarray(slices.ids), rows)) ** 2)

    table = jnp.ones((5, 2))
    for_rows, for_table = jax.jit(jax.grad(loss, argnums=(0, 1)))(slices.rows, table)
    total = np.asarray(table).copy()
    for row_id, row in zip(IDS, ROWS, strict=True):
        if 0 <= row_id < 5:
            total[row_id] += 3 * row
    np.testing.assert_allclose(for_table, 2 * total, rtol=1e-6)
    expected = [6 * total[i] if 0 <= i < 5 else np.zeros(2) for i in IDS]
    np.testing.assert_allclose(for_rows, expected, rtol=1e-6)


def test_gradients_with_respect_to_slices(slices):
    gradient = jax.grad(lambda s: jnp.sum(s.rows**2), allow_int=True)(slices)
    np.testing.assert_array_equal(gradient.rows, 2 * ROWS)
    assert repr(gradient).startswith("RowSlices(ids=")
    with pytest.raises(TypeError, match="row ids of RowSlices"):
        jax.grad(lambda s: jnp.sum(s.rows**2))(slices)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_meshes(slices, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    shard = NamedSharding(mesh, PartitionSpec("x"))
    with jax.set_mesh(mesh):
        split = jax.device_put(slices, shard)
        assert_same(split)
        assert split.ids.sharding.is_equivalent_to(shard, 1)
        assert_same(
            jax.jit(lambda s: RowSlices(s.ids, 2 * s.rows))(split), IDS, 2 * ROWS
        )
        table = jax.device_put(jnp.ones((8, 2), jnp.bfloat16), shard)
        total = jax.jit(lambda t, s: t + s)(table, split)
    assert total.sharding.is_equivalent_to(shard, 2)
    total = np.asarray(total, np.float32)
    np.testing.assert_array_equal(total[:, 0], [3, 15, 1, 5, 9, 1, 1, 11])


def test_shard_map_and_all_gather(slices):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x")

    def on_each(part):
        chex.assert_shape(part.ids, (1,))
        everything = jax.lax.all_gather(part, "x", tiled=True)
        return part + part, everything, (jnp.ones((5, 2)) + everything)[None]

    doubled, gathered, tables = jax.jit(
        jax.shard_map(on_each, mesh=mesh, in_specs=spec, out_specs=spec)
    )(slices)
    assert_same(doubled, np.repeat(IDS, 2), np.repeat(ROWS, 2, 0))
    assert_same(gathered, np.tile(IDS, 8), np.tile(ROWS, (8, 1)))
    np.testing.assert_allclose(tables, np.tile(1 + slices.to_dense(5), (8, 1, 1)))


def test_duplicates_inside_shard_map(slices):
    """The search for duplicates is a loop, whose carry varies over devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tables = jax.shard_map(
        lambda part: (jnp.ones((5, 2), jnp.bfloat16) + part)[None],
        mesh=mesh,
        in_specs=PartitionSpec("x"),
        out_specs=PartitionSpec("x"),
    )(slices)
    expected = np.tile(np.ones((5, 2)), (8, 1, 1))
    for device, row_id in enumerate(IDS):
        if 0 <= row_id < 5:
            expected[device, row_id] += ROWS[device]
    np.testing.assert_array_equal(np.asarray(tables, np.float32), expected)


def test_copies(slices):
    assert_same(copy.deepcopy(slices))
    assert_same(pickle.loads(pickle.dumps(slices)))
    assert_same(jax.device_get(slices))
    assert_same(jax.block_until_ready(slices))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), slices, slices)
    assert_same(stacked, [IDS, IDS], [ROWS, ROWS])
    assert_same(jax.tree.map(lambda leaf: leaf[:3], slices), IDS[:3], ROWS[:3])


def test_pickles_are_read_by_another_process(slices):
    program = (
        "import pickle, sys; s = pickle.load(sys.stdin.buffer); "
        "print(s.ids.tolist(), s.rows.sum())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(slices),
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        check=True,
    )
    assert result.stdout.decode().strip() == f"{IDS} {ROWS.sum()}"


def test_chex(slices):
    chex.assert_trees_all_equal_shapes(slices, -slices)
    chex.assert_trees_all_equal_shapes_and_dtypes(slices, slices)
    chex.assert_trees_all_equal(slices, slices)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal_shapes(slices, slices + slices)


def test_checkify(slices):
    checked = checkify.checkify(
        jax.jit(lambda s: jnp.ones((5, 2)) + s / 2), errors=checkify.float_checks
    )
    error, total = checked(slices)
    assert error.get() is None
    np.testing.assert_allclose(total, 1 + slices.to_dense(5) / 2)
