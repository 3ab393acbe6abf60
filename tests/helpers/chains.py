"""What random optimizers are chained of, and what is put around them."""

import jax
import optax


def partition(tx):
    return optax.partition({"a": tx, "b": optax.sgd(0.1)}, {"table": "a", "dense": "b"})


PIECES = {
    "clip": lambda x: optax.clip(x),
    "clip_norm": lambda x: optax.clip_by_global_norm(x),
    "clip_rms": lambda x: optax.clip_by_block_rms(x),
    "normalize": lambda _: optax.normalize_by_update_norm(),
    "centralize": lambda _: optax.centralize(),
    "decay": lambda x: optax.add_decayed_weights(x, mask=large),
    "adam": lambda x: optax.scale_by_adam(b1=0.9 * min(x, 1.0)),
    "rss": lambda x: optax.scale_by_rss(x),
    "rms": lambda x: optax.scale_by_rms(initial_scale=x),
    "novograd": lambda _: optax.scale_by_novograd(),
    "trace": lambda x: optax.trace(0.5 * min(x, 1.0)),
    "sign": lambda _: optax.scale_by_sign(),
    "schedule": lambda x: optax.scale_by_schedule(optax.linear_schedule(x, 0.0, 5)),
    "zero_nans": lambda _: optax.zero_nans(),
    "ema": lambda x: optax.ema(0.5 * min(x, 1.0)),
    "belief": lambda _: optax.scale_by_belief(),
    "trust_ratio": lambda _: optax.scale_by_trust_ratio(),
    "factored": lambda _: optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    "block_norm": lambda _: optax.scale_by_param_block_norm(),
}
WRAPPERS = {
    "nothing": lambda tx: tx,
    "masked": lambda tx: optax.masked(tx, large),
    "finite": lambda tx: optax.apply_if_finite(tx, 2),
    "partition": partition,
    "some_steps": lambda tx: optax.conditionally_transform(tx, lambda step: step != 1),
}


def large(params):
    return jax.tree.map(lambda x: x.size > 10, params)
