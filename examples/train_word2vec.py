"""Word vectors from Python's own documentation, with row-sparse steps.

    python examples/train_word2vec.py

trains skip-gram with negative sampling on text that every Python installation has:
the docstrings of the standard library and the topics of `help()`. A mini-batch has a
few words out of thousands, and a step touches only the rows of these words, in the
tables of vectors and in the optimizer's slots. `--dense` trains the same loss with
dense gradients. At the end it prints the nearest neighbours of some words, draws a
picture, and compares the speed of both ways on tables of this vocabulary, which is so
small that dense steps are as fast, and of larger ones.
"""

import argparse
import ast
import contextlib
import functools
import itertools
import math
import os
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib import pyplot as plt
from matplotlib.transforms import Bbox
from tqdm import tqdm

import monolith_optax

# Each optimizer with a peak learning rate that suits this problem.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float]] = {
    "adamom": (functools.partial(monolith_optax.adamom, mom_decay=0.9), 0.01),
    "rmsprop": (functools.partial(monolith_optax.rmsprop, beta1=0.9), 0.002),
    "rmsprop_v2": (
        functools.partial(monolith_optax.rmsprop, beta1=0.9, use_v2=True),
        0.02,
    ),
    "adam": (optax.adam, 0.01),
}
WAYS = ("row-sparse", "dense")
NO_DOCUMENTATION = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
MIN_COUNT = 3  # rarer words are left out
MIN_COUNT_OF_NEIGHBOURS = 30  # vectors of rarer words say little
FREQUENT = 1e-3  # words that are a larger share of the text are thinned out
WINDOW = 5  # words on each side
NEGATIVES_PER_PAIR = 5
NEGATIVES_PER_BATCH = 64  # drawn once for all pairs, each with a smaller weight
QUERIES = ("file", "string", "thread", "list", "exception", "socket", "integer", "date")
POINTS = 50  # of the loss curve
TIMED_STEPS = 20
TIMES_AS_MANY_WORDS = (1, 10, 50)

Params = dict[str, jax.Array]
Step = Callable[..., tuple[Params, optax.OptState, jax.Array]]


class Corpus(NamedTuple):
    """Texts as word ids. Id 0 is the most frequent word; `counts` has one per word."""

    words: list[str]
    counts: np.ndarray
    texts: list[np.ndarray]


class Batch(NamedTuple):
    """Words, shape (batch,), and those around them, shape (batch, 2 * WINDOW).

    A -1 stands where there is no word, before the start or after the end of a text.
    """

    centers: np.ndarray
    contexts: np.ndarray


