"""Traced programs: the words that value_and_row_grad and lazy_rows share.

Of the package only this module knows how `jax.extend` spells the parts of a program,
which differs between versions of JAX.
"""

import contextlib
import operator
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeGuard, TypeVar, cast

import jax
import numpy as np
from jax.extend import core, source_info_util
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from monolith_optax._rows.types import ArrayType, Mesh, PyTree, Shape

Value = TypeVar("Value")
Program = core.ClosedJaxpr
Jaxpr = core.Jaxpr
Equation = core.JaxprEqn
Variable = core.Var
Literal = core.Literal
Atom: TypeAlias = Variable | Literal  # an operand or a result

# The type of an operand or result, by far the most frequent question.
type_of = cast(Callable[[Atom], ArrayType], operator.attrgetter("aval"))

# Primitives that call a program on their operands and give back what it gives. The two
# that carry derivative rules of their own are apart: who runs their program instead
# loses the rules.
CHECKPOINTS = frozenset({"remat2"})
CALLS = CHECKPOINTS | {"jit", "closed_call", "call"}
CUSTOM_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})


def trace(function: Callable[..., PyTree], *args: PyTree) -> tuple[Program, PyTree]:
    """The program of a function, and the tree of types that it returns.

    Arguments may be types themselves (`jax.typeof`). The program's operands are the
    leaves of the arguments, its results the leaves of the tree.
    """
    program, results = jax.make_jaxpr(function, return_shape=True)(*args)
    return program, results


def interpret(
    program: Program,
    operands: Sequence[Value],
    step: Callable[[Equation, list[Value]], Sequence[Value]],
    constant: Callable[[ArrayLike], Value],
) -> list[Value]:
    """Runs a program in values of another kind.

    Args:
      program: the program.
      operands: its operands.
      step: gives the results of one equation, from those of its operands.
      constant: makes a value of an array or number that is part of the program.
    """
    jaxpr = program.jaxpr
    values: dict[Variable, Value] = dict(
        zip(jaxpr.constvars, map(constant, program.consts), strict=True)
    )
    values.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Atom) -> Value:
        return constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = []
        for atom in equation.invars:  # without calls, as there are many of them
            is_number = isinstance(atom, Literal)
            given.append(constant(atom.val) if is_number else values[atom])
        results = step(equation, given)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def inlined(program: Program) -> Program:
    """The program without calls; those that save no results for gradients stay."""

    def step(equation: Equation, operands: list[ArrayLike]) -> Sequence[ArrayLike]:
        if equation.primitive.name not in CALLS - CHECKPOINTS:
            return bind(equation, operands)
        [called] = programs_of(equation)
        return run(called, operands)

    def run(program: Program, operands: Sequence[ArrayLike]) -> list[ArrayLike]:
        return interpret(program, operands, step, lambda constant: constant)

    types = [type_of(operand) for operand in program.jaxpr.invars]
    return trace(lambda *operands: run(program, operands), *types)[0]


def bind(
    equation: Equation, operands: Sequence[ArrayLike], **changed: object
) -> list[jax.Array]:
    """Applies an equation to other operands, where it stands in the user's source.

    Args:
      equation: the equation.
      operands: its new operands.
      **changed: parameters of the equation that get another value.
    """
    with standing_at(equation):
        return _bind(equation, operands, changed)


def _bind(
    equation: Equation, operands: Sequence[ArrayLike], changed: Mapping[str, object]
) -> list[jax.Array]:
    primitive = equation.primitive
    params = primitive.get_bind_params({**equation.params, **changed})
    functions, params = params if isinstance(params, tuple) else ((), params)
    results = primitive.bind(*functions, *operands, **params)
    return list(results) if primitive.multiple_results else [results]


def evaluate_now(
    equation: Equation, operands: Sequence[ArrayLike], **changed: object
) -> list[np.ndarray]:
    """Applies an equation to NumPy's arrays while a program is traced, on no mesh."""
    no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"), no_mesh:
        return list(map(np.asarray, _bind(equation, operands, changed)))


