"""Embedding tables, and batches of ids that follow Zipf's law."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Workload(NamedTuple):
    """Tables of one shape, and how many ids a step looks up in each."""

    tables: int
    num_rows: int
    dim: int
    batch: int

    def __str__(self) -> str:
        """Such as '26 tables of 100,000 x 16, 2,048 ids each'."""
        if self.tables == 1:
            return f"{self.num_rows:,} x {self.dim}, {self.batch:,} ids"
        each = f"{self.num_rows:,} x {self.dim}, {self.batch:,} ids each"
        return f"{self.tables} tables of {each}"

    def ones(self) -> list[jax.Array]:
        """Tables of ones."""
        return [jnp.ones((self.num_rows, self.dim)) for _ in range(self.tables)]

    def sizes(self) -> dict[str, int]:
        """The numbers as a case has them."""
        return {
            "tables": self.tables,
            "rows": self.num_rows,
            "dim": self.dim,
            "ids": self.batch,
        }


class Batches(NamedTuple):
    """Gradients of batches: ids for each batch and table, rows for each table."""

    ids: list[list[np.ndarray]]
    rows: list[np.ndarray]


def batches(work: Workload) -> Batches:
    """Up to 32 batches, so that rows do not stay in the caches from step to step."""
    rng = np.random.default_rng(0)
    number = min(32, max(4, 2**22 // (work.tables * work.batch)))
    # Otherwise frequent rows would be neighbours.
    scattered = rng.permutation(work.num_rows)

    def zipf() -> np.ndarray:
        ranks = np.exp(rng.uniform(0, np.log(work.num_rows), work.batch))
        return scattered[ranks.astype(np.int64)]

    return Batches(
        [[zipf() for _ in range(work.tables)] for _ in range(number)],
        [
            rng.normal(size=(work.batch, work.dim)).astype(np.float32)
            for _ in range(work.tables)
        ],
    )
