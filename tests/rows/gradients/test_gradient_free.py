"""What a table is used for without a gradient leaves its gradient rows."""

import jax
import jax.numpy as jnp
import pytest
from choosing import sampled
from jax import lax
from law import check, densified, normal

from monolith_optax import value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64")

N, D = 2003, 4
IDS = jnp.array([3, -1, 3, 17], jnp.int32)


@pytest.fixture
def params():
    return {"t": normal(N, D), "w": normal(D, seed=1)}


def head(params, found):
    return jnp.sum(jnp.tanh(found @ params["w"]) ** 2)


def hard_negatives(params, ids):
    """The rows of the catalogue that are nearest to those of the batch."""
    rows = params["t"][ids]
    scores = lax.stop_gradient(rows) @ lax.stop_gradient(params["t"]).T
    return head(params, rows - params["t"][jnp.argmax(scores, axis=1)])


def frozen_head(params, ids):
    rows = params["t"][ids] * params["w"][None]
    return jnp.sum(jax.nn.logsumexp(rows @ lax.stop_gradient(params["t"]).T, axis=1))


def by_largest(params, ids):
    return head(params, params["t"][ids] * jnp.argmax(params["t"][:, 0]).astype(float))


def compared(params, ids):
    count = jnp.sum(params["t"] > 0, dtype=jnp.int32).astype(float)
    return head(params, params["t"][ids] * count)


def in_scan(params, ids):
    def body(total, i):
        best = jnp.argmax(lax.stop_gradient(params["t"]) @ params["w"])
        return total + head(
            params, params["t"][i][None] - params["t"][best][None]
        ), best

    return lax.scan(body, 0.0, ids)[0]


def in_cond(params, ids):
    largest = lax.cond(
        ids[0] > 0,
        lambda t: jnp.argmax(t @ params["w"]),
        lambda t: jnp.argmin(t[:, 0]),
        params["t"],
    )
    return head(params, params["t"][ids] - params["t"][largest][None])


def in_while(params, ids):
    count = lax.while_loop(
        lambda c: c < jnp.sum(params["t"] > 5.0, dtype=jnp.int32), lambda c: c + 1, 0
    )
    return head(params, params["t"][ids] + count)


def in_checkpoint(params, ids):
    @jax.checkpoint
    def block(params):
        scores = lax.stop_gradient(params["t"]).sum(0)
        return head(params, params["t"][ids] * scores[None])

    return block(params)


LOSSES = {
    "hard negatives": hard_negatives,
    "frozen head": frozen_head,
    "largest": by_largest,
    "comparisons": compared,
    "scan": in_scan,
    "cond": in_cond,
    "while": in_while,
    "checkpoint": in_checkpoint,
    "jit": jax.jit(hard_negatives),
}


@pytest.mark.parametrize(
    "name", sampled(LOSSES, "hard negatives", "frozen head", "cond")
)
def test_uses_without_a_gradient(params, name):
    check(LOSSES[name], params, IDS, rows={"t"})


def test_a_metric_over_the_catalogue(params):
    def loss(params, ids):
        rows = params["t"][ids]
        best = lax.top_k(rows @ params["t"].T, 5)[1]
        return head(params, rows), {
            "recall": (best == ids[:, None]).any(1),
            "all": best,
        }

    check(loss, params, IDS, rows={"t"}, has_aux=True)


def test_rows_that_are_only_compared_are_not_touched(params):
    def loss(params, ids):
        frozen = lax.stop_gradient(params["t"])[ids]
        return head(params, frozen * params["t"][ids[:1]])

    gradients = check(loss, params, IDS, rows={"t"}, small=True)
    assert gradients["t"].ids.tolist() == [3]


def test_the_gradient_of_a_frozen_table_is_no_rows(params):
    def loss(params, ids):
        return head(params, lax.stop_gradient(params["t"])[ids])

    gradients = check(loss, params, IDS, rows={"t"}, small=True)
    assert gradients["t"].ids.size == 0


def test_a_frozen_matrix_is_dense(params):
    def loss(params, ids):
        return jnp.sum(params["t"][ids] @ lax.stop_gradient(params["m"]))

    check(loss, params | {"m": normal(D, 3)}, IDS, rows={"t"})


def test_a_gradient_through_one_of_two_uses_is_dense(params):
    def loss(params, ids):
        scores = params["t"] @ params["w"]
        return head(params, params["t"][ids]) + scores[jnp.argmax(scores)]

    check(loss, params, IDS, rows={"t"})  # scores are an image that is looked up

    def penalised(params, ids):
        return loss(params, ids) + jnp.sum(params["t"] ** 2)

    check(penalised, params, IDS, rows=set())
    message = (
        "The gradient of t, which has 2003 rows, is dense, as it is used by reduce_sum "
        r"at .*, and max_dense_rows is 1000\. Only look it up"
    )
    with pytest.raises(ValueError, match=message):
        value_and_row_grad(penalised, max_dense_rows=1000)(params, IDS)
    named = {"t": False, "w": False}
    for grad in (
        value_and_row_grad(penalised, max_dense_rows=2003),
        value_and_row_grad(loss, max_dense_rows=1000),
        value_and_row_grad(penalised, named, max_dense_rows=1000),
    ):
        jax.eval_shape(grad, params, IDS)


def test_a_large_table_that_the_loss_does_not_use(params):
    def other(params, ids):
        return params["w"].sum() * len(ids)

    with pytest.raises(
        ValueError, match=r"never looked up.* Say True for it in tables"
    ):
        value_and_row_grad(other, max_dense_rows=1000)(params, IDS)
    check(other, params, IDS, rows={"t"}, tables={"t": True, "w": None})


@pytest.mark.parametrize("argnums", [1, -1, (1,), (0, 1), [1, 0]])
def test_argnums(params, argnums):
    def loss(scale, params, *, ids):
        return scale * head(params, params["t"][ids])

    ours = value_and_row_grad(loss, argnums=argnums)(2.0, params, ids=IDS)
    value, expected = jax.value_and_grad(loss, argnums)(2.0, params, ids=IDS)
    like = params if isinstance(argnums, int) else expected
    dense = densified(ours[1], like)
    assert jax.tree.all(jax.tree.map(jnp.allclose, dense, expected))
    assert jnp.allclose(ours[0], value)
    params_of = ours[1] if isinstance(argnums, int) else ours[1][list(argnums).index(1)]
    assert hasattr(params_of["t"], "to_dense")


def test_argnums_beyond_the_arguments(params):
    with pytest.raises(ValueError, match="argnums is 2, but there are 1 positional"):
        value_and_row_grad(lambda p: p["t"].sum(), argnums=2)(params)
