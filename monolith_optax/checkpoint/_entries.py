"""What a leaf of params or state is in a TensorFlow checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, get_abstract_mesh

from monolith_optax._leaves import describe, dtype_of

GLOBAL_STEP = "global_step"
_KEEP_IN_FULL = "Import into an optimizer that keeps the slot in full."


class MismatchError(ValueError):
    """A tensor is not what the leaf needs; the message may have several lines."""


@dataclass(frozen=True)
class Kept:
    """A leaf that a checkpoint does not have, such as a hyperparameter."""

    path: str
    names: tuple[str, ...] = ()

    def read(self, tensors: Mapping[str, Any], leaf: Any) -> Any:
        """The leaf, unchanged."""
        del tensors
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise MismatchError(
                f"state{self.path} is only a shape, but a checkpoint has no value for "
                "it: give a state that init returned."
            )
        return leaf

    def write(self, leaf: Any) -> dict[str, np.ndarray]:
        """Nothing."""
        del leaf
        return {}


@dataclass(frozen=True)
class Tensor:
    """A variable or a slot."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """Its only name."""
        return (self.name,)

    def read(self, tensors: Mapping[str, Any], leaf: Any) -> Any:
        """The tensor, on the devices of the leaf."""
        value = tensor(tensors, self.name, np.shape(leaf), dtype_of(leaf))
        return placed(value, leaf)

    def write(self, leaf: Any) -> dict[str, np.ndarray]:
        """The leaf under its name."""
        return {self.name: np.array(leaf, copy=isinstance(leaf, np.ndarray) or None)}


@dataclass(frozen=True)
class Shared:
    """One number that replaces several slots whose entries are all equal."""

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all slots."""
        return tuple(self.shapes)

    def read(self, tensors: Mapping[str, Any], leaf: Any) -> Any:
        """The number that all entries of all slots hold."""
        _check_scalar("shared slot", leaf)
        problems, numbers = [], {}
        for name, shape in self.shapes.items():
            try:
                slot = tensor(tensors, name, shape, leaf.dtype)
            except MismatchError as mismatch:
                problems.append(str(mismatch))
                continue
            if slot.size and slot.min() == slot.max():
                numbers[name] = slot.flat[0]
            elif slot.size:
                problems.append(
                    f"{name} is not uniform: its entries range from {slot.min()} to "
                    f"{slot.max()}. {_KEEP_IN_FULL}"
                )
        if len(set(numbers.values())) > 1:
            each = ", ".join(f"{name} is {number}" for name, number in numbers.items())
            problems.append(
                f"The state needs one number for all variables, but {each}. "
                f"{_KEEP_IN_FULL}"
            )
        if problems:
            raise MismatchError("\n".join(problems))
        number = next(iter(numbers.values()), 0)
        return placed(np.asarray(number, leaf.dtype), leaf)

    def write(self, leaf: Any) -> dict[str, np.ndarray]:
        """Full slots."""
        _check_scalar("shared slot", leaf)
        number = np.asarray(leaf)
        return {
            name: np.full(shape, number, number.dtype)
            for name, shape in self.shapes.items()
        }


@dataclass(frozen=True)
class Count:
    """A count of steps, which TensorFlow keeps in one variable."""

    names: tuple[str, ...] = (GLOBAL_STEP,)

    def read(self, tensors: Mapping[str, Any], leaf: Any) -> Any:
        """The global step in the dtype of the count."""
        _check_scalar("count", leaf)
        if GLOBAL_STEP not in tensors:
            raise MismatchError(f"{GLOBAL_STEP} is missing.")
        step = np.asarray(tensors[GLOBAL_STEP])
        most = np.iinfo(leaf.dtype).max
        if step.shape != () or step.dtype.kind not in "iu" or not 0 <= step <= most:
            raise MismatchError(
                f"{GLOBAL_STEP} must be one integer from 0 to {most}, but it is "
                f"{describe(step)}{f' that holds {step}' if step.shape == () else ''}."
            )
        return placed(step.astype(leaf.dtype), leaf)

    def write(self, leaf: Any) -> dict[str, np.ndarray]:
        """The count as TensorFlow has it."""
        _check_scalar("count", leaf)
        return {GLOBAL_STEP: np.asarray(leaf, np.int64)}


Entry = Kept | Tensor | Shared | Count


def tensor(
    tensors: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    """A tensor of that shape and dtype."""
    if name not in tensors:
        raise MismatchError(f"{name} is missing.")
    value = np.asarray(tensors[name])
    if value.shape != shape or value.dtype != dtype:
        raise MismatchError(
            f"{name}: expected an array of dtype {dtype} and shape {shape}, got "
            f"{describe(value)}."
        )
    return value


def placed(value: np.ndarray, leaf: Any) -> Any:
    """A copy of the value, on the devices of the leaf."""
    return handed_over(np.array(value), leaf)


def handed_over(value: np.ndarray, leaf: Any) -> Any:
    """A value that nothing else changes, on the devices of the leaf."""
    if isinstance(leaf, np.ndarray | np.generic):
        return value
    committed = getattr(leaf, "committed", True)
    sharding = getattr(leaf, "sharding", None) if committed else None
    return jax.device_put(value, _with_devices(sharding))


def _with_devices(sharding: Any) -> Any:
    """The sharding, on the devices of the current mesh if its own mesh has none."""
    if not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return sharding
    if sharding.mesh != get_abstract_mesh():
        raise ValueError(
            f"A leaf of params or state has the sharding {sharding}, whose mesh has no "
            "devices: import inside `with jax.set_mesh(mesh)`, or give leaves whose "
            "shardings have devices."
        )
    return sharding.spec


def _check_scalar(name: str, leaf: Any) -> None:
    if np.shape(leaf) != ():
        raise MismatchError(
            f"The state's {name} has the shape {np.shape(leaf)}, expected (). If "
            "jax.vmap made the state, use one member at a time."
        )
