"""reset_rows: rows with a new owner get new weights and initial slots."""

from typing import TypeVar

import jax
import numpy as np
import optax
from jax.tree_util import keystr

from monolith_optax._leaves import dtype_of
from monolith_optax._rows.programs.dependencies import needed
from monolith_optax._rows.programs.jaxprs import Program, inlined, trace
from monolith_optax._rows.programs.row_values import MixesRowsError, Rows, Value
from monolith_optax._rows.programs.run_on_rows import Runner
from monolith_optax._rows.steps.named_rows import (
    NamedRows,
    broadcast,
    is_none,
    named_rows,
    start_rows,
)
from monolith_optax._rows.steps.read_rows import written
from monolith_optax._rows.steps.slot_owners import slot_owners
from monolith_optax._rows.steps.state_leaves import Leaf
from monolith_optax._rows.types import PyTree

Params = TypeVar("Params")
State = TypeVar("State")


def reset_rows(
    tx: optax.GradientTransformation,
    params: Params,
    state: State,
    rows: PyTree,
    init: PyTree,
) -> tuple[Params, State]:
    """Gives rows of tables new weights and the slots that the optimizer begins with.

    A row whose owner has changed, as `IdMap.assign` returns them in `fresh`, must not
    train on with what the last owner has left. What is one for all rows, such as Adam's
    count of steps, does not change, nor does any other row.

    Call it inside a jitted step that params and state are donated to: it then writes in
    place, and costs what its rows cost, whatever the size of the tables.

    Args:
      tx: the optimizer, of any wrapping. Its `init` is traced on whole tables and runs
        on the rows.
      params: the parameters.
      state: the optimizer's state.
      rows: a tree that is a prefix of params: for each table the rows to reset,
        integers of shape (k,), and None for leaves that keep all of their rows. Rows
        that are negative or beyond the table are padding and do nothing. A row that is
        there twice gets the last of its new weights. A table of three or more axes has
        rows of shape (k, n), as `read_rows` says.
      init: a tree that is a prefix of params: the new weights of each table, an array
        that broadcasts to (k, ...), where ... is the shape of a row, or a number.

    Returns:
      The params and the state after the reset.

    Raises:
      ValueError: rows or init are not a prefix of params, or do not fit the leaf that
        the error names, or the state is not that of this optimizer for these params, or
        `tx.init` computes the slots of a row from other rows.
      TypeError: rows are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import embedding, reset_rows
      >>> tx = embedding.adagrad(0.1, initial_accumulator_value=0.5)
      >>> params = {"items": jnp.ones((4, 2)), "bias": jnp.ones(2)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> rows = {"items": jnp.array([3, -1]), "bias": None}
      >>> params, state = reset_rows(tx, params, state, rows, 0.25)
      >>> print(params["items"][2:, 0], state.norm["items"][2:, 0])
      [1.   0.25] [1.5 0.5]
    """
    named = named_rows(rows, params)
    weights, structure = jax.tree.flatten(params, is_leaf=is_none)
    starts = broadcast("init", init, params)
    new: list[PyTree] = [
        _new_rows(named[i], weights[i], starts[i]) if i in named else None
        for i in range(len(weights))
    ]
    owners = slot_owners(tx, params, state, named)
    try:
        slots = _initial_slots(tx, params, state, named, owners, new)
    except MixesRowsError as error:
        raise error.of("reset_rows", "Begin with a new state") from None
    values = jax.tree.unflatten(structure, new), slots
    return written(params, state, named, owners, values)


def _new_rows(rows: NamedRows, weights: PyTree, start: PyTree) -> jax.Array:
    shape = (len(rows.ids), *np.shape(weights)[len(rows.axes) :])
    what = f"The new weights of {rows.name}"
    return start_rows(what, start, shape, dtype_of(weights))


def _initial_slots(
    tx: optax.GradientTransformation,
    params: PyTree,
    state: PyTree,
    named: dict[int, NamedRows],
    owners: list[NamedRows | None],
    new: list[PyTree],
) -> PyTree:
    """A tree like the state, of what slots begin with in these rows, and of None."""
    weights = jax.tree.leaves(params, is_leaf=is_none)
    given = [i for i, leaf in enumerate(weights) if leaf is not None]
    structure = jax.tree.structure(params)

    def init(weights: list[jax.Array]) -> optax.OptState:
        return tx.init(jax.tree.unflatten(structure, weights))

    program = inlined(trace(init, [jax.typeof(weights[i]) for i in given])[0])
    tables = {rows.name: rows.table for rows in named.values()}
    slots = [
        Leaf(leaf, f"state{keystr(path)}", owner and tables[owner.name])
        for (path, leaf), owner in zip(
            jax.tree.leaves_with_path(state, is_leaf=is_none), owners, strict=True
        )
        if leaf is not None
    ]
    _refuse_noise(program, slots)
    runner = Runner(list(tables.values()))
    operands: list[Value] = [
        Rows(new[i], tables[named[i].name]) if i in named else runner.whole(weights[i])
        for i in given
    ]
    results = zip(slots, runner.run(program, operands), strict=True)
    rows = [slot.rows(value) if slot.table else None for slot, value in results]
    return jax.tree.unflatten(jax.tree.structure(state), rows)


def _refuse_noise(program: Program, slots: list[Leaf]) -> None:
    """A key gives other numbers for some rows than for the whole table."""
    for result, slot in zip(program.jaxpr.outvars, slots, strict=True):
        wanted = needed(program, [result], ()) if slot.table else set()
        for equation in program.jaxpr.eqns:
            if equation.primitive.name in _NOISE and wanted & {*equation.outvars}:
                raise MixesRowsError("draws random numbers for slots", equation)


_NOISE = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
