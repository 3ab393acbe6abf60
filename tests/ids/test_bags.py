"""Bags: arrays of few lengths, from lists, padded arrays and CSR."""

import numpy as np
import pytest

from monolith_optax import Bags


def test_few_lengths_with_little_padding():
    lengths = {n: len(Bags.from_lists([[1] * n]).ids) for n in range(2, 3000)}
    assert all(n <= length <= n * 1.25 for n, length in lengths.items())
    assert len(set(lengths.values())) <= 4 * 12


def test_weights_follow_their_ids():
    bags = Bags.from_padded(
        [[4, -1, 5], [-2, 6, -1]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    )
    assert bags.ids.tolist() == [4, 5, 6]
    assert bags.offsets.tolist() == [0, 2, 3]
    assert bags.weights.tolist() == [1, 3, 5]
    assert [x.dtype for x in bags] == [np.int32, np.int32, np.float32]
    bags = Bags.from_lists([[1], [2, 3]], [[0.5], [1.5, 2.5]], capacity=5)
    assert bags.weights.tolist() == [0.5, 1.5, 2.5, 0, 0]
    assert bags.ids.tolist() == [1, 2, 3, -1, -1]


def test_no_bags_and_no_ids():
    assert Bags.from_lists([]).offsets.tolist() == [0]
    assert Bags.from_lists([[], []]).offsets.tolist() == [0, 0, 0]
    assert Bags.from_lists([[], []]).ids.tolist() == [-1]


def test_bad_input():
    with pytest.raises(ValueError, match=r"Id 4294967299 at position 1 does not fit"):
        Bags.from_csr(np.array([1, 2**32 + 3]), [0, 2])
    with pytest.raises(ValueError, match="Id 18446744073709551615"):
        Bags.from_csr(np.array([2**64 - 1], np.uint64), [0, 1])
    with pytest.raises(ValueError, match="must be integers, but they are float64"):
        Bags.from_lists([[0.5]])
    with pytest.raises(ValueError, match="There are 3 ids, but the capacity is 2"):
        Bags.from_lists([[1, 2, 3]], capacity=2)
    for offsets in [0, 1], [1, 2], [0, 2, 1, 2]:
        with pytest.raises(ValueError, match="offsets must go from 0"):
            Bags.from_csr([1, 2], offsets)
    with pytest.raises(ValueError, match="a number for each id"):
        Bags.from_lists([[1, 2]], [[1.0]])
    with pytest.raises(ValueError, match=r"shape \(num_bags, length\), not \(2,\)"):
        Bags.from_padded([1, 2])
