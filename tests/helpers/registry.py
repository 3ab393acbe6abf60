"""Every public optimizer with its variants; the contract suite runs over all rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optax

import monolith_optax


@dataclass(frozen=True)
class Variant:
    """An optimizer, the options that make it this variant, and a rate for toys."""

    optimizer: Callable[..., optax.GradientTransformationExtraArgs]
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-2

    def make(self, **hyperparameters: Any) -> optax.GradientTransformationExtraArgs:
        return self.optimizer(
            **{"learning_rate": self.learning_rate} | self.options | hyperparameters
        )


DECAY = {"weight_decay": 1e-4}
VARIANTS = {
    "adamom": Variant(monolith_optax.adamom),
    "adamom_v2_decay": Variant(monolith_optax.adamom, {"use_v2": True} | DECAY),
    "adamom_compact_c": Variant(monolith_optax.adamom, {"compact_c": True}),
    "rmsprop_decay": Variant(monolith_optax.rmsprop, {"beta1": 0.9} | DECAY, 1e-3),
    "rmsprop_v2": Variant(monolith_optax.rmsprop, {"use_v2": True, "beta1": 0.9}),
}
