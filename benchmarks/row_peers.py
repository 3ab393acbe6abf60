"""The steps of other frameworks on the rows of a batch.

On CPU, PyTorch and FBGEMM have one thread. Their threads meet many times in a step: on
two cores, FBGEMM's steps on 26 tables took 1.6 and 6.3 ms with one thread, 1.8 and
9.3 ms with two that spin while they wait, 11 and 18 ms with two that sleep, and up to a
second where other work takes a core from two that spin. SparseAdam took a tenth longer
with one thread than with two that spin on an idle machine.

- PyTorch's SparseAdam: `optimizer.step()` with the gradient of an
  `Embedding(sparse=True)`, a sparse tensor that is not yet coalesced.
- PyTorch's fused Adam, on a GPU: the rows summed into a dense gradient, and the step.
- FBGEMM: `backward()`, which includes the optimizer's step, after a forward pass that
  has already read the rows of the batch. All tables are one module.
- TensorFlow: summing duplicates and the kernel `ResourceSparseApplyAdagradV2`.
"""

import importlib
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np

from benchmarks.measure import Side
from benchmarks.steps import ON_GPU, RATE, only_on_cpu, torch_device, torch_ready
from benchmarks.workload import Batches, Workload


def sparse_adam(work: Workload, data: Batches) -> Side:
    """PyTorch's lazy Adam."""
    torch, weights, rows, stream = torch_tables(work, data)
    optimizer = torch.optim.SparseAdam(weights, lr=RATE)

    def prepare() -> Callable[[], object]:
        for weight, ids, part in zip(weights, next(stream), rows, strict=True):
            weight.grad = torch.sparse_coo_tensor(
                ids[None], part, weight.shape, check_invariants=False
            )
        return torch_ready(optimizer.step)

    return prepare


def dense_adam(work: Workload, data: Batches) -> Side:
    """PyTorch's fused Adam on the whole table."""
    if not ON_GPU:
        raise ImportError("it is compared on a GPU only.")
    torch, weights, rows, stream = torch_tables(work, data)
    optimizer = torch.optim.Adam(weights, lr=RATE, fused=True)

    def step(batch: list[Any]) -> None:
        for weight, ids, part in zip(weights, batch, rows, strict=True):
            weight.grad = torch.zeros_like(weight).index_add_(0, ids, part)
        optimizer.step()

    def prepare() -> Callable[[], object]:
        batch = next(stream)
        return torch_ready(lambda: step(batch))

    return prepare


def torch_tables(
    work: Workload, data: Batches
) -> tuple[Any, list[Any], list[Any], Iterator[list[Any]]]:
    """PyTorch, tables of ones, the rows of gradients and batch after batch of ids."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    device = torch_device()
    shape = work.num_rows, work.dim
    tables = [torch.ones(shape, device=device) for _ in range(work.tables)]
    rows = [torch.from_numpy(part).to(device) for part in data.rows]
    ids = [[torch.from_numpy(i).to(device) for i in batch] for batch in data.ids]
    return torch, tables, rows, cycle(ids)


def fbgemm(optimizer: str) -> Callable[[Workload, Batches], Side]:
    """FBGEMM's tables on CPU with one of its optimizers, and bags of one id each."""

    def make(work: Workload, data: Batches) -> Side:
        only_on_cpu()
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
    only_on_cpu()
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
