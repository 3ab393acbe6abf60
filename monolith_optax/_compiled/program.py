"""A compiled program, read from its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Array(NamedTuple):
    """An array of the program, as one device has it."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def size(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    @property
    def order(self) -> str:
        """Its axes, from the one whose neighbours are next to each other in memory."""
        return self.layout.partition(":")[0]

    @property
    def nbytes(self) -> int:
        """Without what a layout adds."""
        digits = re.search(r"\d+", self.dtype)
        return self.size * (int(digits[0]) if digits else 8) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """One line of the program: the arrays that it yields, and from what."""

    name: str
    arrays: list[Array]
    opcode: str
    operands: list[str]
    number: int  # of a parameter or of an element of a tuple
    called: list[str]
    origin: str  # what JAX calls it
    is_root: bool


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      computations: instructions by name, by the name of their computation.
      entry: the computation that runs first.
      aliases: for outputs that are written into a parameter, its number.
      devices: how many devices share its arrays.
    """

    computations: dict[str, Computation]
    entry: Computation
    aliases: dict[int, int]
    devices: int

    @property
    def parameters(self) -> list[Instruction]:
        """What goes in, in order."""
        found = [i for i in self.entry.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda instruction: instruction.number)

    @property
    def outputs(self) -> list[Array]:
        """What comes out, in order."""
        return root(self.entry).arrays

    def written_into_parameters(self) -> set[str]:
        """The instructions that yield an output in the memory of a parameter."""
        last = root(self.entry)
        made_by = last.operands if last.opcode == "tuple" else [last.name]
        return {made_by[output] for output in self.aliases}

    def running(self) -> Iterator[Instruction]:
        """The instructions that run by themselves, also in loops and branches."""
        pending = [self.entry]
        for computation in pending:
            for instruction in computation.values():
                yield instruction
                if instruction.opcode in _RUN_OTHERS:
                    pending += [self.computations[n] for n in instruction.called]

    def makers(self, instruction: Instruction) -> list[Instruction]:
        """For each array that an instruction yields, the one that computes it."""
        if instruction.opcode != "fusion":
            return [instruction] * len(instruction.arrays)
        fused = self.computations[instruction.called[0]]
        last = root(fused)
        made_by = last.operands if last.opcode == "tuple" else [last.name]
        return [_before_bitcasts(fused, fused[name]) for name in made_by]

    def copies(self) -> Iterator[Instruction]:
        """The instructions that copy.

        An array that moves to a chip's own memory or back, as it is, is not a copy.
        """
        for instruction in self.running():
            if any(maker.opcode in _COPY for maker in self.makers(instruction)):
                arrays = [*instruction.arrays]
                for name in instruction.operands:
                    arrays += self._defined(name).arrays
                orders = {array.order for array in arrays if array.size > 1}
                moves = any(OTHER_MEMORY in array.layout for array in arrays)
                if len(orders) > 1 or not moves:
                    yield instruction

    def by_rows(self) -> set[int]:
        """The sizes of the arrays that are read or written by indices."""
        return {
            computation[instruction.operands[0]].arrays[0].size
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.opcode in _BY_INDICES
        }

    def source(self, name: str, element: int = 0) -> Instruction | None:
        """The parameter that this array was before it was changed, if it is one."""
        instruction = self.entry.get(name)
        if instruction is None or instruction.opcode == "parameter":
            return instruction
        if instruction.opcode == "get-tuple-element":
            return self.source(instruction.operands[0], instruction.number)
        if instruction.opcode == "tuple":
            return self.source(instruction.operands[element])
        if instruction.opcode == "while":
            return self.source(instruction.operands[0], element)
        size = instruction.arrays[element].size
        alike = {
            operand: None
            for operand in instruction.operands
            if operand in self.entry and self.entry[operand].arrays[0].size == size
        }
        return self.source(next(iter(alike))) if len(alike) == 1 else None

    def _defined(self, name: str) -> Instruction:
        return next(c[name] for c in self.computations.values() if name in c)


def _before_bitcasts(computation: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = computation[instruction.operands[0]]
    return instruction


def root(computation: Computation) -> Instruction:
    """What a computation returns."""
    return next(i for i in computation.values() if i.is_root)


def parse(text: str) -> Program:
    """Reads the text of a compiled program."""
    computations: dict[str, Computation] = {}
    inside: Computation = {}
    entry = inside
    header, _, rest = text.partition("\n")
    for line in rest.splitlines():
        if found := _COMPUTATION.match(line):
            inside = computations[found["name"]] = {}
            entry = inside if found["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            inside[found["name"]] = _instruction(found)
    aliases = {
        int(output or 0): int(parameter) for output, parameter in _ALIAS.findall(header)
    }
    devices = _DEVICES.search(header)
    return Program(computations, entry, aliases, int(devices[1]) if devices else 1)


def _instruction(found: re.Match[str]) -> Instruction:
    inputs, _, rest = found["rest"].partition(")")
    index = inputs if found["opcode"] == "parameter" else _INDEX.search(rest)
    called = [name for names in _CALLED.findall(rest) for name in _NAMES.findall(names)]
    origin = _ORIGIN.search(rest)
    return Instruction(
        name=found["name"],
        arrays=[
            Array(dtype, tuple(map(int, filter(None, shape.split(",")))), layout)
            for dtype, shape, layout in _ARRAY.findall(found["type"])
        ],
        opcode=found["opcode"],
        operands=_OPERAND.findall(inputs),
        number=int(index if isinstance(index, str) else index[1]) if index else 0,
        called=called,
        origin=origin[1].replace("\\", "") if origin else "",
        is_root=bool(found["root"]),
    )


_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<type>.*?) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<rest>.*)"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPERAND = re.compile(r"%([^\s,()]+)")
_CALLED = re.compile(
    r"(?:condition|body|calls|to_apply|true_computation|false_computation|"
    r"branch_computations)=(\{[^}]*\}|[^\s,]+)"
)
_NAMES = re.compile(r"%([^\s,{}]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_ORIGIN = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}")
_DEVICES = re.compile(r"num_partitions=(\d+)")

COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    "collective-permute",
}
_RUN_OTHERS = {"while", "call", "conditional", "async-start"}
_COPY = {"copy", "copy-done"}
_BY_INDICES = {"gather", "scatter", "dynamic-slice", "dynamic-update-slice"}
OTHER_MEMORY = "S("  # in the layout of an array in a chip's own memory
