"""RowCache beside a table that holds everything: `python -m benchmarks.row_cache`.

A stream of new ids fills the cache, then batches are drawn from all ids, some of which
are drawn often or all equally. Prints steps, hits and moves a second, and bytes per id,
and first what the store and the index do in a second of processor time.

With `--snapshots DIR` it saves when the cache is full. A run that is killed and started
again continues from there, and prints the same sums of losses to the last bit.
`--table` trains a table that holds everything instead.
"""

import argparse
import functools
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from monolith_optax import (
    IdMap,
    RowCache,
    embedding,
    lazy_rows,
    uniform_rows,
    value_and_row_grad,
)
from monolith_optax._ids.index import IdIndex
from monolith_optax._ids.row_store import RowStore

KINDS = ("logarithmic", "uniform")


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ids", type=int, default=2_000_000)
    add("--capacity", type=int, default=100_000, help="rows on the device")
    add("--columns", type=int, default=16)
    add("--optimizer", default="rowwise_adagrad", help="of monolith_optax.embedding")
    add("--batch", type=int, default=8_192)
    add("--steps", type=int, default=200, help="of each kind of batches")
    add("--depth", type=int, default=2)
    add("--folder", help="of the store; default: in memory")
    add("--snapshots", type=Path, metavar="DIR", help="saves there, and continues")
    add("--table", action="store_true", help="train a table that holds everything")
    return parser.parse_args()


def raw_ids(numbers: np.ndarray) -> np.ndarray:
    """Ids as hashes have them."""
    return (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def drawn(args: argparse.Namespace, kind: str) -> Iterator[np.ndarray]:
    """Batches of ids that have been seen."""
    for step in range(args.steps):
        random = np.random.default_rng((KINDS.index(kind), step)).random(args.batch)
        size = args.ids**random if kind == KINDS[0] else args.ids * random
        yield raw_ids(size.astype(np.int64) % args.ids)


def make_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """A jitted training step."""

    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.mean((params["items"][rows].sum(1) - 1) ** 2)

    grad = value_and_row_grad(loss, {"items": True})

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rows: Any) -> Any:
        value, gradients = grad(params, rows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def parts(args: argparse.Namespace) -> None:
    """The index and the store by themselves."""
    ids = raw_ids(np.arange(args.ids + 1))
    index = IdIndex()
    index.insert(1, len(ids), ids)
    rng = np.random.default_rng(0)
    wanted = ids[rng.integers(1, len(ids), (100, args.batch))]
    start = time.process_time()
    for some in wanted:
        index.find(some, ids)
    rate = wanted.size / (time.process_time() - start)
    print(f"index: {rate / 1e6:.1f} million lookups a second of {args.ids:,} ids")
    record = np.dtype([("weights", "f4", 64), ("slots", "f4", (2, 64))])
    store = RowStore(record, args.folder)
    store.grow(min(args.ids, 2_000_000))
    rows = rng.permutation(len(store))
    store.write(rows, store.read(rows))  # so that all of its memory is there
    moved = rows[: 20 * args.batch].reshape(-1, args.batch)
    start = time.process_time()
    for some in moved:
        store.write(some, store.read(some))
    rate = moved.size / (time.process_time() - start)
    print(
        f"store: {rate:,.0f} rows a second read and written, of 64 columns and two "
        f"slots, {len(store):,} rows",
        flush=True,
    )


def clocks() -> np.ndarray:
    """Seconds, and seconds of processor time of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


def report(
    name: str,
    start: np.ndarray,
    losses: list[Any],
    before: Any = None,
    after: Any = None,
) -> None:
    """What a loop has done since a start."""
    seconds, processor = (clocks() - start).tolist()
    line = (
        f"{name}: {len(losses) / seconds:.1f} steps a second, "
        f"{1e3 * processor / len(losses):.1f} ms of processor time each"
    )
    if after is not None:
        done = dict(
            zip(after._fields, np.subtract(after, before).tolist(), strict=True)
        )
        line += (
            f", hits {done['hits'] / done['lookups']:.1%}, a second "
            f"{done['new'] / seconds:,.0f} new, {done['moved_in'] / seconds:,.0f} in, "
            f"{done['moved_out'] / seconds:,.0f} out"
        )
    total = np.sum(jax.device_get(losses), dtype=np.float32)
    print(f"{line}, losses {total.tobytes().hex()}", flush=True)


def train_cache(args: argparse.Namespace, tx: Any, step: Callable[..., Any]) -> None:
    """Fills a cache, and draws from it."""
    params: Any = {"items": jnp.zeros((args.capacity, args.columns))}
    state = tx.init(params)
    cache = RowCache(
        tx, params, "item", init=uniform_rows(0.05, seed=1), folder=args.folder
    )

    def loop(name: str, batches: Iterator[np.ndarray]) -> None:
        nonlocal params, state
        losses, before, start = [], cache.counts, clocks()
        for number, (_, rows, moves) in enumerate(
            cache.prefetch(batches, lambda ids: {"item": ids}, depth=args.depth), 1
        ):
            params, state = cache.move(params, state, moves)
            params, state, value = step(params, state, rows["item"])
            losses.append(value)
            if number % 500 == 0:
                jax.block_until_ready(value)
                rate = number / (clocks() - start)[0]
                print(f"  {name}: {number} steps, {rate:.1f} a second", flush=True)
        jax.block_until_ready(params)
        report(name, start, losses, before, cache.counts)

    start = time.perf_counter()
    if args.snapshots and any(args.snapshots.glob("snapshot-*")):
        params, state = cache.restore(args.snapshots, params, state)
        print(f"restored in {time.perf_counter() - start:.0f} s", flush=True)
    else:
        numbers = range(0, args.ids, args.batch)
        every = (np.arange(n, min(n + args.batch, args.ids)) for n in numbers)
        loop("new ids", map(raw_ids, every))
        if args.snapshots:
            start = time.perf_counter()
            cache.save(args.snapshots, params, state)
            print(f"saved in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{cache.num_ids['item']:,} ids, {cache.nbytes / args.ids:.1f} bytes per id")
    for kind in KINDS:
        loop(kind, drawn(args, kind))


def train_table(args: argparse.Namespace, tx: Any, step: Callable[..., Any]) -> None:
    """Draws from a table that holds everything."""
    params: Any = {"items": jnp.zeros((args.ids + 1, args.columns))}
    state, ids = tx.init(params), IdMap(args.ids + 1)
    for start in range(0, args.ids, 2**20):
        ids.assign(raw_ids(np.arange(start, min(start + 2**20, args.ids))))
    params, state, _ = step(params, state, np.zeros(args.batch, np.int32))
    for kind in KINDS:
        losses, begin = [], clocks()
        for raw in drawn(args, kind):
            rows, _ = ids.assign(raw)
            params, state, value = step(params, state, rows)
            losses.append(value)
        jax.block_until_ready(params)
        report(f"{kind}, one table", begin, losses)


def main() -> None:
    """Measures, and says how much memory the process took."""
    args = parse_args()
    tx = lazy_rows(getattr(embedding, args.optimizer)(0.01))
    if args.table:
        train_table(args, tx, make_step(tx))
    else:
        parts(args)
        train_cache(args, tx, make_step(tx))
    # With a store in files, pages that the system may drop count as well.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"at most {peak:.1f} GiB resident")


if __name__ == "__main__":
    main()
