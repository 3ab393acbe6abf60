"""Shampoo against Monolith's numbers and a float64 transcription, and inside optax."""

import itertools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax import RowSlices, embedding, lazy_rows, shampoo
from monolith_optax.checkpoint import export_slots, import_slots

DATA = Path(__file__).parents[1] / "data"
CASES = {
    case["case"]: case
    for case in json.loads((DATA / "embedding_trajectories.json").read_text())
    if case["optimizer"] == "shampoo"
}
ARRAYS = np.load(DATA / "embedding_trajectories.npz")
FAST = {"warmup": 3, "tau_1": 2, "tau_2": 2}


def preconditioner(slots, axis):
    """What the eigenvectors make, whose signs are free."""
    vectors = np.float64(slots[f"pvec{axis}"])
    made = vectors * np.float64(slots[f"pval{axis}"]) @ vectors.T
    return made + np.float64(slots[f"o{axis}"]) * np.eye(len(made))


@pytest.mark.parametrize(
    "name", sampled(CASES, "shampoo_defaults", "shampoo_vector", "shampoo_rank3")
)
def test_trajectory_is_monoliths(name):
    """With `pytest -rP` it prints how near they are, relative to the largest value."""
    case = CASES[name]
    tx = shampoo(**case["hyperparameters"])

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.asarray(ARRAYS[f"{name}.params"])
    state = tx.init(params)
    shapes = {slot: list(x.shape) for slot, x in slots_of(state).items()}
    assert shapes == case["slots"]
    first = worst = 0.0
    largest = {}
    for number, grad in enumerate(ARRAYS[f"{name}.grads"], start=1):
        params, state = step(params, state, grad)
        if number not in case["recorded_steps"]:
            continue
        index = case["recorded_steps"].index(number)
        ours = slots_of(state) | {"var": params}
        theirs = {slot: np.float64(ARRAYS[f"{name}.{slot}"][index]) for slot in ours}
        for axis in range(params.ndim):
            for slots in ours, theirs:
                slots[f"H{axis}"] = preconditioner(slots, axis)
                del slots[f"pvec{axis}"]
        for slot, expected in theirs.items():
            largest[slot] = max(largest.get(slot, 1e-30), np.abs(expected).max())
            relative = np.abs(np.float64(ours[slot]) - expected).max() / largest[slot]
            assert relative <= 2 * (6e-7 if number == 1 else 6e-6), (slot, number)
            worst = max(worst, relative)
            first = worst if number == 1 else first
    assert number == case["recorded_steps"][-1]
    print(f"{name}: {first:.1e} after one step, {worst:.1e} at any recorded step")


@pytest.mark.parametrize("in_a_tree", [True, False])
def test_continues_where_monolith_stopped(in_a_tree):
    name, case = next((k, c) for k, c in CASES.items() if len(c["recorded_steps"]) > 2)
    tx = shampoo(**case["hyperparameters"])
    index = len(case["recorded_steps"]) // 2
    stopped, last = case["recorded_steps"][index], case["recorded_steps"][-1]

    def checkpoint(index):
        slots = {slot: ARRAYS[f"{name}.{slot}"][index] for slot in case["slots"]}
        tensors = {f"w/Shampoo/{slot}": value for slot, value in slots.items()}
        return tensors | {"w": ARRAYS[f"{name}.var"][index]}

    def place(array):
        return {"w": array} if in_a_tree else array

    names = None if in_a_tree else {"": "w"}
    params = place(jnp.zeros(ARRAYS[f"{name}.params"].shape))
    tensors = checkpoint(index) | {"global_step": np.int64(stopped)}
    params, state = import_slots(tensors, params, tx.init(params), variable_names=names)
    exported = export_slots(params, state, variable_names=names)
    chex.assert_trees_all_equal(exported, tensors)
    step = jax.jit(tx.update)
    for grad in ARRAYS[f"{name}.grads"][stopped:last]:
        updates, state = step(place(grad), state, params)
        params = optax.apply_updates(params, updates)
    reached = export_slots(params, state, variable_names=names)
    expected = checkpoint(-1)
    assert reached.pop("global_step") == last
    assert reached.keys() == expected.keys()
    for tensor, value in expected.items():
        if "/pvec" not in tensor:
            atol = 12e-6 * np.abs(value).max()
            np.testing.assert_allclose(reached[tensor], value, rtol=0, atol=atol)


