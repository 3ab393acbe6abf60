"""First weights of new ids: the same everywhere, and as good as random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monolith_optax import uniform_rows

IDS = np.concatenate(
    [np.arange(20_000), np.arange(20_000) * 2**40, [-1, -(2**63), 2**63 - 1]]
)


def halves(ids):
    ids = ids.view(np.uint64)
    lower = jnp.asarray(ids.astype(np.uint32))
    return lower, jnp.asarray((ids >> np.uint64(32)).astype(np.uint32))


@pytest.mark.parametrize("jitted", [False, True])
def test_host_and_device_have_the_same_bits(jitted):
    first = uniform_rows(0.3, seed=2**63 + 5)
    rows = first(IDS, (2, 3))
    assert (rows.shape, rows.dtype) == ((len(IDS), 2, 3), np.float32)
    function = jax.jit(first, static_argnums=1) if jitted else first
    device = function(halves(IDS), (2, 3))
    assert isinstance(device, jax.Array)
    assert np.asarray(device).tobytes() == rows.tobytes()


def test_only_seed_and_id_count():
    first = uniform_rows(1.0, seed=3)
    rows = first(IDS, (4,))
    some = np.random.default_rng(0).permutation(len(IDS))[:50]
    np.testing.assert_array_equal(first(IDS[some], (4,)), rows[some])
    np.testing.assert_array_equal(first(IDS.view(np.uint64), (4,)), rows)
    np.testing.assert_array_equal(first(IDS, (2,)), rows[:, :2])
    assert (uniform_rows(1.0, seed=4)(IDS, (4,)) != rows).mean() > 0.99
    assert first([5], ()).shape == (1,)


def test_looks_random():
    rows = uniform_rows(1.0, seed=0)(IDS, (8,)).astype(np.float64)
    assert np.abs(rows).max() <= 1
    assert len(np.unique(rows[:, 0])) > 0.99 * len(IDS)
    error = 5 / np.sqrt(len(IDS))
    assert np.abs(rows.mean(0)).max() < error
    assert np.abs(3 * (rows**2).mean(0) - 1).max() < error * 2
    # Neither columns nor neighbouring ids know of each other.
    next_to = np.concatenate([rows[:-1], rows[1:]], axis=1)
    correlations = np.corrcoef(next_to, rowvar=False) - np.eye(16)
    assert np.abs(correlations).max() < error


def test_bad_arguments():
    with pytest.raises(ValueError, match="finite, but it is inf"):
        uniform_rows(float("inf"))
    with pytest.raises(ValueError, match="seed must be from 0"):
        uniform_rows(1.0, seed=-1)
