"""Every primitive of JAX, and whether it keeps the rows of a table apart.

A test holds that each primitive of the JAX that is installed is in one of these sets,
or in the rules and reductions that say more: `row_rules.RULES`, `reductions.NAMES` and
the calls in `jaxprs.py`. What is in none of them is an error when it meets rows.
"""

# Each entry of a result depends on the same entry of each operand, which may also be a
# number, or of length 1 along some axes.
ELEMENTWISE = frozenset(
    {"abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2"}
    | {"atanh", "bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil"}
    | {"clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p"}
    | {"cos", "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp"}
    | {"exp2", "expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a", "igammac"}
    | {"imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p"}
    | {"log2", "logistic", "lt", "lt_to", "max", "min", "mul", "name", "ne", "neg"}
    | {"nextafter", "not", "one_minus_square", "optimization_barrier", "or", "pcast"}
    | {"polygamma", "polynomial", "population_count", "pow", "pvary"}
    | {"random_fold_in", "random_unwrap", "random_wrap", "real", "reduce_precision"}
    | {"regularized_incomplete_beta", "rem", "reshard", "round", "rsqrt", "select_n"}
    | {"shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin"}
    | {"sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor", "zeta"}
)

# These make rows from something that has none.
MAKERS = frozenset({"broadcast_in_dim", "iota", "random_bits"})

# These say where arrays are, and change no number.
PLACEMENTS = frozenset({"optimization_barrier", "pcast", "pvary", "reshard"})

# What these say of whole tables need not hold for rows of a batch.
HINTS = frozenset({"optimization_barrier", "sharding_constraint"})

# Entries meet others of their array, in ways that no rule reads.
MIXING = frozenset(
    # linear algebra
    {"cholesky", "custom_linear_solve", "eig", "eigh", "hessenberg"}
    | {"householder_product", "lu", "qr", "schur", "svd", "triangular_solve"}
    | {"tridiagonal", "tridiagonal_solve"}
    # lookups, updates and windows
    | {"conv_general_dilated", "dynamic_slice", "dynamic_update_slice", "fft"}
    | {"gather", "reduce_window", "reduce_window_max", "reduce_window_min"}
    | {"reduce_window_sum", "scatter", "scatter-add", "scatter-max", "scatter-min"}
    | {"scatter-mul", "select_and_gather_add", "select_and_scatter"}
    | {"select_and_scatter_add"}
    # any function of one's own, loops among them
    | {"approx_top_k", "custom_lin", "eval_jaxpr", "reduce", "scan", "shard_map"}
    | {"while", "xla_pmap"}
    # devices, and effects
    | {"after_all", "all_gather", "all_to_all", "axis_index", "create_token"}
    | {"device_put", "get", "pmax", "pmin", "ppermute", "psum", "ragged_all_to_all"}
    | {"swap"}
    # arrays and random numbers that are new for each shape
    | {"empty2", "random_gamma", "random_seed", "random_split", "rng_bit_generator"}
    | {"rng_uniform", "threefry2x32"}
)
