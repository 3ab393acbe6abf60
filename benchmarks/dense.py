"""Steps on large dense parameters, where only memory bandwidth matters."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Case, interleave
from benchmarks.steps import ON_GPU, OPTIMIZERS, Step, copy, peers


def main(*, quick: bool) -> list[Case]:
    """One leaf of 25 million numbers, and a tree like a transformer's of 75 million.

    On a GPU, where starting a step takes as long as moving megabytes, 250 and 344.
    """
    size, width, blocks = (100_000, 16, 2) if quick else (25_000_000, 640, 12)
    if ON_GPU and not quick:
        size, width, blocks = 250_000_000, 1024, 24
    dtypes = jnp.float32, jnp.bfloat16
    return [compare(jnp.ones(size, dtype), quick) for dtype in dtypes] + [
        compare(transformer(width, blocks, dtype), quick) for dtype in dtypes
    ]


def compare(params: Any, quick: bool) -> Case:
    """Times all sides on one tree of parameters."""
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.1), params)
    steps = {
        title: Step(make(), params, gradients) for title, make in OPTIMIZERS.items()
    }
    sides = {title: step.side() for title, step in steps.items()}
    others = peers(params, gradients)
    leaves = jax.tree.leaves(params)
    # The peers keep two slots in the parameters' dtype.
    theirs = 7 * sum(leaf.nbytes for leaf in leaves)
    moved = {side: step.bytes_moved() for side, step in steps.items()}
    moved |= dict.fromkeys(others, theirs)
    copying = copy(max(moved.values()))
    moved["copy"] = copying.bytes_moved()
    sides |= others | {"copy": copying.side()}
    times = interleave(sides, rounds=2 if quick else 8, runs=2)
    millions = sum(leaf.size for leaf in leaves) / 1e6
    name = "one leaf" if len(leaves) == 1 else f"{len(leaves)} leaves"
    return Case(
        "dense",
        f"{millions:.3g} million in {name}, {leaves[0].dtype}",
        times,
        bytes_moved=moved,
        bandwidth=moved["copy"] / statistics.median(times["copy"]),
    )


def transformer(width: int, blocks: int, dtype: Any) -> Any:
    """The parameters of some blocks and their embedding: 196 arrays for twelve."""

    def dense(rows: int, columns: int) -> dict[str, jax.Array]:
        return {"kernel": jnp.ones((rows, columns), dtype), "bias": norm(columns)}

    def norm(size: int) -> jax.Array:
        return jnp.ones(size, dtype)

    def block() -> dict[str, Any]:
        return {
            "attention": {name: dense(width, width) for name in "qkvo"},
            "mlp": {"up": dense(width, 4 * width), "down": dense(4 * width, width)},
            "norms": [{"scale": norm(width), "bias": norm(width)} for _ in range(2)],
        }

    return {
        "embedding": jnp.ones((width * 40, width), dtype),
        "position": jnp.ones((width, width), dtype),
        "blocks": [block() for _ in range(blocks)],
        "norm": {"scale": norm(width), "bias": norm(width)},
    }
