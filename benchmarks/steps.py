"""Whole optimizer steps on trees: ours, optax's and those of other frameworks.

A step of ours or of optax is the update and `optax.apply_updates`, jitted, with
parameters and state donated. A step of PyTorch is `optimizer.step()` of its fused Adam;
a step of TensorFlow is the kernel `ResourceApplyAdam` on each variable in one graph
function.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from registry import VARIANTS

from benchmarks.measure import Side

RATE = 1e-3
ON_GPU = jax.default_backend() == "gpu"
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    name: functools.partial(variant.make, learning_rate=RATE)
    for name, variant in VARIANTS.items()
    # Of the rules that treat each entry by itself, whose limit is the memory.
    if variant.row.is_dense and not variant.row.by_row and not variant.decays
} | {
    "optax.adam": lambda: optax.adam(RATE),
    "optax.rmsprop, momentum": lambda: optax.rmsprop(RATE, momentum=0.9),
}


class Step:
    """A step of an optax optimizer, jitted and donated."""

    def __init__(
        self, tx: optax.GradientTransformation, params: Any, gradients: Any
    ) -> None:
        """Compiles the step for copies of the parameters."""

        def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        self.gradients: Any = gradients
        self.carry = params, jax.jit(tx.init)(params)
        self.jitted = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> None:
        """Takes a step and waits for its results."""
        self.carry = jax.block_until_ready(self.jitted(*self.carry, self.gradients))

    def bytes_moved(self) -> int:
        """Reads gradients, parameters and slots once; writes all but the gradients."""
        carry, gradients = (
            sum(int(leaf.nbytes) for leaf in jax.tree.leaves(tree))
            for tree in (self.carry, self.gradients)
        )
        return 2 * carry + gradients

    def side(self) -> Side:
        """The step, with nothing to prepare."""
        return lambda: self


def torch_adam(params: Any, gradients: Any) -> Side:
    """PyTorch's fused Adam, on JAX's device."""
    torch = importlib.import_module("torch")
    # On small leaves, waking a second thread costs more than the step.
    small = all(leaf.size < 10_000 for leaf in jax.tree.leaves(params))
    torch.set_num_threads(1 if small else 2)
    leaves = []
    for param, gradient in zip(
        jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True
    ):
        dtype = getattr(torch, param.dtype.name)
        leaf, leaf.grad = (
            torch.from_numpy(_float32(array)).to(torch_device(), dtype)
            for array in (param, gradient)
        )
        leaves.append(leaf)
    optimizer = torch.optim.Adam(leaves, lr=RATE, fused=True)
    return lambda: torch_ready(optimizer.step)


def torch_device() -> str:
    """PyTorch's name of JAX's device."""
    return "cuda" if ON_GPU else "cpu"


def torch_ready(run: Callable[[], object]) -> Callable[[], object]:
    """What runs and waits for its results, as on CPU everything does."""
    if not ON_GPU:
        return run
    torch = importlib.import_module("torch")
    torch.cuda.synchronize()

    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize()

    return run_and_wait


def tensorflow_adam(params: Any, gradients: Any) -> Side:
    """TensorFlow's Adam kernel, on every variable."""
    only_on_cpu()
    tf = importlib.import_module("tensorflow")
    variables, slots, constants = [], [], []
    for param, gradient in zip(
        jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True
    ):
        dtype = param.dtype.name
        variables.append(tf.Variable(tf.cast(_float32(param), dtype)))
        slots.append([tf.Variable(tf.zeros(param.shape, dtype)) for _ in range(2)])
        constants.append(tf.cast(_float32(gradient), dtype))

    @tf.function  # type: ignore[untyped-decorator]
    def step(constants: list[Any]) -> None:
        for variable, (m, v), gradient in zip(variables, slots, constants, strict=True):
            beta1, beta2, rate, epsilon = (
                tf.cast(x, variable.dtype) for x in (0.9, 0.999, RATE, 1e-8)
            )
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=beta1,
                beta2_power=beta2,
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                epsilon=epsilon,
                grad=gradient,
            )

    return lambda: lambda: step(constants)


def only_on_cpu() -> None:
    """Leaves out a peer that here has no kernel for a GPU."""
    if ON_GPU:
        raise ImportError("it is compared on CPU only.")


def _float32(array: Any) -> np.ndarray:
    return np.array(array, np.float32)


def peers(params: Any, gradients: Any) -> dict[str, Side]:
    """The steps of the other frameworks; prints those that are not installed."""
    sides = {}
    for title, make in {
        "PyTorch, fused Adam": torch_adam,
        "TensorFlow, Adam": tensorflow_adam,
    }.items():
        try:
            sides[title] = make(params, gradients)
        except ImportError as error:
            print(f"{title} is left out: {error}")
    return sides


def copy(num_bytes: int) -> Step:
    """A step that reads and writes each number once, and so moves that many bytes."""
    flip = optax.stateless(lambda _, params: -2 * params)
    # On a GPU, XLA moves one number at a time where their count is not a multiple of 4.
    size = max(num_bytes // 8 // 1024, 1) * 1024
    return Step(flip, jnp.ones(size), None)
