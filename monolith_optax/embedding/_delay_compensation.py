"""Compensation of late gradients, of Monolith's embedding tables."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from monolith_optax._leaves import dtype_of
from monolith_optax._optimizers import checks
from monolith_optax._optimizers.base import as_dtype
from monolith_optax._optimizers.slots import wide


def delay_compensation(
    inner: optax.GradientTransformation, lambda_: ArrayLike = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Corrects gradients that were computed at older parameters.

    Where parameters are updated asynchronously they have moved on by the time a
    gradient comes in. To first order, with the square of the gradient for the Hessian,
    the gradient at the parameters :math:`w` of now is

    .. math::

      g \leftarrow g + \text{lambda\_} \cdot g^2 \cdot (w - \text{latest})

    where `latest` are the parameters at which it was computed. The inner optimizer
    steps with it.

    Args:
      inner: the optimizer.
      lambda_: how much is corrected; not negative.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is the inner one's. Its
      `update` needs the extra argument `latest=`, a tree like the parameters. Inside
      `monolith_optax.lazy_rows` only the batch's rows of `latest` are read.

    Raises:
      ValueError: `lambda_` is out of range, or params or `latest` are missing, or
        they and the gradients do not match (`update`), or what the inner optimizer
        raises.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.delay_compensation(embedding.sgd(1.0), lambda_=0.5)
      >>> latest, table = jnp.ones((2, 3)), jnp.full((2, 3), 3.0)
      >>> state = tx.init(table)
      >>> updates, state = tx.update(
      ...     jnp.full((2, 3), 2.0), state, table, latest=latest
      ... )
      >>> print(updates[0])
      [-6. -6. -6.]

    References:
      Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay Compensation
      <https://arxiv.org/abs/1609.08326>`_, 2017, and Monolith's wrapper of its
      embedding tables' optimizers, which nothing in its published code calls. At commit
      135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/dc_optimizer.cc`.
    """
    checks.check_hyperparameter("lambda_", lambda_)
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        latest: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        for name, tree in {"params": params, "latest": latest}.items():
            if tree is None:
                raise ValueError(
                    f"delay_compensation needs {name}: call "
                    "update(gradients, state, params, latest=latest)."
                )
        checks.check_like(params, gradients=updates, latest=latest)
        compensated = jax.tree.map(compensate, updates, params, latest)
        result: tuple[Any, Any] = inner.update(compensated, state, params, **extra_args)
        return result

    def compensate(grad: ArrayLike, param: ArrayLike, latest: ArrayLike) -> jax.Array:
        dtype = wide(dtype_of(param))
        g, w, old = (jnp.asarray(x, dtype) for x in (grad, param, latest))
        rate: jax.Array = as_dtype(lambda_, dtype)
        return g + rate * g * g * (w - old)

    return optax.GradientTransformationExtraArgs(inner.init, update)
