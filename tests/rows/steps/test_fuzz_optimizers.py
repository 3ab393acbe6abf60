"""Random optimizers: a lazy step is the dense one on touched rows, or refused.

An optimizer is a random program of gradient, parameters, and slots of one number for
each entry, for each row, or for all, whose new values are made by rows or as a whole.
The oracle knows which leaves are slots from their names, not from their shapes. By
hand, for thousands of them, with the seed printed:

FUZZ_OPTIMIZERS=1000 FUZZ_SEED=1 pytest -rP --timeout 0 THIS_FILE
"""

import collections
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import PIECES, WRAPPERS
from dense_rows import put_back, summed
from op_by_op import op_by_op

from monolith_optax import RowSlices, lazy_rows

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes", "mixed_ranks")

CASES = int(os.environ.get("FUZZ_OPTIMIZERS", "12"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
# Rows and columns: ordinary, square, a batch as long as the table, one row.
SHAPES = [(9, 3), (3, 3), (4, 3), (1, 2), (5, 1)]
BATCH = 4


# Each is applied to arrays of shape (N, D); `x` of another shape is broadcast.
UNARY = {
    "abs": jnp.abs,
    "square": jnp.square,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "sign": jnp.sign,
    "half": lambda x: 0.5 * x,
    "shifted": lambda x: x + 0.25,
    "negated": lambda x: -x,
    "rounded": lambda x: x.astype("float32").astype(x.dtype),
    "positive": lambda x: (x > 0).astype(x.dtype),
    "cumsum": lambda x: jnp.cumsum(x, axis=-1),
    "sorted": lambda x: jnp.sort(x, axis=-1),
    "reversed": lambda x: x[..., ::-1],
    "clipped": lambda x: jnp.clip(x, -0.5, 0.5),
    "jit": lambda x: jax.jit(jnp.sin)(x),
    "checkpoint": lambda x: jax.checkpoint(jnp.cos)(x),
    "row norm": lambda x: x / (1 + jnp.linalg.norm(x, axis=-1, keepdims=True)),
    "row mean": lambda x: x - jnp.mean(x, axis=-1, keepdims=True),
    "row argmax": lambda x: (
        x * (jnp.arange(x.shape[-1]) == jnp.argmax(x, axis=-1)[:, None])
    ),
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "products": lambda x: x @ jnp.ones((x.shape[-1], x.shape[-1])),
    "stacked": lambda x: jnp.stack([x, 2 * x], axis=1).sum(1),
    "tiled": lambda x: jnp.tile(x, (1, 2))[:, : x.shape[1]],
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 0)))[:, : x.shape[1]],
    "cond": lambda x: jax.lax.cond(
        jnp.all(jnp.isfinite(x)), lambda x: 2 * x, lambda x: x - 1, x
    ),
    "rates of rows": lambda x: x * jnp.linspace(0.5, 1.0, len(x))[:, None],
    "rates of columns": lambda x: x * jnp.linspace(0.5, 1.0, x.shape[1]),
    "some rows": lambda x: jnp.where(jnp.arange(len(x))[:, None] < 2, x, 0.5 * x),
}
# Across rows: right or refused, whatever comes before.
MIXING = {
    "norm": lambda x: x / (1 + jnp.sqrt(jnp.sum(x**2))),
    "column norm": lambda x: x / (1 + jnp.sqrt(jnp.sum(x**2, axis=0))),
    "largest": lambda x: x + jnp.max(x),
    "smallest": lambda x: x + jnp.min(jnp.abs(x), axis=0),
    "any": lambda x: jnp.where(jnp.any(x > 0.5), x, -x),
    "gram": lambda x: x @ (jnp.einsum("ni,nj->ij", x, x) / 8),
    "rolled": lambda x: jnp.roll(x, 1, axis=0),
    "first row": lambda x: x + x[:1],
    "sorted rows": lambda x: jnp.sort(x, axis=0),
    "loop": lambda x: jax.lax.fori_loop(0, 2, lambda _, x: 0.5 * x, x),
    "set": lambda x: x.at[0].add(1.0),
}
BINARY = {
    "+": jnp.add,
    "-": jnp.subtract,
    "*": jnp.multiply,
    "/": lambda a, b: a / (1 + jnp.abs(b)),
    "max": jnp.maximum,
    "logaddexp": jnp.logaddexp,
    "where": lambda a, b: jnp.where(a > b, a, 0.5 * b),
    "cond": lambda a, b: jax.lax.cond(jnp.sum(a**2) > 1, lambda: a, lambda: a - b),
}
SLOTS = ("full", "column", "row", "number")


def random_rule(rng, depth=3):
    """A random function of named arrays of shape (N, D), and what it is."""
    if depth == 0 or rng.random() < 0.15:
        name = str(rng.choice(["g", "g", "p", *SLOTS]))
        return (lambda values: values[name]), name
    if rng.random() < 0.55:
        some = MIXING if rng.random() < 0.12 else UNARY
        name = str(rng.choice(list(some)))
        inner, text = random_rule(rng, depth - 1)
        return (lambda values: some[name](inner(values))), f"{name}({text})"
    name = str(rng.choice(list(BINARY)))
    left, a = random_rule(rng, depth - 1)
    right, b = random_rule(rng, depth - 1)
    return (lambda v: BINARY[name](left(v), right(v))), f"({a} {name} {b})"


