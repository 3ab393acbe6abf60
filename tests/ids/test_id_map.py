"""IdMap against a Python dict, and what it promises besides."""

import pickle
from collections import Counter

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monolith_optax import IdMap, split_ids
from monolith_optax._ids.row_order import good_step

EXTREMES = [0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63)]


class DictMap:
    """The same in plain Python, an id at a time, from the words of the docstring."""

    def __init__(self, capacity, admit_after, spread=False):
        self.capacity, self.admit_after = capacity, admit_after
        step = good_step(capacity) if spread else 1
        order = [rank * step % capacity for rank in range(capacity)]
        assert sorted(order) == list(range(capacity))
        self.rank = {row: rank for rank, row in enumerate(order)}
        self.rows, self.counts, self.last_seen = {}, Counter(), {}

    def assign(self, batch, time):
        fresh = []
        repeats = Counter(batch)
        for one in dict.fromkeys(batch):
            if one not in self.rows:
                self.counts[one] += repeats[one]
                free = set(range(1, self.capacity)) - set(self.rows.values())
                if self.counts[one] >= self.admit_after and free:
                    self.rows[one] = min(free, key=self.rank.get)
                    fresh.append(self.rows[one])
            if one in self.rows or self.admit_after > 1:  # else it is not remembered
                self.last_seen[one] = max(time, self.last_seen.get(one, time))
        fresh += [-1] * (len(batch) - len(fresh))
        return self.lookup(batch), fresh

    def lookup(self, batch):
        return [self.rows.get(one, 0) for one in batch]

    def expire(self, before):
        old = [one for one, seen in self.last_seen.items() if seen < before]
        freed = sorted(self.rows[one] for one in old if one in self.rows)
        for one in old:
            for of_id in self.rows, self.counts, self.last_seen:
                of_id.pop(one, None)
        return freed


def random_operations(
    seed, operations, *, batch, capacity, admit_after, universe, spread=False
):
    """Does the same to both maps, and compares them all the time."""
    rng = np.random.default_rng(seed)
    special = np.array(EXTREMES)
    ids = IdMap(capacity, admit_after=admit_after, spread=spread)
    plain = DictMap(capacity, admit_after, spread)
    pool = np.concatenate([special, rng.integers(-(2**63), 2**63, universe)])
    done = now = 0
    while done < operations:
        size = int(rng.integers(0, batch + 1))
        # Few ids are frequent, as in life: some are admitted, many are not.
        raw = pool[(rng.random(size) ** 3 * len(pool)).astype(int)]
        now += int(rng.integers(-1, 4))  # data comes out of order
        given = raw.view(np.uint64) if rng.random() < 0.5 else raw
        rows, fresh = ids.assign(given, time=now)
        expected_rows, expected_fresh = plain.assign(raw.tolist(), now)
        assert rows.tolist() == expected_rows
        assert fresh.tolist() == expected_fresh
        raw = rng.choice(pool, size)
        assert ids.lookup(raw).tolist() == plain.lookup(raw.tolist())
        done += 2 * size + 1
        if rng.random() < 0.1:
            before = now - int(rng.integers(0, 30))
            assert ids.expire(before=before).tolist() == plain.expire(before)
        if rng.random() < 0.05:
            ids = pickle.loads(pickle.dumps(ids))
        assert len(ids) == len(plain.rows)
    assert dict(ids.items()) == plain.rows


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("admit_after", [1, 2, 5])
@pytest.mark.parametrize("capacity", [1, 40, 10_000])
def test_is_a_dict(capacity, admit_after, spread):
    options = {"capacity": capacity, "admit_after": admit_after, "spread": spread}
    random_operations(0, 2_000, batch=64, universe=300, **options)


@given(
    st.sampled_from([2, 3, 8, 256, 1000]),
    st.integers(1, 1000),
    st.integers(0, 5000),
    st.integers(1, 5000),
)
def test_any_arrivals_are_spread_over_any_blocks(blocks, rows_each, before, some):
    ids = IdMap(blocks * rows_each, spread=True)
    ids.assign(np.arange(before), time=0)
    rows, _ = ids.assign(before + np.arange(some), time=0)
    rows = rows[rows > 0]
    found = np.bincount(rows // rows_each, minlength=blocks)
    # Without the option the first block would have all of them.
    assert np.abs(found - len(rows) / blocks).max() < 5


def test_a_table_that_has_grown_is_filled_evenly():
    ids = IdMap(400, spread=True)
    before, _ = ids.assign(np.arange(399), time=0)
    ids = IdMap.from_arrays({**ids.to_arrays(), "capacity": np.asarray(800)})
    rows, _ = ids.assign(np.arange(400) + 2**60, time=0)
    assert sorted([0, *before, *rows]) == list(range(800))
    assert ids.lookup(np.arange(399)).tolist() == before.tolist()


def test_maps_that_were_saved_before_keep_their_order():
    ids = IdMap(40)
    ids.assign([7], time=0)
    arrays = ids.to_arrays()
    assert "spread" not in arrays
    back = IdMap.from_arrays(arrays)
    assert (back.spread, back.assign([8])[0].tolist()) == (False, [2])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("admit_after", [1, 3])
def test_is_a_dict_over_a_million_operations(admit_after):
    random_operations(
        1, 1_000_000, batch=200, capacity=700, admit_after=admit_after, universe=3_000
    )


@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.sampled_from(EXTREMES))))
def test_any_ids(batches):
    ids, plain = IdMap(8, admit_after=2), DictMap(8, 2)
    for time, batch in enumerate(batches):
        raw = np.array(batch, np.int64)
        rows, fresh = ids.assign(raw, time=time)
        assert (rows.tolist(), fresh.tolist()) == plain.assign(batch, time)
        assert ids.expire(before=time - 2).tolist() == plain.expire(time - 2)


