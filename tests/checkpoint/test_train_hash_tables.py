"""Hash tables into params and state, a step of training, and out again."""

import dataclasses

import hash_table_files as plain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_optax import IdMap, RowSlices, adamom, embedding, lazy_rows
from monolith_optax.checkpoint import (
    HashTable,
    Segment,
    export_hash_tables,
    import_hash_tables,
    read_hash_table,
    write_hash_table,
)

FREE = 3  # rows of each table that no entry has


def sample(job, name):
    folder = plain.DATA / job / "model.ckpt-1200.assets"
    return read_hash_table(folder, name, segments=plain.segments_of(job, name))


def leaves_of(table, name="t"):
    return {
        f"{name}/{k}": segment.optimizer for k, segment in enumerate(table.segments)
    }


def params_for(table, name="t"):
    rows = 1 + len(table.ids) + FREE
    start = [jnp.full((rows, segment.dim), 0.5) for segment in table.segments]
    return {name: start, "dense": jnp.ones(2)}


def optimizer(table, wrap=lambda tx: tx, name="t"):
    """Each segment's own optimizer, inside others."""
    labels = {name: [segment.optimizer for segment in table.segments], "dense": "dense"}
    each = {label: wrap(getattr(embedding, label)()) for label in set(labels[name])} | {
        "dense": adamom(0.1)
    }
    return optax.partition(each, labels)


def of_id(table, k):
    """What each id has: its weights in a segment and the slots, as bytes."""
    first = sum(segment.dim for segment in table.segments[:k])
    segment = table.segments[k]
    weights = table.weights[:, first : first + segment.dim]
    return {"weights": weights} | segment.slots


def stepped(tx, params, state, rows, name="t"):
    """A lazy step on some rows of each segment, and a dense one on the rest."""
    gradients = {
        name: [
            RowSlices(rows, jnp.full((len(rows), leaf.shape[1]), 0.25))
            for leaf in params[name]
        ],
        "dense": jnp.ones(2),
    }
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def assert_same_bits(ours, theirs):
    plain.assert_same_bits(ours, plain.as_truth(theirs))


def picked(table, which):
    """Some entries of a table."""
    segments = [
        Segment(s.optimizer, s.dim, {x: array[which] for x, array in s.slots.items()})
        for s in table.segments
    ]
    return HashTable(
        table.ids[which],
        table.weights[which],
        tuple(segments),
        table.last_update[which],
    )


@pytest.mark.parametrize(("job", "name"), plain.SPECS)
def test_imported_rows_are_the_entries(job, name):
    table = sample(job, name)
    params, tx = params_for(table), optimizer(table)
    first = tx.init(params)
    new, state, ids = import_hash_tables(
        {"t": table}, params, first, leaves={"t": leaves_of(table)}
    )
    rows = ids["t"].lookup(table.ids)
    assert np.array_equal(np.sort(rows), np.arange(1, len(table.ids) + 1))
    assert ids["t"].capacity == len(table.ids) + 1 + FREE
    seen = ids["t"].to_arrays()
    assert dict(zip(seen["ids"][1:], seen["last_seen"][1:], strict=True)) == dict(
        zip(table.ids, table.last_update, strict=True)
    )
    others = np.setdiff1d(np.arange(len(table.ids) + 1 + FREE), rows)
    for k, segment in enumerate(table.segments):
        inner = state.inner_states[segment.optimizer].inner_state
        before = first.inner_states[segment.optimizer].inner_state
        for slot, entries in of_id(table, k).items():
            where = (new, params) if slot == "weights" else None
            ours, old = where or (getattr(inner, slot), getattr(before, slot))
            ours, old = np.asarray(ours["t"][k]), np.asarray(old["t"][k])
            assert ours[rows].astype(entries.dtype).tobytes() == entries.tobytes()
            np.testing.assert_array_equal(ours[others], old[others])
    np.testing.assert_array_equal(new["dense"], params["dense"])


