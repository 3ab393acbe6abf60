"""Tables that are spread over devices: value, gradients and steps of one device."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from compiled_programs import copies, sent
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from law import densified
from op_by_op import op_by_op

from monolith_optax import (
    TableStack,
    accumulate,
    adamom,
    embedding,
    exchange_metrics,
    lazy_rows,
    plan_tables,
    value_and_row_grad,
)

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes")

NUM_ROWS, DIM, BATCH, BAG = 1040, 3, 96, 4
ONE_AXIS = (8,), ("x",), P("x"), P("x")
MESHES = {
    "auto": (*ONE_AXIS, AxisType.Auto),
    "explicit": (*ONE_AXIS, AxisType.Explicit),
    "two": ((2,), *ONE_AXIS[1:], AxisType.Auto),
    "four": ((4,), *ONE_AXIS[1:], AxisType.Auto),
    "replicas": ((2, 4), ("d", "t"), P("t"), P(("d", "t")), AxisType.Auto),
    "both axes": ((2, 4), ("d", "t"), P(("d", "t")), P(("d", "t")), AxisType.Auto),
}


def batches():
    """Ids of users, bags of items; and whether those of all devices fit."""
    rng = np.random.default_rng(0)
    even = rng.integers(0, NUM_ROWS, (BATCH, BAG))
    block = NUM_ROWS // 8
    return {
        "even": (even, True),
        "one_owner": (
            rng.permuted(np.tile(np.arange(block), (BATCH, 1)), axis=1)[:, :BAG]
            + block,
            False,
        ),
        "one_id": (np.full((BATCH, BAG), 7), True),
        "repeated": (even[:1].repeat(BATCH, 0), True),
        "negative": (-1 - even, True),
        "out_of_range": (even * 3 - NUM_ROWS, True),
        "zipf": (rng.zipf(1.2, (BATCH, BAG)) * 7919 % NUM_ROWS, True),
    }


def parameters():
    rng = np.random.default_rng(1)
    shapes = {"items": (NUM_ROWS, DIM), "users": (NUM_ROWS, DIM), "weight": (DIM,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def take(table, ids, **options):
    """Explicit axes want to know where rows of split ids go, as for any table."""
    sharding = jax.typeof(ids).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return table.at[ids].get(**options)
    where = NamedSharding(sharding.mesh, P(*sharding.spec, None))
    return table.at[ids].get(**options, out_sharding=where)


def loss(params, bags):
    items = take(params["items"], bags, mode="clip").sum(1)
    users = take(params["users"], bags[:, 0])
    users += take(params["users"], bags[:, 1], mode="fill", fill_value=0)
    return jnp.mean(jnp.tanh((items * users) @ params["weight"]) ** 2)


def on_mesh(name, *trees):
    """What to say in tables, and params, slots and batches on the mesh."""
    sizes, names, rows, batch, kind = MESHES[name]
    devices = jax.devices()[: int(np.prod(sizes))]
    axis_types = (kind,) * len(sizes)
    mesh = jax.make_mesh(sizes, names, axis_types=axis_types, devices=devices)

    def place(x):
        spec = rows if np.ndim(x) and len(x) == NUM_ROWS else P()
        spec = batch if np.shape(x)[:1] == (BATCH,) else spec
        return jax.device_put(x, NamedSharding(mesh, spec))

    tables = {"items": rows, "users": rows, "weight": False}
    return mesh, tables, *jax.tree.map(place, trees)


def fits(gradients):
    return not bool(jnp.any(gradients["items"].placement.spilled))


def check(loss, kind, mesh_name="auto", argument=None):
    """Value and gradients, and the way that they took."""
    params = jax.tree.map(jnp.asarray, parameters())
    bags, expected_fit = batches()[kind]
    bags = bags.astype("int32")
    expected = op_by_op(jax.value_and_grad(loss))(params, jnp.asarray(bags))
    mesh, tables, placed, ids = on_mesh(mesh_name, params, bags)
    with jax.set_mesh(mesh):
        grad = jax.jit(value_and_row_grad(loss, argument or tables))
        value, gradients = grad(placed, ids)
    # Two devices have room for all ids that one owner has in this batch.
    assert fits(gradients) is (expected_fit or mesh_name == "two")
    actual = jax.device_get((value, densified(gradients, params)))
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-14)
    return gradients


@pytest.mark.parametrize("kind", sampled(batches(), "even", "one_owner"))
def test_value_and_gradients(kind):
    check(loss, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["even", "one_owner"])
@pytest.mark.parametrize(
    "mesh", sampled(["replicas", "explicit", "two", "four", "both axes"], "replicas")
)
def test_meshes(mesh, kind):
    check(loss, kind, mesh)


LOOKUPS = {
    "[]": lambda table, ids: table[ids],
    "take": lambda table, ids: jnp.take(table, ids, axis=0),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    sampled(itertools.product(LOOKUPS, batches()), ("[]", "one_owner")),
)
def test_explicit_axes_need_no_other_model(name, kind):
    """JAX refuses lookups by split ids that do not say out_sharding, as here."""

    def loss(params, bags, flag=True):
        assert flag is True
        items = LOOKUPS[name](params["items"], bags).sum(1)
        users = LOOKUPS[name](params["users"], bags[:, 0])
        return jnp.mean(jnp.tanh((items * users) @ params["weight"]) ** 2)

    if (name, kind) == ("take", "out_of_range"):
        pytest.skip("gives NaN, with which there is nothing to compare")
    gradients = check(loss, kind, "explicit")
    for table in "items", "users":
        assert jax.typeof(gradients[table].rows).sharding.spec[0] in ("x", ("x",))


@pytest.mark.slow
def test_explicit_axes_with_a_split_weight_and_results():
    params = parameters() | {"weight": np.ones((8, DIM))}
    bags = batches()["even"][0].astype("int32")
    mesh, tables, placed, ids = on_mesh("explicit", params, bags)
    split = NamedSharding(mesh, P("x"))
    placed["weight"] = jax.device_put(params["weight"], split)

    def loss(params, bags):
        found = params["items"][bags] @ params["weight"].T
        return jnp.mean(jnp.tanh(found)), found.mean((1, 2))

    grad = value_and_row_grad(loss, tables, has_aux=True)
    expected = jax.value_and_grad(loss, has_aux=True)(params, bags)
    with jax.set_mesh(mesh):
        actual = jax.jit(grad)(placed, ids)
        assert "items: rows, looked up by gather" in grad.explain(placed, ids)
        for array in actual[0][1], actual[1]["weight"]:
            assert array.sharding.is_equivalent_to(split, array.ndim)
        dense = actual[0], densified(actual[1], params)
        chex.assert_trees_all_close(jax.device_get(dense), expected, rtol=1e-10)


def test_a_mistake_after_a_lookup_is_the_error():
    mesh, tables, params, ids = on_mesh("explicit", parameters(), batches()["even"][0])
    grad = value_and_row_grad(lambda p, ids: p["items"][ids] @ jnp.ones(7), tables)
    with jax.set_mesh(mesh), pytest.raises(TypeError, match=r"\(3,\) and \(7,\)"):
        grad(params, ids)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["two", "auto", "replicas", "explicit"])
def test_metrics_count_distinct_rows_by_their_owners(mesh):
    context, tables, params, ids = on_mesh(
        mesh, parameters(), np.zeros((BATCH, BAG), "int32")
    )

    def loss(params, bags):
        return jnp.sum(take(params["items"], bags, mode="clip") ** 2)

    @jax.jit
    def step(params, ids):
        return exchange_metrics(value_and_row_grad(loss, tables)(params, ids)[1])

    devices = {"two": 2, "replicas": 4}.get(mesh, 8)
    for kind in "zipf", "one_owner", "out_of_range":
        bags, expected_fit = batches()[kind]
        with jax.set_mesh(context):
            found = step(params, jax.device_put(bags.astype("int32"), ids.sharding))
        bags = np.where(bags < 0, bags + NUM_ROWS, bags)
        rows = np.unique(np.clip(bags, 0, NUM_ROWS - 1))
        owned = np.bincount(rows // (NUM_ROWS // devices))
        metrics = found["items"]
        assert metrics.distinct_ids == len(rows), kind
        np.testing.assert_allclose(metrics.largest_share, owned.max() / len(rows))
        assert bool(metrics.fits) is (expected_fit or mesh == "two")


@pytest.mark.slow
def test_metrics_of_batches_together():
    """Added up or stacked, they count as one."""
    bags = batches()["even"][0].astype("int32")
    _, tables, params, ids = on_mesh("auto", parameters(), bags)

    @jax.jit
    def both(params, ids):
        grad = value_and_row_grad(loss, tables)
        one, other = (grad(params, some)[1]["items"] for some in (ids, ids[:, ::-1]))
        return exchange_metrics([one, one + other, jax.tree.map(jnp.asarray, one)])

    found = both(params, ids)
    assert found["0"] == found["1"] == found["2"]
    with pytest.raises(ValueError, match=r"spread over devices.*but these are"):
        exchange_metrics(value_and_row_grad(loss)(params, ids)[1])


def in_scan(params, bags):
    def one(total, bag):
        return total + loss(params, bag), None

    return lax.scan(one, 0.0, bags.reshape(4, -1, BAG))[0]


def in_vmap(params, bags):
    return jax.vmap(lambda bag: loss(params, bag[None]))(bags).sum()


def in_cond(params, bags):
    return lax.cond(
        bags.sum() > 0,
        lambda: loss(params, bags),
        lambda: 2 * loss(params, bags[:, ::-1]),
    )


def by_rows_that_were_looked_up(params, bags):
    """The users' rows choose among the items, and these among the users."""
    users = jnp.take(params["users"], bags, axis=0, mode="clip")
    items = params["items"][bags + jnp.argmax(users, -1).astype(bags.dtype)]
    again = params["users"][jnp.argmax(items, -1) * 300]
    return jnp.sum(jnp.tanh((items * again) @ params["weight"]) ** 2)


