"""Row ids as a dtype of their own, on which JAX refuses arithmetic.

Row ids sit in trees of gradients, where every idiom that maps over leaves reaches them.
As integers they would be scaled, summed and clipped, and training would continue on
other rows. JAX's typed keys are arrays that can be moved but not computed with, and
its public way to define a kind of keys gives us such a dtype whose name tells what it
is. A key holds `~id`: the keys that `jnp.zeros_like` makes are then -1, padding.
"""

import functools
from typing import NoReturn, cast

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

from monolith_optax._rows.types import ArrayType


def _refuse(*_: object) -> NoReturn:
    raise TypeError("The row ids of RowSlices are not random keys.")


# What JAX prints where something computes with ids.
_TAG = (
    "row ids of RowSlices: put what computes with gradients inside lazy_rows, or use "
    "global_norm, accumulate or psum of monolith_optax"
)

_IMPL = define_prng_impl(
    key_shape=(1,),
    seed=_refuse,
    split=_refuse,
    random_bits=_refuse,
    fold_in=_refuse,
    name="row ids of RowSlices",
    tag=_TAG,
)
_DTYPE = jax.eval_shape(
    lambda data: jax.random.wrap_key_data(data, impl=_IMPL),
    jax.ShapeDtypeStruct((1,), jnp.uint32),
).dtype


def is_opaque(leaf: object) -> bool:
    """Whether a leaf of a tree is an array of opaque ids."""
    return bool(getattr(leaf, "dtype", None) == _DTYPE)


@functools.partial(jax.jit, inline=True)  # one program, also outside jit
def opaque(ids: jax.Array) -> jax.Array:
    """Opaque ids of int32 ids."""
    data = jax.lax.bitcast_convert_type(~ids, jnp.uint32)
    keys: jax.Array = jax.random.wrap_key_data(data[..., None], impl=_IMPL)
    return keys


def plain(ids: jax.Array) -> jax.Array:
    """The int32 ids of opaque ones, or their type.

    Raises:
      TypeError: a function that maps over leaves has replaced them.
    """
    if not is_opaque(ids):
        raise TypeError(
            f"The row ids of RowSlices have become {_describe(ids)}: a function that "
            "maps over leaves has replaced them."
        )
    if isinstance(ids, jax.ShapeDtypeStruct):
        return cast(jax.Array, cast(ArrayType, ids).update(dtype=jnp.int32))
    int32_ids: jax.Array = _int32(ids)
    return int32_ids


@functools.partial(jax.jit, inline=True)
def _int32(ids: jax.Array) -> jax.Array:
    data = jnp.squeeze(jax.random.key_data(ids), -1)
    return ~jax.lax.bitcast_convert_type(data, jnp.int32)


def _describe(leaf: object) -> str:
    return str(getattr(leaf, "dtype", type(leaf).__name__))
