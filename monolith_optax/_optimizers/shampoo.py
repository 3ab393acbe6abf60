"""Shampoo: gradients preconditioned on each of their axes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from monolith_optax._leaves import describe, dtype_of
from monolith_optax._optimizers import checks
from monolith_optax._optimizers.base import as_dtype, root
from monolith_optax._optimizers.slots import Slot, wide
from monolith_optax._public import public_state
from monolith_optax._shardings import explicit_sharding, replicated

Slots: TypeAlias = dict[str, Any]
_LIKE_PARAMS = dict.fromkeys(("d", "m", "pm"), Slot())


@public_state("monolith_optax")
class ShampooState(NamedTuple):
    """The state of `shampoo`.

    Attributes:
      count: int32 scalar, the steps taken so far.
      d: the sum of squared gradients, a slot for each parameter.
      m: the momentum of Adagrad's steps, a slot for each parameter.
      pm: the momentum of preconditioned gradients, a slot for each parameter.
      axes: slots of single axes. For axis i, of length n, they are `s{i}` and `g{i}` of
        shape `(n, n)`, `pvec{i}` of `(n, k)`, `pval{i}` of `(k,)` and the scalar
        `o{i}`. Each is a tree like the parameters, with None for those that do not have
        this axis. If none has any axis, this is a 0: for `optax.tree.map_params`, which
        calls `init` without parameters, all of it is one leaf that is not like
        them.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count gives way
    d: optax.Params
    m: optax.Params
    pm: optax.Params
    axes: dict[str, optax.Params] | jax.Array


