"""Steps on the rows of a batch: ours, those of peers with the same optimizer, dense.

Every step is timed until its results are ready, the sides take turns in one process,
and the gradients of the looked-up rows are ready before the clock starts. What is
timed:

- ours: summing duplicates, the optimizer and `optax.apply_updates`, jitted and donated.
  A dense step sums the rows into a table of zeros, as JAX's own gradient does, and
  updates the whole table.
- the peers: see `benchmarks.row_peers`.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle

import jax
import jax.numpy as jnp
import optax

from benchmarks.measure import Case, Side, interleave
from benchmarks.row_peers import dense_adam, fbgemm, sparse_adam, tensorflow_adagrad
from benchmarks.steps import ON_GPU, RATE, Step
from benchmarks.workload import Batches, Workload, batches
from monolith_optax import RowSlices, adamom, embedding, lazy_rows


@dataclass(frozen=True)
class Optimizer:
    """Ours, what dense steps use, and the peers that have the same optimizer."""

    ours: optax.GradientTransformation
    dense: Mapping[str, optax.GradientTransformation] = field(default_factory=dict)
    peers: Mapping[str, Callable[[Workload, Batches], Side]] = field(
        default_factory=dict
    )


OPTIMIZERS = {
    "optax.adam": Optimizer(
        optax.adam(RATE),
        dense={"optax.adam, dense": optax.adam(RATE)},
        peers={
            "PyTorch, SparseAdam": sparse_adam,
            "PyTorch, fused Adam, dense": dense_adam,
        },
    ),
    "adagrad": Optimizer(
        embedding.adagrad(RATE),
        dense={"optax.adagrad, dense": optax.adagrad(RATE)},
        peers={
            "FBGEMM, EXACT_ADAGRAD": fbgemm("EXACT_ADAGRAD"),
            "TensorFlow, Adagrad": tensorflow_adagrad,
        },
    ),
    "rowwise_adagrad": Optimizer(
        embedding.rowwise_adagrad(RATE),
        peers={"FBGEMM, EXACT_ROWWISE_ADAGRAD": fbgemm("EXACT_ROWWISE_ADAGRAD")},
    ),
    "adamom": Optimizer(adamom(RATE), dense={"adamom, dense": adamom(RATE)}),
}
GROWING = 10_000, 100_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000
# On CPU a dense step takes a tenth of a second from 3 million rows on.
MOST_DENSE_ROWS = 30_000_000 if ON_GPU else 3_000_000


def main(*, quick: bool) -> list[Case]:
    """One table, of growing size for two optimizers, and 26 tables."""
    growing = GROWING[:2] if quick else GROWING
    middle = 10_000 if quick else 1_000_000
    many = Workload(3, 1_000, 16, 64) if quick else Workload(26, 100_000, 16, 2048)
    return [
        compare(name, work, quick)
        for name in OPTIMIZERS
        for num_rows in (growing if name in ("optax.adam", "adagrad") else [middle])
        for work in [Workload(1, num_rows, 16, 8192)]
    ] + [compare(name, many, quick) for name in OPTIMIZERS]


def compare(name: str, work: Workload, quick: bool) -> Case:
    """Times all sides of one optimizer."""
    gc.collect()  # the tables of the case before
    optimizer, data = OPTIMIZERS[name], batches(work)
    gradients = slices(data)

    def step(tx: optax.GradientTransformation) -> Side:
        return side(Step(tx, work.ones(), gradients[0]), gradients)

    sides = {f"lazy_rows({name})": step(lazy_rows(optimizer.ours))}
    for title, peer in optimizer.peers.items():
        try:
            sides[title] = peer(work, data)
        except ImportError as error:
            print(f"{title} is left out: {error}")
    if work.tables == 1 and work.num_rows <= MOST_DENSE_ROWS:
        for title, tx in optimizer.dense.items():
            sides[title] = step(dense(tx, work.num_rows))
    times = interleave(sides, rounds=2 if quick else 12, runs=2 if quick else 8)
    return Case("rows", f"{name}, {work}", times, sizes=work.sizes())


def slices(data: Batches) -> list[list[RowSlices]]:
    """The gradients of each batch, a list over the tables."""
    rows = [jnp.asarray(part) for part in data.rows]
    return [
        [
            RowSlices(jnp.asarray(i, jnp.int32), r)
            for i, r in zip(ids, rows, strict=True)
        ]
        for ids in data.ids
    ]


def side(step: Step, gradients: list[list[RowSlices]]) -> Side:
    """The step on one batch after another."""
    stream = cycle(jax.block_until_ready(gradients))

    def prepare() -> Step:
        step.gradients = next(stream)
        return step

    return prepare


def dense(
    tx: optax.GradientTransformation, num_rows: int
) -> optax.GradientTransformation:
    """The optimizer on gradients the size of their tables, which its step sums up."""

    def summed(gradients: list[RowSlices], _: object) -> list[jax.Array]:
        return [gradient.to_dense(num_rows) for gradient in gradients]

    chained: optax.GradientTransformation = optax.chain(optax.stateless(summed), tx)
    return chained
