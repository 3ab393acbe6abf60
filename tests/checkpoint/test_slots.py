"""Slots of Monolith's checkpoints imported, continued and exported."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import OPTIMIZERS, assert_same, gradients, tree, truth, zeros
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from registry import VARIANTS

from monolith_optax import (
    AdamomState,
    IdMap,
    RowSlices,
    adamom,
    embedding,
    lazy_rows,
    rmsprop,
)
from monolith_optax.checkpoint import (
    export_hash_tables,
    export_slots,
    import_hash_tables,
    import_slots,
)

LABELS = {"mlp": "dense", "item_embedding": "table"}
WRAPPERS = {
    "plain": lambda make: make(),
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(1e9), make()),
    "named_chain": lambda make: optax.named_chain(("ours", make())),
    "partition": lambda make: optax.partition(
        {"dense": make(), "table": make()}, LABELS
    ),
    "masked": lambda make: optax.chain(
        optax.masked(make(), {"mlp": True, "item_embedding": False}),
        optax.masked(make(), {"mlp": False, "item_embedding": True}),
    ),
    "inject": lambda make: optax.inject_hyperparams(
        lambda scale: optax.chain(make(), optax.scale(scale))
    )(scale=1.0),
    "lazy_rows": lambda make: lazy_rows(make()),
}


def compact(make):
    """Every adamom with one scalar for c; rmsprop as it is."""
    return lambda: make(compact_c=True) if make is OPTIMIZERS["adamom"] else make()


def proceed(tx, params, state, name):
    step = jax.jit(tx.update)
    for number in range(6, 12):
        updates, state = step(gradients(name, number), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# Their dense gradients are those of whole tables.
@pytest.mark.filterwarnings("ignore:All gradients given to lazy_rows are arrays")
@pytest.mark.parametrize("is_compact", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_on_where_monolith_stopped(name, wrapper, is_compact):
    """Prints the largest difference from Monolith, which `pytest -rP` shows.

    As in the golden data, it is relative to the largest value of each array: one unit
    in the last place of a slot v of 40 is 4e-6 already.
    """
    make = OPTIMIZERS[name]
    tx = WRAPPERS[wrapper](compact(make) if is_compact else make)
    at6, at12 = truth(name, 6), truth(name, 12)
    params, state = import_slots(at6, zeros(), tx.init(zeros()))
    assert_same(export_slots(params, state), at6)
    reached = export_slots(*proceed(tx, params, state, name))
    assert sorted(reached) == sorted(at12)
    worst = max(
        np.max(np.abs(reached[key] - value)) / np.max(np.abs(value))
        for key, value in at12.items()
    )
    print(f"{name}, {wrapper}{', compact_c' * is_compact}: {worst:.1e}")
    assert worst <= 2e-6
    assert optax.tree.get_all_with_path(state, "count")  # all of them are of steps
    for _, count in optax.tree.get_all_with_path(state, "count"):
        assert count == 6
        assert count.dtype == jnp.int32


def test_rows_go_on_as_the_dense_table():
    """A batch that has every row is the dense gradient."""
    make = OPTIMIZERS["adamom"]
    params, state = import_slots(truth("adamom", 6), zeros(), make().init(zeros()))
    dense = gradients("adamom", 6)
    slices = RowSlices(jnp.arange(10), dense["item_embedding"])
    rows = dense | {"item_embedding": slices}
    expected, _ = make().update(dense, state, params)
    actual, _ = lazy_rows(make()).update(rows, state, params)
    np.testing.assert_allclose(
        actual["item_embedding"].to_dense(10), expected["item_embedding"], rtol=1e-5
    )


def test_other_names():
    at6 = {
        f"model/{key.replace('Adamom', 'Trainer_1')}".replace("mlp/dense", "dnn"): value
        for key, value in truth("adamom", 6).items()
        if key != "global_step"
    } | {"global_step": np.int64(6)}
    state = adamom().init(zeros())

    def function(path):
        return "model/" + path.replace("mlp/dense", "dnn")

    mapping = {
        "mlp/dense/kernel": "model/dnn/kernel",
        "mlp/dense/bias": "model/dnn/bias",
        "item_embedding": "model/item_embedding",
    }
    for names in function, mapping:
        options = {"name": "Trainer_1", "variable_names": names}
        params, restored = import_slots(at6, zeros(), state, **options)
        np.testing.assert_array_equal(
            params["mlp"]["dense"]["bias"], at6["model/dnn/bias"]
        )
        assert_same(export_slots(params, restored, **options), at6)


def test_a_single_array():
    tensors = {
        "w": np.ones(2, np.float32),
        "w/Adamom/m": np.full(2, 2, np.float32),
        "w/Adamom/v": np.full(2, 3, np.float32),
        "w/Adamom/c": np.full(2, 4, np.float32),
        "global_step": np.int64(5),
    }
    for compact_c in (False, True):
        state = adamom(compact_c=compact_c).init(jnp.zeros(2))
        options = {"variable_names": {"": "w"}}
        params, state = import_slots(tensors, jnp.zeros(2), state, **options)
        assert_same(export_slots(params, state, **options), tensors)


def test_templates_take_no_memory_and_shardings_are_kept():
    mesh = jax.make_mesh((2,), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    shapes = tree(lambda _: None) | jax.eval_shape(zeros)
    table = jax.ShapeDtypeStruct((10, 2), jnp.float32, sharding=rows)
    params = shapes | {"item_embedding": table}
    state = jax.eval_shape(adamom().init, shapes)
    state = state._replace(m=state.m | {"item_embedding": table})
    params, state = import_slots(truth("adamom", 6), params, state)
    for array in params["item_embedding"], state.m["item_embedding"]:
        assert array.sharding.is_equivalent_to(rows, 2)
    assert_same(export_slots(params, state), truth("adamom", 6))


def test_nothing_is_shared_with_the_tensors():
    tensors = truth("adamom", 6)
    params, state = import_slots(tensors, zeros(), adamom().init(zeros()))
    for array in tensors.values():
        array[...] = 0
    assert params["item_embedding"].any()
    assert state.v["item_embedding"].all()


def test_all_mismatches_at_once():
    tensors = truth("adamom", 6)
    del tensors["mlp/dense/bias/Adamom/v"], tensors["global_step"]
    tensors["mlp/dense/kernel"] = np.zeros((3, 4), np.float32)
    tensors["item_embedding/Adamom/m"] = np.zeros((10, 2))
    tensors["beta1_power"] = np.float32(0.9)
    state = adamom().init(zeros())
    with pytest.raises(ValueError, match="nothing was imported") as info:
        import_slots(tensors, zeros(), state)
    lines = [line.strip() for line in str(info.value).splitlines()[1:]]
    expected = "expected an array of dtype float32 and shape"
    assert sorted(lines) == [
        "beta1_power is left over.",
        "global_step is missing.",
        (
            f"item_embedding/Adamom/m: {expected} (10, 2), "
            "got an array of dtype float64 and shape (10, 2)."
        ),
        "mlp/dense/bias/Adamom/v is missing.",
        (
            f"mlp/dense/kernel: {expected} (4, 3), "
            "got an array of dtype float32 and shape (3, 4)."
        ),
    ]


def test_extra_variables():
    tensors = truth("adamom", 6) | {"beta1_power": np.float32(0.9)}
    state = adamom().init(zeros())
    with pytest.raises(ValueError, match=r"beta1_power is left over"):
        import_slots(tensors, zeros(), state)
    params, _ = import_slots(tensors, zeros(), state, strict=False)
    np.testing.assert_array_equal(params["item_embedding"], tensors["item_embedding"])


@pytest.mark.parametrize("step", [-1, 2**31, 1.5, [6]])
def test_a_global_step_that_is_no_count(step):
    tensors = truth("rmsprop", 6) | {"global_step": np.asarray(step)}
    with pytest.raises(ValueError, match="global_step must be one integer"):
        import_slots(tensors, zeros(), rmsprop().init(zeros()))


def test_compact_c_refuses_what_is_not_uniform():
    tensors = truth("adamom", 6)
    state = adamom(compact_c=True).init(zeros())
    tensors["mlp/dense/bias/Adamom/c"][1] += 1
    with pytest.raises(ValueError, match="mlp/dense/bias/Adamom/c is not uniform"):
        import_slots(tensors, zeros(), state)
    tensors["mlp/dense/bias/Adamom/c"][:] = 1
    with pytest.raises(ValueError, match=r"one number for all .*bias/Adamom/c is 1"):
        import_slots(tensors, zeros(), state)
    tensors["mlp/dense/bias/Adamom/c"][:] = np.nan
    with pytest.raises(ValueError, match="not uniform"):
        import_slots(tensors, zeros(), state)


def test_states_that_cannot_be_imported():
    tensors = truth("adamom", 6)
    params = zeros()
    for tx, problem in {
        optax.adam(0.1): "must contain the state of an optimizer of monolith_optax",
        optax.flatten(adamom()): r"slots for \[''\].*optax.flatten",
        optax.chain(adamom(), adamom()): "same name.*item_embedding/Adamom/m",
    }.items():
        with pytest.raises(ValueError, match=problem):
            import_slots(tensors, params, tx.init(params))
    with pytest.raises(ValueError, match=r"variable_names has \['mlp/dense'\]"):
        import_slots(
            tensors, params, adamom().init(params), variable_names={"mlp/dense": "d"}
        )
    with pytest.raises(ValueError, match=r"same name.*'one'"):
        export_slots(params, adamom().init(params), variable_names=lambda _: "one")


def test_counts_that_differ_have_no_global_step():
    a, b = (adamom().init({"w": jnp.zeros(1)}) for _ in range(2))
    b = AdamomState(b.count + 1, {}, {}, {})
    with pytest.raises(ValueError, match="different step counts, 0 and 1"):
        export_slots({"w": jnp.zeros(1)}, (a, b))


def test_what_is_not_monoliths_stays_as_it_is():
    make = OPTIMIZERS["adamom"]
    others = optax.chain(
        optax.inject_hyperparams(optax.scale_by_learning_rate)(
            optax.linear_schedule(0.1, 0.0, 100)
        ),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
        optax.contrib.reduce_on_plateau(accumulation_size=5),
    )
    tx = optax.chain(make(), optax.scale_by_adam(), others)
    before = tx.init(zeros())
    _, (ours, adam, (injected, scheduled, plateau)) = import_slots(
        truth("adamom", 6), zeros(), before
    )
    assert (ours.count, injected.count, scheduled.count) == (6, 6, 6)
    assert optax.tree.get(injected.hyperparams_states, "count") == 6
    assert (adam.count, plateau.count) == (0, 0)
    moved = before[0]._replace(count=ours.count), adam, (injected, scheduled, plateau)
    assert export_slots(zeros(), moved)["global_step"] == 6


def test_shapes_alone_do_not_stand_for_what_tensorflow_does_not_have():
    tx = optax.inject_hyperparams(adamom)(learning_rate=0.1)
    shapes = jax.eval_shape(tx.init, zeros())
    with pytest.raises(ValueError, match=r"learning_rate.*is only a shape"):
        import_slots(truth("adamom", 6), zeros(), shapes)


def test_states_of_an_ensemble_are_refused():
    ensemble = jax.tree.map(lambda x: jnp.stack([x, x]), zeros())
    state = jax.vmap(adamom().init)(ensemble)
    with pytest.raises(ValueError, match=r"count has the shape \(2,\)"):
        import_slots(truth("adamom", 6), ensemble, state)
    with pytest.raises(ValueError, match=r"count has the shape \(2,\)"):
        export_slots(ensemble, state)


def test_a_parameter_that_is_called_as_the_global_step():
    params = {"global_step": jnp.zeros(())}
    with pytest.raises(ValueError, match=r"same name: \['global_step'\]"):
        export_slots(params, adamom().init(params))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_optimizer_goes_out_and_in(name):
    variant = VARIANTS[name]
    params = tree(lambda name: jnp.asarray(truth("adamom", 6)[name]))
    tx = variant.make()
    state = tx.init(params)
    for _ in range(3):  # some slots are 0 after the first, or the second
        _, state = tx.update(params, state, params)
    tensors = export_slots(params, state)
    name = type(state).__name__.removesuffix("State")
    for slot in variant.slots:
        assert tensors[f"item_embedding/{name}/{slot}"].any()
    restored = import_slots(tensors, zeros(), tx.init(zeros()))
    chex.assert_trees_all_equal(restored, (params, state))


def test_nothing_is_shared_with_what_is_exported():
    params = {"w": np.ones(3, np.float32)}
    tensors = export_slots(params, adamom().init(params))
    params["w"][:] = 5
    np.testing.assert_array_equal(tensors["w"], np.ones(3))


def test_paths_that_are_the_same_text():
    """No `variable_names` tells such parameters apart."""
    params = {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}
    state = adamom().init(params)
    for names in None, {"a/b": "c"}:
        with pytest.raises(ValueError, match=r"rename a key") as info:
            export_slots(params, state, variable_names=names)
        assert "params['a']['b'] and params['a/b'] have" in str(info.value)
        assert "Give variable_names" not in str(info.value)
    table = {"a/b": jnp.zeros((4, 2)), "a": {"b": jnp.zeros((4, 2))}}
    state = embedding.adagrad(0.1).init(table)
    ids, leaves = {"t": IdMap(4)}, {"t": {"a/b": "adagrad"}}
    with pytest.raises(ValueError, match=r"rename a key"):
        export_hash_tables(table, state, ids, leaves=leaves)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.eval_shape])
def test_parameters_that_jax_traces(transform):
    params = {"w": jnp.zeros((2, 2))}
    state = adamom().init(params)
    tensors = export_slots(params, state)

    def run(function):
        if transform is jax.eval_shape:
            jax.eval_shape(function, params)
        else:
            transform(function)(params)

    table = embedding.adagrad(0.1).init(params)
    for call, leaf in {
        (lambda p: import_slots(tensors, p, state)): r"params\['w'\]",
        (
            lambda p: import_slots(tensors, params, state._replace(m=p))
        ): r"state\.m\['w'\]",
        (lambda p: export_slots(p, state)): r"params\['w'\]",
        (lambda p: import_hash_tables({}, p, table, leaves={})): r"params\['w'\]",
        (lambda p: export_hash_tables(p, table, {}, leaves={})): r"params\['w'\]",
    }.items():
        with pytest.raises(ValueError, match=rf"{leaf} is traced.* outside jax.jit"):
            run(call)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_templates_of_a_mesh_without_devices(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    rows = NamedSharding(mesh.abstract_mesh, PartitionSpec("x"))
    template = tree(lambda _: None) | jax.eval_shape(zeros)
    table = jax.ShapeDtypeStruct((10, 2), jnp.float32, sharding=rows)
    template |= {"item_embedding": table}
    with jax.set_mesh(mesh):
        state = jax.eval_shape(adamom().init, template)
        state = state._replace(m=state.m | {"item_embedding": table})
        params, restored = import_slots(truth("adamom", 6), template, state)
    for array in params["item_embedding"], restored.m["item_embedding"]:
        expected = NamedSharding(mesh, PartitionSpec("x"))
        assert array.sharding.is_equivalent_to(expected, 2)
    assert_same(export_slots(params, restored), truth("adamom", 6))
    with pytest.raises(ValueError, match=r"no devices.*with jax\.set_mesh"):
        import_slots(truth("adamom", 6), template, state)
    other = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    with jax.set_mesh(other), pytest.raises(ValueError, match="no devices"):
        import_slots(truth("adamom", 6), template, state)
