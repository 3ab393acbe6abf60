"""The estimator of sampling probabilities of Monolith's embedding tables."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from monolith_optax._leaves import describe, dtype_of
from monolith_optax._optimizers.base import from_rule
from monolith_optax._optimizers.slots import Slot
from monolith_optax._public import public_state


@public_state("monolith_optax.embedding")
class BatchSoftmaxState(NamedTuple):
    """The state of `batch_softmax`.

    The slot is a tree like the parameters.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      global_step: the global step at which a row was last touched, int32 of shape
        `(rows,)`.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    global_step: optax.Params


def batch_softmax(
    learning_rate: optax.ScalarOrSchedule = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""How many steps pass between two occurrences of a row.

    It minimises nothing: the gradient is not read, only which rows are touched, so it
    belongs inside `monolith_optax.lazy_rows`. The first column of a row becomes the
    average interval between batches that have it; the reciprocal is the probability
    that corrects a softmax over items sampled in the batch. At global step :math:`T` a
    step of one row computes

    .. math::

      w_0 &\leftarrow (1 - \text{learning\_rate}) \cdot w_0
        + \text{learning\_rate} \cdot (T - \text{global\_step}) \\
      \text{global\_step} &\leftarrow T

    It is made for rows of one number; further columns stay as they are. A row is an
    index of the leading axis.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `BatchSoftmaxState`.
      Its `update` takes the global step, an integer, as `global_step=`; without it, it
      is the count of steps taken before this one.

    Raises:
      ValueError: the learning rate is not a finite number, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing, or `global_step` is not an integer
        (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import RowSlices, embedding, lazy_rows
      >>> tx = lazy_rows(embedding.batch_softmax(0.5))
      >>> intervals = jnp.zeros((4, 1))
      >>> state = tx.init(intervals)
      >>> rows = RowSlices(jnp.array([2]), jnp.zeros((1, 1)))
      >>> for step in (8, 16):
      ...     updates, state = tx.update(rows, state, intervals, global_step=step)
      ...     intervals = optax.apply_updates(intervals, updates)
      >>> print(intervals[:, 0], state.global_step)
      [0. 0. 6. 0.] [ 0  0 16  0]

    References:
      Yi et al., `Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
      Recommendations <https://research.google/pubs/pub48840>`_, 2019, and
      `BatchSoftmaxOptimizer` of `Monolith <https://github.com/bytedance/monolith>`_. At
      commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/batch_softmax_optimizer.cc`.
    """

    def rule(
        g: jax.Array,
        w: jax.Array,
        slots: BatchSoftmaxState,
        *,
        learning_rate: jax.Array,
        global_step: ArrayLike | None,
    ) -> tuple[jax.Array, BatchSoftmaxState]:
        del g
        now = slots.count if global_step is None else _checked(global_step)
        interval = (now - slots.global_step).astype(w.dtype)
        columns = np.arange(math.prod(w.shape[1:])).reshape(w.shape[1:])
        step = jnp.where(columns == 0, learning_rate * (interval - w), 0)
        # It is `now`, and sharded as the old one is.
        last = jnp.where(interval == 0, slots.global_step, now)
        return step, slots._replace(global_step=last)

    return from_rule(
        rule,
        BatchSoftmaxState,
        learning_rate=learning_rate,
        slots={"global_step": Slot(per="row", start=0, dtype=jnp.int32)},
        needs_params=True,
        extra_args=("global_step",),
    )


def _checked(global_step: ArrayLike) -> jax.Array:
    if np.shape(global_step) or not jnp.issubdtype(dtype_of(global_step), jnp.integer):
        raise ValueError(
            f"global_step must be one integer, but it is {describe(global_step)}."
        )
    return jnp.asarray(global_step, jnp.int32)
