"""FTRL with a group lasso on rows, of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from monolith_optax._optimizers import checks
from monolith_optax._optimizers.base import from_rule, root
from monolith_optax._optimizers.slots import Slot
from monolith_optax._public import public_state
from monolith_optax.embedding._avx import in_blocks_of_8


@public_state("monolith_optax.embedding")
class GroupFtrlState(NamedTuple):
    """The state of `group_ftrl`.

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


def group_ftrl(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    initial_accumulator_value: ArrayLike = 0.0,
    beta: ArrayLike = 1.0,
    l1_regularization: ArrayLike = 0.0,
    l2_regularization: ArrayLike = 0.0,
    *,
    bug_compatible: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""FTRL with a group lasso on rows, of Monolith's embedding tables.

    It makes whole rows 0 whose gradients do not outweigh `l1_regularization`. With
    :math:`\text{norm}_\text{old}` for `norm` before the step, a step of one row
    computes

    .. math::

      \text{norm} &\leftarrow \text{norm} + g^2 \\
      \sigma &= (\sqrt{\text{norm}} - \sqrt{\text{norm}_\text{old}})
        / \text{learning\_rate} \\
      \text{zero} &\leftarrow \text{zero} + g - \sigma w \\
      w &\leftarrow -\text{learning\_rate} \cdot \text{zero} \cdot
        \frac{\max(0, 1 - \text{l1\_regularization} / \lVert \text{zero} \rVert)}
        {\sqrt{\text{norm}} + \text{beta}
        + \text{l2\_regularization} \cdot \text{learning\_rate}}

    A row is an index of the leading axis; the Euclidean norm is over all other axes.

    As `zero` starts with 0, the first gradient all but forgets the initial row. Until a
    row has had a gradient other than 0 it stays as it is. So does everything in a step
    whose learning rate is 0, which Monolith divides by. Monolith has a kernel for this
    rule and a configuration, but its published code cannot put the two together.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      initial_accumulator_value: what `norm` starts with; not negative.
      beta: added to the root of `norm`; not negative.
      l1_regularization: how long the row of `zero` must be for a row that is not 0;
        not negative.
      l2_regularization: shrinks weights; not negative.
      bug_compatible: whether to give the weights of Monolith's AVX kernel, which in the
        first `8 * (dim // 8)` columns of a row subtracts `l2_regularization` times the
        learning rate in the denominator. Also, with `l1_regularization` a gradient of 0
        makes a row 0 that has had no other.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GroupFtrlState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.group_ftrl(0.1, beta=0.0, l1_regularization=2.5)
      >>> table = jnp.zeros((2, 2))
      >>> state = tx.init(table)
      >>> gradients = jnp.array([[3.0, -4.0], [1.0, 1.0]])
      >>> updates, state = tx.update(gradients, state, table)
      >>> print(optax.apply_updates(table, updates))
      [[-0.05  0.05]
       [ 0.    0.  ]]

    References:
      `FTRLWithGroupSparsityOptimizer` of `Monolith
      <https://github.com/bytedance/monolith>`_. At commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/group_ftrl_optimizer.cc`.
    """
    checks.check_hyperparameter("initial_accumulator_value", initial_accumulator_value)

    def rule(
        g: jax.Array,
        w: jax.Array,
        slots: GroupFtrlState,
        *,
        learning_rate: jax.Array,
        beta: jax.Array,
        l1_regularization: jax.Array,
        l2_regularization: jax.Array,
    ) -> tuple[jax.Array, GroupFtrlState]:
        halted = learning_rate == 0
        rate = jnp.where(halted, 1, learning_rate)
        g = jnp.where(halted, 0, g)
        norm = slots.norm + g * g
        sigma = (root(norm) - root(slots.norm)) / rate
        zero = slots.zero + (g - sigma * w)
        columns = tuple(range(1, g.ndim))
        length = root(jnp.sum(zero * zero, axis=columns, keepdims=True))
        kept = length > l1_regularization
        share = 1 - l1_regularization / jnp.where(kept, length, 1)
        l2 = l2_regularization * rate
        if bug_compatible:
            l2 = jnp.where(in_blocks_of_8(g.shape), -l2, l2)
        below = root(norm) + beta + l2
        new = -rate * zero * share / jnp.where(below == 0, 1, below)
        new = jnp.where(kept, new, 0)
        untouched = length == 0
        if bug_compatible:
            untouched &= l1_regularization == 0  # where Monolith has NaN
        step = jnp.where(halted | untouched, 0, new - w)
        return step, slots._replace(norm=norm, zero=zero)

    return from_rule(
        rule,
        GroupFtrlState,
        learning_rate=learning_rate,
        nonnegative={
            "beta": beta,
            "l1_regularization": l1_regularization,
            "l2_regularization": l2_regularization,
        },
        slots={"norm": Slot(start=initial_accumulator_value)},
        needs_params=True,
    )
