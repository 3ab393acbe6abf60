"""Every public optimizer with its variants. All contracts run over these rows."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optax

import monolith_optax
from monolith_optax import adamom, embedding, rmsprop, shampoo


@dataclass(frozen=True)
class Row:
    """An optimizer and what the contracts must know of it.

    Attributes:
      optimizer: the function.
      fractions: its hyperparameters in [0, 1].
      static: its hyperparameters that are Python numbers, not arrays or schedules.
      nonnegative: those that are at least 0.
      learning_rate: one with which it solves toy problems. None: it takes none.
      by_row: whether its rule looks at whole rows, not at each entry by itself.
      for_rows: whether it treats rows by themselves, as lazy_rows requires.
      others: fields of its state that are not like the parameters, besides the count.
      needs_params: whether `update` needs params, also without weight decay.
      descends: whether it minimises, and so stays where the gradient is 0.
      samples: the variants whose contracts run outside CI too.
      variants: options that change its program, by a name.
    """

    optimizer: Callable[..., optax.GradientTransformationExtraArgs]
    fractions: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    nonnegative: tuple[str, ...] = ()
    learning_rate: float | None = 1e-2
    by_row: bool = False
    for_rows: bool = True
    others: tuple[str, ...] = ()
    needs_params: bool = False
    descends: bool = True
    samples: tuple[str, ...] = ()
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})

    @property
    def is_dense(self) -> bool:
        """Whether it is for dense variables, and not for embedding tables."""
        return getattr(monolith_optax, self.optimizer.__name__, None) is self.optimizer


ROWS = {
    "adamom": Row(
        adamom,
        fractions=("ada_decay", "mom_decay"),
        nonnegative=("epsilon", "weight_decay"),
        samples=("",),
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
    "shampoo": Row(
        shampoo,
        fractions=("beta_1", "beta_2"),
        static=(
            "warmup",
            "tau_1",
            "tau_2",
            "eigen_head",
            "eigen_tail",
            "damping_epsilon",
        ),
        learning_rate=0.5,
        by_row=True,
        for_rows=False,
        others=("axes",),
        variants={"": {"warmup": 1, "tau_1": 2, "tau_2": 1}},
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
    "adadelta": Row(
        embedding.adadelta,
        fractions=("averaging_ratio",),
        nonnegative=("epsilon", "weight_decay_factor"),
        learning_rate=1e-3,
    ),
    "adam": Row(
        embedding.adam,
        fractions=("beta1", "beta2"),
        nonnegative=("epsilon", "weight_decay_factor"),
    ),
    "amsgrad": Row(
        embedding.amsgrad,
        fractions=("beta1", "beta2"),
        nonnegative=("epsilon", "weight_decay_factor"),
        variants={"": {"use_nesterov": True, "weight_decay_factor": 1e-4}},
    ),
    "batch_softmax": Row(
        embedding.batch_softmax,
        by_row=True,
        needs_params=True,
        descends=False,
    ),
    "ftrl": Row(
        embedding.ftrl,
        nonnegative=(
            "initial_accumulator_value",
            "beta",
            "l1_regularization",
            "l2_regularization",
        ),
        learning_rate=0.5,
        needs_params=True,
    ),
    "group_adagrad": Row(
        embedding.group_adagrad,
        nonnegative=(
            "initial_accumulator_value",
            "beta",
            "l2_regularization",
            "weight_decay_factor",
        ),
        learning_rate=0.5,
        by_row=True,
        needs_params=True,
    ),
    "group_ftrl": Row(
        embedding.group_ftrl,
        nonnegative=(
            "initial_accumulator_value",
            "beta",
            "l1_regularization",
            "l2_regularization",
        ),
        learning_rate=0.5,
        by_row=True,
        needs_params=True,
        variants={"": {"l1_regularization": 1e-4}},
    ),
    "momentum": Row(
        embedding.momentum,
        fractions=("momentum",),
        nonnegative=("weight_decay_factor",),
        learning_rate=1e-4,
        variants={"": {"use_nesterov": True, "weight_decay_factor": 1e-4}},
    ),
    "moving_average": Row(
        embedding.moving_average,
        fractions=("momentum",),
        learning_rate=None,
        needs_params=True,
        descends=False,
    ),
    "rmsprop_tables": Row(
        embedding.rmsprop,
        fractions=("momentum",),
        nonnegative=("weight_decay_factor",),
    ),
    "rmspropv2": Row(
        embedding.rmspropv2,
        fractions=("momentum",),
        nonnegative=("weight_decay_factor",),
    ),
    "rowwise_adagrad": Row(
        embedding.rowwise_adagrad,
        nonnegative=("eps", "weight_decay"),
        learning_rate=0.5,
        by_row=True,
        samples=("",),
        variants={"": {}, "decay": {"weight_decay": 1e-4}},
    ),
    "sgd": Row(embedding.sgd, learning_rate=1e-3),
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

    @property
    def no_decay(self) -> dict[str, float]:
        """Options without weight decay."""
        return {self.decay: 0.0} if self.decay else {}

    def takes(self, name: str) -> bool:
        """Whether the optimizer has an argument of that name."""
        return name in inspect.signature(self.optimizer).parameters

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of its slots that are like the parameters."""
        fields = self.make().init({})._fields[1:]
        return tuple(name for name in fields if name not in self.row.others)

    def injected(
        self, **settings: Any
    ) -> Callable[..., optax.GradientTransformationExtraArgs]:
        """The function whose transformations have their numbers in the state."""
        make: Callable[..., optax.GradientTransformationExtraArgs]
        make = optax.inject_hyperparams(
            self.optimizer, static_args=self.row.static, **settings
        )
        return make

    def make(self, **options: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation."""
        takes_rate = self.row.learning_rate is not None
        rate = {"learning_rate": self.row.learning_rate} if takes_rate else {}
        return self.optimizer(**rate | self.options | options)


VARIANTS = {
    f"{name}_{variant}".strip("_"): Variant(row, options)
    for name, row in ROWS.items()
    for variant, options in row.variants.items()
}
