"""Every primitive of the JAX that is installed has a place in the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_rows import DIM, NUM_ROWS, assert_lazy_is_dense, assert_refused, stateless
from jax.extend.core import primitives as public

from monolith_optax._rows.programs import jaxprs, primitives, reductions, row_rules
from monolith_optax._rows.programs.known_constants import ZERO
from monolith_optax._rows.programs.row_values import Rows
from monolith_optax._rows.programs.run_on_rows import Runner
from monolith_optax._rows.slices.row_access import Table

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes")


RUN = jaxprs.CALLS | jaxprs.CUSTOM_DERIVATIVES | {"cond"}
SETS = {
    "elementwise": primitives.ELEMENTWISE,
    "rules": frozenset(row_rules.RULES),
    "reductions": reductions.NAMES,
    "hints": primitives.HINTS,
    "run": RUN,
    "mixing": primitives.MIXING,
}


def test_each_primitive_has_a_place():
    names = {
        str(getattr(public, name).name) for name in dir(public) if name.endswith("_p")
    }
    assert len(names) > 100
    assert names <= frozenset().union(*SETS.values())


def test_no_primitive_both_keeps_rows_apart_and_mixes_them():
    keeping = primitives.ELEMENTWISE | frozenset(row_rules.RULES) | reductions.NAMES
    assert not keeping & primitives.MIXING
    assert frozenset(row_rules.RULES) >= primitives.MAKERS
    assert not primitives.ELEMENTWISE & frozenset(row_rules.RULES)


COLUMNS = {
    "split": lambda g, p: jnp.concatenate(jnp.split(g * p, [1], axis=1)[::-1], 1),
    "stack": lambda g, p: jnp.stack([g, p], axis=2)[:, :, 0],
    "stack in front": lambda g, p: jnp.stack([g, p], axis=1).sum(1),
    "sort": lambda g, p: jnp.sort(g, axis=1) * (jnp.argsort(p, axis=1) > 0),
    "rev": lambda g, _: g[:, ::-1],
    "pad": lambda g, _: jnp.pad(g, ((0, 0), (1, 2)))[:, 1 : DIM + 1],
    "cumsum": lambda g, p: jnp.cumsum(g, 1) + jnp.cumprod(p, 1),
    "cummax": lambda g, _: jax.lax.cummax(g, axis=1) + jax.lax.cumlogsumexp(g, axis=1),
    "tile": lambda g, _: jnp.tile(g[:, :1], (1, DIM)),
    "repeat": lambda g, _: jnp.repeat(g[:, :1], DIM, axis=1),
    "top_k": lambda g, _: jax.lax.top_k(g, DIM)[0],
    "softmax": lambda g, p: g * jax.nn.softmax(p, axis=1),
    "roll": lambda g, _: jnp.roll(g, 1, axis=1),
    "outer": lambda g, p: jnp.einsum("ni,nj->nij", g, p).sum(2),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_operations_of_columns(name):
    if name == "tile" and not hasattr(jax.lax, "tile"):
        pytest.skip("there JAX moves rows to another axis first")
    assert_lazy_is_dense(stateless(COLUMNS[name]))


ROWS = {
    "split": lambda g, _: g + jnp.split(g, [NUM_ROWS - 1], axis=0)[1],
    "stack": lambda g, p: jnp.stack([g, p]).sum(0),
    "sort": lambda g, _: jnp.sort(g, axis=0),
    "rev": lambda g, _: g[::-1],
    "pad": lambda g, _: jnp.pad(g, ((1, 0), (0, 0)))[:-1],
    "cumsum": lambda g, _: jnp.cumsum(g, 0),
    "tile": lambda g, _: jnp.tile(g, (2, 1))[NUM_ROWS:],
    "strides": lambda g, _: jnp.repeat(g[::2], 2, axis=0)[:NUM_ROWS],
}


@pytest.mark.parametrize("name", ROWS)
def test_operations_along_rows_are_refused(name):
    assert_refused(stateless(ROWS[name]), " at .* rows of params")


def test_branches_inside_branches_are_run_once_for_kinds_and_once_for_results():
    counted = []

    class Counting(Runner):
        def run(self, program, operands):
            counted.append(program)
            return super().run(program, operands)

    def nested(depth, x):
        if depth == 0:
            return x
        return jax.lax.cond(
            jnp.sum(x) > 0, lambda x: nested(depth - 1, x * 2), lambda x: x + 1, x
        )

    depth, table = 8, Table("t", 20, jnp.array([3, 1]))
    x = jnp.ones((2, 3))
    program, _ = jaxprs.trace(lambda x: nested(depth, x), jnp.ones((20, 3)))
    runner = Counting([table])

    def on_rows(x):
        [result] = runner.run(program, [Rows(x, table, ZERO)])
        return result.array

    result = jax.jit(on_rows)(x)
    # The program itself, and two branches on each level, twice.
    assert len([p for p in counted if p.jaxpr.eqns]) <= 1 + 4 * depth
    np.testing.assert_array_equal(result, 2**depth * np.ones((2, 3)))
