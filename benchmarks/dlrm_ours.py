"""The DLRM with what this project has for it: stacks, bags and small tables.

Tables with more rows than ids are one stack, whose gradients are rows, and the others
are another, whose gradients are dense. All bags of a stack are looked up at once: the
input pipeline adds to each id where its table begins, as FBGEMM does in its lookup.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.dlrm_data import RATE, START, TABLE_RATE, Batch, Job, loss
from monolith_optax import (
    TableStack,
    apply_updates,
    bag_lookup,
    lazy_rows,
    sparse_tables,
    value_and_row_grad,
)

ROWS = {"large": True, "small": False, "mlps": False}


class Ours:
    """The model, and the steps that are timed."""

    def __init__(self, job: Job, data: list[Batch]) -> None:
        """Packs the tables; the steps are compiled when they are first called."""
        self.job, tables = job, job.tables()

        def lookups(tables: Any, ids: Any) -> jax.Array:
            pairs = zip(tables, ids, strict=True)
            return jnp.stack([table[i].sum() for table, i in pairs]).sum()

        is_large = sparse_tables(lookups, tables, data[0].ids)
        # Tables grow, so the bags of both stacks, one after the other, are in order.
        self.members = {
            name: [k for k, large in enumerate(is_large) if large is (name == "large")]
            for name in ("small", "large")
        }
        params: dict[str, Any] = {"mlps": jax.tree.map(jnp.array, job.mlps())}
        self.firsts: dict[str, np.ndarray] = {}
        for name, members in self.members.items():
            stack = TableStack([tables[k] for k in members])
            [params[name]] = stack.pack([tables[k] for k in members]).values()
            [firsts] = stack.row_ids([np.zeros(1, np.int32)] * len(members)).values()
            self.firsts[name] = np.asarray(firsts)
        self.tx = lazy_rows(
            optax.partition(
                {
                    "tables": optax.adagrad(TABLE_RATE, START, eps=1e-10),
                    "mlps": optax.adam(RATE),
                },
                {"large": "tables", "small": "tables", "mlps": "mlps"},
            )
        )
        self.carry: Any = params, jax.jit(self.tx.init)(params)
        self.adam = optax.adam(RATE)
        self.mlps_carry: Any = jax.tree.map(
            jnp.copy, (params["mlps"], self.adam.init(params["mlps"]))
        )
        shape = job.batch, len(job.sizes), job.dim
        self.gradients = jnp.full(shape, 1e-6)
        # Equally long for all batches, so that a step is compiled once.
        self.lengths = {
            name: max(sum(len(batch.ids[k]) for k in members) for batch in data)
            for name, members in self.members.items()
        }
        self.stream = cycle([self._prepared(batch) for batch in data])
        self.whole_step = jax.jit(self._whole_step, donate_argnums=(0, 1))
        self.lookup = jax.jit(self._lookup)
        self.mlps_step = jax.jit(self._mlps_step, donate_argnums=(0, 1))
        self.update = jax.jit(self._update, donate_argnums=(0, 1))

    def _prepared(self, batch: Batch) -> Any:
        """For each stack the ids of all of its bags, and the bag of each."""
        ids: dict[str, Any] = {}
        for name, members in self.members.items():
            pairs = zip(members, self.firsts[name], strict=True)
            of_tables = [batch.ids[k] + first for k, first in pairs]
            if self.job.length is None:
                ids[name] = np.stack(of_tables, 1).astype(np.int32)
                continue
            # A sample's bags follow one another.
            starts = len(members) * np.arange(self.job.batch)
            bags = [
                np.repeat(starts + i, np.diff(batch.offsets[k]))
                for i, k in enumerate(members)
            ]
            flat = np.concatenate(of_tables), np.concatenate(bags)
            padding = 0, self.lengths[name] - len(flat[0])
            ids[name] = tuple(
                np.pad(array, padding, constant_values=-1).astype(np.int32)
                for array in flat
            )
        return jax.tree.map(jnp.array, (ids, batch.numbers, batch.labels))

    def _lookup(self, params: Any, ids: Any) -> jax.Array:
        """The sums of the bags, of shape (batch, tables, dim)."""
        sums = []
        for name, members in self.members.items():
            if self.job.length is None:
                sums.append(params[name][ids[name]])
                continue
            flat, bags = ids[name]
            count = len(members) * self.job.batch
            rows = bag_lookup(params[name], flat, segments=bags, num_bags=count)
            sums.append(rows.reshape(self.job.batch, len(members), self.job.dim))
        return jnp.concatenate(sums, 1)

    def _loss(self, params: Any, ids: Any, *others: jax.Array) -> jax.Array:
        value: jax.Array = loss(params["mlps"], self._lookup(params, ids), *others)
        return value

    def _step(self, fun: Any, params: Any, state: Any, *args: Any) -> Any:
        value, gradients = value_and_row_grad(fun, ROWS)(params, *args)
        updates, state = self.tx.update(gradients, state, params)
        return apply_updates(params, updates), state, value

    def _whole_step(self, params: Any, state: Any, batch: Any) -> Any:
        return self._step(self._loss, params, state, *batch)

    def _update(self, params: Any, state: Any, ids: Any, gradients: Any) -> Any:
        def product(params: Any) -> jax.Array:
            total: jax.Array = (self._lookup(params, ids) * gradients).sum()
            return total

        return self._step(product, params, state)[:2]

    def _mlps_step(self, mlps: Any, state: Any, rows: jax.Array, *others: Any) -> Any:
        grad = jax.grad(loss, argnums=(0, 1))
        gradients, of_rows = grad(mlps, rows, *others)
        updates, state = self.adam.update(gradients, state, mlps)
        return optax.apply_updates(mlps, updates), state, of_rows

    def first_loss(self) -> float:
        """Takes a step and returns its loss."""
        *carry, value = self.whole_step(*self.carry, next(self.stream))
        self.carry = tuple(carry)
        return float(value)

    def whole(self) -> Callable[[], object]:
        """A step of training."""
        batch = next(self.stream)

        def run() -> None:
            *carry, _ = jax.block_until_ready(self.whole_step(*self.carry, batch))
            self.carry = tuple(carry)

        return run

    def only_lookups(self) -> Callable[[], object]:
        """The sums of the bags."""
        ids, *_ = next(self.stream)
        return lambda: jax.block_until_ready(self.lookup(self.carry[0], ids))

    def only_mlps(self) -> Callable[[], object]:
        """A step on the MLPs, and the gradients of the sums."""
        ids, *others = next(self.stream)
        rows = jax.block_until_ready(self.lookup(self.carry[0], ids))

        def run() -> None:
            result = self.mlps_step(*self.mlps_carry, rows, *others)
            *carry, _ = jax.block_until_ready(result)
            self.mlps_carry = tuple(carry)

        return run

    def only_update(self) -> Callable[[], object]:
        """The step on the tables, with gradients that move them little."""
        ids, *_ = next(self.stream)

        def run() -> None:
            result = self.update(*self.carry, ids, self.gradients)
            self.carry = jax.block_until_ready(result)

        return run
