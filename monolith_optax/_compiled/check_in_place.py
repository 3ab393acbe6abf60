"""Whether a step writes into the arrays that it is given: `check_in_place`."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from monolith_optax._compiled.program import (
    COLLECTIVES,
    OTHER_MEMORY,
    Array,
    Instruction,
    Program,
    parse,
    root,
)


def check_in_place(step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Checks that a training step copies no table and allocates none.

    A step costs what the batch costs only if XLA may write into the old tables. This
    compiles the step, runs nothing, and reads the compiled program, on any device.

    A *table* is an array that the step reads or writes by indices: a parameter that is
    looked up, and its slots. In a step that does so with none of its arguments, all
    arrays that it returns count. Arrays below 64 KiB on a device are not looked at.

    Args:
      step: a function, what `jax.jit`, `nnx.jit` or `eqx.filter_jit` makes of it, or a
        step that is compiled, as by `jax.jit(step).lower(*args).compile()`. A function
        is jitted as it is, without donation.
      *args: the arguments of the step. Where the library allows it, as with `jax.jit`,
        `jax.ShapeDtypeStruct` may stand for arrays. They are not used for a compiled
        step.
      **kwargs: those with names.

    Raises:
      ValueError: with a sentence for each argument that is not donated though an output
        could take its memory, each donated one that no output can reuse, each table
        that is copied, and each temporary as large as a table. Also if there is no
        table.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from monolith_optax import check_in_place
      >>> def step(table, ids):
      ...     return table.at[ids].add(1.0)
      >>> args = jnp.zeros((100_000, 16)), jnp.array([3, 14])
      >>> check_in_place(jax.jit(step, donate_argnums=0), *args)
      >>> check_in_place(step, *args)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      ValueError: The step is not in place:
      - table (f32[100000,16], 6.4 MB) is not donated, ...
    """
    compiled = _compiled(step, args, kwargs)
    program = parse(compiled.as_text() or "")
    if not tables(program):
        raise ValueError(
            "The step neither returns nor reads by indices an array of 64 KiB or more: "
            "there is nothing to check. Give it tables as large as in training, for "
            "which jax.ShapeDtypeStruct may stand."
        )
    if faults := list(find_faults(program, spare_bytes(compiled))):
        raise ValueError("\n- ".join(["The step is not in place:", *faults]))


def _compiled(step: Any, args: Any, kwargs: Any) -> jax.stages.Compiled:
    if not hasattr(step, "lower") and not _is_compiled(step):
        step = jax.jit(step)
    if hasattr(step, "lower"):
        with warnings.catch_warnings():  # of what is said here for each argument
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            step = step.lower(*args, **kwargs).compile()
    # Flax and Equinox put their own objects around that of JAX.
    return step if isinstance(step, jax.stages.Compiled) else step.compiled


def _is_compiled(step: Any) -> bool:
    compiled = getattr(step, "compiled", step)
    return isinstance(compiled, jax.stages.Compiled)