def normalised(params, bags):
    """What is done to a table before it is looked up is done to its rows."""
    norms = jnp.linalg.norm(params["items"], axis=1, keepdims=True)
    items = jnp.take(params["items"] / norms, bags, axis=0, fill_value=0)
    users = lax.stop_gradient(params["users"])[bags]
    return jnp.sum(jnp.tanh((items * users) @ params["weight"]) ** 2)


CONSTRUCTS = [
    jax.checkpoint(loss),
    in_scan,
    in_vmap,
    in_cond,
    by_rows_that_were_looked_up,
    normalised,
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sampled(["out_of_range", "one_owner"], "one_owner"))
@pytest.mark.parametrize(
    "inside",
    sampled(CONSTRUCTS, in_scan, by_rows_that_were_looked_up),
)
def test_constructs(inside, kind):
    check(inside, kind)


@pytest.mark.slow
def test_lookups_share_one_exchange():
    """Four lookups in two tables, of which only the last needs rows."""
    _, tables, params, ids = on_mesh(
        "auto", parameters(), np.zeros((BATCH, BAG), "int32")
    )

    def exchanges(loss):
        step = jax.jit(value_and_row_grad(loss, tables))
        return len(sent(step.lower(params, ids).compile())["all-to-all"])

    # Ids go and rows come back, and ids and sums go, for each of two tables.
    assert exchanges(loss) == 8
    assert exchanges(by_rows_that_were_looked_up) == 12


