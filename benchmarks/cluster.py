"""What a step costs each device of a large cluster: `python -m benchmarks.cluster`.

A table is split by rows over eight virtual CPU devices, and the same small step is
compiled in three ways: with dense gradients, with `lazy_rows`, and with `lazy_rows`
inside a `jax.shard_map`. Nothing is run. The figures are read from each compiled
program: the bytes of its arguments and temporaries (`memory_analysis`), the bytes that
its operations access (`cost_analysis`) and the shapes of its collectives (`as_text`).

All of these are linear in the rows that a device holds and in the ids of a batch, which
a fourth program confirms. So three programs of different sizes give the coefficients,
and the coefficients give the figures for 10^9 rows on 256 devices. This assumes that
the partitioner does the same for 256 devices as for eight, that other backends do the
same as the CPU's, and that collectives are rings: a device sends S * (n - 1) / n bytes
of an all-gathered or reduce-scattered array of S bytes, and twice as many of an
all-reduced one.

`cost_analysis` charges an in-place scatter for the whole table, although a row-sparse
step touches only some rows. That part does not depend on the batch. It is the column
"charged for in-place scatters", and it does not count as moved for the row-sparse
steps, which allocate no temporary the size of a table. The dense step really does
update all rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.compiled.read import collectives
from monolith_optax import RowSlices, adamom, lazy_rows, value_and_row_grad
from monolith_optax._compiled.program import parse

DEVICES, DIM = 8, 64
ROWS, CLUSTER, BATCH = 10**9, 256, 65_536
WAYS = "dense", "lazy_rows", "lazy_rows in shard_map"
# Rows per device and ids per batch; the last pair is for the check.
SIZES = [(2**16, 2**10), (2**17, 2**10), (2**16, 2**11), (2**17, 2**11)]


def loss_fn(params: Any, ids: jax.Array) -> jax.Array:
    """A loss that needs the rows of a batch and a dense weight."""
    return jnp.mean((params["table"][ids] @ params["weight"]) ** 2)


def compile_step(way: str, rows_per_device: int, batch: int) -> Any:
    """The training step on eight devices, donated and compiled."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())
    tx = lazy_rows(adamom(0.1))
    where = {"table": split, "weight": whole}
    params = {
        "table": jax.ShapeDtypeStruct((rows_per_device * DEVICES, DIM), jnp.float32),
        "weight": jax.ShapeDtypeStruct((DIM,), jnp.float32),
    }
    state = jax.eval_shape(tx.init, params)
    state_where = optax.tree.map_params(
        tx, lambda _, s: s, state, where, transform_non_params=lambda _: whole
    )
    shardings = where, state_where
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)

    def update(gradients: Any, carry: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def update_own_rows(gradients: Any, carry: Any) -> Any:
        first = jax.lax.axis_index("x") * rows_per_device
        ids, rows = gradients["table"].ids - first, gradients["table"].rows
        return update(gradients | {"table": RowSlices(ids, rows)}, carry)

    def step(carry: Any, ids: jax.Array) -> Any:
        if way == "dense":
            gradients = jax.grad(loss_fn)(carry[0], ids)
            return update(jax.lax.with_sharding_constraint(gradients, where), carry)
        grad = value_and_row_grad(loss_fn, {"table": True, "weight": False})
        _, gradients = grad(carry[0], ids)
        if way == "lazy_rows":
            return update(jax.lax.with_sharding_constraint(gradients, whole), carry)
        sharded: Callable[..., Any] = jax.shard_map(
            update_own_rows,
            mesh=mesh,
            in_specs=(PartitionSpec(), specs),
            out_specs=specs,
        )
        return sharded(gradients, carry)

    carry = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        (params, state),
        shardings,
    )
    ids = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return jitted.lower(carry, ids).compile()


def sent_bytes(program: str) -> float:
    """Bytes that a device sends in a program's collectives: rings, for large n."""
    found = collectives(parse(program)).items()
    return sum((1.0 + (kind == "all-reduce")) * nbytes for kind, nbytes in found)


def measure(way: str, rows_per_device: int, batch: int) -> np.ndarray:
    """Bytes that a device holds, allocates, accesses and sends in one step."""
    compiled = compile_step(way, rows_per_device, batch)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return np.array(
        [
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            cost["bytes accessed"],
            sent_bytes(compiled.as_text()),
        ]
    )


def extrapolate(way: str) -> tuple[np.ndarray, np.ndarray, float]:
    """The parts due to rows and to the batch at full size, and the worst misfit.

    What depends on neither counts as due to the batch.
    """
    small, more_rows, more_ids, check = (measure(way, *size) for size in SIZES)
    (rows, ids), (twice_rows, _), (_, twice_ids), _ = SIZES
    per_row = (more_rows - small) / (twice_rows - rows)
    per_id = (more_ids - small) / (twice_ids - ids)
    rest = small - per_row * rows - per_id * ids
    fitted = per_row * twice_rows + per_id * twice_ids + rest
    error = float(np.max(np.abs(fitted / check - 1)))
    return per_row * ROWS / CLUSTER, per_id * BATCH + rest, error


def main() -> None:
    """Prints the table in Markdown."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    columns = ["step", "held", "temporary", "moved in memory"]
    columns += ["charged for in-place scatters", "sent", "misfit"]
    print(
        f"MB per step on each of {CLUSTER} devices; {ROWS:.0e} rows of {DIM}, ", end=""
    )
    print(f"float32, adamom, {BATCH:,} ids per batch\n")
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    for way in WAYS:
        of_rows, of_batch, error = extrapolate(way)
        held, temporary, accessed, sent = (of_rows + of_batch) / 1e6
        charged = 0.0 if way == "dense" else of_rows[2] / 1e6
        figures = [held, temporary, accessed - charged, charged, sent]
        cells = [way, *(f"{figure:,.0f}" for figure in figures), f"{error:.1%}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
