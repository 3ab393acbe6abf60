"""Very many random batches: RowSlices and lazy_rows against dense steps in float64.

Each program is compiled once for a shape, and then runs thousands of inputs. Longer by
hand, for so many inputs, and with `-rP` for what they were:

ROWS_FUZZ_INPUTS=1000000 pytest -m slow --timeout 0 THIS_FILE
"""

import collections
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import PIECES, WRAPPERS
from dense_rows import put_back
from registry import VARIANTS

from monolith_optax import RowSlices, apply_updates, global_norm, lazy_rows

INPUTS = int(os.environ.get("ROWS_FUZZ_INPUTS", "40000"))
SEED = int(os.environ.get("ROWS_FUZZ_SEED", "0"))
AT_ONCE, STEPS = 20_000, 3
SHAPES = [  # rows of the table (not 2, as the dense leaf has), of the ids, of a row
    (1, (3,), (2,)), (3, (0,), (2,)), (4, (6,), (3,)), (5, (2, 3), (2,)), (3, (9,), ()),
    (7, (4,), (2, 2)), (40, (12,), (1,)),
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64", "mixed_dtypes")]


def some_ids(rng, count, shape, num_rows):
    """Ids with duplicates, padding and numbers far outside, or of one kind only."""
    shape = (count, *shape)
    extremes = [-(2**31), 2**31 - 1, -1, 0, num_rows - 1, num_rows]
    kinds = [
        rng.integers(-2, num_rows + 2, shape),
        np.broadcast_to(
            rng.integers(0, num_rows, (count, *[1] * (len(shape) - 1))), shape
        ),
        rng.choice(extremes, shape),
        np.full(shape, -1),
        rng.permuted(np.arange(np.prod(shape)).reshape(shape), axis=-1) % num_rows,
    ]
    chosen = rng.integers(0, len(kinds), (count, *[1] * (len(shape) - 1)))
    return np.choose(chosen, kinds).astype(np.int32)


def some_rows(rng, ids, row_shape, num_rows, most=4, powers=(-20, 4)):
    """Whole numbers times a power of two, so that sums are exact; padding is NaN."""
    rows = rng.integers(-most, most + 1, (*ids.shape, *row_shape)).astype(np.float64)
    scale = 2.0 ** rng.integers(*powers, len(ids))
    rows *= scale.reshape(-1, *[1] * (rows.ndim - 1))
    rows[(ids < 0) | (ids >= num_rows)] = rng.choice([np.nan, np.inf, 7.0])
    return rows


def summed(ids, rows, num_rows):
    """The dense gradient: sums over a matrix of zeros and ones, which vmap takes."""
    hits = ids.reshape(-1, 1) == jnp.arange(num_rows)[None]
    valid = hits.any(axis=1)
    row_shape = rows.shape[ids.ndim :]
    flat = jnp.asarray(rows, "float64").reshape(ids.size, math.prod(row_shape))
    flat = jnp.where(valid[:, None], flat, 0.0)
    # Not by a matrix product: 0 times infinity is NaN.
    table = jnp.where(hits[:, :, None], flat[:, None, :], 0.0).sum(axis=0)
    return table.reshape(num_rows, *row_shape), hits.any(axis=0)


def difference(actual, expected):
    """The largest difference, relative to the leaf; of NaN in one only, infinity."""
    worst = jnp.zeros(())
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = jnp.asarray(a, "float64"), jnp.asarray(e, "float64")
        same = (a == e) | (jnp.isnan(a) & jnp.isnan(e))
        size = jnp.max(jnp.where(jnp.isfinite(e), jnp.abs(e), 0.0), initial=1e-300)
        error = jnp.where(same, 0.0, jnp.abs(a - e) / size)
        worst = jnp.maximum(
            worst, jnp.max(jnp.nan_to_num(error, nan=jnp.inf), initial=0.0)
        )
    return worst


def steps_differ(inner, num_rows):
    """How much lazy steps differ from dense ones whose other rows are put back."""
    lazy, dense = lazy_rows(inner), optax.with_extra_args_support(inner)

    def run(params, ids, rows, others):
        ours, state = params, lazy.init(params)
        theirs, dense_state = params, inner.init(params)
        for step in range(STEPS):
            gradients = {
                "table": RowSlices(ids[step], rows[step]), "dense": others[step],
            }  # fmt: skip
            updates, state = lazy.update(gradients, state, ours)
            ours = apply_updates(ours, updates)
            table, hit = summed(ids[step], rows[step], num_rows)
            updates, new = dense.update(
                {"table": table, "dense": others[step]}, dense_state, theirs
            )
            dense_state = put_back(new, dense_state, hit)
            theirs = put_back(optax.apply_updates(theirs, updates), theirs, hit)
        return difference((ours, state), (theirs, dense_state))

    return jax.jit(jax.vmap(run))


def random_chain(rng):
    """An optimizer of optax's pieces, or one of ours, and its name."""
    if rng.random() < 0.4:
        name = str(rng.choice(sorted(VARIANTS)))
        return name, VARIANTS[name].make()
    links = [
        (str(rng.choice(sorted(PIECES))), float(rng.choice([0.01, 0.3, 1.0, 20.0])))
        for _ in range(rng.integers(1, 4))
    ]
    wrap = rng.choice(sorted(WRAPPERS))
    inner = WRAPPERS[wrap](optax.chain(*(PIECES[name](x) for name, x in links)))
    return f"{wrap} of {links}", optax.chain(inner, optax.scale(-0.125))


def test_lazy_rows():
    rng = np.random.default_rng(SEED)
    done, refused, worst, start = 0, 0, collections.Counter(), time.monotonic()
    while done < INPUTS:
        name, inner = random_chain(rng)
        num_rows, ids_shape, row_shape = SHAPES[rng.integers(len(SHAPES))]
        ids = some_ids(rng, AT_ONCE, (STEPS, *ids_shape), num_rows)
        rows = some_rows(rng, ids, row_shape, num_rows)
        others = rng.integers(-4, 5, (AT_ONCE, STEPS, 2)).astype(np.float64)
        params = {
            "table": rng.integers(-4, 5, (AT_ONCE, num_rows, *row_shape)) / 4,
            "dense": rng.integers(-4, 5, (AT_ONCE, 2)) / 4,
        }
        try:
            errors = np.asarray(
                steps_differ(inner, num_rows)(params, ids, rows, others)
            )
        except ValueError as error:
            assert "lazy_rows needs" in str(error)  # noqa: PT017
            refused += 1
            continue
        bad = int(np.argmax(errors))
        case = jax.tree.map(lambda x: x[bad], (params, ids, rows, others))  # noqa: B023
        # XLA adds a decayed weight to each of the rows with one id, not to their sum.
        assert errors[bad] < 1e-7, f"{name}, {num_rows} rows: {errors[bad]}\n{case}"
        done += AT_ONCE
        worst[name] = max(worst[name], float(errors[bad]))
    seconds = time.monotonic() - start
    print(f"{done} inputs, {len(worst)} optimizers, {refused} refused, {seconds:.0f} s")
    print(worst.most_common(5))


def slices_differ(num_rows, dtype):
    """How much sums differ, and norms."""

    def run(ids, rows, table):
        slices = RowSlices(ids, rows)
        twice = slices + slices
        summed_up, _ = summed(ids, rows, num_rows)
        wide = table.astype("float64")
        expected = [summed_up, 2 * summed_up, -summed_up, summed_up / 4]
        expected += [wide + summed_up, wide - summed_up, wide + summed_up]
        actual = [
            part.to_dense(num_rows) for part in (slices, twice, -slices, slices / 4)
        ]
        actual += [table + slices, table - slices, apply_updates(table, slices)]
        # It does not know of the table's end.
        inside = RowSlices(jnp.where(ids < num_rows, ids, -1), rows)
        return (
            difference(actual, [x.astype(dtype) for x in expected]),
            difference(global_norm(inside), jnp.sqrt(jnp.sum(summed_up**2))),
        )

    return jax.jit(jax.vmap(run))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_row_slices(dtype):
    """Each sum is exact in float32, so that it is known how it is rounded."""
    rng, done, start = np.random.default_rng(SEED), 0, time.monotonic()
    while done < INPUTS:
        num_rows, ids_shape, row_shape = SHAPES[rng.integers(len(SHAPES))]
        ids = some_ids(rng, AT_ONCE, ids_shape, num_rows)
        rows = some_rows(rng, ids, row_shape, num_rows, most=100, powers=(-2, 3))
        table = rng.integers(-100, 101, (AT_ONCE, num_rows, *row_shape))
        rows, table = rows.astype(jnp.dtype(dtype)), table.astype(jnp.dtype(dtype))
        sums, norms = map(np.asarray, slices_differ(num_rows, dtype)(ids, rows, table))
        bad = int(np.argmax(np.maximum(sums, norms)))
        case = jax.tree.map(lambda x: x[bad], (ids, rows, table))  # noqa: B023
        assert sums[bad] == 0, f"{num_rows} rows: {sums[bad]}\n{case}"
        assert norms[bad] < 1e-6, f"{num_rows} rows: {norms[bad]}\n{case}"
        done += AT_ONCE
    print(f"{done} inputs in {time.monotonic() - start:.0f} s")
