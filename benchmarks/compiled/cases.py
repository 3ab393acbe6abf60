"""Steps to compile: optimizers, shapes of tables, batches, models and meshes."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding

from benchmarks.compiled import cluster
from benchmarks.compiled.targets import Target
from benchmarks.tracing import dlrm
from monolith_optax import (
    RowSlices,
    TableStack,
    adamom,
    apply_updates,
    embedding,
    lazy_rows,
    stochastic_rounding,
    value_and_row_grad,
    with_row_lookups,
)

ROWS, MANY_TABLES, ROWS_OF_MANY = 1_000_000, 26, 100_000
ROWS_OF_MESHES = 2**20  # which 256 devices divide
IDS = 8_192
WIDTHS = 8, 16, 32, 64, 128, 256
BATCHES = 8_192, 65_536, 262_144

# One for each kind of slot: none, one number a row, as wide as a row, three of those.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": embedding.sgd,
    "rowwise_adagrad": embedding.rowwise_adagrad,
    "adagrad": embedding.adagrad,
    "adamom": adamom,
    "optax.adam": optax.adam,
}


class Case(NamedTuple):
    """A step to compile.

    Attributes:
      group: the table of the page that it belongs to.
      name: what differs from the others of the group.
      lowered: the step for a target.
      needs: how many devices.
      platforms: on which it makes sense.
      slow: on which it takes long to compile.
    """

    group: str
    name: str
    lowered: Callable[[Target], Any]
    needs: int = 1
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    slow: tuple[str, ...] = ()


def cases(*, everything: bool = False) -> Iterator[Case]:
    """The cases; with `everything` all optimizers of tables."""
    optimizers = dict(OPTIMIZERS)
    if everything:
        from registry import VARIANTS

        optimizers |= {k: v.make for k, v in VARIANTS.items() if not v.row.is_dense}
    for name, make in optimizers.items():
        yield Case("optimizers", name, _step(make))
    yield from _shapes()
    yield Case("models", "DLRM, 26 tables, adagrad", _dlrm, slow=("tpu",))
    yield Case("models", "dense adamom, 25 million in one leaf", _dense)
    yield from _meshes()
    for width in (16, 64, 128):
        make = _step(embedding.adagrad, width=width, row_major=True)
        yield Case("row-major", f"{width} columns", make, platforms=("tpu",))


def _shapes() -> Iterator[Case]:
    adagrad = embedding.adagrad
    for width in WIDTHS:
        yield Case("widths", f"{width} columns", _step(adagrad, width=width))
    for ids in BATCHES:
        slow = ("tpu",) if ids > IDS else ()
        yield Case("batches", f"{ids:,} ids", _step(adagrad, ids=ids), slow=slow)
    for width in 16, 128:
        many: dict[str, Any] = {
            "tables": MANY_TABLES,
            "rows": ROWS_OF_MANY,
            "ids": 2_048,
        }
        each = f", {width} columns"
        apart, joined = (of(adagrad, width=width, **many) for of in (_step, _stack))
        yield Case("tables", f"26 tables{each}", apart, slow=("tpu",))
        yield Case("tables", f"a stack{each}", joined, slow=("tpu",))
        apart, joined = (
            of(adagrad, width=width, whole_step=True, **many) for of in (_step, _stack)
        )
        yield Case("whole steps", f"26 tables{each}", apart, slow=("tpu",))
        yield Case("whole steps", f"a stack{each}", joined, slow=("tpu",))

    def rounding(rate: float) -> optax.GradientTransformation:
        return stochastic_rounding(embedding.rowwise_adagrad(rate), seed=0)

    for dtype in jnp.bfloat16, jnp.float16:
        name = f"{jnp.dtype(dtype)}, stochastic rounding"
        yield Case("16 bits", name, _step(rounding, width=128, dtype=dtype))


def _meshes() -> Iterator[Case]:
    for name, of in {"split by rows": Target.split, "whole": Target.everywhere}.items():
        where: dict[str, Any] = {
            "table": of,
            "batch": Target.split,
            "rows": ROWS_OF_MESHES,
        }
        make = _step(embedding.adagrad, whole_step=True, **where)
        yield Case("meshes", f"tables {name}", make, needs=2)
        yield Case("meshes", f"evaluation, tables {name}", _evaluation(of), needs=2)
    where |= {"table": Target.split, "spread": True}
    make = _step(embedding.adagrad, whole_step=True, **where)
    yield Case("meshes", "tables spread", make, needs=2)
    make = _evaluation(Target.split, spread=True)
    yield Case("meshes", "evaluation, tables spread", make, needs=2)
    for spread in False, True:
        name = f"evaluation, a stack {'spread' if spread else 'split by rows'}"
        yield Case("meshes", name, _stack_evaluation(spread=spread), needs=2)
    for name, lowered in cluster.names().items():
        yield Case("cluster", name, lowered, needs=2, slow=("tpu",))


def _step(
    make: Callable[..., Any],
    *,
    width: int = 16,
    ids: int = IDS,
    rows: int = ROWS,
    tables: int = 1,
    dtype: Any = jnp.float32,
    table: Callable[[Target], NamedSharding] = Target.on_one,
    batch: Callable[[Target], NamedSharding] = Target.on_one,
    row_major: bool = False,
    whole_step: bool = False,
    spread: bool = False,
) -> Callable[[Target], Any]:
    """A step on row gradients, or a whole one with the lookup."""
    tx = lazy_rows(make(0.1))

    def lowered(target: Target) -> Any:
        where = table(target)
        params = {
            f"t{i:02}": jax.ShapeDtypeStruct((rows, width), dtype)
            for i in range(tables)
        }
        carry = params, jax.eval_shape(tx.init, params)
        formats = _formats(carry, where, row_major=row_major)
        carry = _placed(carry, formats)
        taken = _placed(
            [jax.ShapeDtypeStruct((ids,), jnp.int32)] * tables, batch(target)
        )
        found = _placed(
            [jax.ShapeDtypeStruct((ids, width), dtype)] * tables, batch(target)
        )

        def step(params: Any, state: Any, taken: Any, found: Any) -> Any:
            def loss(params: Any) -> jax.Array:
                looked_up = zip(params.values(), taken, found, strict=True)
                means = [jnp.mean(t[i] * r) for t, i, r in looked_up]
                return jnp.sum(jnp.stack(means))

            if whole_step:
                spec = dict.fromkeys(params, where) if spread else None
                _, gradients = value_and_row_grad(loss, spec)(params)
            else:
                slices = map(RowSlices, taken, found)
                gradients = dict(zip(params, slices, strict=True))
            updates, state = tx.update(gradients, state, params)
            return apply_updates(params, updates), state

        return _donated(step, formats).lower(*carry, taken, found)

    return lowered


def _evaluation(
    of: Callable[[Target], NamedSharding], *, spread: bool = False
) -> Callable[[Target], Any]:
    """Only the lookup and the loss."""

    def loss(params: Any, ids: Any) -> jax.Array:
        return jnp.mean(params[ids] ** 2)

    def lowered(target: Target) -> Any:
        types = ((ROWS_OF_MESHES, 16), jnp.float32), ((IDS,), jnp.int32)
        shapes = [jax.ShapeDtypeStruct(*each) for each in types]
        places = [of(target), target.split()]
        run = with_row_lookups(loss, of(target)) if spread else loss
        return jax.jit(run).lower(*_placed(shapes, places))

    return lowered


def _stack_evaluation(*, spread: bool) -> Callable[[Target], Any]:
    """The lookups and the loss of four tables in an array that is split by rows."""
    of_each = jax.ShapeDtypeStruct((ROWS_OF_MESHES // 4, 16), jnp.float32)

    def lowered(target: Target) -> Any:
        stack, where = (
            TableStack([of_each] * 4, shards=len(target.devices)),
            target.split(),
        )

        def loss(stacks: Any, ids: Any) -> jax.Array:
            return jnp.mean(
                sum(t[ids[:, i]] for i, t in enumerate(stack.unpack(stacks)))
            )

        run = with_row_lookups(loss, where) if spread else loss
        ids = jax.ShapeDtypeStruct((IDS // 4, 4), jnp.int32)
        return jax.jit(run).lower(*_placed((dict(stack.shapes), ids), where))

    return lowered


def _stack(
    make: Callable[..., Any],
    *,
    tables: int,
    rows: int,
    ids: int,
    width: int,
    whole_step: bool = False,
) -> Callable[[Target], Any]:
    """A step on row gradients of tables in one array, or one with the lookups."""
    tx = lazy_rows(make(0.1))
    of_each = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    stack = TableStack([of_each] * tables)

    def loss(params: Any, taken: Any, found: Any) -> jax.Array:
        looked_up = zip(stack.unpack(params), taken, found, strict=True)
        return jnp.sum(jnp.stack([jnp.mean(t[i] * r) for t, i, r in looked_up]))

    def step(params: Any, state: Any, taken: Any, found: Any) -> Any:
        if whole_step:
            _, gradients = value_and_row_grad(loss)(params, taken, found)
        else:
            ids, rows = stack.row_ids(taken), stack.concatenate(found)
            gradients = {key: RowSlices(ids[key], rows[key]) for key in params}
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates), state

    def lowered(target: Target) -> Any:
        carry = dict(stack.shapes), jax.eval_shape(tx.init, dict(stack.shapes))
        batch = [jax.ShapeDtypeStruct((ids,), jnp.int32)] * tables
        found = [jax.ShapeDtypeStruct((ids, width), jnp.float32)] * tables
        return _everything_on_one(step, target, *carry, batch, found)

    return lowered


def _dlrm(target: Target) -> Any:
    """A whole step of the model whose tracing is timed, with larger tables."""
    loss, params, batch = dlrm(np.random.default_rng(0))
    tx = lazy_rows(embedding.adagrad(0.1))
    params = jax.eval_shape(lambda: params)
    large = jax.ShapeDtypeStruct((ROWS_OF_MANY, 16), jnp.float32)
    params = params | {"tables": dict.fromkeys(params["tables"], large)}

    def step(params: Any, state: Any, batch: Any) -> Any:
        value, gradients = value_and_row_grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates), state, value

    state = jax.eval_shape(tx.init, params)
    return _everything_on_one(step, target, params, state, batch)


def _dense(target: Target) -> Any:
    tx = adamom(0.1)
    weights = jax.ShapeDtypeStruct((25_000_000,), jnp.float32)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates), state

    return _everything_on_one(
        step, target, weights, jax.eval_shape(tx.init, weights), weights
    )


def _everything_on_one(step: Callable[..., Any], target: Target, *args: Any) -> Any:
    """Lowered for one device; the first two arguments are donated."""
    placed = _placed(args, target.on_one())
    return jax.jit(step, donate_argnums=(0, 1)).lower(*placed)


def _donated(step: Callable[..., Any], formats: Any) -> Any:
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=formats)


def _formats(tree: Any, where: NamedSharding, *, row_major: bool) -> Any:
    """Where each leaf goes, and in which layout; scalars are on all of the devices."""
    whole = NamedSharding(where.mesh, jax.P())

    def of(leaf: Any) -> Any:
        if leaf.ndim < 1:
            return whole
        rows = Layout(major_to_minor=(0, 1))
        return Format(rows, where) if row_major and leaf.ndim == 2 else where

    return jax.tree.map(of, tree)


def _placed(tree: Any, where: Any) -> Any:
    """The types of a tree's leaves, where they are to be."""
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(
        lambda leaf, each: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=each),
        tree,
        where,
    )