def docstrings() -> Iterator[str]:
    """All docstrings in the sources of the standard library, without importing it."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if NO_DOCUMENTATION.isdisjoint(path.relative_to(library).parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(
                    node,
                    ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
                ):
                    yield ast.get_docstring(node) or ""


def load_corpus(texts: Iterable[str]) -> Corpus:
    """Splits texts into lower-case words and numbers them by frequency."""
    split = [re.findall("[a-z]+", text.lower()) for text in texts]
    counter = Counter(itertools.chain.from_iterable(split))
    kept = [(w, n) for w, n in counter.most_common() if n >= MIN_COUNT and len(w) > 1]
    words, counts = zip(*kept, strict=True)
    ids = {word: i for i, word in enumerate(words)}
    numbered = [np.array([ids[w] for w in text if w in ids], int) for text in split]
    return Corpus(list(words), np.array(counts), numbered)


def batches(corpus: Corpus, batch_size: int, seed: int) -> Iterator[Batch]:
    """Shuffled mini-batches without end; each epoch thins the text out again."""
    rng = np.random.default_rng(seed)
    excess = corpus.counts / corpus.counts.sum() / FREQUENT
    keep = np.minimum(1, np.sqrt(1 / excess))
    around = np.delete(np.arange(-WINDOW, WINDOW + 1), WINDOW)
    gap = np.full(WINDOW, -1)
    while True:
        parts = [gap]
        for text in corpus.texts:
            parts += [text[rng.random(len(text)) < keep[text]], gap]
        tokens = np.concatenate(parts).astype(np.int32)
        positions = rng.permutation(np.flatnonzero(tokens >= 0))
        if len(positions) < batch_size:
            sys.exit(
                f"--batch-size must be at most {len(positions)}, the number of words "
                f"after thinning out the text, not {batch_size}."
            )
        for start in range(0, len(positions) - batch_size + 1, batch_size):
            chosen = positions[start : start + batch_size]
            yield Batch(tokens[chosen], tokens[chosen[:, None] + around])


def loss_fn(params: Any, batch: Batch, negatives: jax.Array) -> jax.Array:
    """The loss summed over all pairs. Where there is no word it looks up no row."""
    centers = params["input"][batch.centers].astype(jnp.float32)
    contexts = (
        params["output"]
        .at[batch.contexts]
        .get(mode="fill", fill_value=0, wrap_negative_indices=False)
        .astype(jnp.float32)
    )
    others = params["output"][negatives].astype(jnp.float32)
    is_pair = batch.contexts >= 0
    positive = jax.nn.softplus(-jnp.einsum("bd,bcd->bc", centers, contexts))
    negative = jax.nn.softplus(centers @ others.T).mean(1)
    per_pair = positive + NEGATIVES_PER_PAIR * negative[:, None]
    return jnp.sum(jnp.where(is_pair, per_pair, 0))


def init_params(num_words: int, dim: int, seed: int, dtype: str) -> Params:
    """Small random vectors for words in the middle, zeros for the words around them."""
    shape = (num_words, dim)
    vectors = jax.random.uniform(jax.random.key(seed), shape, minval=-0.5, maxval=0.5)
    return {"input": (vectors / dim).astype(dtype), "output": jnp.zeros(shape, dtype)}


def compiler_options() -> dict[str, str | bool] | None:
    """Keeps steps on bfloat16 tables in place, which JAX 0.10 on CPU does not."""
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_disable_hlo_passes": "float-normalization-bf16"} if on_cpu else None


def make_step(tx: optax.GradientTransformation, way: str, corpus: Corpus) -> Step:
    """A jitted training step that returns params, state and the loss per pair."""
    shares = np.cumsum(corpus.counts**0.75)
    cumulative = jnp.asarray(shares / shares[-1], jnp.float32)
    if way == "dense":
        value_and_grad = jax.value_and_grad(loss_fn)
    else:
        tables = {"input": True, "output": True}
        value_and_grad = monolith_optax.value_and_row_grad(loss_fn, tables)

    # Donated, so that it writes into the old arrays instead of copying them.
    @functools.partial(
        jax.jit, donate_argnums=(0, 1), compiler_options=compiler_options()
    )
    def step(
        params: Params, state: optax.OptState, batch: Batch, key: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        uniform = jax.random.uniform(key, (NEGATIVES_PER_BATCH,))
        negatives = jnp.searchsorted(cumulative, uniform, side="right")
        loss, gradients = value_and_grad(params, batch, negatives)
        updates, state = tx.update(gradients, state, params)
        params = monolith_optax.apply_updates(params, updates)
        return params, state, loss / jnp.sum(batch.contexts >= 0)

    return step


def train(
    step: Step, params: Params, state: Any, stream: Iterator[Batch], keys: jax.Array
) -> tuple[Params, list[tuple[int, float]]]:
    """Returns the trained parameters and the loss curve as (step, loss) pairs."""
    curve, losses = [], []
    between = max(1, len(keys) // POINTS)
    with tqdm(desc="training", unit=" words", unit_scale=True) as progress:
        for number, (key, batch) in enumerate(zip(keys, stream, strict=False), start=1):
            if number == 1:
                progress.reset(len(keys) * len(batch.centers))
            params, state, loss = step(params, state, batch, key)
            losses.append(loss)
            if number % between == 0 or number == len(keys):
                curve.append((number, float(np.mean(jax.device_get(losses)))))
                progress.set_postfix(loss=f"{curve[-1][1]:.3f}", refresh=False)
                progress.update(len(losses) * len(batch.centers))
                losses = []
    return params, curve


def words_per_second(
    step: Step, params: Params, state: Any, stream: Iterator[Batch]
) -> float:
    """The median speed of a step that is already compiled."""
    key = jax.random.key(0)
    seconds = []
    for batch in itertools.islice(stream, TIMED_STEPS + 1):
        start = time.perf_counter()
        params, state, loss = step(params, state, batch, key)
        loss.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return float(len(batch.centers) / np.median(seconds[1:]))


def neighbours(
    vectors: np.ndarray, corpus: Corpus, count: int = 6
) -> dict[str, list[str]]:
    """For each query, the words whose vectors point most nearly the same way."""
    result = {}
    common = vectors[corpus.counts >= MIN_COUNT_OF_NEIGHBOURS]  # the first rows
    for query in filter(corpus.words.__contains__, QUERIES):
        similarity = common @ vectors[corpus.words.index(query)]
        nearest = [corpus.words[i] for i in np.argsort(-similarity)]
        result[query] = [word for word in nearest if word != query][:count]
    return result


def draw_map(
    axes: Any, vectors: np.ndarray, corpus: Corpus, groups: dict[str, list[str]]
) -> None:
    """Draws the first two principal components of some words."""
    group_of = {query: number for number, query in enumerate(groups)}
    for query, nearest in groups.items():
        for word in nearest:
            group_of.setdefault(word, group_of[query])
    cloud = vectors[list(map(corpus.words.index, group_of))]
    cloud = cloud - cloud.mean(0)
    _, _, components = np.linalg.svd(cloud, full_matrices=False)
    points = cloud @ components[:2].T
    axes.scatter(*points.T, s=12, c=[f"C{number}" for number in group_of.values()])
    axes.margins(0.15, 0.1)
    axes.set(
        title="Words and their neighbours",
        xlabel="first principal component",
        ylabel="second principal component",
        xticks=[],
        yticks=[],
    )
    axes.figure.draw_without_rendering()  # from here on extents are final
    taken = [Bbox([point - 4, point + 4]) for point in axes.transData.transform(points)]
    for (word, number), point in zip(group_of.items(), points, strict=True):
        weight = "bold" if word in groups else "normal"
        label(axes, word, point, taken, color=f"C{number}", weight=weight, size=9)


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


def plot(
    curve: list[tuple[int, float]],
    vectors: np.ndarray,
    corpus: Corpus,
    groups: dict[str, list[str]],
    path: str,
) -> None:
    """Draws the loss and the map of words."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5.5), width_ratios=[2, 3], dpi=100, layout="constrained"
    )
    left.plot(*np.transpose(curve))
    left.set(xlabel="step", ylabel="loss per pair", title="Skip-gram on Python's docs")
    draw_map(right, vectors, corpus, groups)
    figure.savefig(path)
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
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamom",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--dense", action="store_true", help="train with dense gradients"
    )
    parser.add_argument(
        "--dim",
        type=at_least(2),
        default=64,
        help="length of a vector (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=10000, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=128,
        help="words per step (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive,
        help="peak of a linear decay (default: "
        + ", ".join(f"{name} {rate:g}" for name, (_, rate) in OPTIMIZERS.items())
        + ")",
    )
    parser.add_argument(
        "--table-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the vectors; bfloat16 is rounded stochastically "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="of vectors and mini-batches (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="at most 200 steps, on less text"
    )
    parser.add_argument(
        "--plot",
        type=picture,
        metavar="PATH",
        default="train_word2vec.png",
        help="the picture (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Trains, prints neighbours and speeds, and saves the picture."""
    mpl.use("Agg")  # pictures go to files, so no screen is needed
    args = parse_args()

    texts = topics.values() if args.quick else [*docstrings(), *topics.values()]
    corpus = load_corpus(texts)
    num_words = len(corpus.words)
    print(f"{corpus.counts.sum()} words of text, {num_words} of them different.")
    make, default_rate = OPTIMIZERS[args.optimizer]
    peak = default_rate if args.learning_rate is None else args.learning_rate
    num_steps = min(args.steps, 200) if args.quick else args.steps
    tx = make(optax.linear_schedule(peak, 0.0, num_steps))
    if args.table_dtype == "bfloat16":
        tx = monolith_optax.stochastic_rounding(tx, args.seed)
    steps = {
        "row-sparse": make_step(monolith_optax.lazy_rows(tx), "row-sparse", corpus),
        "dense": make_step(tx, "dense", corpus),
    }
    way = "dense" if args.dense else "row-sparse"

    stream = batches(corpus, args.batch_size, args.seed)
    params = init_params(num_words, args.dim, args.seed, args.table_dtype)
    megabytes = sum(table.nbytes for table in params.values()) / 1e6
    print(f"The tables have {megabytes:.1f} MB in {args.table_dtype}.")
    keys = jax.random.split(jax.random.key(args.seed), num_steps)
    params, curve = train(steps[way], params, tx.init(params), stream, keys)

    vectors = np.asarray(params["input"], np.float32)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = neighbours(vectors, corpus)
    print("\nNearest neighbours:")
    for query, nearest in groups.items():
        print(f"{query:>10}: {', '.join(nearest)}")
    plot(curve, vectors, corpus, groups, args.plot)
    print(f"\nSaved the loss curve and a map of words as {args.plot}.")

    print("\nWords per second, by the number of words in the vocabulary:")
    print(f"{'rows':>9}  {WAYS[0]:>10}  {WAYS[1]:>10}")
    for times in TIMES_AS_MANY_WORDS:
        speeds = []
        for name in WAYS:
            params = init_params(
                num_words * times, args.dim, args.seed, args.table_dtype
            )
            state = tx.init(params)
            speeds.append(words_per_second(steps[name], params, state, stream))
        print(f"{num_words * times:9,}  {speeds[0]:10,.0f}  {speeds[1]:10,.0f}")
    print(
        f"With {num_words * times:,} words a row-sparse step is "
        f"{speeds[0] / speeds[1]:.1f} times as fast as a dense one."
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
