"""What compiled programs of several devices send and copy, as JAX prints them."""

import math
import re

COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
BITS = re.compile(r"\d+$")


def collectives(compiled):
    """The kind and the bytes of each array that a collective gives."""
    return [
        (kind, _bytes(*array))
        for shapes, kind in COLLECTIVE.findall(compiled.as_text())
        for array in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    ]


def sent(compiled):
    """By kind, the bytes that each collective gives, of all of its arrays together."""
    found = {}
    for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        found.setdefault(kind, []).append(sum(_bytes(*array) for array in arrays))
    return found


def copies(compiled, shape):
    """The lines that copy an array of a shape."""
    sizes = ",".join(map(str, shape))
    pattern = re.compile(rf" = \w+\[{sizes}\]\S* copy\(")
    return [line for line in compiled.as_text().splitlines() if pattern.search(line)]


def _bytes(dtype, sizes):
    bits = BITS.search(dtype)
    size = math.prod(int(each) for each in sizes.split(",") if each)
    return size * (int(bits.group()) // 8 if bits else 1)
