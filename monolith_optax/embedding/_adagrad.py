"""Adagrad of Monolith's embedding tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from monolith_optax._leaves import concrete
from monolith_optax._optimizers import checks
from monolith_optax._optimizers.base import from_rule
from monolith_optax._optimizers.slots import Slot
from monolith_optax._optimizers.weight_decay import WeightDecay
from monolith_optax._public import public_state
from monolith_optax.embedding._avx import in_blocks_of_8


@public_state("monolith_optax.embedding")
class AdagradState(NamedTuple):
    """The state of `adagrad`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      norm: the sum of squared gradients, of the parameter's shape.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    norm: optax.Params


def adagrad(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    initial_accumulator_value: ArrayLike = 0.1,
    weight_decay_factor: ArrayLike = 0.0,
    *,
    bug_compatible: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adagrad of Monolith's embedding tables.

    With :math:`d = g + \text{weight\_decay\_factor} \cdot w`, a step computes

    .. math::

      \text{norm} &\leftarrow \text{norm} + d^2 \\
      w &\leftarrow w - \text{learning\_rate} \cdot d / \sqrt{\text{norm}}

    Where `norm` is 0, the parameter does not change; Monolith divides 0 by 0 there.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      initial_accumulator_value: what `norm` starts with; not negative.
      weight_decay_factor: coupled weight decay (L2), not negative. Unless it is the
        number 0, `update` needs params.
      bug_compatible: whether to apply weight decay as Monolith's AVX kernel does. In
        the first `8 * (dim // 8)` columns of a row it enters `norm` but not the step,
        so these weights never decay.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `AdagradState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing although there is weight decay
        (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import embedding
      >>> tx = embedding.adagrad(0.1, initial_accumulator_value=0.0)
      >>> table = jnp.ones((2, 3))
      >>> state = tx.init(table)
      >>> updates, state = tx.update(jnp.full((2, 3), 2.0), state, table)
      >>> print(optax.apply_updates(table, updates)[0], state.norm[0])
      [0.9 0.9 0.9] [4. 4. 4.]

    References:
      Duchi et al., `Adaptive Subgradient Methods for Online Learning and Stochastic
      Optimization <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011, and
      `AdagradOptimizer` of `Monolith <https://github.com/bytedance/monolith>`_. At
      commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/adagrad_optimizer.cc`.
    """
    checks.check_hyperparameter("initial_accumulator_value", initial_accumulator_value)

    def rule(
        g: jax.Array,
        w: jax.Array,
        slots: AdagradState,
        *,
        learning_rate: jax.Array,
        weight_decay_factor: jax.Array | None = None,
    ) -> tuple[jax.Array, AdagradState]:
        if weight_decay_factor is None:
            d = moves = g
        else:  # the bug
            d = weight_decay_factor * w + g
            moves = jnp.where(in_blocks_of_8(g.shape), g, d)
        norm = slots.norm + d * d
        step = learning_rate / jnp.sqrt(jnp.where(norm > 0, norm, 1)) * moves
        return -step, slots._replace(norm=norm)

    decay = WeightDecay(weight_decay_factor, name="weight_decay_factor")
    in_rule = {}
    has_bug = bug_compatible and concrete(weight_decay_factor) != 0
    if has_bug:
        decay, in_rule = WeightDecay(), {"weight_decay_factor": weight_decay_factor}
    return from_rule(
        rule,
        AdagradState,
        learning_rate=learning_rate,
        nonnegative=in_rule,
        weight_decay=decay,
        slots={"norm": Slot(start=initial_accumulator_value)},
        needs_params=has_bug,
    )
