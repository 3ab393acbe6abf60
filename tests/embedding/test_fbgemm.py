"""Row-wise Adagrad against FBGEMM's own, on the same batches."""

import importlib
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_optax import RowSlices, embedding, lazy_rows

ROWS, DIM, BATCH, STEPS = 50, 8, 16, 30


def fbgemm_table(table, **options):
    """FBGEMM's table on CPU, whose optimizer steps in its backward pass."""
    package = "fbgemm_gpu.split_table_batched_embeddings_ops"
    logging.disable(logging.WARNING)  # it prints a banner about PyTorch's version
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch = pytest.importorskip(
                "torch", reason="needs the packages of benchmarks: PyTorch, FBGEMM"
            )
            training = pytest.importorskip(
                f"{package}_training",
                reason="needs the packages of benchmarks: PyTorch, FBGEMM",
            )
            common = importlib.import_module(f"{package}_common")
    finally:
        logging.disable(logging.NOTSET)
    place = common.EmbeddingLocation.HOST, training.ComputeDevice.CPU
    bags = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(*table.shape, *place)],
        optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,
        **options,
    )
    bags.split_embedding_weights()[0].copy_(torch.from_numpy(table))
    return torch, bags


@pytest.mark.filterwarnings("ignore")  # PyTorch's own
@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.5, "eps": 0.1}])
def test_rowwise_adagrad_is_fbgemms(options):
    """With `pytest -rP` it prints how near they are, relative to the largest value."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    torch, theirs = fbgemm_table(table, **options)
    tx = lazy_rows(embedding.rowwise_adagrad(**options))
    params = jnp.asarray(table)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(STEPS):
        ids = (ROWS * rng.random(BATCH) ** 3).astype(np.int64)  # with duplicates
        rows = rng.normal(size=(BATCH, DIM)).astype(np.float32)
        output = theirs(torch.from_numpy(ids), torch.arange(BATCH + 1))
        output.backward(torch.from_numpy(rows))
        slices = RowSlices(jnp.asarray(ids, jnp.int32), jnp.asarray(rows))
        updates, state = update(slices, state, params)
        params = optax.apply_updates(params, updates)
    ((sums,),) = theirs.split_optimizer_states()
    for name, ours, expected in (
        ("weights", params, theirs.split_embedding_weights()[0]),
        ("sum_square", state.sum_square, sums),
    ):
        expected = expected.detach().numpy()
        relative = np.abs(ours - expected).max() / np.abs(expected).max()
        print(f"{name}: {relative:.1e}")
        assert relative <= 6e-7
    assert not np.array_equal(params, table)