def random_optimizer(rng, num_rows):
    """A random optimizer, and what it is.

    Its slots are made from the shape of the table, or from a number that is the same.
    """
    rules = {name: random_rule(rng) for name in ("update", *SLOTS)}
    # A single entry of a fixed length is not known to be that of a single row.
    made_from_shape = bool(rng.random() < 0.7) or num_rows == 1
    order = [*SLOTS]
    rng.shuffle(order)
    kept = [name for name in order if rng.random() < 0.6]

    def init(params):
        table = params["table"]
        length = len(table) if made_from_shape else num_rows
        slots = {
            "full": jnp.full((length, table.shape[1]), 0.5),
            "column": jnp.full((length, 1), 0.25),
            "row": jnp.full(length, 0.125),
            "number": jnp.ones(()),
        }
        return {f"{i}{name}": slots[name] for i, name in enumerate(kept)}

    def update(g, state, params):
        slots = {key[1:]: value for key, value in state.items()}
        table = params["table"]
        values = {"g": g["table"], "p": table}
        for name in SLOTS:
            slot = slots.get(name, jnp.full((), 0.75))
            slot = slot[:, None] if slot.ndim == 1 else slot
            values[name] = jnp.broadcast_to(slot, table.shape)

        def new(name):
            full = rules[name][0](values)
            return {
                "full": lambda: full,
                "column": lambda: jnp.mean(full, axis=1, keepdims=True),
                "row": lambda: jnp.max(full, axis=1),
                "number": lambda: slots["number"] + 1,
            }[name]()

        after = {key: new(key[1:]) for key in state}
        return g | {"table": rules["update"][0](values)}, after

    texts = {name: rules[name][1] for name in ("update", *kept)}
    text = f"{texts}, slots from {'shape' if made_from_shape else 'a number'}"
    return optax.GradientTransformation(init, update), text


def random_chain(rng):
    # `factored` changes the shapes of its own state for tables of one column.
    pieces = sorted(set(PIECES) - {"factored"})
    links = [
        (str(rng.choice(pieces)), float(rng.choice([0.01, 0.3, 1.0, 20.0])))
        for _ in range(rng.integers(1, 4))
    ]
    wrap = str(rng.choice(sorted(WRAPPERS)))
    inner = WRAPPERS[wrap](optax.chain(*(PIECES[name](x) for name, x in links)))
    return inner, f"{wrap} of {links}"


def gradients(rng, num_rows, columns):
    ids = rng.integers(-1, num_rows + 1, BATCH).astype(np.int32)
    rows = rng.normal(size=(BATCH, columns))
    rows[(ids < 0) | (ids >= num_rows)] = np.nan
    table, touched = summed(ids, rows, num_rows)
    dense = jnp.asarray(rng.normal(size=2))
    slices = RowSlices(jnp.asarray(ids), jnp.asarray(rows))
    return {"table": slices, "dense": dense}, {
        "table": jnp.asarray(table), "dense": dense,
    }, touched  # fmt: skip


def has_rows(path):
    """Slots are identified by their names, as other arrays may be as long."""
    return "table" in path or any(slot in path for slot in SLOTS[:3])


def compare(inner, rng, num_rows, columns):
    """Takes some steps both ways."""
    lazy, dense = lazy_rows(inner), optax.with_extra_args_support(inner)
    params = {
        "table": jnp.asarray(rng.normal(size=(num_rows, columns))),
        "dense": jnp.asarray(rng.normal(size=2)),
    }
    ours, theirs = (params, lazy.init(params)), (params, inner.init(params))
    ours_update, theirs_update = op_by_op(lazy.update), op_by_op(dense.update)
    for _ in range(2):
        by_rows, as_arrays, touched = gradients(rng, num_rows, columns)
        updates, state = ours_update(by_rows, ours[1], ours[0])
        ours = optax.apply_updates(ours[0], updates), state
        updates, state = theirs_update(as_arrays, theirs[1], theirs[0])
        moved = optax.apply_updates(theirs[0], updates)
        theirs = (
            put_back(moved, theirs[0], touched, has_rows),
            put_back(state, theirs[1], touched, has_rows),
        )
    for actual, expected in zip(
        jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
    ):
        actual, expected = np.asarray(actual), np.asarray(expected)
        size = np.max(np.abs(expected), initial=1e-12, where=np.isfinite(expected))
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9 * size)


@pytest.mark.parametrize("kind", ["expressions", "chains"])
def test_random_optimizers_are_right_or_refused(kind):
    print(f"FUZZ_SEED={SEED}, {CASES} cases")
    found = collections.Counter()
    for case in range(CASES):
        rng = np.random.default_rng([SEED, case, kind == "chains"])
        num_rows, columns = SHAPES[rng.integers(len(SHAPES))]
        if kind == "expressions":
            inner, text = random_optimizer(rng, num_rows)
        else:
            inner, text = random_chain(rng)
        try:
            compare(inner, rng, num_rows, columns)
        except ValueError as error:
            assert "lazy_rows needs" in str(error), f"case {case}, {text}: {error}"  # noqa: PT017
            found["refused"] += 1
        except AssertionError as error:
            raise AssertionError(f"case {case}, {num_rows} rows, {text}") from error
        else:
            found["right"] += 1
        if case % 200 == 199:  # else memory grows without an end
            jax.clear_caches()
    print(dict(found))
    assert found["right"] > 0
