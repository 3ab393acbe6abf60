"""Linear regression on real data with Monolith's optimizers and optax.adam.

    python examples/train_linear.py

predicts how far diabetes has progressed from ten measurements of 442 patients, the
data set that scikit-learn ships. Every optimizer comes last in an optax chain and
trains on mini-batches in a jitted, donated step. The exact least-squares solution shows
how close each of them gets.
"""

import argparse
import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib import pyplot as plt
from matplotlib.ticker import StrMethodFormatter
from sklearn.datasets import load_diabetes
from tqdm import tqdm

import monolith_optax

# Each optimizer with a peak learning rate that suits this problem.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float]] = {
    "adamom": (functools.partial(monolith_optax.adamom, mom_decay=0.9), 0.1),
    "rmsprop": (functools.partial(monolith_optax.rmsprop, beta1=0.9), 0.01),
    "rmsprop_v2": (
        functools.partial(monolith_optax.rmsprop, beta1=0.9, use_v2=True),
        0.1,
    ),
    "adam": (optax.adam, 0.1),
}
BATCH_SIZE = 64
STEPS_BETWEEN_POINTS = 20


class Data(NamedTuple):
    """Standardised measurements `x` of shape (patients, 10) and outcomes `y`."""

    x: jax.Array
    y: jax.Array


def load_data(seed: int) -> tuple[Data, Data]:
    """The data set, split at random: four fifths for training, the rest for testing."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = np.split(order, [len(x) * 4 // 5])
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    return Data(x[train], y[train]), Data(x[test], y[test])


def mean_squared_error(params: dict[str, jax.Array], data: Data) -> jax.Array:
    """The loss: 1 for a model that always predicts the mean."""
    return jnp.mean((data.x @ params["w"] + params["b"] - data.y) ** 2)


def least_squares(data: Data) -> dict[str, jax.Array]:
    """The exact solution."""
    x = np.column_stack([data.x, np.ones(len(data.x))]).astype(np.float64)
    solution, *_ = np.linalg.lstsq(x, np.asarray(data.y, np.float64))
    return {"w": jnp.asarray(solution[:-1]), "b": jnp.asarray(solution[-1])}


def train(
    name: str, data: Data, *, steps: int, learning_rate: float | None, seed: int
) -> tuple[dict[str, jax.Array], list[tuple[int, float]]]:
    """Returns the trained parameters and the loss curve as (step, loss) pairs."""
    make, default_rate = OPTIMIZERS[name]
    peak = default_rate if learning_rate is None else learning_rate
    schedule = optax.cosine_decay_schedule(peak, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), make(schedule))

    # Donated, so that it writes into the old arrays instead of copying them.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: dict[str, jax.Array], state: optax.OptState, key: jax.Array
    ) -> tuple[Any, Any]:
        chosen = jax.random.choice(key, len(data.x), (BATCH_SIZE,), replace=False)
        batch = Data(data.x[chosen], data.y[chosen])
        gradients = jax.grad(mean_squared_error)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    loss = jax.jit(mean_squared_error)
    params = {"w": jnp.zeros(data.x.shape[1]), "b": jnp.zeros(())}
    state = tx.init(params)
    curve = [(0, float(loss(params, data)))]
    keys = jax.random.split(jax.random.key(seed), steps)
    with tqdm(keys, desc=f"{name:>10}", unit=" steps") as progress:
        for number, key in enumerate(progress, start=1):
            params, state = step(params, state, key)
            if number % STEPS_BETWEEN_POINTS == 0 or number == steps:
                curve.append((number, float(loss(params, data))))
                progress.set_postfix(train_error=f"{curve[-1][1]:.4f}", refresh=False)
    return params, curve


def plot(curves: dict[str, list[tuple[int, float]]], best: float, path: str) -> None:
    """Draws each curve, as its distance from least squares, in front of the others."""
    figure, panels = plt.subplots(
        1,
        len(curves),
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(2 + 2.5 * len(curves), 4),
        layout="constrained",
    )
    for axes, name in zip(panels.flat, curves, strict=True):
        for other in [*curves, name]:  # its own once more, on top
            number, loss = np.transpose(curves[other])
            color = "C0" if other == name else "lightgray"
            axes.plot(number, 100 * (loss / best - 1), color=color)
        axes.axhline(1.0, color="black", linestyle=":")
        axes.set(yscale="log", xlabel="step", title=name)
    panels[0, 0].set_ylabel("training error above least squares")
    panels[0, 0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}%"))
    figure.suptitle("Linear regression on the diabetes data set")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def at_least(least: int) -> Callable[[str], int]:
    """Makes whole numbers of an option's text."""

    def number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if (value := int(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, not {text!r}"
        )

    return number


def positive(text: str) -> float:
    """Makes a positive number of an option's text."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")


def picture(text: str) -> str:
    """Checks that a picture can be written before it takes minutes to have one."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg: {text!r}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written: {text!r}")
    return text


def parse_args() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, help="(default: all of them)"
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=2000,
        help="with each optimizer (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive,
        help="peak of a cosine decay (default: "
        + ", ".join(f"{name} {rate:g}" for name, (_, rate) in OPTIMIZERS.items())
        + ")",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="of the split and the mini-batches (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="at most 100 steps")
    parser.add_argument(
        "--plot",
        type=picture,
        metavar="PATH",
        default="train_linear.png",
        help="the picture (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Trains, prints the errors and saves the picture."""
    mpl.use("Agg")  # pictures go to files, so no screen is needed
    args = parse_args()

    train_data, test_data = load_data(args.seed)
    solutions = {"least squares": least_squares(train_data)}
    curves = {}
    for name in [args.optimizer] if args.optimizer else OPTIMIZERS:
        solutions[name], curves[name] = train(
            name,
            train_data,
            steps=min(args.steps, 100) if args.quick else args.steps,
            learning_rate=args.learning_rate,
            seed=args.seed,
        )

    best = float(mean_squared_error(solutions["least squares"], train_data))
    print("\nMean squared errors; 1 is a model that always predicts the mean.")
    print(f"{'':15}train error  test error  train error above least squares")
    for name, params in solutions.items():
        error = float(mean_squared_error(params, train_data))
        test_error = float(mean_squared_error(params, test_data))
        print(f"{name:15}{error:11.4f}{test_error:12.4f}{error / best - 1:33.2%}")
    plot(curves, best, args.plot)
    print(f"\nSaved the loss curves as {args.plot}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