OPTIMIZERS = {
    "adagrad": lambda: embedding.adagrad(0.1),
    "rowwise_adagrad": lambda: embedding.rowwise_adagrad(0.1),
    "adamom": lambda: optax.chain(optax.clip_by_global_norm(0.01), adamom(0.1)),
    "adam": lambda: optax.chain(optax.clip_by_global_norm(0.01), optax.adam(0.1)),
    "adamw": lambda: optax.adamw(
        0.1, mask=lambda params: {name: name != "users" for name in params}
    ),
}


def steps(tx, tables, on):
    """From the state of one device, a step for each kind of batch both ways."""
    plain = value_and_row_grad(loss, {"items": True, "users": True, "weight": False})
    spread = value_and_row_grad(loss, tables)

    def step(grad, params, state, bags):
        value, gradients = grad(params, bags)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state, value), gradients

    one, many = (jax.jit(functools.partial(step, grad)) for grad in (plain, spread))
    params = jax.tree.map(jnp.asarray, parameters())
    state = tx.init(params)
    for kind, (bags, expected_fit) in batches().items():
        bags = bags.astype("int32")
        actual, gradients = many(*on(params, state, bags))
        (params, state, value), _ = one(params, state, jnp.asarray(bags))
        yield kind, expected_fit, gradients, actual, (params, state, value)


