"""How long `value_and_row_grad` takes to trace: `python -m benchmarks.tracing`.

Two models, a DLRM with 26 tables and a transformer that recommends items (SASRec), are
traced with `value_and_row_grad` and `jax.value_and_grad` in turns, each time as a new
function. Prints the median seconds of CPU that tracing takes, those of the whole first
call (tracing, lowering, compiling and running), and ours in units of JAX's.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import machine
from monolith_optax import value_and_row_grad

ROWS, DIM, BATCH = 1000, 16, 32
LENGTH, BLOCKS, HEADS = 20, 2, 2
TRANSFORMS: list[Any] = [value_and_row_grad, jax.value_and_grad]

Loss = Callable[[Any, Any], jax.Array]
Stage = Callable[[Any, Any], None]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few runs")
    quick = parser.parse_args().quick
    print(", ".join(f"{name}: {fact}" for name, fact in machine().items()))
    stages: dict[str, tuple[Stage, int]] = {
        "tracing": (trace, 2 if quick else 30),
        "a first call": (call, 1 if quick else 8),
    }
    print("\n| model | CPU seconds of | ours | JAX's | ratio |")
    print("|---|---|---:|---:|---:|")
    for name, model in {"DLRM": dlrm, "SASRec": sasrec}.items():
        loss, params, batch = model(np.random.default_rng(0))
        for title, (stage, rounds) in stages.items():
            ours, theirs = medians(stage, loss, (params, batch), rounds)
            figures = f"{ours:.3f} | {theirs:.3f} | {ours / theirs:.2f}"
            print(f"| {name} | {title} | {figures} |", flush=True)


def medians(stage: Stage, loss: Loss, args: Any, rounds: int) -> list[float]:
    """The median seconds of each side, which take turns."""
    seconds: list[list[float]] = [[] for _ in TRANSFORMS]
    for number in range(rounds + 1):
        for its_seconds, transform in zip(seconds, TRANSFORMS, strict=True):
            jitted = jax.jit(transform(lambda *args: loss(*args)))
            start = time.process_time()
            stage(jitted, args)
            if number:  # the first round fills JAX's own caches
                its_seconds.append(time.process_time() - start)
    return list(map(statistics.median, seconds))


def trace(jitted: Any, args: Any) -> None:
    """Only traces."""
    jitted.trace(*args)


def call(jitted: Any, args: Any) -> None:
    """Traces, lowers, compiles and runs."""
    jax.block_until_ready(jitted(*args))


def dlrm(rng: np.random.Generator) -> tuple[Loss, Any, Any]:
    """Two perceptrons around the products of 26 embeddings and the dense features."""
    pairs = np.triu_indices(27, 1)
    params = {
        "tables": {f"table{i:02}": normal(rng, ROWS, DIM) for i in range(26)},
        "bottom": layers(rng, 13, 64, DIM),
        "top": layers(rng, DIM + len(pairs[0]), 64, 1),
    }
    batch = {
        "dense": normal(rng, BATCH, 13),
        "ids": jnp.asarray(rng.integers(0, ROWS, (26, BATCH)), jnp.int32),
        "clicked": jnp.asarray(rng.integers(0, 2, BATCH), jnp.float32),
    }

    def loss(params: Any, batch: Any) -> jax.Array:
        dense = perceptron(params["bottom"], batch["dense"])
        tables = params["tables"].values()
        found = [table[ids] for table, ids in zip(tables, batch["ids"], strict=True)]
        features = jnp.stack([dense, *found], axis=1)
        products = jnp.einsum("bik,bjk->bij", features, features)
        top = jnp.concatenate([dense, products[:, pairs[0], pairs[1]]], axis=1)
        logits = perceptron(params["top"], top)[:, 0]
        losses = jax.nn.softplus(logits) - batch["clicked"] * logits
        return jnp.mean(losses)

    return loss, params, batch


def sasrec(rng: np.random.Generator) -> tuple[Loss, Any, Any]:
    """Causal self-attention over a history; the next item against a random one."""
    blocks = [
        {
            "attention": {k: normal(rng, DIM, DIM) for k in "qkvo"},
            "mlp": layers(rng, DIM, 4 * DIM, DIM),
            "norms": jnp.ones((2, DIM)),
        }
        for _ in range(BLOCKS)
    ]
    params = {
        "items": normal(rng, ROWS, DIM),
        "positions": normal(rng, LENGTH, DIM),
        "blocks": blocks,
    }
    shape = 3, BATCH, LENGTH
    batch = jnp.asarray(rng.integers(1, ROWS, shape), jnp.int32)

    def loss(params: Any, batch: Any) -> jax.Array:
        history, following, others = batch
        x = params["items"][history] + params["positions"]
        for block in params["blocks"]:
            x = x + attention(block["attention"], normalised(x, block["norms"][0]))
            x = x + perceptron(block["mlp"], normalised(x, block["norms"][1]))
        right = jnp.sum(x * params["items"][following], -1)
        wrong = jnp.sum(x * params["items"][others], -1)
        return jnp.mean(jax.nn.softplus(-right) + jax.nn.softplus(wrong))

    return loss, params, batch


def attention(weights: Any, x: jax.Array) -> jax.Array:
    """Causal attention of several heads."""
    q, k, v = ((x @ weights[n]).reshape(BATCH, LENGTH, HEADS, -1) for n in "qkv")
    values = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    after: jax.Array = values.reshape(x.shape) @ weights["o"]
    return after


def normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer normalisation without a bias."""
    return jax.nn.standardize(x, axis=-1) * scale


def perceptron(layers: Any, x: jax.Array) -> jax.Array:
    """Dense layers with ReLU between them."""
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    after: jax.Array = x @ layers[-1]["kernel"] + layers[-1]["bias"]
    return after


def layers(rng: np.random.Generator, *sizes: int) -> list[dict[str, jax.Array]]:
    """The parameters of dense layers."""
    return [
        {"kernel": normal(rng, before, after), "bias": jnp.zeros(after)}
        for before, after in itertools.pairwise(sizes)
    ]


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    """Small random numbers."""
    return jnp.asarray(rng.normal(size=shape, scale=0.1), jnp.float32)


if __name__ == "__main__":
    main()
