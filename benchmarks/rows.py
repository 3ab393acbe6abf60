"""Steps on the rows of a batch: ours, the peers' and the dense ones.

Every step is timed until its results are ready, the sides take turns in one process,
and the gradients of the looked-up rows are ready before the clock starts. What is
timed, with two threads each:

- ours: summing duplicates, the optimizer and `optax.apply_updates`, jitted and donated.
  A dense step sums the rows into a table of zeros, as JAX's own gradient does, and
  updates the whole table.
- PyTorch's SparseAdam: `optimizer.step()` with the gradient of an
  `Embedding(sparse=True)`, a sparse tensor that is not yet coalesced.
- FBGEMM: `backward()`, which includes the optimizer's step, after a forward pass that
  has already read the rows of the batch.
- TensorFlow: summing duplicates and the kernel `ResourceSparseApplyAdagradV2`.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Case, Side, interleave
from benchmarks.steps import RATE, Step
from monolith_optax import RowSlices, adamom, embedding, lazy_rows

BATCH = 8192
DIM = 16

# Takes the ids and the gradient of a batch, and returns the step to time.
Batched = Callable[[np.ndarray, np.ndarray], Callable[[], object]]


def main(*, quick: bool) -> list[Case]:
    """Tables of three sizes, and how much memory our step needs."""
    sizes = [10_000] if quick else [100_000, 1_000_000, 20_000_000]
    return [compare(num_rows, quick) for num_rows in sizes]


def compare(num_rows: int, quick: bool) -> Case:
    """Times all sides on one table of that many rows."""
    ours = jitted(lazy_rows(adamom(RATE)), num_rows)
    adam = jitted(lazy_rows(optax.adam(RATE)), num_rows)
    rowwise = jitted(lazy_rows(embedding.rowwise_adagrad(RATE)), num_rows)
    sides: dict[str, Batched] = {
        "lazy_rows(adamom)": batched(ours),
        "lazy_rows(optax.adam)": batched(adam),
        "lazy_rows(rowwise_adagrad)": batched(rowwise),
    }
    peers: dict[str, Callable[[int], Batched]] = {
        "PyTorch, SparseAdam": sparse_adam,
        "FBGEMM, EXACT_ADAGRAD": functools.partial(fbgemm, "EXACT_ADAGRAD"),
        "FBGEMM, EXACT_ROWWISE_ADAGRAD": functools.partial(
            fbgemm, "EXACT_ROWWISE_ADAGRAD"
        ),
        "TensorFlow, Adagrad": tensorflow_adagrad,
    }
    for title, peer in peers.items():
        try:
            sides[title] = peer(num_rows)
        except ImportError as error:
            print(f"{title} is left out: {error}")
    if num_rows <= 1_000_000:
        for title, tx in ("optax.adam", optax.adam(RATE)), ("adamom", adamom(RATE)):
            sides[f"{title}, dense"] = batched(jitted(dense(tx, num_rows), num_rows))
    data = batches(num_rows)

    def prepared(side: Batched) -> Side:
        return lambda: side(*next(data))

    turns = {title: prepared(side) for title, side in sides.items()}
    times = interleave(turns, rounds=2 if quick else 20, runs=2 if quick else 10)
    more = {
        column: {"lazy_rows(adamom)": size} for column, size in memory(ours).items()
    }
    name = f"{num_rows:,} rows of {DIM}, {BATCH:,} Zipf ids"
    return Case("rows", name, times, more=more)


def batches(num_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """An endless stream of ids that follow Zipf's law over the table, and gradients."""
    rng = np.random.default_rng(0)
    scattered = rng.permutation(num_rows)  # otherwise frequent rows would be neighbours
    ranks = np.exp(rng.uniform(0, np.log(num_rows), (32, BATCH))).astype(np.int64)
    rows = rng.normal(size=(32, BATCH, DIM)).astype(np.float32)
    return cycle(list(zip(scattered[ranks], rows, strict=True)))


