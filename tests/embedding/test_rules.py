"""The rules of embedding tables against float64 transcriptions, and at their edges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table_oracle
from choosing import sampled
from registry import ROWS

from monolith_optax import embedding

GRADS = np.random.default_rng(0).normal(size=(5, 6, 11))
TABLE = np.random.default_rng(1).normal(size=(6, 11))

DECAY = {"weight_decay_factor": 0.1}
ADAM = {"learning_rate": 0.1, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3}
FTRL = {"learning_rate": 0.1, "initial_accumulator_value": 0.5, "beta": 0.3}
SHRUNK = {"l1_regularization": 0.7, "l2_regularization": 0.2}
GROUP = {"learning_rate": 0.3, "initial_accumulator_value": 0.5, "beta": 0.2}
PROBLEMS = [
    ("sgd", {"learning_rate": 0.1}),
    ("adagrad", {"learning_rate": 0.1, "initial_accumulator_value": 0.5} | DECAY),
    (
        "adagrad",
        {"learning_rate": 0.1, "initial_accumulator_value": 0.5, "bug_compatible": True}
        | DECAY,
    ),
    ("rowwise_adagrad", {"learning_rate": 0.1, "eps": 1e-3, "weight_decay": 0.1}),
    (
        "adadelta",
        {"learning_rate": 0.5, "averaging_ratio": 0.8, "epsilon": 1e-3} | DECAY,
    ),
    *(
        (name, ADAM | DECAY | {"use_nesterov": nesterov})
        for name in ("adam", "amsgrad")
        for nesterov in (False, True)
    ),
    *(
        ("momentum", {"learning_rate": 0.1, "momentum": 0.8, "use_nesterov": x} | DECAY)
        for x in (False, True)
    ),
    ("moving_average", {"momentum": 0.8}),
    ("rmsprop", {"learning_rate": 0.1, "momentum": 0.8} | DECAY),
    ("rmspropv2", {"learning_rate": 0.1, "momentum": 0.8} | DECAY),
    ("group_adagrad", GROUP | DECAY | {"l2_regularization": 0.0}),
    ("group_adagrad", GROUP | DECAY | {"l2_regularization": 5.0}),
    *(
        (name, FTRL | SHRUNK | {"bug_compatible": bugs})
        for name in ("ftrl", "group_ftrl")
        for bugs in (False, True)
    ),
    *(
        (
            "group_ftrl",
            FTRL
            | {
                "l1_regularization": 15.0,
                "l2_regularization": 0.2,
                "bug_compatible": bugs,
            },
        )
        for bugs in (False, True)
    ),
    ("batch_softmax", {"learning_rate": 0.3}),
]


def run(tx, params=TABLE, grads=GRADS):
    @jax.jit
    def step(grad, state, params):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    with jax.enable_x64(True):
        params = jnp.asarray(params)
        state = tx.init(params)
        for grad in np.asarray(grads):
            params, state = step(grad, state, params)
    return params, state


@pytest.mark.parametrize(("name", "options"), PROBLEMS)
def test_rule_is_the_float64_transcription(name, options):
    params, state = run(getattr(embedding, name)(**options))
    expected = getattr(table_oracle, name)(GRADS, TABLE, **options)
    assert {*expected} == {"var", *state._fields[1:]}
    for slot, value in expected.items():
        ours = params if slot == "var" else getattr(state, slot)
        np.testing.assert_allclose(ours, value, rtol=1e-11, atol=1e-13)


def test_every_rule_is_transcribed():
    tables = {row.optimizer for row in ROWS.values() if not row.is_dense}
    assert {getattr(embedding, name) for name, _ in PROBLEMS} >= tables


def test_the_group_lasso_removes_some_rows_whole():
    """The transcriptions above have seen rows of both kinds."""
    for name, options in PROBLEMS:
        strength = options.get("l1_regularization", options.get("l2_regularization"))
        if name.startswith("group") and strength >= 5:
            params, _ = run(getattr(embedding, name)(**options))
            removed = np.asarray(params) == 0
            assert removed.all(axis=1).sum() == 4
            assert removed.any(axis=1).sum() == 4


@pytest.mark.parametrize("name", ["rowwise_adagrad", "group_adagrad"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (2, 3, 4)])
def test_a_row_is_an_index_of_the_leading_axis(shape, name):
    rng = np.random.default_rng(2)
    params, grad = rng.normal(size=(2, *shape))
    start = {} if name == "rowwise_adagrad" else {"initial_accumulator_value": 0.0}
    _, state = run(getattr(embedding, name)(1.0, **start), params, grad[None])
    reduce = np.mean if name == "rowwise_adagrad" else np.max
    expected = reduce(grad**2, axis=tuple(range(1, grad.ndim)))
    assert state[1].shape == shape[:1]
    np.testing.assert_allclose(state[1], expected, rtol=1e-12)


# Where Monolith has NaN, or a row that is gone: the optimizer, table and gradients.
ZEROS, ONES = np.zeros((2, 3)), np.ones((2, 3))
HALTED = [
    *(
        (embedding.ftrl(0.0, bug_compatible=bugs, **options), ONES, ONES)
        for bugs in (False, True)
        for options in ({}, {"l1_regularization": 0.1, "beta": 1.0})
    ),
    (embedding.ftrl(lambda _: 0.0), ONES, ONES),
    (embedding.group_ftrl(0.0), ONES, ONES),
    (embedding.group_ftrl(0.0, bug_compatible=True), ONES, ONES),
    (embedding.group_ftrl(0.1), ONES, ZEROS),
    (embedding.group_ftrl(0.1, bug_compatible=True), ONES, ZEROS),
    (embedding.group_ftrl(0.1, l1_regularization=0.1), ONES, ZEROS),
    (embedding.group_adagrad(0.0), ONES, ONES),
    (embedding.group_adagrad(lambda _: 0.0, l2_regularization=1.0), ONES, ONES),
    (embedding.group_adagrad(0.1), ZEROS, ZEROS),
    (embedding.group_adagrad(0.1, initial_accumulator_value=0.0), ONES, ZEROS),
    (embedding.adagrad(0.1, 0.0), ONES, ZEROS),
    (embedding.ftrl(0.1), ONES, ZEROS),
    (embedding.ftrl(0.1, 0.0, l1_regularization=0.1), ONES, ZEROS),
]


@pytest.mark.parametrize(("tx", "table", "grad"), HALTED)
def test_what_would_be_nan_or_gone_stays_as_it_is(tx, table, grad):
    table, grad = jnp.asarray(table, jnp.float32), jnp.asarray(grad, jnp.float32)
    before = tx.init(table)
    updates, after = jax.jit(tx.update)(grad, before, table)
    chex.assert_trees_all_equal(updates, jnp.zeros_like(table))
    chex.assert_trees_all_equal(after, before._replace(count=after.count))


def test_a_warm_up_that_begins_at_0_trains_from_its_second_step_on():
    schedule = optax.linear_schedule(0.0, 0.1, 4)
    for make in embedding.ftrl, embedding.group_ftrl, embedding.group_adagrad:
        warm, _ = run(make(schedule))
        late, _ = run(make(lambda count: schedule(count + 1)), grads=GRADS[1:])
        np.testing.assert_allclose(warm, late, rtol=1e-11)


def test_only_entries_without_any_gradient_are_kept_by_ftrl():
    tx = embedding.ftrl(0.1, l1_regularization=1.0)
    table = jnp.ones((1, 3))
    state = tx.init(table)
    for grad in ([0.0, 0.5, 2.0], [0.0, 0.0, 0.0]):
        updates, state = tx.update(jnp.array([grad]), state, table)
        table = optax.apply_updates(table, updates)
    assert table[0, 0] == 1.0
    assert table[0, 1] != 1.0
    bugs = embedding.ftrl(0.1, bug_compatible=True)
    updates, _ = bugs.update(jnp.zeros((1, 3)), bugs.init(table), table)
    np.testing.assert_array_equal(table + updates, 0)


def test_ftrls_sign_as_the_rules_have_it():
    """The figures of Monolith's own run: lr 0.1, norm 5 after the step, l1 1."""
    zero = jnp.array([2.0, -2.0])
    for bugs, expected in (False, [-0.0447, 0.0447]), (True, [-0.0894, 0.1342]):
        tx = embedding.ftrl(0.1, 5.0, l1_regularization=1.0, bug_compatible=bugs)
        state = tx.init(jnp.zeros(2))._replace(zero=zero)
        updates, _ = tx.update(jnp.zeros(2), state, jnp.zeros(2))
        np.testing.assert_allclose(updates, expected, atol=1e-4)


