"""Writes docs/verdicts.md: `python docs/verdicts.py`.

Every public optimizer and transformation of the installed optax steps once, in the
abstract, on a table of which it gets a few rows.
"""

import functools
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from monolith_optax import RowSlices, lazy_rows

TABLE = jnp.ones((200, 16))
GRADIENT = RowSlices(jnp.array([3, 5]), jnp.ones((2, 16)))
# Arguments that have no defaults, by name.
ARGUMENTS: dict[str, Any] = {
    "adv_optimizer": optax.sgd(0.1),
    "base_optimizer": optax.adam(0.1),
    "clipping": 0.1,
    "decay": 0.9,
    "eta": 0.1,
    "fast_optimizer": optax.sgd(0.1),
    "freeze_mask": False,
    "gamma": 0.5,
    "inner": optax.adam(0.1),
    "l2_norm_clip": 1.0,
    "learning_rate": 0.1,
    "mask": True,
    "max_backtracking_steps": 5,
    "max_consecutive_errors": 3,
    "max_delta": 0.1,
    "max_linesearch_steps": 5,
    "max_norm": 1.0,
    "measure": jnp.mean,
    "measure_name": "mean",
    "noise_multiplier": 0.1,
    "optimizer": optax.adam(0.1),
    "param_labels": "all",
    "seed": 0,
    "should_transform_fn": lambda step: step % 2 == 0,
    "slow_step_size": 0.5,
    "step_size": 0.1,
    "step_size_fn": optax.constant_schedule(0.1),
    "sync_period": 2,
    "threshold": 0.1,
    "transforms": {"all": optax.adam(0.1)},
    "tx": optax.adam(0.1),
    "weight_decay": 0.1,
}
# Others that an argument's name does not tell, or whose defaults leave tables out.
CALLS = {
    "adafactor": {"min_dim_size_to_factor": 2},
    "add_noise": {"seed": 0},
    "differentially_private_aggregate": {"seed": 0},
    "scale_by_factored_rms": {"min_dim_size_to_factor": 2},
}


def loss(table: jax.Array) -> jax.Array:
    """A loss that looks at all of the table."""
    return jnp.sum(table**2)


# What update functions may want besides gradients, state and parameters.
EXTRA_ARGS: list[dict[str, Any]] = [
    {},
    {"value": jnp.ones(())},
    {"obj_fn": loss},
    {"value": jnp.ones(()), "grad": GRADIENT, "value_fn": loss},
]


def transformations() -> Iterator[tuple[str, optax.GradientTransformation]]:
    """Whatever of optax makes a transformation, made."""
    for module in optax, optax.contrib:
        for name in sorted(set(dir(module)) - {"GradientTransformation"}):
            function = getattr(module, name)
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            required = [
                parameter.name
                for parameter in inspect.signature(function).parameters.values()
                if parameter.default is parameter.empty
                and parameter.kind is not parameter.VAR_POSITIONAL
                and parameter.kind is not parameter.VAR_KEYWORD
            ]
            if not ARGUMENTS.keys() >= set(required):
                continue
            arguments = {key: ARGUMENTS[key] for key in required} | CALLS.get(name, {})
            try:
                tx = function(**arguments)
            except (TypeError, ValueError, AttributeError):
                continue  # it takes other things by these names, and makes other things
            if isinstance(tx, optax.GradientTransformation):
                yield f"{module.__name__}.{name}", tx


def verdict(inner: optax.GradientTransformation) -> str:
    """Why `lazy_rows` refuses an optimizer; empty if it does not."""
    tx = lazy_rows(inner)
    for extra_args in EXTRA_ARGS:
        update = functools.partial(tx.update, **extra_args)
        try:
            state = tx.init(TABLE)
            jax.eval_shape(lambda s, update=update: update(GRADIENT, s, TABLE), state)
        except ValueError as error:
            _, ours, why = str(error).partition("but in this one ")
            if ours:
                return why.partition(". Step on it")[0].replace("params", "the table")
            failure: Exception = error
        except (TypeError, AttributeError) as error:
            failure = error
        else:
            return ""
    line, *_ = str(failure).splitlines()
    return f"does not step on a single table: {line}"


def page() -> str:
    """The page, in Markdown."""
    verdicts = {name: verdict(tx) for name, tx in transformations()}
    accepted = [f"`{name}`" for name, why in verdicts.items() if not why]
    refused = [f"| `{name}` | {why} |" for name, why in verdicts.items() if why]
    return "\n".join(
        [
            "# Which optimizers lazy_rows takes",
            "",
            "Every optimizer of optax, and whether `lazy_rows` accepts it.",
            f"With optax {optax.__version__}; `python docs/verdicts.py` asks yours.",
            "",
            "## Accepted",
            "",
            ", ".join(accepted) + ".",
            "",
            "What holds another optimizer is accepted with what that one is.",
            "",
            "## Refused",
            "",
            "| Optimizer | Why |",
            "|---|---|",
            *refused,
            "",
        ]
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    Path(__file__).with_suffix(".md").write_text(page())
