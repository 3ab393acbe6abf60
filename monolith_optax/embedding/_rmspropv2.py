"""RMSprop, version 2, of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import optax
from jax.typing import ArrayLike

from monolith_optax._optimizers.base import from_rule, root
from monolith_optax._optimizers.weight_decay import WeightDecay
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class RmspropV2State(NamedTuple):
    """The state of `rmspropv2`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      n: the decayed sum of squared gradients, of the parameter's shape.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    n: optax.Params


def rmspropv2(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    weight_decay_factor: ArrayLike = 0.0,
    momentum: ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""RMSprop, version 2, of Monolith's embedding tables.

    With :math:`d = g + \text{weight\_decay\_factor} \cdot w`, a step computes

    .. math::

      n &\leftarrow \text{momentum} \cdot n + d^2 \\
      w &\leftarrow w - \text{learning\_rate} \cdot d / (\sqrt{n} + 1)

    It differs from `rmsprop` in that `n` is a sum, not an average. It has no momentum
    in spite of its argument's name, which is Monolith's.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      weight_decay_factor: coupled weight decay (L2), not negative. Unless it is the
        number 0, `update` needs params.
      momentum: the decay of `n`, in [0, 1].

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `RmspropV2State`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing although there is weight decay
        (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.rmspropv2(1.0, momentum=0.5)
      >>> table = jnp.ones((2, 3))
      >>> state = tx.init(table)
      >>> updates, state = tx.update(jnp.full((2, 3), 3.0), state, table)
      >>> print(optax.apply_updates(table, updates)[0], state.n[0])
      [0.25 0.25 0.25] [9. 9. 9.]

    References:
      `RmspropV2Optimizer` of `Monolith <https://github.com/bytedance/monolith>`_. At
      commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/rmsprop_optimizer.cc`.
    """

    def rule(
        d: jax.Array,
        w: object,
        slots: RmspropV2State,
        *,
        learning_rate: jax.Array,
        momentum: jax.Array,
    ) -> tuple[jax.Array, RmspropV2State]:
        del w
        n = momentum * slots.n + d * d
        return -(learning_rate / (root(n) + 1) * d), slots._replace(n=n)

    return from_rule(
        rule,
        RmspropV2State,
        learning_rate=learning_rate,
        fractions={"momentum": momentum},
        weight_decay=WeightDecay(weight_decay_factor, name="weight_decay_factor"),
    )
