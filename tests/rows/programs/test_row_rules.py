"""Rules of operations: rows of results are those of the whole, or there is no rule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from op_by_op import op_by_op

from monolith_optax._rows.programs import jaxprs, row_rules

pytestmark = pytest.mark.usefixtures("float64", "mixed_ranks")

N, E, D = 5, 2, 3
IDS = np.array([3, 0, 3, 4])


class Case(NamedTuple):
    """An operation, its operands' shapes, which of them have row axes, and how many."""

    apply: object
    shapes: tuple[tuple[int, ...], ...]
    by_row: tuple[bool, ...] = (True,)
    row_axes: int = 1


def numbers(shape, seed):
    keys = np.random.default_rng(seed).permutation(int(np.prod(shape)))
    return jnp.asarray(keys.reshape(shape) - 4.0, jnp.float32)


def operands_of(case):
    return [numbers(shape, i) for i, shape in enumerate(case.shapes)]


def planned(case):
    """The operands, and the plan of the equation, if there is one."""
    operands = operands_of(case)
    [equation] = jax.make_jaxpr(case.apply)(*operands).jaxpr.eqns
    return operands, row_rules.plan(equation, list(case.by_row), case.row_axes)


def whole(equation, operands):
    return op_by_op(lambda *operands: jaxprs.bind(equation, operands))(*operands)


def broadcast(shape, axes):
    return lambda x: lax.broadcast_in_dim(x, shape, axes)


def dot(contracted, batch=((), ())):
    return lambda a, b: lax.dot_general(a, b, (contracted, batch))


