"""Functions with derivative rules that are applied to tables before lookups."""

import jax
import jax.numpy as jnp
import pytest
from choosing import sampled
from jax import lax
from law import check, normal

from monolith_optax import value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64")

N, D = 7, 3
IDS = jnp.array([1, 3, 3, 3])


@pytest.fixture
def params():
    return {"t": normal(N, D), "w": normal(D, seed=1)}


def with_rule(backward, forward=lambda table: table * 1.0):
    function = jax.custom_vjp(forward)
    function.defvjp(
        lambda table: (forward(table), table), lambda t, g: (backward(t, g),)
    )
    return function


def head(found):
    return jnp.sum(jnp.sin(found) * 3.0)


NOT_LINEAR = {
    "clip": lambda _, g: jnp.clip(g, -1.0, 1.0),
    "sign": lambda _, g: jnp.sign(g),
    "square": lambda _, g: g * g,
    "over its maximum": lambda _, g: g / jnp.max(g),
    "over row norms": lambda _, g: g / (1 + jnp.linalg.norm(g, axis=1, keepdims=True)),
    "not zero at zero": lambda t, g: g + 0.1 * t,
    "without the cotangent": lambda t, _: 0.1 * t,
    "times its sign": lambda _, g: g * jnp.sign(g),
    "with a print": lambda _, g: (jax.debug.print("once"), 2.0 * g)[1],
    "as integers": lambda _, g: g.astype(int).astype(float),
    "chosen by itself": lambda _, g: jnp.where(g > 0, g, 0.0),
    "sum over rows": lambda _, g: g + g.sum(0, keepdims=True),
    "sum over rows as rows": lambda _, g: jnp.broadcast_to(g.sum(0), g.shape),
    "of a loop": lambda _, g: lax.fori_loop(0, 2, lambda _, g: g * g, g),
}
LINEAR = {
    "scaled": lambda _, g: 2.0 * g,
    "of a product": lambda t, g: g * t,
    "chosen": lambda t, g: jnp.where(t > 0, g, 0.0),
    "mixed columns": lambda _, g: g @ jnp.cos(jnp.arange(9.0)).reshape(D, D),
    "sums of rows": lambda _, g: g - g.mean(1, keepdims=True) + g[:, :1] / 2,
    "of a function with a rule": lambda t, g: g * jax.nn.relu(t),
    "zero": lambda _, g: jnp.zeros_like(g),
}


@pytest.mark.parametrize(
    "name", sampled(NOT_LINEAR, "clip", "not zero at zero", "sum over rows")
)
def test_rules_that_are_not_linear_are_dense(params, name):
    def loss(params, ids):
        return head(with_rule(NOT_LINEAR[name])(params["t"])[ids])

    check(loss, params, IDS, rows=set())
    with pytest.raises(ValueError, match="custom_vjp_call"):
        value_and_row_grad(loss, {"t": True, "w": False})(params, IDS)


@pytest.mark.parametrize("name", sampled(LINEAR, "chosen", "sums of rows"))
def test_rules_that_are_linear_are_applied_to_rows(params, name):
    def loss(params, ids):
        return head(with_rule(LINEAR[name])(params["t"])[ids])

    check(loss, params, IDS, rows={"t"})


@pytest.mark.parametrize(("nonlinear", "rows"), [(False, {"t"}), (True, set())])
def test_gradients_of_other_operands(params, nonlinear, rows):
    @jax.custom_vjp
    def scaled(table, scale):
        return table * scale[None]

    scaled.defvjp(
        lambda table, scale: (table * scale[None], (table, scale)),
        lambda kept, g: (
            g * kept[1][None],
            jnp.sum(kept[0] * (g * g if nonlinear else g), axis=0),
        ),
    )

    def loss(params, ids):
        return head(scaled(params["t"], params["w"])[ids])

    check(loss, params, IDS, rows=rows)


def test_a_scale_beside_a_table_of_one_row():
    @jax.custom_vjp
    def scaled(table, scale):
        return table * scale

    scaled.defvjp(
        lambda table, scale: (table * scale, (table, scale)),
        lambda kept, g: (g * kept[1], jnp.sum(kept[0] * g, axis=0, keepdims=True)),
    )

    def loss(params, ids):
        return head(scaled(params["t"], params["w"])[ids])

    params, ids = {"t": normal(1, D), "w": normal(1, D, seed=1)}, jnp.array([0, 0, 0])
    check(loss, params, ids, rows={"t"})


def test_symbolic_zeros_are_dense(params):
    @jax.custom_vjp
    def doubled(table):
        return table * 2.0

    doubled.defvjp(
        lambda table: (table.value * 2.0, None),
        lambda _, g: (g * 2.0,),
        symbolic_zeros=True,
    )
    check(lambda p, i: head(doubled(p["t"])[i]), params, IDS, rows=set())


@jax.custom_jvp
def mixing(table):
    return table * 2.0


@mixing.defjvp
def _mixing_jvp(primals, tangents):
    return mixing(*primals), tangents[0] * 2.0 + jnp.sum(tangents[0], axis=0)[None]


@jax.custom_jvp
def padded(table):
    return jnp.where(jnp.arange(N)[:, None] == 3, 0.0, table)


@padded.defjvp
def _padded_jvp(primals, tangents):
    keep = jnp.arange(N)[:, None] != 3
    return padded(*primals), jnp.where(keep, 5.0 * tangents[0], 0.0)


def test_tangents_that_mix_rows_are_dense(params):
    check(lambda p, i: head(mixing(p["t"])[i]), params, IDS, rows=set())


def padding_row(table):
    return jnp.concatenate([jnp.zeros((1, D)), jax.nn.relu(table)])


RULED = {
    "relu": padding_row,
    "by row": padded,
    "both": lambda t: padding_row(padded(t)),
}
INSIDE = {
    "scan": lambda f: lambda p, i: lax.map(lambda j: head(f(p["t"])[j]), i).sum(),
    "scan, outside": lambda f: (
        lambda p, i: (lambda t: lax.map(lambda j: head(t[j]), i).sum())(f(p["t"]))
    ),
    "cond": lambda f: (
        lambda p, i: lax.cond(i[0] > 0, lambda: head(f(p["t"])[i]), lambda: 0.0)
    ),
    "checkpoint": lambda f: jax.checkpoint(lambda p, i: head(f(p["t"])[i])),
}


@pytest.mark.parametrize("rule", RULED)
@pytest.mark.parametrize("name", sampled(INSIDE, "scan", "checkpoint"))
def test_rules_inside_of_loops(params, name, rule):
    check(INSIDE[name](RULED[rule]), params, IDS, rows={"t"})


def test_an_image_inside_a_loop_and_outside(params):
    def loss(params, ids):
        table = params["t"].at[0].set(0.0)
        return lax.map(lambda i: head(table[i]), ids).sum() + head(table[ids])

    check(loss, params, jnp.array([0, 3, 0]), rows={"t"})