def slots_of(state):
    return state.axes | {"d": state.d, "m": state.m, "pm": state.pm}


def transcription(grads, w, *, warmup, tau_1, tau_2, head, tail, damping, beta_2):
    """Shampoo in NumPy float64, with full matrices instead of eigenvectors."""
    rank, rate, beta_1 = w.ndim, 0.1, 0.9
    s = [np.zeros((n, n)) for n in w.shape]
    g, inverse = list(s), list(s)
    d, m, pm = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for now, grad in enumerate(grads):
        p = grad
        for i, n in enumerate(w.shape):
            if now % tau_2 == 0:
                flat = np.moveaxis(grad, i, 0).reshape(n, -1)
                g[i] = flat @ flat.T
            s[i] = s[i] + g[i] if beta_2 == 1 else beta_2 * s[i] + (1 - beta_2) * g[i]
            if now > warmup and now % tau_1 == 0:
                values, vectors = np.linalg.eigh(s[i])
                roots = np.maximum(values, damping) ** (-1 / (2 * rank))
                offset, kept = 0.0, np.arange(n)
                if head + tail < n:
                    q = min(int(np.argmax(values > damping)), n - head - tail)
                    kept = np.r_[q : q + head, n - tail : n]
                    between = values[q + head : n - tail]
                    offset = between.mean() if between.size else 0.0
                some = vectors[:, kept]
                inverse[i] = some * (roots[kept] - offset) @ some.T
                inverse[i] = inverse[i] + offset * np.eye(n)
            p = np.moveaxis(np.tensordot(inverse[i], p, axes=(1, i)), 0, i)
        d = d + grad**2
        m = beta_1 * m + (1 - beta_1) * grad / np.sqrt(d + 1e-30)
        pm = beta_1 * pm + (1 - beta_1) * p
        r = min(max(now / warmup - 1, 0), 1)
        norms = np.linalg.norm(m) / (np.linalg.norm(pm) + 1e-10)
        w = w - rate * ((1 - r) * m + r * norms * pm)
    return w


SHAPES = {1: (7,), 2: (5, 4), 3: (3, 4, 2), 4: (2, 3, 2, 2)}


@pytest.mark.parametrize(
    ("head", "beta_2"),
    sampled([(1, 0.9), (1, 1.0), (9, 1.0), (9, 0.9)], (1, 0.9)),
)
@pytest.mark.parametrize("rank", sampled(SHAPES, 3))
def test_rule_is_the_float64_transcription(rank, head, beta_2):
    shape = SHAPES[rank]
    rng = np.random.default_rng(0)
    grads, w = rng.normal(size=(12, *shape)), rng.normal(size=shape)
    shared = FAST | {"beta_2": beta_2}
    with jax.enable_x64(True):
        tx = shampoo(0.1, eigen_head=head, eigen_tail=2, damping_epsilon=1e-2, **shared)

        def step(carry, grad):
            params, state = carry
            updates, state = tx.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.asarray(w)
        carry, _ = jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(grads))
    expected = transcription(grads, w, head=head, tail=2, damping=1e-2, **shared)
    np.testing.assert_allclose(carry[0], expected, rtol=1e-7)


PARAMS = {"mlp": [jnp.full((2, 3), 0.5), jnp.arange(3.0)], "scale": jnp.array(2.0)}


def run(tx, params=PARAMS, steps=6):
    update = jax.jit(tx.update)
    state = tx.init(params)
    for seed in range(steps):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(
            lambda p, rng=rng: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
        )
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_slots_by_their_names():
    _, state = run(optax.chain(optax.clip(1.0), shampoo(**FAST)))
    s0, s1 = optax.tree.get(state, "s0"), optax.tree.get(state, "s1")
    assert [s0["mlp"][0].shape, s0["mlp"][1].shape, s0["scale"]] == [
        (2, 2),
        (3, 3),
        None,
    ]
    assert [s1["mlp"][0].shape, s1["mlp"][1], s1["scale"]] == [(3, 3), None, None]
    assert optax.tree.get(state, "d")["scale"].shape == ()
    assert optax.tree.get(state, "count") == 6


