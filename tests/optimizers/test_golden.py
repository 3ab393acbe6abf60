"""The optimizers against numbers computed with Monolith's own kernels."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import monolith_optax

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "monolith_trajectories.json").read_text())
ARRAYS = np.load(DATA / "monolith_trajectories.npz")


def by_case(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["case"])


def trajectory(case, **options):
    """What the optimizer made of a case, at the recorded steps: (parameters, state)."""
    name = case["case"]
    make = getattr(monolith_optax, case["optimizer"])
    tx = make(**case["hyperparameters"], use_v2=case["use_v2"], **options)

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.asarray(ARRAYS[f"{name}.params"])
    state = tx.init(params)
    recorded = []
    for number, grad in enumerate(ARRAYS[f"{name}.grads"], start=1):
        params, state = step(params, state, grad)
        if number in case["recorded_steps"]:
            recorded.append((params, state))
    assert len(recorded) == len(case["recorded_steps"])
    return recorded


def slots_of(params, state):
    return {"var": params} | {k: v for k, v in state._asdict().items() if k != "count"}


@by_case(CASES)
def test_trajectory_is_monoliths(case):
    """With `pytest -rP` it prints how near they are."""
    decay = case["hyperparameters"]["weight_decay"]
    most_ulp = most_relative = 0.0
    for i, recorded in enumerate(trajectory(case)):
        for slot, ours in slots_of(*recorded).items():
            theirs = ARRAYS[f"{case['case']}.{slot}"][i]
            difference = np.abs(np.asarray(ours, np.float64) - theirs)
            ulp = (difference / np.spacing(np.abs(theirs))).max()
            relative = difference.max() / max(np.abs(theirs).max(), np.float32(1e-30))
            assert relative <= 2e-6, (slot, case["recorded_steps"][i])
            most_relative = max(most_relative, relative)
            if i == 0:
                assert relative <= 2.5e-7 if decay else ulp <= 1, slot
                most_ulp = max(most_ulp, ulp)
    print(
        f"{case['case']}: {most_ulp:.0f} ULP after one step, "
        f"{most_relative:.1e} of the largest value at any recorded step"
    )


@by_case([case for case in CASES if case["optimizer"] == "adamom"])
def test_compact_c_changes_only_rounding(case):
    full, compact = trajectory(case), trajectory(case, compact_c=True)
    for (params, state), (compact_params, compact_state) in zip(
        full, compact, strict=True
    ):
        chex.assert_shape(compact_state.c, ())
        for a, b in [
            (compact_params, params),
            (compact_state.m, state.m),
            (compact_state.v, state.v),
            (jnp.full_like(state.c, compact_state.c), state.c),
        ]:
            np.testing.assert_allclose(a, b, rtol=0, atol=5e-7 * jnp.abs(b).max())


SINGLE_STEPS = {
    "adamom": (
        monolith_optax.adamom(0.1, 0.99, 0.9, weight_decay=0.01),
        {"m": 0.0121, "c": 1.0, "v": 0.014641, "var": 0.090000336},
    ),
    "rmsprop": (
        monolith_optax.rmsprop(0.1, 0.9, 0.9, 0.1, 1.0),
        {"m": 0.06794526153774846, "v": 0.00484, "var": 0.03205473846225154},
    ),
    "rmsprop_v2": (
        monolith_optax.rmsprop(0.1, 0.9, 0.9, 0.1, 1.0, use_v2=True),
        {"m": 0.06875, "v": 0.0484, "var": 0.03125},
    ),
}


@pytest.mark.parametrize("name", SINGLE_STEPS)
def test_single_step_of_monoliths_own_tests(name):
    tx, expected = SINGLE_STEPS[name]
    params = jnp.array([0.1])
    updates, state = jax.jit(tx.update)(jnp.array([0.12]), tx.init(params), params)
    slots = slots_of(optax.apply_updates(params, updates), state)
    assert set(slots) == set(expected)
    for slot, value in slots.items():
        np.testing.assert_allclose(value, [expected[slot]], rtol=0, atol=1e-8)