@pytest.mark.parametrize(
    ("name", "mesh"),
    sampled(
        itertools.product(OPTIMIZERS, ["two", "four", "auto", "explicit", "replicas"]),
        ("rowwise_adagrad", "auto"),
    ),
)
def test_steps_are_those_of_one_device(name, mesh):
    tx = lazy_rows(OPTIMIZERS[name]())
    context, tables = on_mesh(mesh)
    with jax.set_mesh(context):
        on = lambda *trees: on_mesh(mesh, *trees)[2:]  # noqa: E731
        for kind, expected_fit, gradients, actual, expected in steps(tx, tables, on):
            assert fits(gradients) is (expected_fit or mesh == "two"), kind
            chex.assert_trees_all_close(
                *map(jax.device_get, (actual, expected)), rtol=1e-9, atol=1e-12
            )


def in_while(params, bags):
    def step(carry):
        i, total = carry
        row = lax.stop_gradient(params["items"])[bags[i, 0]]
        return i + 1, total + row.sum()

    most = bags.max() % 8
    start = jnp.int32(0), jnp.zeros(())
    return lax.while_loop(lambda c: c[0] < most, step, start)[1] + loss(params, bags)


def chained(params, bags):
    def step(row, bag):
        found = params["items"][jnp.argmax(row).astype(bag.dtype) + bag]
        return found.sum(0), found.sum()

    return lax.scan(step, jnp.zeros(DIM), bags)[1].sum()


def in_shard_map(params, bags):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def local(table, bags):
        return lax.psum(table[bags].sum(), "x")

    specs = P(), P("x")
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    return run(params["items"], bags)


@jax.custom_vjp
def ruled(table, ids):
    return table[ids].sum()


def ruled_backward(kept, gradient):
    table, ids = kept
    return jnp.zeros_like(table).at[ids].add(gradient), None


ruled.defvjp(lambda *args: (ruled(*args), args), ruled_backward)


def in_rule(params, bags):
    return ruled(params["items"], bags)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (in_rule, "items over devices, .* derivative rule, which runs with whole tab"),
        (in_while, "items over devices, but it is looked up by .* not known before"),
        (chained, "the ids of .* depend on rows that the same loop has looked up"),
        (in_shard_map, "items over devices, .* inside a jax.shard_map"),
    ],
)
def test_what_cannot_be_looked_up_before_is_refused(loss, match):
    params, (bags, _) = parameters(), batches()["even"]
    _, _, params, ids = on_mesh("auto", params, bags.astype("int32"))
    grad = jax.jit(value_and_row_grad(loss, {**NONE, "items": P("x")}))
    with pytest.raises(ValueError, match=match):
        grad(params, ids)


NONE = {"items": None, "users": None, "weight": None}


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("x", "tables says 'x' for items, but it must be True, False, None, a Part"),
        (P("z"), r"axes of its mesh are \('x',\), without 'z'"),
        (P(None, "x"), "only rows can be spread"),
        (P("x", "x"), "only rows can be spread"),
    ],
)
def test_values_of_tables(spec, match):
    _, _, params, ids = on_mesh("auto", parameters(), batches()["even"][0])
    with pytest.raises(ValueError, match=match):
        value_and_row_grad(loss, {**NONE, "items": spec})(params, ids)


def test_a_spec_without_a_mesh_for_a_scalar_or_inside_shard_map():
    params, ids = jax.tree.map(jnp.asarray, (parameters(), batches()["even"][0]))
    grad = value_and_row_grad(loss, {**NONE, "items": P("x")})
    with pytest.raises(ValueError, match="it is on no mesh: put it on one with"):
        grad(params, ids)
    with pytest.raises(ValueError, match="s, but a scalar has no rows"):
        value_and_row_grad(lambda p: p["s"], {"s": P("x")})({"s": 1.0})
    mesh, _, params, ids = on_mesh("auto", params, ids)
    local = jax.shard_map(grad, mesh=mesh, in_specs=(P(), P("x")), out_specs=P())
    with pytest.raises(ValueError, match=r"items inside jax.shard_map.*jax.jit"):
        local(params, ids)


