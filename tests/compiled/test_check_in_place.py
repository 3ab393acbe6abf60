"""check_in_place: a sentence for each way in which a step is not in place."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from monolith_optax import check_in_place, lazy_rows, value_and_row_grad

ROWS = 20_000
TX = lazy_rows(optax.adagrad(0.1))
IDS = jnp.arange(8)
donated = functools.partial(jax.jit, donate_argnums=(0, 1))


def loss(params, ids):
    return jnp.mean((params["items"][ids] @ params["kernel"]) ** 2)


def step(params, state, ids, loss=loss):
    value, gradients = value_and_row_grad(loss)(params, ids)
    updates, state = TX.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


def arguments():
    params = {"items": jnp.ones((ROWS, 16)), "kernel": jnp.ones((16, 4))}
    return params, TX.init(params), IDS


def sentences(step, *args):
    with pytest.raises(ValueError, match="The step is not in place:") as raised:
        check_in_place(step, *args)
    first, *others = str(raised.value).split("\n- ")
    assert first == "The step is not in place:"
    assert all(re.fullmatch(r"[^\n]+\.", sentence) for sentence in others)
    return others


TABLE = r"params\['items'\] \(f32\[20000,16\], 1.3 MB\)"
SLOT = r"state\[0\].sum_of_squares\['items'\] \(f32\[20000,16\], 1.3 MB\)"


def match(actual, *expected):
    assert len(actual) == len(expected), actual
    for sentence, pattern in zip(actual, expected, strict=True):
        assert re.match(pattern, sentence), sentence


def test_a_donated_step_is_in_place():
    jitted = donated(step)
    check_in_place(jitted, *arguments())
    check_in_place(jitted.lower(*arguments()).compile())
    params, *_ = arguments()
    assert params["items"].shape == (ROWS, 16)  # nothing ran


def test_shapes_may_stand_for_arrays():
    check_in_place(donated(step), *jax.eval_shape(arguments))


@pytest.mark.parametrize("wrap", [lambda step: step, jax.jit])
def test_arguments_that_are_not_donated(wrap):
    not_donated = "is not donated, so that each step writes a new one"
    match(
        sentences(wrap(step), *arguments()),
        f"{TABLE} {not_donated}",
        f"{SLOT} {not_donated}",
    )


def test_one_argument_that_is_not_donated():
    only_params = jax.jit(step, donate_argnums=0)
    match(sentences(only_params, *arguments()), f"{SLOT} is not donated")


@pytest.mark.as_users_compile
def test_outputs_in_another_order():
    def reordered(params, state, ids):
        params, state, value = step(params, state, ids)
        return state, params, value

    match(
        sentences(donated(reordered), *arguments()),
        rf"{TABLE} is copied, because its memory goes to another output, the new "
        rf"state\[0\]",
        rf"{SLOT} is copied, because its memory goes to another output, the new "
        rf"params\['items'\]",
    )


def test_an_old_table_that_is_read_after_the_step():
    def late(params, state, ids):
        new, state, value = step(params, state, ids)
        return new, state, value + jnp.sum(params["items"] - new["items"])

    found = sentences(donated(late), *arguments())
    assert re.match(f"{TABLE} is copied: something needs the old one", found[0])


def test_an_output_of_another_dtype():
    def changed(table, ids):
        return table.at[ids].add(1.0).astype(jnp.bfloat16)

    found = sentences(jax.jit(changed, donate_argnums=0), jnp.ones((ROWS, 16)), IDS)
    why = "cannot be reused: the output of its size has the dtype bf16"
    assert re.match(f"table .* {why}", found[0])


@pytest.mark.as_users_compile
def test_an_output_of_another_layout():
    here = SingleDeviceSharding(jax.devices()[0])
    by_columns = Format(Layout(major_to_minor=(1, 0)), here)
    jitted = jax.jit(
        lambda table, ids: table.at[ids].add(1.0),
        donate_argnums=0,
        out_shardings=by_columns,
    )
    found = sentences(jitted, jnp.ones((ROWS, 16)), IDS)
    assert re.match(
        r"table .* is copied from the layout \{1,0\} into \{0,1\}", found[0]
    )


def test_an_output_of_another_sharding():
    mesh = jax.make_mesh((8,), ("x",))
    by_rows, everywhere = (
        NamedSharding(mesh, PartitionSpec(*spec)) for spec in (["x"], [])
    )
    jitted = jax.jit(
        lambda table, ids: table.at[ids].add(1.0),
        donate_argnums=0,
        in_shardings=(by_rows, everywhere),
        out_shardings=everywhere,
    )
    found = sentences(jitted, jnp.ones((8 * ROWS, 16)), IDS)
    assert re.match(
        r"table .* is sharded otherwise, f32\[160000,16\] on each", found[0]
    )
    assert any("is sent between devices" in sentence for sentence in found)


@pytest.mark.filterwarnings("ignore:All gradients given to lazy_rows are arrays")
def test_a_dense_gradient_is_a_temporary():
    def tied(params, ids):
        return loss(params, ids) + jnp.max(jnp.sum(params["items"], 1))

    found = sentences(donated(functools.partial(step, loss=tied)), *arguments())
    assert all("as large as a table, is a temporary" in f for f in found)


def test_a_table_that_every_device_has_and_sums():
    mesh = jax.make_mesh((8,), ("x",))
    everywhere, split = (
        NamedSharding(mesh, PartitionSpec(*spec)) for spec in ([], ["x"])
    )

    def dense_step(table, ids):
        gradient = jax.grad(lambda table: jnp.mean(table[ids] ** 2))(table)
        return table - 0.1 * gradient

    jitted = jax.jit(
        dense_step,
        donate_argnums=0,
        in_shardings=(everywhere, split),
        out_shardings=everywhere,
    )
    found = sentences(jitted, jnp.ones((ROWS, 16)), IDS)
    assert any("is sent between devices" in sentence for sentence in found)


def test_a_dense_step_is_checked_where_there_is_no_table():
    def dense(w, x):
        return w - 0.1 * x

    weights = jnp.ones((256, 128))
    check_in_place(jax.jit(dense, donate_argnums=0), weights, 1.0)
    match(
        sentences(dense, weights, 1.0), r"w \(f32\[256,128\], 0.1 MB\) is not donated"
    )


def test_kernels_beside_tables_may_have_dense_gradients():
    params = {"items": jnp.ones((ROWS, 256)), "kernel": jnp.ones((256, 256))}
    check_in_place(donated(step), params, TX.init(params), IDS)


def test_a_batch_may_have_as_many_numbers_as_a_table_has_rows():
    params = {"items": jnp.ones((2**15, 16)), "kernel": jnp.ones((16, 4))}
    check_in_place(donated(step), params, TX.init(params), jnp.arange(2**11))


def test_evaluation_needs_no_donation():
    params, _, ids = arguments()
    check_in_place(jax.jit(loss), params, ids)


def test_many_steps_in_a_scan():
    def steps(params, state, batches):
        def body(carry, ids):
            *carry, value = step(*carry, ids)
            return tuple(carry), value

        return jax.lax.scan(body, (params, state), batches)

    params, state, ids = arguments()
    batches = ids.reshape(2, 4)
    check_in_place(donated(steps), params, state, batches)
    assert len(sentences(steps, params, state, batches)) >= 2


def test_small_arrays_are_nothing_to_check():
    with pytest.raises(ValueError, match="there is nothing to check"):
        check_in_place(lambda table, ids: table.at[ids].add(1.0), jnp.ones((9, 4)), IDS)


class Model(nnx.Module):
    def __init__(self):
        self.items = nnx.Embed(ROWS, 16, rngs=nnx.Rngs(0))


def nnx_step(model, optimizer, ids):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return jnp.mean(nnx.merge(graphdef, params, rest).items(ids) ** 2)

    value, gradients = value_and_row_grad(loss)(params)
    optimizer.update(model, gradients)
    return value


def test_nnx_jit():
    model = Model()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    jitted = nnx.jit(nnx_step, donate_argnums=(0, 1))
    check_in_place(jitted, model, optimizer, IDS)
    check_in_place(jitted.lower(model, optimizer, IDS).compile())
    found = sentences(nnx.jit(nnx_step), model, optimizer, IDS)
    match(found, r"model\.\S+ .* is not donated", r"optimizer\.\S+ .* is not donated")


def test_filter_jit():
    def eqx_step(ids, model, state):
        def loss(model):
            return jnp.mean(jax.vmap(model)(ids) ** 2)

        value, gradients = value_and_row_grad(loss)(model)
        updates, state = TX.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, value

    model = eqx.nn.Embedding(ROWS, 16, key=jax.random.key(0))
    args = IDS, model, TX.init(model)
    jitted = eqx.filter_jit(eqx_step, donate="all-except-first")
    check_in_place(jitted, *args)
    check_in_place(jitted.lower(*args).compile())
    assert len(sentences(eqx.filter_jit(eqx_step), *args)) == 2
