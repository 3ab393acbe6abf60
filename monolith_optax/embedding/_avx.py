"""What Monolith's AVX kernels do to some columns and not to others."""

import math

import numpy as np


def in_blocks_of_8(shape: tuple[int, ...]) -> np.ndarray:
    """Which columns of a row AVX processes eight at a time, for rows of that shape."""
    columns = np.arange(math.prod(shape[1:])).reshape(shape[:1] and (1, *shape[1:]))
    return columns < columns.size // 8 * 8
