"""A DLRM as in Criteo's contest: its tables, its batches and its loss in JAX."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

RATE = 1e-3  # of Adam
TABLE_RATE = 1e-2  # of Adagrad
START = 0.1  # of Adagrad's sums of squares
INPUTS = 13  # numbers that are not ids


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
      sizes: the number of rows of each table.
      dim: the length of a row.
      batch: how many samples a step has.
      length: the mean number of ids in a bag; None for one id each.
      bottom: the widths of the MLP on numbers, before `dim`.
      top: the widths of the MLP on products, before 1.
    """

    sizes: tuple[int, ...]
    dim: int
    batch: int
    length: float | None
    bottom: tuple[int, ...] = (128, 64)
    top: tuple[int, ...] = (128, 64)

    def __str__(self) -> str:
        """Such as 'one id each' or 'bags of 3.2 ids'."""
        return "one id each" if self.length is None else f"bags of {self.length} ids"

    def tables(self) -> list[np.ndarray]:
        """The tables at the start."""
        rng = np.random.default_rng(1)
        return [
            (rng.random((size, self.dim), np.float32) - np.float32(0.5)) / 5
            for size in self.sizes
        ]

    def mlps(self) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        """Matrices and biases at the start."""
        rng = np.random.default_rng(2)
        vectors = len(self.sizes) + 1
        inputs = self.dim + vectors * (vectors - 1) // 2
        widths = {
            "bottom": (INPUTS, *self.bottom, self.dim),
            "top": (inputs, *self.top, 1),
        }
        return {
            name: [
                (
                    rng.normal(0, before**-0.5, (before, after)).astype(np.float32),
                    np.zeros(after, np.float32),
                )
                for before, after in pairwise(sizes)
            ]
            for name, sizes in widths.items()
        }


class Batch(NamedTuple):
    """A batch in NumPy: bags of ids for each table, numbers and labels."""

    ids: list[np.ndarray]
    offsets: list[np.ndarray]
    numbers: np.ndarray
    labels: np.ndarray


def batches(job: Job, count: int) -> list[Batch]:
    """Batches whose ids follow Zipf's law, and whose bags are mostly short."""
    rng = np.random.default_rng(0)
    # Otherwise frequent rows would be neighbours.
    scattered = [rng.permutation(size) for size in job.sizes]

    def one() -> Batch:
        lengths = np.ones((len(job.sizes), job.batch), np.int64)
        if job.length is not None:
            lengths = rng.geometric(1 / job.length, lengths.shape)
        ids = []
        for size, order, of_table in zip(job.sizes, scattered, lengths, strict=True):
            ranks = np.exp(rng.uniform(0, np.log(size), of_table.sum()))
            ids.append(order[ranks.astype(np.int64)])
        return Batch(
            ids,
            [np.cumsum([0, *of_table]) for of_table in lengths],
            rng.normal(size=(job.batch, INPUTS)).astype(np.float32),
            rng.integers(0, 2, job.batch).astype(np.float32),
        )

    return [one() for _ in range(count)]


def loss(mlps: Any, rows: jax.Array, numbers: jax.Array, labels: jax.Array) -> Any:
    """The loss, from the sums of bags, of shape (batch, tables, dim)."""
    bottom = _mlp(mlps["bottom"], numbers)
    products = products_of_pairs(jnp.concatenate([bottom[:, None], rows], 1))
    logits = _mlp(mlps["top"], jnp.concatenate([bottom, products], 1))[:, 0]
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


@jax.custom_vjp
def products_of_pairs(vectors: jax.Array) -> jax.Array:
    """The products of any two different vectors of a sample, each once.

    Its gradient is written out for all sides. Found by JAX, it adds the gradients of
    the pairs to zeros, one by one, and multiplies with the vectors twice.
    """
    products = jnp.einsum("bik,bjk->bij", vectors, vectors)
    return _columns(products.reshape(len(vectors), -1), pairs(vectors.shape[1]))


def _products_forward(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    return products_of_pairs(vectors), vectors


def _products_backward(vectors: jax.Array, gradients: jax.Array) -> tuple[jax.Array]:
    count = vectors.shape[1]
    padded = jnp.pad(gradients, ((0, 0), (0, 1)))
    of_products = _columns(padded, places(count)).reshape(-1, count, count)
    return (jnp.einsum("bij,bjk->bik", of_products, vectors),)


products_of_pairs.defvjp(_products_forward, _products_backward)


def _columns(array: jax.Array, which: np.ndarray) -> jax.Array:
    return array.at[:, which].get(mode="promise_in_bounds")


def pairs(count: int) -> np.ndarray:
    """Which of the products of all vectors are of two different ones, each once."""
    left, right = np.triu_indices(count, 1)
    return left * count + right


def places(count: int) -> np.ndarray:
    """Where each of the products of all vectors is in `pairs`, or would be after them.

    A product is there with either vector first; those of a vector with itself are not.
    """
    number = count * (count - 1) // 2
    found = np.full((count, count), number)
    found[np.triu_indices(count, 1)] = np.arange(number)
    either: np.ndarray = np.minimum(found, found.T)
    return either.reshape(-1)


def _mlp(layers: Any, x: jax.Array) -> jax.Array:
    for i, (matrix, bias) in enumerate(layers):
        x = x @ matrix + bias
        x = jax.nn.relu(x) if i < len(layers) - 1 else x
    return x
