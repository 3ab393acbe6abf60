"""Steps on a table that devices share: `python -m benchmarks.spread`.

A step looks up a batch that is split over eight virtual devices of this machine's CPU,
and takes a step with Adagrad: on a table that each device has whole, on one that is
split by rows and left to JAX, and on one that is spread. The sides take turns.
"""

import argparse
import os
import statistics

# Read when JAX is first imported.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.measure import interleave, machine
from benchmarks.stacks import WholeStep

DEVICES, DIM, IDS_OF_DEVICE = 8, 32, 1_536
TITLES = "whole on each device", "split by rows", "spread"


def loss(table: jax.Array, ids: jax.Array) -> jax.Array:
    """That of a model without other parameters."""
    return jnp.mean((table[ids].sum(-1) - 1) ** 2)


def steps(rows: int, owners: int) -> dict[str, WholeStep]:
    """A step of each side, whose ids belong to the first owners."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    by_rows, whole = (NamedSharding(mesh, spec) for spec in (P("x"), P()))
    rng = np.random.default_rng(0)
    table = rng.normal(size=(rows, DIM)).astype(np.float32)
    most = rows * owners // DEVICES
    ids = rng.integers(0, most, DEVICES * IDS_OF_DEVICE).astype(np.int32)
    batch = jax.device_put(ids, by_rows)
    sides = zip(TITLES, (whole, by_rows, by_rows), (True, True, P("x")), strict=True)
    return {
        title: WholeStep(loss, jax.device_put(table, where), batch, tables, where)
        for title, where, tables in sides
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small table, few runs")
    quick = parser.parse_args().quick
    print(", ".join(f"{name}: {fact}" for name, fact in machine().items()))
    rows, rounds = (8_000, 2) if quick else (1_000_000, 40)
    batch = f"{DEVICES * IDS_OF_DEVICE:,} ids of {rows:,} x {DIM}"
    print(f"\n{batch}, milliseconds\n\n| ids | {' | '.join(TITLES)} |")
    print("|---" * (1 + len(TITLES)) + "|")
    for what, owners in {"of all owners": DEVICES, "of one owner": 1}.items():
        sides = {title: step.side() for title, step in steps(rows, owners).items()}
        times = interleave(sides, rounds, runs=2)
        medians = (f"{1e3 * statistics.median(times[title]):.1f}" for title in TITLES)
        print(f"| {what} | {' | '.join(medians)} |", flush=True)


if __name__ == "__main__":
    main()