def spare_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program allocates beside its arguments."""
    memory: Any = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.temp_size_in_bytes + new)


def tables(program: Program) -> list[Instruction]:
    """The parameters that are tables, slots included."""
    large = [p for p in program.parameters if p.arrays[0].nbytes >= _SMALLEST]
    returned = [p for p in large if _rivals(program, p)]
    by_rows = program.by_rows()
    if not any(p.arrays[0].size in by_rows for p in large):
        return returned
    # What is only read may also belong to the batch, which is smaller.
    least = max([p.arrays[0].size for p in returned], default=0)
    return [
        p
        for p in large
        if p.arrays[0].size in by_rows and (p in returned or p.arrays[0].size >= least)
    ]


def find_faults(program: Program, spare: int) -> Iterator[str]:
    """A sentence for each; `spare` bytes are allocated beside the arguments."""
    found = tables(program)
    new = {p.name for p in found if not _reused(program, p) and _rivals(program, p)}
    for parameter in found:
        if parameter.name in new:
            yield f"{_named(parameter)} {_why_not_reused(program, parameter)}"
    yield from _copies(program, found, new)
    spare -= sum(p.arrays[0].nbytes for p in found if p.name in new)
    yield from _temporaries(program, found, spare)


def _reused(program: Program, parameter: Instruction) -> bool:
    return parameter.number in program.aliases.values()


def _rivals(program: Program, parameter: Instruction) -> list[Array]:
    """The outputs as large as a parameter that are written into no other one."""
    own = parameter.arrays[0]
    return [
        array
        for number, array in enumerate(program.outputs)
        if _alike(own, array, program.devices)
        and program.aliases.get(number, parameter.number) == parameter.number
    ]


def _alike(one: Array, other: Array, devices: int) -> bool:
    """Whether both have one size, or would if they were sharded in the same way."""
    less, more = sorted([one.size, other.size])
    of_one_rank = len(one.shape) == len(other.shape)
    return less == more or (
        less > 0 and of_one_rank and more % less == 0 and devices % (more // less) == 0
    )


def _why_not_reused(program: Program, parameter: Instruction) -> str:
    own, rivals = parameter.arrays[0], _rivals(program, parameter)
    if own in rivals:
        return (
            "is not donated, so that each step writes a new one. Name its argument in "
            "donate_argnums."
        )
    output = rivals[0]
    if output.size != own.size:
        difference = f"is sharded otherwise, {output} on each device"
    elif output.dtype != own.dtype:
        difference = f"has the dtype {output.dtype}"
    elif output.shape != own.shape:
        difference = f"has the shape {output}"
    else:
        difference = f"has the layout {{{output.layout}}} instead of {{{own.layout}}}"
    return f"cannot be reused: the output of its size {difference}."


def _copies(program: Program, found: list[Instruction], new: set[str]) -> Iterator[str]:
    """Of copies of the same table the first."""
    sizes, seen = {p.arrays[0].size for p in found}, set(new)
    for copy in program.copies():
        if any(array.size in sizes for array in copy.arrays):
            source = program.source(copy.name)
            name = source.name if source else copy.name
            if name not in seen:
                seen.add(name)
                yield _why_copied(program, copy, source)


def _why_copied(program: Program, copy: Instruction, source: Instruction | None) -> str:
    if source is None:
        return f"{copy.arrays[0]}, as large as a table, is copied{_where(copy)}."
    before, after = program.entry[copy.operands[0]].arrays[0], copy.arrays[0]
    if before.layout != after.layout:
        return (
            f"{_named(source)} is copied from the layout {{{before.layout}}} into "
            f"{{{after.layout}}}. Give it, before and after the step, the layout in "
            "which the device reads and writes rows."
        )
    for output, parameter in program.aliases.items():
        written = program.source(root(program.entry).name, output)
        if parameter == source.number and written and written.number != parameter:
            return (
                f"{_named(source)} is copied, because its memory goes to another "
                f"output, the new {_name(written)}. Return arrays of one shape in the "
                "order in which they come in."
            )
    return (
        f"{_named(source)} is copied{_where(copy)}: something needs the old one after "
        "the new one is written."
    )


def _temporaries(
    program: Program, found: list[Instruction], spare: int
) -> Iterator[str]:
    """Whole tables that are computed or sent, one sentence for those of one origin."""
    whole = {p.arrays[0].size * n for p in found for n in _divisors(program.devices)}
    rows = {p.arrays[0].shape[0] for p in found}
    reused = program.written_into_parameters()
    said = set()
    for instruction in program.running():
        makers = program.makers(instruction)
        for array, maker in zip(instruction.arrays, makers, strict=False):
            kind = maker.opcode.removesuffix("-done")
            sent = kind in COLLECTIVES and array.size in whole
            kept = (
                kind not in _NOTHING_NEW
                and OTHER_MEMORY not in array.layout
                and instruction.name not in reused
                and not kind.endswith("-start")
                and (array.size in whole or _is_column(array, rows))
                and _SMALLEST <= array.nbytes <= spare
            )
            what = f"{array}{_where(maker)}, as large as a table, is "
            what += "sent between devices." if sent else "a temporary."
            if (sent or kept) and what not in said:
                said.add(what)
                yield what


def _is_column(array: Array, rows: set[int]) -> bool:
    """Whether it has one entry for each row of a table."""
    return array.size in rows and array.size in array.shape


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _named(parameter: Instruction) -> str:
    array = parameter.arrays[0]
    return f"{_name(parameter)} ({array}, {array.nbytes / 1e6:.1f} MB)"


def _name(parameter: Instruction) -> str:
    return parameter.origin or f"argument {parameter.number}"


def _where(instruction: Instruction) -> str:
    return f" at {instruction.origin}" if instruction.origin else ""


_SMALLEST = 2**16  # bytes; to copy less takes no longer than to start a kernel

_NOTHING_NEW = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("while", "call", "conditional", "opt-barrier"),
    *(
        "scatter",
        "dynamic-update-slice",
    ),  # XLA copies explicitly what they may not write
    *("copy", "copy-start"),  # have a sentence of their own
}
