"""Random losses: value and gradients are those of jax.value_and_grad.

A loss is a sum of terms, each of which looks rows of an image of a table up somewhere
inside of something. Few by default; more by hand, where `-rP` says how many there were:

LOSS_FUZZ_CASES=20000 LOSS_FUZZ_SEED=1 pytest -m slow --timeout 0 -rP THIS_FILE
"""

# ruff: noqa: ARG001, ARG005 (all makers have the same arguments)

import functools
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import sampled
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from law import densified, rows_of
from op_by_op import op_by_op

from monolith_optax import value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes")

CASES = int(os.environ.get("LOSS_FUZZ_CASES", "0"))
SEED = int(os.environ.get("LOSS_FUZZ_SEED", "0"))
D = 3


@jax.custom_vjp
def linear_rule(table, scale):
    return table * scale


linear_rule.defvjp(
    lambda table, scale: (table * scale, (table, scale)),
    lambda kept, g: (2.0 * g * kept[1], jnp.sum(g * kept[0], axis=0, keepdims=True)),
)


@jax.custom_vjp
def clipped_rule(table):
    return table * 1.5


clipped_rule.defvjp(
    lambda table: (table * 1.5, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),)
)


@jax.custom_jvp
def tangent_rule(table):
    return jnp.where(jnp.arange(len(table))[:, None] == 1, 0.0, jnp.sin(table))


@tangent_rule.defjvp
def _tangent_rule_jvp(primals, tangents):
    return tangent_rule(*primals), tangents[0] * jnp.cos(primals[0]) * 3.0


@jax.custom_vjp
def ruled_lookup(table, ids):
    return table.at[ids].get(mode="fill", fill_value=0)


ruled_lookup.defvjp(
    lambda table, ids: (ruled_lookup(table, ids), (table, ids)),
    lambda kept, g: (jnp.zeros_like(kept[0]).at[kept[1]].add(2.0 * g), None),
)


def row(rng, table):
    return int(rng.integers(-len(table), len(table)))


def part(rng, table):
    """Some rows by constants; never none."""
    n = len(table)
    start = int(rng.integers(0, n))
    stop = int(rng.integers(start + 1, n + 1))
    step = int(rng.integers(1, 4)) * int(rng.choice([-1, 1]))
    if step > 0:
        return table[start:stop:step]
    return table[stop - 1 : (start - 1 if start else None) : step]


def shards(rng, table):
    size = int(rng.choice([k for k in (1, 2, 3) if k <= len(table)]))
    many = len(table) // size * size
    split = table[:many].reshape(size, -1, D)
    a = int(rng.integers(0, split.shape[1]))
    return split[:, a:].reshape(-1, D)


# From a table and dense leaves to an image of it: of any number of rows, but some. None
# has infinite derivatives, as JAX's gradients are NaN also where no lookup takes them.
IMAGES = {
    "itself": lambda rng, t, p: t,
    "scaled": lambda rng, t, p: t * 2.0 + 1.0,
    "tied": lambda rng, t, p: jnp.maximum(t, jnp.round(t)),
    "ties": lambda rng, t, p: jnp.maximum(t, t * 1.0),
    "times leaf": lambda rng, t, p: t * p["w"][None],
    "plus leaf": lambda rng, t, p: p["w"][None] + t,
    "matrix": lambda rng, t, p: t @ p["m"],
    "eye": lambda rng, t, p: t @ jnp.eye(D),
    "relu": lambda rng, t, p: jax.nn.relu(t),
    "softmax": lambda rng, t, p: jax.nn.softmax(t, axis=-1),
    "normalised": lambda rng, t, p: (
        t / jnp.sqrt(1.0 + jnp.sum(t * t, axis=1, keepdims=True))
    ),
    "angles": lambda rng, t, p: jnp.arctan2(t, -1.0),
    "square": lambda rng, t, p: t.T if len(t) == D else t,
    "padded": lambda rng, t, p: jnp.concatenate([jnp.zeros((1, D)), t]),
    "padded by leaf": lambda rng, t, p: jnp.concatenate([t, p["w"][None]]),
    "set": lambda rng, t, p: t.at[row(rng, t)].set(0.0),
    "set leaf": lambda rng, t, p: t.at[row(rng, t)].set(p["w"]),
    "set beyond": lambda rng, t, p: t.at[len(t)].set(p["w"]),
    "multiplied": lambda rng, t, p: t.at[row(rng, t)].multiply(3.0),
    "added": lambda rng, t, p: t.at[row(rng, t)].add(p["w"]),
    "swapped": lambda rng, t, p: t.at[row(rng, t)].set(t[row(rng, t)]),
    "masked": lambda rng, t, p: jnp.where(
        jnp.arange(len(t))[:, None] == row(rng, t), 0.5, t
    ),
    "part": lambda rng, t, p: part(rng, t),
    "shards": lambda rng, t, p: shards(rng, t),
    "reversed": lambda rng, t, p: t[::-1],
    "twice": lambda rng, t, p: jnp.concatenate([t, t]),
    "parts": lambda rng, t, p: jnp.concatenate([part(rng, t), part(rng, t)]),
    "linear rule": lambda rng, t, p: linear_rule(t, p["w"][None]),
    "clipped rule": lambda rng, t, p: clipped_rule(t),
    "tangent rule": lambda rng, t, p: tangent_rule(t),
    "both": lambda rng, t, p: t + 0.5 * lax.stop_gradient(t),
    "frozen": lambda rng, t, p: lax.stop_gradient(t),
    "jit": lambda rng, t, p: jax.jit(lambda t, w: jnp.tanh(t) * w)(t, p["w"][None]),
    "checkpoint": lambda rng, t, p: jax.checkpoint(lambda t: jnp.tanh(t))(t),
    "other table": lambda rng, t, p: (
        jnp.concatenate([t, p["u"]]) if rng.integers(2) else t * p["u"][:1]
    ),
    "row means": lambda rng, t, p: t - t.mean(1, keepdims=True),
    "column means": lambda rng, t, p: t - t.mean(0, keepdims=True),
}


