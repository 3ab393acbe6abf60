"""The optimizers of embedding tables against numbers of Monolith's own kernels."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_optax import RowSlices, embedding, lazy_rows

DATA = Path(__file__).parents[1] / "data"
CASES = {
    case["case"]: case
    for case in json.loads((DATA / "embedding_trajectories.json").read_text())
    if case["optimizer"] not in ("shampoo", "dynamic_wd_adagrad_kernel")
}
ARRAYS = np.load(DATA / "embedding_trajectories.npz")
# Which of Monolith's bugs are in the build or kernel of a case.
BUGS = {
    "ftrl": lambda case: True,  # noqa: ARG005
    "adagrad": lambda case: case.get("build") != "scalar",
    "group_ftrl": lambda case: case["kernel"] == "avx",
}
# Beside what the others may have: they lose digits where Monolith divides by a rate.
TOLERANCE = {"group_adagrad": 4, "combined": 4}


def optimizer(case, part, rates):
    """The optimizer of a case or of one of its segments."""
    if part["optimizer"] == "dc":
        inner = optimizer(case, case["inner"], rates)
        return embedding.delay_compensation(inner, **part["hyperparameters"])
    name = part["optimizer"].removesuffix("_kernel")
    options = dict(part["hyperparameters"])
    if name in BUGS:
        options["bug_compatible"] = BUGS[name](case)
    if rates is not None and name != "rmsprop":  # of which Monolith ignores schedules
        rates = jnp.asarray(rates)
        options["learning_rate"] = lambda count: rates[count]
    tx = getattr(embedding, name)(**options)
    return lazy_rows(tx) if "rows_per_step" in case else tx


def segments(case):
    """Prefix of the slots, columns, hyperparameters and rates of each segment."""
    rates = ARRAYS[f"{case['case']}.learning_rates"] if case.get("schedule") else None
    if "segments" not in case:
        yield "", slice(None), case, rates
        return
    start = 0
    for index, part in enumerate(case["segments"]):
        columns = slice(start, start := start + part["dims"])
        yield f"{index}.", columns, part, rates[:, index]


def restored(state, part):
    """The state after Monolith's dump of adam, which mixes up the powers."""
    return state._replace(
        beta1_power=state.beta2_power,
        beta2_power=jnp.full_like(state.beta2_power, part["hyperparameters"]["beta2"]),
    )


def trained(case, tx, columns, part):
    """The number of each recorded step, and the weights and the state after it."""
    name = case["case"]

    @jax.jit
    def step(params, state, gradients, extra):
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = jnp.asarray(ARRAYS[f"{name}.params"][:, columns])
    state = tx.init(params)
    yield 0, params, state
    extras = {"latest": f"{name}.latest", "global_step": f"{name}.global_steps"}
    for index, gradients in enumerate(ARRAYS[f"{name}.grads"][..., columns]):
        if "rows_per_step" in case:
            gradients = RowSlices(jnp.asarray(ARRAYS[f"{name}.ids"][index]), gradients)
        extra = {k: ARRAYS[x][index] for k, x in extras.items() if x in ARRAYS}
        params, state = step(params, state, gradients, extra)
        if case.get("restored_after_step") == index + 1:
            state = restored(state, part)
        if index + 1 in case["recorded_steps"]:
            yield index + 1, params, state


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_monoliths(name):
    """With `pytest -rP` it prints how near they are, relative to the largest value."""
    case = CASES[name]
    allowed = TOLERANCE.get(case["optimizer"], 1)
    first = worst = 0.0
    slots = set()
    for prefix, columns, part, rates in segments(case):
        largest = {}
        for number, params, state in trained(
            case, optimizer(case, part, rates), columns, part
        ):
            ours = {prefix + slot: x for slot, x in state._asdict().items()}
            del ours[f"{prefix}count"]
            slots |= {*ours}
            if number == 0:
                for slot in {*ours} & {*case.get("initial_slots", {})}:
                    start = np.float32(case["initial_slots"][slot])
                    np.testing.assert_array_equal(ours[slot], start)
                continue
            index = case["recorded_steps"].index(number)
            for slot, value in {"var": params, **ours}.items():
                theirs = np.float64(ARRAYS[f"{name}.{slot}"][index])
                theirs = theirs[:, columns] if slot == "var" else theirs
                assert value.shape == theirs.shape
                largest[slot] = max(largest.get(slot, 1e-30), np.abs(theirs).max())
                relative = np.abs(np.float64(value) - theirs).max() / largest[slot]
                limit = allowed * (6e-7 if number == 1 else 6e-6)
                assert relative <= limit, (slot, number)
                worst = max(worst, relative)
                first = max(first, relative) if number == 1 else first
        assert number == case["recorded_steps"][-1]
    assert slots == {*case["slots"]}
    print(f"{name}: {first:.1e} after one step, {worst:.1e} at any recorded step")
