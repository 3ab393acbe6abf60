"""Steps on thousands of small leaves, where only the number of leaves matters.

Inside `optax.flatten` an optimizer keeps its slots in one buffer, and packs the
gradients into another at each step.
"""

import jax.numpy as jnp
import optax

from benchmarks.first_call import case, first_call
from benchmarks.measure import Case, interleave
from benchmarks.steps import OPTIMIZERS, Step, peers


def main(*, quick: bool) -> list[Case]:
    """The steps on 2,000 leaves of 32 numbers, and their first calls."""
    count = 20 if quick else 2000
    params = {f"leaf{i:04}": jnp.ones(32) for i in range(count)}
    gradients = {name: 0.1 * leaf for name, leaf in params.items()}
    optimizers = {title: make() for title, make in OPTIMIZERS.items()}
    optimizers["optax.flatten(adamom)"] = optax.flatten(OPTIMIZERS["adamom"]())
    steps = {title: Step(tx, params, gradients) for title, tx in optimizers.items()}
    calls = {title: [first_call(step)] for title, step in steps.items()}
    sides = {title: step.side() for title, step in steps.items()}
    times = interleave(sides | peers(params, gradients), 2 if quick else 12, runs=2)
    return [
        Case("many_leaves", f"{count:,} leaves of 32", times),
        case(f"{count:,} leaves", calls),
    ]
