"""Adagrad with a group lasso on rows, of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from monolith_optax._optimizers import checks
from monolith_optax._optimizers.base import from_rule, root
from monolith_optax._optimizers.slots import Slot
from monolith_optax._optimizers.weight_decay import WeightDecay
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class GroupAdagradState(NamedTuple):
    """The state of `group_adagrad`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      grad_square_sum: the sum of each step's largest squared gradient in a row, of
        shape `(rows,)`.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    grad_square_sum: optax.Params


def group_adagrad(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    beta: ArrayLike = 0.0,
    initial_accumulator_value: ArrayLike = 0.1,
    l2_regularization: ArrayLike = 0.0,
    weight_decay_factor: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adagrad with a group lasso on rows, of Monolith's embedding tables.

    It shortens every row that is in the batch, and makes the whole row 0 where nothing
    is left of it. With :math:`d = g + \text{weight\_decay\_factor} \cdot w` and
    :math:`G` for `grad_square_sum`, a step of one row computes

    .. math::

      G &\leftarrow G + \max(d^2) \\
      a &= \text{learning\_rate} / (\text{beta} + \sqrt{G}) \\
      u &= w - a d \\
      w &\leftarrow u \cdot
        \max(0, 1 - a \cdot \text{l2\_regularization} / \lVert u \rVert)

    A row is an index of the leading axis; the maximum and the Euclidean norm are over
    all other axes. A row with a gradient of 0 is shortened too. In a step whose
    learning rate is 0, which Monolith divides by, everything stays as it is, and so do
    rows that are 0 without a gradient.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      beta: added to the root of `grad_square_sum`; not negative.
      initial_accumulator_value: what `grad_square_sum` starts with; not negative.
      l2_regularization: how much of a row's norm, not squared, is taken in each step,
        before it is multiplied by the rate; not negative.
      weight_decay_factor: coupled weight decay (L2), not negative.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GroupAdagradState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.group_adagrad(
      ...     0.5, initial_accumulator_value=0.0, l2_regularization=5.0
      ... )
      >>> table = jnp.array([[3.5, 4.5], [0.5, 0.5]])
      >>> state = tx.init(table)
      >>> gradients = jnp.full((2, 2), 1.0)
      >>> updates, state = tx.update(gradients, state, table)
      >>> print(state.grad_square_sum)
      [1. 1.]
      >>> print(optax.apply_updates(table, updates))
      [[1.5 2. ]
       [0.  0. ]]

    References:
      Yue et al., `Adaptive Optimizers with Sparse Group Lasso for Neural Networks in
      CTR Prediction <https://arxiv.org/abs/2107.14432>`_, 2021, and
      `AdaGradWithGroupLassoOptimizer` of `Monolith
      <https://github.com/bytedance/monolith>`_, whose equations are these in another
      order. At commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/group_adagrad_optimizer.cc`.
    """
    checks.check_hyperparameter("initial_accumulator_value", initial_accumulator_value)

    def rule(
        d: jax.Array,
        w: jax.Array,
        slots: GroupAdagradState,
        *,
        learning_rate: jax.Array,
        beta: jax.Array,
        l2_regularization: jax.Array,
    ) -> tuple[jax.Array, GroupAdagradState]:
        columns = tuple(range(1, d.ndim))
        largest = jnp.max(d * d, axis=columns, keepdims=True, initial=0)
        total = slots.grad_square_sum + jnp.where(learning_rate == 0, 0, largest)
        below = beta + root(total)
        a = jnp.where(below > 0, learning_rate / jnp.where(below > 0, below, 1), 0)
        u = w - a * d
        norm = root(jnp.sum(u * u, axis=columns, keepdims=True))
        less = a * l2_regularization
        kept = norm > less
        shortened = a * d + less / jnp.where(kept, norm, 1) * u
        step = -jnp.where(kept, shortened, w)
        return step, slots._replace(grad_square_sum=total)

    start = initial_accumulator_value
    return from_rule(
        rule,
        GroupAdagradState,
        learning_rate=learning_rate,
        nonnegative={"beta": beta, "l2_regularization": l2_regularization},
        weight_decay=WeightDecay(weight_decay_factor, name="weight_decay_factor"),
        slots={"grad_square_sum": Slot(start=start, per="row")},
        needs_params=True,
    )
