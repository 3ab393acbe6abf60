"""Functions with derivative rules of their own that look tables up themselves."""

import functools

import jax
import jax.numpy as jnp
import pytest
from choosing import sampled
from jax import lax
from law import check, normal

from monolith_optax import value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64")

N, D = 2003, 4
# Some twice, from the end, and beyond it: JAX drops their gradient.
IDS = jnp.array([[1, -1, 7], [N + 5, 1, 0], [N - 1, 7, 1]], jnp.int32)


def head(rows, w):
    return jnp.sum(jnp.tanh(rows @ w) ** 2)


@jax.custom_vjp
def looked_up(table, ids):
    return table.at[ids].get(mode="fill", fill_value=0)


# The rule is not the derivative of the function, so that only the rule can be right.
looked_up.defvjp(
    lambda table, ids: (looked_up(table, ids), (table, ids)),
    lambda kept, g: (jnp.zeros_like(kept[0]).at[kept[1]].add(3 * g), None),
)


@jax.custom_vjp
def in_float32(table, ids):
    return table[ids]


in_float32.defvjp(
    lambda table, ids: (table[ids] + 1.0, ids),  # another value than without gradients
    lambda ids, g: (
        jax.ops.segment_sum(
            g.reshape(-1, D).astype(jnp.float32), ids.reshape(-1), N
        ).astype(jnp.float64),
        None,
    ),
)


@jax.custom_vjp
def model(table, w, ids):
    return head(table[ids], w)


model.defvjp(
    lambda table, w, ids: jax.vjp(lambda t, w: head(t[ids], w), table, w),
    lambda pull, g: (*pull(-g), None),
)


@jax.custom_vjp
def two(tables, w, ids):
    return head(tables["a"][ids[0]] * tables["b"][ids[1], 1:2], w)


@jax.jit
def _two(tables, w, ids):
    a, b = tables["a"], tables["b"]
    return head(a[ids[0]] * b[ids[1], 1:2] + a[ids[2]], w)


two.defvjp(
    lambda tables, w, ids: jax.vjp(functools.partial(_two, ids=ids), tables, w),
    lambda pull, g: (*pull(g), None),
)


@jax.custom_jvp
def tangents(table, w, ids):
    return head(table[ids], w)


@tangents.defjvp
def _tangents_jvp(primals, tangents_in):
    (table, w, ids), (d_table, d_w, _) = primals, tangents_in
    change = jnp.sum((d_table[ids] * 5.0) @ w) + jnp.sum(jnp.sin(table[ids]) @ d_w)
    return tangents(*primals), change


FUNCTIONS = {
    "lookup": lambda p, i: head(looked_up(p["t"], i), p["w"]),
    "lookup of an image": lambda p, i: head(looked_up(p["t"] * 2.0, i), p["w"]),
    "lookup twice": lambda p, i: head(
        looked_up(p["t"], i) * looked_up(p["t"], i[::-1]) + p["t"][i], p["w"]
    ),
    "segment_sum": lambda p, i: head(in_float32(p["t"], i), p["w"]),
    "model": lambda p, i: model(p["t"], p["w"], i),
    "jit": jax.jit(lambda p, i: model(p["t"], p["w"], i)),
    "vmap": lambda p, i: jax.vmap(model, (None, None, 0))(p["t"], p["w"], i).sum(),
    "vmap of lookup": lambda p, i: head(
        jax.vmap(jax.vmap(looked_up, (None, 0)), (None, 0))(p["t"], i), p["w"]
    ),
    "scan": lambda p, i: lax.map(lambda j: model(p["t"], p["w"], j), i).sum(),
    "cond": lambda p, i: lax.cond(
        i[0, 0] > 0, lambda: model(p["t"], p["w"], i), lambda: p["w"].sum()
    ),
    "checkpoint": jax.checkpoint(lambda p, i: model(p["t"], p["w"], i)),
    "custom_jvp": lambda p, i: tangents(p["t"], p["w"], i),
    "custom_jvp, vmap": lambda p, i: jnp.sum(
        jax.vmap(tangents, (None, None, 0))(p["t"], p["w"], i)
    ),
}


@pytest.mark.parametrize(
    "name",
    sampled(FUNCTIONS, "lookup of an image", "model", "vmap of lookup", "custom_jvp"),
)
def test_the_rule_gives_the_rows(name):
    params = {"t": normal(N, D), "w": normal(D, seed=1)}
    rtol = 1e-5 if name == "segment_sum" else 1e-10
    check(FUNCTIONS[name], params, IDS, rows={"t"}, rtol=rtol, small=True)


def test_a_rule_of_several_tables():
    params = {"a": normal(N, D), "b": normal(N, D, seed=2), "w": normal(D, seed=1)}

    def loss(params, ids):
        return two({"a": params["a"], "b": params["b"]}, params["w"], ids)

    check(loss, params, IDS, rows={"a", "b"}, small=True)


@pytest.mark.slow
def test_a_stack_of_tables_that_a_rule_looks_up():
    def loss(params, ids):
        return jnp.sum(jnp.sin(jax.vmap(looked_up)(params, ids)))

    check(loss, normal(3, N, D), IDS, rows={""}, small=True)


@pytest.mark.slow
def test_derivatives_of_gradients_through_a_rule_are_jaxs():
    def after_a_step(grad, params, ids):
        value, gradients = grad(params, ids)
        rows = gradients["t"]
        norm = jnp.sum((rows.to_dense(N) if hasattr(rows, "to_dense") else rows) ** 3)
        return value + norm + jnp.sum(gradients["w"] ** 3)

    params = {"t": normal(N, D), "w": normal(D, seed=1)}
    inside = IDS % N  # beyond the table JAX promises nothing
    for name in ("lookup", "model", "custom_jvp"):
        loss = FUNCTIONS[name]
        dense, rows = (
            jax.jit(jax.grad(functools.partial(after_a_step, transform(loss))))
            for transform in (jax.value_and_grad, value_and_row_grad)
        )
        expected, actual = dense(params, inside), rows(params, inside)
        for leaf in params:
            assert jnp.allclose(actual[leaf], expected[leaf], rtol=1e-10), (name, leaf)


@jax.custom_vjp
def decayed(table, ids):
    return table[ids]


decayed.defvjp(
    lambda table, ids: (table[ids], (table, ids)),
    lambda kept, g: ((0.1 * kept[0]).at[kept[1]].add(g), None),
)


@jax.custom_vjp
def largest(table, ids):
    return table[ids]


largest.defvjp(
    lambda table, ids: (table[ids], (table, ids)),
    lambda kept, g: (
        jnp.zeros_like(kept[0]).at[jnp.argmax(g[..., 0], 1)].add(g[:, 0]),
        None,
    ),
)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (decayed, "gets its gradient from mul in the derivative rule of"),
        (largest, "gets its gradient in rows that depend on gradients in the derivati"),
    ],
)
def test_other_rules_are_dense_and_say_why(function, reason):
    def loss(table, ids):
        return jnp.sum(jnp.sin(function(table, ids)))

    table = normal(N, D)
    check(loss, table, IDS, rows=set())
    line = f"params: dense, as it {reason}"
    assert value_and_row_grad(loss).explain(table, IDS).startswith(line)
    with pytest.raises(
        ValueError, match=f"Table params {reason}.*test_rule_lookups.py:"
    ):
        value_and_row_grad(loss, True)(table, IDS)
