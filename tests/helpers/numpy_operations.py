"""JAX's operations in NumPy: from an equation's parameters and operands to its results.

Random programs consist of these, and nothing is compiled for them.
"""

import string

import numpy as np
from jax.lax import GatherScatterMode as Mode


def _broadcast(params, x, *_):
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _slice(params, x):
    limits = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or [1] * x.ndim
    return x[tuple(map(slice, *limits, steps))]


def _iota(params):
    shape, axis = params["shape"], params["dimension"]
    along = np.arange(shape[axis], dtype=params["dtype"])
    return np.broadcast_to(along.reshape(-1, *[1] * (len(shape) - axis - 1)), shape)


def _div(_, a, b):
    is_whole = np.issubdtype(a.dtype, np.integer)
    return (a - np.fmod(a, b)) // b if is_whole else a / b


def _select(_, which, *cases):
    return np.choose(which.astype(int), cases)


def _pad(params, x, value):
    config = np.asarray(params["padding_config"])
    low, high, between = config.T
    apart = np.full(
        np.maximum(0, np.add(x.shape, (np.array(x.shape) - 1) * between)), value
    )
    apart[tuple(slice(None, None, step + 1) for step in between)] = x
    cut = [
        slice(max(0, -a), n - max(0, -b))
        for a, b, n in zip(low, high, apart.shape, strict=True)
    ]
    added = list(zip(np.maximum(low, 0), np.maximum(high, 0), strict=True))
    return np.pad(apart[tuple(cut)], added, constant_values=value)


def _dot_general(params, a, b):
    contracted, batch = params["dimension_numbers"]
    names = iter(string.ascii_letters)
    of_a, of_b = [next(names) for _ in a.shape], [next(names) for _ in b.shape]
    shared = [*zip(*batch, strict=True), *zip(*contracted, strict=True)]
    for i, j in shared:
        of_b[j] = of_a[i]
    first = [of_a[i] for i in batch[0]]
    free_a = [x for i, x in enumerate(of_a) if i not in {*batch[0], *contracted[0]}]
    free_b = [x for j, x in enumerate(of_b) if j not in {*batch[1], *contracted[1]}]
    results = "".join([*first, *free_a, *free_b])
    return np.einsum(f"{''.join(of_a)},{''.join(of_b)}->{results}", a, b)


def _bitcast(params, x):
    new = np.dtype(params["new_dtype"])
    if new.itemsize < x.itemsize:
        x = x[..., None]
    bits = x.copy().view(new)
    return bits.squeeze(-1) if new.itemsize > x.itemsize else bits


def _starts(starts, shape, sizes):
    return np.clip(np.asarray(starts, int), 0, np.subtract(shape, sizes))


def _at(starts, sizes):
    return tuple(slice(a, a + size) for a, size in zip(starts, sizes, strict=True))


def _dynamic_slice(params, x, *starts):
    sizes = params["slice_sizes"]
    return x[_at(_starts(starts, x.shape, sizes), sizes)]


def _dynamic_update_slice(_, x, new, *starts):
    x = x.copy()
    x[_at(_starts(starts, x.shape, new.shape), new.shape)] = new
    return x


def _windows(shape, indices, sizes, mode, moved, batched):
    """Where in an array the windows of indices are, and which of these are inside.

    Args:
      shape: the shape of the array.
      indices: along the last axis, where a window starts along the axes `moved`.
      sizes: the sizes of a window along all axes.
      mode: where windows outside of the array are.
      moved: the axes along which windows start elsewhere than at 0.
      batched: pairs of axes of the array and of the indices that belong together.

    Returns:
      Positions along each axis, with the axes of indices first, then those of sizes.
    """
    leading = indices.shape[:-1]
    starts = np.zeros((*leading, len(shape)), int)
    starts[..., list(moved)] = indices
    for axis, along in batched:
        starts[..., axis] = np.expand_dims(
            np.arange(shape[axis]), [i for i in range(len(leading)) if i != along]
        )
    last = np.subtract(shape, sizes)
    inside = np.all((starts >= 0) & (starts <= last), axis=-1)
    starts = np.clip(starts, 0, last)
    if mode == Mode.CLIP:
        inside = np.ones_like(inside)
    positions = [
        starts[(..., axis, *[None] * len(shape))]
        + np.expand_dims(np.arange(size), [i for i in range(len(shape)) if i != axis])
        for axis, size in enumerate(sizes)
    ]
    return tuple(positions), inside


