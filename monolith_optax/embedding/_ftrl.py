"""FTRL of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from monolith_optax._optimizers import checks
from monolith_optax._optimizers.base import from_rule, root
from monolith_optax._optimizers.slots import Slot
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class FtrlState(NamedTuple):
    """The state of `ftrl`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      norm: the sum of squared gradients, of the parameter's shape.
      zero: the sum of gradients, corrected so that the weight follows from it, of the
        parameter's shape.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    norm: optax.Params
    zero: optax.Params


def ftrl(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    initial_accumulator_value: ArrayLike = 0.1,
    beta: ArrayLike = 0.0,
    l1_regularization: ArrayLike = 0.0,
    l2_regularization: ArrayLike = 0.0,
    *,
    bug_compatible: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""FTRL-Proximal of Monolith's embedding tables.

    It makes weights exactly 0 whose gradients do not outweigh `l1_regularization`. With
    :math:`\text{norm}_\text{old}` for `norm` before the step, a step computes

    .. math::

      \text{norm} &\leftarrow \text{norm} + g^2 \\
      \sigma &= (\sqrt{\text{norm}} - \sqrt{\text{norm}_\text{old}})
        / \text{learning\_rate} \\
      \text{zero} &\leftarrow \text{zero} + g - \sigma w \\
      w &\leftarrow \text{learning\_rate} \cdot
        \frac{\text{sign}(\text{zero}) \cdot \text{l1\_regularization} - \text{zero}}
        {\sqrt{\text{norm}} + \text{beta}
        + \text{l2\_regularization} \cdot \text{learning\_rate}}

    where :math:`|\text{zero}| > \text{l1\_regularization}`, and makes `w` 0 elsewhere.

    As `zero` starts with 0, the first gradient all but forgets the initial weight.
    Until an entry has had a gradient other than 0 it stays as it is. So does everything
    in a step whose learning rate is 0, which Monolith divides by.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      initial_accumulator_value: what `norm` starts with; not negative.
      beta: added to the root of `norm`; not negative.
      l1_regularization: how large `zero` must be for a weight that is not 0; not
        negative.
      l2_regularization: shrinks weights; not negative.
      bug_compatible: whether the weight is Monolith's, whose sign term is 0 for a
        positive `zero` and 1 for a negative one: weights below 0 are not shrunk by
        `l1_regularization`, and those above 0 grow by it. Also, a gradient of 0 makes
        an entry 0 that has had no other.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `FtrlState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.ftrl(0.1, initial_accumulator_value=0.0, l1_regularization=1.0)
      >>> table = jnp.zeros((2, 2))
      >>> state = tx.init(table)
      >>> gradients = jnp.array([[2.0, -2.0], [1.0, 0.0]])
      >>> updates, state = tx.update(gradients, state, table)
      >>> print(optax.apply_updates(table, updates))
      [[-0.05  0.05]
       [ 0.    0.  ]]

    References:
      McMahan et al., `Ad Click Prediction: a View from the Trenches
      <https://research.google/pubs/ad-click-prediction-a-view-from-the-trenches>`_,
      2013, and `FtrlOptimizer` of `Monolith <https://github.com/bytedance/monolith>`_.
      At commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/ftrl_optimizer.cc`.
    """
    checks.check_hyperparameter("initial_accumulator_value", initial_accumulator_value)

    def rule(
        g: jax.Array,
        w: jax.Array,
        slots: FtrlState,
        *,
        learning_rate: jax.Array,
        beta: jax.Array,
        l1_regularization: jax.Array,
        l2_regularization: jax.Array,
    ) -> tuple[jax.Array, FtrlState]:
        halted = learning_rate == 0
        rate = jnp.where(halted, 1, learning_rate)
        g = jnp.where(halted, 0, g)
        norm = slots.norm + g * g
        sigma = (root(norm) - root(slots.norm)) / rate
        zero = slots.zero + (g - sigma * w)
        sign = jnp.where(zero < 0, 1, 0) if bug_compatible else jnp.sign(zero)
        below = root(norm) + beta + l2_regularization * rate
        new = rate * (sign * l1_regularization - zero) / jnp.where(below > 0, below, 1)
        new = jnp.where(jnp.abs(zero) > l1_regularization, new, 0)
        untouched = (g == 0) & (slots.zero == 0) & (not bug_compatible)
        step = jnp.where(halted | untouched, 0, new - w)
        return step, slots._replace(norm=norm, zero=zero)

    return from_rule(
        rule,
        FtrlState,
        learning_rate=learning_rate,
        nonnegative={
            "beta": beta,
            "l1_regularization": l1_regularization,
            "l2_regularization": l2_regularization,
        },
        slots={"norm": Slot(start=initial_accumulator_value)},
        needs_params=True,
    )
