"""Steps on thousands of small leaves, where only the number of leaves matters.

Inside `optax.flatten` an optimizer keeps its slots in one buffer, and packs the
gradients into another at each step.
"""

import jax.numpy as jnp
import optax

from benchmarks.measure import Case, interleave
from benchmarks.steps import OPTIMIZERS, Step, peers


def main(*, quick: bool) -> list[Case]:
    """2,000 leaves of 32 numbers."""
    count = 20 if quick else 2000
    params = {f"leaf{i:04}": jnp.ones(32) for i in range(count)}
    gradients = {name: 0.1 * leaf for name, leaf in params.items()}
    optimizers = {title: make() for title, make in OPTIMIZERS.items()}
    for title in "adamom", "optax.adam":
        optimizers[f"optax.flatten({title})"] = optax.flatten(OPTIMIZERS[title]())
    sides = {
        title: Step(tx, params, gradients).side() for title, tx in optimizers.items()
    }
    times = interleave(sides | peers(params, gradients), 2 if quick else 12, runs=2)
    return [Case("many_leaves", f"{count} leaves of 32", times)]