def dense(tx: optax.GradientTransformation, num_rows: int) -> Any:
    """The optimizer on a gradient the size of the table, which its step sums up."""
    summed = optax.stateless(lambda slices, _: slices.to_dense(num_rows))
    return optax.chain(summed, tx)


def jitted(tx: optax.GradientTransformation, num_rows: int) -> Step:
    """The step on a table of ones; its batch is set for each run."""
    slices = RowSlices(jnp.zeros(BATCH, jnp.int32), jnp.zeros((BATCH, DIM)))
    return Step(tx, jnp.ones((num_rows, DIM)), slices)


def batched(step: Step) -> Batched:
    """The step on one batch after another."""

    def side(ids: np.ndarray, rows: np.ndarray) -> Callable[[], object]:
        slices = RowSlices(jnp.asarray(ids, jnp.int32), jnp.asarray(rows))
        step.gradients = jax.block_until_ready(slices)
        return step

    return side


def memory(step: Step) -> dict[str, float]:
    """Megabytes of table and slots, and of the compiled step's temporaries."""
    program = step.jitted.lower(*step.carry, step.gradients).compile()
    analysis: Any = program.memory_analysis()
    return {
        "MB of table and slots": sum(x.nbytes for x in jax.tree.leaves(step.carry))
        / 1e6,
        "MB of temporaries": analysis.temp_size_in_bytes / 1e6,
    }


def sparse_adam(num_rows: int) -> Batched:
    """PyTorch's lazy Adam."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(2)
    weight = torch.nn.Parameter(torch.ones(num_rows, DIM))
    optimizer = torch.optim.SparseAdam([weight], lr=RATE)

    def side(ids: np.ndarray, rows: np.ndarray) -> Callable[[], object]:
        index = torch.from_numpy(ids)[None]
        weight.grad = torch.sparse_coo_tensor(
            index, torch.from_numpy(rows), weight.shape, check_invariants=False
        )
        run: Callable[[], object] = optimizer.step
        return run

    return side


def fbgemm(optimizer: str, num_rows: int) -> Batched:
    """FBGEMM's table on CPU with one of its optimizers, and bags of one id each."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(2)
    package = "fbgemm_gpu.split_table_batched_embeddings_ops"
    common = importlib.import_module(f"{package}_common")
    training = importlib.import_module(f"{package}_training")
    device = common.EmbeddingLocation.HOST, training.ComputeDevice.CPU
    table = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(num_rows, DIM, *device)],
        optimizer=training.OptimType[optimizer],
        learning_rate=RATE,
    )
    offsets = torch.arange(BATCH + 1)

    def side(ids: np.ndarray, rows: np.ndarray) -> Callable[[], object]:
        output = table(torch.from_numpy(ids), offsets)
        gradient = torch.from_numpy(rows)
        return lambda: output.backward(gradient)

    return side


def tensorflow_adagrad(num_rows: int) -> Batched:
    """TensorFlow's sparse Adagrad, after summing duplicates as it requires."""
    tf = importlib.import_module("tensorflow")
    table = tf.Variable(tf.ones((num_rows, DIM)))
    accumulator = tf.Variable(tf.zeros((num_rows, DIM)))

    @tf.function  # type: ignore[untyped-decorator]
    def step(ids: Any, rows: Any) -> None:
        unique, segments = tf.unique(ids)
        summed = tf.math.unsorted_segment_sum(rows, segments, tf.size(unique))
        tf.raw_ops.ResourceSparseApplyAdagradV2(
            var=table.handle,
            accum=accumulator.handle,
            lr=RATE,
            epsilon=1e-8,
            grad=summed,
            indices=unique,
        )

    def side(ids: np.ndarray, rows: np.ndarray) -> Callable[[], object]:
        slices = tf.constant(ids), tf.constant(rows)
        return lambda: step(*slices)

    return side
