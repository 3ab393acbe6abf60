"""Gradients of lookups as RowSlices, without a dense gradient of any table.

The loss is traced, its lookups are found (`finding.py`), and it is run again with a
zero added to each row that they take (`adding.py`). The gradients of the zeros are
those of the rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from monolith_optax._rows import jaxprs
from monolith_optax._rows.adding import add
from monolith_optax._rows.finding import Finder, Found, Tree, for_each
from monolith_optax._rows.images import Leaf, whole
from monolith_optax._rows.slices import RowSlices


def value_and_row_grad(
    fun: Callable[..., Any], tables: Any = None, *, has_aux: bool = False
) -> "ValueAndRowGrad":
    """`jax.value_and_grad` in which the gradients of tables are `RowSlices`."""
    return ValueAndRowGrad(fun, tables, has_aux)


class ValueAndRowGrad:
    """The function that `value_and_row_grad` makes."""

    def __init__(self, fun: Callable[..., Any], tables: Any, has_aux: bool) -> None:
        self._fun, self._tables, self._has_aux = fun, tables, has_aux

    def __call__(
        self, params: optax.Params, *args: Any, **kwargs: Any
    ) -> tuple[Any, optax.Updates]:
        """The value of the function, or the pair, and the gradients."""
        loss = _trace(self._fun, self._has_aux, params, args, kwargs)
        tables, tree, _ = _choose(loss, self._tables)
        value, aux, gradients = _differentiate(loss, tables, tree)
        value = (value, loss.aux(aux)) if self._has_aux else value
        return value, jax.tree.unflatten(loss.structure, gradients)

    def explain(self, params: optax.Params, *args: Any, **kwargs: Any) -> str:
        """Which gradients are rows, which are dense, and why."""
        loss = _trace(self._fun, self._has_aux, params, args, kwargs)
        tables, tree, refused = _choose(loss, self._tables)
        places: dict[int, list[str]] = {leaf: [] for leaf in tables}

        def add_place(found: Found) -> None:
            for leaf in found.leaves:
                places[leaf].append(found.place)

        for_each(tree, add_place)
        lines = []
        for leaf, name in enumerate(loss.names):
            if leaf in tables:
                where = ", ".join(dict.fromkeys(places[leaf])) or "nothing"
                lines.append(f"{name}: rows, looked up by {where}")
            else:
                lines.append(f"{name}: dense, {refused[leaf]}")
        return "\n".join(lines)


class _Loss(NamedTuple):
    """A traced loss."""

    program: jaxprs.Program
    leaves: list[Any]
    names: list[str]
    structure: Any
    aux: Callable[[list[Any]], Any]


def _trace(
    fun: Callable[..., Any], has_aux: bool, params: Any, args: Any, kwargs: Any
) -> _Loss:
    paths, structure = jax.tree.flatten_with_path(params)
    args, kwargs = tuple(map(_as_data, args)), {k: _as_data(v) for k, v in kwargs.items()}
    aux: list[Any] = [[], None]

    def flat(*leaves: Any) -> list[Any]:
        result = fun(jax.tree.unflatten(structure, leaves), *args, **kwargs)
        value, rest = result if has_aux else (result, None)
        aux[:] = jax.tree.flatten(rest)
        return [value, *filter(_is_array, aux[0])]

    leaves = [leaf for _, leaf in paths]
    program, _ = jaxprs.trace(flat, *leaves)
    aux_leaves, aux_structure = aux

    def with_arrays(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if _is_array(leaf) else leaf for leaf in aux_leaves]
        return jax.tree.unflatten(aux_structure, filled)

    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return _Loss(program, leaves, names, structure, with_arrays)


def _choose(loss: _Loss, tables: Any) -> tuple[list[int], Tree, dict[int, str]]:
    """Which leaves are tables, their lookups, and why other leaves are not."""
    types = list(map(jax.typeof, loss.leaves))
    if tables is None:
        asked = [False] * len(types)
        refused = {
            leaf: "as it has no rows"
            for leaf, aval in enumerate(types)
            if not aval.shape or not jnp.issubdtype(aval.dtype, jnp.floating)
        }
    else:
        asked = _flags(tables, loss)
        refused = {leaf: "as tables says" for leaf, ask in enumerate(asked) if not ask}
    while True:
        left = {leaf: ask for leaf, ask in enumerate(asked) if leaf not in refused}
        finder = Finder(types, left)
        tree = finder.find(loss.program)
        unused = {leaf: "is never looked up" for leaf in left} if tables is None else {}
        for leaf in finder.row_axes:
            unused.pop(leaf, None)
        more = unused | finder.refused
        if not more:
            return list(left), tree, refused
        if tables is not None:
            leaf, why = min(more.items())
            raise ValueError(
                f"Table {loss.names[leaf]} {why}, so its gradient is not one of rows. "
                "Leave it out of tables to get a dense gradient, or change the model."
            )
        refused |= {leaf: f"as it {why}" for leaf, why in more.items()}


def _differentiate(
    loss: _Loss, tables: list[int], tree: Tree
) -> tuple[Any, list[Any], list[Any]]:
    types = list(map(jax.typeof, loss.leaves))
    num_rows = frozenset(types[leaf].shape[0] for leaf in tables)
    dense = [None if i in tables else leaf for i, leaf in enumerate(loss.leaves)]

    def run(dense: list[Any], zeros: Any) -> Any:
        operands = [
            Leaf(index, leaf) if index in tables else dense[index]
            for index, leaf in enumerate(loss.leaves)
        ]
        results, ids = add(loss.program, operands, tree, zeros, num_rows)
        value, *aux = map(whole, results)
        return value, (aux, ids)

    def zeros_of(found: Found) -> list[Any]:
        shapes = zip(found.leaves, found.zeros_shapes(types), strict=True)
        return [
            jaxprs.as_varying(jnp.zeros(shape, types[leaf].dtype), found.varying)
            for leaf, shape in shapes
        ]

    (value, (aux, ids)), (gradients, rows) = jax.value_and_grad(
        run, argnums=(0, 1), has_aux=True
    )(dense, for_each(tree, zeros_of))
    parts: dict[int, list[RowSlices]] = {leaf: [] for leaf in tables}

    sources: list[tuple[int, bool]] = []
    for_each(
        tree,
        lambda found: sources.extend((leaf, found.has_gradient) for leaf in found.leaves),
    )
    for (leaf, has_gradient), i, r in zip(
        sources, jax.tree.leaves(ids), jax.tree.leaves(rows), strict=True
    ):
        if has_gradient:
            parts[leaf].append(RowSlices(i, r))
    for leaf in tables:
        gradients[leaf] = _sum(parts[leaf], types[leaf])
    return value, aux, gradients


def _sum(parts: list[RowSlices], table: Any) -> RowSlices:
    if not parts:
        empty = jnp.zeros((0, *table.shape[1:]), table.dtype)
        return RowSlices(jnp.zeros(0, jnp.int32), empty)
    return parts[0] if len(parts) == 1 else RowSlices.concatenate(parts)


def _flags(tables: Any, loss: _Loss) -> list[bool]:
    try:
        flags = jax.tree.leaves(
            jax.tree.broadcast(tables, jax.tree.unflatten(loss.structure, loss.leaves))
        )
    except ValueError as error:
        raise ValueError("tables must be a prefix of the tree of params.") from error
    for flag, leaf, name in zip(flags, loss.leaves, loss.names, strict=True):
        if flag and np.ndim(leaf) == 0:
            raise ValueError(f"tables names {name}, a scalar, which has no rows.")
    return [bool(flag) for flag in flags]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def _as_data(argument: Any) -> Any:
    """An argument whose NumPy arrays JAX does not take for numbers of the program."""

    def is_numpy(leaf: Any) -> bool:
        return isinstance(leaf, np.ndarray) and jax.dtypes.issubdtype(
            leaf.dtype, np.number
        )

    if not any(map(is_numpy, jax.tree.leaves(argument))):
        return argument
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if is_numpy(leaf) else leaf, argument)
