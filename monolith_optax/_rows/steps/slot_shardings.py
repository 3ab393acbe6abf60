"""slot_shardings: the slots of an optimizer are split as their parameters are."""

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr

from monolith_optax._rows.steps.named_rows import broadcast, is_none
from monolith_optax._rows.steps.state_leaves import UNTOLD, Owner, owners
from monolith_optax._rows.types import ArrayType, KeyPath, PyTree


def slot_shardings(
    tx: optax.GradientTransformation, params: PyTree, where: PyTree
) -> PyTree:
    """The shardings of an optimizer's state, from those of its parameters.

    A slot is split as its parameter is, one with a number for each row along the rows.
    What belongs to no parameter, such as a count of steps, is on every device. It does
    not matter how optimizers are wrapped: `optax.partition` and `optax.masked` leave
    nodes without leaves in the state of each, which stay as they are.

    Args:
      tx: the optimizer. Its `init` is traced, which computes nothing.
      params: the parameters, or the shapes that `jax.eval_shape` returns.
      where: a tree that is a prefix of params: the `jax.sharding.NamedSharding` of
        each.

    Returns:
      A tree like the state, of shardings, for `out_shardings` of the `jax.jit` that
      makes the state or steps on it.

    Raises:
      ValueError: where is not a prefix of params, or holds no shardings of one mesh, or
        it is not known which parameter a leaf of the state belongs to.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from monolith_optax import embedding, slot_shardings
      >>> mesh = jax.make_mesh((1,), ("x",))
      >>> rows = NamedSharding(mesh, PartitionSpec("x", None))
      >>> params = {"items": jnp.ones((8, 2))}
      >>> tx = embedding.rowwise_adagrad(0.1)
      >>> state_where = slot_shardings(tx, params, {"items": rows})
      >>> print(tuple(state_where.sum_square["items"].spec))
      ('x',)
    """
    state = jax.eval_shape(tx.init, params)
    found = owners(tx, params, state)
    return shardings_of(state, found, params, where)


def shardings_of(
    state: PyTree, owners: list[Owner], params: PyTree, where: PyTree
) -> PyTree:
    """The shardings of a state, given the owners of its leaves."""
    leaves = jax.tree.leaves(params)
    each = zip(
        jax.tree.leaves(params, is_leaf=is_none),
        broadcast("where", where, params),
        strict=True,
    )
    shardings = [sharding for leaf, sharding in each if leaf is not None]
    meshes: set[PyTree] = {getattr(sharding, "mesh", None) for sharding in shardings}
    if len(meshes) != 1 or None in meshes:
        raise ValueError(
            "where must hold a NamedSharding for each parameter, all of one mesh, but "
            f"the meshes are {meshes}."
        )
    [mesh] = meshes
    paths, structure = jax.tree.flatten_with_path(state)

    def sharding(path: KeyPath, slot: ArrayType, owner: Owner) -> PyTree:
        if owner is UNTOLD:
            raise ValueError(
                f"It is not known which parameter state{keystr(path)} of shape "
                f"{slot.shape} belongs to. Give its sharding by hand."
            )
        if not isinstance(owner, int):
            return NamedSharding(mesh, PartitionSpec())
        sizes = zip(slot.shape, np.shape(leaves[owner]), strict=False)
        spec = shardings[owner].spec
        split = [
            spec[axis] if size == of_param and axis < len(spec) else None
            for axis, (size, of_param) in enumerate(sizes)
        ]
        if slot.shape == np.shape(leaves[owner]):
            return shardings[owner]
        return NamedSharding(mesh, PartitionSpec(*split))

    return jax.tree.unflatten(
        structure,
        [
            sharding(path, slot, owner)
            for (path, slot), owner in zip(paths, owners, strict=True)
        ],
    )