def shampoo(
    learning_rate: optax.ScalarOrSchedule = 0.03,
    beta_1: ArrayLike = 0.9,
    beta_2: ArrayLike = 1.0,
    warmup: int = 5000,
    tau_1: int = 200,
    tau_2: int = 20,
    eigen_head: int = 100,
    eigen_tail: int = 100,
    damping_epsilon: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""Monolith's Shampoo for dense variables.

    For each axis :math:`i` of a gradient :math:`G` of rank :math:`R`, with :math:`T`
    for the steps taken before this one, a step computes

    .. math::

      g_i &\leftarrow G \text{ contracted with itself over all other axes,
        if tau\_2 divides } T \\
      s_i &\leftarrow s_i + g_i, \text{ or }
        \text{beta\_2} \cdot s_i + (1 - \text{beta\_2}) \cdot g_i
        \text{ if beta\_2} < 1 \\
      H_i &\leftarrow s_i^{-1 / 2R}, \text{ truncated, if } T > \text{warmup}
        \text{ and tau\_1 divides } T

    and with :math:`P` for :math:`G` times the :math:`H_i` of all its axes

    .. math::

      d &\leftarrow d + G^2 \\
      m &\leftarrow \text{beta\_1} \cdot m + (1 - \text{beta\_1}) \cdot G / \sqrt{d} \\
      pm &\leftarrow \text{beta\_1} \cdot pm + (1 - \text{beta\_1}) \cdot P \\
      w &\leftarrow w - \text{learning\_rate} \cdot \left((1 - r) \cdot m
        + r \cdot \frac{\lVert m \rVert}{\lVert pm \rVert} \cdot pm\right)

    where :math:`r` rises from 0 at `warmup` steps to 1 at twice as many: until then
    this is Adagrad with momentum.

    :math:`H_i` is kept as `pvec{i} diag(pval{i}) pvec{i}^T + o{i} I`. Eigenvalues below
    `damping_epsilon` count as that. With an axis longer than `eigen_head` plus
    `eigen_tail`, only as many eigenvectors are kept, for the smallest eigenvalues
    above `damping_epsilon` and for the largest; `o{i}` is the mean of the eigenvalues
    between them, as they are and not to the power of -1/2R, which is Monolith's rule.
    It keeps two arrays of shape `(n, n)` for an axis of length n, so it is not for
    tables.

    Args:
      learning_rate: a number, a scalar array, or a schedule, which is given the count
        of steps taken before this one.
      beta_1: the decay of both momentums, in [0, 1].
      beta_2: the decay of `s{i}`, in [0, 1]. With 1 they are sums.
      warmup: how many steps there are of Adagrad only; not negative.
      tau_1: how many steps there are from one eigendecomposition to the next.
      tau_2: how many steps there are from one `g{i}` to the next.
      eigen_head: how many of the smallest eigenvalues are kept.
      eigen_tail: how many of the largest eigenvalues are kept.
      damping_epsilon: the smallest eigenvalue; more than 0.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `ShampooState`.

    Raises:
      ValueError: a hyperparameter is out of range, or a parameter is not a real
        floating-point array (`init`), or the gradients do not match the parameters'
        tree and shapes (`update`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import shampoo
      >>> tx = shampoo(0.1, warmup=0, tau_1=1, tau_2=1)
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> print(optax.tree.get(state, "s0")["w"])
      [[3. 3.]
       [3. 3.]]
      >>> print(state.axes["s1"]["b"])
      None

    References:
      Gupta et al., `Shampoo: Preconditioned Stochastic Tensor Optimization
      <https://arxiv.org/abs/1802.09568>`_, 2018, and `ShampooOptimizer` of `Monolith
      <https://github.com/bytedance/monolith>`_. At commit 135c491 the rule is in
      `monolith/native_training/optimizers/shampoo.py`.
    """
    checks.check_learning_rate(learning_rate)
    for name, value in {"beta_1": beta_1, "beta_2": beta_2}.items():
        checks.check_hyperparameter(name, value, high=1)
    for name, value in {"tau_1": tau_1, "tau_2": tau_2}.items():
        _check_integer(name, value, low=1)
    for name, value in {
        "warmup": warmup,
        "eigen_head": eigen_head,
        "eigen_tail": eigen_tail,
    }.items():
        _check_integer(name, value, low=0)
    checks.check_hyperparameter("damping_epsilon", damping_epsilon)
    if damping_epsilon == 0:
        raise ValueError("damping_epsilon must be more than 0, but it is 0.")
    num_eigen = eigen_head + eigen_tail

    def init(params: optax.Params) -> ShampooState:
        checks.check_params(params)

        def zeros(param: ArrayLike) -> Slots:
            dtype, slots = wide(dtype_of(param)), {}
            for axis, n in enumerate(np.shape(param)):
                k = min(n, num_eigen)
                shapes = {"s": (n, n), "g": (n, n), "pvec": (n, k), "pval": (k,)}
                for name, shape in (shapes | {"o": ()}).items():
                    slots[f"{name}{axis}"] = jnp.zeros(shape, dtype)
            return slots | {
                name: jnp.zeros_like(param, dtype=dtype) for name in _LIKE_PARAMS
            }

        treedef = jax.tree.structure(params)
        slots = _joined(treedef, list(map(zeros, jax.tree.leaves(params))))
        full = {name: slots.pop(name) for name in _LIKE_PARAMS}
        zero = jnp.zeros([], jnp.int32)
        return ShampooState(zero, **full, axes=slots or zero.copy())

    def update(
        updates: optax.Updates,
        state: ShampooState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ShampooState]:
        del extra_args
        full = {name: getattr(state, name) for name in _LIKE_PARAMS}
        checks.check_trees(updates, params, full, _LIKE_PARAMS)
        rate = learning_rate
        if callable(rate):
            rate = rate(state.count)
            checks.check_scalar("learning_rate", rate)
        treedef: Any = jax.tree.structure(updates)
        grads = jax.tree.leaves(updates)
        likes = grads if params is None else jax.tree.leaves(params)
        steps, slots = [], []
        axes = state.axes if isinstance(state.axes, dict) else {}
        old = _split(treedef, axes | full)
        for grad, like, leaf in zip(grads, likes, old, strict=True):
            step, new = _step(
                state.count, rate, jnp.asarray(grad, leaf["d"].dtype), leaf
            )
            steps.append(step.astype(dtype_of(like)))
            slots.append(new)
        joined = _joined(treedef, slots)
        full = {name: joined.pop(name) for name in _LIKE_PARAMS}
        count = optax.safe_increment(state.count)
        state = ShampooState(count, **full, axes=joined or state.axes)
        return treedef.unflatten(steps), state

    def _step(
        count: jax.Array, rate: ArrayLike, g: jax.Array, slots: Slots
    ) -> tuple[jax.Array, Slots]:
        cast = functools.partial(as_dtype, dtype=g.dtype)
        p = whole = replicated(g)  # each device needs all of it
        new: Slots = {}
        for axis in range(g.ndim):
            names = [f"{name}{axis}" for name in ("s", "g", "pvec", "pval", "o")]
            values = _axis(count, whole, axis, [slots[name] for name in names])
            new |= dict(zip(names, values, strict=True))
            p = _preconditioned(p, axis, *values[2:])
        if sharding := explicit_sharding(g):
            p = jax.sharding.reshard(p, sharding)
        beta, rest = cast(beta_1), cast(1 - beta_1)
        d = slots["d"] + g * g
        seen = jnp.where(d == 0, 1, d)  # where g is 0, so that derivatives are finite
        m = beta * slots["m"] + rest * g * jax.lax.rsqrt(seen + 1e-30)
        pm = beta * slots["pm"] + rest * p
        after = count.astype(g.dtype) / warmup - 1 if warmup else jnp.ones_like(rest)
        r = jnp.clip(after, 0, 1)
        scale = root(jnp.sum(m * m)) / (root(jnp.sum(pm * pm)) + 1e-10)
        step = -cast(rate) * ((1 - r) * m + r * scale * pm)
        return step, new | {"d": d, "m": m, "pm": pm}

    def _axis(
        count: jax.Array, grad: jax.Array, axis: int, slots: list[jax.Array]
    ) -> tuple[jax.Array, ...]:
        """The slots of one axis after a step."""
        s, g, *eigen = slots
        g = jax.lax.cond(count % tau_2 == 0, lambda: _gram(grad, axis), lambda: g)
        share = jnp.where(
            as_dtype(beta_2, g.dtype) < 1, as_dtype(1 - beta_2, g.dtype), 1
        )
        s = as_dtype(beta_2, g.dtype) * s + share * g
        due = (count > warmup) & (count % tau_1 == 0)
        inverse: Callable[[], Any] = lambda: _inverse_root(s, 2 * grad.ndim)  # noqa: E731
        pvec, pval, o = jax.lax.cond(due, inverse, lambda: tuple(eigen))
        return s, g, pvec, pval, o

    def _inverse_root(s: jax.Array, power: int) -> tuple[jax.Array, ...]:
        """`s` to the power of `-1 / power`: eigenvectors, eigenvalues and offset."""
        values, vectors = jnp.linalg.eigh(s)
        roots = jnp.maximum(values, damping_epsilon) ** (-1 / power)
        n = len(values)
        if n <= num_eigen:
            return vectors, roots, jnp.zeros([], s.dtype)
        first = jnp.minimum(jnp.argmax(values > damping_epsilon), n - num_eigen)
        indices = jnp.arange(n)
        between = (indices >= first + eigen_head) & (indices < n - eigen_tail)
        offset = jnp.sum(jnp.where(between, values, 0))
        offset = offset / jnp.maximum(jnp.sum(between), 1).astype(s.dtype)
        head = first + jnp.arange(eigen_head)
        kept = jnp.concatenate([head, n - eigen_tail + jnp.arange(eigen_tail)])
        return vectors[:, kept], roots[kept] - offset, offset

    return optax.GradientTransformationExtraArgs(init, update)


def _gram(grad: jax.Array, axis: int) -> jax.Array:
    """A gradient contracted with itself over all axes but one."""
    others = [i for i in range(grad.ndim) if i != axis]
    return jnp.tensordot(grad, grad, axes=(others, others), precision="highest")


def _preconditioned(
    p: jax.Array, axis: int, pvec: jax.Array, pval: jax.Array, o: jax.Array
) -> jax.Array:
    """`p` times `pvec diag(pval) pvec^T + o I` on one axis."""
    rotated = jnp.tensordot(p, pvec, axes=(axis, 0), precision="highest")
    back = jnp.tensordot(rotated, pvec * pval[None], axes=(-1, 1), precision="highest")
    return jnp.moveaxis(back, -1, axis) + o * p


def _split(treedef: Any, slots: Slots) -> list[Slots]:
    """The slots of each parameter, without those that it does not have."""
    columns = {name: treedef.flatten_up_to(tree) for name, tree in slots.items()}
    return [
        {
            name: column[index]
            for name, column in columns.items()
            if column[index] is not None
        }
        for index in range(treedef.num_leaves)
    ]


def _joined(treedef: Any, leaves: list[Slots]) -> Slots:
    """What `_split` took apart."""
    names = dict.fromkeys([*(name for leaf in leaves for name in leaf), *_LIKE_PARAMS])
    return {
        name: treedef.unflatten([leaf.get(name) for leaf in leaves]) for name in names
    }


def _check_integer(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, but it is {describe(value)}.")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, but it is {value}.")
