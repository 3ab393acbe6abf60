"""What is known of images, and how their rows are made, one by one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from monolith_optax._rows.gradients.image_facts import (
    Facts,
    Number,
    Source,
    is_data,
    is_table,
    leaves_of,
    which_images,
    which_tables,
    without_other_images,
)
from monolith_optax._rows.gradients.row_images import (
    Image,
    Parameter,
    Positions,
    Scope,
    made_of,
)

ONE_COLUMN = (1, 1)
TABLE = Facts(frozenset({Source(0, 2)}), ONE_COLUMN)
OTHER = Facts(frozenset({Source(2, 2, partial=True)}), ONE_COLUMN)
NOTHING = Facts(frozenset(), ONE_COLUMN, is_data=False)
OF_DATA = Facts(frozenset(), ONE_COLUMN)


def test_row_axes_are_those_that_are_fixed_or_are_no_columns():
    assert Source(0, 3).rows_with(1) == 2
    assert Source(0, 3, row_axes=1).rows_with(1) == 1


def test_an_image_of_two_tables_is_partial_only_if_it_is_of_both():
    assert OTHER.partial
    assert not TABLE.partial
    assert not Facts(TABLE.sources | OTHER.sources, ONE_COLUMN).partial


def test_images_of_which_the_same_is_known_are_two():
    assert Facts(TABLE.sources, ONE_COLUMN) != TABLE


def test_which_values_are_images_tables_and_data():
    values = [TABLE, NOTHING, OF_DATA, Number(2), True, False, OTHER]
    assert which_images(values) == {0, 1, 2, 6}
    assert which_tables(values) == {0, 6}
    assert list(map(is_table, values)) == [i in (0, 6) for i in range(7)]
    assert list(map(is_data, values)) == [i in (0, 2, 4, 6) for i in range(7)]
    assert leaves_of(values) == {0, 2}
    assert leaves_of([True, NOTHING]) == leaves_of([]) == frozenset()
    assert without_other_images(values) == [TABLE, False, True, *values[3:]]


def test_numbers_are_computed_in_their_own_dtype():
    one = np.int8(100)
    [sum_of_two] = jax.make_jaxpr(lax.add)(one, one).jaxpr.eqns
    hundred = Number(one)
    assert Number(None, sum_of_two, [hundred, hundred]).value() == 200 - 256
    varying = SimpleNamespace(primitive=SimpleNamespace(name="pvary"))
    assert Number(None, varying, [hundred]).value() == 100


def positions(ids, outside=None, row_axes=1, fetch=None):
    outside = None if outside is None else jnp.array(outside)
    return Positions(jnp.array(ids), outside, row_axes, fetch)


def test_positions_in_some_of_the_rows():
    at = positions([[0, 5, 2], [6, 2, 9]], row_axes=2)
    part, inside = at.part(2, 4)
    np.testing.assert_array_equal(inside, [0, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(part.outside, ~inside.reshape(2, 3))
    np.testing.assert_array_equal(part.ids, [[0, 3, 0], [3, 0, 3]])
    assert (part.count, part.row_axes) == (6, 2)
    assert at.moved(at.ids, 1).row_axes == 1


def test_positions_outside_stay_outside():
    ids, outside = [[0, 5, 2], [7, 2, 9]], [[True, False, False], [False, True, False]]
    at = positions(ids, outside)
    np.testing.assert_array_equal(at.part(0, 10)[0].outside, outside)
    np.testing.assert_array_equal(at.moved(at.ids + 1, 1).outside, outside)
    windows = positions(ids, [True, False]).part(0, 10)[0]
    np.testing.assert_array_equal(windows.outside, [[True] * 3, [False] * 3])


def test_rows_of_arrays_and_of_tables():
    array, ids = jnp.arange(24.0).reshape(4, 2, 3), np.array([[0, 3], [7, 3]])
    rows = positions(ids, row_axes=2).fetch(array)
    np.testing.assert_array_equal(rows, array.reshape(8, 3)[ids.reshape(-1)])
    fetched = []

    def fetch(table, at):
        fetched.append(at)
        return table.array[at.ids]

    at = positions([2, 1], fetch=fetch)
    table = Parameter(0, array)
    np.testing.assert_array_equal(at.fetch(table), array[jnp.array([2, 1])])
    assert at.fetch(table) is at.fetch(table)
    assert fetched == [at]  # its rows are looked up once


class Doubled:
    def rows(self, image, at):
        rows = yield from made_of(image.operands[0], at)
        return 2 * rows


def test_images_as_a_whole_and_by_rows():
    array, scope = jnp.arange(12.0).reshape(4, 3), Scope()
    halves = lambda x: lax.split(x, (1, 3), axis=0)  # noqa: E731
    [split] = jax.make_jaxpr(halves)(array).jaxpr.eqns
    table = Parameter(0, array)
    image = Image(Doubled(), split, [table], 1)
    np.testing.assert_array_equal(scope.whole(image), array[1:])
    np.testing.assert_array_equal(scope.whole(table), array)
    np.testing.assert_array_equal(scope.whole(array), array)
    of_image = Image(Doubled(), split, [image], 0)
    at = positions([3, 1], fetch=lambda table, at: table.array[at.ids])
    rows = scope.rows(of_image, at)
    np.testing.assert_array_equal(rows, 4 * array[jnp.array([3, 1])])
    assert scope.rows(of_image, at) is rows
