"""Residents against plain Python: who is on the device, and who leaves."""

import numpy as np
import pytest

from monolith_optax._ids.residents import Residents


class Plain:
    """The least recently used leaves, a number at a time."""

    def __init__(self, capacity):
        self.capacity, self.rows, self.last_used, self.now = capacity, {}, {}, 0

    def use(self, batch):
        self.now += 1
        for number in batch:
            if number in self.rows:
                self.last_used[number] = self.now

    def left_by(self, missing):
        """The stamps of those that leave; among equal ones anybody may."""
        need = len(missing) - (self.capacity - 1 - len(self.rows))
        return sorted(self.last_used[n] for n in self.rows)[: max(need, 0)]


def test_is_lru():
    rng = np.random.default_rng(0)
    ours, plain = Residents(25, "lru"), Plain(25)
    ours.grow(201)
    for _ in range(2_000):
        batch = rng.integers(0, 200 * rng.random() + 1, rng.integers(1, 24))
        plain.use(batch.tolist())
        rows = ours.use(batch)
        assert rows.tolist() == [plain.rows.get(n, 0) for n in batch.tolist()]
        missing = np.unique(batch[(rows == 0) & (batch > 0)])
        expected = plain.left_by(missing)
        placed, left, gone = ours.place(missing)
        assert sorted(plain.last_used[n] for n in gone.tolist()) == expected
        assert [plain.rows.pop(n) for n in gone.tolist()] == left.tolist()
        assert not set(gone.tolist()) & set(batch.tolist())
        assert not set(placed.tolist()) & {0, *plain.rows.values()}
        for number, row in zip(missing.tolist(), placed.tolist(), strict=True):
            plain.rows[number], plain.last_used[number] = row, plain.now
        if rng.random() < 0.1:
            forgotten = rng.permutation(np.arange(1, 201))[:20]
            ours.forget(forgotten)
            for number in forgotten.tolist():
                plain.rows.pop(number, None)
        assert len(ours) == len(plain.rows)
        rows, numbers = ours.all()
        assert dict(zip(numbers.tolist(), rows.tolist(), strict=True)) == (
            {0: 0} | plain.rows
        )


@pytest.mark.parametrize(("policy", "stay"), [("lru", [3, 4, 5]), ("lfu", [1, 2, 5])])
def test_policies_differ(policy, stay):
    residents = Residents(5, policy)
    residents.grow(6)
    for batch in [1, 2], [1, 2], [3], [4], [5]:
        rows = residents.use(np.array(batch))
        residents.place(np.array(batch)[rows == 0])
    numbers = residents.all()[1]
    assert len(residents) == 4
    assert set(stay) - set(numbers.tolist()) == set()


def test_all_of_a_full_table_in_one_batch():
    residents = Residents(4, "lru")
    residents.grow(8)
    residents.place(np.array([1, 2, 3]))
    residents.use(np.array([4, 5, 6]))
    rows, left, gone = residents.place(np.array([4, 5, 6]))
    assert sorted(rows) == sorted(left) == [1, 2, 3]
    assert sorted(gone) == [1, 2, 3]
