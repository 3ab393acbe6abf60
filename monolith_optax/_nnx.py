"""`nnx.value_and_grad` by rows; Flax is imported when it is called."""

from collections.abc import Callable
from typing import Any

from monolith_optax._rows.gradients.value_and_row_grad import value_and_row_grad


def nnx_value_and_row_grad(
    fun: Callable[..., Any], tables: Any = None, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """`flax.nnx.value_and_grad` in which the gradients of tables are `RowSlices`.

    What the function changes in the model stays changed, as with `nnx.value_and_grad`:
    statistics of batches are updated, and random streams move on, so that dropout has
    another mask in each step.

    Args:
      fun: a function from a model, as its first argument, and others to a scalar.
      tables: as of `value_and_row_grad`, a prefix of `nnx.state(model, nnx.Param)`.
      has_aux: whether the function returns a pair, whose second part is passed on.

    Returns:
      A function of the same arguments that returns the value, or the pair, and the
      gradients of the model's `nnx.Param`s, for `nnx.Optimizer.update`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from monolith_optax import nnx_value_and_row_grad
      >>> model = nnx.Embed(1000, 2, rngs=nnx.Rngs(0))
      >>> def loss(model, ids):
      ...     return jnp.sum(model(ids))
      >>> _, gradients = nnx_value_and_row_grad(loss)(model, jnp.array([3, 14]))
      >>> print([leaf.shape for leaf in jax.tree.leaves(gradients)])  # ids and rows
      [(2,), (2, 2)]
    """

    def value_and_grad(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        from flax import nnx

        split: Any = nnx.split  # its types know no `...`
        graphdef, params, rest = split(model, nnx.Param, ...)

        def pure(params: Any) -> Any:
            # A copy, as variables from outside a trace may not change inside it.
            inner = nnx.merge(graphdef, params, rest, copy=True)
            result = fun(inner, *args, **kwargs)
            _, _, changed = split(inner, nnx.Param, ...)
            value, aux = result if has_aux else (result, None)
            return value, (aux, changed)

        grad = value_and_row_grad(pure, tables, has_aux=True)
        (value, (aux, changed)), gradients = grad(params)
        nnx.update(model, changed)
        return ((value, aux) if has_aux else value), gradients

    return value_and_grad
