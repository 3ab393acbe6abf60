"""Momentum of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import optax
from jax.typing import ArrayLike

from monolith_optax._optimizers.base import from_rule
from monolith_optax._optimizers.weight_decay import WeightDecay
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class MomentumState(NamedTuple):
    """The state of `momentum`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      n: the momentum, which is what the last step added, of the parameter's shape.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    n: optax.Params


def momentum(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    weight_decay_factor: ArrayLike = 0.0,
    use_nesterov: bool = False,
    momentum: ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum of Monolith's embedding tables.

    With :math:`d = g + \text{weight\_decay\_factor} \cdot w`, a step computes

    .. math::

      n &\leftarrow \text{momentum} \cdot n - \text{learning\_rate} \cdot d \\
      w &\leftarrow w + n

    or, with `use_nesterov` and with :math:`n_\text{old}` for `n` before the step,

    .. math::

      w \leftarrow w - \text{momentum} \cdot n_\text{old}
        + (1 + \text{momentum}) \cdot n

    The learning rate is inside `n`, so a schedule changes what later steps carry.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      weight_decay_factor: coupled weight decay (L2), not negative. Unless it is the
        number 0, `update` needs params.
      use_nesterov: whether the step looks ahead.
      momentum: the decay of `n`, in [0, 1].

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `MomentumState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing although there is weight decay
        (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.momentum(0.1)
      >>> table = jnp.ones((2, 3))
      >>> state = tx.init(table)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones((2, 3)), state, table)
      ...     table = optax.apply_updates(table, updates)
      >>> print(table[0], state.n[0])
      [0.71 0.71 0.71] [-0.19 -0.19 -0.19]

    References:
      `MomentumOptimizer` of `Monolith <https://github.com/bytedance/monolith>`_. At
      commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/momentum_optimizer.cc`.
    """

    def rule(
        d: jax.Array,
        w: object,
        slots: MomentumState,
        *,
        learning_rate: jax.Array,
        momentum: jax.Array,
    ) -> tuple[jax.Array, MomentumState]:
        del w
        n = momentum * slots.n - learning_rate * d
        step = momentum * n - learning_rate * d if use_nesterov else n
        return step, slots._replace(n=n)

    return from_rule(
        rule,
        MomentumState,
        learning_rate=learning_rate,
        fractions={"momentum": momentum},
        weight_decay=WeightDecay(weight_decay_factor, name="weight_decay_factor"),
    )
