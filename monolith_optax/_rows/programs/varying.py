"""The mesh axes over which values differ from device to device, inside `shard_map`."""

from collections.abc import Sequence

import jax
from jax import lax

from monolith_optax._rows.types import ArrayType


def varying(aval: ArrayType) -> frozenset[str]:
    """The mesh axes over which values of a type differ from device to device."""
    manual = getattr(aval, "mat", None)
    axes: frozenset[str] = aval.vma if manual is None else manual.varying
    return axes


def as_varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """An array as one that may differ over some more mesh axes."""
    more = tuple(sorted(axes - varying(jax.typeof(array))))
    if not more:
        return array
    if hasattr(lax, "pcast"):
        array = lax.pcast(array, more, to="varying")
    else:  # JAX 0.8
        array = vars(lax)["pvary"](array, more)
    return array


def alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays that differ over the same mesh axes: over all that one of them does."""
    axes = frozenset().union(*(varying(jax.typeof(array)) for array in arrays))
    return [as_varying(array, axes) for array in arrays] if axes else list(arrays)
