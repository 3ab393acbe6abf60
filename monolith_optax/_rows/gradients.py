"""Gradients of lookups as RowSlices, without a dense gradient of any table.

The loss is traced, its lookups are found (`finding.py`), and its program is run with a
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
from monolith_optax._rows.finding import Finder
from monolith_optax._rows.found import Found, Tree, for_each
from monolith_optax._rows.images import Leaf, whole
from monolith_optax._rows.slices import RowSlices


def value_and_row_grad(
    fun: Callable[..., Any], tables: Any = None, *, has_aux: bool = False
) -> "ValueAndRowGrad":
    """`jax.value_and_grad` in which the gradients of tables are `RowSlices`.

    JAX's gradient of `table[ids]` is as large as the table. Here the function is
    traced, as by `jax.jit`, its lookups of tables are found, and the gradient is taken
    with respect to the rows that they yield. Value and gradients are those of
    `jax.value_and_grad`, also if they are differentiated again. So ids outside of a
    table do what the lookup's mode says, and negative ones count from its end; where
    a lookup gives nothing for an id, the id is padding in the slices.

    The model needs no changes. Lookups may be `[]`, `jnp.take`, `.at[].get` in any
    mode, `jnp.take_along_axis`, `jax.lax.dynamic_slice`, of whole rows or of some
    columns, under `jax.vmap` (also of a stack of tables), inside `jit`, `checkpoint`,
    `scan`, `cond`, `while_loop`, `map` and `shard_map`. What is done to a table before
    it is looked up, row by row (casts, scaling, normalised rows), is done to the rows.
    A function with a `custom_vjp` or `custom_jvp` rule may be given tables if the rule
    adds rows to zeros for their gradient.

    Inside `jax.shard_map` slices are those of the device. Their sum over devices is
    the gradient.

    Args:
      fun: a function from params, as its first argument, and others to a scalar. As
        under `jax.jit`, it cannot branch on values of params.
      tables: a tree of bools that is a prefix of params: which leaves are tables. If
        it is None, these are the leaves that the function looks up by ids that are
        data and uses for nothing else. A leaf looked up by constants, such as
        `layers[0]`, is not a table then. The number of ids or rows does not matter. In
        the slices of a stack of tables, ids count through all of its rows.
      has_aux: whether the function returns a pair, of which the second is passed on.

    Returns:
      A function of the same arguments that returns the value, or the pair, and the
      gradients. Its method `explain`, of the same arguments, says of each leaf of
      params whether its gradient is rows or dense, and why.

    Raises:
      ValueError: (when called) tables is not a prefix of params, or names a scalar, or
        a leaf that is used for more than lookups.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import value_and_row_grad
      >>> params = {"table": jnp.ones((1000, 2)), "scale": jnp.array(3.0)}
      >>> def loss(params, ids):
      ...     return params["scale"] * params["table"][ids].sum()
      >>> grad = value_and_row_grad(loss)
      >>> value, gradients = grad(params, jnp.array([5, -1]))
      >>> print(value, gradients["scale"], gradients["table"].ids)
      12.0 4.0 [  5 999]
      >>> print(gradients["table"].rows)
      [[3. 3.]
       [3. 3.]]
    """
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
        choice = _choose(loss, self._tables)
        (value, aux), gradients = _differentiate(loss, choice)
        result = (value, loss.with_arrays(aux)) if self._has_aux else value
        return result, jax.tree.unflatten(loss.structure, gradients)

    def explain(self, params: optax.Params, *args: Any, **kwargs: Any) -> str:
        """Which leaves have gradients of rows, which have dense ones, and why.

        Args:
          params: as for the gradients, as are all other arguments.
          *args: what the function takes besides params.
          **kwargs: what it takes by name.

        Returns:
          A line for each leaf of params.
        """
        loss = _trace(self._fun, self._has_aux, params, args, kwargs)
        choice = _choose(loss, self._tables)
        places: dict[int, dict[str, None]] = {leaf: {} for leaf in choice.tables}
        for leaf, found in _tables_of(choice.tree):
            places[leaf][found.place] = None
        return "\n".join(
            f"{name}: rows, looked up by {', '.join(places[leaf]) or 'nothing'}"
            if leaf in choice.tables
            else f"{name}: dense, {choice.refused[leaf]}"
            for leaf, name in enumerate(loss.names)
        )


class _Loss(NamedTuple):
    """A traced loss.

    Attributes:
      program: from leaves to the value and the arrays of the auxiliary output.
      leaves: the leaves of params.
      names: what they are called.
      structure: the tree of params.
      with_arrays: makes the auxiliary output of its arrays.
    """

    program: jaxprs.Program
    leaves: list[Any]
    names: list[str]
    structure: Any
    with_arrays: Callable[[list[Any]], Any]

    @property
    def types(self) -> list[Any]:
        """The types of the leaves."""
        return list(map(jax.typeof, self.leaves))


class _Choice(NamedTuple):
    """The leaves that are tables, their lookups, and why other leaves are not."""

    tables: frozenset[int]
    tree: Tree
    refused: dict[int, str]


def _trace(
    fun: Callable[..., Any], has_aux: bool, params: Any, args: Any, kwargs: Any
) -> _Loss:
    paths, structure = jax.tree.flatten_with_path(params)
    args = tuple(map(_as_data, args))
    kwargs = {name: _as_data(value) for name, value in kwargs.items()}
    aux: list[Any] = []
    aux_structure: Any = None

    def flat(*leaves: Any) -> list[Any]:
        nonlocal aux, aux_structure
        result = fun(jax.tree.unflatten(structure, leaves), *args, **kwargs)
        value, rest = result if has_aux else (result, None)
        aux, aux_structure = jax.tree.flatten(rest)
        arrays = [leaf for leaf in aux if isinstance(leaf, jax.Array)]
        aux = [_ARRAY if isinstance(leaf, jax.Array) else leaf for leaf in aux]
        return [value, *arrays]

    leaves = [leaf for _, leaf in paths]
    program, _ = jaxprs.trace(flat, *leaves)

    def with_arrays(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if leaf is _ARRAY else leaf for leaf in aux]
        return jax.tree.unflatten(aux_structure, filled)

    keystr = jax.tree_util.keystr
    names = [keystr(p, simple=True, separator=".") or "params" for p, _ in paths]
    return _Loss(program, leaves, names, structure, with_arrays)


# Stands for an array of the auxiliary output.
_ARRAY = object()


def _as_data(argument: Any) -> Any:
    """An argument with JAX's arrays for NumPy's, which are constants of a program."""

    def is_numbers(leaf: Any) -> bool:
        return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc"

    if not any(map(is_numbers, jax.tree.leaves(argument))):
        return argument
    return jax.tree.map(lambda x: jnp.asarray(x) if is_numbers(x) else x, argument)


def _choose(loss: _Loss, tables: Any) -> _Choice:
    types = loss.types
    if tables is None:
        asked = [False] * len(types)
        refused = {
            leaf: "as it has no rows of floating point"
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
        more = dict(finder.refused)
        if tables is None:
            for leaf in left.keys() - finder.row_axes.keys():
                more.setdefault(leaf, "is never looked up")
        elif more:
            leaf, why = min(more.items())
            raise ValueError(
                f"Table {loss.names[leaf]} {why}, so its gradient is not one of rows. "
                "Say False for it in tables to get a dense gradient, or only look it "
                "up in the model."
            )
        if not more:
            return _Choice(frozenset(left), tree, refused)
        refused |= {leaf: f"as it {why}" for leaf, why in more.items()}


def _flags(tables: Any, loss: _Loss) -> list[bool]:
    params = jax.tree.unflatten(loss.structure, loss.leaves)
    try:
        flags = jax.tree.leaves(jax.tree.broadcast(tables, params))
    except ValueError as error:
        raise ValueError(
            "tables must be a tree of bools that is a prefix of the tree of params, "
            f"but it is {tables!r}, and that of params is {loss.structure}."
        ) from error
    for flag, aval, name in zip(flags, loss.types, loss.names, strict=True):
        if flag and not aval.shape:
            raise ValueError(f"tables names {name}, but a scalar has no rows.")
    return [bool(flag) for flag in flags]


def _tables_of(tree: Tree) -> list[tuple[int, Found]]:
    """The tables of all lookups, in the order of their zeros and ids."""
    pairs: list[tuple[int, Found]] = []
    for_each(tree, lambda found: pairs.extend((leaf, found) for leaf in found.leaves))
    return pairs


def _differentiate(loss: _Loss, choice: _Choice) -> tuple[tuple[Any, Any], list[Any]]:
    types, tables = loss.types, choice.tables
    num_rows = frozenset(types[leaf].shape[0] for leaf in tables)

    def zeros_of(found: Found) -> list[Any]:
        shapes = zip(found.leaves, found.zeros_shapes(types), strict=True)
        return [
            jaxprs.as_varying(jnp.zeros(shape, types[leaf].dtype), found.varying)
            for leaf, shape in shapes
        ]

    def run(dense: list[Any], zeros: Any) -> Any:
        operands = [
            Leaf(index, leaf) if index in tables else dense[index]
            for index, leaf in enumerate(loss.leaves)
        ]
        results, ids = add(loss.program, operands, choice.tree, zeros, num_rows)
        value, *aux = map(whole, results)
        return value, (aux, ids)

    dense = [None if i in tables else leaf for i, leaf in enumerate(loss.leaves)]
    grad = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    zeros = for_each(choice.tree, zeros_of)
    (value, (aux, ids)), (gradients, rows) = grad(dense, zeros)
    parts: dict[int, list[RowSlices]] = {leaf: [] for leaf in tables}
    for (leaf, found), *part in zip(
        _tables_of(choice.tree), *map(jax.tree.leaves, (ids, rows)), strict=True
    ):
        if found.has_gradient:
            parts[leaf].append(RowSlices(*part))
    for leaf in tables:
        gradients[leaf] = _total(parts[leaf], types[leaf])
    return (value, aux), gradients


def _total(parts: list[RowSlices], table: Any) -> RowSlices:
    if not parts:
        empty = jnp.zeros((0, *table.shape[1:]), table.dtype)
        return RowSlices(jnp.zeros(0, jnp.int32), empty)
    return parts[0] if len(parts) == 1 else RowSlices.concatenate(parts)
