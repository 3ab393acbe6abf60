"""What a user of optax may expect of any optimizer, for every row of the registry."""

import inspect
import pickle
import pickletools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from choosing import only, sampled, with_argument
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from registry import ROWS, VARIANTS

import monolith_optax
from monolith_optax import embedding

FLOATS = ["float16", "bfloat16", "float32", "float64"]
OTHERS = ["float32", "float64", "float16", "bfloat16"]
MIXED = [*zip(FLOATS, OTHERS, strict=True)]


@pytest.fixture
def params():
    return {"mlp": [jnp.full((2, 3), 0.5), jnp.arange(3.0)], "scale": jnp.array(2.0)}


def gradients(params, seed=0):
    """Random gradients with the shapes and dtypes of params."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=jnp.shape(p)), jnp.result_type(p)), params
    )


def run(tx, params, steps=4):
    """The parameters and the state after a few steps on random gradients."""

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for seed in range(steps):
        params, state = step(gradients(params, seed), state, params)
    return params, state


def assert_close(actual, expected, rtol=1e-6):
    # The latter is rounding of numbers of about 1 that cancel out.
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=2e-7)


def test_registry_lists_every_public_optimizer():
    """A function of the package that wraps none and takes a learning rate, or none."""
    public = {name: getattr(monolith_optax, name) for name in monolith_optax.__all__}
    tables = {name: getattr(embedding, name) for name in embedding.__all__}
    arguments = {
        value: inspect.signature(value).parameters
        for value in [*public.values(), *tables.values()]
        if inspect.isfunction(value)
    }
    optimizers = {x for x in arguments if "learning_rate" in arguments[x]}
    optimizers |= {
        x for x in tables.values() if "inner" not in arguments.get(x, "inner")
    }
    assert {row.optimizer for row in ROWS.values()} == optimizers


class VariantsTest(chex.TestCase):
    """The same update jitted and not, from host and from device arrays."""

    @chex.variants(
        with_jit=True, without_jit=True, with_device=True, without_device=True
    )
    @parameterized.named_parameters(*((name, name) for name in VARIANTS))
    def test_update(self, name):
        tx = VARIANTS[name].make()
        params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}
        grads = gradients(params)
        expected = tx.update(grads, tx.init(params), params)
        state = self.variant(tx.init)(params)
        assert_close(self.variant(tx.update)(grads, state, params), expected)


def test_second_step_neither_retraces_nor_recompiles(variant, params):
    tx = variant.make()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(tx.update, n=1), donate_argnums=1)
    state = tx.init(params)
    for seed in range(3):
        _, state = step(gradients(params, seed), state, params)


def test_state_can_be_donated_from_the_first_step_on(variant, params):
    tx = variant.make()
    state = tx.init(params)
    donated = jax.tree.leaves(state)
    jax.jit(tx.update, donate_argnums=1)(gradients(params), state, params)
    assert all(leaf.is_deleted() for leaf in donated)


def test_extra_arguments_are_ignored(variant, params):
    tx = variant.make()
    state, grads = tx.init(params), gradients(params)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    chex.assert_trees_all_equal(
        tx.update(grads, state, params=params, value=1.0, loss_fn=None),
        tx.update(grads, state, params),
    )


def scalar_slots(state):
    """The slots that are one number for all parameters."""
    leaves = {name: jax.tree.leaves(slot) for name, slot in state._asdict().items()}
    return [name for name, slot in leaves.items() if len(slot) == 1 and name != "count"]


def test_map_params_visits_every_slot(variant, params):
    tx = variant.make()
    state = tx.init(params)
    mapped = optax.tree.map_params(
        tx, lambda _, p: p, state, params, transform_non_params=lambda _: None
    )
    for field, slot in state._asdict().items():
        is_slot = jax.tree.structure(slot) == jax.tree.structure(params)
        chex.assert_trees_all_equal(getattr(mapped, field), params if is_slot else None)
    shared = {field for field, slot in mapped._asdict().items() if slot is None}
    assert shared == {"count", *variant.row.others, *scalar_slots(state)}


@only(lambda variant: variant.slots)
def test_tree_get_finds_the_slots_inside_a_chain(variant, params):
    tx = optax.chain(optax.clip_by_global_norm(1.0), variant.make())
    _, state = run(tx, params, steps=3)
    assert optax.tree.get(state, "count") == 3
    slot = state[1]._fields[1]
    chex.assert_trees_all_equal(optax.tree.get(state, slot), state[1][1])
    replaced = optax.tree.set(state, **{slot: params})
    chex.assert_trees_all_equal(replaced[1][1], params)


@with_argument("learning_rate")
@pytest.mark.parametrize(
    "learning_rate",
    [0.01, optax.linear_schedule(0.1, 0.0, 8)],
    ids=["number", "schedule"],
)
def test_inject_hyperparams_equals_the_plain_optimizer(variant, params, learning_rate):
    injected = variant.injected()(**variant.options | {"learning_rate": learning_rate})
    plain, _ = run(variant.make(learning_rate=learning_rate), params)
    result, state = run(injected, params)
    assert_close(result, plain)
    assert {*numbers(variant)} <= {*state.hyperparams}


def numbers(variant):
    """The names of all hyperparameters that are numbers."""
    names = *variant.row.fractions, *variant.row.nonnegative, "learning_rate"
    return [name for name in names if variant.takes(name)]


def test_inject_hyperparams_takes_schedules_of_any_hyperparameter(variant, params):
    constant = dict.fromkeys(numbers(variant), 0.1)
    scheduled = {k: optax.constant_schedule(v) for k, v in constant.items()}
    injected = variant.injected()(**variant.options | scheduled)
    plain, _ = run(variant.make(**constant), params)
    assert_close(run(injected, params)[0], plain)


@with_argument("learning_rate")
def test_schedule_is_given_the_steps_taken_before(variant, params):
    rates = [0.1, 0.01, 0.5]
    scheduled = variant.make(learning_rate=lambda count: jnp.asarray(rates)[count])
    expected, actual = params, params
    expected_state = actual_state = scheduled.init(params)
    for seed, rate in enumerate(rates):
        grads = gradients(params, seed)
        tx = variant.make(learning_rate=rate)
        updates, expected_state = tx.update(grads, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
        updates, actual_state = scheduled.update(grads, actual_state, actual)
        actual = optax.apply_updates(actual, updates)
    assert_close(actual, expected)
    assert actual_state.count == 3


@with_argument("learning_rate")
def test_learning_rate_may_be_traced(variant, params):
    @jax.jit
    def updates(learning_rate):
        tx = variant.make(learning_rate=learning_rate)
        return tx.update(gradients(params), tx.init(params), params)

    tx = variant.make(learning_rate=0.1)
    assert_close(updates(0.1), tx.update(gradients(params), tx.init(params), params))


def test_hyperparameters_may_be_vmapped(variant, params):
    names = numbers(variant)

    @jax.jit
    def first_update(*values):
        tx = variant.make(**dict(zip(names, values, strict=True)))
        return tx.update(gradients(params), tx.init(params), params)[0]

    pairs = [jnp.array([0.1, 0.3])] * len(names)
    batched = jax.vmap(first_update)(*pairs)
    one_by_one = [first_update(*pair) for pair in zip(*pairs, strict=True)]
    assert_close(batched, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))


@pytest.mark.usefixtures("mixed_dtypes")
@with_argument("learning_rate")
def test_update_is_differentiable(variant, params):
    @jax.jit
    def loss_after_a_step(learning_rate):
        tx = variant.make(learning_rate=learning_rate)
        updates, _ = tx.update(gradients(params), tx.init(params), params)
        return optax.tree.norm(optax.apply_updates(params, updates), squared=True)

    slope = jax.jit(jax.grad(loss_after_a_step))(0.1)
    finite = (loss_after_a_step(0.11) - loss_after_a_step(0.09)) / 0.02
    np.testing.assert_allclose(slope, finite, rtol=1e-2)


@with_argument("weight_decay_mask")
@pytest.mark.parametrize(
    "mask",
    [
        {"mlp": [True, False], "scale": False},
        {"mlp": [True, False], "scale": np.False_},
        lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
    ],
    ids=["tree", "numpy", "function"],
)
def test_weight_decay_mask(variant, params, mask):
    masked, _ = run(variant.make(weight_decay=0.5, weight_decay_mask=mask), params)
    decayed, _ = run(variant.make(weight_decay=0.5), params)
    plain, _ = run(variant.make(weight_decay=0.0), params)
    assert_close(masked["mlp"][0], decayed["mlp"][0])
    assert_close(masked["mlp"][1], plain["mlp"][1])
    assert_close(masked["scale"], plain["scale"])


@with_argument("weight_decay_mask")
def test_weight_decay_mask_may_be_a_module_that_can_be_called(variant):
    @jax.tree_util.register_pytree_node_class
    class Model(dict):
        def __call__(self, _):
            raise AssertionError("a mask is no model to run")

        def tree_flatten(self):
            return tuple(self.values()), tuple(self)

        @classmethod
        def tree_unflatten(cls, names, values):
            return cls(zip(names, values, strict=True))

    params = Model(w=jnp.ones(3), b=jnp.ones(2))
    mask = Model(w=True, b=False)
    masked, _ = run(variant.make(weight_decay=0.5, weight_decay_mask=mask), params)
    decayed, _ = run(variant.make(weight_decay=0.5), params)
    plain, _ = run(variant.make(weight_decay=0.0), params)
    assert_close((masked["w"], masked["b"]), (decayed["w"], plain["b"]))


@with_argument("weight_decay_mask")
def test_weight_decay_mask_may_be_a_prefix_and_is_itself_masked(variant, params):
    mask = {"mlp": True, "scale": False}
    tx = variant.make(weight_decay=0.5, weight_decay_mask=mask)
    plain, _ = run(variant.make(weight_decay=0.0), params)
    decayed, _ = run(variant.make(weight_decay=0.5), params)
    result, _ = run(tx, params)
    assert_close(result, {"mlp": decayed["mlp"], "scale": plain["scale"]})
    labels = {"mlp": ["ours", "frozen"], "scale": "ours"}
    tx = optax.partition({"ours": tx, "frozen": optax.set_to_zero()}, labels)
    result, _ = run(tx, params)
    assert_close(result["mlp"][0], decayed["mlp"][0])
    chex.assert_trees_all_equal(result["mlp"][1], params["mlp"][1])


@pytest.mark.parametrize("chain", ["chain", "named_chain"])
def test_chains(variant, params, chain):
    parts = {"clip": optax.clip(0.1), "optimizer": variant.make()}
    args = parts.items() if chain == "named_chain" else parts.values()
    tx = getattr(optax, chain)(*args)
    grads = gradients(params)
    actual, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    clipped = jax.tree.map(lambda g: jnp.clip(g, -0.1, 0.1), grads)
    alone = variant.make()
    expected, _ = jax.jit(alone.update)(clipped, alone.init(params), params)
    assert_close(actual, expected)


def test_masked_leaves_pass_through(variant, params):
    mask = {"mlp": [True, False], "scale": True}
    tx = optax.masked(variant.make(), mask)
    grads = gradients(params)
    masked, state = jax.jit(tx.update)(grads, tx.init(params), params)
    alone = variant.make()
    plain, _ = jax.jit(alone.update)(grads, alone.init(params), params)
    chex.assert_trees_all_equal(masked["mlp"][1], grads["mlp"][1])
    assert_close([masked["mlp"][0], masked["scale"]], [plain["mlp"][0], plain["scale"]])
    chex.assert_trees_all_equal_structs(state, tx.init(params))


def test_partition(variant, params):
    labels = {"mlp": "ours", "scale": "frozen"}
    tx = optax.partition(
        {"ours": variant.make(), "frozen": optax.set_to_zero()}, labels
    )
    result, _ = run(tx, params)
    plain, _ = run(variant.make(), params)
    chex.assert_trees_all_equal(result["scale"], params["scale"])
    assert_close(result["mlp"], plain["mlp"])


@pytest.mark.usefixtures("mixed_dtypes")
def test_multi_steps_averages_gradients(variant, params):
    accumulating = optax.MultiSteps(variant.make(), every_k_schedule=2)
    result, _ = run(accumulating, params, steps=2)
    halves = [gradients(params, seed) for seed in (0, 1)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    tx = variant.make()
    updates, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    assert_close(result, optax.apply_updates(params, updates))


def test_apply_if_finite_keeps_state_through_a_bad_gradient(variant, params):
    tx = optax.apply_if_finite(variant.make(), max_consecutive_errors=5)
    update = jax.jit(tx.update)
    _, state = update(gradients(params), tx.init(params), params)
    bad = optax.tree.full_like(params, jnp.nan)
    updates, after = update(bad, state, params)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_scan_equals_a_loop(variant, params):
    tx = variant.make()
    grads = [gradients(params, seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (params, tx.init(params)), stacked)
    assert_close(carry, run(tx, params))


def test_cond_takes_either_state(variant, params):
    tx = variant.make()
    grads = gradients(params)

    @jax.jit
    def maybe_step(flag, state):
        def skip():
            return optax.tree.zeros_like(grads), state

        return jax.lax.cond(flag, lambda: tx.update(grads, state, params), skip)

    state = tx.init(params)
    chex.assert_trees_all_equal(maybe_step(False, state)[1], state)
    assert_close(maybe_step(True, state), tx.update(grads, state, params))


def test_a_step_is_exported_and_serialized(variant):
    tx = variant.make()
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}
    state = tx.init(params)
    exported = jax.export.export(jax.jit(tx.update))(params, state, params)
    loaded = jax.export.deserialize(exported.serialize())
    actual = loaded.call(params, state, params)
    expected = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    sampled([*MIXED, *zip(FLOATS, FLOATS, strict=True)], *MIXED),
)
def test_dtypes_are_stable(variant, params, dtype, grad_dtype):
    with jax.enable_x64("float64" in (dtype, grad_dtype)):
        params = optax.tree.cast(params, dtype)
        tx = variant.make()
        state = tx.init(params)
        grads = optax.tree.cast(gradients(params), grad_dtype)
        updates, after = jax.jit(tx.update)(grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        wide = "float64" if dtype == "float64" else "float32"
        slots = [x.dtype for x in jax.tree.leaves(state[1:])]
        assert {x.name for x in slots if jnp.issubdtype(x, jnp.floating)} <= {wide}
        params, grads = optax.tree.cast((params, grads), wide)
        tx = variant.make()
        expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        rtol = max(2 * float(jnp.finfo(dtype).eps), 1e-6)
        chex.assert_trees_all_close(optax.tree.cast(updates, wide), expected, rtol=rtol)


@only(lambda variant: not variant.row.needs_params)
def test_updates_have_the_gradients_dtype_without_params(variant, params):
    tx = variant.make(**variant.no_decay)
    state = tx.init(optax.tree.cast(params, "float32"))
    grads = optax.tree.cast(gradients(params), "bfloat16")
    updates, after = jax.jit(tx.update)(grads, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@with_argument("slot_dtype")
@pytest.mark.parametrize("slot_dtype", ["bfloat16", "float64"])
def test_slot_dtype_is_kept(variant, params, slot_dtype):
    with jax.enable_x64(slot_dtype == "float64"):
        tx = variant.make(slot_dtype=slot_dtype)
        result, state = run(tx, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
        assert {x.dtype.name for x in jax.tree.leaves(state[1:])} == {slot_dtype}
        chex.assert_trees_all_equal_shapes_and_dtypes(result, params)
        expected, _ = run(variant.make(), params)
        rtol = max(1e-5, 4 * float(jnp.finfo(slot_dtype).eps))
        chex.assert_trees_all_close(result, expected, rtol=rtol)


def test_none_leaves_pass_through(variant, params):
    tx = variant.make()
    with_none = params | {"frozen": None}
    result, state = run(tx, with_none)
    plain, _ = run(tx, params)
    assert result.pop("frozen") is None
    assert_close(result, plain)
    chex.assert_trees_all_equal_structs(state, tx.init(with_none))


@pytest.mark.parametrize(
    "params",
    [{}, (), jnp.zeros(()), jnp.zeros((0, 3)), 1.5, np.ones(2, np.float32)],
    ids=["dict", "tuple", "scalar", "empty", "float", "numpy"],
)
def test_unusual_trees(variant, params):
    tx = variant.make()
    grads = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        updates, jax.tree.map(jnp.asarray, params)
    )
    assert after.count == 1


def test_count_stops_at_its_largest_value(variant, params):
    tx = variant.make()
    largest = jnp.iinfo(jnp.int32).max
    state = tx.init(params)._replace(count=jnp.int32(largest))
    assert tx.update(gradients(params), state, params)[1].count == largest


def test_pickles_name_public_modules(variant, params):
    _, state = run(variant.make(), params, steps=1)
    pickled = pickle.dumps(state)
    modules = {x for _, x, _ in pickletools.genops(pickled) if "monolith" in str(x)}
    assert modules <= {"monolith_optax", "monolith_optax.embedding"}
    assert modules
    chex.assert_trees_all_equal(pickle.loads(pickled), state)


def test_state_may_come_back_as_numpy_arrays(variant, params):
    tx = variant.make()
    _, state = run(tx, params)
    grads = gradients(params)
    expected = tx.update(grads, state, params)
    actual = tx.update(grads, jax.device_get(state), params)
    chex.assert_trees_all_equal(actual, expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(actual))


def test_init_takes_shapes_alone(variant, params):
    tx = variant.make()
    shapes = jax.eval_shape(lambda: params)
    state = tx.init(params)
    chex.assert_trees_all_equal(tx.init(shapes), state)
    chex.assert_trees_all_equal(
        jax.eval_shape(tx.init, shapes), jax.eval_shape(lambda: state)
    )


@only(lambda variant: not variant.row.by_row)
def test_flatten(variant, params):
    plain, _ = run(variant.make(), params)
    assert_close(run(optax.flatten(variant.make()), params)[0], plain)


@pytest.mark.usefixtures("mixed_dtypes")
def test_complex_parameters_through_optax(variant):
    params = {"w": jnp.array([1 + 2j, 3 - 1j])}
    tx = optax.contrib.split_real_and_imaginary(variant.make())
    halves = {"re": params["w"].real, "im": params["w"].imag}
    grads = {"w": jnp.array([0.5 - 1j, 1 + 1j])}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    alone = variant.make()
    half_grads = {"re": grads["w"].real, "im": grads["w"].imag}
    expected, _ = alone.update(half_grads, alone.init(halves), halves)
    np.testing.assert_allclose(updates["w"].real, expected["re"], rtol=1e-6)
    np.testing.assert_allclose(updates["w"].imag, expected["im"], rtol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_state_and_updates_are_sharded_as_the_parameters(variant, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    tx = variant.make()
    with jax.set_mesh(mesh):
        host = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(16, 4)}
        params = jax.device_put(host, sharding)
        grads = jax.device_put(gradients(host), sharding)
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(grads, state, params)
        states = [state, after]
        if axis_type == AxisType.Explicit:
            traced = jax.eval_shape(tx.update, grads, state, params)[0]["w"]
            assert traced.sharding.spec == sharding.spec
            states.append(jax.jit(tx.init)(params))
    slots = [getattr(x, name) for x in states for name in variant.slots]
    for leaf in jax.tree.leaves((updates, slots)):
        if leaf.ndim:
            assert leaf.sharding.is_equivalent_to(rows, leaf.ndim)
    single = jax.tree.map(np.asarray, (host, gradients(host)))
    expected, _ = tx.update(single[1], tx.init(single[0]), single[0])
    assert_close(jax.device_get(updates), jax.device_get(expected))


TARGETS = {
    "parabola": (
        jnp.array([-1.0, 10.0, 1.0]),
        jnp.array([1.0, -1.0, 1.0]),
        lambda x: jnp.sum((x - jnp.array([1.0, -1.0, 1.0])) ** 2),
    ),
    "rosenbrock": (
        jnp.zeros(2),
        jnp.ones(2),
        lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
    ),
}


@only(lambda variant: variant.row.descends)
@pytest.mark.parametrize("target", TARGETS)
def test_convergence(variant, target):
    start, end, loss = TARGETS[target]
    tx = variant.make()

    @jax.jit
    def train(params):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 30_000, step, (params, tx.init(params)))[0]

    chex.assert_trees_all_close(train(start), end, rtol=3e-2, atol=3e-2)
