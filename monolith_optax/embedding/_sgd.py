"""Stochastic gradient descent of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import optax

from monolith_optax._optimizers.base import from_rule
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class SgdState(NamedTuple):
    """The state of `sgd`.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way


def sgd(
    learning_rate: optax.ScalarOrSchedule = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient descent of Monolith's embedding tables.

    A step computes

    .. math::

      w \leftarrow w - \text{learning\_rate} \cdot g

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `SgdState`.

    Raises:
      ValueError: the learning rate is not a finite number, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.sgd(0.1)
      >>> table = jnp.ones((2, 3))
      >>> state = tx.init(table)
      >>> updates, state = tx.update(jnp.full((2, 3), 2.0), state, table)
      >>> print(optax.apply_updates(table, updates)[0])
      [0.8 0.8 0.8]

    References:
      `SgdOptimizer` of `Monolith <https://github.com/bytedance/monolith>`_. At commit
      135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/sgd_optimizer.cc`.
    """

    def rule(
        g: jax.Array, w: object, slots: SgdState, *, learning_rate: jax.Array
    ) -> tuple[jax.Array, SgdState]:
        del w
        return -(learning_rate * g), slots

    return from_rule(rule, SgdState, learning_rate=learning_rate)
