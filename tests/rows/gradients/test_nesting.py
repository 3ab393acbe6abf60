"""Lookups inside other transformations of the loss: value and gradients are JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import sampled
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from law import check, normal

from monolith_optax import value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64")

N, D = 2003, 4
IDS = jnp.array([[1, -1, 3], [N - 1, 1, 0]], jnp.int32)


def head(params, found):
    return jnp.sum(jnp.tanh(found @ params["w"]) ** 2)


def of_rows(params, ids):
    return head(params, params["t"][ids])


def in_scan(params, ids):
    def body(total, i):
        found = params["t"][i]
        return total + head(params, found), found.sum()

    total, sums = lax.scan(body, jnp.zeros(()), ids)
    return total + jnp.sum(sums**2)


def in_scan_of_scans(params, ids):
    def body(total, i):
        inner, _ = lax.scan(lambda c, j: (c + params["t"][j].sum(), None), total, i)
        return jnp.sin(inner), None

    return lax.scan(body, jnp.zeros(()), ids, reverse=True)[0]


def in_fori(params, ids):
    return lax.fori_loop(0, 2, lambda k, c: c + of_rows(params, ids[k]), jnp.zeros(()))


def by_carried_ids(params, ids):
    def body(i, _):
        found = params["t"][i]
        return (i + 3) % N, jnp.sin(found).sum()

    return lax.scan(body, ids[0, 0] * 0 + 1, length=4)[1].sum()


def in_cond(params, ids):
    return lax.cond(
        ids[0, 0] > 0,
        lambda: of_rows(params, ids) + of_rows(params, ids[:1]),
        lambda: jnp.sum(params["t"][ids[1]]),
    )


def in_switch_of_scan(params, ids):
    def body(total, i):
        branches = [lambda j, k=k: params["t"][j + k].sum() for k in range(3)]
        return total + jnp.sin(lax.switch(i[0] % 3, branches, i)), None

    return lax.scan(body, jnp.zeros(()), ids)[0]


def in_map(params, ids):
    return lax.map(lambda i: of_rows(params, i), ids).sum()


def in_while(params, ids):
    """How long a walk along the largest rows takes; it has no gradient."""

    def going(carry):
        i, count = carry
        return (params["t"][i].sum() > -5.0) & (count < 3)

    def step(carry):
        i, count = carry
        return jnp.argmax(params["t"][i]).astype(i.dtype), count + 1

    last, count = lax.while_loop(going, step, (ids[0, 0], 0))
    return of_rows(params, ids) * count + params["t"][last].sum()


def in_vmapped_cond(params, ids):
    def one(i):
        return lax.cond(i > 2, lambda: params["t"][i].sum(), lambda: params["t"][i, 0])

    return jnp.sum(jnp.sin(jax.vmap(jax.vmap(one))(ids)))


@jax.custom_vjp
def backwards(x):
    return x


backwards.defvjp(lambda x: (x, None), lambda _, cotangent: (-2 * cotangent,))

NESTED = {
    "jit": jax.jit(of_rows),
    "jit of jit": jax.jit(lambda p, i: jax.jit(of_rows)(p, i)),
    "checkpoint": jax.checkpoint(of_rows),
    "checkpoint of image": lambda p, i: jax.checkpoint(of_rows)(
        {**p, "t": p["t"] * 2}, i
    ),
    "checkpoint in scan": lambda p, i: lax.map(
        jax.checkpoint(lambda j: of_rows(p, j)), i
    ).sum(),
    "scan": in_scan,
    "scan of scans": in_scan_of_scans,
    "fori_loop": in_fori,
    "carried ids": by_carried_ids,
    "cond": in_cond,
    "cond, other branch": lambda p, i: in_cond(p, -i),
    "switch in scan": in_switch_of_scan,
    "map": in_map,
    "while": in_while,
    "custom_vjp of rows": lambda p, i: head(p, backwards(p["t"][i])),
    "custom_jvp of rows": lambda p, i: head(p, jax.nn.relu(p["t"][i])),
    "grad": lambda p, i: jnp.sum(
        jax.grad(lambda w: head({"w": w}, p["t"][i]))(p["w"]) ** 2
    ),
}


SAMPLE = "checkpoint in scan", "scan of scans", "cond", "while", "custom_vjp of rows"


@pytest.mark.parametrize("name", sampled(NESTED, *SAMPLE))
def test_nested_lookups(name):
    params = {"t": normal(N, D), "w": normal(D, seed=1)}
    check(NESTED[name], params, IDS, rows={"t"}, small=True)


def test_a_checkpoint_that_passes_on_the_second_of_two_images():
    def loss(params, ids):
        left, right = jnp.split(params["t"], 2, axis=1)
        passed = jax.checkpoint(lambda left, right: (right, left[ids].sum()))
        return jnp.sum(jnp.sin(passed(left, right)[0][ids]))

    params = {"t": normal(N, 4)}
    check(loss, params, IDS, rows={"t"})


def test_a_vmapped_cond_is_dense_as_jax_repeats_the_table_for_it():
    params = {"t": normal(N, D)}
    check(in_vmapped_cond, params, IDS, rows=set())
    why = value_and_row_grad(in_vmapped_cond).explain(params, IDS)
    assert why.startswith("t: dense, as it is used by select_n at test_nesting.py:")


def test_a_checkpoint_keeps_its_policy():
    policy = jax.checkpoint_policies.save_only_these_names("kept")

    def loss(params, ids):
        def block(params):
            found = checkpoint_name(params["t"][ids], "kept")
            return jnp.sin(jnp.cos(found) @ params["w"]).sum()

        return jax.checkpoint(block, policy=policy)(params)

    params = {"t": normal(N, D), "w": normal(D, seed=1)}
    check(loss, params, IDS, rows={"t"})
    policies = []

    def collect(jaxpr):
        for equation in jaxpr.eqns:
            if "policy" in equation.params:
                policies.append(equation.params["policy"])
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    collect(inner)

    collect(jax.make_jaxpr(value_and_row_grad(loss))(params, IDS).jaxpr)
    assert policies
    assert all(kept == policy for kept in policies)


def test_a_while_loop_has_no_gradient_as_in_jax():
    def loss(params, ids):
        return lax.while_loop(
            lambda c: c < 5, lambda c: c + jnp.abs(params["t"][ids]).sum(), 0.0
        )

    for grad in jax.value_and_grad(loss), value_and_row_grad(loss):
        with pytest.raises(ValueError, match="while_loop"):
            grad({"t": normal(N, D)}, IDS)


def test_constant_layers_of_a_loop_are_no_table():
    def loss(params, ids):
        def body(k, x):
            return jnp.tanh(params["layers"][k] * x)

        return lax.fori_loop(0, 3, body, params["t"][ids]).sum()

    params = {"t": normal(N, D), "layers": normal(3, D)[:, None, None]}
    check(loss, params, IDS, rows={"t"})


@pytest.mark.slow
def test_the_derivatives_of_gradients_are_jaxs():
    ids = jnp.array([[1, -1, N + 9], [N - 1, 1, 0]])

    def loss(params, ids):
        found = jnp.take(params["t"], ids, axis=0, mode="fill", fill_value=0.5)
        # (JAX itself is not consistent about ids outside of the table here.)
        more = (params["t"] / (1 + params["t"] ** 2).sum(1, keepdims=True))[ids % N]
        return head(params, jnp.sin(found) * more)

    def adapted(grad):
        """One step of descent, as in MAML, and the loss after it."""

        def outer(params, rate):
            value, gradients = grad(params, ids)
            stepped = {
                "t": params["t"] - rate * gradients["t"]
                if isinstance(gradients["t"], jax.Array)
                else params["t"] + gradients["t"] * -rate,
                "w": params["w"] - rate * gradients["w"],
            }
            return value + loss(stepped, ids[:1])

        return outer

    params = {"t": normal(N, D), "w": normal(D, seed=1)}
    ours, dense = adapted(value_and_row_grad(loss)), adapted(jax.value_and_grad(loss))
    for argument in 0, 1:
        actual = jax.grad(ours, argument)(params, 0.3)
        expected = jax.grad(dense, argument)(params, 0.3)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
            actual,
            expected,
        )
