"""RowSlices: a few rows of a table, named by their ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._public import public
from monolith_optax._rows.slices.concatenate import concatenated
from monolith_optax._rows.slices.duplicates import at_least_float32
from monolith_optax._rows.slices.opaque_ids import is_opaque, opaque, plain
from monolith_optax._rows.slices.parts import checked_rows, int32_ids
from monolith_optax._rows.slices.row_access import add_slices
from monolith_optax._rows.slices.spread import Placement
from monolith_optax._rows.types import PyTree


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
        opaque_ids = opaque(int32_ids(ids))
        rows = checked_rows(rows, opaque_ids.shape)
        vars(self).update(_ids=opaque_ids, rows=rows, _placement=None)

    @classmethod
    def placed(
        cls, ids: jax.Array, rows: jax.Array, placement: Placement | None
    ) -> "RowSlices":
        """Slices of a table that may be spread over devices; not for users."""
        return cls.tree_unflatten(None, (opaque(ids), rows, placement))

    @property
    def placement(self) -> Placement | None:
        """Where the rows are, if the table is spread over devices; not for users."""
        if self._placement is not None:
            self._placement.check_batches(self._ids.shape)
        return self._placement

    @property
    def ids(self) -> jax.Array:
        """The row ids, int32.

        Raises:
          TypeError: a function that maps over leaves has replaced them.
        """
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
        rows = checked_rows(rows, self._ids.shape)
        return RowSlices.tree_unflatten(None, (self._ids, rows, self._placement))

    def astype(self, dtype: DTypeLike) -> "RowSlices":
        """The slices with rows of another dtype.

        Args:
          dtype: a floating-point dtype.

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
        parts = [(part.ids, part.rows, part.placement) for part in slices]
        return RowSlices.placed(*concatenated(parts))

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
        return add_slices(jnp.asarray(other), self.ids, self.rows, self.placement)

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
        return -self + table

    def __mul__(self, scalar: ArrayLike) -> "RowSlices":
        """The slices scaled by a number, in the dtype of their rows.

        Args:
          scalar: a number or an array of shape ().

        Raises:
          ValueError: it is an array with axes.
        """
        return self._scaled(jnp.multiply, scalar)

    __rmul__ = __mul__

    def __truediv__(self, scalar: ArrayLike) -> "RowSlices":
        """The slices divided by a number; args and errors are those of `*`."""
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
        vars(self).update(zip(("_ids", "rows", "_placement"), children, strict=True))
        return self


def is_slices(node: object) -> TypeGuard[RowSlices]:
    """Whether a node of a tree is a `RowSlices`."""
    return isinstance(node, RowSlices)
