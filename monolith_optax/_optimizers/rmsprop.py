"""RMSprop as Monolith has it: the learning rate is inside the momentum."""

from typing import NamedTuple

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._optimizers.base import from_rule, root_to_add
from monolith_optax._optimizers.weight_decay import Mask, WeightDecay
from monolith_optax._public import public_state


@public_state("monolith_optax")
class RmspropState(NamedTuple):
    """The state of `rmsprop`.

    Slots are trees like the parameters, of float32 arrays, or float64 for float64
    parameters, unless `slot_dtype` says otherwise.

    Attributes:
      count: int32 scalar, the steps taken so far; it drives a schedule.
      m: the momentum, of the parameter's shape. It holds scaled steps: what the last
        update subtracted from the parameter.
      v: the decayed average (with `use_v2`: sum) of squared gradients, of the
        parameter's shape.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    m: optax.Params
    v: optax.Params


def rmsprop(
    learning_rate: optax.ScalarOrSchedule = 5e-6,
    beta1: ArrayLike = 0.99,
    beta2: ArrayLike = 0.999,
    epsilon: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    *,
    use_v2: bool = False,
    weight_decay_mask: Mask = None,
    slot_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Monolith's RMSprop optimizer.

    With :math:`g = \text{weight\_decay} \cdot w + \text{grad}`, a step computes

    .. math::

      v &\leftarrow v + (g^2 - v) \cdot (1 - \text{beta2}) \\
      m &\leftarrow \text{beta1} \cdot m
        + \text{learning\_rate} \cdot g / \sqrt{v + \text{epsilon}} \\
      w &\leftarrow w - m

    or, with `use_v2`,

    .. math::

      v &\leftarrow \text{beta2} \cdot v + g^2 \\
      m &\leftarrow \text{beta1} \cdot m
        + \text{learning\_rate} \cdot g / (\sqrt{v} + \text{epsilon}) \\
      w &\leftarrow w - m

    The learning rate is inside `m`, so a schedule also affects later steps. The first
    version is `optax.rmsprop(learning_rate, decay=beta2, eps=epsilon, momentum=beta1)`
    after `optax.add_decayed_weights(weight_decay)`, with the sign of `m` flipped.
    Nothing in optax matches the second.

    Arithmetic is in float32, or in the slot's dtype if that is wider. Updates have the
    dtype of the parameter, or of the gradient if `update` is given no params. Slots
    keep their dtype.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      beta1: the decay of `m`, in [0, 1].
      beta2: the decay of `v`, in [0, 1].
      epsilon: keeps the denominator from zero; not negative.
      weight_decay: coupled weight decay (L2), not negative. Unless it is the number 0,
        `update` needs params.
      use_v2: whether `v` is a sum, and epsilon is added outside the root, not inside.
      weight_decay_mask: where weight decay applies: a tree of bools that is a prefix
        of the parameters, or a function from params to such a tree. None: everywhere.
      slot_dtype: the dtype of the slots. None: float32, and float64 for float64
        parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `RmspropState`.

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
      >>> tx = monolith_optax.rmsprop(learning_rate=0.1, use_v2=True)
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> state = tx.init(params)
      >>> gradients = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      >>> updates, state = tx.update(gradients, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["w"])
      [ 0.9 -1.9]
      >>> print(state.m["w"], state.v["w"])
      [ 0.1 -0.1] [ 4. 16.]

    References:
      Tieleman and Hinton, `Lecture 6.5: rmsprop
      <http://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012,
      and the kernel `ResourceApplyRmsprop` of `Monolith
      <https://github.com/bytedance/monolith>`_. At commit 135c491 the rule is in
      `monolith/native_training/optimizers/cc/kernels/training_ops.cc`.
    """

    def rule(
        g: jax.Array,
        w: object,
        slots: RmspropState,
        *,
        learning_rate: jax.Array,
        beta1: jax.Array,
        beta2: jax.Array,
        epsilon: jax.Array,
    ) -> tuple[jax.Array, RmspropState]:
        del w
        if use_v2:
            v = beta2 * slots.v + g * g
            m = beta1 * slots.m + g * learning_rate / (root_to_add(v) + epsilon)
        else:
            v = slots.v + (g * g - slots.v) * (1 - beta2)
            m = beta1 * slots.m + g * learning_rate * jax.lax.rsqrt(v + epsilon)
        return -m, slots._replace(m=m, v=v)

    return from_rule(
        rule,
        RmspropState,
        learning_rate=learning_rate,
        fractions={"beta1": beta1, "beta2": beta2},
        nonnegative={"epsilon": epsilon},
        weight_decay=WeightDecay(weight_decay, weight_decay_mask),
        slot_dtype=slot_dtype,
    )