def test_eigendecompositions_are_only_in_steps_that_need_them():
    tx = shampoo(**FAST)
    program = jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert "eigh" in str(program)
    outside = [str(e) for e in program.eqns if e.primitive.name != "cond"]
    assert "eigh" not in "".join(outside)
    # Between them the slots stay as they are: steps 4 and 6 of these are due.
    history = [run(tx, steps=steps)[1].axes["pvec0"]["mlp"][0] for steps in range(8)]
    changes = [not np.array_equal(a, b) for a, b in itertools.pairwise(history)]
    assert changes == [False, False, False, False, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("x", None), (None, "x"), ("x", "y")])
def test_eight_devices_are_as_one(axis_type, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    rng = np.random.default_rng(0)
    grads, w = rng.normal(size=(8, 16, 8)), rng.normal(size=(16, 8))
    tx = shampoo(0.1, **FAST, eigen_head=3, eigen_tail=3)

    def trained(place):
        params, *steps = (place(jnp.asarray(x, jnp.float32)) for x in (w, *grads))
        state = tx.init(params)
        for grad in steps:
            updates, state = jax.jit(tx.update)(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    expected, _ = trained(lambda x: x)
    with jax.set_mesh(mesh):
        params, state = trained(lambda x: jax.device_put(x, sharding))
    for leaf in params, state.d, state.m, state.pm:
        assert leaf.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(params, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_warm_up_of_0_steps_and_gradients_of_0():
    tx = shampoo(0.1, warmup=0, tau_1=1, tau_2=1)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(zeros, state, PARAMS)
        chex.assert_trees_all_equal(updates, zeros)
    chex.assert_tree_all_finite(run(tx))


def test_it_descends():
    target = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    curves = jnp.logspace(0, 2, 12).reshape(4, 3)

    def loss(w):
        return jnp.sum(curves * (w - target) ** 2)

    tx = shampoo(0.1, warmup=20, tau_1=5, tau_2=1)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), loss(w)

    w = jnp.zeros((4, 3))
    _, losses = jax.lax.scan(step, (w, tx.init(w)), length=500)
    assert losses[-1] < losses[0] / 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_1": 1.1}, r"beta_1 must be in \[0, 1\], but it is 1.1"),
        ({"beta_2": -0.1}, "beta_2 must be"),
        ({"learning_rate": None}, "learning_rate must be"),
        ({"tau_1": 0}, "tau_1 must be at least 1, but it is 0"),
        ({"tau_2": 2.0}, "tau_2 must be an integer, but it is 2.0"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"eigen_head": True}, "eigen_head must be an integer"),
        ({"damping_epsilon": 0.0}, "damping_epsilon must be more than 0"),
        ({"damping_epsilon": -1.0}, "damping_epsilon must be at least 0"),
    ],
)
def test_hyperparameters_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        shampoo(**options)


def test_gradients_that_do_not_match_and_row_slices():
    tx = shampoo()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"\['scale'\].*shape \(\).*shape \(2,\)"):
        tx.update(PARAMS | {"scale": jnp.ones(2)}, state, PARAMS)
    table = jnp.ones((5, 2))
    slices = RowSlices(jnp.array([1]), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="lazy_rows needs"):
        lazy_rows(tx).update(slices, tx.init(table), table)


@pytest.mark.slow
def test_beside_tables_inside_lazy_rows():
    parts = {"dense": shampoo(0.1, warmup=0, tau_1=1), "rows": embedding.adagrad(0.1)}
    tx = optax.partition(parts, {"mlp": "dense", "table": "rows"})
    params = {"mlp": PARAMS["mlp"], "table": jnp.ones((5, 2))}
    slices = RowSlices(jnp.array([1, 3]), jnp.ones((2, 2)))
    dense, lazy = tx.init(params), tx.init(params)
    for _ in range(2):
        grads = {"mlp": params["mlp"], "table": slices.to_dense(5)}
        expected, dense = jax.jit(tx.update)(grads, dense, params)
        grads["table"] = slices
        actual, lazy = jax.jit(lazy_rows(tx).update)(grads, lazy, params)
    actual["table"] = actual["table"].to_dense(5)
    chex.assert_trees_all_close((actual, lazy), (expected, dense), rtol=1e-5)