def test_a_spec_against_the_type():
    mesh, _, params, ids = on_mesh("explicit", parameters(), batches()["even"][0])
    whole = jax.device_put(params["items"], NamedSharding(mesh, P()))
    grad = value_and_row_grad(loss, {**NONE, "items": P("x")})
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="but its type says"):
        grad(params | {"items": whole}, ids)


def test_rows_that_cannot_be_divided():
    _, tables, params, ids = on_mesh("auto", parameters(), batches()["even"][0])
    params["items"] = jnp.zeros((NUM_ROWS + 3, DIM))
    mesh = params["users"].sharding.mesh
    tables["items"] = NamedSharding(mesh, P("x"))
    with pytest.raises(ValueError, match=r"1043 rows, .* make it 1048"):
        jax.jit(value_and_row_grad(loss, tables))(params, ids)


@pytest.mark.parametrize("none", sampled([P(), None, True], None))
def test_replicated_rows_beside_spread_ones(none):
    gradients = check(loss, "even", argument={**NONE, "items": P("x"), "users": none})
    assert gradients["users"].placement is None


@pytest.mark.slow
def test_a_table_that_is_not_used_has_a_gradient_of_no_rows():
    _, tables, params, ids = on_mesh("auto", parameters(), batches()["even"][0])
    grad = value_and_row_grad(lambda p, ids: p["users"][ids].sum(), tables)
    _, gradients = jax.jit(grad)(params, ids)
    assert np.all(np.asarray(gradients["items"].ids) == -1)
    assert not np.any(gradients["items"].to_dense(NUM_ROWS))


def stacked(kind):
    """The tables of a stack, each of them with a share on every device."""
    rng = np.random.default_rng(2)
    tables = {f"t{i}": rng.normal(size=(1000 + 8 * i, DIM)) for i in range(3)}
    stack = TableStack(tables, shards=8)
    (bags, fit), spec = batches()[kind], {"float64_3": P("x")}

    def loss(stacks, bags):
        found = stack.unpack(stacks)
        rows = [found[name][bags[:, i]] for i, name in enumerate(found)]
        return jnp.mean(jnp.tanh(sum(rows)).sum(1) ** 2)

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    stacks = jax.tree.map(jnp.asarray, stack.pack(tables))
    bags = jnp.asarray(bags, "int32")
    placed = jax.device_put((stacks, bags), NamedSharding(mesh, P("x")))
    return loss, spec, (stacks, bags), placed, fit


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", sampled(["even", "negative", "out_of_range"], "negative")
)
def test_stacks(kind):
    loss, spec, (stacks, bags), placed, fit = stacked(kind)
    tx = lazy_rows(embedding.adagrad(0.1))

    def step(grad, stacks, bags):
        value, gradients = grad(stacks, bags)
        updates, state = tx.update(gradients, tx.init(stacks), stacks)
        return value, optax.apply_updates(stacks, updates), state

    plain, grad = value_and_row_grad(loss), value_and_row_grad(loss, spec)
    explained = grad.explain(*placed)
    assert explained.startswith("float64_3: rows")
    # 288 ids are 36 on each device.
    [room] = map(int, re.findall(r"has room for (\d+) of each owner$", explained))
    assert 36 / 8 < room < 36
    sends = f"{2 * 8 * room * (4 + 3 * 8) / 1000:.3g} kB for its 36 ids"
    assert f"spread over 8 devices, each of which sends {sends}, and" in explained
    expected = step(plain, stacks, bags)
    many = jax.jit(functools.partial(step, grad))
    chex.assert_trees_all_close(
        *map(jax.device_get, (many(*placed), expected)), rtol=1e-11, atol=1e-13
    )
    spilled = jax.jit(grad)(*placed)[1]["float64_3"].placement.spilled
    assert bool(spilled) is not fit
    found = sent(many.lower(*placed).compile())
    assert len(found["all-to-all"]) == 4


