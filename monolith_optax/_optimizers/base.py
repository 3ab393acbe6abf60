"""The base of the optimizers: an optax transformation from a rule for one parameter."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._leaves import dtype_of
from monolith_optax._optimizers import checks
from monolith_optax._optimizers.slots import Slot, wide
from monolith_optax._optimizers.weight_decay import WeightDecay


def from_rule(
    rule: Callable[..., tuple[jax.Array, Any]],
    state_type: type[Any],
    *,
    learning_rate: optax.ScalarOrSchedule,
    fractions: Mapping[str, ArrayLike] | None = None,
    nonnegative: Mapping[str, ArrayLike] | None = None,
    weight_decay: WeightDecay | None = None,
    slots: Mapping[str, Slot] | None = None,
    slot_dtype: DTypeLike | None = None,
    needs_params: bool = False,
    extra_args: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that runs a rule on every parameter.

    The rule is `step, slots = rule(g, w, slots, **hyperparameters, **extra_args)`: `g`
    is the gradient with the weight decay added, `w` the parameter (None if `update` is
    given no params), and `slots` a `state_type` with the slots of this parameter. The
    step is added to `w`. All numbers but slots of integers are in one dtype, float32 or
    wider.

    Args:
      rule: the rule. It treats every entry by itself, or every row.
      state_type: a named tuple of `count` and the slots.
      learning_rate: a number, or a schedule of `count`.
      fractions: hyperparameters in [0, 1].
      nonnegative: hyperparameters that are at least 0.
      weight_decay: coupled weight decay. None: the optimizer has none.
      slots: the slots that do not start as zeros in the shape of the parameter.
      slot_dtype: the dtype of the slots. None: float32, and float64 for float64
        parameters.
      needs_params: whether the rule reads `w`.
      extra_args: names of extra arguments of `update` that the rule takes as they are;
        None where they are not given.
    """
    fractions, nonnegative = dict(fractions or {}), dict(nonnegative or {})
    checks.check_learning_rate(learning_rate)
    for name, value in fractions.items():
        checks.check_hyperparameter(name, value, high=1)
    for name, value in nonnegative.items():
        checks.check_hyperparameter(name, value)
    checks.check_slot_dtype(slot_dtype)
    optimizer = _Optimizer(
        rule,
        state_type,
        learning_rate,
        fractions | nonnegative,
        weight_decay or WeightDecay(),
        dict.fromkeys(state_type._fields[1:], Slot()) | dict(slots or {}),
        slot_dtype,
        needs_params,
        extra_args,
    )
    return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)


@dataclass(frozen=True)
class _Optimizer:
    rule: Callable[..., tuple[jax.Array, Any]]
    state_type: type[Any]
    learning_rate: optax.ScalarOrSchedule
    hyperparameters: dict[str, ArrayLike]
    weight_decay: WeightDecay
    slots: dict[str, Slot]
    slot_dtype: DTypeLike | None
    needs_params: bool
    extra_args: tuple[str, ...]

    def init(self, params: optax.Params) -> Any:
        checks.check_params(params)
        return self.state_type(
            count=jnp.zeros([], jnp.int32),
            **{k: slot.init(params, self.slot_dtype) for k, slot in self.slots.items()},
        )

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        old = {name: getattr(state, name) for name in self.slots}
        if self.needs_params and params is None:
            raise ValueError(
                "This optimizer needs the current parameters, but params is None: call "
                "update(gradients, state, params)."
            )
        checks.check_trees(updates, params, old, self.slots)
        leaf: Callable[..., Any] = functools.partial(
            self._update_leaf,
            state.count,
            self._hyperparameters_at(state.count),
            {name: extra_args.get(name) for name in self.extra_args},
        )
        if isinstance(state.count, jax.core.Tracer):
            # Leaves of one shape are then traced and lowered once. Outside a trace
            # each call would compile it anew.
            leaf = jax.jit(leaf, static_argnames="decays")
        results = jax.tree.map(
            leaf,
            updates,
            jax.tree.map(lambda _: None, updates) if params is None else params,
            self.weight_decay.where(updates, params),
            *(kind.spread(old[name], updates) for name, kind in self.slots.items()),
        )
        treedef: Any = jax.tree.structure(updates)
        results = treedef.flatten_up_to(results)
        steps = treedef.unflatten([step for step, _ in results])
        new = {
            name: kind.joined(
                treedef.unflatten([s[name] for _, s in results]), old[name]
            )
            for name, kind in self.slots.items()
        }
        count = optax.safe_increment(state.count)
        return steps, self.state_type(count=count, **new)

    def _hyperparameters_at(self, count: jax.Array) -> dict[str, ArrayLike]:
        rate = self.learning_rate
        if callable(rate):
            rate = rate(count)
            checks.check_scalar("learning_rate", rate)
        return {"learning_rate": rate} | self.hyperparameters

    def _update_leaf(
        self,
        count: jax.Array,
        hyperparameters: dict[str, ArrayLike],
        extra_args: dict[str, Any],
        grad: ArrayLike,
        param: ArrayLike | None,
        decays: bool,
        *slots: ArrayLike,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The step of one parameter, in its dtype, and its new slots, in theirs."""
        like = grad if param is None else param
        old = dict(zip(self.slots, slots, strict=True))
        real = (old[name] for name, kind in self.slots.items() if kind.is_real)
        dtype = wide(dtype_of(next(real, like)))
        g = jnp.asarray(grad, dtype)
        w = None if param is None else jnp.asarray(param, dtype)
        if decays:
            g = as_dtype(self.weight_decay.rate, dtype) * w + g
        seen = {
            name: kind.for_rule(old[name], g.ndim, dtype)
            for name, kind in self.slots.items()
        }
        numbers = {name: as_dtype(x, dtype) for name, x in hyperparameters.items()}
        state = self.state_type(count=count, **seen)
        step, new = self.rule(g, w, state, **numbers, **extra_args)
        return step.astype(dtype_of(like)), {
            name: kind.from_rule(getattr(new, name), old[name])
            for name, kind in self.slots.items()
        }


def as_dtype(value: ArrayLike, dtype: DTypeLike) -> Any:
    """A hyperparameter in `dtype`, so that `1 - decay` is also rounded in it."""
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    return np.asarray(value, dtype)


def tied(value: jax.Array, to: jax.Array) -> jax.Array:
    """The value, made to depend on another array, which is never negative.

    If a new slot depends on only one array, XLA on CPU computes it again inside the
    loop of the parameter, and has to copy the old slot for that. XLA cannot know that
    this select does nothing.
    """
    return jax.lax.select(to < 0, to, value)


def root(x: jax.Array) -> jax.Array:
    """The square root, whose derivative is 0 at 0.

    Slots begin at 0, and a step may be differentiated: there 0 times infinity is NaN.
    """
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def root_to_add(x: jax.Array) -> jax.Array:
    """The same for sums, in one operation, so that dense steps stay in place.

    The root of 0 is 1e-19 in float32: a sum with an epsilon is the same as with 0.
    """
    return jnp.sqrt(jnp.maximum(x, np.finfo(x.dtype).tiny))
