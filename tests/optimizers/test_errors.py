"""Bad input gets an error that names it, while tracing, and harms nothing."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import only, sampled, with_argument
from jax.experimental import sparse
from registry import ROWS

from monolith_optax import RowSlices, adamom

PARAMS = {"mlp": {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}}
W = PARAMS["mlp"]["w"]


def raises(*fragments):
    """A ValueError whose message has these fragments, in this order."""
    pattern = ".*".join(map(re.escape, fragments))
    return pytest.raises(ValueError, match=f"(?s){pattern}")


def assert_refused(tx, gradients, params, *fragments):
    """The update fails while tracing, and the state still takes a good gradient."""
    state = tx.init(PARAMS)
    update = jax.jit(tx.update, donate_argnums=1)
    with raises(*fragments):
        update(gradients, state, params)
    updates, _ = update(PARAMS, state, PARAMS)
    chex.assert_tree_all_finite(updates)


def grads(**mlp):
    return {"mlp": PARAMS["mlp"] | mlp}


BAD_GRADIENTS = {
    "broadcastable": (grads(w=jnp.ones((1, 2))), "['mlp']['w']", "(3, 2)", "(1, 2)"),
    "scalar": (grads(b=jnp.ones(())), "['mlp']['b']", "(2,)", "()"),
    "complex": (grads(b=jnp.ones(2, complex)), "['mlp']['b']", "complex64"),
    "integer": (grads(b=jnp.ones(2, int)), "['mlp']['b']", "int32"),
    "float0": (grads(b=np.zeros(2, jax.dtypes.float0)), "['mlp']['b']", "float0"),
    "None": (grads(b=None), "gradients['mlp']['b'] is missing"),
    "missing": ({"mlp": {"w": W}}, "gradients['mlp']['b'] is missing"),
    "left over": (grads(extra=W), "gradients['mlp']['extra'] is unexpected"),
    "renamed": (
        {"cnn": PARAMS["mlp"]},
        "['mlp']['w'] is missing",
        "['cnn']['b'] is unexpected",
    ),
    "another node": ({"mlp": list(PARAMS["mlp"].values())}, "['mlp']['b'] is missing"),
    "empty": ({}, "gradients['mlp']['b'] is missing"),
    "sparse": (
        grads(w=sparse.BCOO.fromdense(W)),
        "gradients['mlp']['w']: expected an array, got BCOO",
        "todense()",
    ),
    "slices": (
        grads(w=RowSlices(jnp.zeros(3, int), W)),
        "gradients['mlp']['w']: expected an array, got RowSlices",
        "lazy_rows",
    ),
}


@pytest.mark.parametrize("bad", sampled(BAD_GRADIENTS, "None", "scalar", "slices"))
def test_gradients_that_do_not_match(variant, bad):
    gradients, *fragments = BAD_GRADIENTS[bad]
    assert_refused(variant.make(), gradients, PARAMS, *fragments)


def test_all_mismatches_are_listed():
    gradients = grads(w=jnp.ones((1, 2)), b=jnp.ones(3))
    fragments = ["['mlp']['b']", "(2,)", "(3,)", "['mlp']['w']", "(3, 2)", "(1, 2)"]
    assert_refused(adamom(), gradients, PARAMS, *fragments)


@pytest.mark.parametrize(
    ("params", "fragments"),
    [
        (grads(w=jnp.ones((1, 2))), ["params['mlp']['w']", "(3, 2)", "(1, 2)"]),
        ({"mlp": {"w": W}}, ["params['mlp']['b'] is missing"]),
    ],
)
@only(lambda variant: variant.slots)
def test_params_that_do_not_match(variant, params, fragments):
    assert_refused(variant.make(), PARAMS, params, *fragments)


def test_trees_of_the_same_paths_and_another_type(variant):
    class Node(dict):
        pass

    jax.tree_util.register_pytree_with_keys(
        Node,
        lambda n: ([(jax.tree_util.DictKey(k), n[k]) for k in sorted(n)], None),
        lambda _, leaves: Node(zip(("b", "w"), leaves, strict=True)),
    )
    fragments = "gradients: expected the structure PyTree", "got PyTree", "Node"
    assert_refused(variant.make(), {"mlp": Node(PARAMS["mlp"])}, PARAMS, *fragments)


@only(lambda variant: variant.row.needs_params)
def test_missing_params(variant):
    assert_refused(
        variant.make(),
        PARAMS,
        None,
        "params is None",
        "update(gradients, state, params)",
    )


@only(lambda variant: variant.decay and not variant.row.needs_params)
def test_missing_params_matter_only_to_weight_decay(variant):
    tx = variant.make(**{variant.decay: 0.1})
    assert_refused(
        tx, PARAMS, None, "params is None", "update(gradients, state, params)"
    )
    for zero in (0, 0.0, np.float32(0), jnp.zeros(())):
        tx = variant.make(**{variant.decay: zero})
        jax.jit(tx.update)(PARAMS, tx.init(PARAMS))

    def traced(rate):
        tx = variant.make(**{variant.decay: rate})
        return tx.update(PARAMS, tx.init(PARAMS))

    with raises("params is None"):
        jax.jit(traced)(0.0)


@pytest.mark.parametrize(
    ("leaf", "fragments"),
    [
        (jnp.ones(2, int), ["int32", "optax.masked", "optax.partition"]),
        (jnp.ones(2, bool), ["bool", "optax.masked"]),
        (jnp.ones(2, complex), ["complex64", "split_real_and_imaginary"]),
        (jax.random.key(0), ["key<fry>", "optax.masked"]),
        (3, ["3", "optax.masked"]),
        (math.sin, ["sin", "optax.masked"]),
        ("text", ["'text'", "optax.masked"]),
    ],
    ids=["int", "bool", "complex", "key", "number", "function", "text"],
)
def test_parameters_that_cannot_be_trained(variant, leaf, fragments):
    with raises("['mlp']['b']", *fragments):
        variant.make().init(grads(b=leaf))


BAD_NUMBERS = [math.nan, np.float32(np.inf), jnp.ones(2), 1j, "0.1", None]
NEGATIVE = [-0.1, np.float64(-1e-9)]
CASES = [
    (name, hyperparameter, value)
    for name, row in ROWS.items()
    for values, hyperparameters in {
        (): ("learning_rate",) * (row.learning_rate is not None),
        (*NEGATIVE,): row.nonnegative,
        (*NEGATIVE, 1.1, np.float32(2)): row.fractions,
    }.items()
    for hyperparameter in hyperparameters
    for value in [*values, *BAD_NUMBERS]
]


@pytest.mark.parametrize(("optimizer", "name", "value"), CASES)
def test_hyperparameters_out_of_range(optimizer, name, value):
    with raises(name, "must be"):
        ROWS[optimizer].optimizer(**{name: value})


@with_argument("learning_rate")
@pytest.mark.parametrize("value", [None, 1j, jnp.ones(1), math.nan, "0.1"])
def test_schedules_that_give_no_rate(variant, value):
    tx = variant.make(learning_rate=lambda _: value)
    with raises("learning_rate must be"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@only(lambda variant: variant.slots)
def test_slots_that_do_not_match(variant):
    tx = variant.make()
    state = tx.init(PARAMS)
    slot = state._fields[1]
    shape = getattr(state, slot)["mlp"]["w"].shape
    wrong = state._replace(**{slot: grads(w=jnp.ones((1, *shape)))})
    with raises("Gradients, params and state do not match", str(shape)):
        tx.update(PARAMS, wrong, PARAMS)


@pytest.mark.parametrize("saved", [True, False])
def test_compact_c_differs_from_that_of_the_state(saved):
    state = adamom(compact_c=saved).init(PARAMS)
    with raises("state.c"):
        adamom(compact_c=not saved).update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("bound", [0, 1, 0.0, 1.0])
def test_bounds_are_allowed(name, bound):
    row = ROWS[name]
    row.optimizer(**dict.fromkeys(row.fractions, bound))
    row.optimizer(**dict.fromkeys(row.nonnegative, 0))


@with_argument("slot_dtype")
@pytest.mark.parametrize("slot_dtype", [int, "int8", complex, bool, "nonsense", 3])
def test_slot_dtype_that_is_no_float(variant, slot_dtype):
    with raises("slot_dtype", "floating-point"):
        variant.make(slot_dtype=slot_dtype)


@only(lambda variant: variant.row.fractions or variant.row.nonnegative)
def test_hyperparameters_in_too_coarse_a_dtype(variant):
    params = optax.tree.cast(PARAMS, jnp.bfloat16)
    with raises("bfloat16", "hyperparam_dtype=jnp.float32"):
        variant.injected()(**variant.options).init(params)
    variant.injected(hyperparam_dtype=jnp.float32)(**variant.options).init(params)


@with_argument("weight_decay_mask")
def test_inject_hyperparams_takes_callables_for_schedules(variant):
    def no_biases(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    options = variant.options | {"weight_decay": 0.1}
    for static in ("slot_dtype", "weight_decay_mask"):
        value = {"slot_dtype": jnp.float32, "weight_decay_mask": no_biases}[static]
        wrong = optax.inject_hyperparams(variant.optimizer)
        with raises(static, "static_args"):
            tx = wrong(**options, **{static: value})
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        right = optax.inject_hyperparams(variant.optimizer, static_args=static)
        tx = right(**options, **{static: value})
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_compact_c_of_slots_of_several_dtypes():
    with jax.enable_x64(True):
        params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
        with raises("one scalar", "float32", "float64", "slot_dtype"):
            adamom(compact_c=True).init(params)
        adamom(compact_c=True, slot_dtype=jnp.float32).init(params)


@with_argument("weight_decay_mask")
@pytest.mark.parametrize("mask", [True, 1, lambda _: 1, {"mlp": 1.0}, grads(b="no")])
def test_weight_decay_mask_that_holds_no_bools(variant, mask):
    with raises("weight_decay_mask must", "bools"):
        tx = variant.make(weight_decay=0.1, weight_decay_mask=mask)
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@with_argument("weight_decay_mask")
@pytest.mark.parametrize("mask", [{"mlp": {"w": True}}, {"cnn": True}, [True]])
def test_weight_decay_mask_of_another_tree(variant, mask):
    tx = variant.make(weight_decay=0.1, weight_decay_mask=mask)
    with raises("weight_decay_mask"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