@pytest.mark.parametrize(("job", "name"), plain.SPECS)
def test_a_step_and_back_to_files(job, name, tmp_path):
    table = sample(job, name)
    tx = lazy_rows(optimizer(table))
    params = params_for(table)
    leaves = {"t": leaves_of(table)}
    params, state, ids = import_hash_tables(
        {"t": table}, params, tx.init(params), leaves=leaves
    )
    touched = np.isin(np.arange(len(table.ids)), [0, 5, 17])
    rows = jnp.asarray([*ids["t"].lookup(table.ids[touched]), -1, 0])
    params, state = stepped(tx, params, state, rows)
    exported = export_hash_tables(params, state, ids, leaves=leaves)["t"]
    write_hash_table(tmp_path, name, exported)
    again = read_hash_table(tmp_path, name, segments=plain.segments_of(job, name))
    assert_same_bits(again, exported)
    assert_same_bits(picked(again, ~touched), picked(table, ~touched))
    moved = (again.weights[touched] != table.weights[touched]).mean(axis=1)
    assert (moved > 0.5).all()  # FTRL and some of the mixed ones may stand still


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(9.0), tx),
    "lazy": lazy_rows,
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(rate=0.5),
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrapped(wrapping):
    table = sample("single", "user")
    tx = lazy_rows(optimizer(table, WRAPPED[wrapping]))
    params = params_for(table)
    leaves = {"t": leaves_of(table)}
    params, state, ids = import_hash_tables(
        {"t": table}, params, tx.init(params), leaves=leaves
    )
    back = export_hash_tables(params, state, ids, leaves=leaves)["t"]
    assert_same_bits(back, table)
    params, state = stepped(tx, params, state, jnp.array([1, 2]))
    back = export_hash_tables(params, state, ids, leaves=leaves)["t"]
    assert_same_bits(picked(back, np.s_[2:]), picked(table, np.s_[2:]))
    adam, before = back.segments[1].slots, table.segments[1].slots
    np.testing.assert_allclose(
        adam["beta1_power"][:2], before["beta1_power"][:2] * 0.9, rtol=1e-6
    )
    np.testing.assert_allclose(
        adam["m"][:2], before["m"][:2] * 0.9 + 0.1 * 0.25, rtol=1e-5
    )


def test_several_tables_at_once_and_ids_that_come_and_go():
    tables = {"item": sample("single", "item"), "context": sample("native", "context")}
    params = {
        "item": jnp.zeros((600, 8)),
        "bias": jnp.zeros((60, 1)),
        "vector": jnp.zeros((60, 4)),
    }
    labels = {"item": "adagrad", "bias": "ftrl", "vector": "adam"}
    kinds = {name: getattr(embedding, name)() for name in labels.values()}
    tx = lazy_rows(optax.partition(kinds, labels))
    leaves = {
        "item": {"item": "adagrad"},
        "context": {"bias": "ftrl", "vector": "adam"},
    }
    params, state, ids = import_hash_tables(
        tables, params, tx.init(params), leaves=leaves, admit_after=2
    )
    assert ids["item"].admit_after == 2
    assert len(ids["context"]) == 58
    newcomer = 2**63 - 2
    _, fresh = ids["item"].assign([newcomer, newcomer], time=2_000_000_000)
    assert fresh.tolist() == [496, -1]
    gone = tables["item"].ids[3]
    ids["item"].expire(before=int(np.min(tables["item"].last_update)) + 1)
    back = export_hash_tables(params, state, ids, leaves=leaves)
    assert_same_bits(back["context"], tables["context"])
    stays = tables["item"].last_update > np.min(tables["item"].last_update)
    assert not stays.all()
    assert (gone in ids["item"]) == stays[3]
    assert_same_bits(
        picked(back["item"], back["item"].ids != newcomer),
        picked(tables["item"], stays),
    )


def test_sharded_leaves_keep_their_sharding():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    table = sample("single", "item")
    params = {"item": jax.device_put(jnp.zeros((512, 8)), place)}
    state = embedding.adagrad().init(params)
    leaves = {"item": {"item": "adagrad"}}
    params, state, ids = import_hash_tables(
        {"item": table}, params, state, leaves=leaves
    )
    assert params["item"].sharding == state.norm["item"].sharding == place
    back = export_hash_tables(params, state, ids, leaves=leaves)
    assert_same_bits(back["item"], table)


def tiny(**changes):
    """A table of two entries."""
    table = HashTable(
        ids=np.array([5, 7]),
        weights=np.ones((2, 3), np.float32),
        segments=(Segment("adagrad", 3, {"norm": np.ones((2, 3), np.float32)}),),
        last_update=np.array([1, 2]),
    )
    return dataclasses.replace(table, **changes)


def imported(table=None, shape=(4, 3), leaves=None, tx=None, dtype="float32", **other):
    params = {"w": jnp.zeros(shape, dtype)} | other
    state = (tx or embedding.adagrad()).init(params)
    return import_hash_tables(
        {"item": table or tiny()},
        params,
        state,
        leaves={"item": {"w": "adagrad"}} if leaves is None else leaves,
    )


