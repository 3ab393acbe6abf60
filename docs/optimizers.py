"""Draws docs/optimizers.png: `python docs/optimizers.py`.

On the left the paths of the optimizers in a narrow valley, on the right how long their
steps are while the gradient stays the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax

from monolith_optax import adamom, rmsprop

STEPS = 10_000
START = (-1.8, 1.0)
CURVATURES = (1.0, 30.0)
# Each with memories of 10 and 1,000 steps, and a rate that suits the valley.
OPTIMIZERS: dict[str, tuple[Callable[[float], optax.GradientTransformation], float]] = {
    "adamom": (lambda rate: adamom(rate, 0.999, 0.9), 0.05),
    "rmsprop": (lambda rate: rmsprop(rate, 0.9, 0.999), 0.002),
    "rmsprop, use_v2": (lambda rate: rmsprop(rate, 0.9, 0.999, use_v2=True), 0.05),
    "optax.adam": (optax.adam, 0.05),
}


def path(tx: optax.GradientTransformation, steps: int) -> np.ndarray:
    """Where an optimizer goes in the valley, from its start on."""

    def loss(w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.array(CURVATURES) * w**2) / 2

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    start = jnp.array(START)
    _, places = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return np.vstack([START, places])


def step_lengths(tx: optax.GradientTransformation) -> np.ndarray:
    """How far each step goes along a gradient that is always 1."""
    w = jnp.zeros(())

    def step(state: optax.OptState, _: None) -> tuple[optax.OptState, jax.Array]:
        update, state = tx.update(jnp.ones(()), state, w)
        return state, -update

    return np.asarray(jax.lax.scan(step, tx.init(w), length=STEPS)[1])


def main() -> None:
    """Draws both panels."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (valley, lengths) = plt.subplots(
        1, 2, figsize=(12, 4.6), layout="constrained"
    )
    x, y = np.meshgrid(np.linspace(-2.1, 0.7, 200), np.linspace(-1.2, 1.3, 200))
    height = (CURVATURES[0] * x**2 + CURVATURES[1] * y**2) / 2
    levels = np.geomspace(0.03, 30, 12)
    valley.contour(x, y, height, levels, colors="0.85", linewidths=0.8)
    for title, (make, rate) in OPTIMIZERS.items():
        label = f"{title}, learning_rate={rate}"
        valley.plot(*path(make(rate), 300).T, ".-", lw=1, ms=3, label=label)
        lengths.loglog(np.arange(1, STEPS + 1), step_lengths(make(1.0)), label=title)
    valley.plot(0, 0, "k+", ms=12)
    valley.set(title="300 steps in a valley 30 times as steep in $y$ as in $x$")
    valley.set(xlabel="$x$", ylabel="$y$")
    valley.legend(fontsize=8)
    lengths.set(title="Steps along a gradient that is always the same")
    lengths.set(xlabel="step", ylabel="length of the step / learning_rate")
    lengths.grid(alpha=0.3)
    lengths.legend(fontsize=8)
    figure.savefig(Path(__file__).with_name("optimizers.png"), dpi=90)


if __name__ == "__main__":
    main()