@pytest.mark.parametrize("stride", [1, 2**16, 2**32, 2**48, 2**63])
def test_ids_that_differ_in_few_bits_are_found(stride):
    raw = np.arange(1, 100_001, dtype=np.uint64) * np.uint64(stride)
    distinct = list(dict.fromkeys(raw.tolist()))
    ids = IdMap(len(distinct) + 1)
    ids.assign(raw, time=0)
    assert len(ids) == len(distinct)
    expected = {one: row for row, one in enumerate(distinct, 1)}
    assert ids.lookup(raw).tolist() == [expected[one] for one in raw.tolist()]


def test_repeats_in_a_batch_count_and_all_their_positions_get_the_row():
    ids = IdMap(10, admit_after=3)
    rows, fresh = ids.assign([[7, 8, 7], [8, 7, 9]], time=0)
    assert rows.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert fresh.tolist() == [1, -1, -1, -1, -1, -1]
    rows, fresh = ids.assign([8, 9, 7], time=1)
    assert rows.tolist() == [2, 0, 1]
    assert fresh.tolist() == [2, -1, -1]


def test_dtypes_and_shapes():
    ids = IdMap(10)
    for raw in np.zeros((2, 0, 3), np.int64), np.int64(5), np.arange(3, dtype=np.int8):
        rows, fresh = ids.assign(raw, time=0)
        assert rows.dtype == fresh.dtype == ids.lookup(raw).dtype == np.int32
        assert rows.shape == ids.lookup(raw).shape == raw.shape
        assert fresh.shape == (raw.size,)
    assert ids.expire(before=9).dtype == np.int32


def test_unsigned_ids_are_the_signed_ones_of_the_same_bits():
    ids = IdMap(10)
    ids.assign(np.array([2**64 - 1, 2**63], np.uint64), time=0)
    assert ids.lookup([-1, -(2**63)]).tolist() == [1, 2]
    assert 2**64 - 1 in ids
    assert -1 in ids
    assert 1 not in ids
    assert dict(ids.items()) == {-1: 1, -(2**63): 2}


def test_expire_is_strict_and_smallest_rows_come_first():
    ids = IdMap(4)
    ids.assign([10, 11], time=5)
    ids.assign([12], time=6)
    assert ids.assign([13], time=6)[0].tolist() == [0]  # full
    assert ids.expire(before=5).tolist() == []
    assert ids.expire(before=6).tolist() == [1, 2]
    rows, fresh = ids.assign([13, 14, 15, 12], time=7)
    assert rows.tolist() == [1, 2, 0, 3]
    assert fresh.tolist() == [1, 2, -1, -1]


