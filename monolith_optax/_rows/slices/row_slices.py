"""RowSlices: a few rows of a table, named by their ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._public import public
from monolith_optax._rows.slices.duplicates import at_least_float32
from monolith_optax._rows.slices.opaque_ids import int32_ids, is_opaque, opaque, plain
from monolith_optax._rows.slices.row_access import add_rows, flattened
from monolith_optax._rows.slices.spread import Placement
from monolith_optax._rows.types import ArrayType, PyTree
from monolith_optax._shardings import replicated


class _Named(type):
    """A type that says what to do where JAX prints it: in trees that do not match."""

    def __repr__(cls) -> str:
        return (
            "<class 'monolith_optax.RowSlices': gradients of rows, which only an "
            "optimizer inside lazy_rows takes>"
        )


@public("monolith_optax")
@jax.tree_util.register_pytree_with_keys_class
@dataclass(init=False, frozen=True, eq=False, repr=False)
class RowSlices(metaclass=_Named):
    """The sum of some rows into a table of zeros.

    It is what the gradient of a lookup is, without the table. Rows with the same id
    add up. Ids outside the table, negative ones included, are padding: their rows may
    hold anything and count for nothing. Sums are taken in float32, or in the dtype of
    the rows or the table if that is wider, and are rounded once.

    A parameter may also be a stack of tables, such as one of shape
    `(tables, num_rows, columns)` for rows of shape `(columns,)`. Ids then count through
    all rows of the stack.

    It is a pytree of ids and rows that can go wherever JAX takes a pytree. Its ids are
    not numbers there: JAX raises an error that names them where a function that maps
    over leaves would change them. Functions that make zeros make padding. Instead of
    what raises, write:

    - `optax.chain(lazy_rows(a), optax.scale(2))`, or schedules, clipping and all else
      outside `lazy_rows`: `lazy_rows(optax.chain(a, optax.scale(2)))`.
    - `jax.tree.map(lambda g: g * 2, gradients)`, `g / n`, `-g`, `optax.tree.scale`: the
      same map with `is_leaf=lambda g: isinstance(g, RowSlices)`.
    - `optax.tree.add(a, b)`: `jax.tree.map(operator.add, a, b, is_leaf=...)`.
    - `g.astype(dtype)`, `optax.tree.cast`: `slices.astype(dtype)`.
    - `jnp.clip(g, ...)`, `jnp.sign(g)`: `optax.clip`, `optax.scale_by_sign` inside
      `lazy_rows`, where duplicates are summed; or `slices.with_rows(...)`.
    - `jax.lax.psum`, `jax.lax.pmean`: `monolith_optax.psum`, `monolith_optax.pmean`.
    - `optax.global_norm`, `optax.tree.norm`: `monolith_optax.global_norm`. Outside jit,
      JAX says 'Cannot call abstract method real' of these.
    - `eqx.apply_updates`: `monolith_optax.apply_updates`.

    Orbax, `jax.export` and `flax.serialization` do not take slices. No state holds
    any; save their `ids` and `rows` as arrays.

    Attributes:
      rows: a floating-point array of shape `ids.shape + row_shape`.

    Args:
      ids: integers of any shape. They are kept as int32; those that do not fit are
        padding.
      rows: an array of shape `ids.shape + row_shape`.

    Raises:
      ValueError: the ids are not integers or the rows not floating-point numbers, or
        the shapes do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowSlices
      >>> slices = RowSlices(jnp.array([2, 0, 2, -1]), jnp.ones((4, 2)))
      >>> print(slices.ids)
      [ 2  0  2 -1]
      >>> print(slices.to_dense(3))
      [[1. 1.]
       [0. 0.]
       [2. 2.]]
    """

    _ids: jax.Array  # opaque, or what stands for a leaf where JAX rebuilds trees
    rows: jax.Array
    _placement: Placement | None

    # NumPy's operators would otherwise take the slices for an element.
    __array_ufunc__ = None

    def __array__(self, *_: object, **__: object) -> Any:
        raise TypeError(
            "RowSlices are not an array: slices.to_dense(num_rows) makes one, and "
            "slices.ids and slices.rows are what they hold."
        )

    def __init__(self, ids: ArrayLike, rows: ArrayLike) -> None:
        object.__setattr__(self, "_ids", opaque(int32_ids(ids)))
        object.__setattr__(self, "rows", jnp.asarray(rows))
        object.__setattr__(self, "_placement", None)
        _check(self)

    @classmethod
    def placed(
        cls, ids: jax.Array, rows: jax.Array, placement: Placement | None
    ) -> "RowSlices":
        """Slices of a table that is spread over devices; not for users.

        None is the placement of other tables.
        """
        return cls.tree_unflatten(None, (opaque(ids), rows, placement))

    @property
    def placement(self) -> Placement | None:
        """Where the rows are, if the table is spread over devices; not for users."""
        if self._placement is not None:
            given, batches = self._placement.spilled.shape, self._ids.shape[:-1]
            if given != batches:
                raise ValueError(
                    f"The row ids of a spread table have the shape {self._ids.shape}, "
                    f"but there are placements for {given or 'one'} of its batches: "
                    "slices have been reshaped, and nothing tells which device has "
                    "which ids. Use RowSlices.concatenate or `+` to join them."
                )
        return self._placement

    @property
    def ids(self) -> jax.Array:
        """The row ids, int32.

        Raises:
          TypeError: a function that maps over leaves has replaced them.
        """
        if not is_opaque(self._ids):
            raise TypeError(
                f"The row ids of RowSlices have become {_describe(self._ids)}: a "
                "function that maps over leaves has replaced them."
            )
        if isinstance(self._ids, jax.ShapeDtypeStruct):
            shape = cast(ArrayType, self._ids)
            return cast(jax.Array, shape.update(dtype=jnp.int32))
        return plain(self._ids)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self.rows.shape[len(self._ids.shape) :]

    def with_rows(self, rows: ArrayLike) -> "RowSlices":
        """Other rows for the same ids.

        Args:
          rows: a floating-point array whose first axes are those of the ids. Rows may
            have another shape and dtype than those of these slices.

        Returns:
          New slices.

        Raises:
          ValueError: the first axes are not those of the ids, or the dtype is not a
            floating-point one.
        """
        children = self._ids, jnp.asarray(rows), self._placement
        slices = RowSlices.tree_unflatten(None, children)
        _check(slices)
        return slices

    def astype(self, dtype: DTypeLike) -> "RowSlices":
        """The slices with rows of another dtype.

        Args:
          dtype: a floating-point dtype.

        Returns:
          New slices.

        Raises:
          ValueError: the dtype is not a floating-point one.
        """
        return self.with_rows(self.rows.astype(dtype))

    def to_dense(self, num_rows: int | tuple[int, ...]) -> jax.Array:
        """The table that the slices stand for: zeros, and the sums of the rows.

        Args:
          num_rows: how many rows the table has. For a stack of tables, a tuple such as
            `(tables, rows)`. Ids beyond it are padding.

        Returns:
          An array of shape `(num_rows, *row_shape)` in the dtype of the rows.

        Raises:
          TypeError: the ids have been replaced by a function that maps over leaves.
        """
        wide = at_least_float32(self.rows.dtype)
        axes = num_rows if isinstance(num_rows, tuple) else (num_rows,)
        table: jax.Array = jnp.zeros((*axes, *self.row_shape), wide) + self
        return table.astype(self.rows.dtype)

    @staticmethod
    def concatenate(slices: "Sequence[RowSlices]") -> "RowSlices":
        """The sum of slices of one table: several lookups, or several batches.

        Args:
          slices: at least one, with rows of one shape.

        Returns:
          Slices of all ids and rows, one after the other.

        Raises:
          ValueError: there are none, their rows have several shapes, or only some of
            them are of a table that is spread over devices.
        """
        row_shapes = {part.row_shape for part in slices}
        if len(row_shapes) != 1:
            raise ValueError(
                f"Slices of one table have rows of one shape, not {row_shapes or None}."
            )
        if any(part.placement is not None for part in slices):
            return _concatenated_on_devices(slices)
        [row_shape] = row_shapes
        return RowSlices(
            jnp.concatenate([replicated(part.ids).reshape(-1) for part in slices]),
            jnp.concatenate(
                [
                    replicated(part.rows).reshape(part.ids.size, *row_shape)
                    for part in slices
                ]
            ),
        )

    @overload
    def __add__(self, other: "RowSlices") -> "RowSlices": ...
    @overload
    def __add__(self, other: ArrayLike) -> jax.Array: ...
    def __add__(self, other: "RowSlices | ArrayLike") -> "RowSlices | jax.Array":
        """`slices + slices` are slices, `table + slices` is a table, in its dtype.

        Args:
          other: other slices of the same table, or the table, of floating point.

        Returns:
          Slices of the ids and rows of both, or the table with the rows added.

        Raises:
          ValueError: the rows do not fit the other rows or the table, or the table has
            no floating-point dtype.
        """
        if isinstance(other, RowSlices):
            return RowSlices.concatenate([self, other])
        table = jnp.asarray(other)
        if (axes := row_axes(table.shape, self)) is None:
            raise ValueError(
                f"Rows of shape {self.row_shape} cannot be added to a table of shape "
                f"{table.shape}."
            )
        if not jnp.issubdtype(table.dtype, jnp.inexact):
            raise ValueError(
                f"Rows of {self.rows.dtype} cannot be added to a table of "
                f"{table.dtype}: it must have a floating-point dtype."
            )
        flat = flattened(table, axes)
        total = add_rows(flat, self.ids, self.rows, self.placement)
        return total.reshape(table.shape)

    __radd__ = __add__

    @overload
    def __sub__(self, other: "RowSlices") -> "RowSlices": ...
    @overload
    def __sub__(self, other: ArrayLike) -> jax.Array: ...
    def __sub__(self, other: Any) -> Any:
        """`slices - slices` are slices, `slices - table` is a table.

        Args and errors are those of `+`.
        """
        return self + -other

    def __rsub__(self, table: ArrayLike) -> jax.Array:
        """`table - slices` is a table, in its dtype."""
        difference: jax.Array = -self + table
        return difference

    def __mul__(self, scalar: ArrayLike) -> "RowSlices":
        """The slices scaled by a number, in the dtype of their rows.

        Args:
          scalar: a number or an array of shape ().

        Returns:
          New slices.

        Raises:
          ValueError: it is an array with axes.
        """
        return self._scaled(jnp.multiply, scalar)

    __rmul__ = __mul__

    def __truediv__(self, scalar: ArrayLike) -> "RowSlices":
        """The slices divided by a number, in the dtype of their rows.

        Args:
          scalar: a number or an array of shape ().

        Returns:
          New slices.

        Raises:
          ValueError: it is an array with axes.
        """
        return self._scaled(jnp.divide, scalar)

    def __neg__(self) -> "RowSlices":
        """The slices with their sign changed."""
        return self.with_rows(-self.rows)

    def _scaled(
        self, operation: Callable[..., jax.Array], scalar: ArrayLike
    ) -> "RowSlices":
        if jnp.ndim(scalar) != 0:
            raise ValueError(
                f"RowSlices are scaled by a scalar, not by shape {jnp.shape(scalar)}."
            )
        wide = at_least_float32(self.rows.dtype)
        rows = operation(self.rows.astype(wide), jnp.asarray(scalar, wide))
        return self.with_rows(rows.astype(self.rows.dtype))

    def __repr__(self) -> str:
        return f"RowSlices(ids={self._shown_ids()!r}, rows={self.rows!r})"

    def __str__(self) -> str:
        return f"RowSlices(ids={self._shown_ids()}, rows={self.rows})"

    def _shown_ids(self) -> jax.Array:
        return self.ids if is_opaque(self._ids) else self._ids

    def __reduce__(self) -> tuple[type, tuple[jax.Array, jax.Array]]:
        # Pickles do not depend on how JAX stores typed keys.
        return RowSlices, (self.ids, self.rows)

    def tree_flatten_with_keys(self) -> tuple[PyTree, None]:
        key = jax.tree_util.GetAttrKey
        names = "ids", "rows", "placement"
        children = self._ids, self.rows, self._placement
        return tuple(zip(map(key, names), children, strict=True)), None

    @classmethod
    def tree_unflatten(cls, _: None, children: PyTree) -> "RowSlices":
        # JAX unflattens with placeholders too, which the checks would not understand.
        self = object.__new__(cls)
        object.__setattr__(self, "_ids", children[0])
        object.__setattr__(self, "rows", children[1])
        object.__setattr__(self, "_placement", children[2])
        return self


def is_slices(node: object) -> TypeGuard[RowSlices]:
    """Whether a node of a tree is a `RowSlices`."""
    return isinstance(node, RowSlices)


def row_axes(shape: tuple[int, ...], slices: RowSlices) -> tuple[int, ...] | None:
    """The first axes of a parameter whose rows slices are; None if they are not.

    There are several if the parameter is a stack of tables. Numbers are not looked for
    in stacks, since slices of numbers for a table of longer rows are a mistake.
    """
    row_shape = slices.row_shape
    count = len(shape) - len(row_shape)
    is_stack = count > 1 and len(row_shape) > 0
    if shape[count:] != row_shape or not (count == 1 or is_stack):
        return None
    return shape[:count]


def _concatenated_on_devices(slices: Sequence[RowSlices]) -> RowSlices:
    """The sum of slices of one spread table, each part where it is."""
    placements = [part.placement for part in slices]
    first = placements[0]
    spreads = {placement and placement.spread for placement in placements}
    if first is None or len(spreads) > 1:
        raise ValueError(
            "Slices of a table that is spread over devices can only be added to others "
            "of the same table: take all of their gradients with the same tables= of "
            "value_and_row_grad."
        )
    flags = [jnp.any(placement.spilled) for placement in placements if placement]
    ids, rows, placement = first.concatenated(
        [(part.ids, part.rows) for part in slices], jnp.any(jnp.stack(flags))
    )
    return RowSlices.placed(ids, rows, placement)


def _check(slices: RowSlices) -> None:
    rows, ids_shape = slices.rows, slices._ids.shape
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        raise ValueError(
            f"The rows of RowSlices must have a floating-point dtype, not {rows.dtype}."
        )
    if rows.shape[: len(ids_shape)] != ids_shape:
        raise ValueError(
            f"The rows of RowSlices must have the shape of the ids, {ids_shape}, "
            f"before that of a row, but their shape is {rows.shape}."
        )


def _describe(leaf: object) -> str:
    return str(getattr(leaf, "dtype", type(leaf).__name__))
