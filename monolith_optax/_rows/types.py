"""Names for what Python's own types do not describe: trees, and types of arrays."""

from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

# A tree of JAX's: params, a state, gradients, a prefix of one of them, or any nest of
# the containers that a user has registered.
PyTree: TypeAlias = Any

# Where a leaf is in a tree, as `jax.tree_util.keystr` takes it.
KeyPath: TypeAlias = tuple[Any, ...]

# The parameters of an equation: what each holds depends on its primitive.
EquationParams: TypeAlias = dict[str, Any]

Mesh: TypeAlias = jax.sharding.Mesh | jax.sharding.AbstractMesh
Shape: TypeAlias = tuple[int, ...]


class ArrayType(Protocol):
    """The type of an array, as `jax.typeof` gives it."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def ndim(self) -> int: ...
    @property
    def sharding(self) -> jax.sharding.NamedSharding: ...
    @property
    def vma(self) -> frozenset[str]: ...
    def update(self, **changed: object) -> "ArrayType": ...
