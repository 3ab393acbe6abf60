"""The row-sparse steps of other frameworks.

PyTorch and FBGEMM have one thread. Their threads meet many times in a step: on two
cores, FBGEMM's steps on 26 tables took 1.6 and 6.3 ms with one thread, 1.8 and 9.3 ms
with two that spin while they wait, 11 and 18 ms with two that sleep, and up to a second
where other work takes a core from two that spin. SparseAdam took a tenth longer with
one thread than with two that spin on an idle machine.

- PyTorch's SparseAdam: `optimizer.step()` with the gradient of an
  `Embedding(sparse=True)`, a sparse tensor that is not yet coalesced.
- FBGEMM: `backward()`, which includes the optimizer's step, after a forward pass that
  has already read the rows of the batch. All tables are one module.
- TensorFlow: summing duplicates and the kernel `ResourceSparseApplyAdagradV2`.
"""

import importlib
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np

from benchmarks.measure import Side
from benchmarks.steps import RATE
from benchmarks.workload import Batches, Workload


def sparse_adam(work: Workload, data: Batches) -> Side:
    """PyTorch's lazy Adam."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    weights = [
        torch.nn.Parameter(torch.ones(work.num_rows, work.dim))
        for _ in range(work.tables)
    ]
    optimizer = torch.optim.SparseAdam(weights, lr=RATE)
    rows = [torch.from_numpy(part) for part in data.rows]
    stream = cycle([[torch.from_numpy(i)[None] for i in ids] for ids in data.ids])

    def prepare() -> Callable[[], object]:
        for weight, ids, part in zip(weights, next(stream), rows, strict=True):
            weight.grad = torch.sparse_coo_tensor(
                ids, part, weight.shape, check_invariants=False
            )
        run: Callable[[], object] = optimizer.step
        return run

    return prepare


def fbgemm(optimizer: str) -> Callable[[Workload, Batches], Side]:
    """FBGEMM's tables on CPU with one of its optimizers, and bags of one id each."""

    def make(work: Workload, data: Batches) -> Side:
        torch = importlib.import_module("torch")
        torch.set_num_threads(1)
        package = "fbgemm_gpu.split_table_batched_embeddings_ops"
        common = importlib.import_module(f"{package}_common")
        training = importlib.import_module(f"{package}_training")
        device = common.EmbeddingLocation.HOST, training.ComputeDevice.CPU
        tables = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(work.num_rows, work.dim, *device)] * work.tables,
            optimizer=training.OptimType[optimizer],
            learning_rate=RATE,
        )
        offsets = torch.arange(work.tables * work.batch + 1)
        # Its output has the tables side by side.
        gradient = torch.from_numpy(np.concatenate(data.rows, axis=1))
        stream = cycle([torch.from_numpy(np.concatenate(ids)) for ids in data.ids])

        def prepare() -> Callable[[], object]:
            output = tables(next(stream), offsets)
            return lambda: output.backward(gradient)

        return prepare

    return make


def tensorflow_adagrad(work: Workload, data: Batches) -> Side:
    """TensorFlow's sparse Adagrad, after summing duplicates as it requires."""
    tf = importlib.import_module("tensorflow")
    shape = work.num_rows, work.dim
    tables = [tf.Variable(tf.ones(shape)) for _ in range(work.tables)]
    accumulators = [tf.Variable(tf.zeros(shape)) for _ in range(work.tables)]

    @tf.function  # type: ignore[untyped-decorator]
    def step(ids: list[Any], rows: list[Any]) -> None:
        for table, accumulator, i, r in zip(
            tables, accumulators, ids, rows, strict=True
        ):
            unique, segments = tf.unique(i)
            tf.raw_ops.ResourceSparseApplyAdagradV2(
                var=table.handle,
                accum=accumulator.handle,
                lr=RATE,
                epsilon=1e-8,
                grad=tf.math.unsorted_segment_sum(r, segments, tf.size(unique)),
                indices=unique,
            )

    rows = [tf.constant(part) for part in data.rows]
    stream = cycle([[tf.constant(i) for i in ids] for ids in data.ids])

    def prepare() -> Callable[[], object]:
        ids = next(stream)
        return lambda: step(ids, rows)

    return prepare
