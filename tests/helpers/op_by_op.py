"""Programs that run one operation after another, without being compiled as a whole.

A random program is new to XLA, and compiling it takes many times as long as all else.
Here NumPy runs the operations that it has too. JAX runs the others, and keeps each that
was compiled by its parameters and the types of its operands.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy_operations import IN_NUMPY

from monolith_optax._rows.programs import jaxprs


def op_by_op(function):
    """The function, traced as `jax.jit` does, run by operations and Python's loops."""
    traced = {}

    def run(*args):
        leaves, structure = jax.tree.flatten(args)
        key = structure, *map(jax.typeof, leaves)
        if key not in traced:
            traced[key] = jaxprs.trace(function, *args)
        program, types = traced[key]
        with np.errstate(all="ignore"):
            results = _run(program, leaves)
        return jax.tree.unflatten(jax.tree.structure(types), map(jnp.asarray, results))

    return run


def _run(program, operands):
    return jaxprs.interpret(program, operands, _step, lambda constant: constant)


def _step(equation, operands):
    name = str(equation.primitive.name)
    called = jaxprs.called_program(equation)
    if called is not None:
        return _run(called, operands)
    if name in _LOOPS:
        return _LOOPS[name](equation, operands)
    operands = list(map(_in_numpy, operands))
    if name in IN_NUMPY and all(isinstance(x, np.ndarray) for x in operands):
        results = IN_NUMPY[name](equation.params, *operands)
        results = results if isinstance(results, list) else [results]
        types = [jaxprs.type_of(out) for out in equation.outvars]
        assert [r.shape for r in map(np.asarray, results)] == [t.shape for t in types]
        return [np.asarray(r, t.dtype) for r, t in zip(results, types, strict=True)]
    return jaxprs.bind(equation, operands)


def _in_numpy(value):
    extended = jax.dtypes.extended
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, extended)
    return value if is_key else np.asarray(value)


def _cond(equation, operands):
    branches = jaxprs.branches(equation)
    index = int(operands[0])
    assert 0 <= index < len(branches)  # the program has clamped it
    return _run(branches[index], operands[1:])


def _scan(equation, operands):
    body, num_consts, num_carry = jaxprs.scan_parts(equation)
    length = equation.params["length"]
    consts, carry = operands[:num_consts], operands[num_consts:][:num_carry]
    stacks = list(map(_in_numpy, operands[num_consts + num_carry :]))
    types = [jaxprs.type_of(out) for out in equation.outvars[num_carry:]]
    if length == 0:
        return [*carry, *(jnp.zeros(out.shape, out.dtype) for out in types)]
    order = range(length)[::-1] if equation.params["reverse"] else range(length)
    found = {}
    for i in order:
        results = _run(body, [*consts, *carry, *(stack[i] for stack in stacks)])
        carry, found[i] = results[:num_carry], list(map(_in_numpy, results[num_carry:]))
    by_result = zip(*(found[i] for i in range(length)), strict=True)
    return [*carry, *map(_stacked, by_result)]


def _stacked(parts):
    return (np if isinstance(parts[0], np.ndarray) else jnp).stack(parts)


def _while(equation, operands):
    condition, body, first, second = jaxprs.while_parts(equation)
    of_condition, of_body = operands[:first], operands[first:][:second]
    carry = operands[first + second :]
    while np.asarray(_run(condition, [*of_condition, *carry])[0]):
        carry = _run(body, [*of_body, *carry])
    return carry


_LOOPS = {"cond": _cond, "scan": _scan, "while": _while}
