"""Errors that say what to do instead of a derivative."""

from typing import NoReturn, TypeAlias

import jax
from jax.custom_derivatives import linear_call

_Arrays: TypeAlias = tuple[jax.Array]


@jax.custom_jvp
def forward_only(array: jax.Array) -> jax.Array:
    """The array, without derivatives in reverse mode.

    The loops of a ring have as many turns as the batch needs, which JAX does not
    reverse.
    """
    return array


@forward_only.defjvp
def _forward(primals: _Arrays, tangents: _Arrays) -> tuple[jax.Array, jax.Array]:
    [array], [tangent] = primals, tangents
    return forward_only(array), linear_call(lambda _, x: x, _refuse, (), tangent)


def _refuse(_: tuple[()], cotangent: jax.Array) -> NoReturn:
    del cotangent
    raise ValueError(
        "A gradient is taken through rows that are exchanged between devices, as for a "
        "second derivative, but only jax.jvp goes through an exchange: say True "
        "instead of a PartitionSpec in tables, or use jax.lax.stop_gradient."
    )


@jax.custom_jvp
def no_derivatives(array: jax.Array) -> jax.Array:
    """The array, without derivatives."""
    return array


@no_derivatives.defjvp
def _none(primals: _Arrays, tangents: _Arrays) -> NoReturn:
    del primals, tangents
    raise ValueError(
        "A derivative is taken of what a function of with_row_lookups returns, but it "
        "is for evaluation only: use value_and_row_grad, or jax.lax.stop_gradient for "
        "its arguments."
    )
