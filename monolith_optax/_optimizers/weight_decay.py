"""Coupled weight decay (L2): a fraction of the parameter is added to its gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike

from monolith_optax._leaves import concrete, is_leaf
from monolith_optax._optimizers import checks

Mask: TypeAlias = Any | Callable[[optax.Params], Any] | None


@dataclass(frozen=True)
class WeightDecay:
    """`g = rate * w + grad`, for all parameters or some of them.

    Attributes:
      rate: a number that is at least 0.
      mask: where there is decay: a tree of bools that is a prefix of the parameters,
        or a function from params to such a tree. None: everywhere.
      name: the rate's name in errors.
    """

    rate: ArrayLike = 0.0
    mask: Mask = None
    name: str = "weight_decay"

    def __post_init__(self) -> None:
        checks.check_hyperparameter(self.name, self.rate)
        if self.mask is not None and not callable(self.mask) and is_leaf(self.mask):
            raise ValueError(
                "weight_decay_mask must be a tree of bools, or a function from params "
                f"to such a tree, but it is {self.mask!r}. With "
                "optax.inject_hyperparams, name 'weight_decay_mask' in static_args; "
                "otherwise optax takes a function for a schedule."
            )

    def where(self, updates: optax.Updates, params: optax.Params | None) -> Any:
        """Which leaves decay."""
        # Without this, a rate of 0 that is an array would still be multiplied.
        if concrete(self.rate) == 0:
            return jax.tree.map(lambda _: False, updates)
        if params is None:
            raise ValueError(
                f"{self.name} needs the current parameters, but params is None: call "
                "update(gradients, state, params). Under optax.inject_hyperparams even "
                f"a rate of 0 is an array, unless static_args names {self.name!r}."
            )
        return _full_mask(self.mask, params)


def _full_mask(mask: Mask, params: optax.Params) -> Any:
    """The mask as a bool for each parameter."""
    if callable(mask) and is_leaf(mask):  # not a module that can be called
        mask = mask(params)
    try:
        full = jax.tree.broadcast(True if mask is None else mask, params)
    except ValueError as error:
        raise ValueError(
            "weight_decay_mask must be a prefix of the parameters' tree, which is "
            f"{jax.tree.structure(params)}, but it is {jax.tree.structure(mask)}."
        ) from error
    for path, use in jax.tree.leaves_with_path(full):
        if not isinstance(use, bool | np.bool_):
            raise ValueError(
                f"weight_decay_mask must hold bools, but {keystr(path)} is {use!r}."
            )
    return full
