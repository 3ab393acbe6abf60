"""Adamom: momentum divided by the root of a decayed average of squared gradients."""

from typing import NamedTuple

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._optimizers.base import from_rule, root_to_add, tied
from monolith_optax._optimizers.slots import Slot
from monolith_optax._optimizers.weight_decay import Mask, WeightDecay
from monolith_optax._public import public_state


@public_state("monolith_optax")
class AdamomState(NamedTuple):
    """The state of `adamom`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters, unless `slot_dtype` says otherwise.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      m: the momentum, of the parameter's shape.
      v: the decayed sum of squared gradients, of the parameter's shape.
      c: the decayed count of gradients that `v` is divided by, of the parameter's
        shape, or one scalar for all with `compact_c`.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    m: optax.Params
    v: optax.Params
    c: optax.Params


def adamom(
    learning_rate: optax.ScalarOrSchedule = 5e-6,
    ada_decay: ArrayLike = 0.9999,
    mom_decay: ArrayLike = 0.99,
    epsilon: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    *,
    use_v2: bool = False,
    weight_decay_mask: Mask = None,
    slot_dtype: DTypeLike | None = None,
    compact_c: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Monolith's Adamom optimizer.

    With :math:`g = \text{weight\_decay} \cdot w + \text{grad}`, a step computes

    .. math::

      m &\leftarrow \text{mom\_decay} \cdot m + (1 - \text{mom\_decay}) \cdot g \\
      v &\leftarrow \text{ada\_decay} \cdot v + g^2 \\
      c &\leftarrow \text{ada\_decay} \cdot c + 1 \\
      w &\leftarrow w - \text{learning\_rate} \cdot m / \sqrt{v / c + \text{epsilon}}

    or, with `use_v2`, divides by :math:`\sqrt{v / c} + \text{epsilon}`. As `v / c` is a
    weighted mean of squared gradients from the first step on, `v` needs no bias
    correction. The momentum is not corrected.

    Arithmetic is in float32, or in the slot's dtype if that is wider. Updates have the
    dtype of the parameter, or of the gradient if `update` is given no params. Slots
    keep their dtype.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      ada_decay: the decay of `v` and `c`, in [0, 1].
      mom_decay: the decay of `m`, in [0, 1].
      epsilon: keeps the denominator from zero; not negative.
      weight_decay: coupled weight decay (L2), not negative. Unless it is the number 0,
        `update` needs params.
      use_v2: whether epsilon is added outside the root instead of inside it.
      weight_decay_mask: where weight decay applies: a tree of bools that is a prefix
        of the parameters, or a function from params to such a tree. None: everywhere.
      slot_dtype: the dtype of the slots. None: float32, and float64 for float64
        parameters. In bfloat16, `c` would stop growing at 256.
      compact_c: whether `c` is kept as one scalar. Its entries are all equal as long
        as every step updates every parameter, so the numbers stay the same to float32
        rounding, and the slots take a third less memory.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `AdamomState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes, or params are missing although there is weight decay
        (`update`).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import monolith_optax
      >>> import optax
      >>> tx = monolith_optax.adamom(learning_rate=0.1)
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> state = tx.init(params)
      >>> gradients = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      >>> updates, state = tx.update(gradients, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["w"])
      [ 0.999 -1.999]
      >>> print(state.v["w"], state.c["w"])
      [ 4. 16.] [1. 1.]

    References:
      Liu et al., `Monolith: Real Time Recommendation System With Collisionless
      Embedding Table <https://arxiv.org/abs/2209.07663>`_, 2022, and the kernel
      `ResourceApplyAdamom` of `Monolith <https://github.com/bytedance/monolith>`_. At
      commit 135c491 the rule is in
      `monolith/native_training/optimizers/cc/kernels/training_ops.cc`.
    """

    def rule(
        g: jax.Array,
        w: object,
        slots: AdamomState,
        *,
        learning_rate: jax.Array,
        ada_decay: jax.Array,
        mom_decay: jax.Array,
        epsilon: jax.Array,
    ) -> tuple[jax.Array, AdamomState]:
        del w
        m = mom_decay * slots.m + (1 - mom_decay) * g
        v = ada_decay * slots.v + g * g
        c = ada_decay * slots.c + 1
        if not compact_c:
            c = tied(c, to=v)
        if use_v2:
            step = m * learning_rate / (root_to_add(v / c) + epsilon)
        else:
            step = m * learning_rate * jax.lax.rsqrt(v / c + epsilon)
        return -step, slots._replace(m=m, v=v, c=c)

    return from_rule(
        rule,
        AdamomState,
        learning_rate=learning_rate,
        fractions={"ada_decay": ada_decay, "mom_decay": mom_decay},
        nonnegative={"epsilon": epsilon},
        weight_decay=WeightDecay(weight_decay, weight_decay_mask),
        slots={"c": Slot(per="tree")} if compact_c else {},
        slot_dtype=slot_dtype,
    )
