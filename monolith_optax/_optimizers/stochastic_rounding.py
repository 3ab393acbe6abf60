"""Stochastic rounding: 16-bit parameters whose small steps are not lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from monolith_optax._leaves import describe, dtype_of
from monolith_optax._public import public_state


@public_state("monolith_optax")
class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`.

    Attributes:
      inner: the state of the inner optimizer.
      draws: int32 scalar, how often noise has been drawn; it picks the next noise.
    """

    inner: optax.OptState
    draws: jax.Array


def stochastic_rounding(
    inner: optax.GradientTransformation, seed: int
) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer train bfloat16 or float16 parameters without losing steps.

    A step of less than half the distance to the next bfloat16 number does nothing when
    the sum is rounded to nearest: a weight of 1 never moves by steps of 0.001. Here it
    goes to one of the two neighbours of the sum, to each with the probability that
    makes the sum right on average. Such a table takes half the memory of a float32 one.

    The inner optimizer sees 16-bit parameters in float32, and so are its slots. The
    updates of these parameters are float32, as rounded updates would not always reach
    the neighbour that is meant. Add them with `monolith_optax.apply_updates`;
    `optax.apply_updates` does the same, unless JAX is told to promote no types. Other
    parameters are left to the inner optimizer.

    Inside `monolith_optax.lazy_rows` noise is drawn only for the batch's rows. Steps
    beyond the largest finite number, also infinite ones, stop there. Derivatives go
    through the rounding as if it was not there.

    Args:
      inner: the optimizer.
      seed: an integer that makes the noise. The same seed and the same state give the
        same run, also after a restart.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a
      `StochasticRoundingState`.

    Raises:
      ValueError: `seed` is not an integer, or a parameter has 8 bits or fewer (`init`),
        or params are missing, or the updates
        have another structure, as the updates of `lazy_rows` do (`update`), or what
        the inner optimizer raises.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from monolith_optax import apply_updates, embedding, stochastic_rounding
      >>> tx = stochastic_rounding(embedding.sgd(0.001), seed=0)
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jnp.ones(10_000), state, params)
      ...     params = apply_updates(params, updates)
      >>> print(params.dtype, params.astype(jnp.float32).mean().round(2))
      bfloat16 0.9

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015. Monolith's
      `StochasticRoundingFloat16OptimizerWrapper` rounds to float16; its noise stays
      below 0.2747, so that it rounds up too often. At commit 135c491 the rule is in
      `monolith/native_training/runtime/hash_table/optimizer/stochastic_rounding.h`.
    """
    if np.shape(seed) or not jnp.issubdtype(dtype_of(seed), jnp.integer):
        raise ValueError(f"seed must be one integer, but it is {describe(seed)}.")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> StochasticRoundingState:
        jax.tree_util.tree_map_with_path(_check_width, params)
        state = inner.init(jax.tree.map(_widened, params))
        return StochasticRoundingState(state, jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: StochasticRoundingState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StochasticRoundingState]:
        if params is None:
            raise ValueError(
                "stochastic_rounding needs the current parameters, but params is None: "
                "call update(gradients, state, params)."
            )
        wide = jax.tree.map(_widened, params)
        steps, inner_state = inner.update(updates, state.inner, wide, **extra_args)
        leaves, treedef = jax.tree.flatten(params)
        given: Any = jax.tree.structure(steps)
        if given != treedef:
            raise ValueError(
                f"The updates have the structure {given}, but the parameters have "
                f"{treedef}. Around row slices, write "
                "lazy_rows(stochastic_rounding(inner, seed)), not the other way round."
            )
        key = jax.random.fold_in(jax.random.key(seed), state.draws)
        rounded = [
            _rounded(jax.random.fold_in(key, index), step, param)
            for index, (step, param) in enumerate(
                zip(jax.tree.leaves(steps), leaves, strict=True)
            )
        ]
        draws = optax.safe_increment(state.draws)
        new_state = StochasticRoundingState(inner_state, draws)
        return jax.tree.unflatten(treedef, rounded), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_width(path: Any, param: ArrayLike) -> None:
    dtype = dtype_of(param)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 2:
        raise ValueError(
            f"stochastic_rounding is for bfloat16 and float16, but "
            f"params{jax.tree_util.keystr(path)} is {dtype}. Give it 16 bits, or leave "
            "it to another optimizer with optax.partition."
        )


def _is_narrow(param: ArrayLike) -> bool:
    dtype = dtype_of(param)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2


def _widened(param: ArrayLike) -> Any:
    return jnp.asarray(param, jnp.float32) if _is_narrow(param) else param


def _rounded(key: jax.Array, step: jax.Array, param: ArrayLike) -> jax.Array:
    """The step to a neighbour of the sum if that is narrow, else the step as it is."""
    if not _is_narrow(param):
        return step
    dtype = dtype_of(param)
    largest = float(jnp.finfo(dtype).max)
    w = jnp.asarray(param, jnp.float32)
    target = jnp.clip(w + step.astype(jnp.float32), -largest, largest)
    noise = jax.random.uniform(key, target.shape)
    constant = jax.lax.stop_gradient(target)
    # The sum is exact, and has the derivative of the target.
    return target + (_neighbour(constant, noise, dtype) - constant) - w


def _neighbour(target: jax.Array, noise: jax.Array, dtype: Any) -> jax.Array:
    """One of the two numbers of that dtype next to the target, in float32."""
    nearest = target.astype(dtype)
    near = nearest.astype(jnp.float32)
    missed = target - near
    direction = jnp.where(missed > 0, jnp.inf, -jnp.inf).astype(dtype)
    other = jnp.nextafter(nearest, direction).astype(jnp.float32)
    return jnp.where(noise < missed / (other - near), other, near)
