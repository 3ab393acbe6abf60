"""The moving average of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import optax
from jax.typing import ArrayLike

from monolith_optax._optimizers.base import from_rule
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class MovingAverageState(NamedTuple):
    """The state of `moving_average`.

    Attributes:
      count: int32 scalar, the steps taken so far.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way


def moving_average(
    momentum: ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""The moving average of Monolith's embedding tables.

    It minimises nothing: what it is given as a gradient *is* the new observation, and
    the parameter is the average of what has been observed. A step computes

    .. math::

      w \leftarrow \text{momentum} \cdot w + (1 - \text{momentum}) \cdot g

    There is no learning rate.

    Args:
      momentum: the decay of the average, in [0, 1].

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a
      `MovingAverageState`.

    Raises:
      ValueError: `momentum` is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.moving_average(0.5)
      >>> average = jnp.zeros((2, 3))
      >>> state = tx.init(average)
      >>> updates, state = tx.update(jnp.full((2, 3), 8.0), state, average)
      >>> print(optax.apply_updates(average, updates)[0])
      [4. 4. 4.]

    References:
      `MovingAverageOptimizer` of `Monolith <https://github.com/bytedance/monolith>`_.
      At commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/moving_average_optimizer.cc`.
    """

    def rule(
        g: jax.Array,
        w: jax.Array,
        slots: MovingAverageState,
        *,
        learning_rate: object,
        momentum: jax.Array,
    ) -> tuple[jax.Array, MovingAverageState]:
        del learning_rate
        return (1 - momentum) * (g - w), slots

    return from_rule(
        rule,
        MovingAverageState,
        learning_rate=1.0,
        fractions={"momentum": momentum},
        needs_params=True,
    )