def compiled_step(devices, kind=AxisType.Auto):
    """A donated step with clipping; each device has 5,000 rows and 64 bags."""
    tx = lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), embedding.adagrad(0.1)))
    mesh = jax.make_mesh(
        (devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices]
    )

    def typed(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def loss(params, bags):
        return jnp.mean(jnp.tanh(params["items"][bags].sum(1)) ** 2)

    def step(carry, bags):
        params, state = carry
        value, gradients = value_and_row_grad(loss, {"items": P("x")})(params, bags)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    params = {"items": typed((5000 * devices, 32), "float32", P("x"))}
    state = jax.tree.map(
        lambda x: typed(x.shape, x.dtype, P("x") if x.shape else P()),
        jax.eval_shape(tx.init, params),
    )
    bags = typed((64 * devices, BAG), "int32", P("x"))
    return jax.jit(step, donate_argnums=0).lower((params, state), bags).compile()


@pytest.mark.slow
def test_a_step_needs_the_share_of_a_device():
    two, eight = map(compiled_step, (2, 8))
    explicit = compiled_step(8, AxisType.Explicit)
    assert sent(explicit)["all-to-all"] == sent(eight)["all-to-all"]
    for compiled in (two, eight, explicit):
        assert copies(compiled, (5000, 32)) == []
        # Nothing but loss and norm is summed over devices, and nothing is gathered.
        assert sent(compiled).keys() == {
            "all-to-all",
            "all-reduce",
            "collective-permute",
        }
        assert max(sent(compiled)["all-reduce"]) <= 16
    bytes_sent = [sum(sent(compiled)["all-to-all"]) for compiled in (two, eight)]
    needed = [each.memory_analysis().temp_size_in_bytes for each in (two, eight)]
    assert bytes_sent[1] < 1.7 * bytes_sent[0]
    assert needed[1] < 1.7 * needed[0]
    # Ids, and a row of 32 numbers for each, there and back, of places for 8 owners.
    assert bytes_sent[1] % (2 * 8 * 4 * (1 + 32)) == 0
    # plan_tables knows it before, from shapes.
    tx = lazy_rows(embedding.adagrad(0.1))
    params = {"items": jax.ShapeDtypeStruct((5000 * 8, 32), "float32")}
    where = NamedSharding(AbstractMesh((8,), ("x",)), P("x"))
    plan = plan_tables(tx, params, {"items": 8 * 64 * BAG}, where)
    _, held, sends, needs = plan.leaves["items"]
    assert plan.tables == {"items": P("x")}
    assert sends == bytes_sent[1]
    assert held == 2 * 5000 * 32 * 4
    assert needed[1] / 1.3 < needs < needed[1] * 1.3


@pytest.mark.slow
def test_transformations_around_the_gradient():
    _, tables, params, ids = on_mesh("auto", parameters(), batches()["even"][0])
    grad = value_and_row_grad(loss, tables)
    _, expected = value_and_row_grad(loss)(params, ids)
    _, reversed_ids = grad(params, ids[:, ::-1])

    def dense(gradients):
        return gradients["items"].to_dense(NUM_ROWS)

    total = dense(expected)
    stacked = jax.vmap(lambda ids: grad(params, ids)[1])(jnp.stack([ids, ids[:, ::-1]]))
    results = {
        "vmap": (dense(stacked), total + dense(reversed_ids)),
        "accumulate": (dense(accumulate(grad, 2)(params, ids)[1]), total),
        "checkpoint": (dense(jax.checkpoint(grad)(params, ids)[1]), total),
        "cond": (
            lax.cond(
                ids.sum() > 0,
                lambda: dense(grad(params, ids)[1]),
                lambda: jnp.zeros((NUM_ROWS, DIM)),
            ),
            total,
        ),
    }
    for name, (actual, wanted) in results.items():
        np.testing.assert_allclose(actual, wanted, rtol=1e-10, atol=1e-14, err_msg=name)


def squares():
    _, tables, params, ids = on_mesh("auto", parameters(), batches()["even"][0])

    def of_rows(params):
        _, gradients = value_and_row_grad(loss, tables)(params, ids)
        return (gradients["items"].rows ** 2).sum()

    return of_rows, params


@pytest.mark.slow
def test_a_second_derivative_is_refused():
    function, params = squares()
    with pytest.raises(ValueError, match="as for a second derivative"):
        jax.jit(jax.grad(function))(params)


@pytest.mark.slow
def test_a_second_derivative_forwards():
    function, params = squares()
    value, change = jax.jvp(function, (params,), (params,))
    assert np.isfinite(value)
    assert np.isfinite(change)
