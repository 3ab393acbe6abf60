"""The optimizers of embedding tables against numbers of Monolith's own kernels."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_optax import embedding

DATA = Path(__file__).parents[1] / "data"
CASES = {
    case["case"]: case
    for case in json.loads((DATA / "embedding_trajectories.json").read_text())
    if case["optimizer"] in embedding.__all__ and "rows_per_step" not in case
}
ARRAYS = np.load(DATA / "embedding_trajectories.npz")


def optimizer(case):
    """The optimizer of a case, with the bugs that its build has."""
    options = dict(case["hyperparameters"])
    if case["optimizer"] == "adagrad":
        options["bug_compatible"] = case.get("build") != "scalar"
    if case.get("schedule"):
        rates = jnp.asarray(ARRAYS[f"{case['case']}.learning_rates"])
        options["learning_rate"] = lambda count: rates[count]
    return getattr(embedding, case["optimizer"])(**options)


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_monoliths(name):
    """With `pytest -rP` it prints how near they are, relative to the largest value."""
    case = CASES[name]
    tx = optimizer(case)

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.asarray(ARRAYS[f"{name}.params"])
    state = tx.init(params)
    assert {*state._fields} == {"count", *case["slots"]}
    for slot, start in case["initial_slots"].items():
        np.testing.assert_array_equal(getattr(state, slot), np.float32(start))
    first = worst = 0.0
    largest = dict.fromkeys(["var", *case["slots"]], 1e-30)
    for number, grad in enumerate(ARRAYS[f"{name}.grads"], start=1):
        params, state = step(params, state, grad)
        if number not in case["recorded_steps"]:
            continue
        index = case["recorded_steps"].index(number)
        for slot, ours in {"var": params, **state._asdict()}.items():
            if slot == "count":
                continue
            theirs = np.float64(ARRAYS[f"{name}.{slot}"][index])
            largest[slot] = max(largest[slot], np.abs(theirs).max())
            relative = np.abs(ours - theirs).max() / largest[slot]
            assert relative <= (6e-7 if number == 1 else 6e-6), (slot, number)
            worst = max(worst, relative)
            first = worst if number == 1 else first
    assert number == case["recorded_steps"][-1]
    print(f"{name}: {first:.1e} after one step, {worst:.1e} at any recorded step")
