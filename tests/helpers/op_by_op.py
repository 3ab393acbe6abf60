"""Programs that run one operation after another, without being compiled as a whole.

A random program is new to XLA, and compiling it takes many times as long as all else.
Here NumPy runs the operations that it has too. JAX runs the others, and keeps each that
was compiled by its parameters and the types of its operands.
"""

import jax
import jax.numpy as jnp
import numpy as np

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
    if name in _NUMPY and all(isinstance(x, np.ndarray) for x in operands):
        results = _NUMPY[name](equation.params, *operands)
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


def _broadcast(params, x, *_):
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _slice(params, x):
    limits = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or [1] * x.ndim
    return x[tuple(map(slice, *limits, steps))]


def _iota(params):
    shape, axis = params["shape"], params["dimension"]
    along = np.arange(shape[axis], dtype=params["dtype"])
    return np.broadcast_to(along.reshape(-1, *[1] * (len(shape) - axis - 1)), shape)


def _select(_, which, *cases):
    return np.choose(which.astype(int), cases)


def _elementwise(function):
    return lambda _, *operands: function(*operands)


def _over_axes(function):
    return lambda params, x: function(x, axis=tuple(params["axes"]))


_NUMPY = {
    name: _elementwise(function)
    for name, function in {
        "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply,
        "neg": np.negative, "max": np.maximum, "min": np.minimum, "abs": np.abs,
        "exp": np.exp, "log": np.log, "log1p": np.log1p, "tanh": np.tanh,
        "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt, "floor": np.floor,
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
        "gt": np.greater, "ge": np.greater_equal, "and": np.bitwise_and,
        "or": np.bitwise_or, "not": np.invert, "is_finite": np.isfinite,
        "square": np.square, "copy": np.asarray,
    }.items()
}  # fmt: skip
_NUMPY |= {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "convert_element_type": lambda p, x: x.astype(p["new_dtype"]),
    "integer_pow": lambda p, x: x ** np.asarray(p["y"], x.dtype),
    "iota": _iota,
    "reduce_sum": _over_axes(np.sum),
    "reduce_max": _over_axes(np.max),
    "reduce_min": _over_axes(np.min),
    "reduce_and": _over_axes(np.all),
    "reduce_or": _over_axes(np.any),
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "select_n": _select,
    "slice": _slice,
    "split": lambda p, x: np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"]),
    "squeeze": lambda p, x: np.squeeze(x, tuple(p["dimensions"])),
    "transpose": lambda p, x: x.transpose(p["permutation"]),
}
