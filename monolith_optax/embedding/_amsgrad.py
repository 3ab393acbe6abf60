"""AMSGrad of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from monolith_optax._optimizers.base import from_rule, root
from monolith_optax._optimizers.slots import Slot
from monolith_optax._optimizers.weight_decay import WeightDecay
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class AmsgradState(NamedTuple):
    """The state of `amsgrad`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      m: the average of gradients, of the parameter's shape.
      v: the average of squared gradients, of the parameter's shape.
      vhat: the largest `v` so far, of the parameter's shape.
      beta1_power: `beta1` to the power of the steps of this row and one, of shape
        `(rows,)`.
      beta2_power: the same of `beta2`.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    m: optax.Params
    v: optax.Params
    vhat: optax.Params
    beta1_power: optax.Params
    beta2_power: optax.Params


def amsgrad(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    beta1: ArrayLike = 0.9,
    beta2: ArrayLike = 0.99,
    weight_decay_factor: ArrayLike = 0.0,
    use_nesterov: bool = False,
    epsilon: ArrayLike = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""AMSGrad of Monolith's embedding tables.

    With :math:`d = g + \text{weight\_decay\_factor} \cdot w`, a step computes

    .. math::

      m &\leftarrow m + (1 - \text{beta1}) (d - m) \\
      v &\leftarrow v + (1 - \text{beta2}) (d^2 - v) \\
      \text{vhat} &\leftarrow \max(\text{vhat}, v) \\
      w &\leftarrow w - \text{learning\_rate} \cdot
        \frac{\sqrt{1 - \text{beta2\_power}}}{1 - \text{beta1\_power}} \cdot
        \frac{m}{\sqrt{\text{vhat}} + \text{epsilon}} \\
      \text{beta1\_power} &\leftarrow \text{beta1} \cdot \text{beta1\_power} \\
      \text{beta2\_power} &\leftarrow \text{beta2} \cdot \text{beta2\_power}

    and, with `use_nesterov`, the step has
    :math:`(1 - \text{beta1}) \cdot d + \text{beta1} \cdot m` for `m`.

    The two powers are kept for each row and start with `beta1` and `beta2`. Inside
    `monolith_optax.lazy_rows` bias correction thus counts the steps of each row, where
    `optax.amsgrad` counts all steps. `vhat` is the largest `v` before bias correction,
    and so is the root that epsilon, which is large by default, is added to.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      beta1: the decay of `m`, in [0, 1]. With 1 nothing moves.
      beta2: the decay of `v`, in [0, 1]. With 1 nothing moves.
      weight_decay_factor: coupled weight decay (L2), not negative. Unless it is the
        number 0, `update` needs params.
      use_nesterov: whether the step looks ahead.
      epsilon: keeps the denominator from zero; not negative.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `AmsgradState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing although there is weight decay
        (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.amsgrad(0.1, beta1=0.5, epsilon=1e-8)
      >>> table = jnp.ones((2, 3))
      >>> state = tx.init(table)
      >>> updates, state = tx.update(jnp.full((2, 3), 2.0), state, table)
      >>> print(optax.apply_updates(table, updates)[0], state.beta1_power)
      [0.9 0.9 0.9] [0.25 0.25]

    References:
      Reddi et al., `On the Convergence of Adam and Beyond
      <https://openreview.net/forum?id=ryQu7f-RZ>`_, 2018, and `AmsgradOptimizer` of
      `Monolith <https://github.com/bytedance/monolith>`_. At commit 135c491 the rule is
      in `monolith/native_training/runtime/hash_table/optimizer/amsgrad_optimizer.cc`.
    """

    def rule(
        d: jax.Array,
        w: object,
        slots: AmsgradState,
        *,
        learning_rate: jax.Array,
        beta1: jax.Array,
        beta2: jax.Array,
        epsilon: jax.Array,
    ) -> tuple[jax.Array, AmsgradState]:
        del w
        m = slots.m + (1 - beta1) * (d - slots.m)
        v = slots.v + (1 - beta2) * (d * d - slots.v)
        vhat = jnp.maximum(slots.vhat, v)
        average = (1 - beta1) * d + beta1 * m if use_nesterov else m
        rest = 1 - slots.beta1_power
        rate = jnp.sqrt(1 - slots.beta2_power) / jnp.where(rest > 0, rest, 1)
        step = learning_rate * rate * average / (root(vhat) + epsilon)
        return -step, slots._replace(
            m=m,
            v=v,
            vhat=vhat,
            beta1_power=beta1 * slots.beta1_power,
            beta2_power=beta2 * slots.beta2_power,
        )

    return from_rule(
        rule,
        AmsgradState,
        learning_rate=learning_rate,
        fractions={"beta1": beta1, "beta2": beta2},
        nonnegative={"epsilon": epsilon},
        weight_decay=WeightDecay(weight_decay_factor, name="weight_decay_factor"),
        slots={
            "beta1_power": Slot(start=beta1, per="row"),
            "beta2_power": Slot(start=beta2, per="row"),
        },
    )
