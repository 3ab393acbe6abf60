"""value_and_row_grad on eight devices: shard_map and both kinds of meshes."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import law
import numpy as np
import pytest
from choosing import sampled
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from law import densified, normal, rows_of

from monolith_optax import psum, value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64")

check = functools.partial(law.check, by=jax.jit)
N, D = 16, 4
IDS = np.array([[1, -1], [10, 1], [0, 3], [5, 5], [2, 9], [7, 7], [15, 14], [1, 10]])


@pytest.fixture
def params():
    return {"t": normal(N, D), "w": normal(D, seed=1)}


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def head(params, found):
    return jnp.sum(jnp.tanh(found @ params["w"]) ** 2)


def local(params, ids):
    return head(params, params["t"][ids])


def in_scan(params, ids):
    return lax.scan(lambda c, i: (c, local(params, i)), 0.0, ids)[1].sum()


def in_cond(params, ids):
    return lax.cond(
        ids[0, 0] > 1,
        lambda: local(params, ids),
        lambda: 2 * local(params, ids[:1]),
    )


LOSSES = sampled([local, in_scan, in_cond, jax.checkpoint(local)], local)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("check_vma", [False, True])
def test_data_parallel_inside_shard_map(params, loss, reduced, check_vma):
    """Slices are those of the device; together they are the dense gradient."""
    mesh = mesh_of(AxisType.Auto)

    def total(params, ids):
        value = loss(params, ids)
        return lax.pmean(value, ("x", "y")) if reduced else value

    def step(params, ids):
        _, gradients = value_and_row_grad(total)(params, ids)
        assert rows_of(gradients) == {"t"}
        dense = gradients["w"]
        if not check_vma:  # where JAX leaves the sum to the user
            dense = lax.psum(dense, ("x", "y"))
        return psum(gradients["t"], ("x", "y")), dense

    run = jax.jit(
        functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)(
            step, in_specs=(P(), P(("x", "y"))), out_specs=P()
        )
    )
    slices, dense = run(params, IDS)

    def whole(params):
        values = jnp.stack([loss(params, IDS[i : i + 1]) for i in range(8)])
        return values.mean() if reduced and check_vma else values.sum()

    expected = jax.grad(whole)(params)
    actual = {"t": slices.to_dense(N), "w": dense}
    chex.assert_trees_all_close(actual, expected, rtol=1e-10)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_shard_map_inside_the_loss(params, loss, check_vma):
    mesh = mesh_of(AxisType.Auto)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("x")),
        out_specs=P(),
        check_vma=check_vma,
    )
    def total(params, ids):
        return lax.psum(loss(params, ids), "x")

    check(total, params, jnp.asarray(IDS), rows={"t"})


def test_a_table_split_by_rows_inside_the_loss(params):
    mesh = mesh_of(AxisType.Auto)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=({"t": P("y"), "w": P()}, P("x")),
        out_specs=P(),
    )
    def total(params, ids):
        """As large models do it: each device looks up what it has."""
        ids = ids - lax.axis_index("y") * len(params["t"])
        found = (
            params["t"]
            .at[ids]
            .get(mode="fill", fill_value=0, wrap_negative_indices=False)
        )
        return lax.psum(head(params, lax.psum(found, "y")), "x")

    check(total, params, jnp.asarray(IDS % N, jnp.int32), rows={"t"})


def test_explicit_meshes(params):
    mesh = mesh_of(AxisType.Explicit)

    def loss(params, ids):
        rows = params["t"].at[ids].get(out_sharding=P("x", None, None))
        return jnp.mean((rows.sum(1) @ params["w"]) ** 2)

    with jax.set_mesh(mesh):
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, P("x")))
        whole = NamedSharding(mesh, P())
        split = {"t": place(params["t"]), "w": jax.device_put(params["w"], whole)}
        grad = jax.jit(value_and_row_grad(loss))
        value, gradients = grad(split, place(IDS))
        assert rows_of(gradients) == {"t"}
        expected = jax.jit(jax.value_and_grad(loss))(split, place(IDS))
        actual = value, densified(gradients, split)
    chex.assert_trees_all_close(
        jax.device_get(actual), jax.device_get(expected), rtol=1e-10
    )


def test_automatic_meshes(params):
    mesh = mesh_of(AxisType.Auto)
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, P("x")))
    split = {"t": place(params["t"]), "w": params["w"]}
    check(local, split, place(IDS), rows={"t"})


IMAGES = {
    "itself": lambda t: t,
    "scaled": lambda t: t * 2,
    "activated": jax.nn.relu,
    "narrow": lambda t: t.astype(jnp.bfloat16).astype(float),
    "padded": lambda t: jnp.concatenate([jnp.zeros((1, D)), t]),
    "changed": lambda t: t.at[1].set(0.5),
    "slice": lambda t: t[1:],
}


@pytest.mark.parametrize(
    ("check_vma", "axis_type"),
    sampled(
        itertools.product([False, True], [AxisType.Auto, AxisType.Explicit]),
        (False, AxisType.Auto),
        (True, AxisType.Explicit),
    ),
)
@pytest.mark.parametrize("name", sampled(IMAGES, "itself", "activated"))
def test_images_inside_shard_map(params, name, check_vma, axis_type):
    mesh = mesh_of(axis_type)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(("x", "y"))),
        out_specs=P(),
        check_vma=check_vma,
    )
    def total(params, ids):
        found = IMAGES[name](params["t"])[ids % 8]
        return lax.psum(head(params, found), ("x", "y"))

    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, P())
        split = NamedSharding(mesh, P(("x", "y")))
        ids = jax.device_put(IDS, split)
        rtol = 1e-2 if name == "narrow" else 1e-10
        check(total, jax.device_put(params, everywhere), ids, rows={"t"}, rtol=rtol)


TWICE = {
    "both looked up": lambda a, b, i: a[i % 4] * b[i % 8],
    "product": lambda a, b, i: (a[:4] * b[:4])[i % 4],
}


@pytest.mark.parametrize("name", TWICE)
def test_a_table_given_twice_and_split_along_two_axes(params, name):
    @functools.partial(
        jax.shard_map,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P("x"), P("y"), P(), P(("x", "y"))),
        out_specs=P(),
    )
    def total(a, b, params, ids):
        return lax.psum(head(params, TWICE[name](a, b, ids)), ("x", "y"))

    def loss(params, ids):
        return total(params["t"], params["t"], {"w": params["w"]}, ids)

    check(loss, params, jnp.asarray(IDS), rows={"t"})