KEPT = {
    "add": Case(lax.add, ((N, D), (N, D)), (True, True)),
    "add a whole array": Case(lax.add, ((N, D), (N, D)), (True, False)),
    "clip": Case(lax.clamp, ((), (N, D), ()), (False, True, False)),
    "add one number to each table": Case(
        lax.add, ((E, N, D), (E, 1, D)), (True, False), 2
    ),
    "add one row to a stack": Case(lax.add, ((E, N, D), (1, 1, D)), (True, False), 2),
    "bits": Case(lambda x: lax.bitcast_convert_type(x, np.float64), ((N, 2),)),
    "add in a stack": Case(lax.add, ((E, N, D), (E, N, D)), (True, False), 2),
    "one row": Case(lax.add, ((1, D), (1, D)), (True, False)),
    "spread a row": Case(broadcast((N, D), (1,)), ((D,),), (False,)),
    "spread a column": Case(broadcast((N, D), (0,)), ((N,),)),
    "spread columns": Case(broadcast((N, E, D), (0, 2)), ((N, D),)),
    "spread a column of ones": Case(broadcast((N, D), (0, 1)), ((N, 1),)),
    "spread one row": Case(broadcast((N, D), (0, 1)), ((1, D),), (False,)),
    "spread the one row there is": Case(broadcast((1, D), (0,)), ((1,),)),
    "spread a row of each table": Case(
        broadcast((E, N, D), (0, 1, 2)), ((E, 1, D),), (False,), 2
    ),
    "spread in a stack": Case(broadcast((E, N, D), (0, 1)), ((E, N),), (True,), 2),
    "spread to a stack": Case(broadcast((E, N, D), (2,)), ((D,),), (False,), 2),
    "sum": Case(lambda x: x.sum(1), ((N, D),)),
    "sum of a stack": Case(lambda x: x.sum(2), ((E, N, D),), (True,), 2),
    "argmax": Case(lambda x: lax.argmax(x, 1, np.int32), ((N, D),)),
    "cumsum": Case(lambda x: lax.cumsum(x, 1), ((N, D),)),
    "sort two": Case(
        lambda x, y: lax.sort((x, y), dimension=1), ((N, D),) * 2, (True, False)
    ),
    "join": Case(
        lambda x, y: lax.concatenate([x, y], 1), ((N, D), (N, E)), (True, False)
    ),
    "dot of rows": Case(
        dot(((1,), (1,)), ((0,), (0,))), ((N, D), (N, D)), (True, True)
    ),
    "dot of rows of a stack": Case(
        dot(((2,), (3,)), ((0, 1), (0, 1))),
        ((E, N, D), (E, N, 4, D)), (True, False), 2,
    ),
    "dot of more batches": Case(
        dot(((3,), (2,)), ((0, 1), (0, 1))),
        ((N, E, 4, D), (N, E, D)), (True, True),
    ),
    "matrix": Case(dot(((1,), (0,))), ((N, D), (D, 4)), (True, False)),
    "vector from the left": Case(dot(((0,), (1,))), ((D,), (N, D)), (False, True)),
    "matrix of a stack": Case(
        dot(((2,), (0,))), ((E, N, D), (D, 4)), (True, False), 2
    ),
    "columns": Case(lambda: lax.broadcasted_iota(np.int32, (N, D), 1), (), ()),
    "columns of a stack": Case(
        lambda: lax.broadcasted_iota(np.int32, (E, N, D), 2), (), (), 2
    ),
    "reshape": Case(lambda x: lax.reshape(x, (N, D, 2)), ((N, 6),)),
    "reshape in a stack": Case(
        lambda x: lax.reshape(x, (E, N, 6)), ((E, N, 2, D),), (True,), 2
    ),
    "slice": Case(lambda x: lax.slice(x, (0, 1), (N, D)), ((N, D),)),
    "slice by steps": Case(lambda x: lax.slice(x, (0, 0), (N, 4), (1, 2)), ((N, 4),)),
    "slice in a stack": Case(
        lambda x: lax.slice(x, (0, 0, 1), (E, N, D)), ((E, N, D),), (True,), 2
    ),
    "pad": Case(
        lambda x, y: lax.pad(x, y, ((0, 0, 0), (1, 2, 1))), ((N, D), ()), (True, False)
    ),
    "top_k": Case(lambda x: lax.top_k(x, 2), ((N, D),)),
    "top_k in a stack": Case(lambda x: lax.top_k(x, 2), ((E, N, D),), (True,), 2),
    "transpose": Case(lambda x: lax.transpose(x, (0, 2, 1)), ((N, 2, D),)),
    "transpose in a stack": Case(
        lambda x: lax.transpose(x, (0, 1, 3, 2)), ((E, N, 2, D),), (True,), 2
    ),
    "rev": Case(lambda x: lax.rev(x, (1,)), ((N, D),)),
    "squeeze": Case(lambda x: lax.squeeze(x, (1,)), ((N, 1, D),)),
}  # fmt: skip
REFUSED = {
    "no rule": Case(lambda x: lax.dynamic_slice(x, (0, 0), (N, 1)), ((N, D),)),
    "results of two lengths": Case(
        lambda x, y: lax.optimization_barrier((x, y)), ((N, D), (D,)), (True, False)
    ),
    "one row beside more": Case(lax.add, ((1, D), (N, D)), (True, False)),
    "bits of a row": Case(
        lambda x: lax.bitcast_convert_type(x, np.float64), ((2,),), (False,)
    ),
    "join whole arrays": Case(
        lambda x, y: lax.concatenate([x, y], 1), ((N, D), (N, D)), (False, False)
    ),
    "join rows": Case(
        lambda x, y: lax.concatenate([x, y], 0), ((N, D), (N, D)), (True, True)
    ),
    "spread a whole column": Case(broadcast((N, D), (0,)), ((N,),), (False,)),
    "spread rows": Case(broadcast((N, N), (1,)), ((N,),)),
    "spread one row of rows": Case(broadcast((N, D), (0, 1)), ((1, D),)),
    "spread tables of a stack": Case(
        broadcast((E, N, D), (0, 2)), ((E, D),), (False,), 2
    ),
    "spread to fewer axes": Case(broadcast((N,), ()), ((),), (False,), 2),
    "split into nothing": Case(lambda x: lax.split(x, (), axis=1), ((N, 0),)),
    "sum over rows": Case(lambda x: x.sum(0), ((N, D),)),
    "sum over rows of a stack": Case(lambda x: x.sum(1), ((E, N, D),), (True,), 2),
    "cumsum": Case(lambda x: lax.cumsum(x, 0), ((N, D),)),
    "gram": Case(dot(((0,), (0,))), ((N, D), (N, D)), (True, True)),
    "rows by rows": Case(dot(((1,), (1,))), ((N, D), (N, D)), (True, True)),
    "matrix from the left": Case(dot(((1,), (1,))), ((4, D), (N, D)), (False, True)),
    "contracted rows": Case(dot(((0,), (0,))), ((N, D), (N, 4)), (True, False)),
    "batch of columns": Case(
        dot(((2,), (1,)), ((1,), (0,))), ((N, E, D), (E, D)), (True, False)
    ),
    "batch of other rows": Case(
        dot(((1,), (0,)), ((0,), (1,))), ((N, D), (D, N)), (True, False)
    ),
    "numbers of rows": Case(lambda: lax.broadcasted_iota(np.int32, (N, D), 0), (), ()),
    "numbers of rows of a stack": Case(
        lambda: lax.broadcasted_iota(np.int32, (E, N), 1), (), (), 2
    ),
    "reshape": Case(lambda x: lax.reshape(x, (D, N)), ((N, D),)),
    "reshape of a transpose": Case(
        lambda x: lax.reshape(x, (D, D), (1, 0)), ((D, D),)
    ),
    "slice from the second": Case(lambda x: lax.slice(x, (1, 0), (N, D)), ((N, D),)),
    "slice without the last": Case(
        lambda x: lax.slice(x, (0, 0), (N - 1, D)), ((N, D),)
    ),
    "slice every other": Case(
        lambda x: lax.slice(x, (0, 0), (N, D), (2, 1)), ((N, D),)
    ),
    "pad": Case(
        lambda x, y: lax.pad(x, y, ((0, 1, 0), (0, 0, 0))), ((N, D), ()), (True, False)
    ),
    "top_k": Case(lambda x: lax.top_k(x, 2), ((N,),)),
    "transpose": Case(lambda x: lax.transpose(x, (1, 0)), ((N, D),)),
    "transpose in a stack": Case(
        lambda x: lax.transpose(x, (1, 0, 2)), ((E, N, D),), (True,), 2
    ),
    "rev": Case(lambda x: lax.rev(x, (0,)), ((N, D),)),
}  # fmt: skip