def test_rows_with_a_gradient_of_0_are_shortened_by_the_group_lasso():
    tx = embedding.group_adagrad(0.1, 0.0, 1.0, l2_regularization=2.0)
    table = jnp.array([[3.0, 4.0]])
    updates, _ = tx.update(jnp.zeros((1, 2)), tx.init(table), table)
    np.testing.assert_allclose(table + updates, table * (5 - 0.2) / 5, rtol=1e-6)


def test_batch_softmax_is_told_the_global_step_and_moves_one_column():
    tx = embedding.batch_softmax(0.5)
    table = jnp.ones((2, 3))
    updates, state = tx.update(table, tx.init(table), table, global_step=9)
    np.testing.assert_array_equal(table + updates, [[5, 1, 1], [5, 1, 1]])
    np.testing.assert_array_equal(state.global_step, [9, 9])
    assert state.global_step.dtype == jnp.int32
    for wrong in 9.0, jnp.arange(2), "9":
        with pytest.raises(ValueError, match="global_step must be one integer"):
            tx.update(table, tx.init(table), table, global_step=wrong)


def test_batch_softmax_counts_far_beyond_what_float32_can():
    tx = embedding.batch_softmax(1.0)
    state = tx.init(jnp.zeros((1, 1)))._replace(global_step=jnp.array([2**30]))
    updates, _ = tx.update(
        jnp.zeros((1, 1)), state, jnp.zeros((1, 1)), global_step=2**30 + 1
    )
    assert updates == 1.0


