"""The rules of embedding tables in NumPy float64, as Monolith's kernels write them.

Each takes gradients of shape (steps, rows, dim), a table and all hyperparameters, and
returns the table, under "var", and the slots after the last step.
"""

import numpy as np


def per_row(rows, number=0.0):
    """A slot of one number per row."""
    return np.full((rows, 1), np.float64(number))


def sgd(grads, w, *, learning_rate):
    for g in grads:
        w = w - learning_rate * g
    return {"var": w}


def adagrad(
    grads,
    w,
    *,
    learning_rate,
    initial_accumulator_value,
    weight_decay_factor,
    bug_compatible=False,
):
    norm = np.full_like(w, initial_accumulator_value)
    for g in grads:
        d = g + weight_decay_factor * w
        norm = norm + d**2
        moves = d.copy()
        if bug_compatible:
            whole = w.shape[1] // 8 * 8
            moves[:, :whole] = g[:, :whole]
        w = w - learning_rate / np.sqrt(norm) * moves
    return {"var": w, "norm": norm}


def rowwise_adagrad(grads, w, *, learning_rate, eps, weight_decay):
    sum_square = per_row(len(w))
    for g in grads:
        d = g + weight_decay * w
        sum_square = sum_square + (d**2).mean(axis=1, keepdims=True)
        w = w - learning_rate * d / (np.sqrt(sum_square) + eps)
    return {"var": w, "sum_square": sum_square[:, 0]}


def adadelta(grads, w, *, learning_rate, weight_decay_factor, averaging_ratio, epsilon):
    accum, accum_update = np.zeros_like(w), np.zeros_like(w)
    for g in grads:
        d = g + weight_decay_factor * w
        accum = averaging_ratio * accum + (1 - averaging_ratio) * d**2
        u = np.sqrt(accum_update + epsilon) / np.sqrt(accum + epsilon) * d
        w = w - learning_rate * u
        accum_update = averaging_ratio * accum_update + (1 - averaging_ratio) * u**2
    return {"var": w, "accum": accum, "accum_update": accum_update}


def adam(
    grads,
    w,
    *,
    learning_rate,
    beta1,
    beta2,
    weight_decay_factor,
    use_nesterov,
    epsilon,
    amsgrad=False,
):
    m, v, vhat = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for step, g in enumerate(grads, start=1):
        a = learning_rate * np.sqrt(1 - beta2**step) / (1 - beta1**step)
        d = g + weight_decay_factor * w
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d**2
        vhat = np.maximum(vhat, v)
        ahead = (1 - beta1) * d + beta1 * m if use_nesterov else m
        w = w - a * ahead / (np.sqrt(vhat if amsgrad else v) + epsilon)
    powers = {
        "beta1_power": np.full(len(w), beta1 ** (len(grads) + 1)),
        "beta2_power": np.full(len(w), beta2 ** (len(grads) + 1)),
    }
    return {"var": w, "m": m, "v": v} | powers | ({"vhat": vhat} if amsgrad else {})


def amsgrad(grads, w, **options):
    return adam(grads, w, **options, amsgrad=True)


def momentum(grads, w, *, learning_rate, weight_decay_factor, use_nesterov, momentum):
    n = np.zeros_like(w)
    for g in grads:
        old = n
        n = momentum * n - learning_rate * (g + weight_decay_factor * w)
        w = w - momentum * old + (1 + momentum) * n if use_nesterov else w + n
    return {"var": w, "n": n}


def moving_average(grads, w, *, momentum):
    for g in grads:
        w = momentum * w + (1 - momentum) * g
    return {"var": w}


def rmsprop(grads, w, *, learning_rate, weight_decay_factor, momentum, share=None):
    n = np.zeros_like(w)
    for g in grads:
        d = g + weight_decay_factor * w
        n = momentum * n + (1 - momentum if share is None else share) * d**2
        w = w - learning_rate / (np.sqrt(n) + 1) * d
    return {"var": w, "n": n}


def rmspropv2(grads, w, **options):
    return rmsprop(grads, w, **options, share=1.0)


def group_adagrad(
    grads,
    w,
    *,
    learning_rate,
    beta,
    initial_accumulator_value,
    l2_regularization,
    weight_decay_factor,
):
    total = per_row(len(w), initial_accumulator_value)
    for g in grads:
        d = g + weight_decay_factor * w
        total = total + (d**2).max(axis=1, keepdims=True)
        a = learning_rate / (beta + np.sqrt(total))
        z = d - w / a
        n = np.linalg.norm(z, axis=1, keepdims=True)
        w = np.where(n < l2_regularization, 0, -a * (n - l2_regularization) / n * z)
    return {"var": w, "grad_square_sum": total[:, 0]}


def ftrl(
    grads,
    w,
    *,
    learning_rate,
    initial_accumulator_value,
    beta,
    l1_regularization,
    l2_regularization,
    bug_compatible=False,
):
    norm, zero = np.full_like(w, initial_accumulator_value), np.zeros_like(w)
    for g in grads:
        old = norm
        norm = norm + g**2
        zero = zero + g - (np.sqrt(norm) - np.sqrt(old)) / learning_rate * w
        sign = np.where(zero < 0, 1, 0) if bug_compatible else np.sign(zero)
        below = np.sqrt(norm) + beta + l2_regularization * learning_rate
        w = learning_rate * (sign * l1_regularization - zero) / below
        w = np.where(np.abs(zero) > l1_regularization, w, 0)
    return {"var": w, "norm": norm, "zero": zero}


def group_ftrl(
    grads,
    w,
    *,
    learning_rate,
    initial_accumulator_value,
    beta,
    l1_regularization,
    l2_regularization,
    bug_compatible=False,
):
    norm, zero = np.full_like(w, initial_accumulator_value), np.zeros_like(w)
    sign = np.ones(w.shape[1])
    if bug_compatible:
        sign[: w.shape[1] // 8 * 8] = -1
    for g in grads:
        old = norm
        norm = norm + g**2
        zero = zero + g - (np.sqrt(norm) - np.sqrt(old)) / learning_rate * w
        n = np.linalg.norm(zero, axis=1, keepdims=True)
        below = np.sqrt(norm) + beta + sign * l2_regularization * learning_rate
        w = learning_rate * zero * (l1_regularization - n) / n / below
        w = np.where(n < l1_regularization, 0, w)
    return {"var": w, "norm": norm, "zero": zero}


def batch_softmax(grads, w, *, learning_rate):
    last = np.zeros(len(w))
    for now in range(len(grads)):
        w = w.copy()
        w[:, 0] = (1 - learning_rate) * w[:, 0] + learning_rate * (now - last)
        last = np.full(len(w), float(now))
    return {"var": w, "global_step": last}