if hasattr(lax, "tile"):
    KEPT["tile in a stack"] = Case(
        lambda x: lax.tile(x, (1, 1, 2)), ((E, N, D),), (True,), 2
    )
    REFUSED["tile"] = Case(lambda x: lax.tile(x, (2, 1)), ((N, D),))


@pytest.mark.parametrize("name", KEPT)
def test_rows_of_results_are_those_of_the_whole(name):
    case = KEPT[name]
    operands, plan = planned(case)
    assert plan is not None

    expected = whole(plan.equation, operands)
    row_shape = expected[0].shape[: case.row_axes]

    def rows(array):
        columns = array.shape[case.row_axes :]
        full = jnp.broadcast_to(array, (*row_shape, *columns))
        return full.reshape(-1, *columns)[IDS % np.prod(row_shape)]

    for i, is_row in enumerate(case.by_row):
        assert plan.by_row[i] or not is_row
    given = [
        rows(operand) if needed else operand
        for operand, needed in zip(operands, plan.by_row, strict=True)
    ]
    results = op_by_op(lambda *given: plan.apply(len(IDS), given))(*given)
    for actual, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual, rows(wanted))


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_depend_on_others_have_no_plan(name):
    assert planned(REFUSED[name])[1] is None


def test_only_some_operations_make_rows_from_nothing():
    def makes_rows(case):
        [equation] = jax.make_jaxpr(case.apply)(*operands_of(case)).jaxpr.eqns
        return row_rules.makes_rows(equation, case.row_axes)

    assert makes_rows(KEPT["columns"])
    assert makes_rows(KEPT["spread to a stack"])
    assert not makes_rows(Case(lax.add, ((), ())))
    assert not makes_rows(KEPT["add"])
    assert not makes_rows(REFUSED["numbers of rows"])


def test_one_row_or_number_for_all_is_none_of_the_batch():
    cases = [
        KEPT["spread one row"],
        Case(lax.add, ((1, D), (N, D)), (False, True)),
        Case(lax.add, ((), ()), (False, False)),
    ]
    for case in cases:
        _, plan = planned(case)
        assert plan.by_row == list(case.by_row)


def test_random_bits_of_one_key_or_of_a_key_for_each_row():
    keys = jax.random.split(jax.random.key(0), N)
    bits = lambda shape: lambda key: jax.random.bits(key, shape)  # noqa: E731
    [of_each] = jax.make_jaxpr(jax.vmap(bits((D,))))(keys).jaxpr.eqns
    [actual] = row_rules.plan(of_each, [True]).apply(len(IDS), [keys[IDS]])
    np.testing.assert_array_equal(actual, jax.vmap(bits((D,)))(keys)[IDS])
    assert row_rules.plan(of_each, [False]) is None
    [of_one] = jax.make_jaxpr(bits((N, D)))(keys[0]).jaxpr.eqns
    [actual] = row_rules.plan(of_one, [False]).apply(2, [keys[0]])
    np.testing.assert_array_equal(actual, bits((2, D))(keys[0]))
    assert row_rules.plan(of_one, [False], 3) is None
