"""The words for traced programs, with whatever JAX is installed."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from monolith_optax._rows.programs import jaxprs


@jax.custom_jvp
def doubled(x):
    return 2 * x


@doubled.defjvp
def _doubled_jvp(primals, tangents):
    return doubled(*primals), 5 * tangents[0]


@jax.custom_vjp
def tripled(x):
    return 3 * x


tripled.defvjp(lambda x: (3 * x, None), lambda _, cotangent: (7 * cotangent,))


def cumulated(x):
    return lax.scan(lambda total, y: (total + x[0] * y, total), x[0] * 0, x)


def counted(x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, x))


def branched(x):
    return lax.cond(x[0] > 0, lambda: x + 1, lambda: x - 1)


PROGRAMS = {
    "doubled": doubled,
    "tripled": tripled,
    "jit": jax.jit(jnp.sin),
    "checkpoint": jax.checkpoint(jnp.sin),
    "scan": cumulated,
    "while": counted,
    "cond": branched,
    "random": lambda x: x + jax.random.normal(jax.random.key(0), (3,)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_bound_equation_by_equation_is_its_function(name):
    function, x = PROGRAMS[name], jnp.array([1.0, 2.0, 3.0])
    program, shapes = jaxprs.trace(function, jax.typeof(x))

    def again(x):
        leaves = jaxprs.interpret(program, [x], jaxprs.bind, lambda constant: constant)
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    jax.tree.map(np.testing.assert_array_equal, again(x), function(x))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, jax.jit(again)(x), function(x))


@pytest.mark.parametrize(("function", "slope"), [(doubled, 5.0), (tripled, 7.0)])
def test_bound_equations_keep_their_derivative_rules(function, slope):
    program, _ = jaxprs.trace(function, 1.0)

    def again(x):
        return jaxprs.interpret(program, [x], jaxprs.bind, lambda constant: constant)[0]

    assert jax.grad(again)(1.0) == slope


def test_calls_give_the_program_that_they_run():
    x = jnp.array([1.0, 2.0, 3.0])
    for name in ("doubled", "tripled", "jit", "checkpoint"):
        [equation] = jaxprs.trace(PROGRAMS[name], x)[0].jaxpr.eqns
        [y] = jaxprs.interpret(
            jaxprs.called_program(equation), [x], jaxprs.bind, lambda constant: constant
        )
        np.testing.assert_allclose(y, PROGRAMS[name](x), rtol=1e-6)
    [equation] = jaxprs.trace(jnp.sin, x)[0].jaxpr.eqns
    assert jaxprs.called_program(equation) is None


def test_parts_of_control_flow():
    x = jnp.array([1.0, 2.0, 3.0])

    def only(function, name):
        equations = jaxprs.trace(function, x)[0].jaxpr.eqns
        [equation] = [e for e in equations if e.primitive.name == name]
        return equation

    body, num_consts, num_carry = jaxprs.scan_parts(only(cumulated, "scan"))
    assert (num_consts, num_carry, len(body.jaxpr.invars)) == (1, 1, 3)
    loop = jaxprs.while_parts(only(counted, "while"))
    assert (loop.num_condition_consts, loop.num_body_consts) == (0, 1)
    assert (len(loop.condition.jaxpr.invars), len(loop.body.jaxpr.invars)) == (2, 3)
    assert len(jaxprs.branches(only(branched, "cond"))) == 2


def test_an_equation_names_its_line():
    def model(x):
        return jnp.dot(x, x)

    line = inspect.getsourcelines(model)[1] + 1
    equation = jaxprs.trace(model, jnp.ones(3))[0].jaxpr.eqns[0]
    while (program := jaxprs.called_program(equation)) is not None:
        equation = program.jaxpr.eqns[0]
    assert jaxprs.source_line(equation) == f"dot_general at test_jaxprs.py:{line}"