def _gather(params, x, indices):
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batched = zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    )
    mode, fill = params["mode"], params["fill_value"]
    positions, inside = _windows(
        x.shape, indices, sizes, mode, numbers.start_index_map, batched
    )
    found = x[positions]
    if mode == Mode.FILL_OR_DROP:
        if fill is None:
            is_whole = np.issubdtype(x.dtype, np.integer)
            fill = np.iinfo(x.dtype).min if is_whole else np.nan
        found = np.where(
            inside[(..., *[None] * x.ndim)], found, np.asarray(fill, x.dtype)
        )
    left_out = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    found = np.squeeze(found, tuple(inside.ndim + axis for axis in left_out))
    return np.moveaxis(found, range(inside.ndim, found.ndim), list(numbers.offset_dims))


def _scatter(write):
    def scatter(params, x, indices, updates):
        numbers = params["dimension_numbers"]
        windows, batching = numbers.update_window_dims, numbers.operand_batching_dims
        batched = zip(batching, numbers.scatter_indices_batching_dims, strict=True)
        ones = sorted({*numbers.inserted_window_dims, *batching})
        leading = indices.ndim - 1
        updates = np.moveaxis(updates, list(windows), range(leading, updates.ndim))
        updates = np.expand_dims(updates, [leading + axis for axis in ones])
        positions, inside = _windows(
            x.shape, indices, updates.shape[leading:], params["mode"],
            numbers.scatter_dims_to_operand_dims, batched,
        )  # fmt: skip
        x = x.copy()
        positions = np.broadcast_arrays(*positions)
        write(x, tuple(each[inside] for each in positions), updates[inside])
        return x

    return scatter


def _elementwise(function):
    return lambda _, *operands: function(*operands)


def _over_axes(function):
    return lambda params, x: function(x, axis=tuple(params["axes"]))


IN_NUMPY = {
    name: _elementwise(function)
    for name, function in {
        "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply,
        "neg": np.negative, "max": np.maximum, "min": np.minimum, "abs": np.abs,
        "exp": np.exp, "log": np.log, "log1p": np.log1p, "tanh": np.tanh,
        "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt, "floor": np.floor,
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
        "gt": np.greater, "ge": np.greater_equal, "and": np.bitwise_and,
        "or": np.bitwise_or, "not": np.invert, "is_finite": np.isfinite,
        "square": np.square, "copy": np.asarray, "atan2": np.arctan2, "expm1": np.expm1,
        "rem": np.fmod, "pow": np.power, "stop_gradient": np.asarray,
    }.items()
}  # fmt: skip
IN_NUMPY |= {
    "argmax": lambda p, x: np.argmax(x, *p["axes"]),
    "argmin": lambda p, x: np.argmin(x, *p["axes"]),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "clamp": lambda _, low, x, high: np.minimum(np.maximum(low, x), high),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "convert_element_type": lambda p, x: x.astype(p["new_dtype"]),
    "div": _div,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "integer_pow": lambda p, x: x ** np.asarray(p["y"], x.dtype),
    "iota": _iota,
    "pad": _pad,
    "reduce_sum": _over_axes(np.sum),
    "reduce_max": _over_axes(np.max),
    "reduce_min": _over_axes(np.min),
    "reduce_and": _over_axes(np.all),
    "reduce_or": _over_axes(np.any),
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "scatter": _scatter(lambda x, at, new: x.__setitem__(at, new)),
    "scatter-add": _scatter(np.add.at),
    "scatter-mul": _scatter(np.multiply.at),
    "select_n": _select,
    "slice": _slice,
    "split": lambda p, x: np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"]),
    "squeeze": lambda p, x: np.squeeze(x, tuple(p["dimensions"])),
    "stack": lambda p, *xs: np.stack(xs, p["axis"]),
    "transpose": lambda p, x: x.transpose(p["permutation"]),
}
