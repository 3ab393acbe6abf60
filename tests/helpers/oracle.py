"""The update rules in NumPy float64, written from the equations and nothing else."""

import numpy as np


def adamom(
    grads, w, *, learning_rate, ada_decay, mom_decay, epsilon, weight_decay, use_v2
):
    """Returns the variable and the slots m, v, c after each gradient in turn."""
    w = np.asarray(w, np.float64)
    m, v, c = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for grad in grads:
        g = weight_decay * w + grad
        m = mom_decay * m + (1 - mom_decay) * g
        v = ada_decay * v + g**2
        c = ada_decay * c + 1
        if use_v2:
            w = w - learning_rate * m / (np.sqrt(v / c) + epsilon)
        else:
            w = w - learning_rate * m / np.sqrt(v / c + epsilon)
    return {"var": w, "m": m, "v": v, "c": c}


def rmsprop(grads, w, *, learning_rate, beta1, beta2, epsilon, weight_decay, use_v2):
    """Returns the variable and the slots m, v after each gradient in turn."""
    w = np.asarray(w, np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for grad in grads:
        g = weight_decay * w + grad
        if use_v2:
            v = beta2 * v + g**2
            m = beta1 * m + learning_rate * g / (np.sqrt(v) + epsilon)
        else:
            v = v + (g**2 - v) * (1 - beta2)
            m = beta1 * m + learning_rate * g / np.sqrt(v + epsilon)
        w = w - m
    return {"var": w, "m": m, "v": v}
