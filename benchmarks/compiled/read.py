"""Figures of a compiled program."""

from collections import Counter
from typing import Any

from monolith_optax._compiled.check_in_place import find_faults, spare_bytes, tables
from monolith_optax._compiled.program import COLLECTIVES, Instruction, Program, parse

# They name, combine or run other instructions and start nothing by themselves.
_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "call", "conditional", "opt-barrier", "partition-id", "replica-id"),
}


def figures(compiled: Any) -> dict[str, Any]:
    """What a program copies, allocates, sends and starts."""
    program = parse(compiled.as_text())
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    running = list(program.running())
    sizes = {p.arrays[0].size for p in tables(program)}
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "copies of tables": sum(
            any(array.size in sizes for array in copy.arrays)
            for copy in program.copies()
        ),
        "kernels": sum(map(_starts, running)),
        "loops": sum(i.opcode == "while" for i in running),
        "bytes accessed": cost["bytes accessed"] if cost else None,
        "collectives": collectives(program),
        "not in place": list(find_faults(program, spare_bytes(compiled))),
    }


def collectives(program: Program) -> dict[str, int]:
    """The bytes that the collectives of each kind yield on a device."""
    found: Counter[str] = Counter()
    for computation in program.computations.values():
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-done")
            if kind in COLLECTIVES:
                found[kind] += sum(array.nbytes for array in instruction.arrays)
    return dict(found)


def _starts(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    return opcode not in _NOTHING and not opcode.endswith(("-done", "-update"))