STEPS = Segment("batch_softmax", 3, {"global_step": np.array([1, 2**31])})
BAD = {
    "full": ({"shape": (2, 3)}, r"'item' has 2 entries, but 'w' has 2 rows.*3 rows"),
    "dim": ({"shape": (4, 2)}, r"'item' has the segments .*'adagrad', 3.*\['w'\]"),
    "ndim": ({"shape": (4,)}, r"'w' of table 'item' .* \(rows, dim\)"),
    "dtype": ({"dtype": "bfloat16"}, r"'w' of table 'item' .* float32 .* bfloat16"),
    "path": ({"leaves": {"item": {"v": "adagrad"}}}, r"'v' .* not in params.*\['w'\]"),
    "names": ({"leaves": {"user": {"w": "adagrad"}}}, r"\['user'\].*\['item'\]"),
    "no leaf": ({"leaves": {"item": {}}}, r"'item' .* at least one leaf"),
    "optimizer": ({"leaves": {"item": {"w": "lion"}}}, "'lion', but it must be one of"),
    "not ours": (
        {"leaves": {"item": {"w": "dynamic_wd_adagrad"}}},
        "'dynamic_wd_adagrad', but it must be one of",
    ),
    "state": ({"tx": embedding.adam()}, r"'w' of table 'item' .*embedding.adagrad"),
    "no state": (
        {"leaves": {"item": {"w": "sgd"}}},
        r"'w' .*embedding.sgd.*'adagrad.norm'",
    ),
    "twice in the state": (
        {"tx": optax.chain(embedding.adagrad(), embedding.adagrad())},
        "slots of one embedding.adagrad",
    ),
    "same id": ({"table": tiny(ids=np.array([5, 5]))}, "'item' make no IdMap.* 5 more"),
    "ids": ({"table": tiny(ids=np.array([5, 7], np.int32))}, "ids of table 'item'"),
    "weights": (
        {"table": tiny(weights=np.ones((2, 2), np.float32))},
        r"weights of table 'item' .*\(2, 3\)",
    ),
    "slots": (
        {"table": tiny(segments=(Segment("adagrad", 3, {}),))},
        "'item' must have the arrays",
    ),
    "steps": (
        {
            "table": tiny(segments=(STEPS,)),
            "tx": embedding.batch_softmax(),
            "leaves": {"item": {"w": "batch_softmax"}},
        },
        r"steps .*global_step.* 'item' .* 32 bits",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit(case):
    arguments, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        imported(**arguments)


def test_one_leaf_for_two_tables():
    params = {"w": jnp.zeros((4, 3))}
    state = embedding.adagrad().init(params)
    leaves = {"a": {"w": "adagrad"}, "b": {"w": "adagrad"}}
    with pytest.raises(ValueError, match=r"\['w'\] for several tables"):
        import_hash_tables({"a": tiny(), "b": tiny()}, params, state, leaves=leaves)


def test_segments_need_rows_of_one_number():
    params = {"a": jnp.zeros((4, 1)), "b": jnp.zeros((5, 2))}
    state = embedding.sgd().init(params)
    with pytest.raises(ValueError, match=r"'item' .*same number.*'a': 4, 'b': 5"):
        export_hash_tables(
            params, state, {"item": IdMap(4)}, leaves={"item": {"a": "sgd", "b": "sgd"}}
        )


def test_shapes_hold_no_values():
    params = jax.eval_shape(lambda: {"w": jnp.zeros((4, 3))})
    state = jax.eval_shape(embedding.adagrad().init, params)
    with pytest.raises(ValueError, match="'w' of table 'item' must be an array"):
        import_hash_tables(
            {"item": tiny()}, params, state, leaves={"item": {"w": "adagrad"}}
        )


def test_a_map_of_another_table():
    params, state, ids = imported()
    leaves = {"item": {"w": "adagrad"}}
    with pytest.raises(ValueError, match=r"'item' are for 9 rows, but 'w' has 4"):
        export_hash_tables(params, state, {"item": IdMap(9)}, leaves=leaves)
    with pytest.raises(ValueError, match=r"\['item'\], and ids has \['user'\]"):
        export_hash_tables(params, state, {"user": ids["item"]}, leaves=leaves)


def test_nothing_is_shared_or_half_done():
    table = tiny()
    params = {"w": np.zeros((4, 3), np.float32), "v": np.zeros((2, 3), np.float32)}
    state = embedding.adagrad().init(params)
    state = jax.tree.map(np.array, state)
    before = jax.tree.map(np.copy, (params, state))
    leaves = {"item": {"w": "adagrad"}, "user": {"v": "adagrad"}}
    with pytest.raises(ValueError, match="'user' has 2 entries"):
        import_hash_tables({"item": table, "user": table}, params, state, leaves=leaves)
    good = import_hash_tables(
        {"item": table}, params, state, leaves={"item": {"w": "adagrad"}}
    )
    table.weights[:] = 9
    assert (good[0]["w"][1:3] == 1).all()
    jax.tree.map(np.testing.assert_array_equal, (params, state), before)
