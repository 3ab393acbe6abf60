"""`shard_map` given tables (`constructs.py` says what that means)."""

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax._rows.gradients.add_zeros import Run
from monolith_optax._rows.gradients.find_lookups import Finder
from monolith_optax._rows.gradients.image_facts import (
    Known,
    is_data,
    is_table,
    which_tables,
)
from monolith_optax._rows.gradients.lookup_tree import (
    Arrays,
    Each,
    EachOf,
    Found,
    Ids,
    Node,
    Zeros,
    inside,
)
from monolith_optax._rows.gradients.row_images import Parameter, Value, Values
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation
from monolith_optax._rows.types import Mesh


class ShardMap:
    """A program that runs on each device, with its part of some tables."""

    def find(
        self, finder: Finder, equation: Equation, operands: list[Known]
    ) -> tuple[Sequence[Known], Node]:
        parts, place = jaxprs.shard_map_parts(equation), finder.place(equation)
        operands = list(operands)
        reasons: dict[int, str] = {}
        for i, (value, spec) in enumerate(zip(operands, parts.in_specs, strict=True)):
            if not is_table(value):
                operands[i] = is_data(value)
            elif any(names is not None for names in spec[1:]):
                reasons[i] = f"is split by columns before {place}"
            elif not value.is_leaf:
                reasons[i] = f"is computed with before {place}"
            else:
                [leaf], split = value.leaves, spec[0] if len(spec) else None
                operands[i] = finder.parameter(leaf, split)
        taken = finder.otherwise(equation, operands, reasons)
        images = which_tables(operands)

        active = finder.active(equation)
        with finder.inside(equation):
            results, tree = finder.whole(equation, parts.body, operands, active)
        sizes = dict(parts.mesh.shape)

        def of_all_devices(found: Found) -> Found:
            axes = _device_axes(parts, found)
            devices = int(np.prod([sizes[axis] for axis in axes], dtype=int))
            outside = found.varying - parts.axes
            return found.stacked(devices)._replace(varying=outside)

        return results, Node(
            taken, programs=[tree], images=images, all_runs=of_all_devices
        )

    def run(
        self, run: Run, equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
        parts = jaxprs.shard_map_parts(equation)

        def first_axis(found: Found) -> list[PartitionSpec]:
            return [PartitionSpec(_device_axes(parts, found))] * len(found.tables)

        [first] = inside(node, first_axis)
        arrays = list(map(run.scope.whole, operands))

        def body(
            arrays: list[jax.Array], zeros: EachOf[Arrays]
        ) -> tuple[list[jax.Array], EachOf[Arrays]]:
            values: Values = [*arrays]
            for i, (operand, array) in enumerate(zip(operands, arrays, strict=True)):
                if isinstance(operand, Parameter):
                    row = _first_row(parts.in_specs[i], array)
                    values[i] = Parameter(operand.leaf, array, row)
            zeros = jax.tree.map(lambda array: array[0], zeros)
            results, ids = run.inside(parts.body, values, node.programs[0], zeros)
            return results, jax.tree.map(lambda array: array[None], ids)

        mapped = jax.shard_map(
            body,
            mesh=parts.mesh,
            in_specs=(list(parts.in_specs), first),
            out_specs=(list(parts.out_specs), first),
            axis_names=parts.axes,
            check_vma=parts.check_vma,
        )
        added = jax.tree.map(
            lambda array, spec: _placed(array, parts.mesh, spec),
            zeros.programs[0],
            first,
        )
        results, ids = mapped(arrays, added)
        return results, Each({}, [], [ids])


def _device_axes(parts: jaxprs.ShardMap, found: Found) -> tuple[str, ...]:
    """The mesh axes over which a lookup inside a `shard_map` is another one."""
    axes = parts.axes & found.varying if parts.check_vma else parts.axes
    return tuple(axis for axis in parts.mesh.axis_names if axis in axes)


def _first_row(spec: PartitionSpec, array: jax.Array) -> jax.Array | int:
    """The row of a table with which a device's part of it begins."""
    if not len(spec) or spec[0] is None:
        return 0
    return lax.axis_index(spec[0]) * len(array)


def _placed(array: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """An array as a `shard_map` takes it, on a mesh whose axes are in types."""
    if AxisType.Explicit not in mesh.axis_types:
        return array
    placed: jax.Array = jax.sharding.reshard(array, NamedSharding(mesh, spec))
    return placed
