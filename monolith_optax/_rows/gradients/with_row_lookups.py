"""with_row_lookups: functions whose lookups in spread tables are exchanges."""

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar, cast

import jax

from monolith_optax._rows.gradients.asked_tables import read
from monolith_optax._rows.gradients.automatic_axes import (
    SplitIdsError,
    on_any_axes,
    results,
)
from monolith_optax._rows.gradients.choose_tables import choose
from monolith_optax._rows.gradients.run_loss import LossRun
from monolith_optax._rows.gradients.trace_loss import Loss, trace_loss
from monolith_optax._rows.slices.no_derivatives import no_derivatives
from monolith_optax._rows.types import PyTree

Params = TypeVar("Params")
Others = ParamSpec("Others")
Result = TypeVar("Result")
Results: TypeAlias = tuple[Loss, Sequence[jax.Array]]


def with_row_lookups(
    fun: Callable[Concatenate[Params, Others], Result], tables: PyTree
) -> Callable[Concatenate[Params, Others], Result]:
    """The function, with lookups in spread tables as `value_and_row_grad` does them.

    It is for evaluation, recall and serving. Under `jax.jit`, a lookup in a table that
    is spread over devices sends rows of the whole batch to all devices, and one in a
    slice of a spread stack moves whole slices. Here each device sends the distinct ids
    of its share of the batch to the owners of their rows, and gets rows. Results are
    those of the function. What else it does with a table, such as scoring all of its
    rows, is left to JAX.

    On explicit axes lookups need no `out_sharding`. If a lookup by split ids has none,
    results come back split over all devices, by the first of their axes that all can
    share; others are on every device.

    Args:
      fun: a function from params, as its first argument, and others to anything. As
        under `jax.jit`, it cannot branch on values of params.
      tables: what `value_and_row_grad` takes: a tree that is a prefix of params, with a
        `PartitionSpec` or a `NamedSharding` for tables that are spread over devices.
        Of leaves for which it says True, False or None, lookups are as they are.

    Returns:
      A function of the same arguments with the same results. Call it under `jax.jit`.
      It has no derivatives.

    Raises:
      ValueError: (when called) tables is not a prefix of params, a table cannot be
        spread as it says, or its rows cannot be looked up before the function runs,
        such as those of a `while_loop`; or a derivative is taken of the results.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from monolith_optax import with_row_lookups
      >>> mesh = jax.make_mesh((1,), ("x",))
      >>> rows = NamedSharding(mesh, PartitionSpec("x"))
      >>> params = {"table": jax.device_put(jnp.arange(8.0).reshape(4, 2), rows)}
      >>> def scores(params, ids):
      ...     return params["table"][ids].sum(1)
      >>> spread_scores = with_row_lookups(scores, {"table": rows})
      >>> print(jax.jit(spread_scores)(params, jnp.array([3, -1, 0])))
      [13. 13.  1.]
    """

    @functools.wraps(fun)
    def looked_up(
        params: Params, *args: Others.args, **kwargs: Others.kwargs
    ) -> Result:
        if not read(tables, params).spread:
            return fun(params, *args, **kwargs)
        loss, arrays = on_any_axes(run, _back, (params, *args), kwargs)
        found: Result = loss.with_arrays(list(map(no_derivatives, arrays)))
        return found

    def run(args: PyTree, kwargs: PyTree) -> Results:
        loss = trace_loss(_as_aux(fun), 0, True, tables, args, kwargs)
        loss = _without_gradients(loss)
        run = LossRun(loss, choose(loss, None))
        _, (arrays, _) = run(run.dense, run.rows)
        return loss, arrays

    return cast(Callable[Concatenate[Params, Others], Result], looked_up)


def _back(found: Results, error: SplitIdsError) -> Results:
    """Results on explicit axes, of a function that ran on automatic ones."""
    loss, arrays = found
    return loss, results(arrays, error)


def _as_aux(fun: Callable[..., PyTree]) -> Callable[..., PyTree]:
    return lambda *args, **kwargs: (0.0, fun(*args, **kwargs))


def _without_gradients(loss: Loss) -> Loss:
    """What is read of a loss when only its spread tables matter, and no gradients."""
    spread = loss.asked.spread
    flags: list[bool | None] = [i in spread for i in range(len(loss.leaves))]
    asked = loss.asked._replace(flags=flags)
    return loss._replace(asked=asked, for_gradients=False)