def windows(image, ids):
    size = min(2, len(image))
    start = lambda i: (i, jnp.zeros_like(i))  # noqa: E731
    return jax.vmap(lambda i: lax.dynamic_slice(image, start(i), (size, D)))(
        ids.reshape(-1)
    )


LOOKUPS = {
    "[]": lambda t, i: t[i],
    "take": lambda t, i: jnp.take(t, i, axis=0),
    "clip": lambda t, i: jnp.take(t, i, axis=0, mode="clip"),
    "wrap": lambda t, i: jnp.take(t, i, axis=0, mode="wrap"),
    "fill": lambda t, i: t.at[i].get(mode="fill", fill_value=0.5),
    "drop": lambda t, i: t.at[i].get(
        mode="fill", fill_value=0.0, wrap_negative_indices=False
    ),
    "promise": lambda t, i: t.at[i].get(mode="promise_in_bounds"),
    "columns": lambda t, i: t[i, 1:],
    "column": lambda t, i: t[i, 0],
    "along axis": lambda t, i: jnp.take_along_axis(t, i.reshape(-1, 1), axis=0),
    "windows": windows,
    "ruled": ruled_lookup,
    "bag": lambda t, i: t[i].sum(0),
    "compared": lambda t, i: t[i] * (t[i] > t[i[:1]]).astype(float),
}


def head(params, found):
    weights = jnp.cos(jnp.arange(1.0, 1.0 + found.size)).reshape(found.shape)
    found = jnp.nan_to_num(found, nan=0.25, posinf=2.0, neginf=-2.0)
    return jnp.sum(jnp.tanh(found) * weights) * jnp.sum(params["w"])


def zero(ids):
    """The number 0, which differs from device to device as ids do."""
    return 0.0 * ids[0].astype(float)


def whole(rng, image, params, ids, lookup):
    """An image that is used whole beside its lookups."""
    used = part(rng, image) if rng.integers(4) else image
    return head(params, lookup(image, ids)) + head(params, used)


def frozen_whole(rng, image, params, ids, lookup):
    rows = lookup(image, ids)
    scores = lax.stop_gradient(image).sum(axis=1)
    return head(params, rows) * scores.max() + image[jnp.argmax(scores), 0]


def in_vmap(rng, image, params, ids, lookup):
    return head(params, jax.vmap(lambda i: lookup(image, i[None]))(ids))


def in_scan(rng, image, params, ids, lookup):
    return lax.scan(
        lambda c, i: (c + head(params, lookup(image, i[None])), None), zero(ids), ids
    )[0]


def image_in_scan(make):
    def place(rng, params, ids, lookup):
        seed = int(rng.integers(1000))

        def body(total, i):
            image = make(np.random.default_rng(seed), params)
            return total + head(params, lookup(image, i[None])), None

        return lax.scan(body, zero(ids), ids, reverse=bool(rng.integers(2)))[0]

    return place


def in_cond(rng, image, params, ids, lookup):
    other = head(params, image[:1]) if rng.integers(2) else 1.0
    return lax.cond(
        ids[0] > 1,
        lambda: head(params, lookup(image, ids)),
        lambda: zero(ids) + other,
    )


def in_switch_of_scan(rng, image, params, ids, lookup):
    branches = [
        lambda i: head(params, lookup(image, i[None])),
        lambda i: head(params, image[i]) * 2.0,
    ]
    return lax.scan(
        lambda c, i: (c + lax.switch(jnp.abs(i) % 2, branches, i), None), zero(ids), ids
    )[0]


def in_checkpoint(rng, image, params, ids, lookup):
    return jax.checkpoint(lambda t, w: head({"w": w}, lookup(t, ids)))(
        image, params["w"]
    )


def in_vmapped_cond(rng, image, params, ids, lookup):
    def one(i):
        rows = lambda: lookup(image, i[None])  # noqa: E731
        return lax.cond(i > 0, rows, lambda: jnp.zeros_like(rows()))

    return head(params, jax.vmap(one)(ids))


