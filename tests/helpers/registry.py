"""Every public optimizer with its variants. All contracts run over these rows."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optax
import pytest

import monolith_optax
from monolith_optax import adamom, embedding, rmsprop


@dataclass(frozen=True)
class Row:
    """An optimizer and what the contracts must know of it.

    Attributes:
      optimizer: the function.
      fractions: its hyperparameters in [0, 1].
      nonnegative: those that are at least 0.
      learning_rate: one with which it solves toy problems.
      by_row: whether its rule looks at whole rows, not at each entry by itself.
      variants: options that change its program, by a name.
    """

    optimizer: Callable[..., optax.GradientTransformationExtraArgs]
    fractions: tuple[str, ...] = ()
    nonnegative: tuple[str, ...] = ()
    learning_rate: float = 1e-2
    by_row: bool = False
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})

    @property
    def is_dense(self) -> bool:
        """Whether it is for dense variables, and not for embedding tables."""
        return self.optimizer.__name__ in monolith_optax.__all__


ROWS = {
    "adamom": Row(
        adamom,
        fractions=("ada_decay", "mom_decay"),
        nonnegative=("epsilon", "weight_decay"),
        variants={
            "": {},
            "v2_decay": {"use_v2": True, "weight_decay": 1e-4},
            "compact_c": {"compact_c": True},
        },
    ),
    "rmsprop": Row(
        rmsprop,
        fractions=("beta1", "beta2"),
        nonnegative=("epsilon", "weight_decay"),
        variants={
            "": {"beta1": 0.9, "learning_rate": 1e-3},
            "v2_decay": {"use_v2": True, "beta1": 0.9, "weight_decay": 1e-4},
        },
    ),
    "adagrad": Row(
        embedding.adagrad,
        nonnegative=("initial_accumulator_value", "weight_decay_factor"),
        learning_rate=0.5,
        variants={
            "": {},
            "bugs": {"bug_compatible": True, "weight_decay_factor": 1e-4},
        },
    ),
    "rowwise_adagrad": Row(
        embedding.rowwise_adagrad,
        nonnegative=("eps", "weight_decay"),
        learning_rate=0.5,
        by_row=True,
        variants={"": {}, "decay": {"weight_decay": 1e-4}},
    ),
}


@dataclass(frozen=True)
class Variant:
    """A row with some options."""

    row: Row
    options: dict[str, Any]

    @property
    def optimizer(self) -> Callable[..., optax.GradientTransformationExtraArgs]:
        """The function, which takes further options."""
        return self.row.optimizer

    @property
    def decay(self) -> str:
        """The name of its weight decay; empty if it has none."""
        names = [x for x in self.row.nonnegative if x.startswith("weight_decay")]
        return names[0] if names else ""

    @property
    def decays(self) -> bool:
        """Whether these options have weight decay."""
        return bool(self.options.get(self.decay))

    def takes(self, name: str) -> bool:
        """Whether the optimizer has an argument of that name."""
        return name in inspect.signature(self.optimizer).parameters

    def make(self, **options: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation."""
        rate = {"learning_rate": self.row.learning_rate}
        return self.optimizer(**rate | self.options | options)


VARIANTS = {
    f"{name}_{variant}".strip("_"): Variant(row, options)
    for name, row in ROWS.items()
    for variant, options in row.variants.items()
}


def with_argument(name: str) -> pytest.MarkDecorator:
    """Runs a test only on the optimizers that have this argument."""
    chosen = [key for key, variant in VARIANTS.items() if variant.takes(name)]
    return pytest.mark.parametrize("variant", chosen, indirect=True)