def test_lookup_changes_nothing():
    ids = IdMap(10, admit_after=2)
    ids.assign([1, 1, 2], time=0)
    before = ids.to_arrays()
    ids.lookup([1, 2, 3])
    assert 2 not in ids
    after = ids.to_arrays()
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize("raws", [[], [[1, 1, 2], [3, 3]]])
def test_orbax_saves_its_arrays(raws, tmp_path):
    ids = IdMap(10, admit_after=2)
    for time, raw in enumerate(raws):
        ids.assign(np.array(raw) + 2**60, time=time)
    ids.expire(before=1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ids", ids.to_arrays())
        checkpointer.wait_until_finished()
        back = IdMap.from_arrays(checkpointer.restore(tmp_path / "ids"))
    assert dict(back.items()) == dict(ids.items())
    for raw in [1, 2, 3, 4, 1, 2], [9]:
        more = np.array(raw) + 2**60
        for one, other in zip(
            ids.assign(more, time=9), back.assign(more, time=9), strict=True
        ):
            assert one.tolist() == other.tolist()


def test_arrays_are_copies():
    ids = IdMap(10)
    ids.assign([1, 2], time=0)
    arrays = ids.to_arrays()
    back = IdMap.from_arrays(arrays)
    for array in arrays.values():
        array[...] = 0
    assert ids.lookup([1, 2]).tolist() == back.lookup([1, 2]).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": None}, r"\['rows'\] are missing"),
        ({"rows": np.zeros(2, np.int32)}, r"rows has the shape \(2,\)"),
        ({"ids": np.zeros(4, np.int32)}, "dtype int32 instead of int64"),
        (
            {"rows": np.array([0, 1, 10, 0], np.int32)},
            "rows has numbers that are not from 0 to 9",
        ),
        (
            {"rows": np.array([0, 1, -1, 0], np.int32)},
            "rows has numbers that are not from 0 to 9",
        ),
        ({"rows": np.array([0, 1, 1, 0], np.int32)}, "rows has 1 more than once"),
        ({"ids": np.array([0, 6, 6, 8])}, "ids has 6 more than once"),
        ({"ids": np.array([0, 6, 7, 6])}, "ids has 6 more than once"),
        (
            {"counts": np.array([0, 0, 0, 2], np.int32)},
            "counts has numbers that are not from 0 to 1",
        ),
        ({"counts": np.array([0, 0, 1, 1], np.int32)}, "both a row and a count"),
        ({"capacity": np.zeros(2)}, r"\['capacity'\] are not single numbers"),
        ({"spread": np.asarray(2)}, "spread is 2 instead of 0 or 1"),
    ],
)
def test_arrays_that_are_no_map_are_refused(change, message):
    ids = IdMap(10, admit_after=2)
    ids.assign([6, 7, 6, 7, 8], time=0)
    arrays = {**ids.to_arrays(), **change}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        IdMap.from_arrays(arrays)


@pytest.mark.parametrize("raw", [[], [[], []], np.array([]), np.array([], object)])
def test_no_ids_at_all(raw):
    ids = IdMap(10)
    rows, fresh = ids.assign(raw)
    assert (rows.shape, fresh.shape) == (np.shape(raw), (0,))
    assert rows.dtype == fresh.dtype == ids.lookup(raw).dtype == np.int32
    assert [part.tolist() for part in split_ids(raw, 2)] == [[], []]
    assert len(ids) == 0


@pytest.mark.parametrize("kind", [int, np.int64, np.uint64, np.int32])
def test_object_arrays_of_integers(kind):
    most = min(np.iinfo(kind).max, 2**64 - 1) if kind is not int else 2**64 - 1
    raw = np.array([kind(most), kind(7), kind(most)], object)
    rows, fresh = IdMap(10).assign(raw)
    assert (rows.tolist(), fresh.tolist()) == ([1, 2, 1], [1, 2, -1])
    signed = IdMap(10)
    signed.assign([int(np.uint64(most).view(np.int64)) if most > 2**63 else most])
    assert signed.lookup(raw).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (np.array([1.0]), TypeError),
        (["1"], TypeError),
        ([True], TypeError),
        ([2**64], ValueError),
        ([None], TypeError),
        (np.array([1.0], object), TypeError),
        (np.array([True], object), TypeError),
        (np.array([1, None], object), TypeError),
        (np.array([-1, 2**63], object), ValueError),
    ],
)
def test_what_is_no_id_is_refused(raw, error):
    ids = IdMap(10)
    for call in ids.lookup, lambda raw: ids.assign(raw, time=0):
        with pytest.raises(error, match=r"[Ii]ntegers"):
            call(raw)
    assert len(ids) == 0


def test_bad_numbers_are_refused():
    for arguments in {"capacity": 0}, {"capacity": 2**31}, {"admit_after": 0}:
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            IdMap(**{"capacity": 5, **arguments})
    ids = IdMap(5)
    with pytest.raises(ValueError, match="64 bits"):
        ids.assign([1], time=2**63)
    with pytest.raises(TypeError):
        ids.assign([1], time=0.5)
    assert len(ids) == 0


def test_memory_of_many_ids():
    # The largest share of empty slots and of spare entries is somewhere on the way.
    ids, worst = IdMap(2**20), 0.0
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids.assign(rng.integers(-(2**63), 2**63, 5_000), time=0)
        worst = max(worst, ids.nbytes / len(ids))
        if len(ids) == ids.capacity - 1:
            break
    assert worst <= 40


@pytest.mark.parametrize("num_owners", [1, 2, 7])
def test_splitting_by_owner(num_owners):
    rng = np.random.default_rng(0)
    raw = np.concatenate([EXTREMES, rng.integers(-(2**63), 2**63, 100)])
    raw = raw.reshape(2, -1)
    split = split_ids(raw.view(np.uint64), num_owners)
    assert len(split) == num_owners
    for owner, positions in enumerate(split):
        expected = [
            position
            for position, one in enumerate(raw.reshape(-1).tolist())
            if one % num_owners == owner
        ]
        assert positions.tolist() == expected


def test_splitting_needs_an_owner():
    with pytest.raises(ValueError, match="num_owners must be at least 1"):
        split_ids([1], 0)