PLACES = {
    "plain": lambda rng, t, p, i, f: head(p, f(t, i)),
    "jit": lambda rng, t, p, i, f: jax.jit(lambda t: head(p, f(t, i)))(t),
    "whole": whole,
    "frozen whole": frozen_whole,
    "vmap": in_vmap,
    "scan": in_scan,
    "cond": in_cond,
    "switch of scan": in_switch_of_scan,
    "checkpoint": in_checkpoint,
    "vmapped cond": in_vmapped_cond,
}


def some_params(rng):
    """Two tables with ties and zeros of both signs, and dense leaves."""
    numbers = np.array([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0])

    def leaf(*shape):
        ties = rng.choice(numbers, shape)
        return jnp.asarray(
            np.where(rng.integers(2, size=shape), ties, rng.normal(size=shape))
        )

    sizes = [1, 2, 3, 4, 7]  # one has as many rows as columns
    return {
        "t": leaf(int(rng.choice(sizes)), D),
        "u": leaf(int(rng.choice(sizes)), D),
        "w": leaf(D),
        "m": leaf(D, D),
    }


def some_ids(rng, num_rows):
    """Ids with repetitions, inside and on both sides beyond."""
    ids = rng.integers(-num_rows - 2, num_rows + 3, int(rng.integers(1, 6)))
    if rng.integers(2):
        ids = ids % num_rows
    return jnp.asarray(np.concatenate([ids, ids[:1]]), jnp.int32)


def some_loss(rng):
    """A random loss, and the names of what it is made of."""
    terms, names = [], []
    for _ in range(int(rng.integers(1, 3))):
        makers = list(rng.choice(list(IMAGES), int(rng.integers(1, 4))))
        lookup, place = rng.choice(list(LOOKUPS)), rng.choice(list(PLACES))
        table, inside = rng.choice(["t", "t", "u"]), bool(rng.integers(2))
        seed = int(rng.integers(2**31))
        names.append(" ".join(map(str, [table, *makers, lookup, place, inside])))

        def make(rng, params, makers=makers, table=table):
            image = params[table]
            for name in makers:
                image = IMAGES[name](rng, image, params)
            return image

        def term(
            params, ids, make=make, lookup=lookup, place=place, inside=inside, seed=seed
        ):
            rng = np.random.default_rng(seed)
            if inside and place == "scan":
                return image_in_scan(make)(rng, params, ids, LOOKUPS[lookup])
            image = make(rng, params)
            return PLACES[place](rng, image, params, ids, LOOKUPS[lookup])

        terms.append(term)
    return lambda params, ids: sum(term(params, ids) for term in terms), names


def jax_fails(loss, params, ids):
    """Whether JAX has no gradient, as of some vmapped conditionals in shard_map."""
    try:
        jax.eval_shape(jax.value_and_grad(loss), params, ids)
    except Exception:
        return True
    return False


def compare(loss, params, ids, what, runs):
    try:
        expected = runs(jax.value_and_grad(loss))(params, ids)
        value, gradients = runs(value_and_row_grad(loss))(params, ids)
    except Exception:
        if jax_fails(loss, params, ids):
            return set()
        raise
    actual = value, densified(gradients, params)
    chex.assert_trees_all_close(
        jax.device_get(actual),
        jax.device_get(expected),
        rtol=1e-9,
        atol=1e-11,
        custom_message=what,
    )
    return rows_of(gradients)


def run(number, with_mesh):
    """One case: which tables had rows."""
    rng = np.random.default_rng([SEED, number, with_mesh])
    loss, names = some_loss(rng)
    params = some_params(rng)
    ids = some_ids(rng, len(params["t"]))
    what = f"LOSS_FUZZ_SEED={SEED}, case {number}, on a mesh: {with_mesh}, {names}"
    try:
        if not with_mesh:
            return compare(loss, params, ids, what, op_by_op)
        return on_mesh(rng, loss, params, what)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(what) from error


def on_mesh(rng, loss, params, what):
    """The loss of each device's ids, in a shard_map on one of two kinds of meshes."""
    axis_type = rng.choice([AxisType.Auto, AxisType.Explicit])
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
    one = some_ids(rng, len(params["t"]))
    ids = jnp.stack([one, one[::-1]])

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("x")),
        out_specs=P(),
        check_vma=bool(rng.integers(2)),
    )
    def total(params, ids):
        return lax.psum(loss(params, ids[0]), "x")

    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        ids = jax.device_put(ids, NamedSharding(mesh, P("x")))
        return compare(total, params, ids, what, jax.jit)


@pytest.mark.parametrize("with_mesh", sampled([False, True], False))
def test_random_losses(with_mesh):
    count, with_rows = CASES or (4 if with_mesh else 12), 0
    for number in range(count):
        with_rows += bool(run(number, with_mesh))
        if number % 200 == 199:  # else memory grows without an end
            jax.clear_caches()
    print(f"{count} losses of seed {SEED}, {with_rows} of them with gradients of rows")
    assert with_rows > count // 4
