"""What lazy_rows makes of the optimizers of optax: right, or refused."""

import jax
import optax
import pytest
from dense_rows import assert_lazy_is_dense, batches, parameters
from optax import contrib
from registry import VARIANTS

from monolith_optax import lazy_rows

ACCEPTED = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "nadam": lambda: optax.nadam(0.1),
    "adamax": lambda: optax.adamax(0.1),
    "adabelief": lambda: optax.adabelief(0.1),
    "yogi": lambda: optax.yogi(0.1),
    "lion": lambda: optax.lion(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "adadelta": lambda: optax.adadelta(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "rmsprop_centered": lambda: optax.rmsprop(0.1, centered=True, momentum=0.9),
    "radam": lambda: optax.radam(0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "adan": lambda: optax.adan(0.1),
    "rprop": lambda: optax.rprop(0.1),
    "adopt": lambda: contrib.adopt(0.1),
    "ademamix": lambda: contrib.ademamix(0.1),
    "madgrad": lambda: contrib.madgrad(0.1),
    "schedule_free": lambda: contrib.schedule_free_adamw(0.1),
    "novograd": lambda: optax.novograd(0.1),
    **{name: variant.make for name, variant in VARIANTS.items()},
}
REFUSED = {
    "lamb": lambda: optax.lamb(0.1),
    "lars": lambda: optax.lars(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "sm3": lambda: optax.sm3(0.1),
    "muon": lambda: contrib.muon(0.1),
    "dog": lambda: contrib.dog(1.0),
    "dowg": lambda: contrib.dowg(1.0),
    "prodigy": lambda: contrib.prodigy(1.0),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(1.0),
    "multi_steps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "apply_every": lambda: optax.apply_every(2),
    "sam": lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "lbfgs": lambda: optax.lbfgs(linesearch=None),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
}
if hasattr(contrib, "galore"):
    REFUSED["galore"] = lambda: contrib.galore(0.1)
AROUND = {
    "alone": lambda tx: tx,
    "clipped": lambda tx: optax.chain(optax.clip_by_global_norm(0.5), tx),
    "masked": lambda tx: optax.masked(tx, {"table": True, "dense": False}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)}, {"table": "a", "dense": "b"}
    ),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(rate=0.5),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.fixture(autouse=True)
def wide():
    """64 bits; and some of optax's own optimizers mix dtypes."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_and_right(name, around):
    assert_lazy_is_dense(AROUND[around](ACCEPTED[name]()))


@pytest.mark.parametrize("around", ["alone", "clipped", "masked", "apply_if_finite"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, around):
    inner = REFUSED[name]()
    params = parameters()
    tx = lazy_rows(AROUND[around](inner) if around != "alone" else inner)
    with pytest.raises(ValueError, match="lazy_rows needs"):
        tx.update(next(batches()), tx.init(params), params)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", ["adam", "adagrad", "novograd", "rmsprop_centered"])
def test_in_float32(name, scale):
    clipped = optax.chain(optax.clip_by_global_norm(0.5), ACCEPTED[name]())
    assert_lazy_is_dense(clipped, scale=scale, dtype="float32", rtol=2e-5)