@contextlib.contextmanager
def standing_at(equation: Equation) -> Iterator[None]:
    """Where operations stand in the user's source and mesh as an equation does."""
    source = equation.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    with (
        source_info_util.user_context(source.traceback, name_stack=names),
        equation.ctx.manager,
    ):
        yield


def holds(program: Program, array: np.ndarray) -> bool:
    """Whether an array is written in a program or in one that it calls."""
    calls = filter(None, map(called_program, program.jaxpr.eqns))
    return any(
        np.shape(each) == array.shape
        and np.result_type(each) == array.dtype
        and np.array_equal(np.asarray(each), array)
        for each in program.consts
        if not isinstance(each, jax.core.Tracer)
    ) or any(holds(called, array) for called in calls)


def is_variable(atom: Atom) -> TypeGuard[Variable]:
    """Whether an operand or result is a variable, not a number in the equation."""
    return not isinstance(atom, Literal)


def shapes_of(equation: Equation) -> list[Shape]:
    """The shapes of the operands of an equation."""
    return [type_of(operand).shape for operand in equation.invars]


def source_line(equation: Equation, *callers: Equation) -> str:
    """The operation and the user's line that it comes from: 'mul at model.py:41'.

    In JAX's own functions operations may know no line; it then is that of a caller.
    """
    name = str(equation.primitive.name)
    for each in (equation, *callers):
        place, _, _ = source_info_util.summarize(each.source_info).partition(" (")
        file, *numbers = place.rsplit(":", 2)
        if numbers:
            return f"{name} at {pathlib.PurePath(file).name}:{numbers[0]}"
    return name


def called_program(equation: Equation) -> Program | None:
    """The program that a call runs on its operands, with its rules of derivatives."""
    if equation.primitive.name not in CALLS | CUSTOM_DERIVATIVES:
        return None
    [program] = [
        equation.params[name]
        for name in ("jaxpr", "call_jaxpr")
        if name in equation.params
    ]
    return closed(program)


def closed(program: Program | Jaxpr) -> Program:
    """A program with its constants, which some primitives do not hold."""
    if hasattr(program, "consts"):
        return cast(Program, program)
    return Program(program, ())


def branches(equation: Equation) -> list[Program]:
    """The programs of a `cond`; its first operand is the index of one of them."""
    return [closed(branch) for branch in equation.params["branches"]]


def programs_of(equation: Equation) -> list[Program]:
    """The programs that a call, a `cond` or a `scan` runs."""
    name = equation.primitive.name
    if name == "cond":
        return branches(equation)
    called = called_program(equation)
    return [scan_parts(equation).body if called is None else called]


class Scan(NamedTuple):
    """The body of a `scan`, whose operands are constants, carry, and slices."""

    body: Program
    num_consts: int
    num_carry: int


def scan_parts(equation: Equation) -> Scan:
    """The parts of a `scan`."""
    params = equation.params
    if "num_consts" in params:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:  # since JAX 0.12
        num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    return Scan(closed(params["jaxpr"]), num_consts, num_carry)


class While(NamedTuple):
    """The programs of a `while`.

    Its operands are the constants of the condition, those of the body, and the carry.
    """

    condition: Program
    body: Program
    num_condition_consts: int
    num_body_consts: int


def while_parts(equation: Equation) -> While:
    """The parts of a `while`."""
    params = equation.params
    return While(
        closed(params["cond_jaxpr"]),
        closed(params["body_jaxpr"]),
        params["cond_nconsts"],
        params["body_nconsts"],
    )


class ShardMap(NamedTuple):
    """The body of a `shard_map`, and how its operands and results are split.

    `axes` are the mesh axes over which the body runs once per device.
    """

    body: Program
    mesh: Mesh
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    axes: frozenset[str]
    check_vma: bool


def shard_map_parts(equation: Equation) -> ShardMap:
    """The parts of a `shard_map`."""
    params = equation.params
    axes = params[
        "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
    ]
    return ShardMap(
        closed(params["jaxpr"]),
        params["mesh"],
        tuple(params["in_specs"]),
        tuple(params["out_specs"]),
        frozenset(axes),
        params["check_vma"],
    )
