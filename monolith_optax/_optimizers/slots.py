"""Slots: the arrays that an optimizer keeps for each parameter."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._leaves import dtype_of
from monolith_optax._shardings import explicit_sharding


@dataclass(frozen=True)
class Slot:
    """How a slot starts and how many numbers it has.

    Attributes:
      start: the number that every entry starts with.
      per: one number for each entry of a parameter; for each row of it, which is an
        index of its leading axis; or one scalar for the whole tree.
      dtype: of a slot of integers, which no option changes. None: real numbers.
    """

    start: ArrayLike = 0.0
    per: Literal["entry", "row", "tree"] = "entry"
    dtype: DTypeLike | None = None

    @property
    def is_real(self) -> bool:
        """Whether it holds real numbers, not integers."""
        return self.dtype is None

    def init(self, params: optax.Params, slot_dtype: DTypeLike | None) -> Any:
        """The slot of new parameters, sharded as they are."""
        if self.per == "tree":
            return jnp.full([], self.start, _one_dtype(params, slot_dtype))

        def full(param: ArrayLike) -> jax.Array:
            dtype = self.dtype or _slot_dtype(param, slot_dtype)
            if self.per == "entry":
                return jnp.full_like(param, self.start, dtype=dtype)
            return _full_rows(param, self.start, dtype)

        return jax.tree.map(full, params)

    def shape(self, param_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the slot of one parameter."""
        return {"entry": param_shape, "row": param_shape[:1], "tree": ()}[self.per]

    def spread(self, slot: Any, updates: optax.Updates) -> Any:
        """A slot for each parameter, even if they share one."""
        if self.per == "tree":
            return jax.tree.map(lambda _: slot, updates)
        return slot

    def joined(self, slot: Any, old: Any) -> Any:
        """The reverse of `spread`; `old` if there are no parameters."""
        if self.per == "tree":
            return next(iter(jax.tree.leaves(slot)), old)
        return slot

    def for_rule(self, slot: ArrayLike, ndim: int, dtype: DTypeLike) -> jax.Array:
        """The slot of one parameter in the rule's dtype, shaped to broadcast."""
        slot = jnp.asarray(slot, self.dtype or dtype)
        if self.per == "row":
            slot = jnp.expand_dims(slot, range(slot.ndim, ndim))
        return slot

    def from_rule(self, new: jax.Array, old: ArrayLike) -> jax.Array:
        """The rule's new slot in the shape and dtype of the old one."""
        if self.per == "row":
            new = jnp.squeeze(new, range(np.ndim(old), new.ndim))
        return new.astype(dtype_of(old))


def wide(dtype: DTypeLike) -> np.dtype:
    """The dtype in which numbers of `dtype` are computed: float32 or wider."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _slot_dtype(param: ArrayLike, slot_dtype: DTypeLike | None) -> DTypeLike:
    return wide(dtype_of(param)) if slot_dtype is None else slot_dtype


def _one_dtype(params: optax.Params, slot_dtype: DTypeLike | None) -> DTypeLike:
    dtypes = {np.dtype(_slot_dtype(p, slot_dtype)) for p in jax.tree.leaves(params)}
    if len(dtypes) > 1:
        raise ValueError(
            "A slot that is one scalar for all parameters needs one dtype, but these "
            f"parameters have slots of {sorted(map(str, dtypes))}. Give slot_dtype, or "
            "keep the slot in full."
        )
    return dtypes.pop() if dtypes else np.dtype(np.float32)


def _full_rows(param: Any, start: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """One number per row, sharded like the rows if their sharding is known."""
    shape = np.shape(param)[:1]
    traced = isinstance(param, jax.core.Tracer)
    sharding = getattr(jax.typeof(param) if traced else param, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jnp.full(shape, start, dtype)
    rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    if not traced:
        return jnp.full(shape, start, dtype, device=rows)
    full = jnp.full(shape, start, dtype)
    return jax.sharding.reshard(full, rows) if explicit_sharding(param) else full
