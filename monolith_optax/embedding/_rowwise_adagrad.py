"""Row-wise Adagrad: one accumulator for each row of a table."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from monolith_optax._optimizers.base import from_rule
from monolith_optax._optimizers.slots import Slot
from monolith_optax._optimizers.weight_decay import WeightDecay
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class RowwiseAdagradState(NamedTuple):
    """The state of `rowwise_adagrad`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      sum_square: the sum of mean squared gradients, of shape `(rows,)`.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    sum_square: optax.Params


def rowwise_adagrad(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Row-wise Adagrad, the usual optimizer of DLRM's embedding tables.

    It keeps one number per row where Adagrad keeps one per weight. With
    :math:`d = g + \text{weight\_decay} \cdot w`, a step of one row computes

    .. math::

      \text{sum\_square} &\leftarrow \text{sum\_square} + \text{mean}(d^2) \\
      w &\leftarrow w
        - \text{learning\_rate} \cdot d / (\sqrt{\text{sum\_square}} + \text{eps})

    A row is an index of the leading axis; the mean is over all other axes.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      eps: keeps the denominator from zero; not negative.
      weight_decay: coupled weight decay (L2), not negative. Unless it is the number 0,
        `update` needs params.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a
      `RowwiseAdagradState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing although there is weight decay
        (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.rowwise_adagrad(0.1)
      >>> table = jnp.ones((3, 2))
      >>> state = tx.init(table)
      >>> gradients = jnp.array([[1.0, 7.0], [0.0, 0.0], [3.0, 3.0]])
      >>> updates, state = tx.update(gradients, state, table)
      >>> print(state.sum_square)
      [25.  0.  9.]
      >>> print(optax.apply_updates(table, updates))
      [[0.98 0.86]
       [1.   1.  ]
       [0.9  0.9 ]]

    References:
      `EXACT_ROWWISE_ADAGRAD` of `FBGEMM <https://github.com/pytorch/FBGEMM>`_, with the
      same arguments and defaults. Weight decay is as in its mode L2.
    """

    def rule(
        d: jax.Array,
        w: object,
        slots: RowwiseAdagradState,
        *,
        learning_rate: jax.Array,
        eps: jax.Array,
    ) -> tuple[jax.Array, RowwiseAdagradState]:
        del w
        columns = tuple(range(1, d.ndim))
        sum_square = slots.sum_square + jnp.mean(d * d, axis=columns, keepdims=True)
        # This is 0 only where d is 0, and the root has no derivative at 0.
        root = jnp.sqrt(jnp.where(sum_square > 0, sum_square, 1))
        step = learning_rate * d / (root + eps)
        return -step, slots._replace(sum_square=sum_square)

    return from_rule(
        rule,
        RowwiseAdagradState,
        learning_rate=learning_rate,
        nonnegative={"eps": eps},
        weight_decay=WeightDecay(weight_decay),
        slots={"sum_square": Slot(per="row")},
    )