def test_adams_powers_of_ones_move_nothing():
    for make in embedding.adam, embedding.amsgrad:
        for betas in {"beta1": 1.0}, {"beta2": 1.0}:
            params, _ = run(make(0.1, **betas))
            np.testing.assert_array_equal(params, TABLE)


@pytest.mark.parametrize(
    "name",
    sampled(
        [name for name in ROWS if not ROWS[name].is_dense],
        *["adagrad", "adam", "group_adagrad"],
    ),
)
def test_a_step_with_a_zero_gradient_has_finite_derivatives(name):
    tx = ROWS[name].optimizer()
    params = jnp.ones((2, 3))

    def after(grad, params):
        return tx.update(grad, tx.init(params), params)[0].sum()

    slopes_at = jax.jit(jax.grad(after, argnums=(0, 1)))
    for values in params, jnp.zeros((2, 3)):
        slopes = slopes_at(jnp.zeros((2, 3)), values)
        chex.assert_tree_all_finite(slopes)


@pytest.mark.parametrize("lambda_", [0.0, 0.5])
def test_delay_compensation_corrects_the_gradient(lambda_):
    latest = TABLE[::-1].copy()
    corrected = GRADS[0] + lambda_ * GRADS[0] ** 2 * (TABLE - latest)
    inner = embedding.adam(0.1)
    expected, expected_state = run(inner, grads=corrected[None])
    with jax.enable_x64(True):
        tx = embedding.delay_compensation(inner, lambda_)
        params, grad, old = map(jnp.asarray, (TABLE, GRADS[0], latest))
        updates, state = jax.jit(tx.update)(grad, tx.init(params), params, latest=old)
        np.testing.assert_allclose(params + updates, expected, rtol=1e-12)
        chex.assert_trees_all_close(state, expected_state, rtol=1e-12)


def test_delay_compensation_says_what_it_misses():
    tx = embedding.delay_compensation(embedding.sgd())
    table = jnp.ones((2, 3))
    state = tx.init(table)
    with pytest.raises(ValueError, match="needs latest"):
        tx.update(table, state, table)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(table, state, latest=table)
    with pytest.raises(ValueError, match=r"latest.*\(2, 3\).*\(3,\)"):
        tx.update(table, state, table, latest=jnp.ones(3))
    with pytest.raises(ValueError, match="lambda_ must be at least 0"):
        embedding.delay_compensation(embedding.sgd(), -0.1)
