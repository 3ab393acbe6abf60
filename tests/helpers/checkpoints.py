"""The checkpoints that TensorFlow wrote from Monolith's optimizers, and their truth."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import monolith_optax

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints"
RATES = {"learning_rate": 0.05, "epsilon": 1e-6, "weight_decay": 0.01}
ADAMOM = RATES | {"ada_decay": 0.99, "mom_decay": 0.9}
RMSPROP = RATES | {"beta1": 0.9, "beta2": 0.99}
OPTIMIZERS = {
    "adamom": lambda **more: monolith_optax.adamom(**ADAMOM, **more),
    "rmsprop": lambda **more: monolith_optax.rmsprop(**RMSPROP, **more),
    "rmsprop_v2": lambda **more: monolith_optax.rmsprop(**RMSPROP, use_v2=True, **more),
}
VARIABLES = "mlp/dense/kernel", "mlp/dense/bias", "item_embedding"


def prefix(name):
    return FOLDER / name / "model.ckpt-6"


def truth(name, step):
    """Every TensorFlow variable, slots among them, after a step."""
    with np.load(FOLDER / name / "truth.npz") as arrays:
        return {
            key.partition(":")[2].removesuffix(":0"): arrays[key]
            for key in arrays
            if key.startswith(f"at{step}:")
        }


def gradients(name, step):
    with np.load(FOLDER / name / "truth.npz") as arrays:
        return tree(lambda variable: jnp.asarray(arrays[f"grad{step}:{variable}"]))


def tree(leaf):
    """A tree of parameters from their names."""
    kernel, bias, table = map(leaf, VARIABLES)
    return {"mlp": {"dense": {"kernel": kernel, "bias": bias}}, "item_embedding": table}


def zeros():
    shapes = dict(zip(VARIABLES, [(4, 3), (3,), (10, 2)], strict=True))
    return tree(lambda variable: jnp.zeros(shapes[variable]))


def assert_same(actual, expected):
    """Names, dtypes and every bit."""
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
