"""Adadelta of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from monolith_optax._optimizers.base import from_rule
from monolith_optax._optimizers.weight_decay import WeightDecay
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class AdadeltaState(NamedTuple):
    """The state of `adadelta`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      accum: the average of squared gradients, of the parameter's shape.
      accum_update: the average of squared steps before the learning rate, of the
        parameter's shape.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    accum: optax.Params
    accum_update: optax.Params


def adadelta(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    weight_decay_factor: ArrayLike = 0.0,
    averaging_ratio: ArrayLike = 0.9,
    epsilon: ArrayLike = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""Adadelta of Monolith's embedding tables.

    With :math:`d = g + \text{weight\_decay\_factor} \cdot w` and
    :math:`\rho = \text{averaging\_ratio}`, a step computes

    .. math::

      \text{accum} &\leftarrow \rho \cdot \text{accum} + (1 - \rho) \cdot d^2 \\
      u &= d \cdot \sqrt{\text{accum\_update} + \text{epsilon}}
        \, / \sqrt{\text{accum} + \text{epsilon}} \\
      w &\leftarrow w - \text{learning\_rate} \cdot u \\
      \text{accum\_update} &\leftarrow
        \rho \cdot \text{accum\_update} + (1 - \rho) \cdot u^2

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      weight_decay_factor: coupled weight decay (L2), not negative. Unless it is the
        number 0, `update` needs params.
      averaging_ratio: the decay of both averages, in [0, 1].
      epsilon: what the first steps live on, as `accum_update` starts with 0; not
        negative.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `AdadeltaState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing although there is weight decay
        (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.adadelta(1.0, averaging_ratio=0.75, epsilon=0.75)
      >>> table = jnp.ones((2, 3))
      >>> state = tx.init(table)
      >>> updates, state = tx.update(jnp.full((2, 3), 3.0), state, table)
      >>> print(optax.apply_updates(table, updates)[0], state.accum[0])
      [-0.5 -0.5 -0.5] [2.25 2.25 2.25]

    References:
      Zeiler, `ADADELTA: An Adaptive Learning Rate Method
      <https://arxiv.org/abs/1212.5701>`_, 2012, and `AdadeltaOptimizer` of `Monolith
      <https://github.com/bytedance/monolith>`_. At commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/adadelta_optimizer.cc`.
    """

    def rule(
        d: jax.Array,
        w: object,
        slots: AdadeltaState,
        *,
        learning_rate: jax.Array,
        averaging_ratio: jax.Array,
        epsilon: jax.Array,
    ) -> tuple[jax.Array, AdadeltaState]:
        del w
        rho = averaging_ratio
        accum = rho * slots.accum + (1 - rho) * d * d
        u = jnp.sqrt(slots.accum_update + epsilon) / jnp.sqrt(accum + epsilon) * d
        accum_update = rho * slots.accum_update + (1 - rho) * u * u
        slots = slots._replace(accum=accum, accum_update=accum_update)
        return -(learning_rate * u), slots

    return from_rule(
        rule,
        AdadeltaState,
        learning_rate=learning_rate,
        fractions={"averaging_ratio": averaging_ratio},
        nonnegative={"epsilon": epsilon},
        weight_decay=WeightDecay(weight_decay_factor, name="weight_decay_factor"),
    )
