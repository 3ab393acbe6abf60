"""What lazy_rows makes of the optimizers of optax: right, or refused."""

import jax
import optax
import pytest
from chains import PIECES, WRAPPERS, partition
from choosing import sampled
from dense_rows import assert_lazy_is_dense, batches, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from optax import contrib
from registry import VARIANTS

from monolith_optax import lazy_rows

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes")

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
    "novograd": lambda: optax.novograd(0.1),
    **{f"ours: {name}": v.make for name, v in VARIANTS.items() if v.row.for_rows},
}
REFUSED = {
    "schedule_free": lambda: contrib.schedule_free_adamw(0.1),
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
    **{f"ours: {name}": v.make for name, v in VARIANTS.items() if not v.row.for_rows},
}
if hasattr(contrib, "galore"):
    REFUSED["galore"] = lambda: contrib.galore(0.1)


def injected(tx):
    return optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate)), hyperparam_dtype="float64"
    )(rate=0.5)


AROUND = {
    "clipped": lambda tx: optax.chain(optax.clip_by_global_norm(0.5), tx),
    "masked": lambda tx: optax.masked(tx, {"table": True, "dense": False}),
    "partition": partition,
    "injected": injected,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


COMMON = ["adam", "rmsprop_centered", "novograd"]
OURS = [name for name in ACCEPTED if name.startswith("ours")]


@pytest.mark.parametrize("name", sampled(ACCEPTED, *COMMON, *OURS))
def test_accepted_and_right(name):
    assert_lazy_is_dense(ACCEPTED[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_and_right_inside_others(name):
    inner = ACCEPTED[name]()
    for around in AROUND.values():
        inner = around(inner)
    assert_lazy_is_dense(inner)


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_inside_each_other(name, around):
    assert lazily(AROUND[around](ACCEPTED[name]()))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    for around in [lambda tx: tx, *AROUND.values()]:
        inner = REFUSED[name]()
        if isinstance(inner, optax.MultiSteps):
            inner = inner.gradient_transformation()
        with pytest.raises(ValueError, match="lazy_rows needs"):
            lazily(around(inner))


def lazily(inner):
    """The types that a lazy step gives."""
    tx, params = lazy_rows(inner), parameters()
    return jax.eval_shape(tx.update, next(batches()), tx.init(params), params)


@pytest.mark.parametrize("scale", sampled([1e-3, 1.0, 1e3], 1e3))
@pytest.mark.parametrize(
    "name",
    sampled(["adam", "adagrad", "novograd", "rmsprop_centered"], "adam", "novograd"),
)
def test_in_float32(name, scale):
    clipped = optax.chain(optax.clip_by_global_norm(0.5), ACCEPTED[name]())
    assert_lazy_is_dense(clipped, scale=scale, dtype="float32", rtol=2e-5)


LINKS = st.tuples(
    st.sampled_from(sorted(PIECES)),
    st.sampled_from([0.01, 0.3, 1.0, 20.0]),
    st.sampled_from(sorted(WRAPPERS)),
)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.lists(LINKS, min_size=1, max_size=4), st.sampled_from([1e-3, 1.0, 1e3]))
def test_random_chains_are_right_or_refused(links, scale):
    inner = optax.chain(*(WRAPPERS[wrap](PIECES[name](x)) for name, x, wrap in links))
    try:
        lazily(inner)
    except ValueError as error:
        assert "lazy_rows needs" in str(error)  # noqa: PT017
        mixing = {"trust_ratio", "factored", "block_norm", "clip_norm", "clip_rms"}
        mixing |= {"normalize", "novograd"}
        assert mixing & {name for name, _, _ in links}
    else:
        assert_lazy_is_dense(inner, scale=scale)
